"""Crops of clips: which frames an item shows, and which part of the picture at what size.

Shapes: T H W C uint8 pixels of files, C T H W float32 in [-1, 1] of items.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from promag.training.config import UserError

from .clip_index import Clip
from .video import UnreadableVideo, VideoSource, frame_times, pick_by_time, read_frames

CHUNK = 256  # frames of a clip that are read and scaled at a time: pixels of files are many times as large as scaled ones


class ClipCrop:
    """Takes `frames` frames of a clip, resized and cropped to `size`.

    Args:
        frames: T.
        size: H and W; an int is both. The picture is scaled to cover it and cropped.
        temporal_strides: strides to choose from, of those that fit into the clip.

    Raises UserError for numbers that are not positive.
    """

    def __init__(self, frames: int, size: int | tuple[int, int], temporal_strides: Sequence[int] = (1,)):
        height, width = (size, size) if isinstance(size, int) else size
        if frames < 1 or height < 1 or width < 1 or not temporal_strides or min(temporal_strides) < 1:
            raise UserError(
                f"frames {frames}, size {size}, temporal_strides {temporal_strides}: whole numbers from 1 up are legal"
            )
        self.frames, self.size, self.strides = frames, (height, width), tuple(temporal_strides)

    @property
    def needed(self) -> int:
        """The number of frames that a clip must have."""
        return self.span(min(self.strides))

    def span(self, stride: int) -> int:
        """Return the number of clip frames from a crop's first frame to its last."""
        return (self.frames - 1) * stride + 1

    def scaled(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width of a picture after scaling it to cover `size`."""
        scale = max(self.size[0] / height, self.size[1] / width)
        return max(self.size[0], round(height * scale)), max(self.size[1], round(width * scale))

    def random(self, video: VideoSource | Tensor, clip: Clip, rng: np.random.Generator) -> dict[str, Any]:
        """Return a random crop: video, caption, start, stride and fps.

        `video` is a file, or what `all_frames` returned of it.
        """
        stride = int(rng.choice([s for s in self.strides if self.span(s) <= clip.frames]))
        start = int(rng.integers(clip.frames - self.span(stride) + 1))
        pixels = self._resized(video, clip, start, stride)
        top, left = (int(rng.integers(side - target + 1)) for side, target in zip(pixels.shape[2:], self.size, strict=True))
        return self._item(clip, start, stride, pixels, top, left)

    def first(self, video: VideoSource | Tensor, clip: Clip) -> dict[str, Any]:
        """Return the first frames at stride 1, cropped in the centre."""
        pixels = self._resized(video, clip, 0, 1)
        top, left = ((side - target) // 2 for side, target in zip(pixels.shape[2:], self.size, strict=True))
        return self._item(clip, 0, 1, pixels, top, left)

    def all_frames(self, video: VideoSource, clip: Clip) -> Tensor:
        """Read all frames of a clip, scaled to cover `size`: uint8 T C H W, of which every crop is a slice."""
        chunks = np.split(np.arange(clip.frames), range(CHUNK, clip.frames, CHUNK))
        return torch.cat([self._read(video, clip, offsets) for offsets in chunks])

    def _resized(self, video: VideoSource | Tensor, clip: Clip, start: int, stride: int) -> Tensor:
        """Return the frames of a crop, scaled to cover `size`: uint8 T C H W."""
        if isinstance(video, Tensor):
            return video[start : start + self.span(stride) : stride]
        return self._read(video, clip, start + stride * np.arange(self.frames))

    def _read(self, video: VideoSource, clip: Clip, offsets: np.ndarray) -> Tensor:
        """Read the frames of a clip at `offsets` and scale them to cover `size`: uint8 T C H W.

        Raises UnreadableVideo as `read_frames` does, and where the video is shorter than its clip.
        """
        try:
            indices = pick_by_time(frame_times(video), clip.start + offsets / clip.fps)
        except UserError:
            raise
        except ValueError as error:
            reason = f"it is not as long as the index states ({error}); prepare the clips again"
            raise UnreadableVideo(video, reason) from error
        pixels = read_frames(video, indices, decord=clip.decord)
        frames = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2)
        # In 8 bits this is eight times as fast as in float32, within one grey level of it. decord can decode to this
        # size itself; that saves a quarter at 720p and nothing at 256p, and its scaler aliases at the edges.
        return F.interpolate(frames, self.scaled(*frames.shape[2:]), mode="bilinear", antialias=True)

    def _item(self, clip: Clip, start: int, stride: int, pixels: Tensor, top: int, left: int) -> dict[str, Any]:
        height, width = self.size
        video = to_model(pixels[:, :, top : top + height, left : left + width])
        return {"video": video, "caption": clip.caption, "start": start, "stride": stride, "fps": clip.fps / stride}


def to_model(video: Tensor) -> Tensor:
    """Turn uint8 T C H W into float32 C T H W in [-1, 1]."""
    # In place: fresh memory for each step costs more than the arithmetic.
    return video.permute(1, 0, 2, 3).to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1)
