"""Video files: the one place that decodes and encodes them (PyAV and decord are imported nowhere else, and lazily).

Two ways to read, on purpose. `decode_strictly` passes once over every frame with PyAV and refuses whatever is damaged
or odd. `read_frames` fetches scattered frames quickly with decord while training; decord returns wrong pixels from
damaged files without a word, so only files that passed `decode_strictly` should reach it. Where decord is not
installed (it has wheels for x86-64 only) PyAV reads the same frames.

Pixels are uint8 RGB arrays (T, H, W, 3), turned upright where the file asks for a rotation by 90, 180 or 270 degrees.
Times are seconds after the first frame. An image is a video of one frame.
"""

import concurrent.futures
import contextlib
import functools
import importlib.util
import io
import itertools
import math
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from promag.training.config import UserError
from promag.training.files import move_into_place

from .images import IMAGE_FPS, ImageError, is_image, read_image

# decord has been seen to hang in get_batch for ever (dmlc/decord#269), and so may a network disk. A read takes
# milliseconds to a few seconds; after a minute it will not end.
READ_TIMEOUT = 60.0  # seconds
WAIT = 0.5  # seconds: longest single wait for a decoder

# Times closer than this part of a frame interval to the middle of two frames count as the middle, where the earlier
# frame is taken. Above the rounding of decord's float32 times (0.25 ms after one hour), far below a frame.
TIE = 0.01

# What makes an odd but whole video readable; shown once beside a list of refused videos.
REENCODE = "ffmpeg -i IN -vf 'scale=iw*sar:ih,setsar=1,scale=trunc(iw/2)*2:trunc(ih/2)*2' -c:v libx264 -crf 16 OUT.mp4"
_STRICT = {"err_detect": "explode"}

Result = TypeVar("Result")


class UnreadableVideo(UserError):  # noqa: N818
    """A video that cannot be decoded faithfully; `path` and `reason` say which and why."""

    # The reason may be absent: a DataLoader rebuilds a worker's exception from its message alone.
    def __init__(self, path: str | os.PathLike, reason: str = ""):
        self.path, self.reason = os.fspath(path), reason
        super().__init__(self.path, reason)

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}" if self.reason else self.path


@dataclass(frozen=True, eq=False)
class VideoBytes:
    """A video or image file held in memory; it is read like a file, and errors call it by its name."""

    name: str  # its ending tells an image from a video
    data: bytes

    def __fspath__(self) -> str:
        return self.name

    def __str__(self) -> str:
        return self.name


VideoSource = str | os.PathLike | VideoBytes


@dataclass(frozen=True, eq=False)
class VideoFacts:
    """Facts from a strict pass over a video; sizes are those of the upright picture."""

    frames: int
    width: int
    height: int
    fps: float  # average, from the first to the last timestamp
    duration: float  # seconds, the last frame's own time included
    timestamps: np.ndarray  # (frames,) float64 seconds after the first frame, increasing


@dataclass(frozen=True)
class VideoHeader:
    """Size and length of a video as its file states them; sizes are those of the frames as stored."""

    frames: int
    width: int
    height: int
    seconds: float  # from the first frame to the last


def read_header(path: VideoSource, max_pixels: int) -> VideoHeader:
    """Return the size and length of a video from its headers and packets, without decoding a frame.

    Opening a file decodes frames where its header leaves something open; that never happens for pictures beyond
    `max_pixels` (width times height), so memory stays small whatever the size is. Raises UnreadableVideo for what is no
    video and for one that states no size or no frames.
    """
    with _pyav_stream(path, max_pixels) as (container, stream):
        width, height = stream.width, stream.height
        pts = _presentation_times(container, stream)
        if not pts or not width or not height:
            raise UnreadableVideo(path, f"states {len(pts)} frames of {width}x{height} pixels")
        return VideoHeader(len(pts), width, height, float((pts[-1] - pts[0]) * stream.time_base))


def decode_strictly(path: VideoSource, max_pixels: int | None = None) -> VideoFacts:
    """Decode every frame of `path` and return its facts, or raise UnreadableVideo.

    Frames of more than `max_pixels` (width times height) are not decoded but raise; give it for files of strangers.

    It refuses files that are no videos, have no video stream or no frames, a decoding error, a corrupt frame, timestamps
    that do not increase, a frame count other than the container's, a picture size that changes, pixels that are not
    square, an oblique rotation, and a file that `read_frames` would read differently. Most codecs carry no checksum:
    damage that leaves a legal stream passes (5 of 75 single flipped bits in an H.264 file).
    """
    import av
    from av.error import FFmpegError

    if is_image(path):
        height, width = _read_image(path, [0]).shape[1:3]
        return VideoFacts(1, width, height, IMAGE_FPS, 1 / IMAGE_FPS, np.zeros(1))
    pts: list[int] = []
    samples: dict[int, np.ndarray] = {}  # frames to compare with the fast reader
    last = None
    try:
        options = _decoder_options(max_pixels)
        with av.open(_to_open(path), options=options, metadata_errors="ignore") as container:
            stream = _video_stream(path, container, options)
            for frame in _checked_frames(path, container, stream):
                if len(pts) in (0, 1, 4, 16, 64, 256, 1024, 4096):
                    samples[len(pts)] = _upright(path, frame)
                pts.append(frame.pts)
                last = frame
            stated, rate, tick = stream.frames, stream.average_rate, stream.time_base
    except FFmpegError as error:
        where = f"decoding fails after {len(pts)} frames" if pts else "cannot be opened or decoded as a video"
        raise UnreadableVideo(path, f"{where} ({error.strerror or error})") from error
    if last is None or tick is None:
        raise UnreadableVideo(path, "holds no frames")
    if stated and stated != len(pts):
        raise UnreadableVideo(path, f"{len(pts)} frames decoded, its container states {stated}; re-encode it")
    if len(pts) > 1:
        rate = (len(pts) - 1) / ((pts[-1] - pts[0]) * tick)
    if not rate:
        raise UnreadableVideo(path, "holds one frame and no frame rate")
    samples[len(pts) - 1] = _upright(path, last)
    timestamps = np.array([float((t - pts[0]) * tick) for t in pts])
    _compare_with_fast_reader(path, timestamps, samples)
    height, width = samples[0].shape[:2]
    return VideoFacts(len(pts), width, height, float(rate), float(timestamps[-1] + 1 / rate), timestamps)


def read_frames(path: VideoSource, indices: Iterable[int], timeout: float = READ_TIMEOUT) -> np.ndarray:
    """Return the frames of `path` at `indices` (any order, repeats allowed) as uint8 (T, H, W, 3).

    Raises ValueError for indices outside the video, UnreadableVideo for a failing decoder and for one that takes longer
    than `timeout` seconds.
    """
    wanted = [int(i) for i in indices]
    read = _read_image if is_image(path) else read_with_decord if _has_decord() else read_with_pyav
    return _within(timeout, path, lambda: read(path, wanted))


def frame_times(path: VideoSource, timeout: float = READ_TIMEOUT) -> np.ndarray:
    """Return the time of each frame, float64 seconds after the first, without decoding any.

    Raises UnreadableVideo as `read_frames` does.
    """
    if is_image(path):
        return np.zeros(1)
    measure = _times_with_decord if _has_decord() else _times_with_pyav
    times = _within(timeout, path, lambda: measure(path))
    return times - times[0]


def pick_by_time(timestamps: np.ndarray, times: np.ndarray | Sequence[float]) -> np.ndarray:
    """Return, for each of `times`, the index of the frame nearest in time; in the middle of two the earlier one.

    `timestamps` (seconds) increase. Raises ValueError if a time lies outside the video by more than half a frame.
    """
    stamps, times = np.asarray(timestamps, np.float64), np.asarray(times, np.float64)
    gaps = np.diff(stamps) if len(stamps) > 1 else np.array([0.0])
    first, end = stamps[0] - (0.5 + TIE) * gaps[0], stamps[-1] + (0.5 + TIE) * gaps[-1]
    outside = times[(times < first) | (times > end)]
    if outside.size:
        raise ValueError(
            f"time {outside[0]:.4f} s: the video has frames from {stamps[0]:.4f} to {stamps[-1]:.4f} s; "
            "ask for times at most half a frame outside"
        )
    if len(stamps) == 1:
        return np.zeros(times.shape, np.int64)
    after = np.clip(np.searchsorted(stamps, times), 1, len(stamps) - 1)
    past = times - stamps[after - 1]
    return np.where(past <= (0.5 + TIE) * gaps[after - 1], after - 1, after)


def write_video(
    path: str | os.PathLike,
    frames: np.ndarray | Iterable[np.ndarray],
    fps: float,
    crf: int = 18,
    key_every: int | None = None,
) -> None:
    """Write uint8 `frames` (T, H, W, 3), H and W even, as an H.264 mp4 that appears at `path` only when whole.

    `frames` may come in chunks: an iterable of such arrays, which is never held whole. `crf` is x264's constant quality,
    from 1 (best) to 51; 0 would be a profile that browsers do not play. At every `key_every`-th frame, if
    not before, a player can start; None leaves that to x264, whose files are smaller and slower to step through. Raises
    ValueError for frames of another kind or size, a rate that is not positive and another crf.
    """
    import av

    chunks: Iterator[Any] = iter([frames] if isinstance(frames, np.ndarray) else frames)
    first: Any = next(chunks, np.empty(0))
    _check_writable(first, fps, crf)
    # Tagged BT.709, limited range: players guess the matrix of untagged files from their size, and colours shift.
    colour = {"colorspace": 1, "color_primaries": 1, "color_trc": 1, "color_range": 1}
    faststart = {"movflags": "faststart"}
    with written_whole(path) as aside, av.open(aside, "w", format="mp4", options=faststart) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(100_000))
        stream.height, stream.width = first.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # Without x264's macroblock tree: on small pictures it made different files of the same frames.
        stream.options = {"crf": str(crf), "x264-params": "mbtree=0", **({"g": str(key_every)} if key_every else {})}
        for name, value in colour.items():
            setattr(stream.codec_context, name, value)
        for chunk in itertools.chain([first], chunks):
            if chunk.shape[1:] != first.shape[1:] or chunk.dtype != first.dtype:
                raise ValueError(f"a chunk of {chunk.dtype} {chunk.shape} after one of {first.dtype} {first.shape}")
            for pixels in chunk:
                rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                yuv = rgb.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
                container.mux(stream.encode(yuv))
        container.mux(stream.encode())


def encode_mp4(frames: np.ndarray, fps: float, crf: int = 18, key_every: int | None = None) -> bytes:
    """Return what `write_video` would write: bytes of an mp4 that browsers play while it loads."""
    # A file and not a buffer: the muxer reads its output again to move the index to the front.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "video.mp4")
        write_video(path, frames, fps, crf, key_every)
        return path.read_bytes()


@contextlib.contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[str]:
    """Give a path beside `path` to write to; it is renamed to `path` on success and removed on an exception."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield str(aside)
        move_into_place(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def read_with_decord(path: VideoSource, indices: list[int]) -> np.ndarray:
    """`read_frames` through decord, without a time limit; decord fails on pictures 16, 24, 48 or 72 wide."""
    with _decord_reader(path) as reader:
        _check_indices(path, indices, len(reader))
        return reader.get_batch(indices).asnumpy()


def read_with_pyav(path: VideoSource, indices: list[int]) -> np.ndarray:
    """`read_frames` through PyAV, without a time limit: seeks to the first and decodes up to the last frame wanted."""
    with _pyav_stream(path) as (container, stream):
        pts = _presentation_times(container, stream)
        _check_indices(path, indices, len(pts))
        index_of = {pts[i]: i for i in indices}
        container.seek(min(index_of), stream=stream)
        frames_by_index: dict[int, np.ndarray] = {}
        for frame in container.decode(stream):
            if frame.pts in index_of:
                frames_by_index[index_of[frame.pts]] = _upright(path, frame)
            if len(frames_by_index) == len(index_of):
                return np.stack([frames_by_index[i] for i in indices])
    raise UnreadableVideo(path, f"frame {min(set(indices) - set(frames_by_index))} is not found by seeking; re-encode it")


def _read_image(path: VideoSource, indices: list[int]) -> np.ndarray:
    _check_indices(path, indices, 1)
    try:
        return np.repeat(read_image(path.data if isinstance(path, VideoBytes) else path), len(indices), 0)
    except ImageError as error:
        raise UnreadableVideo(path, str(error)) from error


def _to_open(path: VideoSource) -> str | io.BytesIO:
    return io.BytesIO(path.data) if isinstance(path, VideoBytes) else os.fspath(path)


def _times_with_decord(path: VideoSource) -> np.ndarray:
    with _decord_reader(path) as reader:
        return reader.get_frame_timestamp(range(len(reader)))[:, 0].astype(np.float64)


def _times_with_pyav(path: VideoSource) -> np.ndarray:
    with _pyav_stream(path) as (container, stream):
        return np.array([float(t * stream.time_base) for t in _presentation_times(container, stream)])


@contextlib.contextmanager
def _decord_reader(path: VideoSource) -> Iterator[Any]:
    import decord
    from decord._ffi.base import DECORDError, DECORDLimitReachedError

    decord.logging.set_level(decord.logging.QUIET)
    if not isinstance(path, VideoBytes) and not os.path.exists(path):
        raise UnreadableVideo(path, "no such file")
    try:
        # One thread, opened where it is used: a reader with threads of its own dies with a fork. A fault tolerance
        # above zero makes decord raise where it would hand out the neighbour of a frame it failed to decode.
        yield decord.VideoReader(_to_open(path), ctx=decord.cpu(0), num_threads=1, fault_tol=1e-6)  # pyright: ignore
    except (DECORDError, DECORDLimitReachedError, RuntimeError) as error:
        # Time, source line and the path stand in front of decord's own words.
        text = re.sub(r"^(\[[^]]*\] \S+: )+", "", str(error).strip().splitlines()[0]).replace(f"[{path}]", "").strip()
        raise UnreadableVideo(path, f"decord: {text}") from error


def _decoder_options(max_pixels: int | None) -> dict[str, str]:
    return _STRICT if max_pixels is None else {**_STRICT, "max_pixels": str(max_pixels)}


@contextlib.contextmanager
def _pyav_stream(path: VideoSource, max_pixels: int | None = None) -> Iterator[tuple[Any, Any]]:
    import av
    from av.error import FFmpegError

    options = _decoder_options(max_pixels)
    try:
        with av.open(_to_open(path), options=options, metadata_errors="ignore") as container:
            yield container, _video_stream(path, container, options)
    except FFmpegError as error:
        raise UnreadableVideo(path, f"PyAV: {error.strerror or error}") from error


def _video_stream(path: VideoSource, container: Any, options: dict[str, str]) -> Any:
    if not container.streams.video:
        raise UnreadableVideo(path, "holds no video stream")
    stream = container.streams.video[0]
    stream.codec_context.options = options
    stream.codec_context.thread_count = 1  # many files are read side by side
    return stream


def _checked_frames(path: VideoSource, container: Any, stream: Any) -> Iterator[Any]:
    """Yield every frame, or raise UnreadableVideo at the first that is damaged or unlike the others."""
    aspect = stream.sample_aspect_ratio
    if aspect and abs(aspect - 1) > 0.02:
        raise UnreadableVideo(path, f"pixels are not square (aspect ratio {aspect}); re-encode it")
    count, previous, geometry = 0, None, None
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise UnreadableVideo(path, f"corrupt data after {count} frames")
        for frame in packet.decode():
            if frame.is_corrupt:
                raise UnreadableVideo(path, f"frame {count} is corrupt")
            if frame.pts is None or (previous is not None and frame.pts <= previous):
                raise UnreadableVideo(path, f"the timestamp of frame {count} does not increase; re-encode it")
            shown_size = f"{frame.width}x{frame.height} rotated by {frame.rotation}"
            geometry = geometry or shown_size
            if shown_size != geometry:
                raise UnreadableVideo(path, f"frame {count} is {shown_size}, those before {geometry}; re-encode it")
            count, previous = count + 1, frame.pts
            yield frame


def _presentation_times(container: Any, stream: Any) -> list[int]:
    """Return the timestamps, in ticks, of the frames that will be shown, in their order."""
    return sorted(p.pts for p in container.demux(stream) if p.pts is not None and not p.is_discard)


def _upright(path: VideoSource, frame: Any) -> np.ndarray:
    if frame.rotation % 90:
        raise UnreadableVideo(path, f"rotated by {frame.rotation} degrees, not a multiple of 90; re-encode it")
    return np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)


def _compare_with_fast_reader(path: VideoSource, timestamps: np.ndarray, samples: dict[int, np.ndarray]) -> None:
    """Raise UnreadableVideo unless `frame_times` and `read_frames` see what the strict pass saw."""
    times = frame_times(path)
    if len(times) != len(timestamps):
        raise UnreadableVideo(path, f"{len(timestamps)} frames decoded, {len(times)} in the index; re-encode it")
    if not np.allclose(times, timestamps, rtol=1e-6, atol=1e-3):
        raise UnreadableVideo(path, "the times of its index differ from those of the frames; re-encode it")
    read = read_frames(path, samples)
    # Decoders may round differently (10 bits a channel); another frame or a grey area is far off.
    for (index, strict), fast in zip(samples.items(), read, strict=True):
        if strict.shape != fast.shape or np.abs(strict.astype(np.int16) - fast).mean() > 2:
            raise UnreadableVideo(path, f"a fast reader returns other pixels for frame {index}; re-encode it")


def _check_indices(path: VideoSource, indices: list[int], frames: int) -> None:
    wrong = [i for i in indices if not 0 <= i < frames]
    if wrong or not indices:
        raise ValueError(f"{path}: frame {wrong[0] if wrong else 'list is empty'}; legal: 0 to {frames - 1}")


def _check_writable(frames: np.ndarray, fps: float, crf: int) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise ValueError(f"frames are {frames.dtype} {frames.shape}; uint8 (T, H, W, 3) with T >= 1 is needed")
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        smaller, larger = (f"{max(2, height + s * (height % 2))}x{max(2, width + s * (width % 2))}" for s in (-1, 1))
        raise ValueError(f"frames of {height}x{width} (H x W): H.264 needs even sizes; use {smaller} or {larger}")
    if not fps > 0 or not 1 <= crf <= 51:
        raise ValueError(f"fps {fps}, crf {crf}: fps above 0 and crf from 1 to 51 are legal")


@functools.cache
def _has_decord() -> bool:
    return importlib.util.find_spec("decord") is not None


def _within(timeout: float, path: VideoSource, action: Callable[[], Result]) -> Result:
    """Return `action()`, or raise UnreadableVideo after `timeout` seconds; the thread that hangs is left behind."""
    future: concurrent.futures.Future[Result] = concurrent.futures.Future()

    def work() -> None:
        try:
            future.set_result(action())
        except Exception as error:
            future.set_exception(error)

    # A daemon: a decoder that never returns must not keep the process from ending.
    threading.Thread(target=work, daemon=True).start()
    # Counted in short waits: the time that this process is stopped or asleep is not the decoder's.
    slices = max(1, math.ceil(timeout / WAIT))
    if not any(concurrent.futures.wait([future], timeout / slices).done for _ in range(slices)):
        raise UnreadableVideo(path, f"no answer within {timeout:g} s: the decoder hangs or the disk is too slow")
    return future.result()
