"""Image files: clips of one frame."""

import io
import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
IMAGE_FPS = 24.0  # stated for an image, which has no rate: a common one, since models are told it

# What PIL raises for a damaged file depends on its format.
_DAMAGED = (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class ImageError(Exception):
    """An image cannot be read."""


def is_image(path: str | os.PathLike) -> bool:
    """Return whether a file name is an image's."""
    return Path(path).suffix.lower() in IMAGE_EXTENSIONS


def read_image(source: str | os.PathLike | bytes) -> np.ndarray:
    """Return an image file, or the bytes of one, as uint8 RGB (1, H, W, 3), upright; raises ImageError for a damaged one.

    Transparent pixels are blended with white.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                upright = ImageOps.exif_transpose(image)
                if "A" in upright.getbands() or "transparency" in upright.info:
                    seen = upright.convert("RGBA")
                    upright = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
                return np.array(upright.convert("RGB"))[None]
    except (*_DAMAGED, Image.DecompressionBombWarning) as error:
        raise ImageError(str(error)) from error
