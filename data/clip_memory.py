"""Clips cached in memory: decoded and scaled at their first reading, by whichever process of a loader comes first.

Shapes: T C H W uint8, of all frames of a clip, scaled to cover a size and not yet cropped.
"""

import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from promag.training.config import UserError

from .clip_index import Clip, column
from .crops import ClipCrop
from .unchanged import check_unchanged
from .video import UnreadableVideo

logger = logging.getLogger(__name__)


class ClipMemory:
    """Room for all frames of all of `clips`, at the scale of `crop`, shared with processes started later.

    The room is reserved at once, so that a training that does not fit ends before its first step; its size is logged.
    Raises UserError where there is not so much shared memory.
    """

    def __init__(self, clips: Sequence[Clip], crop: ClipCrop):
        self._crop = crop
        sizes = zip(column(clips, "height").tolist(), column(clips, "width").tolist(), strict=True)
        frames = column(clips, "frames").tolist()
        self._shapes = np.array([(count, 3, *crop.scaled(*size)) for count, size in zip(frames, sizes, strict=True)])
        self._ends = self._shapes.prod(axis=1).cumsum()
        self.bytes = int(self._ends[-1])
        try:
            self._pixels, self._cached = _shared(self.bytes), _shared(len(clips))
        except RuntimeError as error:
            raise UserError(
                f"in_memory true: {len(clips)} clips need {self.bytes / 2**30:.2f} GiB of shared memory, which cannot be had "
                f"({error}); in_memory: false reads them from their files"
            ) from None
        self._cached.zero_()
        logger.info("%.2f GiB of shared memory are reserved for %d clips", self.bytes / 2**30, len(clips))

    @property
    def cached(self) -> int:
        """Count the clips that were read, by any process."""
        return int(self._cached.sum(dtype=torch.int64))

    def frames(self, index: int, clip: Clip) -> Tensor:
        """Return all frames of clip `index`, not to be changed.

        Raises UnreadableVideo as `read_frames` does, where the video has changed, and where it has not the length or the size
        that the index states.
        """
        shape = self._shapes[index].tolist()
        end = int(self._ends[index])
        room = self._pixels[end - int(np.prod(shape)) : end].view(shape)
        if not self._cached[index]:
            check_unchanged(clip)
            pixels = self._crop.all_frames(clip.path, clip)
            if pixels.shape != room.shape:
                raise UnreadableVideo(
                    clip.path,
                    f"its picture does not have the size that the index states, {clip.width}x{clip.height} "
                    f"({_size(pixels)} after scaling, {_size(room)} expected); prepare the clips again",
                )
            # Two processes may be here at once: they write the same bytes, and each its mark when all of them are there.
            room.copy_(pixels)
            self._cached[index] = 1
        return room


def _shared(count: int) -> Tensor:
    # Tensor.share_memory_ would fill as much again first and copy it: ten times as long, for bytes that mean nothing.
    return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(count))  # pyright: ignore


def _size(pixels: Tensor) -> str:
    return f"{pixels.shape[3]}x{pixels.shape[2]}"
