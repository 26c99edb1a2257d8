"""What follows the gradients of a training step: the optimisers and the average of the weights, plain or as a CUDA graph."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from .graphs import RECORDINGS, Recorder

Replay = Callable[[], None]


class Update:
    """Lets the optimisers step and averages the weights, with the gradients that the weights hold.

    With a recorder a step is replayed where gradients lie in the same memory as before, as those of a model with graphs do
    (graphs.py): the first time it runs as it is, the second time it is recorded.

    Args:
        optimizers: AdamW (fused) and Muon.
        average: of the weights; any warm-up of its decay is kept.
        parameters: what `average` averages, in its order.
        recorder: what records; None to run every step as it is.
    """

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        average: EMAModel,
        parameters: Sequence[nn.Parameter],
        recorder: Recorder | None = None,
    ):
        self.optimizers, self.average, self.parameters, self.recorder = optimizers, average, parameters, recorder
        self.replays: dict[tuple[int, ...], Replay | None] = {}  # by addresses of gradients, the newest last; None: seen once
        self.rates: list[Tensor] = []  # learning rates, one for each group, where a recording reads them
        self.share = torch.tensor(0.0)  # of the new weights in the average, likewise

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimisers' groups of weights, each with its learning rate."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def __call__(self) -> None:
        """Take one step at the learning rates that the optimisers' groups hold."""
        if self.recorder is None:
            return self._plain()
        places = tuple(0 if p.grad is None else p.grad.data_ptr() for p in self.parameters)
        first, replay = places not in self.replays, self.replays.pop(places, None)
        if not first and replay is None:
            replay = self._record(self.recorder)
        self.replays[places] = replay
        if len(self.replays) > RECORDINGS:
            del self.replays[next(iter(self.replays))]
        return self._plain() if replay is None else self._replay(replay)

    def _plain(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
        self.average.step(self.parameters)

    def _replay(self, replay: Replay) -> None:
        for rate, group in zip(self.rates, self.groups, strict=True):
            rate.fill_(group["lr"])
        self.average.optimization_step += 1
        decay = self.average.cur_decay_value = self.average.get_decay(self.average.optimization_step)
        self.share.fill_(1 - decay)
        replay()

    def _record(self, recorder: Recorder) -> Replay:
        if not self.rates:
            device = self.parameters[0].device
            self.rates = [torch.tensor(group["lr"], device=device) for group in self.groups]
            self.share = self.share.to(device)
        return recorder.record_step(self._recorded)

    @torch.no_grad()
    def _recorded(self) -> None:
        """Do what `_plain` does, with learning rates and decay in tensors."""
        before = [{key: group[key] for key in ("lr", "capturable") if key in group} for group in self.groups]
        for group, rate in zip(self.groups, self.rates, strict=True):
            group |= {"lr": rate, **({"capturable": True} if "capturable" in group else {})}
        for optimizer in self.optimizers:
            optimizer.step()
        for group, values in zip(self.groups, before, strict=True):
            group |= values
        averages: Any = self.average.shadow_params
        changes: Any = torch._foreach_sub(list(self.parameters), averages)
        torch._foreach_mul_(changes, self.share)
        torch._foreach_add_(averages, changes)
