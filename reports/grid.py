"""Videos side by side in one, which therefore play in step. Videos are uint8 (T, H, W, 3)."""

from collections.abc import Sequence

import numpy as np

GAP = 4  # pixels between videos
GREY = 128


def grid(videos: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Return videos of one shape as one video, row by row with grey between; what is left of the last row is grey.

    Raises ValueError without videos, for less than one column and for videos that differ in shape.
    """
    shapes = sorted({video.shape for video in videos})
    if len(shapes) != 1 or columns < 1:
        raise ValueError(f"{len(videos)} videos of shapes {shapes} in {columns} columns: one shape, and a column, are needed")
    frames, height, width, _ = shapes[0]
    columns, rows = min(columns, len(videos)), -(-len(videos) // columns)
    size = (rows * (height + GAP) - GAP, columns * (width + GAP) - GAP)
    found = np.full((frames, *size, 3), GREY, np.uint8)
    for i, video in enumerate(videos):
        top, left = i // columns * (height + GAP), i % columns * (width + GAP)
        found[:, top : top + height, left : left + width] = video
    return found
