"""Running calls beside what the host does meanwhile."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


class Aside:
    """Runs calls one after the other in a thread of its own, on a GPU on a stream of its own; a context manager.

    A call runs with PyTorch's defaults: without the caller's autocast and mode of gradients.
    """

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.thread = ThreadPoolExecutor(1)

    def __enter__(self) -> "Aside":
        return self

    def __exit__(self, *failed: Any) -> None:
        self.thread.shutdown(cancel_futures=True)

    def start(self, call: Callable[[], Result]) -> Callable[[], Result]:
        """Start a call that comes after all that the GPU was told so far; return what waits for its result.

        The call itself has to wait for the GPU, as copying its result to the host does.
        """
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        return self.thread.submit(self._run, call).result

    def _run(self, call: Callable[[], Result]) -> Result:
        with torch.cuda.stream(self.stream):
            return call()
