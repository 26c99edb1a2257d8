"""Latents of an existing autoencoder, cached once, on which the levels above it are grown without pixels.

Shapes: B C T H W pixels, b c t h w latents. A cache holds the posterior's mean for every r-th frame of each clip, for
r = 1, 2, 4, ...: what the levels on the way to the stage's ratio start from.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from promag.data.sources import digest_sources
from promag.data.stream import DrawnClips
from promag.diffusion.latent_cache import LatentDataset, LatentFingerprint, write_latents
from promag.tokenizer.autoencoder import AutoencoderKLProMAG
from promag.tokenizer.config import StageConfig, TokenizerConfig
from promag.tokenizer.objectives import LATENTS
from promag.training.config import UserError
from promag.training.precision import autocast, choose_precision
from promag.training.processes import broadcast_from_main, processes

SHARD = 64  # clips per file of a cache


@dataclass
class BaseLatents:
    """The cached latents of some clips by frame rate; clips are drawn like those of any training source."""

    by_rate: dict[int, LatentDataset]
    weights: np.ndarray | None = None

    def __len__(self) -> int:
        """Count the clips."""
        return len(self.by_rate[1])

    def item(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """Return the latents c t h w of clip `index` under "latents r" for each frame rate r; `rng` is not used."""
        return {f"{LATENTS}{rate}": part.fixed(index)["latents"] for rate, part in self.by_rate.items()}


def open_base_latents(
    config: TokenizerConfig, stage: StageConfig, model: AutoencoderKLProMAG, clips: DrawnClips
) -> BaseLatents:
    """Cache what is missing of the latents that a stage is grown on, on all processes together, and open them.

    Raises UserError where a folder holds the latents of another autoencoder or of other clips, and for several buckets.
    """
    data, (bucket, *others) = config.data, config.buckets_of(stage)
    if others:
        raise UserError(f"latent_cache: stage {stage.name} has {1 + len(others)} buckets; cached latents are of one shape")
    rates = [2**level for level in range(1 + model.level_of(stage.ratio))]
    tokenizer = broadcast_from_main(lambda: model.encoding_fingerprint(model.base_ratio))
    drawn = broadcast_from_main(lambda: _digest(config, stage))
    strides = "".join(f"-stride-{stride}" for stride in stage.temporal_strides or ())  # else those of all stages
    folder = Path(data.latent_cache or "")
    caches = {
        folder / f"{bucket}{strides}-every-{rate}": LatentFingerprint(
            tokenizer=tokenizer,
            clips=drawn,
            ratio=rate * model.base_ratio,
            frames=bucket.frames,
            height=bucket.height,
            width=bucket.width,
            dtype="float32",
            shard_size=SHARD,
            drawn_clips=data.latent_clips,
        )
        for rate in rates
    }
    encode = _encoder(model, choose_precision(config.precision, cast(Any, processes().device)))
    folders = write_latents(caches, data.latent_clips, clips, encode, workers=config.run.workers)
    return BaseLatents({rate: _unscaled(place) for rate, place in zip(rates, folders, strict=True)})


def _digest(config: TokenizerConfig, stage: StageConfig) -> str:
    """Return a hash of all that decides which clips are drawn and how they are cut."""
    data = config.data
    sources = digest_sources(data.train, data.extra_sources or (), data.synthetic_clips)
    drawn = {
        "videos": {name: digest.videos for name, digest in sources.items()},
        "shares": [asdict(source) for source in data.extra_sources or ()],
        "strides": stage.temporal_strides or data.temporal_strides,
        "buckets": [str(bucket) for bucket in config.buckets_of(stage)],
        "seed": config.seed,
    }
    return hashlib.sha256(json.dumps(drawn, sort_keys=True).encode()).hexdigest()


def _encoder(model: Any, precision: Any) -> Callable[[Tensor, Sequence[int]], list[Tensor]]:
    """Return a function (B C T H W, base ratio times rates) -> the base's mean latents of every rate-th frame."""

    @torch.no_grad()
    def encode(x: Tensor, ratios: Sequence[int]) -> list[Tensor]:
        device = processes().device
        model.to(device).eval()
        rates = [ratio // model.base_ratio for ratio in ratios]
        with autocast(cast(Any, device), precision):
            return [model.encode(x[:, :, ::rate].to(device), model.base_ratio).latent_dist.mode().float() for rate in rates]

    return encode


def _unscaled(folder: Path) -> LatentDataset:
    """Open a cache whose latents come as the autoencoder made them."""
    dataset = LatentDataset(folder)
    dataset.normalise_by([0.0] * len(dataset.mean), [1.0] * len(dataset.mean), "channel")
    return dataset
