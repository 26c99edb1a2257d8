"""A video of any length beside what each temporal ratio makes of it, and the PSNR of every frame.

Videos are uint8 (T, H, W, 3), read, encoded, decoded and handed on in chunks: memory does not grow with length.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from promag.data.video import VideoSource, read_frames
from promag.tokenizer.geometry import SPATIAL_RATIO
from promag.tokenizer.metrics import from_uint8, psnr_per_frame, to_uint8
from promag.tokenizer.streaming import Padding, chunk_plan, crop_clip, pad_clip, reconstruct_stream
from promag.training.precision import Precision, autocast

from .grid import grid

MOST_PSNR = 120.0  # dB, of frames that are equal: a mean error of 1e-12


class Comparison:
    """Chunks of original | lowest ratio | ... | highest, computed while iterated over, once.

    Args:
        model: the tokenizer.
        ratios: temporal ratios to show.
        video: a file, whose frames from 0 to `count` are shown.
        count: frames.
        chunk: frames in work at a time, a multiple of every ratio.
        size: (height, width) to scale to; None crops sides to multiples of 8.
        enlarge: by how much each pixel is enlarged in what is shown.
        precision: see training/precision.py.
        told: called after each chunk with the frames done.

    Raises ValueError for an illegal chunk.
    """

    def __init__(
        self,
        model: Any,
        ratios: Sequence[int],
        video: VideoSource,
        count: int,
        chunk: int = 64,
        size: tuple[int, int] | None = None,
        enlarge: int = 1,
        precision: Precision = "auto",
        told: Callable[[int], None] = lambda done: None,
    ):
        self.model, self.ratios, self.video, self.count, self.size = model, ratios, video, count, size
        self.enlarge, self.precision, self.told = enlarge, precision, told
        self.plan = chunk_plan(count + -(count - 1) % max(ratios), max(ratios), chunk)
        self.seconds = dict.fromkeys(ratios, 0.0)
        self.frame_psnr: dict[int, list[float]] = {ratio: [] for ratio in ratios}

    def psnr(self, ratio: int) -> float:
        """Return the PSNR over all pixels of the video, in dB."""
        errors = [10 ** (-value / 10) for value in self.frame_psnr[ratio]]
        return -10 * float(np.log10(np.mean(errors)))

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield the video, chunk by chunk."""
        queue: list[Tensor] = []
        streams = {r: reconstruct_stream(self.model, self._chunks(queue, i), r) for i, r in enumerate(self.ratios)}
        done = 0
        for _ in self.plan:
            columns = []
            for ratio, stream in streams.items():
                started = time.perf_counter()
                with autocast(self.model.device, self.precision):
                    columns.append(next(stream).float().cpu())
                self.seconds[ratio] += time.perf_counter() - started
            original = queue.pop()
            behind = max(0, done + original.shape[2] - self.count)  # frames that repeat the last one
            clips = [crop_clip(x, Padding(behind, 0, 0)) for x in (original, *columns)]
            for ratio, clip in zip(self.ratios, clips[1:], strict=True):
                self.frame_psnr[ratio] += psnr_per_frame(clip, clips[0])[0].clamp(max=MOST_PSNR).tolist()
            videos = [to_uint8(clip)[0].numpy().repeat(self.enlarge, 1).repeat(self.enlarge, 2) for clip in clips]
            yield grid(videos, len(videos))
            done += original.shape[2] - behind
            self.told(done)

    def _chunks(self, queue: list[Tensor], reader: int) -> Iterator[Tensor]:
        """Yield the chunks; the first of the streams reads a chunk, the others take what it read."""
        first = 0
        for length in self.plan:
            if reader == 0:
                queue.append(self._read(first, length))
            yield queue[-1].to(self.model.device)
            first += length

    def _read(self, first: int, length: int) -> Tensor:
        indices = [min(first + i, self.count - 1) for i in range(length)]  # behind the end, the last frame again
        pixels = read_frames(self.video, indices)
        x = from_uint8(torch.from_numpy(pixels[None]))
        if self.size:
            frames = F.interpolate(x[0].transpose(0, 1), self.size, mode="bilinear", antialias=True)
            x = frames.transpose(0, 1)[None]
        else:
            height, width = (max(SPATIAL_RATIO, side // SPATIAL_RATIO * SPATIAL_RATIO) for side in pixels.shape[1:3])
            x = x[..., :height, :width]
        return pad_clip(from_uint8(to_uint8(x)), 1)[0]  # what is compared with is what is shown


def fit_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Return (height, width) in multiples of 8, with `side` as the shorter one unless the picture is smaller already."""
    scale = min(1.0, side / min(height, width))
    fitted = (max(SPATIAL_RATIO, round(x * scale / SPATIAL_RATIO) * SPATIAL_RATIO) for x in (height, width))
    height, width = fitted
    return height, width
