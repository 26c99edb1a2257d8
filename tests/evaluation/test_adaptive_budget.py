import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from promag.evaluation.adaptive_budget import adaptive_figures, allocate, segment_psnr, segment_psnr_of_whole, sweep
from promag.evaluation.budgets import ClipFacts, own_budgets
from promag.tokenizer.metrics import psnr
from promag.training.precision import autocast

TOKENS = {"4x": 17, "8x": 9, "16x": 5}
PARTS = [{"4x": 30.0, "8x": 29.0, "16x": 28.0}, {"4x": 26.0, "8x": 24.0, "16x": 21.0}, {"4x": 20.0, "8x": 19.0, "16x": 18.0}]


def test_each_part_gets_the_smallest_level_that_is_good_enough():
    allocation = allocate(PARTS[:2], TOKENS, 23.0)
    assert allocation.levels == ("16x", "8x")
    assert (allocation.tokens, allocation.worst, allocation.missed) == (14, 24.0, 0)
    # 8x everywhere has the same worst part, and costs 18.
    assert (allocation.fixed, allocation.fixed_tokens) == ("8x", 18)
    assert allocation.saved == pytest.approx(4 / 18)


def test_parts_below_the_target_at_every_level_get_the_best_level_and_are_counted():
    allocation = allocate(PARTS, TOKENS, 25.0)
    assert allocation.levels == ("16x", "4x", "4x")
    assert (allocation.missed, allocation.worst, allocation.fixed) == (1, 20.0, "4x")


def test_segments_are_compared_with_whole_clips_at_the_fixed_level():
    """Four segments of a clip of 65 frames have four first frames; the clip at one level has one."""
    segments = [{"4x": 31.0, "8x": 30.0, "16x": 29.0}] * 2 + [{"4x": 28.0, "8x": 27.0, "16x": 20.0}] * 2
    whole = [{"4x": 31.0, "8x": 29.5, "16x": 26.0}] * 2 + [{"4x": 28.0, "8x": 27.5, "16x": 19.0}] * 2
    allocation = allocate(segments, {"4x": 5, "8x": 3, "16x": 2}, 25.0, whole, TOKENS)
    assert (allocation.levels, allocation.tokens) == (("16x", "16x", "8x", "8x"), 10)
    assert (allocation.fixed, allocation.fixed_tokens, allocation.fixed_worst) == ("8x", 9, 27.5)
    assert allocation.saved == pytest.approx(1 - 10 / 9)
    whole[3] = {"4x": 28.0, "8x": 26.5, "16x": 19.0}  # coded whole, 8x is worse than the segments
    (row,) = sweep(segments, {"4x": 5, "8x": 3, "16x": 2}, [25.0], whole, TOKENS)
    assert [row[key] for key in ("fixed", "fixed_tokens", "fixed_worst")] == ["4x", 17, 28.0]


def test_segments_of_a_whole_clip_average_errors_not_decibels():
    assert segment_psnr_of_whole({"4x": [30.0, 20.0, 40.0], "8x": [10.0, 10.0, 120.0]}, 2) == [
        {"4x": pytest.approx(-10 * math.log10((0.001 + 0.01) / 2)), "8x": pytest.approx(10.0)},
        {"4x": pytest.approx(40.0), "8x": pytest.approx(120.0)},
    ]


def test_levels_without_falling_tokens_are_refused():
    with pytest.raises(ValueError, match="falling tokens"):
        allocate(PARTS, {"4x": 9, "8x": 9, "16x": 5}, 25.0)
    with pytest.raises(ValueError, match="0 parts"):
        allocate([], TOKENS, 25.0)


part = st.fixed_dictionaries({name: st.floats(10, 40) for name in TOKENS})


@given(st.lists(part, min_size=1, max_size=8), st.floats(5, 45))
def test_an_allocation_costs_no_more_than_an_equally_good_fixed_level(parts, target):
    allocation = allocate(parts, TOKENS, target)
    if not allocation.missed:
        assert allocation.tokens <= allocation.fixed_tokens
        assert allocation.worst >= target
    assert allocation.worst == min(row[name] for row, name in zip(parts, allocation.levels, strict=True))
    (row,) = sweep(parts, TOKENS, [target])
    assert sum(row["parts"].values()) == len(parts)


def test_segments_are_coded_alone_and_compared_on_their_own_frames(tokenizer, clip):
    budgets = own_budgets(tokenizer)
    video = torch.nn.functional.interpolate(clip[:, :, :27], (27, 32, 32), mode="trilinear")
    results = segment_psnr(budgets, video, 17)
    assert len(results) == 2
    with torch.no_grad(), autocast("cpu"):
        first = tokenizer(video[:, :, :17], 16).sample
        padded = torch.cat([video[:, :, 17:], video[:, :, -1:].expand(-1, -1, 7, -1, -1)], 2)
        last = tokenizer(padded, 8).sample[:, :, :10]
    assert results[0]["16x"] == pytest.approx(float(psnr(first, video[:, :, :17])), abs=1e-4)
    assert results[1]["8x"] == pytest.approx(float(psnr(last, video[:, :, 17:])), abs=1e-4)


def test_figures_count_the_first_frame_of_every_segment(tokenizer):
    from promag.data.datasets import SyntheticDataset

    clips = SyntheticDataset("eval", 1, 33, 32)
    budgets = own_budgets(tokenizer)
    reconstruction = {b.name: {"per_clip": [{"psnr": 20.0}]} for b in budgets}
    frames = {b.name: [20.0] * 17 + [10.0] * 16 for b in budgets}
    facts = [ClipFacts("0", "", 8.0, {}, {**frames, "another": [0.0] * 33})]
    figures = adaptive_figures(budgets, reconstruction, facts, clips, (33, 32, 32), 17, 0.0)
    assert figures["tokens"]["16x"] == {"clip_tokens": 3 * 4, "segment_tokens": 2 * 4}
    assert figures["by_clip"]["tokens"] == 12  # every level reaches 0 dB
    assert figures["by_segment"]["tokens"] == 16
    assert len(figures["segment_psnr"][0]) == 2
    assert [figures[f"by_{kind}"]["fixed_tokens"] for kind in ("clip", "segment")] == [12, 12]
    assert figures["segment_psnr_of_whole"] == [[dict.fromkeys(frames, pytest.approx(value)) for value in (20.0, 10.0)]]
