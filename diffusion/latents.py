"""Cached latents: each clip encoded once by the frozen tokenizer, in shards, with a fingerprint.

    cache/index.json            fingerprint, shapes, mean and std per channel: written last, so it marks a whole cache
    cache/fingerprint.json      written first: what an interrupted cache belongs to
    cache/shard-00000.safetensors  latents n c t h w; captions and frame rates in the header

Shapes: b c t h w. Latents are the posterior's mean, not normalised; LatentDataset normalises.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ..training.config import UserError
from ..training.run import write_atomically

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Fingerprint:
    """What a cache was made from; two caches are interchangeable only if all of it agrees."""

    tokenizer: str  # hash of the weights
    clips: str  # hash of the clip list
    ratio: int
    frames: int
    height: int
    width: int
    dtype: str

    def check(self, other: Mapping[str, Any], place: Path) -> None:
        """Raise UserError naming what differs between a cache found in `place` and the one asked for."""
        names = {"tokenizer": "another tokenizer", "clips": "other clips"}
        differs = [
            names.get(key) or f"{key} {other.get(key)} instead of {value}"
            for key, value in asdict(self).items()
            if other.get(key) != value
        ]
        if differs:
            raise UserError(f"latent cache {place}: was made from {', '.join(differs)}; delete it or name another folder")


def write_caches(
    caches: Mapping[Path, Fingerprint],
    count: int,
    read: Callable[[int], Mapping[str, Any]],
    encode: Callable[[Tensor, Sequence[int]], Sequence[Tensor]],
    shard_size: int = 64,
    batch_size: int = 8,
) -> list[Path]:
    """Encode clips 0 to count - 1, at several ratios at once, where they are not cached yet; return the folders.

    Args:
        caches: folder of each cache, and what it is to hold. An interrupted one continues at the first missing shard; a
            folder that holds something else raises UserError.
        count: clips in all.
        read: returns clip i as a mapping with video (C T H W), caption and fps.
        encode: B C T H W and ratios -> b c t h w for each of those ratios.
        shard_size: clips per file.
        batch_size: clips per call of `encode`.
    """
    for folder, fingerprint in caches.items():
        folder.mkdir(parents=True, exist_ok=True)
        mark = folder / "fingerprint.json"
        if mark.exists():
            fingerprint.check(json.loads(mark.read_text()), folder)
        else:
            write_atomically(mark, json.dumps(asdict(fingerprint)))
    unfinished = {folder: fingerprint for folder, fingerprint in caches.items() if not (folder / "index.json").exists()}
    if not unfinished:
        return list(caches)
    shards = math.ceil(count / shard_size)
    wanted = {i: [folder for folder in unfinished if not _shard(folder, i).exists()] for i in range(shards)}
    ratios = " and ".join(f"{fingerprint.ratio}x" for fingerprint in unfinished.values())
    bar = tqdm(total=count, desc=f"latents {ratios}", unit="clip", mininterval=2)
    for i, folders in wanted.items():
        clips = range(i * shard_size, min((i + 1) * shard_size, count))
        if folders:
            _write_shards(i, {folder: caches[folder] for folder in folders}, clips, read, encode, batch_size, bar)
        else:
            bar.update(len(clips))
    bar.close()
    for folder, fingerprint in unfinished.items():
        mean, std, shape = _statistics(folder, shards)
        index = {
            **{"fingerprint": asdict(fingerprint), "clips": count, "shards": shards, "shard_size": shard_size},
            **{"shape": shape, "mean": mean, "std": std},
        }
        write_atomically(folder / "index.json", json.dumps(index, indent=1))
    return list(caches)


def _write_shards(
    number: int,
    caches: Mapping[Path, Fingerprint],
    indices: Sequence[int],
    read: Callable[[int], Mapping[str, Any]],
    encode: Callable[[Tensor, Sequence[int]], Sequence[Tensor]],
    batch_size: int,
    bar: tqdm,
) -> None:
    """Write one shard of each cache; what encoding at several ratios shares is computed once."""
    ratios = [fingerprint.ratio for fingerprint in caches.values()]
    latents: dict[Path, list[Tensor]] = {folder: [] for folder in caches}
    captions, rates = [], []
    for batch in _batches(indices, batch_size):
        clips = [read(index) for index in batch]
        encoded = encode(torch.stack([clip["video"] for clip in clips]), ratios)
        for (folder, fingerprint), z in zip(caches.items(), encoded, strict=True):
            latents[folder].append(z.to(DTYPES[fingerprint.dtype]).cpu())
        captions += [str(clip["caption"]) for clip in clips]
        rates += [float(clip["fps"]) for clip in clips]
        bar.update(len(batch))
    header = {"captions": json.dumps(captions), "fps": json.dumps(rates)}
    for folder, parts in latents.items():
        aside = folder / f".shard-{number:05d}"
        save_file({"latents": torch.cat(parts).contiguous()}, aside, metadata=header)
        aside.rename(_shard(folder, number))


def _batches(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for first in range(0, len(indices), size):
        yield indices[first : first + size]


def _shard(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def _statistics(folder: Path, shards: int) -> tuple[list[float], list[float], list[int]]:
    """Mean and standard deviation of each channel over the whole cache, in float64; shape of one latent."""
    total, squares, values, shape = 0.0, 0.0, 0, []
    for i in range(shards):
        with safe_open(_shard(folder, i), "pt") as file:
            x = file.get_tensor("latents").double()
        shape, values = list(x.shape[1:]), values + x.numel() // x.shape[1]
        total, squares = total + x.sum((0, 2, 3, 4)), squares + x.square().sum((0, 2, 3, 4))
    mean = torch.as_tensor(total) / values
    std = (torch.as_tensor(squares) / values - mean.square()).clamp_min(1e-12).sqrt()
    return mean.tolist(), std.tolist(), shape


Scale = Literal["channel", "global"]


class LatentDataset(Dataset):
    """Normalised latents of a whole cache, sampled like any clip source.

    An item is a dictionary: latents (float32 c t h w), ratio, caption, fps, clip (index). Latents have zero mean over the
    cache in each channel, and unit deviation: of each channel with scale "channel", over all channels with "global". Raises
    UserError for a folder that holds no whole cache, or one of another ratio.
    """

    def __init__(self, folder: str | Path, ratio: int | None = None, scale: Scale = "channel"):
        folder = Path(folder)
        if not (folder / "index.json").exists():
            raise UserError(f"latent cache {folder}: no index.json there; write it with cache_latents.py, or let it finish")
        self.index = json.loads((folder / "index.json").read_text())
        self.ratio = self.index["fingerprint"]["ratio"]
        if ratio not in (None, self.ratio):
            raise UserError(f"latent cache {folder}: holds {self.ratio}x latents, {ratio}x is asked for")
        # Shards stay on disk, mapped into memory: one latent is read at a time.
        self.shards = [safe_open(_shard(folder, i), "pt") for i in range(self.index["shards"])]
        self.captions = [c for shard in self.shards for c in json.loads(shard.metadata()["captions"])]
        self.fps = [r for shard in self.shards for r in json.loads(shard.metadata()["fps"])]
        self.mean, self.std = (torch.tensor(self.index[k]).view(-1, 1, 1, 1) for k in ("mean", "std"))
        if scale == "global":
            self.std = self.std.square().mean().sqrt().expand_as(self.std)

    def __len__(self) -> int:
        """Count the clips."""
        return len(self.captions)

    def item(self, rng: np.random.Generator) -> dict[str, Any]:
        """Return a random clip's latents."""
        return self.fixed(int(rng.integers(len(self))))

    def fixed(self, index: int) -> dict[str, Any]:
        """Return the latents of clip `index`."""
        if not 0 <= index < len(self):
            raise IndexError(f"clip {index}: legal are 0 to {len(self) - 1}")
        shard, place = divmod(index, self.index["shard_size"])
        latents = (self.shards[shard].get_slice("latents")[place].float() - self.mean) / self.std
        return {"latents": latents, "ratio": self.ratio, "caption": self.captions[index], "fps": self.fps[index], "clip": index}
