"""Frames of a video by their numbers, its times and its header. Times are seconds after the first frame.

An image is a video of one frame. Files on which decord was shown to agree (strict.py) may be read with it, the others are
read with PyAV, which needs no proof.
"""

import functools
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from .container import Container, open_container
from .images import ImageError, image_size, is_image, read_image, scaled
from .source import READ_TIMEOUT, UnreadableVideo, VideoBytes, VideoSource, seconds_to_read, within

SEEK_BACK = (0.0, 1.0, 8.0, 64.0)  # seconds before the first wanted frame from which decoding is tried


@dataclass(frozen=True)
class VideoHeader:
    """Size and length of a video as its file states them; sizes are those of the frames as stored."""

    frames: int
    width: int
    height: int
    seconds: float  # from the first frame to the last


@dataclass(frozen=True, eq=False)
class FrameTable:
    """When the frames of a video are shown, and where decoding can begin.

    Args:
        times: (frames,) ticks, increasing.
        keys: times of key frames, in ticks, increasing.
        tick: seconds.
    """

    times: np.ndarray
    keys: np.ndarray
    tick: Fraction

    @property
    def seconds(self) -> np.ndarray:
        """(frames,) float64 seconds after the first frame."""
        return (self.times - self.times[0]).astype(np.float64) * float(self.tick)


def read_frames(source: VideoSource, indices: Iterable[int], decord: bool = False) -> np.ndarray:
    """Return the frames of a video at `indices` (any order, repeats allowed) as uint8 (T, H, W, 3).

    `decord` allows decord where it is installed: only for files of which the strict pass says that it reads them right.
    Raises ValueError for indices outside the video, UnreadableVideo for a failing decoder and for one that takes longer
    than READ_TIMEOUT seconds; the first read of a long file, which reads its packets, may take longer.
    """
    wanted = [int(i) for i in indices]
    if is_image(source):
        return within(READ_TIMEOUT, source, lambda: _read_image(source, wanted))
    if decord and has_decord():
        from .decord_reader import read_with_decord

        return within(READ_TIMEOUT, source, lambda: read_with_decord(source, wanted))
    return within(READ_TIMEOUT + seconds_to_read(source), source, lambda: read_with_pyav(source, wanted))


def frame_times(source: VideoSource) -> np.ndarray:
    """Return the time of each frame, float64 seconds after the first; raises UnreadableVideo as `read_frames` does."""
    if is_image(source):
        return np.zeros(1)
    return within(READ_TIMEOUT + seconds_to_read(source), source, lambda: frame_table(source)).seconds


def stream_frames(
    source: VideoSource, indices: Iterable[int] | None = None, size: tuple[int, int] | None = None
) -> Iterator[np.ndarray]:
    """Yield frames in order as uint8 (H, W, 3), one in memory at a time: all of them, or those at `indices`, which do not fall.

    With `size` (height, width) each is scaled. Raises UnreadableVideo at the first frame that cannot be decoded, ValueError for
    indices that fall or lie outside.
    """
    frames = _makers(source, size)
    if indices is None:
        yield from (make() for make in frames)
        return
    at, make, picture = -1, None, None
    for index in indices:
        if index < at or index < 0:
            raise ValueError(f"{source}: frame {index} after frame {at}; frames are streamed in order")
        while at < index:
            if (make := next(frames, None)) is None:
                raise ValueError(f"{source}: frame {index}; legal: 0 to {at}")
            at, picture = at + 1, None
        if picture is None:
            assert make is not None
            picture = make()
        yield picture


def _makers(source: VideoSource, size: tuple[int, int] | None) -> Iterator[Callable[[], np.ndarray]]:
    """Yield for each frame what makes its picture: frames that are not wanted are decoded and not converted."""
    if is_image(source):
        yield lambda: _sized(_read_image(source, [0])[0], size)
        return
    with open_container(source) as video:
        for frame in video.frames():
            yield lambda frame=frame: _sized(video.display.picture(frame.decoded), size)


def _sized(picture: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    return scaled(picture, size) if size else picture


def read_header(source: VideoSource, max_pixels: int) -> VideoHeader:
    """Return the size and length of a video from its headers and packets, without decoding a frame.

    Opening a file decodes frames where its header leaves something open; that never happens for pictures beyond
    `max_pixels` (width times height), so memory stays small whatever the size is. Raises UnreadableVideo for what is no
    video and for one that states no size or no frames.
    """
    if is_image(source):
        width, height = _of_image(image_size, source)
        if width * height > max_pixels:
            raise UnreadableVideo(source, f"has {width}x{height} pixels: at most {max_pixels} are read")
        return VideoHeader(1, width, height, 0.0)
    with open_container(source, max_pixels) as video:
        width, height = video.stream.width, video.stream.height
        table = video.packets()
        frames = table.packets if table.times is None else len(table.times)
        if not frames or not width or not height:
            raise UnreadableVideo(source, f"states {frames} frames of {width}x{height} pixels")
        if table.times is None:  # a recording of a broadcast begins at any time
            seconds = max(0.0, table.end - (video.container.start_time or 0) / 1e6)
        else:
            seconds = float((table.times[-1] - table.times[0]) * video.tick)
        return VideoHeader(frames, width, height, seconds)


def frame_table(source: VideoSource) -> FrameTable:
    """Return when the frames of a video are shown, from its packets or, where these do not say, by decoding it.

    The table of a file is kept in memory: packets are read once by each process, not with every clip.
    """
    if isinstance(source, VideoBytes):
        return _read_table(source)
    try:
        state = os.stat(source)
    except OSError as error:
        raise UnreadableVideo(source, error.strerror or str(error)) from None
    return _kept_table(os.fspath(source), state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=512)  # a film of two hours takes 1.4 MB
def _kept_table(path: str, modified: int, size: int) -> FrameTable:
    return _read_table(path)


def _read_table(source: VideoSource) -> FrameTable:
    with open_container(source) as video:
        packets, tick = video.packets(), video.tick
    if packets.times is not None and len(packets.times):
        return FrameTable(packets.times, packets.keys, tick)
    with open_container(source) as video:
        times = np.array([frame.time for frame in video.frames()], np.int64)
    if not len(times):
        raise UnreadableVideo(source, "holds no frames")
    return FrameTable(times, packets.keys, tick)


def read_with_pyav(source: VideoSource, indices: list[int]) -> np.ndarray:
    """Read frames as `read_frames` does, through PyAV and without a time limit.

    Frames between two wanted ones are decoded, unless a key frame lies between them.
    """
    table = frame_table(source)
    check_indices(source, indices, len(table.times))
    wanted = sorted(set(indices))
    found: dict[int, np.ndarray] = {}
    with open_container(source) as video:
        for stretch in _stretches(wanted, table):
            found |= _read_stretch(video, stretch, table)
    return np.stack([found[i] for i in indices])


def _stretches(wanted: list[int], table: FrameTable) -> Iterator[list[int]]:
    """Split sorted frame numbers where decoding can begin anew after the last one and at or before the next."""
    starts = np.searchsorted(table.keys, table.times[wanted], side="right")
    first = 0
    for place in range(1, len(wanted) + 1):
        if place == len(wanted) or (starts[place] != starts[place - 1] and wanted[place] > wanted[place - 1] + 1):
            yield wanted[first:place]
            first = place


def _read_stretch(video: Container, wanted: list[int], table: FrameTable) -> dict[int, np.ndarray]:
    """Return the pictures of frames that are decoded in one go, beginning further back until the first of them is met."""
    from av.error import FFmpegError

    first = int(table.times[max(0, wanted[0] - 1)])  # a deinterlaced frame needs the one before it
    for back in SEEK_BACK:
        target = first - round(back / table.tick)
        if target < table.times[0] and back:
            break
        if video.seek(target):
            try:
                pictures = _pick(video, wanted, table)
            except (FFmpegError, UnreadableVideo):
                continue  # what a frame is predicted from may lie further back
            if len(pictures) == len(wanted):
                return pictures
    with open_container(video.source) as again:  # from the start
        pictures = _pick(again, wanted, table)
    if len(pictures) < len(wanted):
        raise UnreadableVideo(video.source, f"frame {min(set(wanted) - set(pictures))} is not found by seeking; re-encode it")
    return pictures


def _pick(video: Container, wanted: list[int], table: FrameTable) -> dict[int, np.ndarray]:
    """Decode until all wanted frames are met, or until the first of them is past."""
    number_of = {int(table.times[i]): i for i in wanted}
    pictures: dict[int, np.ndarray] = {}
    for place, frame in enumerate(video.frames()):
        if place == 0 and wanted[0] and frame.time == table.times[wanted[0]] and "deinterlaced" in video.display.notes:
            break  # the frame before it, which it is made from, too, is not there
        if frame.time in number_of:
            pictures[number_of[frame.time]] = video.display.picture(frame.decoded)
        if len(pictures) == len(wanted) or (not pictures and frame.time > table.times[wanted[0]]):
            break
    return pictures


def _read_image(source: VideoSource, indices: list[int]) -> np.ndarray:
    check_indices(source, indices, 1)
    return np.repeat(_of_image(read_image, source), len(indices), 0)


def _of_image(read: Callable[[str | os.PathLike | bytes], Any], source: VideoSource) -> Any:
    try:
        return read(source.data if isinstance(source, VideoBytes) else source)
    except ImageError as error:
        raise UnreadableVideo(source, str(error)) from error


def check_indices(source: VideoSource, indices: list[int], frames: int) -> None:
    """Raise ValueError for numbers of frames that a video does not have, and for none."""
    wrong = [i for i in indices if not 0 <= i < frames]
    if wrong or not indices:
        raise ValueError(f"{source}: frame {wrong[0] if wrong else 'list is empty'}; legal: 0 to {frames - 1}")


@functools.cache
def has_decord() -> bool:
    """Return whether decord is installed; it has wheels for x86-64 only."""
    return importlib.util.find_spec("decord") is not None
