import io
import re
import sys

import pytest

from promag.training import progress
from promag.training.progress import ProgressBar


class Clock:
    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_log_file_gets_occasional_lines_and_a_last_one(clock, capsys):
    bar = ProgressBar(desc="4x", unit="step", total=400, initial=100)
    for _ in range(200):
        clock.now += 0.5
        bar.set_postfix({"loss": "0.25"})
        bar.update()
        bar.refresh()
    bar.write("4x step 300: psnr 20", sys.stderr)
    bar.close()
    bar.close()
    *lines, note, last = capsys.readouterr().err.splitlines()
    assert note == "4x step 300: psnr 20"
    assert [re.match(r"4x: (\d+)/400 steps in [\d:]+, [\d:?]+ to go, loss=0.25$", line)[1] for line in lines] == [
        "159",
        "219",
        "279",
    ]
    assert last.startswith("4x: 300/400 steps in ")


def test_progress_iterates_and_can_be_switched_off(clock, capsys):
    assert list(ProgressBar(range(3), desc="caching", unit="shard")) == [0, 1, 2]
    assert re.fullmatch(r"caching: 3/3 shards in [\d:]+, [\d:]+ to go\n", capsys.readouterr().err)
    assert list(ProgressBar(range(3), desc="caching", unit="shard", disable=True)) == [0, 1, 2]
    ProgressBar(desc="nothing", unit="step", total=3).close()
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_the_bar(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with ProgressBar(desc="4x", unit="step", total=2) as bar:
        bar.update(2)
    assert "4x: 100%|" in terminal.getvalue().split("\r")[-1]
