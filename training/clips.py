"""Captioned clips: an index made once by strict decoding, and datasets that sample from it without any state.

    list_videos -> prepare -> save_clips -> clips.jsonl -> load_clips -> ClipDataset -> TrainingStream

A clip is a stretch of a video at a stated rate: its frame k is the video's frame nearest to start + k / fps. Sampling
is addressed: whatever is drawn comes from a generator made of (seed, step, rank, element), so a run continues at any
step, with any number of loader workers, on the same data.

Shapes: T H W C uint8 pixels of files, C T H W float32 in [-1, 1] of items, B C T H W of batches.
"""

import csv
import dataclasses
import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from tqdm import tqdm

from . import shapes
from .config import UserError
from .run import write_atomically
from .video import (
    READ_TIMEOUT,
    TIE,
    UnreadableVideo,
    VideoFacts,
    decode_strictly,
    frame_times,
    pick_by_time,
    read_frames,
)

VIDEO_EXTENSIONS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")

_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=1)]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Clip:
    """One line of a clip index."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    path: Annotated[str, Field(min_length=1)]  # of the video
    start: Annotated[float, Field(ge=0, allow_inf_nan=False)]  # seconds after the video's first frame
    frames: _Count  # at `fps`
    fps: _Positive
    width: _Count  # of the video
    height: _Count
    caption: str
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]  # of the video file


@dataclass(frozen=True)
class PreparedClips:
    """What `prepare` made of a list of videos, and what it left out."""

    clips: list[Clip]
    quarantined: list[tuple[str, str]]  # path, reason
    too_short: list[tuple[str, int]]  # path, frames at the asked rate
    slower: list[tuple[str, float]]  # path, own rate: below the asked one, so frames repeat
    dropped_frames: int  # of the remainders behind the last whole window


# -- finding videos --------------------------------------------------------------------------------------------------


def list_videos(source: str | os.PathLike, split: str | None = None) -> list[tuple[str, str]]:
    """Return (absolute path, caption) of each video in `source`.

    A CSV or JSONL file has columns `file` (relative to itself) and `caption`; `split` keeps the rows whose `split`
    column says so. A folder is searched recursively, hidden files aside; captions come from a CSV file in it that has
    those columns (captions.csv and manifest.csv first), else from the file names, as does that of a single video.
    Raises UserError for what is missing, empty, listed but absent, or not to be understood.
    """
    source = Path(os.path.abspath(source))
    if not source.exists():
        raise UserError(f"{source}: no such file or folder")
    if source.suffix.lower() in (".csv", ".jsonl"):
        rows = _read_table(source)
        if not rows:
            raise UserError(f"{source}: needs rows with the columns file and caption")
        return _select(source, rows, split)
    table = _find_table(source) if source.is_dir() else None
    if split is not None:
        if table is None:
            raise UserError(f"{source}: split {split!r} needs a CSV or JSONL file with a column split")
        return _select(table, _read_table(table), split)
    if not source.is_dir():
        return [(str(source), caption_from_name(source))]
    listed = _select(table, _read_table(table), None) if table else []
    known = {path for path, _ in listed}
    found = (path for path in source.rglob("*") if path.suffix.lower() in VIDEO_EXTENSIONS and str(path) not in known)
    unnamed = [path for path in found if not any(part.startswith(".") for part in path.relative_to(source).parts)]
    if not listed and not unnamed:
        raise UserError(f"{source}: holds no video ({' '.join(VIDEO_EXTENSIONS)})")
    if listed and unnamed:
        names = _first(map(str, sorted(unnamed)))
        logger.warning("%d videos have no row in %s, their names are their captions: %s", len(unnamed), table, names)
    return sorted([*listed, *((str(path), caption_from_name(path)) for path in unnamed)])


def caption_from_name(path: str | os.PathLike) -> str:
    """Return what a file name says: `a_red-kite_03.mp4` -> `a red kite`; empty where only numbers stand."""
    return re.sub(r"[\d ]+$", "", re.sub(r"[_\-\s]+", " ", Path(path).stem)).strip()


def _find_table(folder: Path) -> Path | None:
    tables = sorted(folder.glob("*.csv"), key=lambda p: (p.name != "captions.csv", p.name != "manifest.csv", p.name))
    with_captions = [table for table in tables if _read_table(table)]
    if len(with_captions) > 1 and with_captions[0].name not in ("captions.csv", "manifest.csv"):
        names = ", ".join(table.name for table in with_captions)
        raise UserError(f"{folder}: {names} all hold captions; name one of them in place of the folder")
    return with_captions[0] if with_captions else None


def _read_table(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a CSV or JSONL file, or none where a row lacks the columns file and caption."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file)) if path.suffix.lower() == ".csv" else [json.loads(line) for line in file]
    except (UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read as {path.suffix[1:].upper()}: {error}") from None
    return rows if all(isinstance(row, dict) and {"file", "caption"} <= row.keys() for row in rows) else []


def _select(table: Path, rows: list[dict[str, Any]], split: str | None) -> list[tuple[str, str]]:
    if split is not None:
        splits = sorted({str(row.get("split")) for row in rows})
        rows = [row for row in rows if row.get("split") == split]
        if not rows:
            raise UserError(f"{table}: no row has split {split!r}; splits there: {', '.join(splits)}")
    bad = [
        row for row in rows if not (row["file"] and isinstance(row["file"], str) and isinstance(row["caption"], str))
    ]
    if bad:
        raise UserError(f"{table}: {len(bad)} rows lack a file or a caption, the first is {bad[0]}")
    videos = [(os.path.normpath(table.parent / row["file"]), row["caption"].strip()) for row in rows]
    missing = [path for path, _ in videos if not os.path.isfile(path)]
    if missing:
        raise UserError(f"{table}: lists {len(missing)} files that are not there: {_first(missing)}")
    return videos


def _first(names: Iterable[str], limit: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


# -- preparing an index ----------------------------------------------------------------------------------------------


def prepare(
    videos: Sequence[tuple[str, str]],
    fps: float | None = None,
    frames: int | None = None,
    max_bad: float = 0.01,
    workers: int = 2,
    progress: bool = True,
) -> PreparedClips:
    """Decode each (path, caption) once, strictly, and cut it into clips.

    Args:
        videos: as `list_videos` returns them.
        fps: rate of the clips; None keeps each video's own average rate.
        frames: cut consecutive windows of so many frames, without overlap; None makes one clip of each video.
        max_bad: the part of the videos, 0 to 1, that may be unreadable.
        workers: threads that decode; the decoder works outside Python's lock.
        progress: show a bar.

    Raises UserError naming all unreadable videos if they are more than `max_bad`, and if no clip is left.
    """
    positive = (1 if fps is None else fps, 1 if frames is None else frames, workers, len(videos))
    if min(positive) <= 0 or not 0 <= max_bad <= 1:
        raise UserError(
            f"fps {fps}, frames {frames}, max_bad {max_bad}, workers {workers}, {len(videos)} videos: "
            "max_bad is from 0 to 1, the others are above 0"
        )
    clips, quarantined, too_short, slower, dropped, longest = [], [], [], [], 0, ("", 0)
    pool = ThreadPoolExecutor(workers)
    try:
        examined = pool.map(_examine, [path for path, _ in videos])
        bar = tqdm(examined, total=len(videos), desc="decoding", unit="video", disable=not progress)
        for (path, caption), found in zip(videos, bar, strict=True):
            if isinstance(found, UnreadableVideo):
                quarantined.append((path, found.reason))
                continue
            facts, digest = found
            rate = fps or facts.fps
            available = int(facts.timestamps[-1] * rate + TIE) + 1
            longest = max(longest, (path, available), key=lambda video: video[1])
            window = frames or available
            if available < window:
                too_short.append((path, available))
                continue
            if rate > facts.fps * (1 + TIE):
                slower.append((path, facts.fps))
            dropped += available % window
            for first in range(0, available - window + 1, window):
                clips.append(Clip(path, first / rate, window, rate, facts.width, facts.height, caption, digest))
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupted call must not decode the rest first
    if len(quarantined) > max_bad * len(videos) or len(quarantined) == len(videos):
        reasons = "; ".join(f"{path}: {reason}" for path, reason in quarantined)
        raise UserError(
            f"{len(quarantined)} of {len(videos)} videos are unreadable, at most {max_bad:.1%} may be; "
            f"remove them, re-encode them or raise max_bad: {reasons}"
        )
    if not clips:
        raise UserError(f"no video has {frames} frames: the longest, {longest[0]}, has {longest[1]}; ask for fewer")
    return PreparedClips(clips, quarantined, too_short, slower, dropped)


def _examine(path: str) -> tuple[VideoFacts, str] | UnreadableVideo:
    try:
        facts = decode_strictly(path)
    except UnreadableVideo as error:
        return error
    with open(path, "rb") as file:
        return facts, hashlib.file_digest(file, "sha256").hexdigest()


def save_clips(path: str | os.PathLike, clips: Sequence[Clip]) -> None:
    """Write the index, complete or not at all; videos below its folder are named relative to it."""
    folder = Path(os.path.abspath(path)).parent
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for clip in clips:
        video = Path(os.path.abspath(clip.path))
        name = video.relative_to(folder).as_posix() if video.is_relative_to(folder) else str(video)
        lines.append(json.dumps(dataclasses.asdict(clip) | {"path": name}, ensure_ascii=False) + "\n")
    write_atomically(path, "".join(lines))


def load_clips(path: str | os.PathLike) -> list[Clip]:
    """Read an index that `save_clips` wrote, with absolute paths.

    Raises UserError, with the line's number, for unknown or missing keys, wrong types and videos that are not there.
    """
    path = Path(os.path.abspath(path))
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a clip index: {error}") from None
    adapter, clips = TypeAdapter(Clip), []
    for number, line in enumerate(lines, 1):
        try:
            clip = adapter.validate_json(line, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise UserError(f"{path}, line {number}: {where + ': ' if where else ''}{first['msg']}") from None
        video = os.path.normpath(path.parent / clip.path)
        if not os.path.isfile(video):
            raise UserError(f"{path}, line {number}: {video} is not there; prepare the clips again")
        clips.append(dataclasses.replace(clip, path=video))
    if not clips:
        raise UserError(f"{path}: holds no clips")
    return clips


# -- datasets --------------------------------------------------------------------------------------------------------


class ClipDataset(Dataset):
    """Windows of `frames` frames, resized and cropped to `size`, of the clips that are long enough.

    An item is a dictionary: video (float32 C T H W in [-1, 1]), caption, clip (index), start (the window's first frame
    in the clip), stride (clip frames from one frame to the next), fps (of the window). Reading raises UnreadableVideo.

    Args:
        clips: of one index; those too short for the smallest stride and for stride 1 are left out and named in the log.
        frames: T.
        size: H and W; an int is both. The picture is scaled to cover it and cropped.
        temporal_strides: strides to choose from, of those that fit into the clip.
        flip: mirror windows at random, half of them. Captions that tell left from right become wrong.
        timeout: seconds a read may take.

    Raises UserError if no clip is long enough. `skipped` counts the clips left out.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        frames: int,
        size: int | tuple[int, int],
        temporal_strides: Sequence[int] = (1,),
        flip: bool = False,
        timeout: float = READ_TIMEOUT,
    ):
        self.frames, self.size, self.strides = _check_window(frames, size, temporal_strides)
        self.flip, self.timeout = flip, timeout
        needed = self._span(min(self.strides))
        self.clips = [clip for clip in clips if clip.frames >= needed]
        self.skipped = len(clips) - len(self.clips)
        if not self.clips:
            longest = max(clips, key=lambda clip: clip.frames)
            raise UserError(
                f"no clip has {needed} frames: the longest of {len(clips)}, {longest.path}, has {longest.frames}; "
                "ask for fewer frames or smaller strides"
            )
        if self.skipped:
            names = _first(f"{clip.path} ({clip.frames})" for clip in clips if clip.frames < needed)
            logger.warning("%d of %d clips are shorter than %d frames: %s", self.skipped, len(clips), needed, names)
        small = sum(clip.height < self.size[0] or clip.width < self.size[1] for clip in self.clips)
        if small:
            logger.warning("%d of %d clips are smaller than %dx%d and enlarged", small, len(self.clips), *self.size)

    def __len__(self) -> int:
        """Count the clips that are long enough."""
        return len(self.clips)

    def item(self, rng: np.random.Generator) -> dict[str, Any]:
        """Return a random window, at a random place, of a random clip."""
        index = int(rng.integers(len(self.clips)))
        clip = self.clips[index]
        stride = int(rng.choice([s for s in self.strides if self._span(s) <= clip.frames]))
        start = int(rng.integers(clip.frames - self._span(stride) + 1))
        video = self._resized(clip, start, stride)
        top, left = (int(rng.integers(have - want + 1)) for have, want in zip(video.shape[2:], self.size, strict=True))
        mirror = self.flip and bool(rng.integers(2))
        return self._item(index, start, stride, video, top, left, mirror)

    def fixed(self, index: int) -> dict[str, Any]:
        """Return the first `frames` frames of clip `index`, cropped in the centre."""
        video = self._resized(self.clips[index], 0, 1)
        top, left = ((have - want) // 2 for have, want in zip(video.shape[2:], self.size, strict=True))
        return self._item(index, 0, 1, video, top, left, False)

    def digest(self, count: int) -> str:
        """Hash the contents, stretches and captions of the first `count` clips; where the files lie does not matter."""
        rows = [dataclasses.asdict(clip) | {"path": ""} for clip in self.clips[:count]]
        return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()

    def _span(self, stride: int) -> int:
        return (self.frames - 1) * stride + 1

    def _resized(self, clip: Clip, start: int, stride: int) -> Tensor:
        """Read a window and scale it to cover `size`: uint8 T C H W."""
        offsets = start + stride * np.arange(self.frames)
        indices = pick_by_time(_frame_times(clip.path, self.timeout), clip.start + offsets / clip.fps)
        pixels = read_frames(clip.path, indices, self.timeout)
        video = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2)
        height, width = video.shape[2:]
        scale = max(self.size[0] / height, self.size[1] / width)
        new = [max(want, round(have * scale)) for have, want in zip((height, width), self.size, strict=True)]
        # In 8 bits this is eight times as fast as in float32, within one grey level of it. decord can decode to this
        # size itself; that saves a quarter at 720p and nothing at 256p, and its scaler aliases at the edges.
        return F.interpolate(video, new, mode="bilinear", antialias=True)

    def _item(
        self, index: int, start: int, stride: int, video: Tensor, top: int, left: int, mirror: bool
    ) -> dict[str, Any]:
        height, width = self.size
        video = video[:, :, top : top + height, left : left + width]
        return {
            "video": _to_model(video.flip(3) if mirror else video),
            "caption": self.clips[index].caption,
            "clip": index,
            "start": start,
            "stride": stride,
            "fps": self.clips[index].fps / stride,
        }


class ShapesDataset(Dataset):
    """The generated clips 0 to count - 1 of a split of `shapes`, with the interface and items of ClipDataset.

    Raises UserError for a size or count that cannot be generated.
    """

    skipped = 0

    def __init__(
        self, split: str, count: int, frames: int, size: int | tuple[int, int], temporal_strides: Sequence[int] = (1,)
    ):
        self.frames, (height, width), self.strides = _check_window(frames, size, temporal_strides)
        if height != width:
            raise UserError(f"size {height}x{width}: generated clips are square")
        if count < 1:
            raise UserError(f"count {count}: at least 1 generated clip is needed")
        self.split, self.count, self.size = split, count, height

    def __len__(self) -> int:
        """Count the clips."""
        return self.count

    def item(self, rng: np.random.Generator) -> dict[str, Any]:
        """Return a random clip at a random stride."""
        return self._item(int(rng.integers(self.count)), int(rng.choice(self.strides)))

    def fixed(self, index: int) -> dict[str, Any]:
        """Return clip `index` at its own rate."""
        if not 0 <= index < self.count:
            raise IndexError(f"clip {index}: legal are 0 to {self.count - 1}")
        return self._item(index, 1)

    def digest(self, count: int) -> str:
        """Hash the split, the count and the first clip's pixels, which change when the generator does."""
        pixels, _ = shapes.clip(0, self.split, frames=self.frames, size=self.size)
        return hashlib.sha256(f"shapes {self.split} {count} ".encode() + pixels.tobytes()).hexdigest()

    def _item(self, index: int, stride: int) -> dict[str, Any]:
        span = (self.frames - 1) * stride + 1
        pixels, scene = shapes.clip(index, self.split, frames=span, size=self.size)
        return {
            "video": _to_model(torch.from_numpy(pixels[::stride]).permute(0, 3, 1, 2)),
            "caption": scene.caption(),
            "clip": index,
            "start": 0,
            "stride": stride,
            "fps": shapes.FPS / stride,
        }


class TrainingStream(IterableDataset):
    """An endless stream of batches for one rank, from `first_step` on; the batch of a step depends on nothing else.

    Element b of step s on rank r is drawn by `default_rng((seed, s, r, b))`. Read it through
    `DataLoader(stream, batch_size=None, num_workers=any)`: batches come in the order of their steps. A batch holds the
    keys of an item, collated (video B C T H W, caption a list, numbers as tensors), and step.
    """

    def __init__(
        self,
        dataset: "ClipDataset | ShapesDataset",
        seed: int,
        batch_size: int,
        rank: int,
        world_size: int,
        first_step: int = 0,
    ):
        if not 0 <= rank < world_size or batch_size < 1 or seed < 0 or first_step < 0:
            raise ValueError(
                f"rank {rank} of {world_size}, batch_size {batch_size}, seed {seed}, first_step {first_step}: "
                "0 <= rank < world_size, batch_size >= 1, seed >= 0, first_step >= 0 are legal"
            )
        self.dataset, self.seed, self.batch_size = dataset, seed, batch_size
        self.rank, self.first_step = rank, first_step

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield this worker's share: worker w of W makes the whole batches of steps first_step + w, + W, ..."""
        worker = get_worker_info()
        step, stride = (self.first_step + worker.id, worker.num_workers) if worker else (self.first_step, 1)
        while True:
            yield self.batch(step)
            step += stride

    def batch(self, step: int) -> dict[str, Any]:
        """Return the batch of one step."""
        rngs = (np.random.default_rng((self.seed, step, self.rank, b)) for b in range(self.batch_size))
        items = [self.dataset.item(rng) for rng in rngs]
        batch = {key: [item[key] for item in items] for key in items[0]}
        numbers = {key: torch.tensor(batch[key]) for key in ("clip", "start", "stride", "fps")}
        return {**batch, **numbers, "video": torch.stack(batch["video"]), "step": step}


def _collate(values: list[Any]) -> Any:
    if isinstance(values[0], Tensor):
        return torch.stack(values)
    return values if isinstance(values[0], str) else torch.tensor(values)


def open_dataset(
    source: str | os.PathLike,
    split: str,
    frames: int,
    size: int | tuple[int, int],
    count: int,
    temporal_strides: Sequence[int] = (1,),
    flip: bool = False,
    timeout: float = READ_TIMEOUT,
) -> ClipDataset | ShapesDataset:
    """Open `shapes` (generated clips: `count` of `split`) or a clip index (.jsonl, which is one split, taken whole).

    Raises UserError for another source, and what the datasets raise.
    """
    if source == "shapes":
        return ShapesDataset(split, count, frames, size, temporal_strides)
    if Path(source).suffix != ".jsonl":
        raise UserError(f"clips {os.fspath(source)!r}: give shapes, or a .jsonl index made by scripts/prepare_clips.py")
    return ClipDataset(load_clips(source), frames, size, temporal_strides, flip, timeout)


def _check_window(
    frames: int, size: int | tuple[int, int], strides: Sequence[int]
) -> tuple[int, tuple[int, int], tuple[int, ...]]:
    height, width = (size, size) if isinstance(size, int) else size
    if frames < 1 or height < 1 or width < 1 or not strides or min(strides) < 1:
        raise UserError(f"frames {frames}, size {size}, temporal_strides {strides}: whole numbers from 1 up are legal")
    return frames, (height, width), tuple(strides)


# Opening a file for its times takes 2 ms, a sixth of an item.
@functools.lru_cache(maxsize=4096)
def _frame_times(path: str, timeout: float) -> np.ndarray:
    return frame_times(path, timeout)


def _to_model(video: Tensor) -> Tensor:
    """Turn uint8 T C H W into float32 C T H W in [-1, 1]."""
    return video.permute(1, 0, 2, 3).to(torch.float32, memory_format=torch.contiguous_format) / 127.5 - 1
