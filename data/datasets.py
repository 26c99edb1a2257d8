"""Datasets of clips without any state: an index's, generated ones, and the opening of whatever a user names.

Shapes: C T H W float32 in [-1, 1].
"""

import hashlib
import inspect
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from promag.training.config import UserError

from . import synthetic
from .buckets import NONE, Bucket, Buckets
from .clip_index import Clip, Digests, column, digest_clips, load_clips, take
from .clip_memory import ClipMemory
from .clips import prepare
from .crops import ClipCrop, to_model
from .listing import first_few, list_videos
from .shards.index import is_shards, open_shards
from .shards.stream import ShardedClips
from .unchanged import check_unchanged

logger = logging.getLogger(__name__)


class ClipDataset(Dataset):
    """Crops of the clips of one index that are long enough.

    An item is a dictionary: video (float32 C T H W in [-1, 1]), caption, clip (index), start (the crop's first frame
    in the clip), stride (clip frames from one frame to the next), fps (of the crop). Reading raises UnreadableVideo, for a
    video that changed since it was prepared too.

    Args:
        clips: the clips of one index. Clips too short for the smallest stride and for stride 1 are left out and logged.
        frames, size, temporal_strides: see ClipCrop.
        in_memory: keep each clip's frames from its first reading on; see ClipMemory. The items are the same.

    Raises UserError if no clip is long enough, or there is not the memory. `skipped` counts the clips left out.
    """

    weights = None

    def __init__(
        self,
        clips: Sequence[Clip],
        frames: int,
        size: int | tuple[int, int],
        temporal_strides: Sequence[int] = (1,),
        in_memory: bool = False,
    ):
        self.crop = crop = ClipCrop(frames, size, temporal_strides)
        self._leave_out_short(clips)
        height, width = crop.size
        small = np.count_nonzero((column(self.clips, "height") < height) | (column(self.clips, "width") < width))
        if small:
            logger.warning("%d of %d clips are smaller than %dx%d and enlarged", small, len(self.clips), height, width)
        self.memory = ClipMemory(self.clips, crop) if in_memory else None

    def _leave_out_short(self, clips: Sequence[Clip]) -> None:
        frames, needed = column(clips, "frames"), self.crop.needed
        long = frames >= needed
        self.skipped = int(np.count_nonzero(~long))
        if not long.any():
            longest = clips[int(frames.argmax())]
            raise UserError(
                f"no clip has {needed} frames: the longest of {len(clips)}, {longest.path}, has {longest.frames}; "
                "ask for fewer frames or smaller strides"
            )
        if self.skipped:
            short = (clips[int(place)] for place in np.flatnonzero(~long))
            names = first_few((f"{clip.path} ({clip.frames})" for clip in short), count=self.skipped)
            logger.warning("%d of %d clips are shorter than %d frames: %s", self.skipped, len(clips), needed, names)
        self.clips = take(clips, np.flatnonzero(long)) if self.skipped else clips

    def __len__(self) -> int:
        """Count the clips that are long enough."""
        return len(self.clips)

    def item(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """Return a random crop of clip `index`."""
        clip = self.clips[index]
        return {"clip": index, **self.crop.random(self._video(index, clip), clip, rng)}

    def fixed(self, index: int) -> dict[str, Any]:
        """Return the first frames of clip `index`, cropped in the centre."""
        clip = self.clips[index]
        return {"clip": index, **self.crop.first(self._video(index, clip), clip)}

    def _video(self, index: int, clip: Clip) -> str | Tensor:
        if self.memory:
            return self.memory.frames(index, clip)
        check_unchanged(clip)
        return clip.path

    def caption(self, index: int) -> str:
        """Return the caption of clip `index`."""
        return self.clips[index].caption

    def digests(self, count: int) -> Digests:
        """Hash the first `count` clips, a row at a time."""
        return digest_clips(self.clips, min(count, len(self)))


class SyntheticDataset(Dataset):
    """The generated clips 0 to count - 1 of a split of `shapes`, with the interface and items of ClipDataset.

    A generated clip shows its whole motion whatever its length, so start is always 0 and stride 1.
    Raises UserError for a split, count, length or size that cannot be generated.
    """

    skipped, weights = 0, None

    def __init__(self, split: str, count: int, frames: int, size: int | tuple[int, int]):
        if count < 1:
            raise UserError(f"count {count}: at least 1 generated clip is needed")
        self.split, self.count, self.frames, self.size = split, count, frames, size
        try:
            self.fixed(0)
        except ValueError as error:
            raise UserError(str(error)) from None

    def __len__(self) -> int:
        """Count the clips."""
        return self.count

    def item(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """Return clip `index`; nothing of a generated clip is left to `rng`."""
        return self.fixed(index)

    def fixed(self, index: int) -> dict[str, Any]:
        """Return clip `index`."""
        if not 0 <= index < self.count:
            raise IndexError(f"clip {index}: legal are 0 to {self.count - 1}")
        pixels, scene = synthetic.clip(index, self.split, frames=self.frames, size=self.size)
        video = to_model(torch.from_numpy(pixels).permute(0, 3, 1, 2))
        return {"video": video, "caption": scene.caption(), "clip": index, "start": 0, "stride": 1, "fps": synthetic.FPS}

    def digests(self, count: int) -> Digests:
        """Hash the split, the count and the generator: its source, and some captions, which the random numbers decide.

        Pixels are left out: their last bit may differ from one processor to another.
        """
        captions = [synthetic.scene(index, self.split).caption() for index in range(min(count, 64))]
        facts = ["synthetic", self.split, count, captions, inspect.getsource(synthetic)]
        digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        return Digests(digest, digest)


def open_dataset(
    source: str | os.PathLike,
    split: str,
    frames: int,
    size: int | tuple[int, int],
    count: int,
    temporal_strides: Sequence[int] = (1,),
) -> "ClipDataset | SyntheticDataset | ShardedClips":
    """Open clips of one shape, to be shown by their number or trained on.

    `source` is `synthetic` (generated clips: `count` of `split`), a clip index (.jsonl, which is one split, taken whole) or a
    pattern of shards (.tar, the same). Raises UserError for another source, and what the datasets raise.
    """
    if source == "synthetic":
        if tuple(temporal_strides) != (1,):
            raise UserError(
                f"temporal_strides {list(temporal_strides)} with synthetic: a generated clip shows its whole motion whatever "
                "its length; use [1]"
            )
        return SyntheticDataset(split, count, frames, size)
    if is_shards(source):
        height, width = (size, size) if isinstance(size, int) else size
        return ShardedClips(open_shards(source), [Bucket(frames, height, width)], temporal_strides)
    return ClipDataset(load_index(source), frames, size, temporal_strides)


def open_evaluation(
    videos: str, split: str | None, frames: int, size: int, count: int
) -> "ClipDataset | SyntheticDataset | ShardedClips":
    """Open videos to evaluate a tokenizer on: what `open_dataset` opens, or `list_videos` lists (a folder, a table, one video).

    The latter are decoded strictly first; `split` keeps these rows of a table. A stretch of a video with several captions is
    one clip; samples of shards are taken as they are. Raises UserError as both do, and for `split` without a table.
    """
    is_whole = videos == "synthetic" or is_shards(videos)
    if split is not None and (is_whole or is_index(videos)):
        raise UserError(
            f"{videos}: split {split!r} needs a table with a column split; generated clips, a clip index and shards are taken "
            "whole; leave it out"
        )
    if is_whole:
        return open_dataset(videos, "eval", frames, size, count)
    clips = load_index(videos) if is_index(videos) else prepare(list_videos(videos, split)).clips
    return ClipDataset(_leave_out_captions(clips), frames, size)


def _leave_out_captions(clips: Sequence[Clip]) -> Sequence[Clip]:
    """Keep the first clip of each stretch of a video: further ones differ in their captions alone."""
    first: dict[tuple[str, float, int, float], int] = {}
    for place in range(len(clips)):
        clip = clips[place]
        first.setdefault((clip.path, clip.start, clip.frames, clip.fps), place)
    if more := len(clips) - len(first):
        logger.warning("%d of %d clips show the same frames as another, with another caption: left out", more, len(clips))
    return take(clips, np.array(list(first.values()))) if more else clips


def is_index(path: str | os.PathLike) -> bool:
    """Return whether a file is a clip index; a table of videos and captions may be JSONL too."""
    if Path(path).suffix.lower() != ".jsonl" or not Path(path).is_file():
        return False
    with open(path, "rb") as file:  # a table may have another encoding
        return b'"sha256"' in file.readline()


def open_by_bucket(
    source: str | os.PathLike, split: str, buckets: Sequence[Bucket], count: int
) -> list[tuple[Bucket, "ClipDataset | SyntheticDataset | ShardedClips"]]:
    """Open the clips of each bucket that has any as a dataset of its own.

    `source` and `count` are as for `open_dataset`; generated clips are there in every bucket. Raises UserError as that does,
    and where no clip is long enough for any bucket.
    """
    if len(buckets) == 1 or source == "synthetic":
        return [(b, open_dataset(source, split, b.frames, (b.height, b.width), count)) for b in buckets]
    if is_shards(source):
        parts = ShardedClips(open_shards(source), buckets).by_bucket()
        return [(part.buckets.buckets[0], part) for part in parts]
    used, parts = split_by_bucket(load_index(source), buckets, stride=1)
    return [(b, ClipDataset(part, b.frames, (b.height, b.width))) for b, part in zip(used, parts, strict=True)]


def load_index(source: str | os.PathLike) -> Sequence[Clip]:
    """Open a clip index; raises UserError, which says what sources there are, for another file."""
    if Path(source).suffix.lower() != ".jsonl":
        raise UserError(
            f"clips {os.fspath(source)!r}: give synthetic, or a .jsonl index made by `promag prepare-clips`, "
            "or shards as a pattern of .tar files"
        )
    return load_clips(source)


def split_by_bucket(clips: Sequence[Clip], buckets: Sequence[Bucket], stride: int) -> tuple[list[Bucket], list[Sequence[Clip]]]:
    """Return the buckets that have clips, and the clips of each; warn of clips without a bucket and of empty buckets."""
    assigned = Buckets(buckets, stride).assign(*(column(clips, name) for name in ("frames", "height", "width")))
    short = np.flatnonzero(assigned == NONE)
    names = first_few((f"{clips[int(k)].path} ({clips[int(k)].frames})" for k in short), count=len(short))
    if len(short) == len(clips):
        raise UserError(f"no clip of {len(clips)} is long enough for {', '.join(map(str, buckets))}: {names}")
    if len(short):
        logger.warning("%d of %d clips are too short for every bucket: %s", len(short), len(clips), names)
    used = [number for number in range(len(buckets)) if (assigned == number).any()]
    if len(used) < len(buckets):
        empty = ", ".join(str(bucket) for number, bucket in enumerate(buckets) if number not in used)
        logger.warning("no clip is for the buckets %s", empty)
    parts = [take(clips, np.flatnonzero(assigned == number)) for number in used]
    return [buckets[number] for number in used], parts
