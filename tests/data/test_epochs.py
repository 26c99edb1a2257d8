"""Each sample comes once an epoch over all ranks; any step is computed without earlier ones; shards are read front to back."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from promag.data.epochs import ClipOrder, EpochPlan, Interleaving, ShardOrder, permute
from promag.training.config import UserError

seeds = st.integers(0, 2**40)

# -- clips -----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 400), seeds, st.integers(0, 2**32))
def test_a_permutation_is_one_to_one(count, seed, epoch):
    assert sorted(permute(place, count, seed, epoch) for place in range(count)) == list(range(count))


@given(st.integers(1, 2**60), seeds, st.data())
def test_a_permutation_of_any_size_is_evaluated_at_once(count, seed, data):
    places = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=20, unique=True))
    taken = [permute(place, count, seed) for place in places]
    assert len(set(taken)) == len(places)
    assert all(0 <= place < count for place in taken)


@pytest.mark.parametrize("place", [-1, 3])
def test_places_out_of_range_are_named(place):
    with pytest.raises(ValueError, match=f"place {place}: legal are 0 to 2"):
        permute(place, 3, 0)


def test_all_orders_of_few_clips_are_equally_likely():
    orders = Counter(tuple(permute(place, 4, 7, key) for place in range(4)) for key in range(4800))
    assert len(orders) == 24
    assert sum((n - 200) ** 2 / 200 for n in orders.values()) < 60  # chi square, 23 degrees of freedom: p < 4e-5


@pytest.mark.parametrize("count", [10, 97, 1000])
def test_neighbours_are_separated_as_by_chance(count):
    """The mean distance of neighbours is a third of the range, and clips change their places from epoch to epoch."""
    epochs = [[permute(place, count, 3, epoch) for place in range(count)] for epoch in range(20_000 // count)]
    distances = np.abs(np.diff(np.array(epochs), axis=1))
    assert distances.mean() == pytest.approx((count + 1) / 3, rel=0.03)
    kept = np.mean([a == b for one, other in itertools.pairwise(epochs) for a, b in zip(one, other, strict=True)])
    assert kept == pytest.approx(1 / count, abs=4 * (1 / count / 20_000) ** 0.5)


@given(st.integers(1, 60), seeds, st.integers(0, 3), st.integers(0, 5))
def test_each_clip_comes_once_an_epoch(count, seed, number, epoch):
    order = ClipOrder(count, seed, number)
    drawn = [order.clip(epoch * count + place) for place in range(count)]
    assert sorted(drawn) == list(range(count))
    assert drawn[::-1] == [ClipOrder(count, seed, number).clip(epoch * count + place) for place in reversed(range(count))]


def test_orders_differ_between_epochs_seeds_and_datasets():
    def order(seed, number, epoch):
        return tuple(ClipOrder(50, seed, number).clip(50 * epoch + place) for place in range(50))

    assert len({order(0, 0, 0), order(0, 0, 1), order(1, 0, 0), order(0, 1, 0)}) == 4
    assert order(0, 0, 0) == order(0, 0, 0)


@given(st.lists(st.sampled_from([0.1, 0.3, 1.0, 1.5, 2.0, 7.0]), min_size=1, max_size=30), seeds, st.integers(0, 4))
def test_weighted_clips_are_drawn_by_weight_in_every_epoch(weights, seed, epoch):
    order, counts = ClipOrder(len(weights), seed, weights=np.array(weights)), Counter(weights)

    def before(epoch):
        return {weight: math.floor(epoch * count * weight + 1e-6) for weight, count in counts.items()}

    first, last = before(epoch), before(epoch + 1)
    drawn = Counter(order.clip(draw) for draw in range(sum(first.values()), sum(last.values())))
    for weight, count in counts.items():
        group, draws = [clip for clip, other in enumerate(weights) if other == weight], last[weight] - first[weight]
        assert sum(drawn[clip] for clip in group) == draws
        # Epochs end anywhere in a group's rounds: a clip is drawn at most once more or less often than its share.
        assert all(draws // count - 1 <= drawn[clip] <= -(-draws // count) + 1 for clip in group)
    if all(weight == int(weight) for weight in weights):
        assert drawn == {clip: int(weight) for clip, weight in enumerate(weights)}


@given(st.lists(st.sampled_from([0.02, 0.3, 1.0, 2.5]), min_size=1, max_size=12), seeds)
def test_over_many_epochs_each_clip_is_drawn_by_its_weight(weights, seed):
    order = ClipOrder(len(weights), seed, weights=np.array(weights))
    drawn = Counter(order.clip(draw) for draw in range(math.ceil(sum(weights) * 100)))
    assert all(abs(drawn[clip] - 100 * weight) <= 4 for clip, weight in enumerate(weights))
    assert min(drawn[clip] for clip in range(len(weights))) >= 1


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, float("nan")]])
def test_invalid_weights_are_named(weights):
    with pytest.raises(ValueError, match="a weight above 0 for each"):
        ClipOrder(2, 0, weights=np.array(weights))


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=6), seeds, st.integers(0, 300))
def test_sources_are_interleaved_by_their_shares(shares, seed, step):
    sources = Interleaving(shares, seed)
    drawn = [sources.source(k) for k in range(step)]
    for source, share in enumerate(shares):
        assert sources.earlier(source, step) == drawn.count(source)
        assert abs(drawn.count(source) - step * share / sum(shares)) < 4


def test_any_step_of_an_interleaving_is_evaluated_at_once():
    sources = Interleaving([3, 1], 0)
    far = 10**12
    assert sources.earlier(0, far) + sources.earlier(1, far) == far
    assert sources.earlier(0, far) == pytest.approx(0.75 * far, abs=10)
    assert sources.earlier(0, far + 1) - sources.earlier(0, far) == (sources.source(far) == 0)


# -- shards ----------------------------------------------------------------------------------------------------------

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
def test_an_epoch_is_every_full_batch_once_over_all_slots(plan, epoch):
    samples, sizes, slots, lanes, seed = plan
    result = EpochPlan(samples, sizes, slots, lanes, seed)
    steps = sum(result.steps)
    taken = Counter()
    for step in range(epoch * steps, (epoch + 1) * steps):
        batches = [result.batch(step, slot) for slot in range(slots)]
        assert {(b.bucket, b.epoch, b.lane) for b in batches} == {(batches[0].bucket, epoch, step % lanes)}  # equal work
        taken.update((b.bucket, b.number) for b in batches)
    assert set(taken.values()) == {1}
    for bucket, (count, size) in enumerate(zip(samples, sizes, strict=True)):
        numbers = {number for b, number in taken if b == bucket}
        assert numbers == set(range(count // (size * slots) * slots))
        assert count - len(numbers) * size == result.left_out[bucket] < size * slots  # less than one step is left out


@given(plans)
def test_a_lane_takes_a_contiguous_run(plan):
    samples, sizes, slots, lanes, seed = plan
    result = EpochPlan(samples, sizes, slots, lanes, seed)
    for slot in range(slots):
        runs = {}
        for step in range(sum(result.steps)):
            batch = result.batch(step, slot)
            run = runs.setdefault((batch.bucket, batch.lane), [batch.number])
            assert batch.number in (run[-1], run[-1] + 1)
            run.append(batch.number)


@given(plans, st.integers(0, 200))
def test_a_step_does_not_depend_on_earlier_queries(plan, step):
    asked = EpochPlan(*plan)
    for earlier in range(step):
        asked.batch(earlier, 0)
    assert asked.batch(step, 0) == EpochPlan(*plan).batch(step, 0)


def test_seed_and_epoch_determine_the_order_of_buckets():
    def order(seed, epoch):
        plan = EpochPlan([30, 30], [1, 1], 1, 2, seed)
        return tuple(plan.batch(step, 0).bucket for step in range(60 * epoch, 60 * (epoch + 1)))

    assert len({order(0, 0), order(0, 1), order(1, 0)}) == 3
    assert order(0, 0) == order(0, 0)
    assert Counter(order(3, 7)) == {0: 30, 1: 30}


def test_too_few_samples_for_a_step_are_named():
    with pytest.raises(UserError, match=r"\[7, 3\] samples in batches of \[4, 2\], 2 batches a step: no bucket fills a step"):
        EpochPlan([7, 3], [4, 2], 2, 1, 0)
    assert EpochPlan([8, 3], [4, 2], 2, 1, 0).steps == [1, 0]


shards = st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(any)


@given(shards, st.integers(1, 25), st.integers(0, 2**32), st.integers(0, 5))
def test_an_order_visits_each_sample_once_block_by_block(counts, block, seed, epoch):
    order = ShardOrder(np.array(counts), block, seed, bucket=0)
    places = [order.locate(epoch, position) for position in range(sum(counts))]
    assert sorted(places) == [(shard, place) for shard, count in enumerate(counts) for place in range(count)]
    runs = [(shard, place // block) for shard, place in places]
    changes = [run for run, before in zip(runs, [None, *runs], strict=False) if run != before]
    assert len(changes) == len(set(changes))  # no block is visited twice
    for shard in range(len(counts)):
        blocks = [b for s, b in changes if s == shard]
        assert blocks == sorted(blocks)  # front to back


@given(shards, st.integers(1, 25), seeds, st.integers(0, 5), st.data())
def test_an_order_that_leaves_samples_out_skips_neighbours(counts, block, seed, epoch, data):
    total = sum(counts)
    left_out = data.draw(st.integers(0, total - 1))
    whole, order = ShardOrder(np.array(counts), block, seed, 0), ShardOrder(np.array(counts), block, seed, 0, left_out)
    kept = [order.locate(epoch, position) for position in range(total - left_out)]
    places = [whole.locate(epoch, position) for position in range(total)]
    assert kept == [place for place in places if place in set(kept)]
    assert len(kept) == total - left_out
    missing = [place not in kept for place in places]
    assert sum(here and not following for here, following in zip(missing, [*missing[1:], missing[0]], strict=True)) <= 1


@pytest.mark.parametrize("counts", [[100], [100, 1], [40, 30, 30]])
def test_each_sample_is_left_out_as_often_as_any_other(counts):
    order, epochs, left_out = ShardOrder(np.array(counts), 6, 0, bucket=0, left_out=24), 200, 24
    drawn = Counter(order.locate(epoch, position) for epoch in range(epochs) for position in range(sum(counts) - left_out))
    expected = 1 - left_out / sum(counts)
    assert len(drawn) == sum(counts)
    assert all(abs(times / epochs - expected) < 5 * (0.25 * 0.75 / epochs) ** 0.5 for times in drawn.values())


def test_shards_and_samples_are_shuffled_anew_in_each_epoch():
    def order(seed, epoch, bucket):
        result = ShardOrder(np.full(8, 16), 8, seed, bucket)
        return [result.locate(epoch, position) for position in range(128)]

    drawn = [order(0, 0, 0), order(0, 1, 0), order(1, 0, 0), order(0, 0, 1)]
    assert len({tuple(shard for shard, _ in o) for o in drawn}) == 4
    assert len({tuple(place for _, place in o) for o in drawn}) == 4
    assert [place for _, place in drawn[0][:8]] != list(range(8))
    assert ShardOrder(np.full(8, 16), 1, 0, 0).locate(0, 3)[1] == 3  # blocks of one are not permuted
