"""Checks of what the transformer is given; values of tensors on a GPU are not looked at, because it would have to wait.

Shapes: b c t h w latents, b L D text tokens, b L masks.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers.utils import apply_lora_scale
from torch import Tensor


def scaled_adapters(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Let a model's forward take `attention_kwargs`, whose `scale` weights the LoRA adapters; other ones are a ValueError."""
    scaled = apply_lora_scale("attention_kwargs")(forward)

    @functools.wraps(forward)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        check_attention_kwargs(kwargs.get("attention_kwargs"))
        return scaled(self, *args, **kwargs)

    return checked


def check_attention_kwargs(given: Any) -> None:
    """Raise ValueError for anything but None and a dictionary that holds nothing but a finite `scale`."""
    if given is None:
        return
    if not isinstance(given, dict) or given.keys() - {"scale"}:
        raise ValueError(f"attention_kwargs {given!r:.100}: a dictionary that may hold scale is needed")
    scale = given.get("scale", 1.0)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) < 1e30:
        raise ValueError(f"attention_kwargs scale {scale!r:.100}: a finite number is needed")


def check_statistics(mean: Any, std: Any, channels: int) -> None:
    """Raise ValueError for anything but None, or by ratio (as text) a finite mean and a deviation above 0 of each channel."""
    for name, given, least in (("latents_mean", mean, -math.inf), ("latents_std", std, 0.0)):
        if given is None and mean is std:
            continue
        if (
            not (isinstance(given, Mapping) and isinstance(mean, Mapping) and given.keys() == mean.keys())
            or not all(isinstance(ratio, str) and ratio.isdecimal() for ratio in given)
        ):  # fmt: skip
            raise ValueError(
                f"{name} {given!r:.100}: a mapping of temporal ratios is needed, the same as of the other statistic"
            )
        for ratio, values in given.items():
            if not isinstance(values, list | tuple) or len(values) != channels or not all(_above(least, v) for v in values):
                raise ValueError(f"{name} at {ratio}x {values!r:.100}: {channels} finite numbers above {least} are needed")


def check_defaults(given: Any) -> None:
    """Raise ValueError for anything but None and a mapping of texts to finite numbers."""
    if given is not None and not (isinstance(given, Mapping) and all(_above(-math.inf, value) for value in given.values())):
        raise ValueError(f"sample_defaults {given!r:.100}: a mapping of names to finite numbers is needed")


def check_shape(patch_size: Any, **counts: Any) -> None:
    """Raise ValueError for anything but a patch of three whole numbers of at least 1, and counts of at least 0."""
    for name, value in (*((f"patch_size {patch_size!r:.50}", side) for side in _three(patch_size)), *counts.items()):
        if isinstance(value, bool) or not isinstance(value, int) or value < (name not in counts):
            raise ValueError(f"{name} {value!r:.100}: a whole number of at least {int(name not in counts)} is needed")


def _three(given: Any) -> Sequence[Any]:
    if not isinstance(given, list | tuple) or len(given) != 3:
        raise ValueError(f"patch_size {given!r:.100}: three numbers (t, h, w) are needed")
    return given


def _above(least: float, value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least < value < math.inf


def check_latents(hidden_states: Any, channels: int) -> None:
    """Raise ValueError for anything but a floating-point tensor b c t h w."""
    if not isinstance(hidden_states, Tensor) or not hidden_states.is_floating_point():
        raise ValueError(f"hidden_states of type {_type(hidden_states)}: a floating-point tensor b {channels} t h w is needed")
    if hidden_states.ndim != 5 or hidden_states.shape[1] != channels or not hidden_states.numel():
        raise ValueError(f"hidden_states of shape {tuple(hidden_states.shape)}: b {channels} t h w is needed")


def check_time(timestep: Any, batch: int) -> None:
    """Raise ValueError for anything but a tensor with one time, one for each of the batch, or b t."""
    if not isinstance(timestep, Tensor) or timestep.is_complex():
        raise ValueError(f"timestep of type {_type(timestep)}: a tensor ({batch},) is needed")
    if timestep.ndim > 2 or (timestep.ndim < 2 and timestep.numel() not in (1, batch)):
        raise ValueError(f"timestep of shape {tuple(timestep.shape)}: ({batch},) is needed, or a time for each frame")


def check_ratio_and_rate(temporal_ratio: Any, fps: Any, batch: int) -> None:
    """Raise ValueError for anything but numbers above 0, or tensors with one for all or one for each of the batch."""
    for name, value, kinds in (("temporal_ratio", temporal_ratio, int), ("fps", fps, int | float)):
        if isinstance(value, Tensor):
            if value.ndim > 1 or value.numel() not in (1, batch):
                raise ValueError(f"{name} of shape {tuple(value.shape)}: one number is needed, or ({batch},)")
        elif isinstance(value, bool) or not isinstance(value, kinds) or not 1e-9 < value < 1e9:
            raise ValueError(f"{name} {value!r:.100}: a number above 0 and below 1e9 is needed")


def per_clip(value: float | Tensor, batch: int, device: torch.device) -> Tensor:
    """Return one number, or a tensor with one for all or one for each of the batch, as float32 (batch,) on a device."""
    if isinstance(value, Tensor):
        return value.to(device, torch.float32).expand(batch)
    return torch.full((batch,), float(value), device=device)  # filled there: a copy of a number would wait for the device


def check_text(tokens: Sequence[Any], masks: Sequence[Any], widths: Sequence[int], batch: int) -> None:
    """Raise ValueError for text of other encoders than the model's, or of another batch, and for masks that do not fit it."""
    if len(tokens) != len(widths) or (masks and len(masks) != len(tokens)):
        raise ValueError(f"text of {len(tokens)} encoders, {len(masks)} masks: this model needs {len(widths)}")
    for part, width in zip(tokens, widths, strict=True):
        if (
            not isinstance(part, Tensor)
            or part.ndim != 3
            or part.shape[0] != batch
            or part.shape[2] != width
            or not part.shape[1]
        ):
            raise ValueError(f"encoder_hidden_states {_shape(part)}: ({batch}, L, {width}) is needed")
    for mask, part in zip(masks, tokens, strict=False):
        if not isinstance(mask, Tensor) or mask.shape != part.shape[:2]:
            raise ValueError(f"encoder_attention_mask {_shape(mask)}: {tuple(part.shape[:2])} is needed")
        if mask.device.type == "cpu" and not torch.compiler.is_compiling() and not mask.any(1).all():
            raise ValueError("encoder_attention_mask: masks every token of a text; at least one must be real")


def check_pooled(pooled: Any, width: int, batch: int) -> None:
    """Raise ValueError for a pooled vector that is missing, not wanted, or of another shape."""
    fits = pooled is None if not width else isinstance(pooled, Tensor) and tuple(pooled.shape) == (batch, width)
    if not fits:
        needs = f"({batch}, {width})" if width else "none"
        raise ValueError(f"pooled_projections {_shape(pooled)}: this model needs {needs}")


def _shape(given: Any) -> str:
    return f"of shape {tuple(given.shape)}" if isinstance(given, Tensor) else f"of type {type(given).__name__}"


def _type(given: Any) -> str:
    return str(given.dtype) if isinstance(given, Tensor) else type(given).__name__
