"""Running calls in the background while the host goes on."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


class Background:
    """Context manager that runs submitted calls one after the other in its own thread and, on a GPU, on its own stream.

    A call does not inherit the caller's autocast and gradient mode.
    """

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.thread = ThreadPoolExecutor(1)

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, *failed: Any) -> None:
        self.thread.shutdown(cancel_futures=True)

    def submit(self, call: Callable[[], Result]) -> Callable[[], Result]:
        """Run a call after the work that is queued on the current stream; return a function that waits for its result.

        The call itself must synchronise with its stream, as copying its result to the host does.
        """
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        return self.thread.submit(self._run, call).result

    def _run(self, call: Callable[[], Result]) -> Result:
        with torch.cuda.stream(self.stream):
            return call()
