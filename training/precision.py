"""The precision a command computes in: chosen by measurement, printed once, recorded with a run.

    auto    bf16 on a GPU that has it, fp32 on any other GPU; on a CPU the faster one of bf16 and fp32
    bf16    autocast: convolutions and matrix products in bfloat16, the rest in float32
    fp16    autocast to float16; not for trainings
    fp32    float32 throughout

Many CPUs only emulate bfloat16, several times slower than float32, although PyTorch reports it as supported. So `auto` times
one convolution and one matrix product of each kind. A GPU without bfloat16 gets fp32, not fp16: activations of models that
were trained in bfloat16 may exceed float16's 65,504, and the result would be wrong without a word.
"""

import contextlib
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F

from .config import load_yaml

Chosen = Literal["bf16", "fp16", "fp32"]
Precision = Literal["auto", "bf16", "fp16", "fp32"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
HELP = "auto measures which of bf16 and fp32 is faster here; bf16 and fp16 use autocast"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LEAST_GAIN = 1.1  # bf16 must be this much faster than the more exact fp32
ROUNDS = 15  # timed rounds, of which the fastest counts
SECONDS = 0.3  # after which no further round begins


@dataclass(frozen=True)
class Timings:
    """Seconds that one convolution and one matrix product take."""

    convolution: float
    product: float


@dataclass(frozen=True)
class Choice:
    """A precision and why it was chosen."""

    precision: Chosen
    reason: str


def choose_precision(precision: Precision, device: torch.device | str) -> Chosen:
    """Return `precision`, or what `auto` means on `device`; the first `auto` of a process prints its choice on stderr."""
    if precision != "auto":
        return precision
    choice: Choice = _measured(torch.device(device).type)
    _print_once(f"precision: {choice.precision} (auto: {choice.reason})")
    return choice.precision


def choose_for_run(precision: Precision, device: torch.device | str, *runs: str | Path) -> Chosen:
    """Return the precision of a training: `auto` keeps what the first of `runs` with a record was started with.

    Prints the choice and its reason on stderr. Several processes must ask one of them alone.
    """
    records: list[Chosen] = [record for record in map(recorded_precision, runs) if record]
    if precision != "auto" or not records:
        return choose_precision(precision, device)
    recorded: Chosen = records[0]
    own = _measured(torch.device(device).type)
    note = "" if own.precision == recorded else f"; this machine alone would take {own.precision}: {own.reason}"
    _print_once(f"precision: {recorded} (auto: the run was started with it{note})")
    return recorded


def recorded_precision(run: str | Path) -> Chosen | None:
    """Return the precision that a run directory was started with; None where none is recorded.

    Raises UserError for a configuration that cannot be read.
    """
    file = Path(run) / "config.yaml"
    precision = load_yaml(file).get("precision") if file.exists() else None
    return cast(Chosen, precision) if precision in get_args(Chosen) else None


def check_training_precision(precision: Precision) -> None:
    """Raise ValueError for a precision that no training takes."""
    if precision == "fp16":
        raise ValueError(
            "precision fp16: trainings take auto, bf16 or fp32, because float16 gradients underflow without loss scaling; "
            "sampling and evaluation take fp16 too"
        )


def autocast(
    device: torch.device | str, precision: Precision = "auto", weights: torch.dtype = torch.float32
) -> contextlib.AbstractContextManager:
    """Return the context in which models of float32 weights compute at `precision`; those of other weights stay as they are."""
    if weights != torch.float32:
        return contextlib.nullcontext()
    device, chosen = torch.device(device), choose_precision(precision, device)
    return torch.autocast(device.type, DTYPES[chosen] if chosen != "fp32" else torch.bfloat16, enabled=chosen != "fp32")


def decide(fp32: Timings, bf16: Timings) -> Choice:
    """Choose for a CPU: bf16 if the geometric mean of its two speed-ups reaches LEAST_GAIN."""
    convolution, product = fp32.convolution / bf16.convolution, fp32.product / bf16.product
    precision: Chosen = "bf16" if math.sqrt(convolution * product) >= LEAST_GAIN else "fp32"
    reason = f"this CPU runs bf16 convolutions at {convolution:.2g}x and matrix products at {product:.2g}x the speed of fp32"
    return Choice(precision, reason)


@functools.cache
def _measured(device: str) -> Choice:
    """Return what `auto` means on a kind of device."""
    if device == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return Choice("bf16", "this GPU has bf16") if bf16 else Choice("fp32", "this GPU has no bf16")
    if device != "cpu":
        return Choice("fp32", f"bf16 is not measured on {device}")
    return decide(*time_kernels(torch.float32, torch.bfloat16))


@torch.no_grad()
def time_kernels(*dtypes: torch.dtype) -> list[Timings]:
    """Time a convolution and a matrix product in each type on the CPU, by turns; the fastest of several rounds counts.

    One thread computes, and its own processor time counts: other work on the machine hardly matters, and neither does
    the number of threads for the ratio of two types.
    """
    kernels: dict[tuple[torch.dtype, str], Callable[[], torch.Tensor]] = {}
    for dtype in dtypes:
        # Constants, not random numbers: no generator moves. Two clips: a single small one is convolved by a slow kernel.
        x = torch.ones(2, 64, 4, 12, 12, dtype=dtype, device="cpu").contiguous(memory_format=torch.channels_last_3d)
        kernel = torch.ones(64, 64, 3, 3, 3, dtype=dtype, device="cpu").contiguous(memory_format=torch.channels_last_3d)
        matrix = torch.ones(384, 384, dtype=dtype, device="cpu")
        kernels[dtype, "convolution"] = functools.partial(F.conv3d, x, kernel, padding=1)
        kernels[dtype, "product"] = functools.partial(torch.matmul, matrix, matrix)
    fastest = dict.fromkeys(kernels, math.inf)
    with torch.autocast("cpu", enabled=False), _one_thread():
        for call in kernels.values():
            call()  # the first one prepares the kernel
        started = time.perf_counter()
        for done in range(ROUNDS):
            if done and time.perf_counter() - started > SECONDS:
                break
            for name, call in kernels.items():
                before = time.thread_time()
                call()
                fastest[name] = min(fastest[name], time.thread_time() - before)
    return [Timings(fastest[dtype, "convolution"], fastest[dtype, "product"]) for dtype in dtypes]


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@functools.cache
def _print_once(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
