import math

import pytest
import torch

from promag.tokenizer.metrics import (
    MAX_PSNR,
    evaluate,
    evaluate_fully,
    evaluate_lift,
    flicker,
    from_uint8,
    has_detail,
    high_frequency_energy,
    jitter,
    motion,
    ms_ssim,
    ms_ssim_scales,
    psnr,
    psnr_per_frame,
    ssim,
    to_uint8,
)
from promag.tokenizer.packaged_metrics import PerceptualMetrics
from tests.conftest import make_tokenizer


def test_psnr_by_hand():
    x = torch.zeros(2, 3, 2, 16, 16)
    y = x.clone()
    y[1] += 2 / 255 * 10  # ten grey levels
    values = psnr(y, x)
    assert values[0] > 80
    assert values[1].item() == pytest.approx(20 * math.log10(255 / 10), abs=0.05)


def test_psnr_of_equal_pixels_is_the_largest():
    x = torch.zeros(1, 3, 2, 16, 16)
    y = x.clone()
    y[:, :, 1] += 0.2
    assert psnr(x, x).tolist() == [MAX_PSNR]
    assert psnr_per_frame(y, x)[0].tolist() == [MAX_PSNR, pytest.approx(-20 * math.log10(25 / 255), abs=1e-3)]


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


def test_values_outside_the_range_are_clipped_as_in_a_viewer():
    x = torch.ones(1, 3, 1, 16, 16)
    assert psnr(x * 5, x).item() > 80
    assert to_uint8(x * 5).unique().tolist() == [255]


def test_bytes_survive_conversion_to_the_models_range_and_back():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16, 1).expand(1, 1, 16, 16, 3)
    assert torch.equal(to_uint8(from_uint8(pixels)), pixels)


def test_evaluate_is_the_mean_over_clips(clip):
    model = make_tokenizer(levels=2)
    clips = [clip, -clip]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        single = [psnr(model(c, 8).sample, c).item() for c in clips]
    results = evaluate(model, clips, 8, "bf16")
    assert results["psnr"] == pytest.approx(sum(single) / 2, abs=1e-3)
    assert results["psnr_std"] == pytest.approx(abs(single[0] - single[1]) / 2, abs=1e-3)
    assert results["clips"] == 2
    with pytest.raises(ValueError, match="no clips"):
        evaluate(model, [], 8)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="two equal B C T H W"):
        psnr(torch.zeros(1, 3, 2, 8, 8), torch.zeros(1, 3, 3, 8, 8))


def test_flicker_counts_changing_errors_and_no_constant_ones():
    x = torch.rand(1, 3, 1, 8, 8).expand(1, 3, 5, 8, 8) * 1.6 - 0.8
    assert flicker(x + 20 / 127.5 * 0.5, x).item() == pytest.approx(0, abs=1e-3)
    blinking = x.clone()
    blinking[:, :, 2] += 10 / 127.5  # ten grey levels in one of five frames: two of four changes
    assert flicker(blinking, x).item() == pytest.approx(5, abs=0.3)
    assert flicker(x[:, :, :1] + 0.1, x[:, :, :1]).item() == 0


def test_motion_is_the_mean_change_in_grey_levels():
    x = torch.zeros(2, 3, 3, 8, 8)
    x[1, :, 1:] += 30 / 127.5
    assert motion(x).tolist() == pytest.approx([0, 15], abs=0.3)


def test_jitter_is_the_mean_second_difference_in_time():
    """It is 0 for steady changes; a frame that differs by d counts d, 2d and d."""
    grey = (8.0 * torch.arange(9)).view(1, 1, 9, 1, 1).expand(2, 3, 9, 4, 5).clone()
    grey[1, :, 4] += 16
    clips = grey / 127.5 - 1
    assert jitter(clips).tolist() == pytest.approx([0, 16 * (1 + 2 + 1) / 7], abs=1e-4)
    assert jitter(clips[:, :, :2]).tolist() == [0, 0]


def test_high_frequency_energy_of_blur_noise_and_itself():
    torch.manual_seed(0)
    x = torch.rand(1, 3, 2, 32, 32) - 0.5
    blurred = torch.nn.functional.avg_pool3d(x, (1, 3, 3), 1, (0, 1, 1))
    assert high_frequency_energy(x, x).item() == pytest.approx(1)
    assert high_frequency_energy(blurred, x).item() < 0.3
    assert high_frequency_energy(x * 1.5, x).item() == pytest.approx(2.25, rel=0.02)
    smooth = torch.linspace(0, 6.28, 33)[:-1].sin().expand(1, 3, 1, 32, 32) * 0.5  # a single wave has nothing to lose
    assert high_frequency_energy(x[:, :, :1] * 0.1 + smooth, x[:, :, :1]).item() == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize("size", [(24, 32), (25, 32), (24, 33)])
def test_high_frequency_energy_treats_both_axes_alike(size):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 1, 3, 2, *size, generator=generator)
    x = x + torch.arange(size[0]).remainder(2)[:, None] * 0.2  # rows that alternate: horizontal frequency 0
    turned = high_frequency_energy(x.mT, y.mT).item()
    assert high_frequency_energy(x, y).item() == pytest.approx(turned, rel=1e-5)


def test_ms_ssim_by_size():
    torch.manual_seed(0)
    x = torch.rand(1, 3, 2, 48, 48) * 2 - 1
    assert ms_ssim(x, x).item() == pytest.approx(1)
    worse = [ms_ssim(x + s * torch.randn_like(x), x).item() for s in (0.1, 0.5)]
    assert 1 > worse[0] > worse[1]
    assert [ms_ssim_scales(side, 200) for side in (10, 11, 43, 44, 64, 128, 176)] == [0, 1, 2, 3, 3, 4, 5]
    for side in (11, 22, 44, 99, 176):  # the metric works with that many scales
        y = torch.zeros(1, 3, 1, side, side)
        assert ms_ssim(y, y).item() == pytest.approx(1)
    with pytest.raises(ValueError, match="sides of at least 11"):
        ms_ssim(x[..., :8, :8], x[..., :8, :8])


def test_clips_without_detail_are_left_out_of_the_mean_of_high_frequencies():
    torch.manual_seed(0)
    grain = torch.rand(1, 3, 5, 16, 16) - 0.5
    black = torch.full_like(grain, -1)
    faint = black.clone()
    faint[..., 0, 0] += 4 / 127.5  # 4 grey levels in one of 256 pixels: 0.25 in all frequencies
    assert [has_detail(x).tolist() for x in (torch.cat([grain, black]), faint, (faint + 1) / 4 - 1)] == [
        [True, False],
        [True],
        [False],
    ]
    results = evaluate_fully(Rigged(), [black, grain, black], 4)
    alone = evaluate_fully(Rigged(), [grain], 4)
    assert ["high_frequency" in row for row in results["per_clip"]] == [False, True, False]
    assert results["high_frequency"] == results["per_clip"][1]["high_frequency"]
    assert results["high_frequency"] == pytest.approx(alone["high_frequency"], rel=1e-2)
    assert results["flicker"] == pytest.approx(sum(row["flicker"] for row in results["per_clip"]) / 3)
    assert "high_frequency" not in evaluate_fully(Rigged(), [black], 4)


class Rigged(torch.nn.Module):
    """Reconstructs frames k with k % 4 != 0 with an error that grows with the clip's index."""

    device, dtype = torch.device("cpu"), torch.float64

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x, ratio):
        self.calls += 1
        y = x.clone()
        y[:, :, torch.arange(x.shape[2]) % 4 != 0] += 0.02 * self.calls
        return type("Output", (), {"sample": y})


def test_evaluate_fully_separates_phases_and_motion():
    torch.manual_seed(0)
    still = torch.rand(1, 3, 1, 16, 16) - 0.5
    clips = [still + m * torch.linspace(0, 1, 9).view(1, 1, 9, 1, 1) for m in (0.3, 0.1, 0.2)]  # middle, least, most but one
    results = evaluate_fully(Rigged(), clips, 4)
    assert results["psnr_key"] > 80
    assert results["psnr_every_4th"] > 80
    assert results["psnr_between"] < 45
    singles = [c["psnr"] for c in results["per_clip"]]
    assert singles[0] > singles[1] > singles[2]
    assert (results["psnr_top_motion"], results["psnr_mid_motion"], results["psnr_low_motion"]) == pytest.approx(
        (singles[0], singles[2], singles[1])
    )
    assert [value > 80 for value in results["psnr_per_frame"]] == [i % 4 == 0 for i in range(9)]
    basic = evaluate(Rigged(), clips, 4)
    assert {key: results[key] for key in basic} == pytest.approx(basic)
    assert "psnr_top_motion" not in evaluate_fully(Rigged(), clips[:2], 4)
    assert results["lpips"] is None
    assert results["fvd"] is None


def test_weights_by_path_add_their_metrics():
    torch.manual_seed(0)
    clips = [torch.rand(1, 3, 5, 16, 16) - 0.5 for _ in range(3)]
    networks = PerceptualMetrics(lambda a, b: (a - b).abs().mean((1, 2, 3, 4)), lambda x: x.mean((2, 3, 4)))
    results = evaluate_fully(Rigged(), clips, 4, networks)
    assert results["lpips"] == pytest.approx(0.04 * 3 / 5, rel=0.1)  # 0.02, 0.04, 0.06 in three of five frames
    assert results["fvd"] > 0


class Doubling(torch.nn.Module):
    """Latents are every r-th frame of the clip; lifting repeats each but the first, so it is correct only for still clips."""

    device, dtype, temporal_ratios = torch.device("cpu"), torch.float64, (4, 8)

    def encode_levels(self, x, ratios):
        return [type("Posterior", (), {"mode": staticmethod(lambda r=r: x[:, :, ::r])}) for r in ratios]

    def lifts(self, ratio):
        return tuple(r for r in self.temporal_ratios if r < ratio)

    def lift(self, z, ratio, low):
        return z.repeat_interleave(ratio // low, 2)[:, :, ratio // low - 1 :]

    def decode(self, z, ratio):
        return type("Output", (), {"sample": z.repeat_interleave(ratio, 2)[:, :, ratio - 1 :]})


def test_lift_is_compared_with_the_true_lower_latent():
    torch.manual_seed(0)
    still = (torch.rand(1, 3, 1, 16, 16) - 0.5).expand(-1, -1, 17, -1, -1)
    results = evaluate_lift(Doubling(), [still], 8)
    assert results.keys() == {"4"}
    assert results["4"]["latent_error"] == 0
    assert results["4"]["psnr"] > 80
    # Frames 4 and 12 of noise are estimated by frames 8 and 16: two of five wrong, twice the variance each.
    noise = torch.randn(1, 3, 17, 64, 64) * 0.2
    assert evaluate_lift(Doubling(), [noise, noise], 8)["4"]["latent_error"] == pytest.approx(2 * 2 / 5, rel=0.03)
    assert evaluate_lift(Doubling(), [still], 4) == {}
