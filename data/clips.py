"""Find captioned videos, decode each strictly once, and cut them into clips.

list_videos -> prepare -> save_clips -> clips.jsonl -> load_clips
"""

import csv
import hashlib
import itertools
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from promag.training.config import UserError
from promag.training.progress import ProgressBar

from .clip_index import Clip
from .images import IMAGE_EXTENSIONS
from .video import (
    TIE,
    UnreadableVideo,
    VideoFacts,
    decode_strictly,
)

VIDEO_EXTENSIONS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedClips:
    """The clips that `prepare` cut, and the videos it left out."""

    clips: list[Clip]
    quarantined: list[tuple[str, str]]  # path, reason
    too_short: list[tuple[str, int]]  # path, frames at the asked rate
    slower: list[tuple[str, float]]  # path, own rate: below the asked one, so frames repeat
    dropped_frames: int  # of the remainders behind the last whole window


# -- finding videos --------------------------------------------------------------------------------------------------


def list_videos(source: str | os.PathLike, split: str | None = None, images: bool = False) -> list[tuple[str, str]]:
    """Return (absolute path, caption) of each video in `source`.

    A CSV or JSONL file has columns `file` (relative to itself) and `caption`; `split` keeps the rows whose `split`
    column says so. A folder is searched recursively, hidden files aside; captions come from a CSV file in it that has
    those columns (captions.csv and manifest.csv first), else from the file names, as does that of a single video. Images,
    which are clips of one frame, are taken where a table lists them, and from a folder with `images`: else they may be its
    videos' covers.
    Raises UserError for what is missing, empty, listed but absent, or not to be understood.
    """
    source = Path(os.path.abspath(source))
    if not source.exists():
        raise UserError(f"{source}: no such file or folder")
    if source.suffix.lower() in (".csv", ".jsonl"):
        return _select(source, _read_table(source, strict=True), split)
    table = _find_table(source) if source.is_dir() else None
    if split is not None:
        if table is None:
            raise UserError(f"{source}: split {split!r} needs a CSV or JSONL file with a column split")
        return _select(table, _read_table(table), split)
    if not source.is_dir():
        return [(str(source), caption_from_name(source))]
    listed = _select(table, _read_table(table), None) if table else []
    known = {path for path, _ in listed}
    endings = VIDEO_EXTENSIONS + (IMAGE_EXTENSIONS if images else ())
    files = (path for path in source.rglob("*") if path.suffix.lower() in endings and str(path) not in known)
    unnamed = [path for path in files if not any(part.startswith(".") for part in path.relative_to(source).parts)]
    if not listed and not unnamed:
        raise UserError(f"{source}: holds no video ({' '.join(endings)})")
    if listed and unnamed:
        names = first_few(map(str, sorted(unnamed)))
        logger.warning("%d videos have no row in %s, their names are their captions: %s", len(unnamed), table, names)
    return sorted([*listed, *((str(path), caption_from_name(path)) for path in unnamed)])


def list_licences(source: str | os.PathLike) -> dict[str, str]:
    """Return the licence of each video, by absolute path, where the table that `list_videos` reads has a column `licence`."""
    source = Path(os.path.abspath(source))
    table = source if source.suffix.lower() in (".csv", ".jsonl") else _find_table(source) if source.is_dir() else None
    rows = _read_table(table) if table else []
    return {os.path.normpath(table.parent / row["file"]): str(row["licence"]) for row in rows if table and row.get("licence")}


def caption_from_name(path: str | os.PathLike) -> str:
    """Return a caption from a file name: `a_red-kite_03.mp4` -> `a red kite`; empty for a name of digits only."""
    return re.sub(r"[\d ]+$", "", re.sub(r"[_\-\s]+", " ", Path(path).stem)).strip()


def _find_table(folder: Path) -> Path | None:
    tables = sorted(folder.glob("*.csv"), key=lambda p: (p.name != "captions.csv", p.name != "manifest.csv", p.name))
    with_captions = [table for table in tables if _read_table(table)]
    if len(with_captions) > 1 and with_captions[0].name not in ("captions.csv", "manifest.csv"):
        names = ", ".join(table.name for table in with_captions)
        raise UserError(f"{folder}: {names} all hold captions; name one of them in place of the folder")
    return with_captions[0] if with_captions else None


def _read_table(path: Path, strict: bool = False) -> list[dict[str, Any]]:
    """Return the rows of a CSV or JSONL file; where one lacks file or caption none, or with `strict` UserError."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            is_csv = path.suffix.lower() == ".csv"
            rows = list(csv.DictReader(file)) if is_csv else [json.loads(line) for line in file if line.strip()]
    except (UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read as {path.suffix[1:].upper()}: {error}") from None
    wrong = [row for row in rows if not (isinstance(row, dict) and {"file", "caption"} <= row.keys())]
    if strict and (wrong or not rows):
        problem = f"one has {', '.join(wrong[0]) if isinstance(wrong[0], dict) else wrong[0]}" if wrong else "has no rows"
        raise UserError(f"{path}: needs rows with the columns file and caption, and {problem}")
    return [] if wrong else rows


def _select(table: Path, rows: list[dict[str, Any]], split: str | None) -> list[tuple[str, str]]:
    if split is not None:
        splits = sorted({str(row.get("split")) for row in rows})
        rows = [row for row in rows if row.get("split") == split]
        if not rows:
            raise UserError(f"{table}: no row has split {split!r}; splits there: {', '.join(splits)}")
    bad = [row for row in rows if not (row["file"] and isinstance(row["file"], str) and isinstance(row["caption"], str))]
    if bad:
        raise UserError(f"{table}: {len(bad)} rows lack a file or a caption, the first is {bad[0]}")
    videos = [(os.path.normpath(table.parent / row["file"]), row["caption"].strip()) for row in rows]
    missing = [path for path, _ in videos if not os.path.isfile(path)]
    if missing:
        raise UserError(f"{table}: lists {len(missing)} files that are not there: {first_few(missing)}")
    return videos


def first_few(names: Iterable[str], limit: int = 3, count: int | None = None) -> str:
    """Return the first `limit` names and the number of the rest; with `count` given, only `limit` names are consumed."""
    names = list(names if count is None else itertools.islice(names, limit))
    count = count or len(names)
    return ", ".join(names[:limit]) + (f" and {count - limit} more" if count > limit else "")


# -- preparing an index ----------------------------------------------------------------------------------------------


def prepare(
    videos: Sequence[tuple[str, str]],
    fps: float | None = None,
    frames: int | None = None,
    max_bad: float = 0.01,
    workers: int = 2,
    progress: bool = True,
    licences: Mapping[str, str] | None = None,
) -> PreparedClips:
    """Decode each (path, caption) once, strictly, and cut it into clips.

    Args:
        videos: as `list_videos` returns them.
        fps: rate of the clips; None keeps each video's own average rate.
        frames: cut consecutive windows of so many frames, without overlap; None makes one clip of each video.
        max_bad: largest share of unreadable videos, 0 to 1.
        workers: threads that decode; the decoder works outside Python's lock.
        progress: show a bar.
        licences: licence of each video, by path, for the index.

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
        bar = ProgressBar(examined, total=len(videos), desc="decoding", unit="video", disable=not progress)
        for (path, caption), result in zip(videos, bar, strict=True):
            if isinstance(result, UnreadableVideo):
                quarantined.append((path, result.reason))
                continue
            facts, digest = result
            rate = fps or facts.fps
            available = int(facts.timestamps[-1] * rate + TIE) + 1
            longest = max(longest, (path, available), key=lambda video: video[1])
            window = frames or available
            if available < window:
                too_short.append((path, available))
                continue
            if facts.frames > 1 and rate > facts.fps * (1 + TIE):
                slower.append((path, facts.fps))
            dropped += available % window
            for first in range(0, available - window + 1, window):
                facts_of_clip = (first / rate, window, rate, facts.width, facts.height)
                clips.append(Clip(path, *facts_of_clip, caption, digest, (licences or {}).get(path)))
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
