"""The strict pass over a video: every frame is decoded once, and damage and odd files are refused in words."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .container import Container, PacketTable, open_container
from .images import IMAGE_FPS, is_image
from .isolated import beat
from .reader import has_decord, read_frames
from .source import UnreadableVideo, VideoSource, seconds_to_read

SAMPLED = (0, 1, 4, 16, 64, 256, 1024, 4096)  # frames, and the last one, that are compared with decord's
LONG = 10_000  # frames; decord reads all packets at every opening, so longer videos are read faster by PyAV
WATCHED_SIDE = 144  # pixels: enough to see cuts, black and motion
SHORT = 3  # frames, or seconds divided by 4, that a file may end before its container says
JUMP = 10.0  # seconds between two frames that are a new clock in a broadcast, where players go on without a pause

Watch = Callable[[np.ndarray], None]


@dataclass(frozen=True, eq=False)
class VideoFacts:
    """Facts from a strict pass over a video; sizes are those of the picture as shown."""

    frames: int
    width: int
    height: int
    fps: float  # average, from the first to the last timestamp
    duration: float  # seconds, the last frame's own time included
    timestamps: np.ndarray  # (frames,) float64 seconds after the first frame, increasing
    decord: bool = False  # decord was asked, is installed and reads exactly the same, and the video is not LONG
    notes: tuple[str, ...] = ()  # how frames were changed for showing: tone-mapped, deinterlaced ...


def decode_strictly(
    source: VideoSource, max_pixels: int | None = None, decord: bool = False, watch: Watch | None = None
) -> VideoFacts:
    """Decode every frame of a video and return its facts, or raise UnreadableVideo.

    Frames of more than `max_pixels` (width times height) are not decoded but raise; give it for files of strangers. `decord`
    asks whether decord reads the file right, where it is installed, at the price of reading it twice. `watch` is called with
    each frame of a video, not of an image, in order: uint8 (H, W, 3), the shorter side at most WATCHED_SIDE pixels.

    It refuses files that are no videos, have no video stream or no frames, a decoding error, a corrupt frame, times that do
    not increase, fewer frames than the packets or the container promise, a last frame that is not found by seeking, a size, a
    turn or a pixel shape that changes, and an oblique turn.
    Most codecs carry no checksum: damage that leaves a legal stream passes (5 of 75 single flipped bits in an H.264 file).
    """
    if is_image(source):
        height, width = read_frames(source, [0]).shape[1:3]
        return VideoFacts(1, width, height, IMAGE_FPS, 1 / IMAGE_FPS, np.zeros(1))
    with open_container(source, max_pixels) as video:
        packets = video.packets()
        _check_whole(video, packets)
        video.check_index(packets)
    with open_container(source, max_pixels) as video:
        times, samples = _decode(video, SAMPLED if decord else SAMPLED[:1], watch)
        rate = video.stream.average_rate or video.stream.codec_context.framerate  # the second for one frame in MPEG-TS
        tick, notes = video.tick, tuple(sorted(video.display.notes))
    if not times:
        raise UnreadableVideo(source, "holds no frames")
    if packets.times is not None and times != packets.times.tolist():
        difference = f"{len(times)} frames decoded, its packets state {len(packets.times)}"
        raise UnreadableVideo(
            source, f"{difference}{'' if len(times) != len(packets.times) else ' at other times'}; re-encode it"
        )
    timestamps = np.array([float((time - times[0]) * tick) for time in times])
    if len(times) > 1:
        rate = (len(times) - 1) / ((times[-1] - times[0]) * tick)
    if not rate:
        raise UnreadableVideo(source, "holds one frame and no frame rate")
    if not np.array_equal(read_frames(source, [len(times) - 1])[0], samples[len(times) - 1]):
        raise UnreadableVideo(source, "its last frame is another when it is read alone: its index is wrong; re-encode it")
    decord = decord and has_decord() and not notes and len(times) <= LONG and _decord_agrees(source, timestamps, samples)
    height, width = samples[0].shape[:2]
    return VideoFacts(len(times), width, height, float(rate), float(timestamps[-1] + 1 / rate), timestamps, decord, notes)


def _decode(video: Container, sampled: Sequence[int], watch: Watch | None) -> tuple[list[int], dict[int, np.ndarray]]:
    """Decode all frames; return their times in ticks, and the pictures of some and of the last."""
    times: list[int] = []
    samples: dict[int, np.ndarray] = {}
    first, last = None, None
    for frame in video.frames():
        number = len(times)
        height, width = video.display.size(frame.decoded)
        aspect = video.decoder.sample_aspect_ratio or 1
        shape = f"{width}x{height}, {video.display.turned(frame.decoded)}, with pixels of {aspect}"
        if times and frame.time <= times[-1]:
            raise UnreadableVideo(video.source, f"the timestamp of frame {number} does not increase; re-encode it")
        gap = float((frame.time - times[-1]) * video.tick) if times else 0.0
        if gap > JUMP and video.container.format.name in ("mpeg", "mpegts"):
            raise UnreadableVideo(video.source, f"its clock jumps by {gap:.1f} s before frame {number}; re-encode it")
        first = first or shape
        if shape != first:
            raise UnreadableVideo(video.source, f"frame {number} is {shape}, those before are {first}; re-encode it")
        if number in sampled:
            samples[number] = video.display.picture(frame.decoded)
        if watch:
            watch(video.display.picture(frame.decoded, WATCHED_SIDE))
        times.append(frame.time)
        last = frame.decoded
    if last is not None:
        samples[len(times) - 1] = video.display.picture(last)
    return times, samples


def _check_whole(video: Container, packets: PacketTable) -> None:
    """Raise UnreadableVideo where the file ends before its container says."""
    stated = video.stream.frames
    late = SHORT if video.container.format.name == "avi" else 0  # AVI counts the frames that a codec was late with
    if stated > packets.packets + late:
        raise UnreadableVideo(video.source, f"its container states {stated} frames, {packets.packets} are there: it is cut off")
    duration = (video.container.duration or 0) / 1e6
    # The duration of Matroska is when it ends, of other containers how long it takes.
    start = 0 if "matroska" in video.container.format.name else (video.container.start_time or 0) / 1e6
    rate = float(video.stream.average_rate or 25)
    if duration and packets.end - start < duration - max(SHORT / rate, duration / 50, 0.25):
        reason = (
            f"its container states {duration:.2f} s, its data end after {max(0.0, packets.end - start):.2f} s: it is cut off"
        )
        raise UnreadableVideo(video.source, reason)


def _decord_agrees(source: VideoSource, timestamps: np.ndarray, samples: dict[int, np.ndarray]) -> bool:
    from .decord_reader import agrees

    beat(seconds_to_read(source))  # it reads all of it
    return agrees(source, timestamps, samples)
