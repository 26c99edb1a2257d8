"""Conditioning frames of a pipeline call: the first frames that videos start with, checked and read.

An illegal argument is a ValueError that names what is legal. Shapes: frames T H W C of arrays, T C H W of tensors, both in
[0, 1], or PIL pictures of any mode; B C T H W pixels in [-1, 1].
"""

from typing import Any

import numpy as np
from diffusers.video_processor import VideoProcessor
from PIL import Image
from torch import Tensor

from promag.data.video import ImageError, to_rgb


def read_conditioning_frames(image: Any, video: Any, size: tuple[int, int], processor: VideoProcessor) -> Tensor | None:
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
        given_size, given = given.size[::-1], _shown(given, name)
    elif isinstance(given, np.ndarray | Tensor) and given.ndim >= 3 and len(given):
        given_size = tuple(given.shape[-2:]) if isinstance(given, Tensor) else given.shape[-3:-1]
        _check_values(given, name)
    else:
        raise ValueError(
            f"{name} of type {type(given).__name__}: a PIL picture, an array, a tensor or a list of them is needed"
        )
    if given_size != size:
        raise ValueError(
            f"{name} of {given_size[0]}x{given_size[1]} (height x width): {size[0]}x{size[1]} is needed, as are made"
        )
    return given


def _shown(picture: Image.Image, name: str) -> Image.Image:
    try:
        return to_rgb(picture)  # as pictures that are trained on
    except ImageError as error:
        raise ValueError(f"{name}: {error}") from None


def _check_values(given: Any, name: str) -> None:
    if isinstance(given, Tensor):
        order, channels, floating = "C H W", given.shape[-3], given.is_floating_point()
    else:
        order, channels, floating = "H W C", given.shape[-1], np.issubdtype(given.dtype, np.floating)
    if channels != 3 or not floating:
        raise ValueError(f"{name} of shape {tuple(given.shape)}, {given.dtype}: floats, {order} with 3 channels, are needed")
    low, high = float(given.min()), float(given.max())
    if not (low >= 0 and high <= 1):  # NaN is neither
        raise ValueError(f"{name} with values from {low:.3g} to {high:.3g}: values in [0, 1] are needed")


def _clips(given: Any) -> list[Any]:
    """Return a list of clips, whether one was given or several."""
    if isinstance(given, list):
        several = isinstance(given[0], list) or getattr(given[0], "ndim", 0) == 4
        return given if several else [given]
    return list(given) if given.ndim == 5 else [given[None] if given.ndim == 3 else given]


def count_opening(count: int, ratio: int, limit: int, frames: int, latent_step: int) -> int:
    """Return the number of a clip's `count` frames that open a video of `frames` latent frames: 1 + ratio*latent_step*k.

    They are at most `limit` latent frames, and one latent frame is left to make.
    """
    after_first = min(limit, frames - 1, 1 + (count - 1) // ratio) - 1
    return 1 + ratio * (after_first - after_first % latent_step)


def check_conditioning(name: str, count: int, prompts: int, most: int, frames: int, ratio: int) -> None:
    """Refuse first frames that the model was not trained with, that leave no latent frame to generate, or of another number.

    Args:
        name: image or video.
        count: images or clips given.
        prompts: prompts of the call.
        most: latent frames that the transformer was trained to be conditioned on.
        frames: latent frames of a video.
        ratio: temporal ratio.
    """
    if not most:
        raise ValueError(f"{name}: this transformer was trained without given frames (condition.probability 0)")
    if frames < 2:
        raise ValueError(f"num_frames 1 with {name}: no frame is left to make; use {1 + ratio} or more")
    if count not in (1, prompts):
        raise ValueError(f"{name}: {count} given; use one, or one for each of the {prompts} prompts")
