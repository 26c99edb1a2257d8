"""Rectified flow: straight paths from clean latents to noise, the times at which they are learned, and sampling along them.

Times t lie in [0, 1]; 0 is the clean latent, 1 is noise. Shapes: b c t h w latents. Sources: rectified flow (arXiv 2209.03003,
eq. 1), logit-normal times and the resolution-dependent shift (Stable Diffusion 3, arXiv 2403.03206, sec. 3.1 and eq. 23).
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .conditioning import frame_times, pin_frames

BASE_TOKENS = 256  # at which a model's time shift is stated

Model = Callable[[Tensor, Tensor], Tensor]  # noisy latents b c t h w and times, (b,) or b t -> velocity b c t h w
Step = Callable[[Model, Tensor, Tensor, Tensor], Tensor]  # model, latents, their time, the next time -> latents at that time


def interpolate(latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """Return (1 - t) * latents + t * noise; latents b c t h w, times (b,) or, one for each frame, b t."""
    t = times[:, None, :, None, None] if times.ndim == 2 else times.view(-1, *(1,) * (latents.ndim - 1))
    return (1 - t) * latents + t * noise


def velocity(latents: Tensor, noise: Tensor) -> Tensor:
    """Return the velocity d/dt of the path: noise - latents."""
    return noise - latents


def denoised(noisy: Tensor, velocity: Tensor, times: Tensor) -> Tensor:
    """Return the clean latents that a noisy one and its velocity point to."""
    return noisy - times.view(-1, *(1,) * (noisy.ndim - 1)) * velocity


def token_shift(tokens: int, shift: float) -> float:
    """Return mu, the logarithm of the time shift for a clip of so many tokens; `shift` is the factor at 256 tokens.

    More tokens repeat the same content more often, so the same noise hides less of it and times move towards 1: the
    factor grows with the square root of the tokens (Stable Diffusion 3, eq. 23, counts pixels where this counts tokens).
    """
    return math.log(shift) + 0.5 * math.log(tokens / BASE_TOKENS)


def shift_times(times: Tensor, mu: float) -> Tensor:
    """Move times towards 1 by a factor e^mu in t / (1 - t)."""
    factor = math.exp(mu)
    return factor * times / (1 + (factor - 1) * times)


def sample_times(mu: float, generators: list[torch.Generator], device: torch.device | str = "cpu") -> Tensor:
    """Draw a logit-normal time (mean 0, deviation 1), shifted by mu, from each generator: shape (b,)."""
    normal = randn_tensor((len(generators),), generators, torch.device(device))
    return shift_times(normal.sigmoid(), mu)


def guide(with_text: Tensor, without: Tensor, scale: float) -> Tensor:
    """Return the classifier-free-guided prediction (arXiv 2207.12598, eq. 6); scale 1 is the one with text."""
    return without + scale * (with_text - without)


def flow_times(steps: int, mu: float = 0.0) -> Tensor:
    """Return the times of a sampling: steps + 1 of them, from 1 to 0, evenly spaced and then shifted by `mu`.

    Raises ValueError for less than one step.
    """
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps {steps!r}: a whole number of at least 1 is needed")
    return shift_times(torch.linspace(1, 0, steps + 1, dtype=torch.float64), mu).float()


def euler_step(model: Model, x: Tensor, time: Tensor, next_time: Tensor) -> Tensor:
    """Take one step of Euler's method: first order, one call of the model."""
    return x + (next_time - time) * model(x, time)


def midpoint_step(model: Model, x: Tensor, time: Tensor, next_time: Tensor) -> Tensor:
    """Take one step of the midpoint method: second order, two calls of the model."""
    half = (next_time - time) / 2
    return x + 2 * half * model(x + half * model(x, time), time + half)


class StopSampling(Exception):  # noqa: N818 (it ends a sampling, nothing failed)
    """Ends a sampling early: `sample_flow` returns the latents so far where its model or its callback raises this."""


@torch.no_grad()
def sample_flow(
    model: Model,
    noise: Tensor,
    times: Tensor | Sequence[float],
    *,
    step: Step = euler_step,
    conditioning: Tensor | None = None,
    callback: Callable[[int, Tensor, Tensor], Tensor | None] | None = None,
) -> Tensor:
    """Integrate the flow from `noise` along `times`; return the latents at the last time.

    Args:
        model: noisy latents and times -> velocity; guidance is combined in it (see `guide`).
        noise: latents b c t h w at the first time.
        times: from at most 1 down to at least 0, as `flow_times` returns them; one more than there are steps.
        step: `euler_step`, `midpoint_step` or another rule.
        conditioning: clean first frames b c n h w. They stay as they are, and the model gets a time for each frame, b t, which
            is 0 for them; without, it gets times (b,).
        callback: called after each step with the step's number from 0, the time reached and the latents; returns the latents
            to go on from, or None for those.

    A model or a callback that raises StopSampling ends the sampling with the latents of the last whole step.

    Raises ValueError for times that rise, leave [0, 1] or are no row of numbers.
    """
    times = torch.as_tensor(times, dtype=torch.promote_types(noise.dtype, torch.float32), device=noise.device)
    if times.ndim != 1 or not ((times >= 0) & (times <= 1)).all() or (times.diff() > 0).any():
        raise ValueError(f"times {times.tolist()}: a row of numbers is needed, from at most 1 down to at least 0")

    def velocity_at(x: Tensor, time: Tensor) -> Tensor:
        each = time.expand(len(x))
        if conditioning is None:
            return model(x, each)
        pinned = torch.arange(x.shape[2], device=x.device) < conditioning.shape[2]
        return model(pin_frames(x, conditioning), frame_times(each, pinned.expand(len(x), -1)))

    x = pin_frames(noise, conditioning)
    try:
        for number, (time, next_time) in enumerate(itertools.pairwise(times)):
            x = pin_frames(step(velocity_at, x, time, next_time), conditioning)
            changed = callback(number, next_time, x) if callback else None
            x = x if changed is None else pin_frames(changed, conditioning)
    except StopSampling:
        pass
    return x
