"""Clips from tar shards, read from front to back in an epoch's order, in one bucket or several.

Which samples the batch of a step holds is arithmetic (epochs.py); which crop of each is drawn by the same numbers as
everywhere else (stream.py). Open files are only a cache: any step can be asked for.
"""

import copy
import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch.utils.data import get_worker_info

from promag.training.config import UserError, setting

from ..buckets import NONE, Bucket, Buckets, bucket_plan
from ..clip_index import Digests
from ..crops import ClipCrop
from ..epochs import EpochPlan, ShardOrder
from ..listing import first_few
from ..video import UnreadableVideo
from .index import ShardIndex
from .reader import BadSample, Sample, ShardReader

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sharding:
    """Settings for reading shards."""

    concurrent_shards: int = setting(
        4, "shards that a process reads side by side; a multiple of run.workers, so that none is read twice"
    )
    shuffle: int = setting(64, "neighbouring samples of a shard that are in memory together and come in a drawn order")
    bad: Literal["stop", "skip"] = setting("stop", "a damaged sample or shard ends training, or is skipped, counted and named")

    def __post_init__(self) -> None:
        """Raise ValueError for numbers that cannot be meant."""
        if self.concurrent_shards < 1 or self.shuffle < 1:
            raise ValueError(f"concurrent_shards {self.concurrent_shards}, shuffle {self.shuffle}: at least 1 is needed")


IN_ORDER = Sharding(concurrent_shards=1, shuffle=1)  # for clips that are looked at by their number


class ShardedClips:
    """Crops of the clips in shards.

    An item is that of ClipDataset; `clip` is the sample's place among all of the shards.

    Args:
        shards: the shards to train on.
        buckets: shapes of the crops; clips too short for all of them are left out and named in the log.
        temporal_strides: see ClipCrop.
        sharding: how shards are read. Skipped shards are left out of the order; a skipped sample's place is taken by
            another one near it in the shard, drawn by the element's generator, so that batches stay full and addressed.

    Raises UserError where no clip is long enough and where a local shard is not the one that its index describes.
    """

    def __init__(
        self,
        shards: ShardIndex,
        buckets: Sequence[Bucket],
        temporal_strides: Sequence[int] = (1,),
        sharding: Sharding = IN_ORDER,
    ):
        self.shards, self.sharding = shards, sharding
        self.buckets = Buckets(buckets, min(temporal_strides))
        sizes = [(bucket.frames, (bucket.height, bucket.width)) for bucket in buckets]
        self.crops = [ClipCrop(frames, size, temporal_strides) for frames, size in sizes]
        assigned = self.buckets.assign(*(shards.column(name) for name in ("frames", "height", "width")))
        self.skipped = self._name_short(assigned)
        self._leave_out_damaged(assigned)
        self.numbers = [np.flatnonzero(assigned == bucket) for bucket in range(len(buckets))]  # each bucket's samples
        self._forget()

    def _forget(self) -> None:
        """Drop open files, counters and plans, which belong to one process."""
        self._bad: set[str] = set()  # samples already named
        self._readers: dict[tuple[int, int, int, int], _BlockReader] = {}
        self._plan = functools.lru_cache(maxsize=1)(self._make_plan)
        self._orders = functools.lru_cache(maxsize=1)(self._make_orders)

    def __getstate__(self) -> dict[str, Any]:
        own = ("_bad", "_readers", "_plan", "_orders")
        return {key: value for key, value in self.__dict__.items() if key not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __len__(self) -> int:
        """Count the clips of all buckets."""
        return sum(map(len, self.numbers))

    def by_bucket(self) -> list["ShardedClips"]:
        """Return a source for each bucket that has clips, in which they have numbers of their own."""
        return [self._only(bucket) for bucket, numbers in enumerate(self.numbers) if len(numbers)]

    def _only(self, bucket: int) -> "ShardedClips":
        part = copy.copy(self)
        part.buckets = Buckets([self.buckets.buckets[bucket]], self.buckets.stride)
        part.crops, part.numbers = [self.crops[bucket]], [self.numbers[bucket]]
        part._forget()
        return part

    def items(self, seed: int, step: int, slot: int, batches_per_step: int, batch_size: int) -> list[dict[str, Any]]:
        """Return the elements of one batch of a step: slot 0 to `batches_per_step` - 1.

        `batch_size` is that of buckets that state none. Sample n of the training is shown by `default_rng((seed, n))`.

        Raises UnreadableVideo and BadSample, with `bad` "skip" only where nothing near a bad sample can be read.
        """
        sizes = tuple(self.buckets.batch_sizes(batch_size))
        plan = self._plan(sizes, batches_per_step, seed)
        batch = plan.batch(step, slot)
        size, order = sizes[batch.bucket], self._orders(plan)[batch.bucket]
        reader = self._reader(batch.bucket, slot, batch.lane, self.sharding.shuffle)
        first = step * batches_per_step * max(sizes) + slot * size
        items = []
        for element in range(size):
            shard, place = order.locate(batch.epoch, batch.number * size + element)
            rng = np.random.default_rng((seed, first + element))
            items.append({"sample": first + element, **self._item(reader, shard, place, rng)})
        return items

    def fixed(self, index: int) -> dict[str, Any]:
        """Return the first frames of clip `index`, in the shards' order, cropped in the centre; for one bucket."""
        if len(self.numbers) != 1:
            raise ValueError(f"{len(self.numbers)} buckets: clips are numbered where there is one")
        if not 0 <= index < len(self):
            raise IndexError(f"clip {index}: legal are 0 to {len(self) - 1}")
        reader = self._reader(0, NONE, NONE, block=1)
        shard, place = reader.find(index)
        number, sample = reader.sample(shard, place)
        return self._shown(number, sample, self.crops[0].first)

    def digests(self, count: int) -> Digests:
        """Hash the contents of the shards that hold the first `count` clips, and the samples' numbers in them."""
        numbers = self.numbers[0][:count]
        shards = np.unique(np.searchsorted(self.shards.offsets, numbers, side="right") - 1)
        facts = [[self.shards.sha256[shard] for shard in shards], (numbers - self.shards.offsets[shards[0]]).tolist()]
        digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        return Digests(digest, digest)

    def plan(self, batches_per_step: int, batch_size: int) -> str:
        """Return a table of the buckets for the log, and how many clips an epoch leaves out."""
        sizes = self.buckets.batch_sizes(batch_size)
        counts = [len(numbers) for numbers in self.numbers]
        epoch = EpochPlan(counts, sizes, batches_per_step, self.sharding.concurrent_shards, 0)
        steps, left_out = epoch.steps, sum(epoch.left_out)
        plan = bucket_plan(self.buckets.buckets, counts, sizes, steps)
        if never := [f"{b} ({n} clips)" for b, n, s in zip(self.buckets.buckets, counts, steps, strict=True) if n and not s]:
            logger.warning("buckets that never fill a step of %d batches never come: %s", batches_per_step, ", ".join(never))
        rest = f"; each leaves out {left_out} of {len(self)} clips, others each time" if left_out else ""
        return f"{plan}\n{sum(steps)} steps an epoch{rest}"

    # -- planning ----------------------------------------------------------------------------------------------------

    def _make_plan(self, sizes: tuple[int, ...], batches_per_step: int, seed: int) -> EpochPlan:
        worker = get_worker_info()
        if worker and worker.id == 0 and self.sharding.concurrent_shards % worker.num_workers:
            logger.warning(
                "%d concurrent_shards for %d loader processes: shards are read more than once; take a multiple",
                self.sharding.concurrent_shards,
                worker.num_workers,
            )
        counts = [len(numbers) for numbers in self.numbers]
        return EpochPlan(counts, sizes, batches_per_step, self.sharding.concurrent_shards, seed)

    def _make_orders(self, plan: EpochPlan) -> list[ShardOrder]:
        counts = [np.diff(np.searchsorted(numbers, self.shards.offsets)) for numbers in self.numbers]
        block, left_out = self.sharding.shuffle, plan.left_out
        return [ShardOrder(count, block, plan.seed, bucket, left_out[bucket]) for bucket, count in enumerate(counts)]

    def _name_short(self, assigned: np.ndarray) -> int:
        short = np.flatnonzero(assigned == NONE)
        if len(short) == len(assigned):
            longest = int(self.shards.column("frames").max(initial=0))
            shapes = ", ".join(map(str, self.buckets.buckets))
            raise UserError(f"no clip of {len(assigned)} is long enough for {shapes}: the longest has {longest} frames")
        if len(short):
            names = first_few((self._name(int(place)) for place in short), count=len(short))
            logger.warning("%d of %d clips are too short for every bucket: %s", len(short), len(assigned), names)
        return len(short)

    def _name(self, place: int) -> str:
        shard = int(np.searchsorted(self.shards.offsets, place, side="right")) - 1
        number = place - self.shards.offsets[shard]
        return f"{self.shards.urls[shard]} number {number} ({self.shards.column('frames')[place]} frames)"

    def _leave_out_damaged(self, assigned: np.ndarray) -> None:
        damaged = self.shards.damaged()
        if damaged and self.sharding.bad == "stop":
            raise UserError(f"{len(damaged)} of {len(self.shards.urls)} shards are damaged: {first_few(damaged.values())}")
        for shard in damaged:
            assigned[self.shards.offsets[shard] : self.shards.offsets[shard + 1]] = NONE
        if damaged:
            names = first_few(damaged.values(), limit=len(damaged))
            logger.warning("%d of %d shards are damaged and left out: %s", len(damaged), len(self.shards.urls), names)
            if (assigned == NONE).all():
                raise UserError(f"none of {len(self.shards.urls)} shards can be used: {first_few(damaged.values())}")

    def _reader(self, bucket: int, slot: int, lane: int, block: int) -> "_BlockReader":
        # Processes that a fork made would share an open file's offset with their parent.
        key = os.getpid(), bucket, slot, lane
        if key not in self._readers:
            self._readers[key] = _BlockReader(self.shards, self.numbers[bucket], bucket, block)
        return self._readers[key]

    # -- reading -----------------------------------------------------------------------------------------------------

    def _item(self, reader: "_BlockReader", shard: int, place: int, rng: np.random.Generator) -> dict[str, Any]:
        crop = functools.partial(self.crops[reader.bucket].random, rng=rng)
        for number, sample in self._candidates(reader, shard, place, rng):
            try:
                return self._shown(number, sample, crop)
            except (BadSample, UnreadableVideo) as error:
                if self.sharding.bad == "stop":
                    raise
                self._name_bad(str(error))
        raise BadSample(self.shards.urls[shard], f"place {place}", "nothing near it in the shard can be read")

    def _candidates(
        self, reader: "_BlockReader", shard: int, place: int, rng: np.random.Generator
    ) -> Iterator[tuple[int, Sample | BadSample]]:
        """Yield the sample, then its replacements: others of its block, then of the shard's first block."""
        yield reader.sample(shard, place)
        for block in (place // reader.block, 0):
            others = [other for other in reader.places(shard, block) if other != place]
            for k in rng.permutation(len(others)):
                yield reader.sample(shard, others[k])

    def _shown(self, number: int, sample: Sample | BadSample, crop: Callable[..., dict[str, Any]]) -> dict[str, Any]:
        if isinstance(sample, BadSample):
            raise BadSample(str(sample))  # anew: an exception keeps what it passed through alive
        return {"clip": number, **crop(sample.video, self.shards.clip(number, sample))}

    def _name_bad(self, what: str) -> None:
        if what not in self._bad:
            self._bad.add(what)
            logger.warning("skipped, another sample near it in its place (%d in this process): %s", len(self._bad), what)


class _BlockReader:
    """Reads one bucket's samples of the shards, a block at a time; the last two blocks stay in memory."""

    def __init__(self, shards: ShardIndex, numbers: np.ndarray, bucket: int, block: int):
        self.shards, self.numbers, self.bucket, self.block = shards, numbers, bucket, block
        self._starts = np.searchsorted(self.numbers, self.shards.offsets)  # start of each shard among the bucket's samples
        self._open: tuple[int, ShardReader] | None = None
        self._blocks: dict[tuple[int, int], dict[int, Sample | BadSample]] = {}

    def find(self, index: int) -> tuple[int, int]:
        """Return shard and place of the bucket's sample `index`."""
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, index - int(self._starts[shard])

    def places(self, shard: int, block: int) -> range:
        """Return the places of a block."""
        count = int(self._starts[shard + 1] - self._starts[shard])
        return range(block * self.block, min((block + 1) * self.block, count))

    def sample(self, shard: int, place: int) -> tuple[int, Sample | BadSample]:
        """Return a sample, and its number among all samples of all shards."""
        first = int(self._starts[shard])
        key = shard, place // self.block
        if key not in self._blocks:
            if len(self._blocks) == 2:
                del self._blocks[next(iter(self._blocks))]
            wanted = self.numbers[[first + p for p in self.places(*key)]] - self.shards.offsets[shard]
            self._blocks[key] = self._reader(shard).read(wanted.tolist())
        number = int(self.numbers[first + place])
        return number, self._blocks[key][number - int(self.shards.offsets[shard])]

    def _reader(self, shard: int) -> ShardReader:
        if self._open is None or self._open[0] != shard:
            if self._open:
                self._open[1].close()
            self._open = shard, ShardReader(self.shards.urls[shard], int(self.shards.samples[shard]))
        return self._open[1]
