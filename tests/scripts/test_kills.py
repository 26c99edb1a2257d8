"""The short version of the kills: SIGKILL before changes of files and at random moments, in processes of their own."""

import json
import subprocess
import sys

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
    (tmp_path / "driver.py").write_text(DRIVER)
    words = ["--rounds", "8", "--processes", "1", "--targets", "tokenizer", "shards", "--record", "record.jsonl"]
    words[-1] = str(tmp_path / "record.jsonl")
    run = subprocess.run([sys.executable, tmp_path / "driver.py", *words], capture_output=True, text=True, check=False)
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
