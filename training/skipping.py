"""Skipping of training steps with a loss or gradient that is not finite, without the host waiting for the device."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from .config import UserError
from .state import State


class DivergedError(UserError, FloatingPointError):
    """More steps in a row than allowed had a loss or gradient that is not finite."""


@dataclass(frozen=True)
class Decision:
    """A step's decision on its way to the host.

    Attributes:
        step: the step's number, from 1.
        names: the step's figures.
        flags: on the host once `copied` has happened: skipped, stopped, then for each figure whether it is bad on this process.
        copied: None where the device is the host.
    """

    step: int
    names: Sequence[str]
    flags: Tensor
    copied: torch.cuda.Event | None


class Skipping:
    """Decides on the device whether a step is skipped; counts and names skipped steps when the host learns of them.

    Args:
        accelerator: the process's Accelerator; a step that is bad on one process is skipped on all.
        state: where skipped steps are counted.
        stage: the stage's name, for messages.
        max_skipped: skipped steps in a row that are allowed.
        warn: shows a message; called on the main process.
        lag: steps that the host lets the device be behind; None for 1 on a GPU, and 0 on a CPU, where nothing is waited for.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        state: State,
        stage: str,
        max_skipped: int,
        warn: Callable[[str], None],
        lag: int | None = None,
    ):
        self.accelerator, self.state, self.stage = accelerator, state, stage
        self.max_skipped, self.warn = max_skipped, warn
        self.lag = int(accelerator.device.type == "cuda") if lag is None else lag
        self.unread: deque[Decision] = deque()

    def decide(self, step: int, figures: Mapping[str, Tensor], stop: bool) -> Tensor:
        """Return a scalar on the device: 1 where one of a step's figures, scalars, is not finite on any process, else 0.

        `stop` is whether this process was told to stop.
        """
        bad = (~torch.isfinite(torch.stack(list(figures.values())))).float()
        shared = torch.stack([bad.amax(), torch.full_like(bad[0], stop)])
        if self.accelerator.num_processes > 1:
            total: Tensor = self.accelerator.reduce(shared, "sum")  # pyright: ignore[reportAssignmentType]
            shared = total.clamp(max=1)
        flags, copied = torch.cat([shared, bad]), None
        flags = flags.to("cpu", non_blocking=flags.is_cuda)
        if shared.is_cuda:
            copied = torch.cuda.Event()
            copied.record()
        self.unread.append(Decision(step, [*figures], flags, copied))
        return shared[0]

    def read(self, everything: bool) -> bool:
        """Count the decided steps and name those that were skipped; return whether any process was told to stop.

        Without `everything` the newest steps, as many as the lag, are left for later calls: the device may still be at them.
        Raises DivergedError for more skipped steps in a row than are allowed.
        """
        stop = False
        while len(self.unread) > (0 if everything else self.lag):
            decision = self.unread.popleft()
            if decision.copied is not None:
                decision.copied.synchronize()
            skipped, stopped, *bad = decision.flags.bool().tolist()
            stop |= stopped
            self.state.count(skipped)
            if skipped:
                self._report(decision, [name for name, own in zip(decision.names, bad, strict=True) if own])
        return stop

    def _report(self, decision: Decision, bad: Sequence[str]) -> None:
        message = f"{self.stage} step {decision.step}: {', '.join(bad) or 'a figure on another rank'} not finite"
        in_a_row = self.state.skipped_in_a_row
        if in_a_row > self.max_skipped:
            raise DivergedError(f"{message}, {in_a_row} in a row; lower learning_rate or raise warmup")
        if self.accelerator.is_main_process:
            self.warn(f"{message}, skipped ({self.state.skipped} in all)")
