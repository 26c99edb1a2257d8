"""Images and clips that a video starts from: checked, and turned into B C T H W pixels in [-1, 1].

Shapes: T H W C of arrays, T C H W of tensors, both in [0, 1]; PIL pictures of any mode.
"""

from typing import Any

import numpy as np
from diffusers.video_processor import VideoProcessor
from PIL import Image
from torch import Tensor


def read_given(image: Any, video: Any, size: tuple[int, int], processor: VideoProcessor) -> Tensor | None:
    """Return what `image` or `video` shows as B C T H W in [-1, 1], T being 1 for images; None if neither is given.

    Args:
        image: a picture (PIL, H W C, C H W) or several (a list, B H W C, B C H W).
        video: a clip (a list of pictures, T H W C, T C H W) or several of one length (a list of clips, B T ...).
        size: (height, width) that they must have.
        processor: the pipeline's.

    Raises ValueError for both at once, another size, values outside [0, 1] and what is no picture.
    """
    if image is not None and video is not None:
        raise ValueError("image and video: at most one of them can be given")
    if image is not None:
        pictures = _leaves(image, "image", size)
        return processor.preprocess(pictures, *size)[:, :, None]
    if video is None:
        return None
    clips = _clips(_leaves(video, "video", size))
    lengths = sorted({len(clip) for clip in clips})
    if len(lengths) > 1:
        raise ValueError(f"video: clips of {', '.join(map(str, lengths))} frames; all must have as many")
    return processor.preprocess_video(clips, *size)


def _leaves(given: Any, name: str, size: tuple[int, int]) -> Any:
    """Return `given` with its PIL pictures in RGB; raises ValueError for what is no picture of the right size."""
    if isinstance(given, list | tuple):
        if not given:
            raise ValueError(f"{name}: an empty list; at least one picture is needed")
        return [_leaves(part, name, size) for part in given]
    if isinstance(given, Image.Image):
        found, given = given.size[::-1], given.convert("RGB")
    elif isinstance(given, np.ndarray | Tensor) and given.ndim >= 3:
        found = tuple(given.shape[-2:]) if isinstance(given, Tensor) else given.shape[-3:-1]
        _check_values(given, name)
    else:
        raise ValueError(
            f"{name} of type {type(given).__name__}: a PIL picture, an array, a tensor or a list of them is needed"
        )
    if found != size:
        raise ValueError(f"{name} of {found[0]}x{found[1]} (height x width): {size[0]}x{size[1]} is needed, as are made")
    return given


def _check_values(given: Any, name: str) -> None:
    if isinstance(given, Tensor):
        order, channels, floating = "C H W", given.shape[-3], given.is_floating_point()
    else:
        order, channels, floating = "H W C", given.shape[-1], np.issubdtype(given.dtype, np.floating)
    if channels != 3 or not floating:
        raise ValueError(f"{name} of shape {tuple(given.shape)}, {given.dtype}: floats, {order} with 3 channels, are needed")
    low, high = float(given.min()), float(given.max())
    if low < 0 or high > 1:
        raise ValueError(f"{name} with values from {low:.3g} to {high:.3g}: values in [0, 1] are needed")


def _clips(given: Any) -> list[Any]:
    """Return a list of clips, whether one was given or several."""
    if isinstance(given, list):
        several = isinstance(given[0], list) or getattr(given[0], "ndim", 0) == 4
        return given if several else [given]
    return list(given) if given.ndim == 5 else [given[None] if given.ndim == 3 else given]


def last_frames(pixels: Tensor, ratio: int, most: int) -> Tensor:
    """Return the last 1 + ratio*k frames of B C T H W, as many as there are but at most `most` latent frames of them."""
    latents = min(most, 1 + (pixels.shape[2] - 1) // ratio)
    return pixels[:, :, pixels.shape[2] - (1 + ratio * (latents - 1)) :]
