"""Python code in new processes, forked from one that has imported the project: an import takes seconds, a fork milliseconds."""

import gc
import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

# What DataLoader and Process start processes by.
context: Any = multiprocessing.get_context("forkserver" if sys.platform != "win32" else "spawn")
if sys.platform != "win32":
    context.set_forkserver_preload(
        ["torchmetrics", "promag.cli", "promag.scripts.train_tokenizer", "promag.scripts.train_diffusion"]
    )


@dataclass(frozen=True)
class Ended:
    """Exit status of a process, negative for a signal, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def run_python(code: str, *arguments: str | Path) -> Ended:
    """Run Python code in a new process with `sys.argv[1:]` set to arguments."""
    (ended,) = _run(code, arguments, [{}], None)
    return ended


def run_promag(*arguments: object) -> Ended:
    """Run `promag ARGUMENTS` in a new process."""
    return run_python("import runpy; runpy.run_module('promag', run_name='__main__')", *map(str, arguments))


def run_two_ranks(code: str, *arguments: str | Path, timeout: float = 600) -> None:
    """Run Python code in two processes as torchrun would; raise AssertionError if one fails or takes too long."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [{**shared, "RANK": rank, "LOCAL_RANK": rank, "ACCELERATE_USE_CPU": "true"} for rank in "01"]
    ended = _run(code, arguments, ranks, timeout)
    assert not any(rank.returncode for rank in ended), "\n".join(rank.stderr[-3000:] for rank in ended)


def _run(code: str, arguments: Any, environments: list[dict[str, str]], timeout: float | None) -> list[Ended]:
    with tempfile.TemporaryDirectory() as folder:
        outputs = [(f"{folder}/out-{i}", f"{folder}/errors-{i}") for i in range(len(environments))]
        for path in (path for output in outputs for path in output):
            Path(path).touch()
        processes = [
            context.Process(target=_execute, args=(code, [str(each) for each in arguments], environment, *output))
            for environment, output in zip(environments, outputs, strict=True)
        ]
        for process in processes:
            process.start()
        running = {process.sentinel: process for process in processes}
        while running:
            ended = [running.pop(sentinel) for sentinel in wait(list(running), timeout)]
            for process in ended:
                process.join()
            if not ended or any(process.exitcode for process in ended):
                for process in running.values():
                    process.kill()  # it waits for the one that failed
        texts = [[Path(path).read_text(encoding="utf-8", errors="replace") for path in output] for output in outputs]
        return [Ended(process.exitcode, *text) for process, text in zip(processes, texts, strict=True)]


def _execute(code: str, arguments: list[str], environment: Mapping[str, str], *outputs: str) -> None:
    gc.freeze()  # what imports made need not be looked through again
    os.environ.update(environment)
    for descriptor, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY), descriptor)
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<test>", "exec"), {"__name__": "__main__"})
