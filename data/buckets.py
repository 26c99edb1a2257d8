"""Buckets: the few lengths and sizes at which clips are trained on, so that all clips of a batch have one shape.

Each clip belongs to one bucket, chosen by its length and size. Each batch comes from one bucket, the same on all ranks.
Images, and videos too short for the other buckets, belong to a bucket of one frame.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from promag.training.config import UserError, required, setting

NONE = -1  # in place of a bucket: a clip too short for all of them
_CHUNK = 65_536  # clips assigned at a time, which bounds the memory it takes


@dataclass(frozen=True)
class Bucket:
    """A length and size of clips, and the batch size at which they are trained on."""

    frames: int = required("frames of its clips: 1 + ratio*k; 1 takes images")
    height: int = required("height of the clips, in pixels")
    width: int = required("width of the clips, in pixels")
    batch_size: int | None = setting(None, "clips of a batch on each process; null for the loop's")

    def __post_init__(self) -> None:
        """Raise ValueError for a shape without pixels or an empty batch."""
        if min(self.frames, self.height, self.width) < 1 or (self.batch_size is not None and self.batch_size < 1):
            raise ValueError(f"bucket {self}, batch_size {self.batch_size}: whole numbers from 1 up are legal")

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


def read_size(given: Any) -> Any:
    """Return a size as configurations and options give it; raises ValueError for what is neither a number nor two."""
    numbers = given if isinstance(given, list | tuple) else [given]
    if len(numbers) not in (1, 2) or any(type(number) is not int for number in numbers):
        raise ValueError(f"{given}: one number of pixels for height and width, or [height, width], is needed")
    return numbers[0] if len(numbers) == 1 else tuple(numbers)


def sides(size: int | Sequence[int]) -> tuple[int, int]:
    """Return height and width of a size: one number for both, or the two."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


class Buckets:
    """Assigns clips to buckets.

    A clip goes to the longest buckets that it has the frames for; among their sizes to the nearest in aspect ratio; among
    those of one aspect ratio to the largest that needs no enlarging, else to the smallest.

    Args:
        buckets: the buckets, each of another shape.
        stride: the smallest step from one frame of a crop to the next, in frames of the clip.

    Raises UserError where there is no bucket and where two have one shape.
    """

    def __init__(self, buckets: Sequence[Bucket], stride: int = 1):
        names = [str(bucket) for bucket in buckets]
        if not names or len(set(names)) < len(names):
            raise UserError(f"buckets {', '.join(names) or 'none'}: one or more are needed, each shape once")
        self.buckets, self.stride = tuple(buckets), stride

    def assign(self, frames: np.ndarray, height: np.ndarray, width: np.ndarray) -> np.ndarray:
        """Return the number of each clip's bucket, or NONE; all arguments have the shape (clips,)."""
        starts = range(0, len(frames), _CHUNK)
        parts = [self._assign(*(values[i : i + _CHUNK] for values in (frames, height, width))) for i in starts]
        return np.concatenate([np.empty(0, np.int16), *parts])

    def _assign(self, frames: np.ndarray, height: np.ndarray, width: np.ndarray) -> np.ndarray:
        lengths, heights, widths = (
            np.array([getattr(bucket, key) for bucket in self.buckets])[:, None] for key in ("frames", "height", "width")
        )
        fits = (lengths - 1) * self.stride + 1 <= frames  # buckets x clips, as all below
        with np.errstate(invalid="ignore"):  # bad samples of shards, 0 frames of 0 x 0, fit no bucket
            aspect_gap = np.abs(np.log(widths / heights) - np.log(width / height))
        enlarged = (heights > height) | (widths > width)
        area = np.where(enlarged, heights * widths, -heights * widths)
        order = np.lexsort((area, enlarged, aspect_gap, np.broadcast_to(-lengths, fits.shape), ~fits), axis=0)
        return np.where(fits.any(0), order[0], NONE).astype(np.int16)

    def batch_sizes(self, default: int) -> list[int]:
        """Return each bucket's batch size; `default` is that of buckets that state none."""
        return [default if bucket.batch_size is None else bucket.batch_size for bucket in self.buckets]


def bucket_plan(buckets: Sequence[Bucket], clips: Sequence[int], batch_sizes: Sequence[int], weights: Sequence[float]) -> str:
    """Return a table for the log: bucket, clips, batch size, share of the steps (in proportion to `weights`)."""
    rows = [("bucket", "clips", "batch", "steps")]
    for bucket, count, size, weight in zip(buckets, clips, batch_sizes, weights, strict=True):
        rows.append((str(bucket), f"{count}", f"{size}", f"{weight / sum(weights):.1%}"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)
