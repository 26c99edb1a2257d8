"""The order of training samples: which clip each sample of a training is.

Three laws hold for every source, whatever the number of loader processes:
- What the batch of a step holds follows in closed form from its address: the seed, the step, the batch's slot in it and how
  many batches the step has (processes x accumulate). A stream starts at any step without what came before.
- Clips come by epochs: each clip once before any comes again. Clips with a weight come as often as it says.
- Batches of one step may be spread over processes or over time: two processes, or one that accumulates two batches, see the
  same samples.

An index and a latent cache are permuted as a whole (ClipOrder), and how their samples are cut into batches makes no
difference. Shards are read from front to back, so they have an order of their own (EpochPlan, ShardOrder): the slots' steps
are split into lanes, where steps s with s mod lanes = l are lane l's and take a contiguous run of the epoch's order. A loader
process that makes the batches of whole lanes (their number is a multiple of the processes') opens each of its shards once. The
order is a permutation of the shards, and inside a shard of each block of so many samples, which are in memory together.
An epoch of shards is the full batches of every bucket. It leaves out (samples mod batch x batches a step) samples of a bucket,
fewer than one step's: neighbours in its order, from a drawn place on, so others in each epoch.
"""

import bisect
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from promag.training.config import UserError

# First numbers of the keys that seed permutations and generators, so that none of them is a sample's.
SHARD_STREAM, BLOCK_STREAM, PLAN_STREAM, CLIP_STREAM, PLACE_STREAM, SOURCE_STREAM = (2**31 + k for k in range(1, 7))

_ROUNDS = 8
_MASK = 2**64 - 1
_TURN = 2**32  # a full turn of Interleaving
_GOLDEN = 2654435769  # odd and nearest to _TURN / golden ratio: the step whose multiples spread most evenly


def permute(place: int, count: int, *key: int) -> int:
    """Return where a pseudo-random permutation of 0 to count - 1, chosen by `key`, takes `place`, in constant time and memory.

    A generalised Feistel network on rows x columns >= count, applied again while it leaves the range (Black and Rogaway,
    Ciphers with Arbitrary Finite Domains, 2002). Raises ValueError for a place out of range.
    """
    if not 0 <= place < count:
        raise ValueError(f"place {place}: legal are 0 to {count - 1}")
    keys = _round_keys(key)
    rows = math.isqrt(count - 1) + 1
    columns = -(-count // rows)
    while True:
        row, column = divmod(place, columns)
        for number, round_key in enumerate(keys):
            if number % 2:
                row = (row + _mix(column ^ round_key)) % rows
            else:
                column = (column + _mix(row ^ round_key)) % columns
        place = row * columns + column
        if place < count:
            return place


@functools.lru_cache(maxsize=1024)
def _round_keys(key: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64).tolist())


def _mix(x: int) -> int:
    """Return a 64-bit hash (the finaliser of SplitMix64: Steele, Lea and Flood 2014)."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


class ClipOrder:
    """The endless order of the clips of one dataset, by epochs: any draw is found without those before it.

    Clips of one weight form a group. Epoch after epoch a group has weight x clips draws, in whole numbers that never fall a
    draw behind, at permuted places of the epoch; they take its clips in turn, permuted anew each time all have come. So without
    weights an epoch is each clip once, and no weight keeps a clip out.

    Args:
        count: clips.
        seed, number: decide the order; `number` tells the datasets of a training apart.
        weights: one per clip, above 0: how often the clip comes in an epoch, on average. None is 1 for all.

    Raises ValueError for no clips or other weights.
    """

    def __init__(self, count: int, seed: int, number: int = 0, weights: np.ndarray | None = None):
        if count < 1 or (weights is not None and (len(weights) != count or not (weights > 0).all())):
            raise ValueError(
                f"{count} clips with weights {weights}: at least one clip, and a weight above 0 for each are needed"
            )
        self.seed, self.number = seed, number
        values, group_of = (np.ones(1), None) if weights is None else np.unique(weights, return_inverse=True)
        self._members = [np.flatnonzero(group_of == group) for group in range(len(values))] if len(values) > 1 else None
        self._clips = [len(group) for group in self._members] if self._members else [count]
        # Draws of an epoch in parts of 2^-32, so that whole numbers count them exactly.
        self._draws = [max(1, round(float(w) * 2**32) * n) for w, n in zip(values, self._clips, strict=True)]

    def clip(self, draw: int) -> int:
        """Return the clip of a draw, counted from the training's first."""
        epoch = (draw << 32) // sum(self._draws)  # where no draw was rounded down
        before, after = self._before(epoch), self._before(epoch + 1)
        while sum(after) <= draw:
            epoch, before, after = epoch + 1, after, self._before(epoch + 2)
        places = [last - first for first, last in zip(before, after, strict=True)]
        place = permute(draw - sum(before), sum(places), self.seed, PLACE_STREAM, self.number, epoch)
        group = 0
        while place >= places[group]:
            place, group = place - places[group], group + 1
        turn, place = divmod(before[group] + place, self._clips[group])
        member = permute(place, self._clips[group], self.seed, CLIP_STREAM, self.number, group, turn)
        return int(self._members[group][member]) if self._members else member

    def _before(self, epoch: int) -> list[int]:
        """Return the draws of each group before an epoch."""
        return [epoch * draws >> 32 for draws in self._draws]


class Interleaving:
    """Gives each step one of several sources by their shares, as evenly as can be: no run of steps is far from its shares.

    Step k's source is the one whose part of a circle, as long as its share, holds k turns by the golden ratio. How often a
    source came before a step is a sum of floors (`_floor_sum`), so any step is found without those before it.

    Args:
        shares: each source's share of the steps, above 0; they need not add up to 1.
        seed: decides where on the circle the first step is.
    """

    def __init__(self, shares: Sequence[float], seed: int):
        ends = np.cumsum(np.asarray(shares, float) / sum(shares)) * _TURN
        self._ends = [*(round(end) for end in ends[:-1].tolist()), _TURN]
        self._first = int(np.random.SeedSequence((seed, SOURCE_STREAM)).generate_state(1)[0])

    def source(self, step: int) -> int:
        """Return the number of a step's source."""
        return bisect.bisect_right(self._ends, (self._first + step * _GOLDEN) % _TURN)

    def earlier(self, source: int, step: int) -> int:
        """Count the steps before `step` that have this source."""
        return self._below(self._ends[source], step) - (self._below(self._ends[source - 1], step) if source else 0)

    def _below(self, end: int, steps: int) -> int:
        """Count the first `steps` steps whose place on the circle is below `end`."""
        shifted = _floor_sum(steps, _TURN, _GOLDEN, self._first + _TURN - end)
        return steps + _floor_sum(steps, _TURN, _GOLDEN, self._first) - shifted


def _floor_sum(count: int, modulus: int, factor: int, offset: int) -> int:
    """Return the sum of floor((factor * k + offset) / modulus) over k from 0 to count - 1, in logarithmic time."""
    total = 0
    while count > 0:
        total += (count - 1) * count // 2 * (factor // modulus) + count * (offset // modulus)
        factor, offset = factor % modulus, offset % modulus
        count, offset = divmod(factor * count + offset, modulus)
        modulus, factor = factor, modulus
    return total


# -- shards ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Address of a batch's samples."""

    bucket: int
    epoch: int
    lane: int
    number: int  # in the bucket's order of that epoch, over all slots


class EpochPlan:
    """Gives each step a bucket, and each slot of the step a batch of it.

    Args:
        samples: number of samples in each bucket.
        batch_sizes: samples per batch of each bucket.
        batches_per_step: processes x accumulate.
        lanes: runs of the order that are read side by side for each slot.
        seed: decides the order of the buckets.

    `steps` are those of one epoch for each bucket, `left_out` the samples that do not fill one more. Raises UserError if no
    bucket fills all batches of a step.
    """

    def __init__(self, samples: Sequence[int], batch_sizes: Sequence[int], batches_per_step: int, lanes: int, seed: int):
        counts = [divmod(count, size * batches_per_step) for count, size in zip(samples, batch_sizes, strict=True)]
        self.steps, self.left_out = [full for full, _ in counts], [rest for _, rest in counts]
        if not sum(self.steps):
            raise UserError(
                f"{list(samples)} samples in batches of {list(batch_sizes)}, {batches_per_step} batches a step: no bucket "
                "fills a step; train on fewer processes, accumulate less, or take smaller batches or more clips"
            )
        self.lanes, self.seed = lanes, seed
        self._order = functools.lru_cache(maxsize=2)(self._draw)  # a step or two around an epoch's end need both

    def batch(self, step: int, slot: int) -> Batch:
        """Return the batch of a slot at a step."""
        epoch, within = divmod(step, sum(self.steps))
        order, before = self._order(epoch)
        bucket, lane = int(order[within]), step % self.lanes
        # Lane l's steps of this epoch are within = first, first + lanes, ...
        earlier = np.count_nonzero(order[within % self.lanes : within : self.lanes] == bucket)
        number = slot * self.steps[bucket] + int(before[bucket, lane]) + int(earlier)
        return Batch(bucket, epoch, lane, number)

    def _draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the bucket of each step, and of each bucket and lane the batches in the lanes before it."""
        rng = np.random.default_rng((self.seed, epoch, PLAN_STREAM))
        order = rng.permutation(np.repeat(np.arange(len(self.steps), dtype=np.int16), self.steps))
        lane = (epoch * len(order) + np.arange(len(order))) % self.lanes
        counts = np.zeros((len(self.steps), self.lanes), np.int64)
        np.add.at(counts, (order, lane), 1)
        return order, counts.cumsum(1) - counts


class ShardOrder:
    """The order of one bucket's samples in an epoch.

    Args:
        counts: samples of the bucket in each shard.
        block: samples that are permuted together.
        seed, bucket: decide the order, with the epoch.
        left_out: samples that an epoch leaves out: neighbours in its order, where the first one follows the last, so that each
            sample is left out as often as any other.
    """

    def __init__(self, counts: np.ndarray, block: int, seed: int, bucket: int, left_out: int = 0):
        self.counts, self.block, self.seed, self.bucket = np.asarray(counts), block, seed, bucket
        self.left_out = left_out
        self._shards = functools.lru_cache(maxsize=2)(self._permute_shards)

    def locate(self, epoch: int, position: int) -> tuple[int, int]:
        """Return the shard, and the place among the bucket's samples in it, of a position in the epoch's order."""
        shards, ends, gap = self._shards(epoch)
        position += max(0, gap + self.left_out - int(ends[-1]))  # the gap may go on at the order's beginning
        if position >= gap:
            position += self.left_out
        slot = int(np.searchsorted(ends, position, side="right"))
        shard = int(shards[slot])
        within = position - int(ends[slot] - self.counts[shard])
        number, offset = divmod(within, self.block)
        first = number * self.block
        size = min(self.block, int(self.counts[shard]) - first)
        return shard, first + permute(offset, size, self.seed, BLOCK_STREAM, self.bucket, shard, number, epoch)

    def _permute_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Return the shards in their order, where each ends in it, and where the samples that are left out begin."""
        rng = np.random.default_rng((self.seed, epoch, SHARD_STREAM, self.bucket))
        shards = rng.permutation(len(self.counts))
        ends = self.counts[shards].cumsum()
        return shards, ends, int(rng.integers(ends[-1]))
