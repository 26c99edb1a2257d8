"""Rectified flow: straight paths between clean latents and noise, the distribution of training times, and sampling.

Times t lie in [0, 1]; 0 is the clean latent, 1 is noise. Shapes: b c t h w latents. Sources: rectified flow (arXiv 2209.03003,
eq. 1), logit-normal times and the resolution-dependent shift (Stable Diffusion 3, arXiv 2403.03206, sec. 3.1 and eq. 23).
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .conditioning import pin_frames, times_of_frames

MOST_STEPS = 100_000
MOST_SHIFT = 50  # logarithm of the largest factor by which times are shifted
BASE_TOKENS = 256  # number of tokens to which a model's time-shift factor refers

Model = Callable[[Tensor, Tensor], Tensor]  # noisy latents b c t h w and times, (b,) or b t -> velocity b c t h w
Step = Callable[[Model, Tensor, Tensor, Tensor], Tensor]  # model, latents, their time, the next time -> latents at that time


def interpolate(latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """Return (1 - t) * latents + t * noise for latents b c t h w and times (b,), or b t with one for each frame."""
    t = times[:, None, :, None, None] if times.ndim == 2 else times.view(-1, *(1,) * (latents.ndim - 1))
    return (1 - t) * latents + t * noise


def velocity(latents: Tensor, noise: Tensor) -> Tensor:
    """Return the velocity d/dt of the path: noise - latents."""
    return noise - latents


def stated_shift(scheduler: Mapping[str, Any]) -> float:
    """Return the shift of times in a scheduler's configuration; 1 where none is stated.

    FlowMatch schedulers read `shift`, the others `flow_shift`. A configuration that was made from another scheduler's holds
    both: with dynamic shifting `shift` is what the pipeline was trained with, without it the scheduler reads its own key.
    """
    reads_shift = scheduler.get("_class_name", "").startswith("FlowMatch") or scheduler.get("use_dynamic_shifting")
    keys = ("shift", "flow_shift") if reads_shift else ("flow_shift", "shift")
    return next((scheduler[key] for key in keys if key in scheduler), 1.0)


def token_shift(tokens: int, shift: float) -> float:
    """Return mu, the logarithm of the time-shift factor for a clip of `tokens` tokens; `shift` is the factor at 256 tokens.

    In more tokens the same content is more redundant, so the same noise hides less of it, and times move towards 1. The factor
    grows with the square root of the number of tokens (Stable Diffusion 3, eq. 23, with tokens instead of pixels).
    """
    return math.log(shift) + 0.5 * math.log(tokens / BASE_TOKENS)


def shift_times(times: Tensor, mu: float) -> Tensor:
    """Shift times towards 1: multiply t / (1 - t) by e^mu."""
    factor = math.exp(mu)
    return factor * times / (1 + (factor - 1) * times)


def sample_times(mu: float, generators: list[torch.Generator], device: torch.device | str = "cpu") -> Tensor:
    """Draw one logit-normal time (mean 0, standard deviation 1), shifted by mu, from each generator: shape (b,)."""
    normal = randn_tensor((len(generators),), generators, torch.device(device))
    return shift_times(normal.sigmoid(), mu)


def guide(with_text: Tensor, without: Tensor, scale: float) -> Tensor:
    """Return the prediction with classifier-free guidance (arXiv 2207.12598, eq. 6); scale 1 gives `with_text`."""
    return without + scale * (with_text - without)


def flow_times(steps: int, mu: float = 0.0) -> Tensor:
    """Return the steps + 1 times of a sampling, from 1 to 0: evenly spaced, then shifted by `mu`.

    Raises ValueError for less than one step, and for a `mu` that moves all times to one end.
    """
    if isinstance(steps, bool) or not isinstance(steps, Integral) or not 1 <= steps <= MOST_STEPS:
        raise ValueError(f"steps {steps!r}: a whole number from 1 to {MOST_STEPS} is needed")
    if isinstance(mu, bool) or not isinstance(mu, Real) or not abs(mu) <= MOST_SHIFT:
        raise ValueError(f"mu {mu!r}: a number from -{MOST_SHIFT} to {MOST_SHIFT} is needed")
    return shift_times(torch.linspace(1, 0, steps + 1, dtype=torch.float64), mu).float()


def euler_step(model: Model, x: Tensor, time: Tensor, next_time: Tensor) -> Tensor:
    """Take one step of Euler's method: first order, one model call."""
    return x + (next_time - time) * model(x, time)


class StopSampling(Exception):  # noqa: N818 (it is not an error)
    """Raised by a model or a callback to end a sampling: `sample_flow` then returns the latents so far."""


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
        model: function from noisy latents and times to velocity, guidance included (see `guide`).
        noise: latents b c t h w at the first time.
        times: non-increasing times in [0, 1], one more than steps, for example from `flow_times`.
        step: integration rule: `euler_step` or another function.
        conditioning: clean first frames b c n h w, which stay unchanged. The model then gets a time for each frame, b t, which
            is 0 for these; without conditioning it gets times (b,).
        callback: called after each step with the step's number from 0, the new time and the latents. It returns the latents
            with which to continue, or None to keep them.

    If the model or the callback raises StopSampling, the latents of the last complete step are returned.

    Raises ValueError for times that rise, leave [0, 1] or are no row of numbers, for noise and conditioning of other shapes,
    and where `model` or `step` is no function.
    """
    _check_flow_inputs(model, step, noise, conditioning)
    try:
        times = torch.as_tensor(times, dtype=torch.promote_types(noise.dtype, torch.float32), device=noise.device)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"times {times!r:.100}: a row of numbers is needed, from at most 1 down to at least 0") from None
    if times.ndim != 1 or not ((times >= 0) & (times <= 1)).all() or (times.diff() > 0).any():
        raise ValueError(f"times {times.tolist()}: a row of numbers is needed, from at most 1 down to at least 0")

    def velocity_at(x: Tensor, time: Tensor) -> Tensor:
        each = time.expand(len(x))
        if conditioning is None:
            return model(x, each)
        pinned = torch.arange(x.shape[2], device=x.device) < conditioning.shape[2]
        return model(pin_frames(x, conditioning), times_of_frames(each, pinned.expand(len(x), -1)))

    x = pin_frames(noise, conditioning)
    try:
        for number, (time, next_time) in enumerate(itertools.pairwise(times)):
            x = pin_frames(step(velocity_at, x, time, next_time), conditioning)
            changed = callback(number, next_time, x) if callback else None
            x = x if changed is None else pin_frames(changed, conditioning)
    except StopSampling:
        pass
    return x


def _check_flow_inputs(model: Any, step: Any, noise: Any, conditioning: Any) -> None:
    for name, function in (("model", model), ("step", step)):
        if not callable(function):
            raise ValueError(f"{name} {function!r:.100}: a function is needed")
    for name, tensor in (("noise", noise), ("conditioning", conditioning)):
        if name == "conditioning" and tensor is None:
            continue
        if not isinstance(tensor, Tensor) or tensor.ndim != 5 or not tensor.is_floating_point():
            given = f"of shape {tuple(tensor.shape)}, {tensor.dtype}" if isinstance(tensor, Tensor) else f"of {type(tensor)}"
            raise ValueError(f"{name} {given}: a floating-point tensor b c t h w is needed")
    if conditioning is not None:
        (b, c, t, h, w), given = noise.shape, tuple(conditioning.shape)
        if given[0] not in (1, b) or given[1] != c or given[3:] != (h, w) or not 1 <= given[2] <= t:
            raise ValueError(f"conditioning of shape {given}: ({b}, {c}, 1 to {t}, {h}, {w}) is needed")
