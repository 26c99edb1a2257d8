"""`make gpu` is one call of at most eight minutes whose parts go on after a failure."""

import re
import subprocess
from pathlib import Path

import pytest

from promag.scripts.benchmarks import speed

ROOT = Path(__file__).resolve().parents[2]


def planned(*variables):
    return subprocess.run(["make", "-n", "gpu", *variables], cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(("variables", "minutes"), [((), 8), (("DEVICE=cpu", "MINUTES=1"), 4)])
def test_its_parts_end_in_time(variables, minutes):
    text = planned(*variables)
    # Interrupted tests still print what failed.
    pattern = r"(?:--signal=INT --kill-after=(\d+) )?(?:\$\(\( (\d+) \* 60 \+ (\d+) \)\)|(\d+))"
    limits = [re.match(pattern, part) for part in text.split("timeout ")[1:]]
    seconds = [int(m[1] or 0) + (int(m[4]) if m[4] else 60 * int(m[2]) + int(m[3])) for m in limits]
    assert len(seconds) == 2
    assert sum(seconds) + 30 <= 60 * minutes  # the wheels are unpacked before


def test_its_settings_are_those_of_the_benchmark():
    for variables, device in (((), "cuda"), (("DEVICE=cpu",), "cpu")):
        text = planned(*variables, "COMMIT=abc", "OUT=folder").replace("\\\n", " ")
        words = re.search(r"promag benchmark speed (.*) \|\|", text)[1].replace('"', "").split()
        arguments = speed._parser().parse_args(words)
        assert (arguments.device, arguments.commit, str(arguments.record)) == (device, "abc", "folder/speed.jsonl")
        assert arguments.suites == list(speed.SUITES)
        on_gpu = device == "cuda"
        assert (arguments.quick, arguments.compile, arguments.graphs) == (not on_gpu, on_gpu, on_gpu)
