"""Every sample of an epoch once over all ranks; any step without those before it; shards from front to back."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from promag.data.epochs import EpochPlan, ShardOrder
from promag.training.config import UserError

plans = (
    st.integers(1, 3)
    .flatmap(
        lambda buckets: st.tuples(
            st.lists(st.integers(0, 60), min_size=buckets, max_size=buckets),
            st.lists(st.integers(1, 4), min_size=buckets, max_size=buckets),
            st.integers(1, 4),
            st.integers(1, 5),
            st.integers(0, 2**32),
        )
    )
    .filter(lambda plan: any(n >= b * plan[2] for n, b in zip(plan[0], plan[1], strict=True)))
)


@given(plans, st.integers(0, 3))
def test_an_epoch_is_every_full_batch_once_over_all_ranks(plan, epoch):
    samples, sizes, world, lanes, seed = plan
    found = EpochPlan(samples, sizes, world, lanes, seed)
    steps = sum(found.steps)
    taken = Counter()
    for step in range(epoch * steps, (epoch + 1) * steps):
        batches = [found.batch(step, rank) for rank in range(world)]
        assert {(b.bucket, b.epoch, b.lane) for b in batches} == {(batches[0].bucket, epoch, step % lanes)}  # equal work
        taken.update((b.bucket, b.number) for b in batches)
    assert set(taken.values()) == {1}
    for bucket, (count, size) in enumerate(zip(samples, sizes, strict=True)):
        numbers = {number for b, number in taken if b == bucket}
        assert numbers == set(range(count // (size * world) * world))
        assert count - len(numbers) * size < size * world  # less than one step is left out


@given(plans)
def test_a_lane_takes_a_contiguous_run(plan):
    samples, sizes, world, lanes, seed = plan
    found = EpochPlan(samples, sizes, world, lanes, seed)
    for rank in range(world):
        runs = {}
        for step in range(sum(found.steps)):
            batch = found.batch(step, rank)
            run = runs.setdefault((batch.bucket, batch.lane), [batch.number])
            assert batch.number in (run[-1], run[-1] + 1)
            run.append(batch.number)


@given(plans, st.integers(0, 200))
def test_a_step_does_not_depend_on_what_was_asked_before(plan, step):
    asked = EpochPlan(*plan)
    for earlier in range(step):
        asked.batch(earlier, 0)
    assert asked.batch(step, 0) == EpochPlan(*plan).batch(step, 0)


def test_buckets_come_in_an_order_that_seed_and_epoch_decide():
    def order(seed, epoch):
        plan = EpochPlan([30, 30], [1, 1], 1, 2, seed)
        return tuple(plan.batch(step, 0).bucket for step in range(60 * epoch, 60 * (epoch + 1)))

    assert len({order(0, 0), order(0, 1), order(1, 0)}) == 3
    assert order(0, 0) == order(0, 0)
    assert Counter(order(3, 7)) == {0: 30, 1: 30}


def test_too_few_samples_for_a_step_are_named():
    with pytest.raises(UserError, match=r"\[7, 3\] samples in batches of \[4, 2\] on 2 ranks: no bucket fills a step"):
        EpochPlan([7, 3], [4, 2], 2, 1, 0)
    assert EpochPlan([8, 3], [4, 2], 2, 1, 0).steps == [1, 0]


shards = st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(any)


@given(shards, st.integers(1, 25), st.integers(0, 2**32), st.integers(0, 5))
def test_an_order_holds_each_sample_once_a_block_at_a_time(counts, block, seed, epoch):
    order = ShardOrder(np.array(counts), block, seed, bucket=0)
    places = [order.locate(epoch, position) for position in range(sum(counts))]
    assert sorted(places) == [(shard, place) for shard, count in enumerate(counts) for place in range(count)]
    runs = [(shard, place // block) for shard, place in places]
    changes = [run for run, before in zip(runs, [None, *runs], strict=False) if run != before]
    assert len(changes) == len(set(changes))  # no block is come back to
    for shard in range(len(counts)):
        blocks = [b for s, b in changes if s == shard]
        assert blocks == sorted(blocks)  # front to back


def test_shards_and_samples_are_shuffled_anew_in_each_epoch():
    def order(seed, epoch, bucket):
        found = ShardOrder(np.full(8, 16), 8, seed, bucket)
        return [found.locate(epoch, position) for position in range(128)]

    drawn = [order(0, 0, 0), order(0, 1, 0), order(1, 0, 0), order(0, 0, 1)]
    assert len({tuple(shard for shard, _ in o) for o in drawn}) == 4
    assert len({tuple(place for _, place in o) for o in drawn}) == 4
    assert [place for _, place in drawn[0][:8]] != list(range(8))
    assert ShardOrder(np.full(8, 16), 1, 0, 0).locate(0, 3)[1] == 3  # blocks of one are not permuted
