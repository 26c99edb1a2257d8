"""Reconstruction metrics, each with its protocol.

Shapes: B C T H W in [-1, 1]. Values are clamped to that range and rounded to 8 bits first: what a viewer would see.
"""

from collections.abc import Iterable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

PROTOCOL = "8-bit RGB; PSNR over all pixels of a clip, SSIM per frame (11x11 Gaussian); means over clips"


def to_uint8(x: Tensor) -> Tensor:
    """Turn B C T H W in [-1, 1] into uint8 B T H W C."""
    return rearrange((x.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8), "b c t h w -> b t h w c")


def from_uint8(frames: Tensor) -> Tensor:
    """Turn uint8 B T H W C into float B C T H W in [-1, 1]."""
    return rearrange(frames.float() / 127.5 - 1, "b t h w c -> b c t h w")


def _unit(x: Tensor) -> Tensor:
    return (x.float().clamp(-1, 1) * 127.5 + 127.5).round() / 255


def psnr(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Return the PSNR of each clip in dB, over all its pixels: shape (B,)."""
    _check_pair(reconstruction, target)
    return peak_signal_noise_ratio(_unit(reconstruction), _unit(target), data_range=1.0, reduction="none", dim=(1, 2, 3, 4))


def psnr_per_frame(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Return the PSNR of each frame in dB: shape (B, T)."""
    _check_pair(reconstruction, target)
    a, b = (rearrange(_unit(x), "b c t h w -> (b t) c h w") for x in (reconstruction, target))
    values = peak_signal_noise_ratio(a, b, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return values.unflatten(0, (target.shape[0], target.shape[2]))


def ssim(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Return the SSIM of each clip, averaged over its frames: shape (B,)."""
    _check_pair(reconstruction, target)
    a, b = (rearrange(_unit(x), "b c t h w -> (b t) c h w") for x in (reconstruction, target))
    values = structural_similarity_index_measure(a, b, data_range=1.0, reduction="none")
    assert isinstance(values, Tensor)
    return values.unflatten(0, (target.shape[0], target.shape[2])).mean(1)


def _check_pair(reconstruction: Tensor, target: Tensor) -> None:
    if reconstruction.shape != target.shape or target.ndim != 5:
        raise ValueError(f"shapes {tuple(reconstruction.shape)} and {tuple(target.shape)}: two equal B C T H W are needed")


@torch.no_grad()
def evaluate(model: Any, clips: Iterable[Tensor], temporal_ratio: int) -> dict[str, float]:
    """Reconstruct clips (each 1 C T H W) at one ratio from the posterior's mean; return means over clips.

    Keys: psnr, psnr_std, psnr_first (first frame), ssim, clips.
    """
    values: dict[str, list[float]] = {"psnr": [], "psnr_first": [], "ssim": []}
    for clip in clips:
        clip = clip.to(model.device)
        with torch.autocast(clip.device.type, torch.bfloat16, enabled=model.dtype == torch.float32):
            output = model(clip, temporal_ratio).sample
        values["psnr"] += psnr(output, clip).tolist()
        values["psnr_first"] += psnr(output[:, :, :1], clip[:, :, :1]).tolist()
        values["ssim"] += ssim(output, clip).tolist()
    if not values["psnr"]:
        raise ValueError("no clips to evaluate: at least 1 is needed")
    means = {key: sum(v) / len(v) for key, v in values.items()}
    return {**means, "psnr_std": float(torch.tensor(values["psnr"]).std(correction=0)), "clips": len(values["psnr"])}
