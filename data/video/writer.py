"""Writing videos: H.264 in mp4, which appears at its place only when it is whole."""

import itertools
import os
import tempfile
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from promag.training.files import replaced_file


def write_video(
    path: str | os.PathLike,
    frames: np.ndarray | Iterable[np.ndarray],
    fps: float,
    crf: int = 18,
    key_every: int | None = None,
) -> None:
    """Write uint8 `frames` (T, H, W, 3), H and W even, as an H.264 mp4 that appears at `path` only when whole.

    `frames` may come in chunks: an iterable of such arrays, which is never held whole. `crf` is x264's constant quality,
    from 1 (best) to 51; 0 would be a profile that browsers do not play. At every `key_every`-th frame, if
    not before, a player can start; None leaves that to x264, whose files are smaller and slower to step through. Raises
    ValueError for frames of another kind or size, a rate that is not positive and another crf.
    """
    import av

    chunks: Iterator[Any] = iter([frames] if isinstance(frames, np.ndarray) else frames)
    first: Any = next(chunks, np.empty(0))
    _check_writable(first, fps, crf)
    # Tagged BT.709, limited range: players guess the matrix of untagged files from their size, and colours shift.
    colour = {"colorspace": 1, "color_primaries": 1, "color_trc": 1, "color_range": 1}
    faststart = {"movflags": "faststart"}
    with replaced_file(path) as aside, av.open(str(aside), "w", format="mp4", options=faststart) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(100_000))
        stream.height, stream.width = first.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # Without x264's macroblock tree: on small pictures it made different files of the same frames.
        stream.options = {"crf": str(crf), "x264-params": "mbtree=0", **({"g": str(key_every)} if key_every else {})}
        for name, value in colour.items():
            setattr(stream.codec_context, name, value)
        for chunk in itertools.chain([first], chunks):
            if chunk.shape[1:] != first.shape[1:] or chunk.dtype != first.dtype:
                raise ValueError(f"a chunk of {chunk.dtype} {chunk.shape} after one of {first.dtype} {first.shape}")
            for pixels in chunk:
                rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                yuv = rgb.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
                container.mux(stream.encode(yuv))
        container.mux(stream.encode())


def encode_mp4(frames: np.ndarray | Iterable[np.ndarray], fps: float, crf: int = 18, key_every: int | None = None) -> bytes:
    """Return what `write_video` would write: bytes of an mp4 that browsers play while it loads."""
    # A file and not a buffer: the muxer reads its output again to move the index to the front.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "video.mp4")
        write_video(path, frames, fps, crf, key_every)
        return path.read_bytes()


def _check_writable(frames: np.ndarray, fps: float, crf: int) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise ValueError(f"frames are {frames.dtype} {frames.shape}; uint8 (T, H, W, 3) with T >= 1 is needed")
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        smaller, larger = (f"{max(2, height + s * (height % 2))}x{max(2, width + s * (width % 2))}" for s in (-1, 1))
        raise ValueError(f"frames of {height}x{width} (H x W): H.264 needs even sizes; use {smaller} or {larger}")
    if not fps > 0 or not 1 <= crf <= 51:
        raise ValueError(f"fps {fps}, crf {crf}: fps above 0 and crf from 1 to 51 are legal")
