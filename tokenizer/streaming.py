"""Reconstruct clips of any length and size: pad them to a legal size, work in chunks if asked, crop the padding off again.

Shapes: B C T H W in [-1, 1]. Chunked results equal those of the whole clip; memory depends on the chunk, not the length.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import SPATIAL_RATIO, check_frames, check_integer
from .layers import START


@dataclass(frozen=True)
class Padding:
    """The frames, rows and columns added at the end of a clip by repeating its last ones."""

    frames: int
    rows: int
    columns: int


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """A reconstructed clip of the input's size, and the padding that was needed."""

    sample: Tensor
    padding: Padding


def pad_clip(x: Tensor, frame_step: int, multiple: int = SPATIAL_RATIO) -> tuple[Tensor, Padding]:
    """Repeat the last frame up to 1 + k*frame_step frames and the last row and column up to multiples of `multiple`."""
    if not isinstance(x, Tensor) or x.ndim != 5 or not x.numel():
        given = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"type {type(x).__name__}"
        raise ValueError(f"input of {given}: a tensor B C T H W with at least one frame is needed")
    frames = -(x.shape[2] - 1) % frame_step
    rows, columns = (-side % multiple for side in x.shape[3:])
    if frames or rows or columns:
        x = F.pad(x, (0, columns, 0, rows, 0, frames), mode="replicate")
    return x, Padding(frames, rows, columns)


def crop_clip(x: Tensor, padding: Padding) -> Tensor:
    """Remove the padding that `pad_clip` added."""
    t, h, w = (size - cut for size, cut in zip(x.shape[2:], (padding.frames, padding.rows, padding.columns), strict=True))
    return x[:, :, :t, :h, :w]


def chunk_plan(frames: int, temporal_ratio: int, chunk: int) -> list[int]:
    """Return the frames of each chunk of a clip of 1 + r*N frames: 1 + about `chunk`, then about `chunk` each.

    Raises ValueError for a chunk that is no positive multiple of the ratio.
    """
    check_frames(frames, temporal_ratio)
    check_integer("chunk", chunk)
    if chunk < temporal_ratio or chunk % temporal_ratio:
        raise ValueError(f"chunk of {chunk} frames: {temporal_ratio}x needs a positive multiple of {temporal_ratio}")
    plan, left = [min(frames, 1 + chunk)], frames - 1 - chunk
    while left > 0:
        plan.append(min(chunk, left))
        left -= chunk
    return plan


@torch.no_grad()
def reconstruct_stream(model: Any, chunks: Iterable[Tensor], temporal_ratio: int | None = None) -> Iterator[Tensor]:
    """Yield the reconstruction of each chunk of a stream: 1 + r*N frames first, then multiples of r.

    A model that cannot stream reconstructs the first chunk as a whole clip; a second one raises ValueError.
    """
    chunks = iter(chunks)
    if not model.can_stream:
        yield model(next(chunks), temporal_ratio).sample
        for _ in chunks:
            model.check_can_stream()
        return
    encoding, decoding = START, START
    for chunk in chunks:
        posterior, encoding = model.encode_chunk(chunk, encoding, temporal_ratio)
        sample, decoding = model.decode_chunk(posterior.mode(), decoding, temporal_ratio)
        yield sample


@torch.no_grad()
def reconstruct(model: Any, x: Tensor, temporal_ratio: int | None = None, chunk: int | None = None) -> Reconstruction:
    """Encode and decode a clip or image of any frame count and size at one ratio, from the posterior's mean.

    With `chunk`, a multiple of the ratio and of the base's stretches, that many frames are processed at a time; the result is
    the same.
    """
    ratio = model.temporal_ratios[model.level_of(temporal_ratio)]
    step = ratio * model.latent_step
    padded, padding = pad_clip(x, step, model.spatial_compression_ratio)
    if chunk is None:
        sample = model(padded, ratio).sample
    else:
        parts = padded.split(chunk_plan(padded.shape[2], step, chunk), 2)
        sample = torch.cat(list(reconstruct_stream(model, parts, ratio)), 2)
    return Reconstruction(crop_clip(sample, padding), padding)
