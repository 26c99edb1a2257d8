"""Cached latents: each clip encoded once by the frozen tokenizer, in shards, with a fingerprint.

    cache/index.json            fingerprint, shapes, mean and std per channel: written last, so it marks a whole cache
    cache/fingerprint.json      written first: what an interrupted cache belongs to
    cache/shard-00000.safetensors  latents n c t h w; captions and frame rates in the header

Shapes: b c t h w. Latents are the posterior's mean, not normalised; LatentDataset normalises.
"""

import json
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


def write_cache(
    folder: Path,
    fingerprint: Fingerprint,
    count: int,
    read: Callable[[int], Mapping[str, Any]],
    encode: Callable[[Tensor], Tensor],
    shard_size: int = 64,
    batch_size: int = 8,
) -> Path:
    """Encode clips 0 to count - 1 that are not cached yet; return `folder`.

    Args:
        folder: of the cache; an interrupted one continues at the first missing shard.
        fingerprint: of what is cached; a folder that holds something else raises UserError.
        count: clips in all.
        read: returns clip i as a mapping with video (C T H W), caption and fps.
        encode: B C T H W -> b c t h w.
        shard_size: clips per file.
        batch_size: clips per call of `encode`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / "fingerprint.json"
    if mark.exists():
        fingerprint.check(json.loads(mark.read_text()), folder)
    else:
        write_atomically(mark, json.dumps(asdict(fingerprint)))
    if (folder / "index.json").exists():
        return folder
    firsts = range(0, count, shard_size)
    missing = [i for i in range(len(firsts)) if not _shard(folder, i).exists()]
    bar = tqdm(total=count, desc=f"latents {fingerprint.ratio}x", unit="clip", mininterval=2)
    bar.update(count - sum(min(shard_size, count - firsts[i]) for i in missing))
    for i in missing:
        latents, captions, rates = [], [], []
        indices = range(firsts[i], min(firsts[i] + shard_size, count))
        for batch in _batches(indices, batch_size):
            clips = [read(index) for index in batch]
            latents.append(encode(torch.stack([clip["video"] for clip in clips])).to(DTYPES[fingerprint.dtype]).cpu())
            captions += [str(clip["caption"]) for clip in clips]
            rates += [float(clip["fps"]) for clip in clips]
            bar.update(len(batch))
        aside = folder / f".shard-{i:05d}"
        header = {"captions": json.dumps(captions), "fps": json.dumps(rates)}
        save_file({"latents": torch.cat(latents).contiguous()}, aside, metadata=header)
        aside.rename(_shard(folder, i))
    bar.close()
    mean, std, shape = _statistics(folder, len(firsts))
    index = {
        **{"fingerprint": asdict(fingerprint), "clips": count, "shards": len(firsts), "shard_size": shard_size},
        **{"shape": shape, "mean": mean, "std": std},
    }
    write_atomically(folder / "index.json", json.dumps(index, indent=1))
    return folder


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

    An item is a dictionary: latents (float32 c t h w), caption, fps, clip (index). Latents have zero mean over the cache in
    each channel, and unit deviation: of each channel with scale "channel", over all channels with "global". Raises
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
        return {"latents": latents, "caption": self.captions[index], "fps": self.fps[index], "clip": index}
