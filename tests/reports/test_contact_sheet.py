import numpy as np
import pytest
from PIL import Image

from promag.reports.contact_sheet import LABEL, TITLE, write_contact_sheet


def test_frames_are_at_their_places(tmp_path):
    video = np.zeros((9, 4, 6, 3), np.uint8)
    video[:, :, :, 0] = np.arange(9)[:, None, None] * 10
    path = write_contact_sheet(tmp_path / "a.png", [("one", {"a": video, "b": video + 100})], frames=3, scale=2)
    pixels = np.asarray(Image.open(path))
    assert pixels.shape == (TITLE + 2 * 8, LABEL + 3 * 12, 3)
    assert pixels[TITLE::8, LABEL::12, 0].tolist() == [[0, 40, 80], [100, 140, 180]]


def test_a_long_label_gets_enough_space(tmp_path):
    clip = {"an original that has a long name": np.zeros((3, 4, 6, 3), np.uint8)}
    pixels = np.asarray(Image.open(write_contact_sheet(tmp_path / "a.png", [("one", clip)], frames=3, scale=8)))
    frames = (pixels == 0).all(2).any(0)
    left = int(frames.argmax())
    assert left > 3 * LABEL
    assert frames[left:].all()
    assert len(frames) - left == 3 * 6 * 8


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="no clips"):
        write_contact_sheet(tmp_path / "a.png", [])
    videos = {"a": np.zeros((2, 4, 4, 3), np.uint8), "b": np.zeros((3, 4, 4, 3), np.uint8)}
    with pytest.raises(ValueError, match="videos of 'x' have shapes"):
        write_contact_sheet(tmp_path / "a.png", [("x", videos)])
    with pytest.raises(ValueError, match="0 frames, scale 2: at least 1 is needed"):
        write_contact_sheet(tmp_path / "a.png", [("x", {"a": videos["a"]})], frames=0, scale=2)
