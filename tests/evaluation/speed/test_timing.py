import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from promag.evaluation.speed.timing import free_bytes, measure_in_turns, operator_seconds, peak_bytes


def test_peak_memory_is_the_largest_that_was_alive_at_once():
    def call():
        a = torch.ones(1000, 1000)  # 4 MB
        b = a + 1  # 8 MB
        del a
        return b * 2  # again 8 MB

    if not torch.cuda.is_available():
        assert peak_bytes(call) == pytest.approx(8e6, rel=0.01)


@pytest.mark.skipif(torch.cuda.is_available() or sys.platform != "linux", reason="reads what Linux states of its memory")
def test_caches_of_files_count_as_free_memory():
    (line,) = (line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:"))
    assert free_bytes() == pytest.approx(1024 * int(line.split()[1]), rel=0.1)


def test_operators_have_their_seconds_by_kind():
    x, kernel, matrix = torch.ones(1, 32, 8, 64, 64), torch.ones(32, 32, 3, 3, 3), torch.ones(64, 64)

    def call():
        torch.nn.functional.conv3d(x, kernel, padding=1)
        return matrix @ matrix

    call()
    started = time.perf_counter()
    seconds = operator_seconds(call, torch.device("cpu"))
    assert list(seconds) == ["convolutions", "products", "copies", "others"]
    assert 0 < sum(seconds.values()) < time.perf_counter() - started
    assert seconds["convolutions"] > seconds["products"] > 0  # 3,500 times the arithmetic
    assert operator_seconds(lambda: x.clone(), torch.device("cpu"))["copies"] > 0
    assert sum(operator_seconds(lambda: None, torch.device("cpu")).values()) == 0


def test_calls_are_timed_in_turns_after_a_warm_up_and_give_the_median():
    now, order = [0.0], []

    def call(name, seconds):
        def run():
            order.append(name)
            now[0] += next(seconds)

        return run

    calls = {"a": call("a", iter((9, 1, 5, 2))), "b": call("b", iter((9, 4, 4, 7)))}
    assert measure_in_turns(calls, 3, lambda: now[0]) == {"a": 2, "b": 4}
    assert order == ["a", "b"] * 4
    calls = {"a": call("a", iter((9, 1, 5, 2)))}
    assert measure_in_turns(calls, 3, lambda: np.array([now[0], 10 * now[0]]))["a"].tolist() == [2, 20]
