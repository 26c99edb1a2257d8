import time

import torch

from promag.training.throughput import SIDE, matmul_tflops


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
