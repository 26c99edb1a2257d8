"""Seconds and memory of calls that are measured in turns, so that a slow moment of the machine affects all of them."""

import itertools
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch

Key = TypeVar("Key")
MIB = 2**20


def measure_in_turns(
    calls: Mapping[Key, Callable[[], Any]], rounds: int = 5, clock: Callable[[], Any] = time.perf_counter
) -> dict[Key, Any]:
    """Call each of `calls` once to warm up, then `rounds` times in turns; return the median seconds of each.

    `clock` may return an array, the times of several clocks: then the medians are arrays too.
    """
    times: dict[Key, list[Any]] = {key: [] for key in calls}
    for call in calls.values():
        call()
    _wait()  # else the first round would wait for the warm-up
    for _ in range(rounds):
        for key, call in calls.items():
            started = clock()
            call()
            _wait()
            times[key].append(clock() - started)
    medians = {key: np.median(values, axis=0) for key, values in times.items()}
    return {key: value if np.ndim(value) else float(value) for key, value in medians.items()}


def peak_bytes(call: Callable[[], Any]) -> int:
    """Return the most memory that tensors take while `call` runs, beyond what was there before: call it once to warm up."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else each start and stop of the profiler is a line on stderr
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    assert profile.profiler is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # pyright: ignore
    taken = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))  # pyright: ignore
    return max(taken, default=0)


def free_bytes() -> int:
    """Return the free memory of the device that is measured."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
