"""The table and the page of a prepared set of clips."""

import base64
import io
import math
import re

import numpy as np
import pytest
from PIL import Image

from promag.data.clip_index import Clip
from promag.data.clips import Lengths, PreparedClips, Skipped, prepare
from promag.data.cutting import cut_out
from promag.reports.clip_set import EXTREMES, GAP, HEIGHT, SHOWN, ClipSet, Row, write_clip_page
from tests.browser import console_errors, until
from tests.data.conftest import STEP, counting


def clip(frames: int, fps: float = 10, size: tuple[int, int] = (64, 32), caption: str = "a red kite") -> Clip:
    return Clip("/a.mp4", 0.0, frames, fps, *size, caption, "0" * 64)


@pytest.fixture
def clips() -> ClipSet:
    """Clips of 1, 5 and 30 seconds, and a picture."""
    cut = [clip(10), clip(120, 24, (128, 72), "  "), clip(300, caption="a " * 21), clip(1, 24)]
    skipped = [Skipped("/a.mp4", 0.0, 90.0, 900, "black"), Skipped("/a.mp4", 1.0, 2.0, 20, "still")]
    skipped.append(Skipped("/b.mp4", 0.0, 30.0, 300, "black"))
    return ClipSet(PreparedClips(cut, [], skipped, [], [], [0.4, 3.0, 7.0, math.nan]), 2)


def test_every_clip_is_counted_once_in_each_group(clips):
    groups = clips.groups()
    assert groups["size"] == [Row("64x32", 3, pytest.approx(31 + 1 / 24)), Row("128x72", 1, 5.0)]
    assert groups["frames a second"] == [Row("10", 2, 31.0), Row("24", 2, pytest.approx(5 + 1 / 24))]
    assert [row[:2] for row in groups["length"]] == [("below 2 s", 2), ("5 to 10 s", 1), ("20 s and more", 1)]
    assert [row[:2] for row in groups["words of the caption"]] == [("none", 1), ("1 to 5", 2), ("21 to 60", 1)]
    assert [row[:2] for row in groups["motion, grey levels a frame"]] == [("below 0.5", 1), ("2 to 5", 1), ("5 to 10", 1)]
    assert clips.left_out() == [Row("black", 2, 120.0), Row("still", 1, 2.0)]


def test_the_table_of_a_terminal(clips):
    assert clips.summary == "4 clips of 2 videos, 0.60 minutes, 431 frames, 3 different captions"
    lines = clips.text().splitlines()
    assert lines[:4] == [
        "                             clips  minutes  share",
        "size",
        "  64x32                          3     0.52  86.1%",
        "  128x72                         1     0.08  13.9%",
    ]
    assert lines[-3:] == [
        "left out",
        "  black                          2     2.00",
        "  still                          1     0.03",
    ]
    assert len({len(line) for line in lines if line.endswith("%")}) == 1


def test_long_sets_are_in_hours_and_rare_sizes_are_added_up():
    cut = [clip(36_000, size=(64 + 2 * k, 32)) for k in range(12) for _ in range(12 - k)]
    clips = ClipSet(PreparedClips(cut, [], [], [], []), 78)
    assert clips.summary == "78 clips of 78 videos, 78.00 hours, 2,808,000 frames, 1 different caption"
    assert clips.groups()["size"][0] == Row("64x32", 12, 12 * 3600.0)
    assert clips.groups()["size"][-1] == Row("4 others", 4 + 3 + 2 + 1, pytest.approx(10 * 3600.0))
    assert "motion, grey levels a frame" not in clips.groups()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page of 110 clips of three frames each, and of one stretch that was too short."""
    folder = tmp_path_factory.mktemp("page")
    videos = [(counting(folder / "<b>.mp4", 35), "<script>a kite"), (counting(folder / "short.mp4", 2), "a short one")]
    prepared = prepare(videos, lengths=Lengths(frames=3), motion=True, progress=False)
    prepared.clips, prepared.motion = prepared.clips * 10, [k / 10 for k in range(110)]
    write_clip_page(folder / "page.html", "Clips of kites", ClipSet(prepared, 1), progress=False)
    return (folder / "page.html").read_text()


def strips(page: str) -> list[np.ndarray]:
    files = re.findall(r"data:image/jpeg;base64,([^\"]+)", page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(file)))) for file in files]


def test_thumbnails_are_the_first_middle_and_last_frame(page):
    pictures = strips(page)
    assert len(pictures) == SHOWN + 2 * EXTREMES + 1
    width = HEIGHT * 64 // 32
    assert pictures[0].shape == (HEIGHT, 3 * width + 2 * GAP, 3)
    reds = [pictures[0][:, i * (width + GAP) : i * (width + GAP) + width, 0].mean() for i in range(3)]
    assert reds == pytest.approx([20, 20 + STEP, 20 + 2 * STEP], abs=2)
    assert pictures[-1].shape == pictures[0].shape  # of the stretch that was too short
    assert "Least motion" in page
    assert "too short" in page
    assert "&lt;script&gt;a kite" in page
    assert "<script>a kite" not in page


def test_the_page_in_a_browser(page, browser, tmp_path):
    (tmp_path / "page.html").write_text(page)
    browser.get((tmp_path / "page.html").as_uri())
    assert browser.title == "Clips of kites"
    assert not console_errors(browser)
    assert browser.execute_script("return document.images.length") == SHOWN + 2 * EXTREMES + 1
    assert until(browser, "document.images[0].naturalHeight") == HEIGHT
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    until(browser, "document.documentElement.clientWidth === 390")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390


def test_the_thumbnails_of_cut_clips_and_pictures(tmp_path):
    Image.new("RGB", (40, 40), (200, 0, 0)).save(tmp_path / "p.png")
    videos = [(counting(tmp_path / "film.mp4", 12), "a film"), (str(tmp_path / "p.png"), "")]
    prepared = prepare(videos, motion=True, progress=False)
    prepared.clips = cut_out(prepared.clips, tmp_path / "cut", progress=False)
    write_clip_page(tmp_path / "page.html", "Clips", ClipSet(prepared, 2), progress=False)
    page = (tmp_path / "page.html").read_text()
    film, picture = strips(page)
    assert picture.shape == (HEIGHT, HEIGHT, 3)
    assert picture[..., 0].mean() == pytest.approx(200, abs=3)
    assert film[:, :144, 0].mean() == pytest.approx(20, abs=4)
    assert "no caption" in page
