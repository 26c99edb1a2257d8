"""Image files: clips of one frame."""

import contextlib
import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif")
IMAGE_FPS = 24.0  # An image has no rate, but models take one: a common one is stated


class ImageError(Exception):
    """An image cannot be read."""


def is_image(path: str | os.PathLike) -> bool:
    """Return whether a file name is an image's."""
    return Path(path).suffix.lower() in IMAGE_EXTENSIONS


def read_image(source: str | os.PathLike | bytes) -> np.ndarray:
    """Return an image file, or the bytes of one, as uint8 RGB (1, H, W, 3), upright; raises ImageError for a damaged one.

    Transparent pixels are blended with white, 16 bits a channel become 8, and colours are converted by an embedded profile.
    Of a JPEG with several pictures the first is shown, as viewers do; animated WebP and PNG and TIFF of many pages are refused.
    """
    with _opened(source) as image:
        count = getattr(image, "n_frames", 1)
        if count > 1 and image.format in ("WEBP", "PNG", "TIFF", "AVIF", "GIF"):
            raise ImageError(f"holds {count} pictures; make a video of it, or keep one of them")
        return np.array(to_rgb(ImageOps.exif_transpose(image)))[None]


def image_size(source: str | os.PathLike | bytes) -> tuple[int, int]:
    """Return width and height as an image's header states them, without decoding it; raises ImageError as `read_image` does."""
    with _opened(source) as image:
        return image.size


@contextlib.contextmanager
def _opened(source: str | os.PathLike | bytes) -> Iterator[Image.Image]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                yield image
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # which one PIL raises for a damaged file depends on its format
        raise ImageError(getattr(error, "strerror", None) or str(error) or type(error).__name__) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a picture in sRGB, 8 bits: by its colour profile, transparent parts on white; raises ImageError for 32 bits."""
    if image.mode in ("F", "I"):
        raise ImageError("its pixels have 32 bits: 8 or 16 a channel can be shown")
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I"):  # PIL would clip 16 bits to 8
        image = Image.fromarray((np.asarray(image).astype(np.uint32) / 257).round().astype(np.uint8))
    mode = {"1": "L", "L": "L", "LA": "L", "CMYK": "CMYK"}.get(image.mode, "RGB")  # what profiles describe
    alpha = None
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    image = image.convert(mode)
    shown = _by_profile(image, profile) or image.convert("RGB")
    if alpha is None:
        return shown
    shown.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown).convert("RGB")


def _by_profile(image: Image.Image, profile: bytes | None) -> Image.Image | None:
    """Return an image without transparency in sRGB; None without a profile that fits."""
    if not profile:
        return None
    try:
        return ImageCms.profileToProfile(image, io.BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return None  # viewers show an image with a broken profile without it


def scaled(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return a uint8 RGB picture (H, W, 3) at another (height, width): bilinear, antialiased."""
    if picture.shape[:2] == size:
        return picture
    height, width = size
    return np.asarray(Image.fromarray(np.ascontiguousarray(picture)).resize((width, height), Image.Resampling.BILINEAR))
