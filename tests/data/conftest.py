"""Two good videos with numbered frames, a short one, and their index."""

import numpy as np
import pytest

from promag.data.clips import prepare
from promag.data.listing import list_videos
from promag.data.video import write_video

STEP = 6  # grey levels from one frame of a counting video to the next


def counting(path, frames: int, fps: float = 30, height: int = 32, width: int = 64):
    """Write a video in which frame k has the grey level 20 + STEP * k and its right half is bluer by 40."""
    levels = 20 + STEP * np.arange(frames)
    pixels = np.broadcast_to(levels[:, None, None, None], (frames, height, width, 3)).astype(np.uint8).copy()
    pixels[:, :, width // 2 :, 2] += 40
    write_video(path, pixels, fps, crf=1)
    return str(path)


def numbers(item) -> list[int]:
    """Read the frame numbers back from an item's red channel."""
    levels = (item["video"][0].mean(dim=(1, 2)) + 1) * 127.5
    return ((levels - 20) / STEP).round().int().tolist()


@pytest.fixture(autouse=True)
def pipes(monkeypatch):
    """Allow the tests' own commands to run."""
    monkeypatch.setenv("PROMAG_ALLOW_PIPES", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two good videos (30 frames at 30 fps, 21 at 15), a short one of 5 frames, and captions for some."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "more").mkdir()
    counting(folder / "a_grey-wall_01.mp4", 30)
    counting(folder / "more" / "b.mp4", 21, fps=15)
    counting(folder / "short.mp4", 5)
    return folder


@pytest.fixture(scope="module")
def clips(folder):
    return prepare(list_videos(folder), progress=False).clips
