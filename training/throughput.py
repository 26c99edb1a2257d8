"""How fast a training runs: averages of its figures, samples, tokens and FLOPs a second, and MFU.

MFU (model FLOPs utilisation, arXiv 2204.02311, app. B) is what the model's own arithmetic takes, recomputation left out,
against a peak: one that is stated, or the best of a few large matrix products in the training's precision.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

SIDE = 2048  # of the matrices whose product is timed on a CPU
LARGE_SIDE = 8192  # on other devices, which smaller ones do not fill


@dataclass(frozen=True)
class Work:
    """What one batch asks of the model on this process: its tokens, and FLOPs of its forward and backward pass."""

    tokens: int
    flops: float


class Meter:
    """Sums what a training does between two readings.

    Args:
        processes: how many train; samples and tokens a second are those of all of them, TFLOP/s and MFU of one.
        peak_tflops: stated peak of a process's device; None measures it on `device`, in bfloat16 with `bf16`.
    """

    def __init__(self, processes: int, device: torch.device | str, bf16: bool, peak_tflops: float | None):
        self.processes, self.device, self.bf16, self.peak = processes, device, bf16, peak_tflops
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}  # steps that had a figure: some begin or end within a window
        self.samples = self.tokens = 0
        self.flops = 0.0
        self.started = self.since = 0.0

    def start(self) -> None:
        """Begin to measure time."""
        self.started = self.since = time.perf_counter()

    def seconds(self) -> float:
        """Return the seconds since the start, pauses left out."""
        return time.perf_counter() - self.started

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the block's time out."""
        before = time.perf_counter()
        yield
        pause = time.perf_counter() - before
        self.started, self.since = self.started + pause, self.since + pause

    def count(self, samples: int, work: Work | None) -> None:
        """Count a batch of so many samples."""
        self.samples += samples
        if work is not None:
            self.tokens += work.tokens
            self.flops += work.flops

    def add(self, figures: Mapping[str, Tensor]) -> None:
        """Add the figures of a step that was taken."""
        for key, value in figures.items():
            self.sums[key] = self.sums.get(key, 0) + value.detach().float()
            self.counts[key] = self.counts.get(key, 0) + 1

    def read(self) -> dict[str, float]:
        """Return each figure's average over the steps that had it and the throughput since the last reading, and begin anew."""
        record = {key: float(value) / self.counts[key] for key, value in self.sums.items()}  # waits for the device
        seconds = time.perf_counter() - self.since
        record["samples_per_second"] = self.samples * self.processes / seconds
        if self.flops:
            if self.peak is None:
                with self.pause():
                    self.peak = matmul_tflops(self.device, self.bf16)
            record["tokens_per_second"] = self.tokens * self.processes / seconds
            record["tflops"] = self.flops / seconds / 1e12
            record["mfu"] = record["tflops"] / self.peak
        self.sums, self.counts, self.samples, self.tokens, self.flops = {}, {}, 0, 0, 0.0
        self.since = time.perf_counter()
        return record


def matmul_tflops(device: torch.device | str, bf16: bool, rounds: int = 5) -> float:
    """Return the best of a few products of two square matrices of random numbers, in TFLOP/s."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    side = SIDE if torch.device(device).type == "cpu" else LARGE_SIDE
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(rounds + 1):
        if a.is_cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        torch.matmul(a, b)
        if a.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best / 1e12
