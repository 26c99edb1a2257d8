import time

import torch

from promag.training.throughput import SIDE, Meter, matmul_tflops


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


def test_a_metric_is_averaged_over_the_steps_that_have_it():
    meter = Meter(1, "cpu", bf16=False, peak_tflops=1.0)
    meter.start()
    for step in range(4):
        meter.add({"loss": torch.tensor(float(step)), **({"generator": torch.tensor(6.0 + step)} if step > 1 else {})})
    record = meter.read()
    assert (record["loss"], record["generator"]) == (1.5, 8.5)
    meter.add({"loss": torch.tensor(3.0)})
    assert meter.read()["loss"] == 3.0
