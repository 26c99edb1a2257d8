"""The order of samples that stand in shards: which samples the batch of a step holds.

Two laws, for any number of loader processes:
- The batch of step s on a rank depends on (seed, s, rank, number of ranks) and the shards alone, in closed form: a stream
  begins at any step without what came before.
- An epoch is the full batches of every bucket. Each sample is in exactly one of them over all ranks, but for the last
  (samples mod batch x ranks) of a bucket's order: fewer than one step, and others in each epoch.

So that shards are read from front to back, a rank's steps are split into lanes: steps s with s mod lanes = l are lane l's,
and take a contiguous run of the epoch's order. A loader process that makes the batches of whole lanes (their number is a
multiple of the processes') opens each of its shards once. The order itself is a permutation of the shards, and inside a
shard of each block of so many samples, which are in memory together.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from promag.training.config import UserError

# In place of a rank in the numbers that seed a generator, so that none of these is an element's.
SHARD_STREAM, BLOCK_STREAM, PLAN_STREAM = 2**31 + 1, 2**31 + 2, 2**31 + 3


@dataclass(frozen=True)
class Batch:
    """Which batch a rank takes at a step."""

    bucket: int
    epoch: int
    lane: int
    number: int  # in the bucket's order of that epoch, over all ranks


class EpochPlan:
    """Gives each step a bucket, and each rank a batch of it.

    Args:
        samples: of each bucket.
        batch_sizes: of each bucket, on each rank.
        world_size: ranks.
        lanes: runs of the order that a rank reads side by side.
        seed: decides the order of the buckets.

    `steps` are those of one epoch for each bucket. Raises UserError if no bucket fills a batch on every rank.
    """

    def __init__(self, samples: Sequence[int], batch_sizes: Sequence[int], world_size: int, lanes: int, seed: int):
        self.steps = [count // (size * world_size) for count, size in zip(samples, batch_sizes, strict=True)]
        if not sum(self.steps):
            raise UserError(
                f"{list(samples)} samples in batches of {list(batch_sizes)} on {world_size} ranks: no bucket fills a step; "
                "train on fewer ranks, with smaller batches or more clips"
            )
        self.lanes, self.seed = lanes, seed
        self._order = functools.lru_cache(maxsize=2)(self._draw)  # a step or two around an epoch's end need both

    def batch(self, step: int, rank: int) -> Batch:
        """Return the batch of a rank at a step."""
        epoch, within = divmod(step, sum(self.steps))
        order, before = self._order(epoch)
        bucket, lane = int(order[within]), step % self.lanes
        # Lane l's steps of this epoch are within = first, first + lanes, ...
        earlier = np.count_nonzero(order[within % self.lanes : within : self.lanes] == bucket)
        number = rank * self.steps[bucket] + int(before[bucket, lane]) + int(earlier)
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
    """

    def __init__(self, counts: np.ndarray, block: int, seed: int, bucket: int):
        self.counts, self.block, self.seed, self.bucket = np.asarray(counts), block, seed, bucket
        self._shards = functools.lru_cache(maxsize=2)(self._permute_shards)

    def locate(self, epoch: int, position: int) -> tuple[int, int]:
        """Return the shard, and the place among the bucket's samples in it, of a position in the epoch's order."""
        shards, ends = self._shards(epoch)
        slot = int(np.searchsorted(ends, position, side="right"))
        shard = int(shards[slot])
        within = position - int(ends[slot] - self.counts[shard])
        number, offset = divmod(within, self.block)
        first = number * self.block
        size = min(self.block, int(self.counts[shard]) - first)
        rng = np.random.default_rng((self.seed, epoch, BLOCK_STREAM, self.bucket, shard, number))
        return shard, first + int(rng.permutation(size)[offset])

    def _permute_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng((self.seed, epoch, SHARD_STREAM, self.bucket))
        shards = rng.permutation(len(self.counts))
        return shards, self.counts[shards].cumsum()
