"""Training throughput: averaged metrics, samples, tokens and FLOPs per second, and MFU.

MFU (model FLOPs utilisation, arXiv 2204.02311, app. B) is the rate of the model's own FLOPs, without recomputation, as a
fraction of a peak. The peak is either given or the best of a few large matrix products in the training's precision.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SIDE = 2048  # side of the square matrices that are multiplied on a CPU
LARGE_SIDE = 8192  # on other devices: smaller products would not keep them busy
SMALL_SIDE = 512  # where products are so slow that larger ones would take minutes: bfloat16 on a CPU that emulates it
SLOW = 0.05  # seconds of a small product, from which on larger ones are left out
ROUNDS = 6  # timed rounds of a measurement, of which the fastest counts
ENOUGH = 2.0  # seconds after which no further round begins


@dataclass(frozen=True)
class Work:
    """The model's work for one batch on this process: its tokens, and the FLOPs of the forward and backward pass."""

    tokens: int
    flops: float


class Meter:
    """Accumulates metrics and work between two readings.

    Args:
        processes: number of processes; samples and tokens per second are summed over them, TFLOP/s and MFU are per process.
        device: device of this process.
        bf16: whether the training computes in bfloat16.
        peak_tflops: peak of a process's device; None measures it on `device`, in bfloat16 if `bf16`, else float32.
    """

    def __init__(self, processes: int, device: torch.device | str, bf16: bool, peak_tflops: float | None):
        self.processes, self.device, self.bf16, self.peak = processes, device, bf16, peak_tflops
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}  # steps per metric: some metrics exist only in some steps
        self.samples = self.tokens = 0
        self.flops = 0.0
        self.started = self.since = 0.0

    def start(self) -> None:
        """Start the clock."""
        self.started = self.since = time.perf_counter()

    def seconds(self) -> float:
        """Return the seconds since the start, without pauses."""
        return time.perf_counter() - self.started

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude the time of the block."""
        before = time.perf_counter()
        yield
        pause = time.perf_counter() - before
        self.started, self.since = self.started + pause, self.since + pause

    def count(self, samples: int, work: Work | None) -> None:
        """Count a batch with `samples` samples and its work."""
        self.samples += samples
        if work is not None:
            self.tokens += work.tokens
            self.flops += work.flops

    def add(self, figures: Mapping[str, Tensor], skipping: Tensor) -> None:
        """Add the metrics of an optimizer step; nothing where `skipping`, a scalar, is 1 instead of 0."""
        for key, value in figures.items():
            self.sums[key] = self.sums.get(key, 0) + torch.where(skipping.bool(), 0, value.detach().float())
            self.counts[key] = self.counts.get(key, 0) + (1 - skipping)

    def read(self) -> dict[str, float]:
        """Return each metric's mean over the steps that had it and the throughput since the last reading, then reset."""
        steps = {key: float(count) for key, count in self.counts.items()}  # waits for the device
        record = {key: float(value) / steps[key] for key, value in self.sums.items() if steps[key]}
        seconds = time.perf_counter() - self.since
        record["samples_per_second"] = self.samples * self.processes / seconds
        if self.flops:
            if self.peak is None:
                with self.pause():
                    self.peak = _measured_peak(self.device, self.bf16)
            record["tokens_per_second"] = self.tokens * self.processes / seconds
            record["tflops"] = self.flops / seconds / 1e12
            record["mfu"] = record["tflops"] / self.peak
        self.sums, self.counts, self.samples, self.tokens, self.flops = {}, {}, 0, 0, 0.0
        self.since = time.perf_counter()
        return record


@functools.cache
def _measured_peak(device: torch.device | str, bf16: bool) -> float:
    """Measure once in a process, which may train several stages."""
    return matmul_tflops(device, bf16)


def matmul_tflops(device: torch.device | str, bf16: bool) -> float:
    """Return the highest TFLOP/s over a few products of two square random matrices."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    side, seconds = 0, 0.0
    for side in (SMALL_SIDE, SIDE if torch.device(device).type == "cpu" else LARGE_SIDE):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        seconds = fastest(lambda a=a, b=b: torch.matmul(a, b))
        if seconds > SLOW:
            break
    return 2 * side**3 / seconds / 1e12


def fastest(call: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """Return the fewest seconds of a call over some rounds after a first one, which counts where it took ENOUGH alone."""
    best, began = float("inf"), time.perf_counter()
    for done in range(rounds + 1):
        wait_for_gpu()
        started = time.perf_counter()
        call()
        wait_for_gpu()
        now = time.perf_counter()
        if done or now - began > ENOUGH:
            best = min(best, now - started)
        if now - began > ENOUGH:
            break
    return best


def wait_for_gpu() -> None:
    """Wait until a GPU, if there is one, has done what was asked of it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
