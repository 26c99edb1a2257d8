"""Shots of a film: stretches between the cuts that PySceneDetect finds, without black and still parts.

A `Scan` sees every frame in order, scaled down, and keeps nine bytes of each, so a film may be of any length.
"""

from array import array
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np

from promag.training.config import UserError

from .video import VideoFacts, VideoSource, decode_strictly, is_image

# As in ffmpeg's blackdetect: this part of a black frame's pixels is darker than a tenth of white.
BLACK_SHARE, BLACK_LEVEL = 0.98, 25.5
# As long as in ffmpeg's freezedetect. Blocks are compared by their means, in which the noise of encoders cancels out, and one
# by one, because a talking mouth is a small part of the picture. x264 moves a still block by up to 1.4 grey levels at crf 23
# and 3.8 at crf 32; of 333 filmed clips all but one move some block by more than 4 in any 2 seconds.
STILL_SECONDS, STILL_LEVELS, BLOCK = 2.0, 4.0, 8
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)

Kind = Literal["shot", "black", "still"]


@dataclass(frozen=True)
class Stretch:
    """Frames of a video by their numbers, both ends included."""

    first: int
    last: int
    kind: Kind = "shot"


@dataclass(frozen=True, eq=False)
class Scanned:
    """A video's facts, its stretches in order, and the motion of each frame (see `Scan.motion`), if it was measured."""

    facts: VideoFacts
    stretches: list[Stretch]
    motion: np.ndarray | None = None


def check_scenes() -> None:
    """Raise UserError where PySceneDetect is not installed."""
    if find_spec("scenedetect") is None or find_spec("cv2") is None:
        raise UserError("scenes: PySceneDetect is not installed, which finds them; run pip install 'promag[scenes]'")


def scan(source: VideoSource, cuts: bool, motion: bool) -> Scanned:
    """Decode a video strictly, as `decode_strictly`; with `cuts`, find its shots and measure motion, else one or neither."""
    if not (cuts or motion):
        facts = decode_strictly(source, decord=True)
        return Scanned(facts, [Stretch(0, facts.frames - 1)])
    if is_image(source):
        return Scanned(decode_strictly(source, decord=True), [Stretch(0, 0)], np.zeros(1, np.float32))
    watcher = Scan(cuts)
    facts = decode_strictly(source, decord=True, watch=watcher.watch)
    return Scanned(facts, watcher.stretches(facts.timestamps), watcher.motion)


class Scan:
    """Watches the frames of a video: their motion and, with `cuts`, where shots begin."""

    def __init__(self, cuts: bool):
        self._detector = _Detector() if cuts else None
        self._motion, self._black, self._still_since = array("f"), array("b"), array("i")
        self._luma = self._held = np.empty((0, 0), np.float32)

    def watch(self, picture: np.ndarray) -> None:
        """See the next frame, uint8 (H, W, 3)."""
        number, luma = len(self._motion), picture @ _LUMA
        self._motion.append(float(np.abs(luma - self._luma).mean()) if number else 0.0)
        self._luma = luma
        if self._detector:
            self._detector.watch(picture)
            self._black.append(bool((luma < BLACK_LEVEL).mean() >= BLACK_SHARE))
            means = _block_means(luma)
            if not number or np.abs(means - self._held).max() > STILL_LEVELS:
                self._held, since = means, number
            else:
                since = self._still_since[-1]
            self._still_since.append(since)

    @property
    def motion(self) -> np.ndarray:
        """(frames,) mean difference of each frame from the one before, in grey levels of 255; 0 for the first."""
        return np.array(self._motion)

    def stretches(self, timestamps: np.ndarray) -> list[Stretch]:
        """Return the shots of the video, and the black and still stretches between them or inside them, in order.

        A shot without any movement is still, however short it is; other still stretches have STILL_SECONDS at least.
        `timestamps` are the times of the frames in seconds. Without `cuts` the whole video is one shot.
        """
        count = len(self._motion)
        if self._detector is None:
            return [Stretch(0, count - 1)]
        shot = np.zeros(count, np.int64)
        shot[self._detector.finish()] = 1
        shot, since, black = shot.cumsum(), np.array(self._still_since), np.array(self._black, bool)
        still = np.zeros(count, bool)
        for part in _runs(since, shot, black):
            still[part.first : part.last + 1] = timestamps[part.last] - timestamps[part.first] >= STILL_SECONDS
        still &= ~black
        inside = ~(black | still)
        stretches = []
        for part in _runs(np.where(inside, shot, -1), np.where(still, since, -1), black):
            unmoved = part.first < part.last and since[part.last] <= part.first
            kind: Kind = "black" if black[part.first] else "still" if still[part.first] or unmoved else "shot"
            stretches.append(Stretch(part.first, part.last, kind))
        return stretches


def _block_means(luma: np.ndarray) -> np.ndarray:
    """Return the mean of each BLOCK x BLOCK pixels; narrow pictures have narrower blocks, and the last ones are left out."""
    height, width = (min(BLOCK, side) for side in luma.shape)
    rows, columns = luma.shape[0] // height, luma.shape[1] // width
    return luma[: rows * height, : columns * width].reshape(rows, height, columns, width).mean((1, 3))


def _runs(*labels: np.ndarray) -> list[Stretch]:
    """Return the longest stretches in which no label changes."""
    changes = np.logical_or.reduce([np.diff(values) != 0 for values in labels])
    starts = [0, *(np.flatnonzero(changes) + 1).tolist()]
    return [Stretch(first, after - 1) for first, after in zip(starts, [*starts[1:], len(labels[0])], strict=True)]


class _Detector:
    """PySceneDetect's AdaptiveDetector, which measures a change of picture against those just before and after.

    So it says nothing of the first and last frames of a film; they are shown to it repeatedly.
    """

    REPEATS = 2  # frames before and after that a change is measured against

    def __init__(self):
        from scenedetect import AdaptiveDetector

        self._detector: Any = AdaptiveDetector(window_width=self.REPEATS, min_scene_len=1)
        self._shown, self._cuts = 0, []
        self._last: np.ndarray | None = None

    def watch(self, picture: np.ndarray) -> None:
        bgr = np.ascontiguousarray(picture[..., ::-1])
        for _ in range(1 if self._shown else 1 + self.REPEATS):
            self._show(bgr)
        self._last = bgr

    def finish(self) -> list[int]:
        """Return the numbers of the frames that begin a shot, other than the first."""
        if self._last is not None:
            for _ in range(self.REPEATS):
                self._show(self._last)
            self._last = None
        return self._cuts

    def _show(self, bgr: np.ndarray) -> None:
        from scenedetect import FrameTimecode

        # Of its times the detector uses the numbers of frames alone.
        found = self._detector.process_frame(FrameTimecode(self._shown, fps=25.0), bgr)
        self._cuts += [cut.frame_num - self.REPEATS for cut in found]
        self._shown += 1
