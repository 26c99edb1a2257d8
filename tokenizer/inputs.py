"""Checks of what an autoencoder is given: B C T H W pixels, b c t h w latents, temporal ratios."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .geometry import SPATIAL_RATIO, check_size


def check_pixels(x: Any, channels: int, multiple: int = SPATIAL_RATIO) -> None:
    """Raise ValueError for anything but a floating-point tensor B C T H W, of sides that are multiples of `multiple`."""
    _check_tensor("input", x, f"B {channels} T H W", channels)
    check_size(x.shape[3], x.shape[4], multiple)


def check_latents(z: Any, channels: int) -> None:
    """Raise ValueError for anything but a floating-point tensor b c t h w without an empty side."""
    _check_tensor("latent", z, f"B {channels} t h w", channels)
    if not z.numel():
        raise ValueError(f"latent of shape {tuple(z.shape)}: at least one frame and position is needed")


def check_ratios(ratios: Any) -> None:
    """Raise ValueError for anything but a sequence of at least one ratio."""
    if not isinstance(ratios, Sequence) or isinstance(ratios, str) or not ratios:
        raise ValueError(f"temporal ratios {ratios!r}: a sequence of at least one is needed")


def _check_tensor(name: str, x: Any, shape: str, channels: int) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} of type {type(x).__name__}: a tensor {shape} is needed")
    if x.ndim != 5 or x.shape[1] != channels or not len(x):
        raise ValueError(f"{name} of shape {tuple(x.shape)}: {shape} is needed")
    if not x.is_floating_point():
        raise ValueError(f"{name} of {x.dtype}: a floating-point tensor is needed")
