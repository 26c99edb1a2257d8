"""A PNG of frames side by side: for readers without a player, and for looking at what was trained.

Videos are uint8 (T, H, W, 3).
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

LABEL = 44  # pixels left of the frames, more where a label is wider
TITLE = 16  # pixels above each clip
_FONT = ImageFont.load_default()
PAPER, INK = (250, 250, 250), (40, 40, 40)


def write_contact_sheet(
    path: str | os.PathLike, clips: Sequence[tuple[str, Mapping[str, np.ndarray]]], frames: int = 8, scale: int = 1
) -> Path:
    """Draw each clip as a title and one line of frames per labelled video; return the path.

    Args:
        path: PNG to write; a missing folder is made.
        clips: (title, {label: video}) in order; the videos of a clip have one shape.
        frames: pictures per line, at least 1, evenly over the clip, first and last among them.
        scale: by how much pixels are enlarged, at least 1.

    Raises ValueError without clips, for numbers below 1, or where videos of one clip differ in shape.
    """
    if not clips:
        raise ValueError("no clips to draw: at least 1 is needed")
    if min(frames, scale) < 1:
        raise ValueError(f"{frames} frames, scale {scale}: at least 1 is needed")
    left = max(LABEL, *(int(_FONT.getlength(label)) + 10 for _, videos in clips for label in videos))
    blocks = [_block(title, videos, frames, scale, left) for title, videos in clips]
    sheet = Image.new("RGB", (max(b.width for b in blocks), sum(b.height for b in blocks)), PAPER)
    top = 0
    for block in blocks:
        sheet.paste(block, (0, top))
        top += block.height
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)
    return Path(path)


def _block(title: str, videos: Mapping[str, np.ndarray], frames: int, scale: int, left: int) -> Image.Image:
    shapes = {video.shape for video in videos.values()}
    if len(shapes) != 1:
        raise ValueError(f"videos of {title!r} have shapes {sorted(shapes)}: one shape is needed")
    count, height, width, _ = shapes.pop()
    picked = np.linspace(0, count - 1, frames).round().astype(int)
    block = Image.new("RGB", (left + frames * width * scale, TITLE + len(videos) * height * scale), PAPER)
    draw = ImageDraw.Draw(block)
    draw.text((4, 2), title, fill=INK, font=_FONT)
    for i, (label, video) in enumerate(videos.items()):
        top = TITLE + i * height * scale
        draw.text((4, top + height * scale // 2 - 6), label, fill=INK, font=_FONT)
        line = Image.fromarray(np.concatenate(list(video[picked]), 1))
        block.paste(line.resize((line.width * scale, line.height * scale), Image.Resampling.NEAREST), (left, top))
    return block
