"""Base-ahead denoising of dual latents: the key frames' channels are denoised ahead of the residual's.

The first half of a dual latent's channels is the key frames' latent, the base; the second half is a residual. Each has a time
of its own, and one sampling time s in [0, 1] sets both: with the lead a the base is at 1 - (1 + a)(1 - s) and the residual at
(1 + a) s, each cut to [0, 1]. While both move, the residual's time is the base's plus a. At first the base moves alone, beside
pure noise; at last the residual moves alone, beside a clean base. A half that rests, at 1 or at 0, has no velocity to learn, so
the loss leaves it out. A lead of 0 is plain rectified flow.

Source: Semantic-First Diffusion (arXiv 2512.04926, asynchronous denoising with the offset between the two times).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import flow


def check_lead(lead: Any) -> None:
    """Raise ValueError for a lead that is no number from 0 to below 1."""
    if isinstance(lead, bool) or not isinstance(lead, int | float) or not 0 <= lead < 1:
        raise ValueError(f"base_ahead {lead!r:.100}: a number from 0 to below 1 is needed")


def half_times(times: Tensor, lead: float) -> tuple[Tensor, Tensor]:
    """Return the times of the base and of the residual at sampling times in [0, 1]; all of the same shape."""
    return (1 - (1 + lead) * (1 - times)).clamp(0, 1), ((1 + lead) * times).clamp(0, 1)


def sampling_times(times: Tensor, lead: float) -> tuple[Tensor, Tensor]:
    """Return the sampling times at which the base is at `times`, and those at which the residual is."""
    return 1 - (1 - times) / (1 + lead), times / (1 + lead)


def interpolate(latents: Tensor, noise: Tensor, times: Tensor, lead: float) -> Tensor:
    """Return noisy latents b c t h w at sampling times (b,), or b t with one for each frame: each half at its own time."""
    if not lead:
        return flow.interpolate(latents, noise, times)
    parts = zip(latents.chunk(2, 1), noise.chunk(2, 1), half_times(times, lead), strict=True)
    return torch.cat([flow.interpolate(*part) for part in parts], 1)


def moving_only(errors: Tensor, times: Tensor, lead: float) -> Tensor:
    """Set errors b c t h w to 0 in the half that rests at sampling times (b,) or b t."""
    if not lead:
        return errors
    base, residual = half_times(times, lead)
    shape = (len(times), 1, -1, 1, 1)
    return scale_halves(errors, [(base > 0).view(shape), (residual < 1).view(shape)])


def advance(x: Tensor, velocity: Tensor, times: Tensor, next_times: Tensor, lead: float) -> Tensor:
    """Take an Euler step of b c t h w between sampling times (b,) or b t: each half of the channels by its own times."""
    shape = (len(times), 1, -1, 1, 1)
    if not lead:
        return x + (next_times - times).view(shape) * velocity
    pairs = zip(half_times(times, lead), half_times(next_times, lead), strict=True)
    return x + scale_halves(velocity, [(after - before).view(shape) for before, after in pairs])


def scale_halves(x: Tensor, factors: Sequence[Tensor | float]) -> Tensor:
    """Multiply the base and the residual of b c t h w by a factor each."""
    return torch.cat([half * factor for half, factor in zip(x.chunk(2, 1), factors, strict=True)], 1)


def paced(step: flow.Step, lead: float) -> flow.Step:
    """Return an integration rule that moves each half of the channels by its own time, made of one for a single time.

    The rule may be any that is linear in the model's output: it gets the velocity of each half times that half's change of
    time, divided by the change of the sampling time. So each half ends exactly at its own time, also in a step in which it
    comes to rest. A step that does not move the time corrects the one before it, as in Heun's method, and keeps its factors.
    """
    if not lead:
        return step
    factors: list[Tensor | float] = [1.0, 1.0]

    def paced_step(model: flow.Model, x: Tensor, time: Tensor, next_time: Tensor) -> Tensor:
        if time != next_time:
            pairs = zip(half_times(time, lead), half_times(next_time, lead), strict=True)
            factors[:] = [(after - before) / (next_time - time) for before, after in pairs]
        return step(lambda y, t: scale_halves(model(y, t), factors), x, time, next_time)

    return paced_step
