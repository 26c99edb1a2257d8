"""The processes that are started together: their ranks, waiting for each other, broadcasts and sums."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env, reduce
from torch import Tensor, distributed

from .precision import Chosen, Precision, choose_for_run

T = TypeVar("T")
LONGEST_WAIT = timedelta(days=7)


def processes() -> PartialState:
    """Return this process's place among those started together: its index, their number, its device, waiting for all."""
    # Before any Accelerator, this alone decides whether processes on CPUs find each other.
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


@functools.cache
def waiting_group() -> Any:
    """Return a group of all processes whose barrier may last days, unlike NCCL's; valid until `leave_process_group`."""
    return distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)


def wait_for_everyone() -> None:
    """Wait until all processes are here.

    Ranks that cache shards, or wait for what rank 0 alone does, may be hours apart. NCCL would end all of them after ten
    minutes.
    """
    if processes().num_processes > 1:
        distributed.barrier(group=waiting_group())


@contextlib.contextmanager
def main_process_first() -> Iterator[bool]:
    """Let the main process do the block while the others wait, then let them do it; yields whether this is the main one."""
    is_main = processes().is_main_process
    if not is_main:
        wait_for_everyone()
    yield is_main
    if is_main:
        wait_for_everyone()


def broadcast_from_main(compute: Callable[[], T]) -> T:
    """Call `compute` on rank 0 and return its result, or raise its exception, on all ranks."""
    state = processes()
    outcome: list[Any] = [None, None]  # result, exception
    if state.is_main_process:
        try:
            outcome[0] = compute()
        except Exception as error:
            outcome[1] = error
    wait_for_everyone()
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def sum_over_processes(values: Tensor) -> Tensor:
    """Return the sum of the processes' tensors, all of one shape and on the processes' device, on every process."""
    total: Any = reduce(values, "sum")
    return total


def choose_precision_once(precision: Precision, *runs: str | Path) -> Chosen:
    """Return `choose_for_run` of the main process's device, on every process."""
    device: Any = processes().device
    return broadcast_from_main(lambda: choose_for_run(precision, device, *runs))
