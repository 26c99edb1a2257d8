"""Animated GIFs of videos (T H W 3, uint8), which play wherever images are shown."""

import io

import numpy as np
from PIL import Image

# Browsers show frames shorter than two centiseconds (the time unit of GIFs) for a tenth of a second.
MOST_FPS = 50


def encode_gif(frames: np.ndarray, fps: float) -> bytes:
    """Encode T H W 3 as a looping GIF with a palette of 256 colours per frame; durations are whole centiseconds.

    Raises ValueError for another shape or dtype, and for an fps that is not above 0.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames) or fps <= 0:
        raise ValueError(
            f"frames of shape {frames.shape}, {frames.dtype}, fps {fps}: T H W 3 of uint8 and an fps above 0 are needed"
        )
    # Round the end times, not the durations, so that the total duration stays right.
    ends = np.round(100 * np.arange(1, len(frames) + 1) / fps).astype(int)
    durations = np.diff(ends, prepend=0).clip(2)  # see MOST_FPS
    pictures = [Image.fromarray(frame).quantize(256, dither=Image.Dither.NONE) for frame in frames]
    buffer = io.BytesIO()
    pictures[0].save(
        buffer,
        "gif",
        save_all=True,
        append_images=pictures[1:],
        duration=[10 * int(duration) for duration in durations],
        loop=0,
        optimize=False,
        disposal=2,
    )
    return buffer.getvalue()
