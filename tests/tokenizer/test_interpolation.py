import numpy as np
import pytest
import torch

from promag.data.video.interpolation import interpolate_motion
from promag.tokenizer.interpolation import Interpolated, kinds_for
from promag.tokenizer.metrics import evaluate_fully, psnr_per_frame


@torch.no_grad()
def test_the_control_codes_every_kth_frame_and_interpolates_the_others(tokenizer, clip):
    output = Interpolated(tokenizer)(clip, 16).sample
    coded = tokenizer(clip[:, :, ::4], 4).sample
    assert output.shape == clip.shape
    assert torch.allclose(output[:, :, ::4], coded, atol=1e-5)
    assert torch.allclose(output[:, :, 1], 0.75 * coded[:, :, 0] + 0.25 * coded[:, :, 1], atol=1e-5)
    figures = evaluate_fully(Interpolated(tokenizer), [clip], 16, precision="fp32")
    assert figures["psnr_every_4th"] == pytest.approx(psnr_per_frame(coded, clip[:, :, ::4]).mean().item(), abs=1e-3)


def moving(frames):
    """A texture that moves right by 2.5 pixels a frame: uint8 T 64 64 3."""
    y, x = np.mgrid[:64, :64]
    pictures = []
    for t in range(frames):
        waves = (np.sin((x - 2.5 * t) / 5), np.cos((x + y - 2.5 * t) / 7), 0 * x)
        pictures.append(np.stack([127 + 100 * wave for wave in waves], -1))
    return np.stack(pictures).astype(np.uint8)


def test_motion_compensation_keeps_the_given_frames_and_estimates_moving_ones_better_than_blending():
    video = moving(33)
    estimated = interpolate_motion(video[::4], 4)
    assert estimated.shape == video.shape
    assert (estimated[::4] == video[::4]).all()
    blended = video.astype(float)
    for t in range(33):
        left = min(t // 4 * 4, 28)
        blended[t] = video[left] + (video[left + 4].astype(float) - video[left]) * (t - left) / 4
    errors = [np.square(other.astype(float) - video).mean() for other in (estimated, blended)]
    assert errors[0] < errors[1] / 2
    still = np.broadcast_to(video[:1], (3, 64, 64, 3))
    assert np.abs(interpolate_motion(still, 2).astype(int) - video[:1]).max() <= 2  # by the way to YUV and back
    assert (interpolate_motion(video[:1], 4) == video[:1]).all()
    assert kinds_for(16, 64) == ("linear",)
    assert kinds_for(32, 64) == ("linear", "motion")
    with pytest.raises(ValueError, match="of 16x64 by 2: needs sides of 32 or more"):
        interpolate_motion(video[:, :16], 2)


@torch.no_grad()
def test_the_control_along_the_motion_keeps_what_was_coded(tokenizer):
    clip = torch.nn.functional.interpolate(torch.rand(1, 3, 5, 4, 4) * 2 - 1, (33, 32, 32), mode="trilinear")
    output = Interpolated(tokenizer, "motion")(clip, 16).sample
    assert output.shape == clip.shape
    assert torch.equal(output[:, :, ::4], tokenizer(clip[:, :, ::4], 4).sample)
    with pytest.raises(ValueError, match="interpolation 'cubic': use one of linear, motion"):
        Interpolated(tokenizer, "cubic")  # pyright: ignore[reportArgumentType]
