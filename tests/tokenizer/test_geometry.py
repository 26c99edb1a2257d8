import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from promag.tokenizer.geometry import (
    check_chunk,
    check_frames,
    check_integer,
    check_ratio,
    check_size,
    latent_frames,
    nearest_frames,
    tokens,
)

ratios = st.sampled_from([4, 8, 16, 32])


@given(st.integers(1, 500), ratios)
def test_a_latent_frame_after_the_first_stands_for_as_many_frames_as_the_ratio(latents, ratio):
    assert latent_frames(1 + (latents - 1) * ratio, ratio) == latents


@given(st.integers(-5, 2000), ratios)
def test_nearest_frames_are_legal_and_nearest(frames, ratio):
    legal = [n for n in range(1, 2100) if (n - 1) % ratio == 0]
    below, above = [n for n in legal if n <= frames], [n for n in legal if n >= frames]
    expected = {*below[-1:], *above[:1]}
    assert set(nearest_frames(frames, ratio)) == expected


@given(st.integers(-5, 300), ratios)
def test_check_frames_refuses_exactly_the_illegal(frames, ratio):
    if frames >= 1 and (frames - 1) % ratio == 0:
        check_frames(frames, ratio)
    else:
        with pytest.raises(ValueError, match=f"{frames} frames"):
            check_frames(frames, ratio)


def test_errors_name_value_and_nearest_legal():
    with pytest.raises(ValueError, match=r"^34 frames: 16x needs 1 \+ 16k; use 33 or 49$"):
        check_frames(34, 16)
    with pytest.raises(ValueError, match=r"^18 frames in a later chunk: 16x needs a multiple of 16; use 16 or 32$"):
        check_chunk(18, 16)
    with pytest.raises(ValueError, match=r"^width 60: needs a multiple of 8; use 56 or 64$"):
        check_size(64, 60)
    with pytest.raises(ValueError, match=r"^temporal ratio 16: this tokenizer has 4x, 8x; grow it to 16x first$"):
        check_ratio(16, (4, 8))
    with pytest.raises(ValueError, match=r"^temporal ratio 5: this tokenizer has 4x, 8x$"):
        check_ratio(5, (4, 8))


def test_the_budgets_of_65_frames():
    assert [latent_frames(65, r) for r in (4, 8, 16)] == [17, 9, 5]
    assert [tokens(65, 64, 64, r) for r in (4, 8, 16)] == [17 * 16, 9 * 16, 5 * 16]
    assert tokens(65, 64, 64, 16, (1, 1, 1)) == 5 * 64


def test_tokens_refuse_a_patch_that_does_not_divide():
    with pytest.raises(ValueError, match="not divisible by patch"):
        tokens(65, 72, 64, 16)


NO_INTEGERS = [0.0, 16.0, 8.5, float("nan"), True, False, "16", None, [16], 16j]


@pytest.mark.parametrize("value", NO_INTEGERS)
def test_values_that_are_not_integers_are_refused_by_name(value):
    named = re.escape(repr(value))
    calls = {
        "frames": lambda: latent_frames(value, 4),
        "height": lambda: check_size(value, 8),
        "width": lambda: check_size(8, value),
        "window": lambda: check_integer("window", value),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"^{name} {named}: an integer is needed$"):
            call()
    with pytest.raises(ValueError, match=f"^frames {named}: an integer is needed$"):
        check_chunk(value, 4)
    with pytest.raises(ValueError, match=f"^temporal ratio {named}: this tokenizer has 4x, 8x$"):
        check_ratio(value, (4, 8))


def test_integers_of_numpy_are_accepted():
    check_size(np.int64(16), np.uint8(8))
    check_ratio(np.int32(8), (4, 8))  # pyright: ignore[reportArgumentType]
    assert latent_frames(np.int64(17), 4) == 5  # pyright: ignore[reportArgumentType]
