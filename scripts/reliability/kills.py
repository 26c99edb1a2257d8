"""Kill trainings, caching and publishing before every change of a file and at random moments, and compare what restarts leave.

python -m promag.scripts.reliability.kills --rounds 400 --record docs/results/reliability.jsonl

Work is forked from one process that has imported everything. A kill is SIGKILL: before the n-th change of a file, for every n,
once with the file before it whole and once with half of it written; or after a random time, up to three times in a row. Then
the work is started again and must leave the files of work that was not killed, byte for byte, and no others. Where
several processes work, one is killed and the others are ended, as launchers do. Work that ends with another status than 0, or
takes longer than LIMIT, counts as failed.
"""

import contextlib
import gc
import importlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from promag.scripts._options import check_writable, share
from promag.training.command_line import Parser, run_main
from promag.training.fsdp import leave_process_group
from promag.training.run import append_result

from .kill_targets import TARGETS, result_of

LIMIT = 120.0  # seconds that work may take, before it counts as hanging
# Statuses of processes that were ended here, but for the intended kills.
HUNG, ENDED = "hung", "ended after another"
IMPORTED = ("promag", "torch", "diffusers", "transformers", "accelerate", "safetensors", "tokenizers", "peft", "webdataset")


def main(argv: Sequence[str]) -> int:
    """Print the figures; with --record append them as a JSON line. The exit status is 1 where a round failed.

    A round fails where a restart left other files, or work ended otherwise than by itself or by the intended kill.
    """
    parser = Parser(__doc__)
    parser.add_argument("--rounds", type=int, default=400, help="how often work is killed, started again and compared")
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS), help="work to kill")
    parser.add_argument("--processes", type=int, nargs="+", choices=(1, 2), default=[1, 2], help="numbers of processes")
    parser.add_argument("--seed", type=int, default=0, help="decides the order of kills and the random moments")
    share(parser, "--record", "--note")
    arguments = parser.parse_args(argv)
    check_writable("--record", arguments.record, appended=True)
    os.environ |= {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        killing = Killing(Path(place), random.Random(arguments.seed))
        killing.plan(arguments.targets, arguments.processes)
        killing.carry_out(arguments.rounds)
        figures = killing.figures() | {"seconds": round(time.perf_counter() - started), "seed": arguments.seed}
    print(json.dumps(figures))
    if arguments.record:
        append_result(arguments.record, {"what": "kills", **figures, "note": arguments.note})
    return 1 if figures["failed"] else 0


@dataclass(frozen=True)
class Kill:
    """A kill of one process of `processes`: before its n-th change of a file, or at moments, as shares of the work's time."""

    target: str
    processes: int
    rank: int
    change: int | None = None
    torn: bool = False
    moments: tuple[float, ...] = ()


class Killing:
    """All kills of a call, and what they left.

    Args:
        folder: an empty folder.
        random: decides order and moments.
    """

    def __init__(self, folder: Path, random: random.Random):
        self.folder, self.random = folder, random
        self.inputs, self.log = folder / "inputs", folder / "log.txt"
        self.inputs.mkdir()
        self.kills: list[Kill] = []
        self.expected: dict[tuple[str, int], dict[str, Any]] = {}
        self.seconds: dict[tuple[str, int], float] = {}
        self.changes: Counter[tuple[str, int]] = Counter()
        self.done: Counter[tuple[str, int, str]] = Counter()
        self.equal: Counter[tuple[str, int]] = Counter()
        self.failed: Counter[tuple[str, int]] = Counter()

    def plan(self, targets: Sequence[str], processes: Sequence[int]) -> None:
        """Make the inputs, do each target's work once, and list the kills before every change of a file that it makes."""
        for make in dict.fromkeys(make for target in targets for make in TARGETS[target].make_inputs):
            self._import_what_is_imported_by(lambda make=make: make(self.inputs))
        for target in targets:
            for number in set(processes) & set(TARGETS[target].processes):
                place, started = self._new_folder(), time.perf_counter()
                counts = self._start(target, number, place, None)
                self.seconds[target, number] = time.perf_counter() - started
                if any(code for code, _ in counts):
                    raise RuntimeError(self.log.read_text(encoding="utf-8"))
                self.expected[target, number] = result_of(place)
                for rank, (_, wrote) in enumerate(counts):
                    kills = [Kill(target, number, rank, n) for n in range(len(wrote))]
                    kills += [Kill(target, number, rank, n + 1, torn=True) for n in range(len(wrote) - 1) if wrote[n]]
                    self.kills += kills
                    self.changes[target, number] += len(kills)
        self.random.shuffle(self.kills)

    def _import_what_is_imported_by(self, work: Callable[[], Any]) -> None:
        """Do work in a child, and import here, for all later children, the modules that it imported."""
        ((code, modules),) = _wait([_Child(lambda: (work(), _imported())[1], self.log)], None)
        if code:
            raise RuntimeError(self.log.read_text(encoding="utf-8"))
        for name in modules:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        gc.freeze()

    def carry_out(self, rounds: int) -> None:
        """Kill so often: in three of four rounds before a change of a file, else and at last at random moments."""
        works = list(self.expected)
        for _ in range(rounds):
            if self.kills and self.random.random() < 0.75:
                self._kill(self.kills.pop())
            else:
                target, number = self.random.choice(works)
                moments = self.random.random(), self.random.random(), self.random.random()
                self._kill(Kill(target, number, self.random.randrange(number), moments=moments))

    def _kill(self, kill: Kill) -> None:
        work, killed = (kill.target, kill.processes), 0
        place, failure = self._new_folder(), ""
        for moment in kill.moments or (None,):
            statuses = [status for status, _ in self._start(*work, place, kill, moment)]
            if statuses[kill.rank] != -signal.SIGKILL:
                # Statuses of 0: it came to its end before the kill.
                failure = f"statuses {statuses} after {killed} kills" if any(statuses) else ""
                break
            killed += 1
        if not failure:
            statuses = [status for status, _ in self._start(*work, place, None)]
            left = result_of(place)
            if any(statuses):
                failure = f"statuses {statuses} of the last restart"
            elif left != self.expected[work]:
                failure = _differences(left, self.expected[work])
        self.done[(*work, "random" if kill.change is None else "changes")] += killed
        if failure:
            self.failed[work] += 1
            print(f"{kill}: {failure}\n{self.log.read_text(encoding='utf-8')[-3000:]}", file=sys.stderr, flush=True)
        else:
            self.equal[work] += killed

    def _start(
        self, target: str, number: int, place: Path, kill: Kill | None, moment: float | None = None
    ) -> list[tuple[int | str, Any]]:
        """Do the work on `number` processes until it ends or is killed; return their statuses and changes of files."""
        run, after = TARGETS[target].run, None if moment is None else moment * self.seconds[target, number]
        self.log.write_text("", encoding="utf-8")
        children = []
        port = _free_port()
        for rank in range(number):
            change = kill.change if kill and kill.rank == rank else None
            children.append(_Child(self._work(run, place, change, bool(kill and kill.torn), rank, number, port), self.log))
        return _wait(children, None if after is None else (kill.rank if kill else 0, after))

    def _work(
        self, run: Callable[[Path, Path], Any], place: Path, change: int | None, torn: bool, rank: int, number: int, port: int
    ) -> Callable[[], list[bool]]:
        def work() -> list[bool]:
            if number > 1:
                ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
                os.environ |= {key: str(value) for key, value in ranks.items()}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            changes = Changes(place, change, torn)
            run(place, self.inputs)
            return changes.wrote

        return work

    def _new_folder(self) -> Path:
        place = self.folder / "work"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        return place

    def figures(self) -> dict[str, Any]:
        """Return how many kills there were, how many left the same files, and how many rounds failed, in all and by work."""
        works = [
            {
                "target": target,
                "processes": number,
                "kills": {kind: self.done[target, number, kind] for kind in ("changes", "random")},
                "changes_to_kill_before": self.changes[target, number],
                "equal": self.equal[target, number],
                "failed": self.failed[target, number],
            }
            for target, number in self.expected
        ]
        totals = {"kills": self.done.total(), "equal": self.equal.total(), "failed": self.failed.total()}
        return {**totals, "works": works}


class Changes:
    """Lists the changes of files below a folder in this process, from now on, and kills it before the n-th.

    Args:
        folder: where changes count.
        kill_before: number of the change, from 0, to kill the process before; None only lists.
        torn: cut what the change before it wrote in half first.
    """

    EVENTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink")

    def __init__(self, folder: Path, kill_before: int | None = None, torn: bool = False):
        import safetensors.numpy
        import safetensors.torch

        self.folder, self.kill_before, self.torn = str(folder), kill_before, torn
        self.wrote: list[bool] = []  # for each change whether it opened a file to write to
        self.written: tuple[str, int] | None = None  # the file that the last change wrote to, and its size before that
        for module in (safetensors.torch, safetensors.numpy):  # their files are written without Python's knowledge
            module.serialize_file = self._noted(module.serialize_file)  # pyright: ignore[reportAttributeAccessIssue]
        sys.addaudithook(self)

    def _noted(self, serialize: Callable[..., None]) -> Callable[..., None]:
        def noted(tensors: Any, path: Any, *rest: Any, **options: Any) -> None:
            if str(path).startswith(self.folder):
                self._change(str(path), 0)
            serialize(tensors, path, *rest, **options)

        return noted

    def __call__(self, event: str, arguments: tuple) -> None:
        """Note a change; called by Python before it is made."""
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & 0o3 and self._inside(arguments[0]):
            path = os.fsdecode(arguments[0])
            kept = not arguments[2] & os.O_TRUNC and os.path.exists(path)
            self._change(path, os.path.getsize(path) if kept else 0)
        elif event in self.EVENTS:
            relative = event in ("os.remove", "os.rmdir") and arguments[1] != -1  # to a folder that is being removed
            if relative or self._inside(arguments[0]):
                self._change(None, 0)

    def _inside(self, path: Any) -> bool:
        return isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).startswith(self.folder)

    def _change(self, path: str | None, size: int) -> None:
        if len(self.wrote) == self.kill_before:
            self.kill_before = None  # the cut below is a change too
            if self.torn and self.written and os.path.exists(self.written[0]):
                before, after = self.written[1], os.path.getsize(self.written[0])
                os.truncate(self.written[0], before + max(0, after - before) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        self.wrote.append(path is not None)
        self.written = (path, size) if path else None


class _Child:
    """A forked process that calls `work`, whose result is `result()`; its output goes to a log."""

    def __init__(self, work: Callable[[], Any], log: Path):
        self.file = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            return
        status = 1
        try:
            output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.dup2(output, 1)
            os.dup2(output, 2)
            json.dump(work(), self.file)
            self.file.flush()
            leave_process_group()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def result(self) -> Any:
        """Return what `work` returned; None where it did not end."""
        with self.file as file:
            file.seek(0)
            text = file.read()
        return json.loads(text) if text else None


def _wait(children: Sequence[_Child], kill: tuple[int, float] | None) -> list[tuple[int | str, Any]]:
    """Wait for all; kill one after a time; once one died, end the others. Return statuses and results.

    A status is the exit code, or HUNG or ENDED for a process that died after it was ended for that reason.
    """
    now, before, ending, codes = 0.0, time.perf_counter(), 0.0, {}
    ended: dict[int, str] = {}
    while len(codes) < len(children):
        for rank, child in enumerate(children):
            if rank not in codes:
                pid, status = os.waitpid(child.pid, os.WNOHANG)
                if pid:
                    codes[rank] = os.waitstatus_to_exitcode(status)
        passed = time.perf_counter() - before
        now, before = now + min(passed, 0.1), before + passed  # time in which this process is stopped does not count
        left = [rank for rank in range(len(children)) if rank not in codes]
        if kill and now > kill[1] and kill[0] in left:
            os.kill(children[kill[0]].pid, signal.SIGKILL)
            kill = None
        if left and any(codes.values()) and not ending:
            ending = now
            for rank in left:
                ended[rank] = ENDED
                os.kill(children[rank].pid, signal.SIGTERM)
        if (ending and now > ending + 0.3) or now > LIMIT:
            for rank in left:
                ended.setdefault(rank, HUNG)
                os.kill(children[rank].pid, signal.SIGKILL)
        time.sleep(0.005)
    return [((codes[rank] and ended.get(rank)) or codes[rank], child.result()) for rank, child in enumerate(children)]


def _imported() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] in IMPORTED and "__" not in name]


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _differences(left: dict[str, Any], expected: dict[str, Any]) -> str:
    missing, more = expected.keys() - left.keys(), left.keys() - expected.keys()
    other = [name for name in expected.keys() & left.keys() if left[name] != expected[name]]
    return f"missing {sorted(missing)}, not expected {sorted(more)}, different {sorted(other)}"


if __name__ == "__main__":
    raise SystemExit(run_main(main))
