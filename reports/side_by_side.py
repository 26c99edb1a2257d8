"""Videos side by side in one, which therefore play in step. Videos are uint8 (T, H, W, 3).

`Comparison` shows a video of any length beside its reconstructions at several temporal ratios, with the PSNR of every frame.
It reads, encodes, decodes and yields in chunks: memory does not grow with length.
"""

import base64
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from promag.data.video import encode_mp4
from promag.tokenizer.geometry import SPATIAL_RATIO
from promag.tokenizer.metrics import from_uint8, psnr_per_frame, to_uint8
from promag.tokenizer.streaming import Padding, chunk_plan, crop_clip, pad_clip, reconstruct_stream
from promag.training.precision import Precision, autocast

GAP = 4  # pixels between videos
GREY = 128
TILE = 128  # pixels: narrower videos are enlarged on pages, because 4:2:0 halves the resolution of colours
CHUNK = 64  # frames processed at a time
PIXELS = CHUNK * 512 * 512  # pixels that are processed at a time, at most, unless one latent frame has more
# Pixels of the longer side, and in all, of H.264 videos: what players take with the help of hardware (level 5.2), and the
# largest level (6.2).
USUAL, LARGEST = (4096, 4096 * 2304), (8192, 8192 * 4352)


def grid(videos: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Return videos of one shape as one video, row by row with grey between; the rest of the last row is grey.

    Raises ValueError without videos, for less than one column and for videos that differ in shape.
    """
    shapes = sorted({video.shape for video in videos})
    if len(shapes) != 1 or columns < 1:
        raise ValueError(f"{len(videos)} videos of shapes {shapes} in {columns} columns: one shape, and a column, are needed")
    frames, height, width, _ = shapes[0]
    columns, rows = min(columns, len(videos)), -(-len(videos) // columns)
    size = (rows * (height + GAP) - GAP, columns * (width + GAP) - GAP)
    whole = np.full((frames, *size, 3), GREY, np.uint8)
    for i, video in enumerate(videos):
        top, left = i // columns * (height + GAP), i % columns * (width + GAP)
        whole[:, top : top + height, left : left + width] = video
    return whole


def enlargement(width: int, tile: int = TILE) -> int:
    """Return the factor that brings videos of this width to about `tile` pixels, at least 1."""
    return max(1, round(tile / width))


def enlarge(video: np.ndarray, scale: int) -> np.ndarray:
    """Repeat every pixel `scale` times in height and width."""
    return video.repeat(scale, 1).repeat(scale, 2)


@dataclass(frozen=True, eq=False)
class Film:
    """Labelled videos of one shape as the tiles of one mp4, row by row.

    Args:
        labels: labels of the tiles, in order.
        shape: (frames, height, width) of one video, before it is enlarged.
        fps: frames a second.
        scale: factor by which pixels are enlarged.
        columns: tiles in a row.
        mp4: the file.
    """

    labels: tuple[str, ...]
    shape: tuple[int, int, int]
    fps: float
    scale: int
    columns: int
    mp4: bytes

    @property
    def height(self) -> int:
        """Pixels of the whole."""
        rows = -(-len(self.labels) // self.columns)
        return rows * (self.shape[1] * self.scale + GAP) - GAP

    @property
    def width(self) -> int:
        """Pixels of the whole."""
        return self.columns * (self.shape[2] * self.scale + GAP) - GAP

    @property
    def base64(self) -> str:
        """The mp4 as text."""
        return base64.b64encode(self.mp4).decode()

    @property
    def layout(self) -> dict[str, int]:
        """Position of each tile, for the player of the page."""
        return {"height": self.shape[1], "width": self.shape[2], "scale": self.scale, "columns": self.columns, "gap": GAP}


def make_film(
    title: str,
    videos: Mapping[str, np.ndarray],
    fps: float,
    columns: int | None = None,
    crf: int = 20,
    key_every: int | None = None,
    tile: int = TILE,
) -> Film:
    """Encode labelled videos, in one row or in rows of `columns`, enlarged to about `tile` pixels each.

    Raises ValueError, which names `title`, unless all are uint8 (T, H, W, 3) of one shape.
    """
    shapes = {label: (video.shape, str(video.dtype)) for label, video in videos.items()}
    first: Any = next(iter(videos.values()), np.empty(0))
    if len(set(shapes.values())) != 1 or first.dtype != np.uint8 or first.ndim != 4 or first.shape[-1] != 3:
        given = ", ".join(f"{label} is {dtype} {shape}" for label, (shape, dtype) in shapes.items()) or "there is none"
        raise ValueError(f"videos of {title!r}: {given}; all must be uint8 (T, H, W, 3) of one shape")
    frames, height, width, _ = first.shape
    scale, columns = enlargement(width, tile), min(columns or len(videos), len(videos))
    mp4 = encode_mp4(grid([enlarge(video, scale) for video in videos.values()], columns), fps, crf, key_every)
    return Film(tuple(videos), (frames, height, width), fps, scale, columns, mp4)


class Comparison:
    """Chunks of original | lowest ratio | ... | highest, computed while iterated over, once.

    Args:
        model: the tokenizer.
        ratios: temporal ratios to show.
        pictures: the frames, uint8 (H, W, 3), taken as they are needed; sides are cropped to multiples of the spatial ratio.
        count: number of the frames.
        chunk: frames processed at a time, a multiple of every ratio; a model that cannot stream processes all at once.
        enlarge: factor by which the pixels shown are enlarged.
        precision: see training/precision.py.
        on_progress: called after each chunk with the frames done.

    Raises ValueError for an illegal chunk.
    """

    def __init__(
        self,
        model: Any,
        ratios: Sequence[int],
        pictures: Iterable[np.ndarray],
        count: int,
        chunk: int = CHUNK,
        enlarge: int = 1,
        precision: Precision = "auto",
        on_progress: Callable[[int], None] = lambda done: None,
    ):
        self.model, self.ratios, self.pictures, self.count = model, ratios, iter(pictures), count
        self.enlarge, self.on_progress = enlarge, on_progress
        self.precision: Precision = precision
        step = max(ratios) * model.latent_step
        padded = count + -(count - 1) % step
        self.plan = chunk_plan(padded, step, chunk) if model.can_stream else [padded]
        self.seconds = dict.fromkeys(ratios, 0.0)
        self.frame_psnr: dict[int, list[float]] = {ratio: [] for ratio in ratios}

    def psnr(self, ratio: int) -> float:
        """Return the PSNR over all pixels of the video, in dB."""
        errors = [10 ** (-value / 10) for value in self.frame_psnr[ratio]]
        return -10 * float(np.log10(np.mean(errors)))

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield the video, chunk by chunk."""
        current: list[Tensor] = []  # the chunk that all streams work on
        streams = {ratio: reconstruct_stream(self.model, self._chunks(current), ratio) for ratio in self.ratios}
        done = 0
        for length in self.plan:
            current[:] = [self._read(length)]
            surplus = max(0, done + length - self.count)  # frames that repeat the last one
            original = crop_clip(current[0], Padding(surplus, 0, 0))
            if not done:
                self._warm_up(current[0])
            videos = [self._shown(original)]
            for ratio, stream in streams.items():
                started = time.perf_counter()
                with autocast(self.model.device, self.precision):
                    clip = next(stream).float().cpu()
                self.seconds[ratio] += time.perf_counter() - started
                clip = crop_clip(clip, Padding(surplus, 0, 0))
                self.frame_psnr[ratio] += psnr_per_frame(clip, original)[0].tolist()
                videos.append(self._shown(clip))
                del clip
            yield grid(videos, len(videos))
            done += length - surplus
            self.on_progress(done)

    def _warm_up(self, first: Tensor) -> None:
        """Reconstruct the fewest frames at each ratio, untimed: the first call takes longer, whichever ratio has it."""
        for ratio in self.ratios:
            clip = first[:, :, : 1 + ratio * self.model.latent_step].to(self.model.device)
            with autocast(self.model.device, self.precision):
                next(reconstruct_stream(self.model, [clip], ratio))

    def _chunks(self, current: list[Tensor]) -> Iterator[Tensor]:
        while True:
            yield current[0].to(self.model.device)

    def _shown(self, clip: Tensor) -> np.ndarray:
        return enlarge(to_uint8(clip)[0].numpy(), self.enlarge)

    def _read(self, length: int) -> Tensor:
        frames = [_cropped(picture, self.model.spatial_ratio) for picture in itertools.islice(self.pictures, length)]
        frames += frames[-1:] * (length - len(frames))  # after the end, the last frame again
        return pad_clip(from_uint8(torch.from_numpy(np.stack(frames))[None]), 1, self.model.spatial_ratio)[0]


def _cropped(picture: np.ndarray, multiple: int) -> np.ndarray:
    height, width = (max(multiple, side // multiple * multiple) for side in picture.shape[:2])
    return picture[:height, :width]


def chunk_of(height: int, width: int, ratios: Sequence[int], latent_step: int = 1) -> int:
    """Return how many frames of a size are processed at a time: CHUNK, fewer of large ones, a multiple of every ratio.

    A base whose clips have 1 + k*latent_step latent frames needs as many times of it.
    """
    step = max(ratios) * latent_step
    return max(step, min(CHUNK, PIXELS // (height * width)) // step * step)


def largest_side(height: int, width: int, columns: int, limit: tuple[int, int] = USUAL) -> int:
    """Return the largest shorter side at which so many of these pictures in a row are no larger than `limit`."""
    side = min(height, width)
    while side > SPATIAL_RATIO:
        high, wide = fit_size(height, width, side)
        whole = columns * (wide + GAP) - GAP
        if max(whole, high) <= limit[0] and high * whole <= limit[1]:
            break
        side -= 1
    return side


def fit_size(height: int, width: int, side: int, longest: int | None = None, multiple: int = SPATIAL_RATIO) -> tuple[int, int]:
    """Return (height, width) in multiples of `multiple`, with `side` as the shorter one unless the picture is smaller already.

    With `longest` the longer side is at most so many pixels, and the shorter one less than `side` where that needs it.
    """
    scale = min(1.0, side / min(height, width), (longest or math.inf) / max(height, width))
    fitted = (max(multiple, round(x * scale / multiple) * multiple) for x in (height, width))
    height, width = fitted
    return height, width
