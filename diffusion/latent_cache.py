"""Cached latents: each clip encoded once by the frozen tokenizer, on any number of processes, at one or several ratios.

A shard (see cache_store.py) holds for its n clips: latents (n c t h w), fps (n), captions, and the latents' sums and sums of
squares by channel, of which the index has mean and standard deviation.

Shapes: B C T H W pixels, b c t h w latents. Latents are the posterior's mean, not normalised; LatentDataset normalises.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, cast

import numpy as np
import torch
from annotated_types import Gt, Len, Lt
from pydantic import ConfigDict, PositiveInt
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import TypedDict

from promag.training.config import UserError
from promag.training.processes import broadcast_from_main, processes, wait_for_everyone
from promag.training.progress import ProgressBar

from .cache_store import (
    CACHE_DTYPES,
    Fingerprint,
    Index,
    Shards,
    clips_of,
    finish,
    open_or_resume_cache,
    pack_texts,
    shard_path,
    write_shard,
)
from .caption_weights import CaptionWeight, clip_weights
from .text_cache import EmbeddingCache

# Legal statistics of a channel, with which no latent overflows in float32. The least deviation that a cache writes is 1e-6.
LEAST_DEVIATION, LARGEST = 1e-7, 1e9


class _LatentSource(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow", strict=True)  # pyright: ignore[reportGeneralTypeIssues]

    ratio: PositiveInt
    clips: str


class LatentIndex(Index):
    """What the index of a cache of latents states."""

    fingerprint: _LatentSource  # pyright: ignore[reportIncompatibleVariableOverride, reportGeneralTypeIssues]
    shape: Annotated[list[PositiveInt], Len(4, 4)]  # c t h w
    mean: list[float]
    std: list[float]
    fps: Annotated[float, Gt(0), Lt(math.inf)]  # median of the clips


Encode = Callable[[Tensor, Sequence[int]], Sequence[Tensor]]
Scale = Literal["channel", "global"]


@dataclass(frozen=True)
class LatentFingerprint(Fingerprint):
    """Identity of the inputs of a cache of latents."""

    hashed: ClassVar[Mapping[str, str]] = {
        "tokenizer": "another tokenizer",
        "clips": "other clips, or clips of another generator (data/synthetic.py)",
    }

    tokenizer: str  # hash of the weights
    clips: str  # hash of the clip list
    ratio: int
    frames: int
    height: int
    width: int
    dtype: str
    shard_size: int
    drawn_clips: int | None = field(
        default=None, kw_only=True
    )  # how many, where a training draws them; earlier versions had none


class ClipsToCache(Protocol):
    """Clips to cache: clip i is a mapping with video (C T H W), caption and fps.

    Those whose captions may be corrected apart from their videos also have `caption(index)`.
    """

    def fixed(self, index: int) -> Mapping[str, Any]:
        """Return clip `index`."""
        ...


@dataclass(frozen=True)
class _Reading(Dataset):
    """Clips as a map-style dataset that passes on what is cached, so that worker processes can decode them."""

    clips: ClipsToCache

    def __getitem__(self, index: int) -> tuple[Tensor, str, float]:
        clip = self.clips.fixed(index)
        return clip["video"], str(clip["caption"]), float(clip["fps"])


def write_latents(
    caches: Mapping[Path, LatentFingerprint],
    count: int,
    clips: ClipsToCache,
    encode: Encode,
    batch_size: int = 8,
    workers: int = 0,
) -> list[Path]:
    """Encode clips 0 to count - 1, at several ratios at once, where they are not cached yet; return the folders.

    The processes that run together divide the missing shards among them. Each shard, and the statistics, are the same for any
    number of processes and interruptions.

    Args:
        caches: fingerprint of each cache, by its folder. An interrupted cache continues at the first missing shard.
        count: clips in all.
        clips: the clips to encode.
        encode: B C T H W and ratios -> b c t h w for each of those ratios.
        batch_size: clips per call of `encode`.
        workers: processes that decode clips ahead for each process that encodes; 0 decodes in that one.

    Raises UserError where a folder holds something else.
    """
    shard_size = next(iter(caches.values())).shard_size
    shards = math.ceil(count / shard_size)
    opened = broadcast_from_main(
        lambda: {folder: open_or_resume_cache(folder, wanted, shards) for folder, wanted in caches.items()}
    )
    unfinished = {folder: todo for folder, todo in opened.items() if todo is not None}
    if not unfinished:
        return list(caches)
    state, started, captioned = processes(), time.perf_counter(), cast(Any, clips)
    for folder, (_, outdated) in unfinished.items():
        for number in outdated[state.process_index :: state.num_processes]:
            captions = [captioned.caption(clip) for clip in clips_of(number, shard_size, count)]
            _correct_captions(folder, number, caches[folder], captions)
        if outdated and state.is_main_process:
            print(f"{folder}: captions have changed since; its latents are kept", flush=True)
    numbers = sorted({number for missing, _ in unfinished.values() for number in missing})
    mine = _Batches(numbers[state.process_index :: state.num_processes], count, shard_size, batch_size)
    holders = {folder: (caches[folder], frozenset(missing)) for folder, (missing, _) in unfinished.items()}
    if numbers:
        _write_shards(holders, mine, clips, encode, workers, state.is_main_process)
    wait_for_everyone()
    if state.is_main_process:
        for folder in unfinished:
            finish(folder, caches[folder], count, shard_size, **_statistics(folder, shards))
        frames = next(iter(caches.values())).frames * sum(len(clips_of(n, shard_size, count)) for n in numbers)
        if numbers:
            _print_speed(frames, time.perf_counter() - started, state.num_processes)
    wait_for_everyone()
    return list(caches)


def _correct_captions(folder: Path, number: int, fingerprint: LatentFingerprint, captions: Sequence[str]) -> None:
    """Replace a shard's captions where they differ from the given ones; its latents stay."""
    tensors, texts = load_file(shard_path(folder, number)), pack_texts(captions)
    if any(not torch.equal(tensors[name], text) for name, text in texts.items()):
        write_shard(folder, number, fingerprint, {**tensors, **texts})


@dataclass(frozen=True)
class _Batches:
    """Order in which clips are read for some shards, in batches that never cross shards."""

    shards: Sequence[int]
    clips: int
    shard_size: int
    batch_size: int

    def of(self, shard: int) -> Iterator[range]:
        """Yield the batches of one shard."""
        indices = clips_of(shard, self.shard_size, self.clips)
        for first in range(0, len(indices), self.batch_size):
            yield indices[first : first + self.batch_size]

    def __iter__(self) -> Iterator[range]:
        for shard in self.shards:
            yield from self.of(shard)


def _write_shards(
    caches: Mapping[Path, tuple[LatentFingerprint, frozenset[int]]],
    batches: _Batches,
    clips: ClipsToCache,
    encode: Encode,
    workers: int,
    show: bool,
) -> None:
    """Write this process's shards, each into the caches that lack it; what several ratios share is computed once."""
    order: Any = batches  # DataLoader declares lists; these are ranges
    pin = torch.device(processes().device or "cpu").type == "cuda"
    # Pinned, so that copying does not wait for the device; put together by the workers, because here it would hold it up.
    read = iter(DataLoader(_Reading(clips), batch_sampler=order, num_workers=workers, pin_memory=pin))
    total = sum(len(clips_of(shard, batches.shard_size, batches.clips)) for shard in batches.shards)
    bar = ProgressBar(total=total, desc="caching latents", unit="clip", disable=not show)
    for shard in batches.shards:
        lacking = {folder: fingerprint for folder, (fingerprint, missing) in caches.items() if shard in missing}
        ratios = [fingerprint.ratio for fingerprint in lacking.values()]
        latents: dict[Path, list[Tensor]] = {folder: [] for folder in lacking}
        captions, rates = [], []
        for _ in batches.of(shard):
            videos, texts, fps = next(read)
            for (folder, fingerprint), z in zip(lacking.items(), encode(videos, ratios), strict=True):
                latents[folder].append(z.to(CACHE_DTYPES[fingerprint.dtype]))
            captions += texts
            rates.append(fps)
            bar.update(len(texts))
        facts = {**pack_texts(captions), "fps": torch.cat(rates)}
        for folder, parts in latents.items():
            z = torch.cat(parts).cpu()  # once a shard: a device encodes the next batch while this process waits for clips
            _check_finite(z, folder, clips_of(shard, batches.shard_size, batches.clips))
            write_shard(folder, shard, caches[folder][0], {"latents": z, **facts, **_sums(z)})
    bar.close()


def _check_finite(latents: Tensor, folder: Path, clips: range) -> None:
    """Raise UserError naming the clips whose latents are NaN or infinite."""
    broken = [clip for clip, z in zip(clips, latents, strict=True) if not z.isfinite().all()]
    if broken:
        raise UserError(
            f"cache {folder}: latents of clips {', '.join(map(str, broken[:5]))} are not finite ({len(broken)} of {len(clips)} "
            "in this shard); look at these clips, try --precision fp32 or --data.dtype float32"
        )


def _sums(latents: Tensor) -> dict[str, Tensor]:
    x = latents.double()
    return {"sum": x.sum((0, 2, 3, 4)), "squares": x.square().sum((0, 2, 3, 4))}


def _statistics(folder: Path, shards: int) -> dict[str, Any]:
    """Mean and deviation of each channel over the whole cache, the shape of one latent, the median frame rate.

    Shards are added up in their order, in float64: which process wrote one makes no difference.
    """
    total, squares, values, shape, rates = 0.0, 0.0, 0, [], []
    for number in range(shards):
        with safe_open(shard_path(folder, number), "pt") as file:
            n, *shape = file.get_slice("latents").get_shape()
            total, squares = total + file.get_tensor("sum"), squares + file.get_tensor("squares")
            rates.append(file.get_tensor("fps").numpy())
        values += n * math.prod(shape[1:])
    mean = torch.as_tensor(total) / values
    std = (torch.as_tensor(squares) / values - mean.square()).clamp_min(1e-12).sqrt()
    return {"shape": shape, "mean": mean.tolist(), "std": std.tolist(), "fps": float(np.median(np.concatenate(rates)))}


def _print_speed(frames: int, seconds: float, number: int) -> None:
    on = f" on {number} processes" if number > 1 else ""
    print(f"cached {frames} frames in {seconds:.1f} s: {frames / seconds:.1f} frames/s{on}", flush=True)


class LatentDataset(Dataset):
    """Normalised latents of a whole cache, in the order of any clip source, with the cached embeddings of their captions.

    An item is a dictionary: latents (float32 c t h w), ratio, caption, fps, clip (index), and for each of `texts` what
    EmbeddingCache.row gives. Latents have zero mean over the cache in each channel, and unit deviation: of each channel with
    scale "channel", over all channels with "global".

    Raises UserError for a folder that holds no whole cache, or one of another ratio, and for embeddings of other clips.
    """

    def __init__(
        self,
        folder: str | Path,
        ratio: int | None = None,
        scale: Scale = "channel",
        texts: Sequence[EmbeddingCache] = (),
    ):
        self.shards = Shards(Path(folder), LatentIndex)
        self.index, self.texts = self.shards.index, texts
        self.ratio = self.index["fingerprint"]["ratio"]
        if ratio not in (None, self.ratio):
            raise UserError(f"latent cache {folder}: holds {self.ratio}x latents, {ratio}x is asked for")
        for text in texts:
            if text.clips != self.index["fingerprint"]["clips"]:
                raise UserError(f"cache {text.folder}: its embeddings belong to other clips than the latents in {folder}")
        self.fps: float = self.index["fps"]  # median of the clips
        self.weights: np.ndarray | None = None  # how often each clip comes in an epoch; see `weight_by_caption`
        mean, std = (np.array(self.index[key], float) for key in ("mean", "std"))
        channels = (self.index["shape"][0],)
        legal = (np.abs(mean) <= LARGEST).all() and ((std >= LEAST_DEVIATION) & (std <= LARGEST)).all()
        if not mean.shape == std.shape == channels or not legal:
            raise UserError(
                f"latent cache {folder}: index.json needs a mean up to {LARGEST:g} and a deviation from {LEAST_DEVIATION:g} to "
                f"{LARGEST:g} for each of {channels[0]} channels; delete index.json and repeat the command that wrote the cache"
            )
        self.shards.rows |= {"latents": self.index["shape"], "fps": ()}
        self.normalise_by(self.index["mean"], self.index["std"], scale)

    def normalise_by(self, mean: Sequence[float], std: Sequence[float], scale: Scale) -> None:
        """Normalise by the given mean and deviation of each channel from now on."""
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (mean, std))
        if scale == "global":
            self.std = self.std.square().mean().sqrt().expand_as(self.std)

    def __len__(self) -> int:
        """Count the clips."""
        return self.shards.clips

    def captions(self) -> Iterator[str]:
        """Yield the captions of all clips in order."""
        return self.shards.captions()

    def item(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """Return the latents of clip `index`; `rng` is not used."""
        return self.fixed(index)

    def fixed(self, index: int) -> dict[str, Any]:
        """Return the latents of clip `index`."""
        shard, row = self.shards.place(index)
        latents, fps = shard.get_slice("latents")[row], float(shard.get_slice("fps")[row])
        if not (latents.is_floating_point() and latents.isfinite().all() and 0 < fps < math.inf):
            raise self.shards.damaged(index, f"its latents are not finite, or its {fps} fps are not above 0")
        item = {"latents": (latents.float() - self.mean) / self.std, "ratio": self.ratio, "fps": fps}
        item |= {"caption": self.shards.caption(index), "clip": index}
        for text in self.texts:
            item |= text.row(index)
        return item


def normalise_alike(parts: Sequence[LatentDataset], scale: Scale) -> None:
    """Normalise the latents of several buckets, of one ratio, by the mean and deviation over all of them."""
    if len(parts) == 1:
        return
    values = np.array([len(part) * math.prod(part.index["shape"][1:]) for part in parts], float)
    means, stds = (np.array([part.index[key] for part in parts]) for key in ("mean", "std"))  # parts x channels
    weights = (values / values.sum())[:, None]
    mean = (weights * means).sum(0)
    std = np.sqrt((weights * (stds**2 + (means - mean) ** 2)).sum(0))  # variance within parts and between them
    for part in parts:
        part.normalise_by(mean.tolist(), std.tolist(), scale)


def weight_by_caption(by_bucket: Sequence[Sequence[LatentDataset]], caption_weights: Sequence[CaptionWeight]) -> None:
    """Set the clips' sampling weights from their captions; a bucket's clips have the same weights at each ratio.

    Raises UserError for words that no caption holds in any bucket.
    """
    if not caption_weights:
        return
    weighted = [clip_weights(parts[0].captions(), caption_weights) for parts in by_bucket]
    for weight, count in zip(caption_weights, np.sum([counts for _, counts in weighted], axis=0), strict=True):
        if not count:
            clips = sum(len(weights) for weights, _ in weighted)
            raise UserError(f"caption_weights on {weight.words!r}: none of the {clips} captions holds these words")
    for parts, (weights, _) in zip(by_bucket, weighted, strict=True):
        for latents in parts:
            latents.weights = weights
