"""What follows the gradients of a training step: the optimisers and the average of the weights, plain or as a CUDA graph."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from .graphs import RECORDINGS, Recorder

Replay = Callable[[], None]


class Update:
    """Applies the gradients that the weights hold: the optimisers step, then the average of the weights is updated.

    With a recorder the update is replayed whenever the gradients lie at addresses that were used before, as the gradients of a
    model with graphs do (graphs.py). It runs eagerly the first time, and it is recorded the second time.

    Args:
        optimizers: AdamW (fused) and Muon.
        average: exponential moving average of the weights.
        parameters: the averaged weights, in the order of `average`.
        recorder: records the update; None runs every update eagerly.
    """

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        average: EMAModel,
        parameters: Sequence[nn.Parameter],
        recorder: Recorder | None = None,
    ):
        self.optimizers, self.average, self.parameters, self.recorder = optimizers, average, parameters, recorder
        self.replays: dict[
            tuple[int, ...], Replay | None
        ] = {}  # by the gradients' addresses, newest last; None: not recorded yet
        self.learning_rates: list[Tensor] = []  # one for each group; a recording reads them
        self.one_minus_decay = torch.tensor(0.0)  # of the average; a recording reads it

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimisers' groups of weights, each with its learning rate."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def __call__(self) -> None:
        """Take one step at the learning rates that the optimisers' groups hold."""
        if self.recorder is None:
            return self._plain()
        addresses = tuple(0 if p.grad is None else p.grad.data_ptr() for p in self.parameters)
        first, replay = addresses not in self.replays, self.replays.pop(addresses, None)
        if not first and replay is None:
            replay = self._record(self.recorder)
        self.replays[addresses] = replay
        if len(self.replays) > RECORDINGS:
            del self.replays[next(iter(self.replays))]
        return self._plain() if replay is None else self._replay(replay)

    def _plain(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
        self.average.step(self.parameters)

    def _replay(self, replay: Replay) -> None:
        for rate, group in zip(self.learning_rates, self.groups, strict=True):
            rate.fill_(group["lr"])
        self.average.optimization_step += 1
        decay = self.average.cur_decay_value = self.average.get_decay(self.average.optimization_step)
        self.one_minus_decay.fill_(1 - decay)
        replay()

    def _record(self, recorder: Recorder) -> Replay:
        if not self.learning_rates:
            device = self.parameters[0].device
            self.learning_rates = [torch.tensor(group["lr"], device=device) for group in self.groups]
            self.one_minus_decay = self.one_minus_decay.to(device)
        return recorder.record_step(self._recorded)

    @torch.no_grad()
    def _recorded(self) -> None:
        """Do what `_plain` does, with learning rates and decay in tensors."""
        before = [{key: group[key] for key in ("lr", "capturable") if key in group} for group in self.groups]
        for group, rate in zip(self.groups, self.learning_rates, strict=True):
            group |= {"lr": rate, **({"capturable": True} if "capturable" in group else {})}
        for optimizer in self.optimizers:
            optimizer.step()
        for group, values in zip(self.groups, before, strict=True):
            group |= values
        # EMAModel.step takes its decay from Python: a recording would keep the first one.
        averages: Any = self.average.shadow_params
        changes: Any = torch._foreach_sub(list(self.parameters), averages)
        torch._foreach_mul_(changes, self.one_minus_decay)
        torch._foreach_add_(averages, changes)
