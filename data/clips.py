"""Decode captioned videos strictly, once, and cut them into clips.

list_videos -> prepare -> save_clips -> clips.jsonl -> load_clips
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from promag.training.config import UserError
from promag.training.progress import ProgressBar

from .clip_index import Clip
from .listing import first_few
from .unchanged import digest_file, stamp
from .video import READER, REENCODE, TIE, UnreadableVideo, VideoFacts, decode_strictly


@dataclass(frozen=True)
class PreparedClips:
    """The clips that `prepare` cut, and the videos it left out."""

    clips: list[Clip]
    quarantined: list[tuple[str, str]]  # path, reason
    too_short: list[tuple[str, int]]  # path, frames at the asked rate
    slower: list[tuple[str, float]]  # path, own rate: below the asked one, so frames repeat
    dropped_frames: int  # of the remainders behind the last whole window
    changed: list[tuple[str, str]]  # path, how its frames were changed for showing: tone-mapped, deinterlaced ...


class TooManyUnreadable(UserError):  # noqa: N818
    """More videos are unreadable than may be; `quarantined` has the path and the reason of each."""

    def __init__(self, message: str, quarantined: Sequence[tuple[str, str]]):
        self.quarantined = list(quarantined)
        super().__init__(message)


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
        workers: processes that decode; one that dies costs the file that it was decoding.
        progress: show a bar.
        licences: licence of each video, by path, for the index.

    Raises TooManyUnreadable, a UserError that names some of them, if they are more than `max_bad`, and UserError if no clip is
    left.
    """
    positive = (1 if fps is None else fps, 1 if frames is None else frames, workers, len(videos))
    if min(positive) <= 0 or not 0 <= max_bad <= 1:
        raise UserError(
            f"fps {fps}, frames {frames}, max_bad {max_bad}, workers {workers}, {len(videos)} videos: "
            "max_bad is from 0 to 1, the others are above 0"
        )
    clips, quarantined, too_short, slower, changed, dropped, longest = [], [], [], [], [], 0, ("", 0)
    pool = ThreadPoolExecutor(workers)
    try:
        examined = pool.map(_examine, [path for path, _ in videos])
        bar = ProgressBar(examined, total=len(videos), desc="decoding", unit="video", disable=not progress)
        for (path, caption), result in zip(videos, bar, strict=True):
            if isinstance(result, UnreadableVideo):
                quarantined.append((path, result.reason))
                continue
            facts, digest, (size, modified) = result
            changed += [(path, ", ".join(facts.notes))] if facts.notes else []
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
                licence = (licences or {}).get(path)
                clips.append(Clip(path, *facts_of_clip, caption, digest, licence, facts.decord, size, modified))
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupted call must not decode the rest first
    if len(quarantined) > max_bad * len(videos) or len(quarantined) == len(videos):
        raise TooManyUnreadable(
            f"{len(quarantined)} of {len(videos)} videos are unreadable, at most {max_bad:.1%} may be: "
            f"{first_few(f'{path}: {reason}' for path, reason in quarantined)}; remove them, or re-encode what is odd but "
            f"whole by: {REENCODE}",
            quarantined,
        )
    if not clips:
        asked = f"{frames} frames" if fps is None else f"{frames} frames at {fps:g} fps"
        raise UserError(f"no video has {asked}: the longest, {longest[0]}, has {longest[1]}; ask for fewer")
    return PreparedClips(clips, quarantined, too_short, slower, dropped, changed)


def _examine(path: str) -> tuple[VideoFacts, str, tuple[int, int]] | UnreadableVideo:
    try:
        before = stamp(path)  # first: a file that changes meanwhile has another one
        return READER.call(decode_strictly, path), digest_file(path), before
    except UnreadableVideo as error:
        return error
    except UnicodeEncodeError:
        return UnreadableVideo(path, "the decoder cannot open a name that is no UTF-8; rename the file")
    except OSError as error:  # it went away, or may not be read
        return UnreadableVideo(path, error.strerror or str(error))
