"""Sources of training clips: one source in one bucket or several, or several sources by their shares of the steps."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from promag.training.config import UserError, required, setting

from .buckets import Bucket, Buckets, bucket_plan
from .clip_index import Digests, digest_clips
from .datasets import ClipDataset, SyntheticDataset, load_index, open_dataset, split_by_bucket
from .shards.index import is_shards, open_shards
from .shards.stream import ShardedClips, Sharding
from .stream import Mixture


@dataclass(frozen=True)
class Source:
    """Clips that are trained on beside the main ones."""

    train: str = required("clips.jsonl, or synthetic for generated clips")
    share: float = required("part of the steps whose batch comes from here; the main clips have what is left")
    temporal_strides: tuple[int, ...] = setting((1, 2), "frame steps at which these clips are read")

    def __post_init__(self) -> None:
        """Raise ValueError for a share that leaves a source without steps."""
        if not 0 < self.share < 1:
            raise ValueError(f"share {self.share} of {self.train}: must be above 0 and below 1")


def open_training(
    source: str | os.PathLike,
    buckets: Sequence[Bucket],
    count: int,
    batch_size: int,
    batches_per_step: int,
    temporal_strides: Sequence[int],
    sharding: Sharding,
    in_memory: bool = False,
) -> tuple[Mixture | ShardedClips, str]:
    """Open a source of training clips, in one bucket or several; return it with the plan of its buckets as lines for the log.

    Clips come by epochs (epochs.py), from a bucket as often as its clips fill batches. `count` is that of generated clips,
    `batch_size` that of buckets that state none, `batches_per_step` processes x accumulate. `in_memory` keeps an index's clips
    in memory; generated clips are generated all the same. Raises UserError as `open_dataset` does, where no clip is long enough
    for any bucket, and for shards in memory.
    """
    if is_shards(source):
        if in_memory:
            raise UserError(
                f"in_memory true with shards {os.fspath(source)}: only the clips of an index (.jsonl) can be kept in memory; "
                "use false, or train on an index"
            )
        clips = ShardedClips(open_shards(source), buckets, temporal_strides, sharding)
        return clips, clips.plan(batches_per_step, batch_size)
    datasets: list[Any]
    if source == "synthetic":
        used = list(buckets)
        datasets = [open_dataset(source, "train", b.frames, (b.height, b.width), count, temporal_strides) for b in used]
    else:
        used, parts = split_by_bucket(load_index(source), buckets, min(temporal_strides))
        datasets = [
            ClipDataset(part, b.frames, (b.height, b.width), temporal_strides, in_memory=in_memory)
            for part, b in zip(parts, used, strict=True)
        ]
    counts, batches = [len(part) for part in datasets], Buckets(used).batch_sizes(batch_size)
    shares = [number / size for number, size in zip(counts, batches, strict=True)]
    return Mixture(datasets, shares, [bucket.batch_size for bucket in used]), bucket_plan(used, counts, batches, shares)


def open_sources(
    train: str,
    extra_sources: Sequence[Source],
    buckets: Sequence[Bucket],
    count: int,
    batch_size: int,
    batches_per_step: int,
    temporal_strides: Sequence[int],
    sharding: Sharding,
    in_memory: bool = False,
) -> tuple[Mixture | ShardedClips, str]:
    """Open the clips of `train` and of `extra_sources`; see `open_training` for the other arguments and the result.

    A batch holds clips of one source. Raises UserError for shares of 1 or more together, and for shards among several
    sources: shards promise every clip once an epoch, which steps left to others would break.
    """
    shares = [1 - sum(source.share for source in extra_sources), *(source.share for source in extra_sources)]
    if shares[0] <= 0:
        raise UserError(f"shares {', '.join(map(str, shares[1:]))} of other sources: together they must stay below 1")
    sources = [(train, temporal_strides), *((source.train, source.temporal_strides) for source in extra_sources)]
    mixtures, plans, weights = [], [], []
    for (name, strides), share in zip(sources, shares, strict=True):
        clips, plan = open_training(name, buckets, count, batch_size, batches_per_step, strides, sharding, in_memory)
        if not extra_sources:
            return clips, plan
        if isinstance(clips, ShardedClips):
            raise UserError(f"shards {name} among {len(sources)} sources: name all shards in one pattern, without others")
        mixtures.append(clips)
        plans.append(f"{name}, {share:.1%} of the steps\n{plan}")
        weights += [share * part for part in clips.shares]
    datasets = [dataset for mixture in mixtures for dataset in mixture.datasets]
    sizes = [size for mixture in mixtures for size in mixture.batch_sizes]
    return Mixture(datasets, weights, sizes), "\n".join(plans)


def digest_sources(train: str, extra_sources: Sequence[Source], count: int) -> dict[str, Digests]:
    """Hash the clips of each source of a training, by name; `count` is that of generated clips.

    Order counts, and so do shards that are skipped as damaged.
    """
    names = {"train": train, **{f"extra_sources {i}": source.train for i, source in enumerate(extra_sources)}}
    return {name: _digest(source, count) for name, source in names.items()}


def _digest(source: str, count: int) -> Digests:
    if source == "synthetic":
        return SyntheticDataset("train", count, frames=5, size=32).digests(count)
    if is_shards(source):
        digest = hashlib.sha256("".join(open_shards(source).sha256).encode()).hexdigest()
        return Digests(digest, digest)
    clips = load_index(source)
    return digest_clips(clips, len(clips))
