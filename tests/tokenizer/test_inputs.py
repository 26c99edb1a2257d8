"""What a tokenizer is given is refused by name if it is no clip, no latent or no ratio of its."""

import numpy as np
import pytest
import torch

from promag.tokenizer.streaming import chunk_plan, reconstruct

CLIP, LATENT = torch.zeros(1, 3, 17, 16, 24), torch.zeros(1, 4, 2, 2, 3)


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (np.zeros((1, 3, 17, 16, 24)), "input of type ndarray: a tensor B 3 T H W is needed"),
        (CLIP.byte(), r"input of torch\.uint8: a floating-point tensor is needed"),
        (CLIP[0], r"input of shape \(3, 17, 16, 24\): B 3 T H W"),
        (CLIP[:0], r"input of shape \(0, 3, 17, 16, 24\)"),
        (CLIP[..., :20], "width 20: needs a multiple of 8; use 16 or 24"),
        (CLIP[:, :, :0], r"0 frames: 16x needs 1 \+ 16k; use 1"),
        (None, "input of type NoneType"),
    ],
)
def test_pixels_that_are_no_clip_are_named(tokenizer, clip, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(clip, 16)
    with pytest.raises(ValueError, match=message):
        tokenizer.encode_levels(clip, [4, 16])


@pytest.mark.parametrize(
    ("latent", "message"),
    [
        (LATENT.numpy(), "latent of type ndarray: a tensor B 4 t h w is needed"),
        (LATENT.int(), r"latent of torch\.int32: a floating-point tensor"),
        (LATENT[:, :3], r"latent of shape \(1, 3, 2, 2, 3\): B 4 t h w"),
        (LATENT[:, :, :0], r"latent of shape \(1, 4, 0, 2, 3\): at least one frame"),
        ("x", "latent of type str"),
    ],
)
def test_what_is_no_latent_is_named(tokenizer, latent, message):
    for call in (lambda: tokenizer.decode(latent, 16), lambda: tokenizer.lift(latent, 16, 4)):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("ratios", [[], 4, "16", None])
def test_several_ratios_are_a_sequence(tokenizer, ratios):
    with pytest.raises(ValueError, match=r"temporal ratios .*: a sequence of at least one is needed"):
        tokenizer.encode_levels(CLIP, ratios)


@pytest.mark.parametrize("ratio", [0, 1.5, 16.0, float("nan"), float("inf"), True, "16", [16]])
def test_a_ratio_that_is_no_level_is_named(tokenizer, ratio):
    for call in (tokenizer.encode, tokenizer.decode):
        with pytest.raises(ValueError, match=r"temporal ratio .*: this tokenizer has 4x, 8x, 16x"):
            call(CLIP if call == tokenizer.encode else LATENT, ratio)


@pytest.mark.parametrize("chunk", [0, -16, 1.5, 24, float("nan"), True, "16"])
def test_a_chunk_that_is_no_multiple_of_the_ratio_is_named(tokenizer, chunk):
    with pytest.raises(ValueError, match="chunk"):
        chunk_plan(33, 16, chunk)
    with pytest.raises(ValueError, match="chunk"):
        reconstruct(tokenizer, CLIP, 16, chunk)


@pytest.mark.parametrize("size", [0, -8, 1.5, 12, float("nan"), float("inf"), True, "64"])
def test_tiles_of_illegal_sizes_are_named_and_change_nothing(tokenizer, size):
    before = tokenizer.tiling
    for name in ("tile_sample_min_height", "tile_sample_stride_width"):
        with pytest.raises(ValueError, match=r"(height|width) "):
            tokenizer.enable_tiling(**{name: size})
    assert tokenizer.tiling == before
    assert not tokenizer.use_tiling
