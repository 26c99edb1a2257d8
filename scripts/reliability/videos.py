"""Read every file of the corpus in a process with limits, and compare with what ffmpeg shows.

python -m promag.scripts.reliability.videos runs/corpus --ffmpeg PATH --record docs/results/reliability.jsonl

A file is read (pixels within its tolerance, the same count and times), refused in words, wrong, or ends in a crash, a hang or
too much memory. For a damaged file, what ffmpeg shows and a refusal are both right; it is undecided where ffmpeg shows what
lies in its memory. Whole files that are refused are encoded anew with the command that the refusal prints, and its output
must be read.
"""

import importlib.util
import json
import multiprocessing
import os
import pickle
import resource
import select
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from promag.data.video import REENCODE, UnreadableVideo, decode_strictly, frame_times, read_frames
from promag.scripts._options import check_writable, share
from promag.training.command_line import Parser, run_main
from promag.training.config import UserError
from promag.training.run import append_result

from .corpus import Case, add_ffmpeg, find_ffmpeg, load_corpus
from .reference import Shown, shown_by_ffmpeg

ADDRESS_SPACE = 2 * 2**30  # bytes that a child may take beyond those of its parent
RESIDENT = 2**30  # bytes that no file of these sizes may need
SECONDS = 30  # for one file
MEMORIES = (85, 170)  # bytes that new memory is filled with, to see whether ffmpeg shows it
SAME_TIME = 1e-3  # seconds
RIGHT = ("read", "refused", "undecided")
RESULTS = (*RIGHT, "wrong", "crash", "hang", "memory")


@dataclass(frozen=True)
class Outcome:
    """What became of a file: read, refused, undecided, wrong, crash, hang or memory."""

    case: Case
    result: str
    reason: str = ""
    difference: int | None = None  # grey levels, the largest of all pixels, where frames were compared
    times_equal: bool | None = None
    resident: int = 0  # bytes, the most


class NoAnswerError(Exception):
    """A child process ended without an answer; the message is crash, hang or memory, and why."""


def in_child(action: Callable[[], Any], seconds: float = SECONDS, address_space: int = ADDRESS_SPACE) -> tuple[Any, int]:
    """Return (result or exception of `action`, most resident bytes) from a forked process with limits on memory and time.

    Raises NoAnswerError where the process dies or takes too long.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        _work_in_child(action, writer, address_space)
    os.close(writer)
    data, ended = b"", time.monotonic() + seconds
    with open(reader, "rb", buffering=0) as file:
        while (left := ended - time.monotonic()) > 0:
            ready = select.select([file], [], [], left)[0]
            piece = file.read(1 << 20) if ready else None
            if ready and not piece:
                break
            data += piece or b""
        else:
            os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    resident = usage.ru_maxrss * 1024
    if left <= 0:
        raise NoAnswerError(f"hang: no answer within {seconds:g} s")
    if os.WIFSIGNALED(status):
        raise NoAnswerError(f"crash: killed by {signal.Signals(os.WTERMSIG(status)).name}")
    if not data:
        raise NoAnswerError(f"crash: ended with status {os.waitstatus_to_exitcode(status)} and no answer")
    return pickle.loads(data), resident


def _work_in_child(action: Callable[[], Any], writer: int, address_space: int) -> None:
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * resource.getpagesize() + address_space
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        try:
            answer = pickle.dumps(action())
        except BaseException as error:
            answer = pickle.dumps(error if isinstance(error, UserError) else RuntimeError(f"{type(error).__name__}: {error}"))
        with open(writer, "wb") as file:
            file.write(answer)
    finally:
        os._exit(0)


def read_all(path: str) -> dict[str, Any]:
    """Read a video in all ways of the reader; raises RuntimeError where they differ."""
    facts = decode_strictly(path, decord=True)
    times = frame_times(path)
    frames = read_frames(path, range(facts.frames))
    scattered = [facts.frames - 1, 0, facts.frames // 2, facts.frames // 3, facts.frames // 2]
    if not np.array_equal(read_frames(path, scattered), frames[scattered]):
        raise RuntimeError("scattered frames differ from the same frames read in order")
    if frames.shape[:3] != (facts.frames, facts.height, facts.width):
        raise RuntimeError(f"{facts} and frames of {frames.shape}")
    if len(times) != facts.frames or np.abs(times - facts.timestamps).max() > SAME_TIME:
        raise RuntimeError("times of the packets differ from those of the strict pass")
    if facts.decord:
        fast = read_frames(path, range(facts.frames), decord=True)
        if not np.array_equal(fast, frames):
            raise RuntimeError("decord reads other frames than PyAV although the strict pass allows it")
    return {"frames": frames, "times": facts.timestamps}


def examine(folder: Path, ffmpeg: str | None, case: Case) -> Outcome:
    """Read a file of the corpus and compare it with its reference, unless there is no ffmpeg to ask."""
    path = folder / case.file
    try:
        answer, resident = in_child(lambda: read_all(str(path)))
    except NoAnswerError as error:
        return Outcome(case, str(error).split(":")[0], str(error))
    if isinstance(answer, UnreadableVideo):
        helpful = len(answer.reason.split()) > 1 and "Traceback" not in answer.reason and "std::" not in answer.reason
        result = "memory" if resident > RESIDENT else "refused" if helpful else "crash"
        return Outcome(case, result, answer.reason, resident=resident)
    if isinstance(answer, Exception):
        memory = "MemoryError" in str(answer)
        wrong = " differ" in str(answer) or " other frames" in str(answer)
        return Outcome(case, "memory" if memory else "wrong" if wrong else "crash", str(answer), resident=resident)
    if resident > RESIDENT:
        return Outcome(case, "memory", f"{resident / 2**20:.0f} MiB", resident=resident)
    if ffmpeg is None:
        return Outcome(case, "read", resident=resident)
    size = answer["frames"].shape[1:3]
    shown = reference_of(folder, ffmpeg, case, size)
    outcome = compare(case, answer, shown, resident)
    if outcome.result == "wrong" and not case.whole and shown is not None and shown.frames is not None:
        # Damage that no decoder notices may make it show what lies in its memory: then there is nothing to compare with.
        others = (shown_by_ffmpeg(ffmpeg, path, case, size, memory) for memory in MEMORIES)
        if any(o is None or o.frames is None or not np.array_equal(o.frames, shown.frames) for o in others):
            return Outcome(case, "undecided", "ffmpeg shows what lies in its memory", resident=resident)
    return outcome


def reference_of(folder: Path, ffmpeg: str, case: Case, size: tuple[int, int]) -> Shown | None:
    """Return what is to be seen of a file."""
    known = folder / "reference" / f"{Path(case.file).name}.npy"
    if case.file.startswith("pictures/") and known.exists():
        pixels = np.load(known)
        return Shown(pixels, np.zeros(len(pixels)), pixels.shape[2] / pixels.shape[1])
    return shown_by_ffmpeg(ffmpeg, folder / case.file, case, size)


def compare(case: Case, read: dict[str, Any], shown: Shown | None, resident: int) -> Outcome:
    """Compare what was read of a file with what is shown of it."""
    frames, times = read["frames"], read["times"]
    problems, difference, times_equal = [], None, None
    if shown is None:
        problems.append("ffmpeg shows nothing of it")
    elif len(shown.times) != len(times):
        problems.append(f"{len(times)} frames, ffmpeg shows {len(shown.times)}")
    else:
        times_equal = bool(np.abs(shown.times - times).max() <= SAME_TIME)
        if not times_equal:
            problems.append(f"times differ by up to {np.abs(shown.times - times).max():.4f} s")
        height, width = frames.shape[1:3]
        if abs(shown.aspect * height - width) > 1 and abs(width / shown.aspect - height) > 1:
            problems.append(f"{width}x{height}, ffmpeg shows an aspect ratio of {shown.aspect:.4g}")
        if shown.frames is None or shown.frames.shape != frames.shape:
            problems.append("sizes of the frames differ")
        else:
            difference = int(np.abs(shown.frames.astype(np.int16) - frames).max())
            if difference > case.tolerance:
                worst = np.abs(shown.frames.astype(np.int16) - frames).reshape(len(frames), -1).max(axis=1)
                problems.append(f"pixels differ by up to {difference} grey levels, most in frame {worst.argmax()}")
    return Outcome(case, "wrong" if problems else "read", "; ".join(problems), difference, times_equal, resident)


def cure(folder: Path, ffmpeg: str, file: str) -> str | None:
    """Encode a refused file anew with the printed command and read the output; return what failed."""
    with tempfile.TemporaryDirectory() as aside:
        out = Path(aside, "out")
        words = [word.replace("OUT", str(out)) for word in shlex.split(REENCODE)]
        words = [f"file:{folder / file}" if word == "IN" else word for word in words]
        done = subprocess.run([ffmpeg, "-nostdin", "-v", "error", *words[1:]], capture_output=True, text=True, errors="replace")
        if done.returncode:
            return f"ffmpeg fails: {done.stderr.strip().splitlines()[-1:]}"
        try:
            answer, _ = in_child(lambda: read_all(f"{out}.mp4"))
        except NoAnswerError as error:
            return str(error)
        return str(answer) if isinstance(answer, Exception) else None


def table(outcomes: Sequence[Outcome]) -> str:
    """Return what was read of each kind of whole files, as a table in markdown."""
    lines = ["| format | files | read | max difference | times equal |", "|---|---|---|---|---|"]
    for kind in sorted({outcome.case.kind for outcome in outcomes if outcome.case.whole}):
        rows = [outcome for outcome in outcomes if outcome.case.kind == kind]
        read = sum(outcome.result == "read" for outcome in rows)
        most = max((row.difference for row in rows if row.difference is not None), default="")
        timed = [row.times_equal for row in rows if row.times_equal is not None]
        lines.append(f"| {kind} | {len(rows)} | {read} | {most} | {sum(timed)} of {len(timed)} |")
    return "\n".join(lines)


def summary(outcomes: Sequence[Outcome], cured: dict[str, str | None]) -> dict[str, Any]:
    """Return the figures to record."""
    kinds: dict[str, Any] = {}
    for outcome in outcomes:
        entry = kinds.setdefault(outcome.case.kind, {"files": 0, "whole": outcome.case.whole, "max_difference": None})
        entry["files"] += 1
        entry[outcome.result] = entry.get(outcome.result, 0) + 1
        if outcome.difference is not None and outcome.result == "read":
            entry["max_difference"] = max(outcome.difference, entry["max_difference"] or 0)
    wrong = [o for o in outcomes if o.result not in RIGHT]
    return {
        "what": "reading of odd and damaged videos",
        "files": len(outcomes),
        "whole": sum(o.case.whole for o in outcomes),
        **{result: sum(o.result == result for o in outcomes) for result in RESULTS},
        "whole_refused": [o.case.file for o in outcomes if o.case.whole and o.result == "refused"],
        "not_right": {o.case.file: o.reason for o in wrong},
        "cured_by_encoding_anew": {"of": len(cured), "read": sum(problem is None for problem in cured.values())},
        "most_resident_mib": max(o.resident for o in outcomes) // 2**20,
        "kinds": kinds,
    }


def main(argv: Sequence[str]) -> int:
    """Print what is not right and the table; the exit status is 1 unless all files are read or refused."""
    parser = Parser(__doc__)
    add_ffmpeg(parser)
    parser.add_argument("--only", default="", metavar="TEXT", help="only files whose path holds this")
    parser.add_argument("--all", action="store_true", help="print the outcome of every file")
    share(parser, "--record", "--note")
    arguments = parser.parse_args(argv)
    check_writable("--record", arguments.record, appended=True)
    folder, ffmpeg = arguments.folder.resolve(), find_ffmpeg(arguments.ffmpeg)
    cases = [case for case in load_corpus(folder) if arguments.only in case.file]
    import_decoders()
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        outcomes = list(pool.map(partial(examine, folder, ffmpeg), cases))
        refused = [o.case.file for o in outcomes if o.result == "refused" and (o.case.whole or "re-encode" in o.reason)]
        cured = dict(zip(refused, pool.map(partial(cure, folder, ffmpeg), refused), strict=True))
    for outcome in outcomes:
        if arguments.all or outcome.result not in RIGHT or (outcome.case.whole and outcome.result != "read"):
            print(f"{outcome.result:8} {outcome.case.file!r}: {outcome.reason or outcome.difference}")
    for file, problem in cured.items():
        if problem:
            print(f"encoded anew, {file!r} is not read: {problem}")
    figures = summary(outcomes, cured)
    print(f"\n{table(outcomes)}\n")
    print(json.dumps({key: value for key, value in figures.items() if key not in ("kinds", "not_right", "whole_refused")}))
    if arguments.record:
        append_result(arguments.record, {**figures, "note": arguments.note})
    return 0 if all(outcome.result in RIGHT for outcome in outcomes) else 1


def import_decoders() -> None:
    """Import what the children need before they are forked."""
    for name in ("av", "PIL.Image", "decord"):
        if importlib.util.find_spec(name.split(".")[0]):
            importlib.import_module(name)


if __name__ == "__main__":
    raise SystemExit(run_main(main))
