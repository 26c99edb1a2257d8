"""Metrics of the extra `metrics`: values of the reference implementations, and the laws of a metric."""

import importlib.util

import pytest
import torch

from promag.tokenizer import packaged_metrics
from promag.tokenizer.metrics import evaluate_fully
from promag.tokenizer.packaged_metrics import (
    MODULES,
    VMAF,
    ColorVideoVDP,
    FrameFeatures,
    PerceptualMetrics,
    frame_rates,
    luma,
    open_perceptual,
)
from promag.tokenizer.perceptual import frechet_distance
from promag.training.config import UserError


def needs(key):
    absent = [module for module in MODULES[key] if importlib.util.find_spec(module) is None]
    return pytest.mark.skipif(bool(absent), reason=f"the extra 'metrics' is not installed: no {', '.join(absent)}")


def moving_texture(frames=6, height=64, width=80):
    """1 3 T H W in [-1, 1], of a closed form."""
    t = torch.arange(frames, dtype=torch.float64).view(-1, 1, 1)
    y = torch.arange(height, dtype=torch.float64).view(1, -1, 1)
    x = torch.arange(width, dtype=torch.float64).view(1, 1, -1)
    a, b, c = torch.sin(0.9 * (x - 2 * t) + 0.4 * y), torch.sin(0.33 * (y + t) - 0.2 * x), torch.sin(0.11 * x * (1 + 0.02 * y))
    return (torch.stack([a + b + c, a + b, (c - b).expand_as(a)]) / 4)[None].float()


def blurred(clip, times=1):
    for _ in range(times):
        padded = torch.nn.functional.pad(clip[0], (1, 1, 1, 1), mode="replicate")
        clip = torch.nn.functional.avg_pool2d(padded, 3, stride=1)[None]
    return clip


def noisy(clip, amplitude=0.2):
    index = torch.arange(clip.numel(), dtype=torch.float64).view(clip.shape)
    return (clip + amplitude * torch.sin(12.9898 * index * index % 1000).float()).clamp(-1, 1)


def coarse(clip):
    return (clip * 5).round() / 5


def test_luma_is_that_of_bt_709_at_video_levels():
    colours = torch.tensor([[-1, -1, -1], [1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1.0]])
    clip = colours.T.reshape(3, 5, 1, 1)
    assert luma(clip).flatten().tolist() == [16, 235, 63, 173, 32]  # ITU-R BT.709-6, item 3.5


# Printed by ffmpeg's filter libvmaf with libvmaf 86da14d (integer arithmetic) for these frames' luma, model vmaf_v0.6.1.
LIBVMAF = {
    "blurred": (blurred, [70.627, 88.884, 88.785, 89.43, 90.047, 89.611]),
    "noisy": (noisy, [70.102, 86.131, 90.014, 88.824, 90.912, 89.449]),
    "coarse": (coarse, [84.469, 100.0, 100.0, 100.0, 100.0, 100.0]),
    "equal": (lambda clip: clip, [97.428, 100.0, 100.0, 100.0, 100.0, 100.0]),
}


@needs("vmaf")
@pytest.mark.parametrize(("distort", "expected"), LIBVMAF.values(), ids=LIBVMAF)
def test_vmaf_is_that_of_libvmaf(distort, expected):
    clip = moving_texture()
    per_frame = VMAF().per_frame(distort(clip), clip)[0]
    assert per_frame.tolist() == pytest.approx(expected, abs=0.4)
    mean = VMAF()(distort(clip), clip)
    assert float(mean) == pytest.approx(sum(expected) / len(expected), abs=0.15)


@needs("vmaf")
@pytest.mark.parametrize("frames_at_once", [1, 2, 4])
def test_vmaf_in_parts_is_that_of_the_whole(frames_at_once):
    clip = moving_texture(frames=7)
    whole = VMAF().per_frame(blurred(clip), clip)
    part = VMAF(chunk_pixels=frames_at_once * 64 * 80).per_frame(blurred(clip), clip)
    assert torch.allclose(part, whole, atol=1e-3)


@needs("cvvdp")
def test_colorvideovdp_is_that_of_its_own_package():
    import pycvvdp

    clip = moving_texture()
    metric = ColorVideoVDP()
    arrays = [((x[0] * 127.5 + 127.5).round().byte().permute(1, 2, 3, 0).numpy()) for x in (noisy(clip), clip)]
    own = pycvvdp.cvvdp(display_name="standard_fhd", quiet=True, device=torch.device("cpu"))
    for fps in (8.0, 24.0):
        expected = own.predict(*arrays, dim_order="FHWC", frames_per_second=fps)[0]
        assert metric(noisy(clip), clip, fps).tolist() == pytest.approx([float(expected)], abs=1e-4)
    assert "37.84 [pix/deg], Lpeak=200" in metric.protocol
    assert metric(noisy(clip), clip, 8.0) != metric(noisy(clip), clip, 24.0)


METRICS = [pytest.param(ColorVideoVDP, id="cvvdp", marks=needs("cvvdp")), pytest.param(VMAF, id="vmaf", marks=needs("vmaf"))]


@pytest.mark.parametrize("kind", METRICS)
def test_more_blur_or_noise_is_worse_and_equal_clips_are_best(kind):
    metric, clip = kind(), moving_texture(frames=4)
    best = float(metric(clip, clip, 24.0))
    assert best == pytest.approx(10.0 if kind is ColorVideoVDP else 99.357, abs=1e-2)
    for distort, amounts in ((blurred, (1, 2, 4)), (noisy, (0.1, 0.2, 0.4))):
        values = [best, *(float(metric(distort(clip, amount), clip, 24.0)) for amount in amounts)]
        assert values == sorted(values, reverse=True)
        assert values[-1] < values[1] - 0.1


@pytest.mark.parametrize("kind", METRICS)
def test_batches_and_single_frames_are_measured(kind):
    metric, clip = kind(), moving_texture(frames=3)
    pair = torch.cat([noisy(clip), blurred(clip)])
    alone = [float(metric(x[None], clip, 24.0)) for x in pair]
    assert metric(pair, torch.cat([clip, clip]), 24.0).tolist() == pytest.approx(alone, abs=1e-4)
    frame = clip[:, :, :1]
    assert float(metric(noisy(frame), frame, 24.0)) < float(metric(frame, frame, 24.0))


@needs("frechet_frames")
def test_features_of_frames_are_those_of_every_fifth_one():
    clip = moving_texture(frames=11)
    features = FrameFeatures()
    rows = features(clip)
    assert rows.shape == (3, 1280)
    assert torch.allclose(rows[2:], features(clip[:, :, 10:]), atol=1e-4)
    distances = [frechet_distance(rows, features(blurred(clip, times))) for times in (1, 2, 4)]
    assert frechet_distance(rows, rows) == pytest.approx(0, abs=1e-6)
    assert distances == sorted(distances)
    assert distances[0] > 0.1


class Blurring(torch.nn.Module):
    device, dtype = torch.device("cpu"), torch.float32

    def forward(self, x, temporal_ratio):
        return type("Output", (), {"sample": blurred(x)})


@needs("cvvdp")
@needs("vmaf")
@needs("frechet_frames")
def test_evaluation_has_every_installed_metric_and_its_protocol():
    clips = [moving_texture(frames=5), noisy(moving_texture(frames=5))]
    perceptual = open_perceptual("cpu")
    figures = evaluate_fully(Blurring(), clips, 4, perceptual, "fp32", [24.0, 12.0])
    expected = [float(ColorVideoVDP()(blurred(c), c, fps)) for c, fps in zip(clips, (24.0, 12.0), strict=True)]
    assert figures["cvvdp"] == pytest.approx(sum(expected) / 2, abs=1e-4)
    assert [row["cvvdp"] for row in figures["per_clip"]] == pytest.approx(expected, abs=1e-4)
    assert figures["vmaf"] == pytest.approx(sum(float(VMAF()(blurred(c), c)) for c in clips) / 2, abs=1e-3)
    assert figures["frechet_frames"] > 0
    protocol = perceptual.protocol(64, 80)
    assert "standard_fhd" in protocol
    assert "model v0.6.1 by vmaf-torch" in protocol
    with pytest.raises(ValueError, match="fps of 1 clips: clip 1 has none"):
        evaluate_fully(Blurring(), clips, 4, perceptual, "fp32", [24.0])


@needs("vmaf")
def test_too_small_a_clip_gets_no_vmaf_and_a_line_says_so():
    clip = moving_texture(frames=5, height=32, width=64)
    perceptual = PerceptualMetrics(vmaf=VMAF())
    assert "vmaf" not in evaluate_fully(Blurring(), [clip], 4, perceptual, "fp32")
    assert perceptual.not_measured(32, 64) == ["vmaf: 32x64 is too small, sides of at least 40 are needed"]
    assert perceptual.not_measured(40, 64) == []
    assert perceptual.protocol(32, 64) == ""


def test_without_the_extra_its_metrics_are_absent_and_a_line_says_how_to_get_them(monkeypatch):
    monkeypatch.setattr(packaged_metrics.importlib.util, "find_spec", lambda name: None)
    perceptual = open_perceptual("cpu")
    lines = perceptual.not_measured(64, 64)
    assert lines[-1] == "cvvdp, vmaf, frechet_frames: not installed; pip install 'promag[metrics]'"
    assert lines[0] == "lpips: no weights given, --lpips takes them"
    figures = evaluate_fully(Blurring(), [moving_texture(frames=5)], 4, perceptual, "fp32")
    assert not {"cvvdp", "vmaf", "frechet_frames"} & figures.keys()
    assert perceptual.protocol(64, 64) == ""
    assert frame_rates(None, perceptual) == ()
    with pytest.raises(UserError, match=r"perceptual vmaf: not installed; pip install 'promag\[metrics\]'"):
        open_perceptual("cpu", ["vmaf"])
    with pytest.raises(UserError, match="perceptual ssim: there are cvvdp, vmaf, frechet_frames"):
        open_perceptual("cpu", ["ssim"])
    assert open_perceptual("cpu", []).not_measured(64, 64) == lines[:-1]


def test_a_package_that_does_not_load_is_named(monkeypatch):
    def broken(device):
        raise RuntimeError("operator torchvision::nms does not exist\nmore")

    monkeypatch.setattr(packaged_metrics.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(packaged_metrics, "OPENERS", dict.fromkeys(MODULES, broken))
    reason = "its package does not load: operator torchvision::nms does not exist"
    assert open_perceptual("cpu").absent[2:] == tuple(f"{key}: {reason}" for key in MODULES)
    with pytest.raises(UserError, match=f"perceptual cvvdp: {reason}"):
        open_perceptual("cpu", ["cvvdp"])
