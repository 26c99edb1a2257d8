"""Decode captioned videos strictly, once, and cut them into clips.

list_videos -> prepare -> save_clips -> clips.jsonl -> load_clips
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import numpy as np

from promag.training.config import UserError
from promag.training.progress import ProgressBar

from .clip_index import Clip
from .listing import first_few
from .scenes import Scanned, check_scenes, scan
from .unchanged import digest_file, stamp
from .video import READER, REENCODE, TIE, UnreadableVideo, is_image, pick_by_time

ROUNDING = 1e-3  # seconds by which a stretch may be too short in containers whose times are whole milliseconds (MKV, WebM)


@dataclass(frozen=True)
class Lengths:
    """How long the clips are that a video, or each of its shots, is cut into, one after another and without overlap.

    Args:
        frames: so many frames each; what is left behind the last one is dropped.
        min_seconds: shorter ones are left out.
        max_seconds: longer ones are cut; what is left behind the last cut is a clip of its own, unless it is too short.

    Raises UserError for numbers that leave nothing, and for `frames` beside seconds.
    """

    frames: int | None = None
    min_seconds: float = 0.0
    max_seconds: float = math.inf

    def __post_init__(self):
        if self.frames is not None and (self.min_seconds, self.max_seconds) != (0, math.inf):
            raise UserError(
                f"frames {self.frames}, min_seconds {self.min_seconds:g}, max_seconds {self.max_seconds:g}: "
                "clips have a number of frames, or are from min_seconds to max_seconds long"
            )
        if (self.frames is not None and self.frames < 1) or not (
            0 <= self.min_seconds <= self.max_seconds > 0 and self.min_seconds < math.inf
        ):
            raise UserError(
                f"frames {self.frames}, min_seconds {self.min_seconds:g}, max_seconds {self.max_seconds:g}: "
                "legal are frames from 1, min_seconds from 0 and finite, and max_seconds above 0 and not below min_seconds"
            )

    def windows(self, available: int, fps: float) -> list[tuple[int, int]]:
        """Return first frame and number of frames of each clip of a stretch with so many frames at a rate."""
        least = self.frames or max(1, math.ceil(self.min_seconds * fps - TIE))
        # Where no whole number of frames lies between the two, clips are the fewest frames that last `min_seconds`.
        most = self.frames or (available if math.isinf(self.max_seconds) else max(least, int(self.max_seconds * fps + TIE)))
        starts = range(0, available - least + 1, most)
        return [(first, min(most, available - first)) for first in starts]


@dataclass(frozen=True)
class Skipped:
    """A stretch of a video that became no clip, and why; start and length in seconds, and in frames at the clips' rate."""

    path: str
    start: float
    seconds: float
    frames: int
    reason: Literal["too short", "black", "still"]


@dataclass
class PreparedClips:
    """The clips that `prepare` cut, and the videos and stretches it left out."""

    clips: list[Clip]
    quarantined: list[tuple[str, str]]  # path, reason
    skipped: list[Skipped]
    slower: list[tuple[str, float]]  # path, own rate: below the asked one, so frames repeat
    changed: list[tuple[str, str]]  # path, how its frames were changed for showing: tone-mapped, deinterlaced ...
    # Of each clip: mean difference of a frame from the one before in grey levels; NaN for single frames, empty if not measured.
    motion: list[float] = field(default_factory=list)
    dropped_frames: int = 0  # frames behind the last clip of a stretch


class TooManyUnreadable(UserError):  # noqa: N818
    """More videos are unreadable than may be; `quarantined` has the path and the reason of each."""

    def __init__(self, message: str, quarantined: Sequence[tuple[str, str]]):
        self.quarantined = list(quarantined)
        super().__init__(message)


def prepare(
    videos: Sequence[tuple[str, str]],
    fps: float | None = None,
    lengths: Lengths | None = None,
    max_bad: float = 0.01,
    workers: int = 2,
    progress: bool = True,
    licences: Mapping[str, str] | None = None,
    scenes: bool = False,
    motion: bool = False,
) -> PreparedClips:
    """Decode each video once, strictly, and cut it into clips; each of its captions has clips of its own.

    Args:
        videos: (path, caption) as `list_videos` returns them; the clips of a path with several captions follow one another.
        fps: rate of the clips; None keeps each video's own average rate.
        lengths: how long clips are; None makes one clip of each video, or of each shot.
        max_bad: largest share of unreadable videos, 0 to 1.
        workers: processes that decode; one that dies costs the file that it was decoding.
        progress: show a bar.
        licences: licence of each video, by path, for the index.
        scenes: cut where shots begin, and leave out black and still stretches.
        motion: measure the motion of each clip; with `scenes` it is measured anyway.

    Raises TooManyUnreadable, a UserError that names some of them, if they are more than `max_bad`, and UserError if no clip is
    left, and for `scenes` without PySceneDetect.
    """
    if not 0 < (1 if fps is None else fps) < math.inf or min(workers, len(videos)) < 1 or not 0 <= max_bad <= 1:
        raise UserError(
            f"fps {fps}, max_bad {max_bad}, workers {workers}, {len(videos)} videos: "
            "max_bad is from 0 to 1, fps above 0 and finite, the others are at least 1"
        )
    if scenes:
        check_scenes()
    lengths = lengths or Lengths()
    prepared = PreparedClips([], [], [], [], [])
    captions: dict[str, list[str]] = {}
    for path, caption in videos:
        captions.setdefault(path, []).append(caption)
    with READER.pool(workers) as pool:
        examined = pool.map(partial(_examine, scenes=scenes, motion=motion), captions)
        bar = ProgressBar(examined, total=len(captions), desc="decoding", unit="video", disable=not progress)
        for path, video in zip(captions, bar, strict=True):
            if isinstance(video, UnreadableVideo):
                prepared.quarantined.append((path, video.reason))
                continue
            if video.scanned.facts.notes:
                prepared.changed.append((path, ", ".join(video.scanned.facts.notes)))
            _cut(video, captions[path], (licences or {}).get(path), fps, lengths, prepared)
    bad = prepared.quarantined
    if len(bad) > max_bad * len(captions) or len(bad) == len(captions):
        raise TooManyUnreadable(
            f"{len(bad)} of {len(captions)} videos are unreadable, at most {max_bad:.1%} may be: "
            f"{first_few(f'{path}: {reason}' for path, reason in bad)}; remove them, or re-encode what is odd but "
            f"whole by: {REENCODE}",
            bad,
        )
    if not prepared.clips:
        raise UserError(_nothing(lengths, fps, prepared.skipped))
    return prepared


def _nothing(lengths: Lengths, fps: float | None, skipped: Sequence[Skipped]) -> str:
    """Return in words that no stretch was long enough, with the longest."""
    rate = "" if fps is None else f" at {fps:g} fps"
    asked = f"{lengths.frames} frames{rate}" if lengths.frames else f"{lengths.min_seconds:g} s"
    short = [stretch for stretch in skipped if stretch.reason == "too short"]
    if not short:
        return f"no clip is left: all {len(skipped)} stretches of the videos are black or still"
    longest = max(short, key=lambda stretch: stretch.frames if lengths.frames else stretch.seconds)
    length = f"{longest.frames}" if lengths.frames else f"{longest.seconds:.2f} s"
    place = f", from {longest.start:.2f} s on" if longest.start else ""
    return (
        f"no video has {asked}{' in one shot' if place else ''}: the longest, {longest.path}{place}, has {length}; ask for less"
    )


@dataclass(frozen=True)
class _Examined:
    path: str
    scanned: Scanned
    digest: str
    stamp: tuple[int, int]


def _examine(path: str, scenes: bool, motion: bool) -> _Examined | UnreadableVideo:
    try:
        before = stamp(path)  # first: a file that changes meanwhile has another one
        return _Examined(path, READER.call(scan, path, scenes, motion), digest_file(path), before)
    except UnreadableVideo as error:
        return error
    except UnicodeEncodeError:
        return UnreadableVideo(path, "the decoder cannot open a name that is no UTF-8; rename the file")
    except OSError as error:  # it went away, or may not be read
        return UnreadableVideo(path, error.strerror or str(error))


def frames_at(times: np.ndarray, rate: float) -> int:
    """Return the number of frames at a rate that a stretch shows whose own frames have these times, in seconds."""
    # Readers refuse times more than half a frame of the video after its last one.
    half = float(times[-1] - times[-2]) / 2 if len(times) > 1 else 0.0
    return int(float(times[-1] - times[0]) * rate + min(TIE + ROUNDING * rate, half * rate)) + 1


def _cut(
    video: _Examined,
    captions: Sequence[str],
    licence: str | None,
    fps: float | None,
    lengths: Lengths,
    prepared: PreparedClips,
) -> None:
    """Add the clips of a video, with each of its captions, and what is left out of it, to `prepared`."""
    facts, times = video.scanned.facts, video.scanned.facts.timestamps
    rate, ends = fps or facts.fps, np.append(times[1:], facts.duration)
    clips: list[Clip] = []
    motion: list[float] = []
    for stretch in video.scanned.stretches:
        start = float(times[stretch.first])
        available = frames_at(times[stretch.first : stretch.last + 1], rate)
        windows = [(0, 1)] if is_image(video.path) and not lengths.frames else lengths.windows(available, rate)
        if stretch.kind != "shot" or not windows:
            reason = "too short" if stretch.kind == "shot" else stretch.kind
            prepared.skipped.append(Skipped(video.path, start, float(ends[stretch.last]) - start, available, reason))
            continue
        prepared.dropped_frames += available - sum(count for _, count in windows)
        for first, count in windows:
            at = start + first / rate
            place = (video.path, at, count, rate, facts.width, facts.height)
            clips.append(Clip(*place, captions[0], video.digest, licence, facts.decord, *video.stamp))
            if video.scanned.motion is not None:
                shown = pick_by_time(times, at + np.arange(count) / rate)
                differences = video.scanned.motion[shown[0] + 1 : shown[-1] + 1]
                motion.append(float(differences.mean()) if len(differences) else math.nan)
    for caption in captions:
        prepared.clips += [replace(clip, caption=caption) for clip in clips]
        prepared.motion += motion
    if clips and facts.frames > 1 and rate > facts.fps * (1 + TIE):
        prepared.slower.append((video.path, facts.fps))
