from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promag.evaluation.speed.scale import (
    Cluster,
    Model,
    Speed,
    clips_per_second,
    ddp_step,
    fsdp2_step,
    models_of,
    sent_bytes,
)
from promag.evaluation.speed.subjects import diffusion_preset

SPEED = Speed(peak=1e15, mfu=0.4)
MODEL = Model(
    in_blocks=10**9,
    outside=10**8,
    matrices=9 * 10**8,
    count=200,
    muon_flops=1e13,
    clip_flops=4e13,
    clips=4,
    recomputes=True,
)
STEPS = {"ddp": ddp_step, "fsdp2": fsdp2_step}
counts = st.integers(0, 9).map(lambda power: 2**power)
bandwidths = st.floats(1e9, 1e13)


@given(counts, bandwidths, bandwidths, st.sampled_from(sorted(STEPS)))
def test_more_gpus_give_more_clips_but_never_more_for_each(gpus, within, between, kind):
    one, some, more = (Cluster(n, within=within, between=min(within, between)) for n in (1, gpus, 2 * gpus))
    for bound in ("fastest", "slowest"):
        seconds = [getattr(STEPS[kind](MODEL, SPEED, cluster), bound) for cluster in (some, more)]
        if kind == "ddp":  # every GPU does all of the update, so that only communication is added
            assert seconds[1] >= seconds[0] >= getattr(ddp_step(MODEL, SPEED, one), bound) * (1 - 1e-12)
            each = clips_per_second(MODEL, seconds[0], some) / some.gpus
            assert each <= clips_per_second(MODEL, getattr(ddp_step(MODEL, SPEED, one), bound), one) * (1 + 1e-12)
        assert STEPS[kind](MODEL, SPEED, some).fastest <= STEPS[kind](MODEL, SPEED, some).slowest


@given(counts, bandwidths, bandwidths, st.floats(1.0, 100.0), st.sampled_from(sorted(STEPS)))
def test_faster_links_never_slow_a_step(gpus, within, between, factor, kind):
    slow = Cluster(gpus, within=within, between=between)
    for fast in (replace(slow, within=factor * within), replace(slow, between=factor * between)):
        assert STEPS[kind](MODEL, SPEED, fast).slowest <= STEPS[kind](MODEL, SPEED, slow).slowest * (1 + 1e-12)


@pytest.mark.parametrize("gpus", [8, 64, 512])
def test_with_links_without_limit_clips_grow_with_the_gpus(gpus):
    cluster = Cluster(gpus, within=1e30, between=1e30)
    alone = ddp_step(MODEL, SPEED, Cluster(1))
    step = ddp_step(MODEL, SPEED, cluster)
    assert step.slowest == pytest.approx(alone.slowest)
    assert clips_per_second(MODEL, step.fastest, cluster) == pytest.approx(
        gpus * clips_per_second(MODEL, alone.fastest, Cluster(1))
    )
    sharded = fsdp2_step(MODEL, SPEED, cluster)
    assert sharded.hidden == pytest.approx(0)
    assert sharded.update < alone.update / min(gpus, MODEL.count) * 1.5  # divided among the GPUs


def test_one_gpu_sends_nothing():
    for sharded, step in ((False, ddp_step), (True, fsdp2_step)):
        parts = step(MODEL, SPEED, Cluster(1))
        assert (parts.hidden, parts.exposed) == (0, 0)
        assert sent_bytes(MODEL, Cluster(1), sharded) == 0
    assert ddp_step(MODEL, SPEED, Cluster(1)) == fsdp2_step(MODEL, SPEED, Cluster(1))


def test_a_step_by_hand():
    node = Cluster(8, within=1e11, between=1e10)
    assert node.gather_seconds(8e9) == pytest.approx(0.07)  # 7 of 8 parts of 1 GB at 100 GB/s
    assert node.reduce_seconds(8e9) == pytest.approx(0.14)
    two = Cluster(16, within=1e11, between=1e10)
    assert two.gather_seconds(8e9) == pytest.approx(0.07 + 0.05)  # and half of 1 GB at 10 GB/s
    assert two.scatter_seconds(16e9) == pytest.approx(7e9 / 1e11 + 8e9 / 1e10)
    step = ddp_step(MODEL, SPEED, node)
    assert step.compute == pytest.approx(4 / 3 * 4 * 4e13 / 4e14)
    assert step.hidden == pytest.approx(2 * 4 * 1.1e9 * 7 / 8 / 1e11)
    assert step.update == pytest.approx(1e13 / 5e14 + 40 * 1.1e9 / 2.7e12)
    sharded = fsdp2_step(MODEL, SPEED, node)
    assert sharded.hidden == pytest.approx((2 * (2e9 + 4e8) + 4.4e9) * 7 / 8 / 1e11)
    assert sharded.exposed == pytest.approx(1.8e9 * 7 / 8 / 1e11 + 3.6e9 * 7 / 8 / 1e11)
    assert sharded.update == pytest.approx(25 / 200 * 1e13 / 5e14 + 40 * 1.1e9 / 8 / 2.7e12)
    assert sent_bytes(MODEL, node, sharded=False) == pytest.approx(7 / 8 * 8.8e9)
    assert sent_bytes(MODEL, node, sharded=True) == pytest.approx(7 / 8 * (4.8e9 + 4.4e9 + 1.8e9 + 0.45e9))


@given(counts, bandwidths, bandwidths)
def test_a_collective_is_bounded_whatever_the_number_of_gpus(gpus, within, between):
    cluster = Cluster(gpus, within=within, between=between)
    assert cluster.gather_seconds(1.0) <= 1 / within + 1 / (cluster.local * between)


def test_the_papers_transformer_is_counted():
    config = diffusion_preset("paper/diffusion")
    low, high = models_of(config, [(4, 4), (16, 4)])
    assert round(low.weights / 1e9, 2) == 1.57
    assert low.recomputes
    assert low.weights == high.weights
    assert low.matrices < low.in_blocks
    assert 3.4 < low.clip_flops / high.clip_flops < 4.2  # tokens are 3.4 times as many, and attention grows with their square
