import time

import pytest
import torch

from promag.training import throughput
from promag.training.throughput import ENOUGH, SIDE, SMALL_SIDE, Meter, fastest, matmul_tflops


def test_the_measured_peak_is_that_of_a_matrix_product():
    a = torch.randn(SIDE, SIDE)
    a @ a
    times = []
    for _ in range(5):
        started = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - started)
    here = 2 * SIDE**3 / min(times) / 1e12
    assert here / 4 < matmul_tflops("cpu", bf16=False) < here * 4  # other work may run beside either


def test_slow_products_are_measured_on_small_matrices_alone(monkeypatch):
    """A CPU that emulates bfloat16 multiplies at a fiftieth of the speed of float32."""
    for seconds, side in ((0.2, SMALL_SIDE), (0.004, SIDE)):
        monkeypatch.setattr(throughput, "fastest", lambda call, seconds=seconds: seconds)
        assert matmul_tflops("cpu", bf16=False) == pytest.approx(2 * side**3 / seconds / 1e12)


@pytest.mark.parametrize(
    ("seconds", "calls", "best"), [([3, 1, 1], 1, 3), ([0.5, 0.4, 0.3, 0.2], 4, 0.2), ([1, 0.5, 0.75, 1], 3, 0.5)]
)
def test_the_fastest_of_some_rounds_counts_until_enough_time_has_passed(monkeypatch, seconds, calls, best):
    now, given = [0.0], list(seconds)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])

    def call():
        now[0] += given.pop(0)

    assert ENOUGH == 2
    assert fastest(call, rounds=3) == pytest.approx(best)
    assert len(seconds) - len(given) == calls


def test_a_metric_is_averaged_over_the_steps_that_have_it():
    meter = Meter(1, "cpu", bf16=False, peak_tflops=1.0)
    meter.start()
    for step in range(4):
        figures = {"loss": torch.tensor(float(step)), **({"generator": torch.tensor(6.0 + step)} if step > 1 else {})}
        meter.add(figures, torch.tensor(0.0))
    record = meter.read()
    assert (record["loss"], record["generator"]) == (1.5, 8.5)
    meter.add({"loss": torch.tensor(3.0)}, torch.tensor(0.0))
    assert meter.read()["loss"] == 3.0


def test_metrics_of_skipped_steps_are_left_out():
    meter = Meter(1, "cpu", bf16=False, peak_tflops=1.0)
    meter.start()
    for step, value in enumerate((2.0, float("nan"), 4.0, float("inf"))):
        loss = torch.tensor(value)
        meter.add({"loss": loss, **({"generator": loss} if step % 2 else {})}, torch.tensor(step % 2.0))
    record = meter.read()
    assert record["loss"] == 3.0
    assert "generator" not in record
