"""Memory and time of processes, for the scripts that measure them."""

import contextlib
import multiprocessing
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from promag.training.config import UserError


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return `function(*arguments)`, computed in a new process, whose memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


@dataclass
class Memory:
    """Bytes that all processes of a tree hold: at first, and at most."""

    first: int = 0
    most: int = 0


@contextlib.contextmanager
def watched(process: int) -> Iterator[Memory]:
    """Measure the resident memory of a process and all below it, ten times a second."""
    import psutil

    memory, ended = Memory(), threading.Event()

    def measure() -> int:
        total = 0
        with contextlib.suppress(psutil.Error):
            root = psutil.Process(process)
            for one in (root, *root.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    total += one.memory_info().rss
        return total

    def watch() -> None:
        while not ended.wait(0.1):
            memory.most = max(memory.most, measure())

    memory.first = memory.most = measure()
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield memory
    finally:
        ended.set()
        thread.join()


def run_command(*words: str | Path) -> dict[str, float]:
    """Run `promag WORDS`; return the seconds it took, those of all its processors, and the most MiB of all its processes.

    Raises UserError with its message where it fails.
    """
    command = [sys.executable, "-m", "promag", *map(str, words)]
    before, began = _children_seconds(), time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with watched(process.pid) as memory:
        output, _ = process.communicate()
    if process.returncode:
        raise UserError(f"promag {' '.join(command[3:])}: {output[-500:]}")
    seconds, cpu_seconds = time.perf_counter() - began, _children_seconds() - before
    return {"seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 1), "peak_mib": memory.most >> 20}


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
