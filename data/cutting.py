"""Write clips of long videos as files of their own: quick to read anywhere, and what tar shards need."""

import dataclasses
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from promag.training.config import UserError
from promag.training.progress import ProgressBar

from .clip_index import Clip
from .listing import first_few
from .unchanged import check_unchanged, digest_file, stamp
from .video import (
    READER,
    UnreadableVideo,
    VideoFacts,
    decode_strictly,
    frame_times,
    is_image,
    pick_by_time,
    stream_frames,
    write_video,
)

CRF, KEY_EVERY = 16, 24  # errors far below those of tokenizers; reading from the middle decodes at most 24 frames more
_WRITTEN = re.compile(r"-[0-9a-f]{12}-\d{8,}ms-\d+x[^/]+\.mp4$")  # how the names that `_name` gives end


def cut_out(clips: Sequence[Clip], folder: str | os.PathLike, workers: int = 2, progress: bool = True) -> list[Clip]:
    """Write each clip of a video as an mp4 into `folder`; return the clips of these files, in the same order.

    Every video is decoded once, copies of it under one name too. Images stay where they are. Odd sizes lose their last row or
    column, which H.264 cannot hold.
    A name stands for one stretch of one video at one rate, so an interrupted call continues: whole files are kept.

    Args:
        clips: as `prepare` returns them: those of a video do not overlap.
        folder: where the files are written.
        workers: videos that are cut at a time.
        progress: show a bar.

    Raises UnreadableVideo for a video that has changed, and UserError for one that an earlier call wrote into `folder`.
    """
    check_apart(folder, (clip.path for clip in clips))
    by_video: dict[str, list[Clip]] = {}
    for clip in clips:
        if not is_image(clip.path):  # copies of a video share their files, which one thread alone may write
            by_video.setdefault(_prefix(clip), []).append(clip)
    cut: dict[str, dict[str, Any]] = {}
    with READER.pool(workers) as pool:
        written = pool.map(partial(_cut, folder), by_video.values())
        for files in ProgressBar(written, total=len(by_video), desc="cutting", unit="video", disable=not progress):
            cut |= files
    return [dataclasses.replace(clip, **cut.get(_name(clip), {})) for clip in clips]


def check_outside(folder: str | os.PathLike, source: str | os.PathLike) -> None:
    """Raise UserError for a folder of clips inside a folder of videos, whose next listing would take the clips for videos."""
    if os.path.isdir(source) and Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(source)):
        raise UserError(
            f"cut {folder}: lies inside {source}, so that another call would take the clips there for videos; "
            "name a folder outside it"
        )


def check_apart(folder: str | os.PathLike, paths: Iterable[str]) -> None:
    """Raise UserError where some of the videos are clips that an earlier call wrote into the folder: they would come twice."""
    target = os.path.realpath(folder)
    written = {path for path in paths if _WRITTEN.search(path)}
    if inside := sorted(path for path in written if Path(os.path.realpath(path)).is_relative_to(target)):
        raise UserError(
            f"{folder}: holds {len(inside)} of the videos to cut, clips that an earlier call wrote there: {first_few(inside)}; "
            "take a folder outside that of the videos, and remove or move these clips"
        )


def _cut(folder: str | os.PathLike, clips: Sequence[Clip]) -> dict[str, dict[str, Any]]:
    """Cut the clips of one video; return by name what is new in them."""
    check_unchanged(clips[0])
    files = {_name(clip): clip for clip in sorted(clips, key=lambda clip: clip.start)}  # a video may have several captions
    paths = [str(Path(os.path.abspath(folder), name)) for name in files]
    stretches = [(path, clip.start, clip.frames, clip.fps) for path, clip in zip(paths, files.values(), strict=True)]
    new = {}
    for name, path, facts in zip(files, paths, READER.call(cut_video, clips[0].path, stretches), strict=True):
        size, modified = stamp(path)
        of_the_file = {"path": path, "sha256": digest_file(path), "bytes": size, "modified": modified, "decord": facts.decord}
        new[name] = {"start": 0.0, "fps": facts.fps, "width": facts.width, "height": facts.height, **of_the_file}
    return new


def _name(clip: Clip) -> str:
    return f"{_prefix(clip)}-{round(clip.start * 1000):08d}ms-{clip.frames}x{clip.fps:.6g}.mp4"


def _prefix(clip: Clip) -> str:
    """Return how the names of all clips of a video begin."""
    stem = Path(clip.path).stem.encode("utf-8", "ignore")[:120].decode("utf-8", "ignore")
    return f"{stem}-{clip.sha256[:12]}"


def cut_video(source: str, stretches: Sequence[tuple[str, float, int, float]]) -> list[VideoFacts]:
    """Write stretches of a video, in order, as files; return the facts of each.

    A stretch has a path, its start in seconds, frames and frames a second. Files that are whole already are kept.
    """
    done = {path: facts for path, _, frames, _ in stretches if (facts := _whole(path, frames))}
    missing = [stretch for stretch in stretches if stretch[0] not in done]
    if missing:
        times = frame_times(source)
        shown = [pick_by_time(times, start + np.arange(frames) / fps).tolist() for _, start, frames, fps in missing]
        pictures = stream_frames(source, itertools.chain.from_iterable(shown))
        for path, _, frames, fps in missing:
            write_video(path, _even(itertools.islice(pictures, frames)), fps, CRF, KEY_EVERY)
            if (facts := _whole(path, frames)) is None:
                raise UnreadableVideo(source, f"{path}, which was cut from it, does not have {frames} frames")
            done[path] = facts
    return [done[path] for path, *_ in stretches]


def _whole(path: str, frames: int) -> VideoFacts | None:
    """Return the facts of a file that can be read and has so many frames."""
    if not os.path.exists(path):
        return None
    try:
        facts = decode_strictly(path, decord=True)
    except UnreadableVideo:
        return None
    return facts if facts.frames == frames else None


def _even(pictures: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    for picture in pictures:
        height, width = (side // 2 * 2 for side in picture.shape[:2])
        yield picture[None, :height, :width]
