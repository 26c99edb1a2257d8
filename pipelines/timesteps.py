"""Sampling times for any diffusers scheduler that integrates a flow.

Times are the schedulers' sigmas: 1 is noise, 0 is clean; the transformer's timestep is 1000 times the sigma.
"""

import inspect
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from promag.diffusion.flow import Model, stated_shift, token_shift
from promag.training.config import one_line

# The schedulers of diffusers that integrate a flow, and those that do with FLOW_SETTINGS.
FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
FLOW_WITH_SETTINGS = ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler")
LINEAR = FLOW[:2]  # whose steps are linear in the velocity, so that channels may move at different paces
FLOW_SETTINGS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


def check_flow(scheduler: Any, base_ahead: float = 0.0) -> None:
    """Raise ValueError for a scheduler that does not integrate a flow, and with `base_ahead` for one with a single time."""
    kinds = {kind.__name__ for kind in type(scheduler).__mro__}
    config = getattr(scheduler, "config", {})
    if base_ahead and (not kinds & {*LINEAR} or config.get("stochastic_sampling")):
        raise ValueError(
            f"scheduler {type(scheduler).__name__}: the transformer was trained with base_ahead {base_ahead:g}, two times in "
            f"each step; use {' or '.join(LINEAR)}, without stochastic_sampling"
        )
    set_so = all(config.get(key) == value for key, value in FLOW_SETTINGS.items())
    if kinds & {*FLOW} or (set_so and kinds & {*FLOW_WITH_SETTINGS}):
        return
    settings = ", ".join(f"{key}={value!r}" for key, value in FLOW_SETTINGS.items())
    raise ValueError(
        f"scheduler {type(scheduler).__name__}: the transformer predicts the velocity of a flow; use {', '.join(FLOW)}, or, "
        f"with {settings}, {', '.join(FLOW_WITH_SETTINGS)}"
    )


def skipped_steps(steps: int, strength: float) -> int:
    """Return how many of the first steps are skipped if only the last `strength` (a fraction) of them run."""
    return steps - math.ceil(steps * strength - 1e-6)


def count_model_calls(scheduler: Any, steps: int, strength: float = 1.0) -> int:
    """Return how often sampling calls the transformer, which is how often a pipeline calls its callback."""
    taken = steps - skipped_steps(steps, strength)
    return max(0, scheduler.order * taken - (scheduler.order - 1))  # a second-order scheduler's last step needs one call


def set_flow_times(scheduler: Any, steps: int, token_count: int, device: torch.device, strength: float = 1.0) -> Tensor:
    """Set a scheduler's times and return them in order, one more than the transformer calls.

    Only the last `strength` (a fraction) of the steps, rounded up, run: the scheduler starts there.

    With `use_dynamic_shifting` in the scheduler's configuration, which `from_config` keeps, times are shifted for the number
    of tokens as in training. Otherwise the scheduler's constant shift applies.

    Raises ValueError for settings of the scheduler with which times do not fall from at most 1 to 0.
    """
    try:
        _set_times(scheduler, steps, token_count, device)
    except Exception as error:  # whatever a scheduler raises for settings that it does not expect
        raise ValueError(f"scheduler {type(scheduler).__name__} with {_settings(scheduler)}: {one_line(error)}") from error
    skipped = min(skipped_steps(steps, strength) * scheduler.order, len(scheduler.timesteps))  # Heun's last step has one call
    times = scheduler.sigmas[skipped : len(scheduler.timesteps) + 1].to(torch.float32)
    if not ((times >= 0) & (times <= 1)).all() or (times.diff() > 0).any() or times[-1] != 0:
        raise ValueError(
            f"scheduler {type(scheduler).__name__} with {_settings(scheduler)}: its times {times[0]:g}, ..., {times[-1]:g} "
            "do not fall from at most 1 to 0"
        )
    scheduler.set_begin_index(skipped)
    return times.to(device)


def _settings(scheduler: Any) -> str:
    """Return the settings of a scheduler that differ from its defaults."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(type(scheduler)).parameters.items()}
    changed = {key: value for key, value in scheduler.config.items() if key in defaults and value != defaults[key]}
    return f"{changed!r:.200}"


def _set_times(scheduler: Any, steps: int, token_count: int, device: torch.device) -> None:
    config = scheduler.config
    dynamic = config.get("use_dynamic_shifting", False)
    mu = token_shift(token_count, stated_shift(config)) if dynamic else None
    if "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
        shift = {"mu": mu} if dynamic else {}
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), device=device, **shift)
    elif mu is None:
        scheduler.set_timesteps(steps, device=device)
    else:
        constant = "flow_shift" if config.get("use_flow_sigmas") else "shift"
        scheduler.register_to_config(**{constant: math.exp(mu)})
        try:
            scheduler.set_timesteps(steps, device=device)
        finally:
            scheduler.register_to_config(**{constant: config[constant]})


class SchedulerStep:
    """A scheduler's step as an integration rule for `sample_flow`, which takes one step per element of `timesteps`.

    Args:
        scheduler: a scheduler that integrates a flow, with times set by `set_flow_times`.
        timesteps: the scheduler's remaining timesteps.
        generator: draws the noise of stochastic schedulers.
    """

    def __init__(self, scheduler: Any, timesteps: Tensor, generator: Any):
        self.scheduler, self.timesteps = scheduler, iter(timesteps)
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        self.options = {"generator": generator} if takes_generator else {}

    def __call__(self, model: Model, x: Tensor, time: Tensor, next_time: Tensor) -> Tensor:
        """Return the latents at the scheduler's next time."""
        timestep = next(self.timesteps)
        return self.scheduler.step(model(x, time), timestep, x, **self.options, return_dict=False)[0]
