"""Measured cases, and the JSON line of each: seconds, spread, arithmetic, share of the machine's limit, ratio to a baseline."""

import gc
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from promag.training.precision import Chosen

from .ceilings import Ceilings
from .timing import MIB, Timing, operator_seconds, peak_bytes, timings_in_turns

WHAT = "speed"
Settings = Mapping[str, Any]  # what identifies a case in a record: model, ratio, part, shapes, precision ...


@dataclass(frozen=True)
class Job:
    """A call that is timed, and what it does.

    Args:
        call: does it once.
        count: clips, videos or frames of a call, by which calls of different sizes are compared.
        gflop: arithmetic of a call; None where it is not counted.
        facts: further figures of the line, known without a measurement.
    """

    call: Callable[[], Any]
    count: float = 1
    gflop: float | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """Cases that are measured in turns; each is compared with the first that has the same `part`.

    Args:
        suite: the suite's name.
        settings: the settings of each case, which are known before anything is built.
        build: returns the job of each case.
        limit: the arithmetic whose ceiling counts; None where none does.
        rank: groups of lower rank are measured first.
        memory: whether to measure the peak memory of tensors; what CUDA graphs hold between calls does not show in it.
        warm_up: calls of each job before it is timed.
    """

    suite: str
    settings: Sequence[Settings]
    build: Callable[[], Sequence[Job]]
    limit: Literal["product", "convolution"] | None = None
    rank: int = 1
    memory: bool = True
    warm_up: int = 1


@dataclass(frozen=True)
class Options:
    """What a run of the benchmark measures; see `promag benchmark speed --help`."""

    device: torch.device
    precisions: tuple[Chosen, ...]
    presets: tuple[str, ...]
    compiled: tuple[bool, ...] = (False,)
    graphs: tuple[bool, ...] = (False,)  # for the transformer alone
    ratios: tuple[int, ...] = (4, 8, 16)
    frames: int = 65
    clip_sizes: tuple[str, ...] | None = None  # None: what suits the device
    train_batch_size: int | None = None
    batch_size: int | None = None
    peers: tuple[str, ...] = ()
    pipeline: str = "checkpoints/tiny-video"
    tiny_decoder: str | None = None  # its folder, "" for the pipeline's own; None measures none
    overlap: bool = False  # sample videos in a row too, each decoded while the next is denoised
    guidance: float | None = None  # None: the pipeline's own
    tokenizer: str = "checkpoints/tiny"
    videos: str | None = None  # index of clips that are loaded and cached; None: generated files
    steps: tuple[int, ...] = (24, 8, 4)
    count: int = 64
    quick: bool = False

    @property
    def ways(self) -> list[tuple[bool, bool]]:
        """The ways to run the transformer, compiled or not and as CUDA graphs or not, the one that should be fastest first."""
        return sorted(itertools.product(self.compiled, self.graphs), reverse=True)


def way(compiled: bool, graphs: bool) -> Settings:
    """Return the settings that tell how the transformer runs; lines without graphs do not name them."""
    return {"compiled": compiled, **({"graphs": True} if graphs else {})}


def measure(group: Group, device: torch.device, rounds: int, ceilings: Ceilings, until: float | None = None) -> list[Any]:
    """Measure a group and return a line for each case; a case that fails has its error in place of seconds.

    Once `until` (perf_counter's) has passed, cases that were not begun, such as those still to be compiled, are left out.
    """
    failed: dict[int, str] = {}
    try:
        jobs = dict(enumerate(group.build()))
    except Exception as error:  # one group that fails must not end an unattended run
        jobs, failed = {}, dict.fromkeys(range(len(group.settings)), _message(error))
    begun = {*failed}
    for number, job in jobs.items():
        if begun and until is not None and time.perf_counter() > until:
            break
        begun.add(number)
        try:
            for _ in range(group.warm_up):
                job.call()
        except Exception as error:
            failed[number] = _message(error)
    if failed:
        free()  # here, where no traceback holds tensors any more
    good = {number: jobs[number] for number in sorted(begun) if number not in failed}
    timings: dict[int, Timing] = {}
    peaks: dict[int, int] = {}
    operators: dict[int, dict[str, float]] = {}
    try:
        timings = timings_in_turns({number: job.call for number, job in good.items()}, rounds, until)
        peaks = {number: peak_bytes(job.call, device) for number, job in good.items()} if group.memory else {}
        operators = {number: operator_seconds(job.call, device) for number, job in good.items()} if group.limit else {}
    except Exception as error:
        failed |= dict.fromkeys(good, _message(error))
        timings = {}
    lines = [
        {"what": WHAT, "suite": group.suite, "device": device.type, "settings": dict(settings)}
        | ({"error": failed[n]} if n in failed else figures(group, n, jobs, timings, peaks, operators, ceilings))
        for n, settings in enumerate(group.settings)
        if n in begun
    ]
    jobs.clear()
    good.clear()
    free()
    return lines


def figures(
    group: Group,
    number: int,
    jobs: Mapping[int, Job],
    timings: Mapping[int, Timing],
    peaks: Mapping[int, int],
    operators: Mapping[int, Mapping[str, float]],
    ceilings: Ceilings,
) -> dict[str, Any]:
    """Return the figures of one case of a group."""
    job, timing, settings = jobs[number], timings[number], group.settings[number]
    line: dict[str, Any] = {
        "seconds": timing.median,
        "quartiles": list(timing.quartiles),
        "cpu_seconds": timing.cpu,
        "rounds": timing.rounds,
        "count": job.count,
        **job.facts,
    }
    if number in peaks:
        line["peak_mib"] = peaks[number] / MIB
    if total := sum(operators.get(number, {}).values()):
        line["operator_shares"] = {kind: round(seconds / total, 4) for kind, seconds in operators[number].items()}
        line["operator_seconds"] = total
    if job.gflop is not None:
        line |= {"gflop": job.gflop, "tflops": job.gflop / timing.median / 1e3}
        if group.limit:
            limit = ceilings.tflops(group.limit, settings["precision"])
            line |= {"limit": group.limit, "share_of_limit": line["tflops"] / limit}
    first = baseline_of(group.settings, number)
    if first != number and first in timings:
        per_item = timings[first].median / jobs[first].count
        line |= {"baseline": _difference(group.settings[first], settings), "speedup": per_item * job.count / timing.median}
    return {**line, "ceilings": asdict(ceilings)}


def baseline_of(settings: Sequence[Settings], number: int) -> int:
    """Return the number of the first case whose `part` is that of another."""
    return next(i for i, one in enumerate(settings) if one.get("part") == settings[number].get("part"))


def _difference(baseline: Settings, settings: Settings) -> dict[str, Any]:
    """Return the baseline's settings that differ."""
    return {key: value for key, value in baseline.items() if settings.get(key) != value}


def is_recorded(group: Group, device: str, lines: Iterable[Mapping[str, Any]], where: Mapping[str, Any]) -> bool:
    """Tell whether a record has figures of all cases of a group, measured `where`: the same commit, machine and versions.

    No line of a checkout with changes, or of an unknown commit, counts: nobody knows what it measured. Nor does a line with
    an error, which may have been of the moment.
    """
    if where["commit"] == "unknown" or where["commit"].endswith("+changes"):
        return False
    have = [
        line["settings"]
        for line in lines
        if line.get("what") == WHAT
        and "error" not in line
        and (line["suite"], line["device"]) == (group.suite, device)
        and all(line.get(key) == value for key, value in where.items())
    ]
    return all(dict(settings) in have for settings in group.settings)


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def free() -> None:
    """Let go of what nothing refers to, on the GPU too."""
    gc.collect()
    torch.cuda.empty_cache()
