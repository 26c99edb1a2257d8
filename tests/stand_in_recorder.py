"""A stand-in for a GPU that records calls: a replay computes a call again on the CPU, into the tensors of the recording."""

from collections.abc import Callable
from typing import Any

import torch

from promag.training.graphs import Results


class StandInRecorder:
    """Counts what it records, results and steps; its replays write nothing but the recorded tensors, as those of a graph."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.recorded = self.steps = 0

    def warm_up(self, call: Callable[[], Any]) -> None:
        """Call it once."""
        call()

    def record(self, call: Callable[[], Results]) -> tuple[Results, Callable[[], None]]:
        """Return a call's results and what computes them again."""
        self.recorded += 1
        learning, results = torch.is_grad_enabled(), call()

        def replay() -> None:
            with torch.set_grad_enabled(learning):
                again = call()
            with torch.no_grad():
                for own, new in zip(results, again, strict=True):
                    if own is not None and new is not None:
                        own.copy_(new)

        return results, replay

    def record_step(self, step: Callable[[], None]) -> Callable[[], None]:
        """Return the step itself."""
        self.steps += 1
        return step
