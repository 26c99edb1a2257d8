"""The short version of the kills: SIGKILL before changes of files and at random moments, in processes of their own."""

import json

from tests.processes import run_python

# The first case appends blindly, so a restart doubles its output and the test must detect it; the others are real commands.
DRIVER = """
import sys
from promag.scripts.reliability import kills
from promag.scripts.reliability.kill_targets import Target

def append(folder, inputs):
    for line in ("one", "two"):
        with open(folder / "lines.txt", "a") as file:
            file.write(line)

real, kills.TARGETS = kills.TARGETS, {"append": Target(append)}
assert kills.main(["--rounds", "8"]) == 1
kills.TARGETS = real
raise SystemExit(kills.main(sys.argv[1:]))
"""


def test_restarted_runs_equal_runs_without_kills(tmp_path):
    words = ["--rounds", "8", "--processes", "1", "--targets", "tokenizer", "shards", "--record", "record.jsonl"]
    words[-1] = str(tmp_path / "record.jsonl")
    run = run_python(DRIVER, *words)
    assert run.returncode == 0, run.stderr[-3000:]
    assert (
        "Kill(target='append', processes=1, rank=0, change=1, torn=False, moments=()): missing [], not expected [], different"
        in run.stderr
    )
    line = json.loads((tmp_path / "record.jsonl").read_text())
    assert line["equal"] == line["kills"] > 2  # a kill before a change always hits; at a random moment it may come too late
    by_target = {work["target"]: work for work in line["works"]}
    assert by_target["tokenizer"]["changes_to_kill_before"] > 100
    assert by_target["shards"]["changes_to_kill_before"] > 30


OTHER_ENDS = """
import random, sys, time
from pathlib import Path
import safetensors.numpy, safetensors.torch
from promag.scripts.reliability import kills
from promag.scripts.reliability.kill_targets import Target

def crash(folder, inputs):
    # The first restart fails, the second makes up for it.
    crashes = (folder / "begun").exists() and not (folder / "crashed").exists()
    (folder / "crashed" if crashes else folder / "begun").touch()
    if crashes:
        raise RuntimeError("broken")
    time.sleep(0.4)
    for name in ("begun", "crashed"):
        (folder / name).unlink(missing_ok=True)

def early(folder, inputs):
    # Only the first call takes a time, and each leaves another file.
    calls = len(list(inputs.glob("early-*")))
    (inputs / f"early-{calls}").touch()
    (folder / "calls.txt").write_text(str(calls))
    time.sleep(0 if calls else 1)

def hang(folder, inputs):
    calls = len(list(inputs.glob("hang-*")))
    (inputs / f"hang-{calls}").touch()
    time.sleep(60 if calls == 1 else 0)

def write(folder, inputs):
    if (folder / "a").exists():
        (inputs / "size").write_text(str((folder / "a").stat().st_size))
    for name in "ab":
        (folder / name).write_text("word")

kills.TARGETS = {"crash": Target(crash), "early": Target(early), "hang": Target(hang), "write": Target(write)}
killing = kills.Killing(Path(sys.argv[1]), random.Random(0))
killing.plan(list(kills.TARGETS), [1])
killing._kill(kills.Kill("crash", 1, 0, moments=(0.7, 0.7, 0.7)))
killing._kill(kills.Kill("early", 1, 0, moments=(0.9,)))
killing._kill(kills.Kill("write", 1, 0, change=1, torn=True))
assert (killing.inputs / "size").read_text() == "2"  # half a word
kills.LIMIT = 0.5
killing._kill(kills.Kill("hang", 1, 0, change=99))
figures = killing.figures()
assert (figures["kills"], figures["equal"], figures["failed"]) == (2, 1, 3), figures
assert [work["failed"] for work in figures["works"]] == [1, 1, 1, 0]
"""


def test_work_that_ends_otherwise_than_by_the_kill_is_a_failure(tmp_path):
    (tmp_path / "place").mkdir()
    run = run_python(OTHER_ENDS, tmp_path / "place")
    assert run.returncode == 0, run.stderr[-3000:]
    assert "moments=(0.7, 0.7, 0.7)): statuses [1] after 1 kills" in run.stderr
    assert "moments=(0.9,)): missing [], not expected [], different ['calls.txt']" in run.stderr
    assert "change=99, torn=False, moments=()): statuses ['hung'] after 0 kills" in run.stderr
