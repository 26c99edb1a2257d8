"""The clips that a tokenizer, or a decoder of its latents, is trained and validated on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from promag.data.buckets import Bucket
from promag.data.datasets import open_dataset
from promag.data.sources import digest_sources, open_sources
from promag.data.stream import TrainingStream
from promag.training.config import UserError
from promag.training.optimizers import OptimizationConfig
from promag.training.run import record_data

from .config import ClipsConfig
from .geometry import check_frames, check_size


def open_training_clips(
    data: ClipsConfig,
    buckets: Sequence[Bucket],
    optimization: OptimizationConfig,
    processes: int,
    temporal_strides: Sequence[int],
) -> tuple[Any, str]:
    """Return what training draws its clips from, and the plan of its buckets as lines for the log."""
    return open_sources(
        data.train,
        data.extra_sources or (),
        buckets,
        count=data.synthetic_clips,
        batch_size=optimization.batch_size,
        batches_per_step=processes * optimization.accumulate,
        temporal_strides=temporal_strides,
        sharding=data.sharding,
        in_memory=data.in_memory,
    )


def first_clips(source: Any, seed: int, optimization: OptimizationConfig, processes: int) -> Tensor:
    """Return the first clips B C T H W of a training's first step, however processes and accumulation divide it; at most 16."""
    count = min(optimization.batch_size * optimization.accumulate * processes, 16)
    return next(iter(TrainingStream(source, seed, count, rank=0, world_size=1)))["video"]


def check_clips(tokenizer: Any, ratio: int, frames: int, height: int, width: int, place: str = "") -> None:
    """Raise UserError, which begins with `place`, where a tokenizer does not take clips of a shape at a ratio."""
    try:
        check_frames(frames, ratio, tokenizer.latent_step)
        check_size(height, width, tokenizer.spatial_compression_ratio)
    except ValueError as error:
        raise UserError(f"{place}{error}") from None


def open_validation_clips(data: ClipsConfig, frames: int) -> list[Tensor]:
    """Return the clips that validations reconstruct, each 1 C T H W."""
    fixed = open_dataset(data.validation, "eval", frames=frames, size=data.size, count=data.validation_clips)
    return [fixed.fixed(i)["video"][None] for i in range(min(data.validation_clips, len(fixed)))]


def record_videos(run: Path, data: ClipsConfig) -> None:
    """Record the videos that a run is trained on; it reads no captions, so these may be corrected."""
    digests = digest_sources(data.train, data.extra_sources or (), data.synthetic_clips)
    record_data(run, {"videos": {name: digest.videos for name, digest in digests.items()}})
