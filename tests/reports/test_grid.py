import numpy as np
import pytest

from promag.reports.grid import GAP, GREY, grid


def solid(value, width=6):
    return np.full((2, 4, width, 3), value, np.uint8)


def test_videos_stand_row_by_row_with_grey_between():
    found = grid([solid(1), solid(2), solid(3)], columns=2)
    assert found.shape == (2, 2 * 4 + GAP, 2 * 6 + GAP, 3)
    expected = np.full((8 + GAP, 12 + GAP), GREY)
    expected[:4, :6], expected[:4, 6 + GAP :], expected[4 + GAP :, :6] = 1, 2, 3
    assert np.array_equal(found, np.broadcast_to(expected[None, :, :, None], found.shape))
    assert np.array_equal(grid([solid(1)], columns=3), solid(1))


def test_mistakes_are_named():
    for videos, columns in (([], 1), ([solid(1), solid(1, width=8)], 2), ([solid(1)], 0)):
        with pytest.raises(ValueError, match="one shape, and a column, are needed"):
            grid(videos, columns)
