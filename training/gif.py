"""Animated GIFs of videos, T H W 3 of uint8: what plays wherever a picture is shown."""

import io

import numpy as np
from PIL import Image

# Browsers show a frame of less than two centiseconds, the unit of a GIF, for a tenth of a second.
MOST_FPS = 50


def encode_gif(frames: np.ndarray, fps: float) -> bytes:
    """Return T H W 3 as a GIF that plays for ever, each frame in 256 colours of its own; frames last whole centiseconds.

    Raises ValueError for another shape or type.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames) or fps <= 0:
        raise ValueError(f"frames of shape {frames.shape}, {frames.dtype}, fps {fps}: T H W 3 of uint8, fps above 0 are needed")
    # Rounded ends, not rounded lengths: the whole lasts as long as it should.
    ends = np.round(100 * np.arange(1, len(frames) + 1) / fps).astype(int)
    lengths = np.diff(ends, prepend=0).clip(2)  # browsers show shorter frames for a tenth of a second
    pictures = [Image.fromarray(frame).quantize(256, dither=Image.Dither.NONE) for frame in frames]
    buffer = io.BytesIO()
    pictures[0].save(
        buffer,
        "gif",
        save_all=True,
        append_images=pictures[1:],
        duration=[10 * int(length) for length in lengths],
        loop=0,
        optimize=False,
        disposal=2,
    )
    return buffer.getvalue()
