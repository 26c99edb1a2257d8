"""What a training draws from: one source of clips, or several by their shares of the steps."""

from collections.abc import Sequence
from dataclasses import dataclass

from promag.training.config import UserError, required, setting

from .buckets import Bucket
from .datasets import open_training
from .stream import Mixture
from .tar_stream import ShardedClips, Sharding


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
