import math

import pytest
import torch

from promag.tokenizer.metrics import evaluate, from_uint8, psnr, psnr_per_frame, ssim, to_uint8
from tests.conftest import make_tokenizer


def test_psnr_by_hand():
    x = torch.zeros(2, 3, 2, 16, 16)
    y = x.clone()
    y[1] += 2 / 255 * 10  # ten grey levels
    values = psnr(y, x)
    assert values[0] > 80
    assert values[1].item() == pytest.approx(20 * math.log10(255 / 10), abs=0.05)


def test_psnr_per_frame_finds_the_bad_frame_and_averages_in_mse():
    x = torch.zeros(1, 3, 3, 16, 16)
    y = x.clone()
    y[:, :, 1] += 0.2
    y[:, :, 2] += 0.1
    frames = psnr_per_frame(y, x)
    assert frames.shape == (1, 3)
    assert frames[0, 0] > frames[0, 2] > frames[0, 1]
    mse = (10 ** (-frames / 10)).mean()
    assert psnr(y, x).item() == pytest.approx(-10 * mse.log10().item(), abs=0.01)


def test_ssim_is_one_for_equal_clips_and_falls_with_noise():
    torch.manual_seed(0)
    x = torch.rand(1, 3, 2, 32, 32) * 2 - 1
    assert ssim(x, x).item() == pytest.approx(1)
    assert ssim(x + 0.3 * torch.randn_like(x), x).item() < 0.95


def test_values_outside_the_range_are_what_a_viewer_sees():
    x = torch.ones(1, 3, 1, 16, 16)
    assert psnr(x * 5, x).item() > 80
    assert to_uint8(x * 5).unique().tolist() == [255]


def test_bytes_survive_the_way_to_the_model_and_back():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16, 1).expand(1, 1, 16, 16, 3)
    assert torch.equal(to_uint8(from_uint8(pixels)), pixels)


def test_evaluate_is_the_mean_over_clips(clip):
    model = make_tokenizer(levels=2)
    clips = [clip, -clip]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        single = [psnr(model(c, 8).sample, c).item() for c in clips]
    found = evaluate(model, clips, 8)
    assert found["psnr"] == pytest.approx(sum(single) / 2, abs=1e-3)
    assert found["psnr_std"] == pytest.approx(abs(single[0] - single[1]) / 2, abs=1e-3)
    assert found["clips"] == 2
    with pytest.raises(ValueError, match="no clips"):
        evaluate(model, [], 8)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="two equal B C T H W"):
        psnr(torch.zeros(1, 3, 2, 8, 8), torch.zeros(1, 3, 3, 8, 8))
