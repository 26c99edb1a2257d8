"""What follows the gradients of a training step: clipping, optimisers, the average of the weights; plain or as CUDA graphs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from .graphs import RECORDINGS, Recorder


@dataclass(frozen=True)
class Recorded:
    """Both parts of an update on gradients that lie at certain addresses: `clip` writes the norms."""

    clip: Callable[[], None]
    norms: Sequence[Tensor]
    step: Callable[[], None]


class Update:
    """Applies the gradients that the weights hold: `clip` limits their norms, then a call steps the optimisers and averages.

    Between the two the caller decides from the norms, on the device, whether the call changes anything. With a recorder both
    parts are replayed whenever the gradients lie at addresses that were used before, as the gradients of a model with graphs
    do (graphs.py). They run eagerly the first time, and they are recorded the second time.

    Args:
        optimizers: AdamW (fused) and Muon.
        average: exponential moving average of the weights, whose decay grows with `taken`.
        parameters: the averaged weights, in the order of `average`.
        clipped: groups of weights, each clipped by the norm of its own gradients.
        clip_norm: the norm that a group's gradients have at most.
        recorder: records both parts; None runs every update eagerly.
    """

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        average: EMAModel,
        parameters: Sequence[nn.Parameter],
        clipped: Sequence[Sequence[nn.Parameter]],
        clip_norm: float,
        recorder: Recorder | None = None,
    ):
        self.optimizers, self.average, self.parameters, self.recorder = optimizers, average, parameters, recorder
        self.clipped, self.clip_norm = clipped, clip_norm
        # by the gradients' addresses, newest last; None: not recorded yet
        self.recordings: dict[tuple[int, ...], Recorded | None] = {}
        self.current: Recorded | None = None  # that of the gradients which were clipped last
        self.learning_rates: list[Tensor] = []  # one for each group; a recording reads them
        # Both on the device: the host need not know whether a step was skipped.
        self.skipping = torch.zeros((), device=parameters[0].device)  # 1 in a step that changes nothing, else 0
        self.taken = torch.zeros((), device=parameters[0].device)  # steps that were not skipped
        for optimizer in optimizers:
            optimizer.found_inf = self.skipping  # pyright: ignore[reportAttributeAccessIssue] (as torch's GradScaler sets it)

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimisers' groups of weights, each with its learning rate."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def clip(self) -> Sequence[Tensor]:
        """Clip the gradients; return the norm that each group had, which the next call may overwrite."""
        self.current = None if self.recorder is None else self._find(self.recorder)
        if self.current is None:
            return self._clip()
        self.current.clip()
        return self.current.norms

    def __call__(self, skipping: Tensor) -> None:
        """Take one step with the clipped gradients, at the learning rates that the optimisers' groups hold.

        Where `skipping`, a scalar, is 1 instead of 0, weights, moments and averages stay as they are, bit for bit.
        """
        self.skipping.copy_(skipping)
        if self.current is not None:
            for rate, group in zip(self.learning_rates, self.groups, strict=True):
                rate.fill_(group["lr"])
            return self.current.step()
        self._step()
        if self.recorder is not None:
            self._keep(self._addresses(), None)
        return None

    def _clip(self) -> list[Tensor]:
        device = self.parameters[0].device  # where no weight of a group has a gradient yet, the norm is a zero on the CPU
        return [nn.utils.clip_grad_norm_(group, self.clip_norm).to(device) for group in self.clipped]

    def _find(self, recorder: Recorder) -> Recorded | None:
        """Return the recording for the gradients' addresses; None where no step was taken with these, which makes moments."""
        addresses = self._addresses()
        if addresses not in self.recordings:
            return None
        found = self.recordings.pop(addresses) or self._record(recorder)
        self._keep(addresses, found)
        return found

    def _keep(self, addresses: tuple[int, ...], recorded: Recorded | None) -> None:
        self.recordings[addresses] = recorded
        if len(self.recordings) > RECORDINGS:
            del self.recordings[next(iter(self.recordings))]

    def _addresses(self) -> tuple[int, ...]:
        return tuple(0 if p.grad is None else p.grad.data_ptr() for p in self.parameters)

    def _record(self, recorder: Recorder) -> Recorded:
        device = self.parameters[0].device
        if not self.learning_rates:
            self.learning_rates = [torch.tensor(group["lr"], device=device) for group in self.groups]
        norms = [torch.zeros((), device=device) for _ in self.clipped]

        def clip() -> None:
            for own, norm in zip(norms, self._clip(), strict=True):
                own.copy_(norm)

        return Recorded(recorder.record_step(clip), norms, recorder.record_step(self._recorded_step))

    def _recorded_step(self) -> None:
        """Do what a plain step does, with learning rates in tensors."""
        before = [{key: group[key] for key in ("lr", "capturable") if key in group} for group in self.groups]
        for group, rate in zip(self.groups, self.learning_rates, strict=True):
            group |= {"lr": rate, **({"capturable": True} if "capturable" in group else {})}
        self._step()
        for group, values in zip(self.groups, before, strict=True):
            group |= values

    @torch.no_grad()
    def _step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
        taking = 1 - self.skipping
        self.taken += taking
        # What EMAModel.step does with its warm-up, but for the count of steps, which it keeps on the host.
        change = self.taken.clamp(min=1).pow(-self.average.power).clamp(min=1 - self.average.decay) * taking
        averages: Any = self.average.shadow_params
        changes: Any = torch._foreach_sub(list(self.parameters), averages)
        torch._foreach_mul_(changes, change)
        torch._foreach_add_(averages, changes)
