"""Seconds and memory of calls that are measured in turns, so that a slow moment of the machine affects all of them."""

import itertools
import os
import re
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from promag.training.device import best_device
from promag.training.throughput import wait_for_gpu

Key = TypeVar("Key")
MIB = 2**20
# Patterns that sort PyTorch's operators, and the kernels of a GPU, by name; a name that matches none counts as "others".
KINDS = {"convolutions": "conv", "products": "mm$|matmul|linear|attention", "copies": "copy_|pad|cat$"}
KERNELS = {
    "convolutions": "conv|fprop|[dw]grad|implicit",
    "products": "gemm|nvjet|sdpa|flash",
    "copies": "copy|Memcpy|Memset|[cC]at[A-Z]",
}


@dataclass(frozen=True)
class Timing:
    """Seconds of a call over several rounds: median, the lower and the upper quartile; and the median of CPU seconds."""

    median: float
    quartiles: tuple[float, float]
    cpu: float
    rounds: int


def measure_in_turns(
    calls: Mapping[Key, Callable[[], Any]], rounds: int = 5, clock: Callable[[], Any] = time.perf_counter
) -> dict[Key, Any]:
    """Call each of `calls` once to warm up, then `rounds` times in turns; return the median seconds of each.

    `clock` may return an array, the times of several clocks: then the medians are arrays too.
    """
    for call in calls.values():
        call()
    medians = {key: np.median(times, axis=0) for key, times in times_in_turns(calls, rounds, clock).items()}
    return {key: value if np.ndim(value) else float(value) for key, value in medians.items()}


def timings_in_turns(calls: Mapping[Key, Callable[[], Any]], rounds: int, until: float | None = None) -> dict[Key, Timing]:
    """Time calls that are warm already in turns, `rounds` times or, once `until` (perf_counter's) has passed, fewer."""
    timings = {}
    for key, times in times_in_turns(calls, rounds, _clocks, until).items():
        wall, cpu = np.array(times).T
        lower, median, upper = np.quantile(wall, (0.25, 0.5, 0.75)).tolist()
        timings[key] = Timing(median, (lower, upper), float(np.median(cpu)), len(times))
    return timings


def times_in_turns(
    calls: Mapping[Key, Callable[[], Any]],
    rounds: int,
    clock: Callable[[], Any] = time.perf_counter,
    until: float | None = None,
) -> dict[Key, list[Any]]:
    """Return what `clock` counts in each round of each call, without a warm-up; at least one round whatever `until`."""
    times: dict[Key, list[Any]] = {key: [] for key in calls}
    wait_for_gpu()  # else the first round would wait for the warm-up
    for done in range(rounds):
        if done and until is not None and time.perf_counter() > until:
            break
        for key, call in calls.items():
            started = clock()
            call()
            wait_for_gpu()
            times[key].append(clock() - started)
    return times


def peak_bytes(call: Callable[[], Any], device: torch.device | None = None) -> int:
    """Return the most memory that tensors take while `call` runs, beyond what was there before: call it once to warm up."""
    if (device or best_device()).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    profile = _profile(call, device or best_device(), profile_memory=True)
    assert profile.profiler is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # pyright: ignore
    taken = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))  # pyright: ignore
    return max(taken, default=0)


def operator_seconds(call: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Return the seconds of a call's operators of each of KINDS, and of others: call it once to warm up.

    On a GPU the kernels count, sorted by kernel name: together they are what the call would take if nothing waited for the
    host. Compiled kernels fuse several operators and count as others.
    """
    profile, times, kinds = _profile(call, device), [], KINDS
    if device.type == "cuda":
        kinds = KERNELS
        for event in profile.profiler.kineto_results.events():  # pyright: ignore
            # A name with "#" is an annotation, which spans kernels that are listed too.
            if event.device_type() == torch.autograd.DeviceType.CUDA and "#" not in event.name():
                times.append((event.name(), event.duration_ns() / 1e9))
    else:
        times = [(event.key, event.self_cpu_time_total / 1e6) for event in profile.key_averages()]
    seconds: dict[str, float] = dict.fromkeys((*kinds, "others"), 0.0)
    for name, time_ in times:
        seconds[next((kind for kind, pattern in kinds.items() if re.search(pattern, name)), "others")] += time_
    return seconds


def _profile(call: Callable[[], Any], device: torch.device, **options: Any) -> Any:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else each start and stop of the profiler is a line on stderr
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, **options) as profile:
        call()
        wait_for_gpu()
    return profile


def free_bytes() -> int:
    """Return the bytes of memory that are still available on the device; on a CPU, caches of files count as available."""
    import psutil

    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available


def resident(figure: str = "VmRSS", process: int | str = "self") -> int:
    """Return the bytes that a process holds; with "VmHWM" the most it has held. Linux alone has these figures.

    getrusage's ru_maxrss is no such figure: a new process starts with its parent's there.
    """
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith(f"{figure}:"))
    return int(line.split()[1]) * 1024


def _clocks() -> np.ndarray:
    """Return the seconds of the clock, and of the CPU: this process's and its ended children's, to the microsecond."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return np.array([time.perf_counter(), sum(usage.ru_utime + usage.ru_stime for usage in used)])
