"""Films of known cuts, black and still stretches are cut where they were joined, to the frame."""

import importlib.util

import numpy as np
import pytest
from PIL import Image

from promag.data.clips import Lengths, Skipped, prepare
from promag.data.datasets import ClipDataset
from promag.data.scenes import Scan, Stretch, scan
from promag.data.video import write_video
from promag.training.config import UserError

HEIGHT, WIDTH, FPS = 72, 128, 20


def moving(frames: int, seed: int) -> np.ndarray:
    """Return a shot: a smooth picture of random colours that drifts by two pixels a frame."""
    rng = np.random.default_rng(seed)
    colours = Image.fromarray(rng.integers(40, 216, (5, 9, 3), dtype=np.uint8))
    picture = np.array(colours.resize((WIDTH + 2 * frames, HEIGHT), Image.Resampling.BICUBIC))
    return np.stack([picture[:, 2 * k : 2 * k + WIDTH] for k in range(frames)])


def still(frames: int, seed: int) -> np.ndarray:
    return moving(1, seed).repeat(frames, 0)


def black(frames: int) -> np.ndarray:
    return np.full((frames, HEIGHT, WIDTH, 3), 4, np.uint8)


# Kind of each part, as it is found, and its pictures.
PARTS = [
    ("black", black(9)),
    ("shot", moving(50, 1)),
    ("shot", moving(41, 2)),
    ("black", black(3)),
    ("shot", moving(30, 3)),
    ("still", still(44, 4)),
    ("shot", moving(3, 5)),
    ("shot", moving(45, 6)),
    ("still", still(5, 7)),  # short, but a whole shot
    ("shot", moving(2, 8)),
]


@pytest.fixture(scope="module")
def detector():
    pytest.importorskip("scenedetect", reason="the extra scenes is not installed")
    pytest.importorskip("cv2", reason="the extra scenes is not installed")


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    write_video(path, np.concatenate([pictures for _, pictures in PARTS]), FPS)
    return str(path)


def expected() -> list[Stretch]:
    ends = np.cumsum([len(pictures) for _, pictures in PARTS]).tolist()
    return [Stretch(end - len(pictures), end - 1, kind) for end, (kind, pictures) in zip(ends, PARTS, strict=True)]


def test_cuts_black_and_still_stretches_are_found_to_the_frame(detector, film):
    assert scan(film, cuts=True, motion=False).stretches == expected()


@pytest.mark.parametrize("crf", [1, 28])
def test_stretches_are_found_at_any_quality(detector, tmp_path, crf):
    write_video(tmp_path / "film.mp4", np.concatenate([pictures for _, pictures in PARTS]), FPS, crf=crf)
    assert scan(tmp_path / "film.mp4", cuts=True, motion=False).stretches == expected()


def test_cuts_beside_the_first_and_the_last_frame_are_found(detector, tmp_path):
    write_video(tmp_path / "v.mp4", np.concatenate([moving(1, 1), moving(20, 2), moving(1, 3)]), FPS)
    found = scan(tmp_path / "v.mp4", cuts=True, motion=False).stretches
    assert found == [Stretch(0, 0), Stretch(1, 20), Stretch(21, 21)]


def test_a_still_stretch_inside_a_shot_begins_and_ends_where_the_motion_does(detector, tmp_path):
    before = moving(30, 1)
    pictures = np.concatenate([before, before[-1:].repeat(FPS * 2, 0), moving(60, 1)[30:]])
    write_video(tmp_path / "v.mp4", pictures, FPS, crf=8)
    assert scan(tmp_path / "v.mp4", cuts=True, motion=False).stretches == [
        Stretch(0, 28),
        Stretch(29, 29 + FPS * 2, "still"),
        Stretch(30 + FPS * 2, 59 + FPS * 2),
    ]


def test_a_small_movement_is_not_still(detector):
    watcher = Scan(cuts=True)
    for k in range(80):
        picture = np.full((144, 256, 3), 120, np.uint8)
        picture[60:64, 100 + k % 2 * 8 : 108 + k % 2 * 8] = 200  # a thousandth of the picture
        watcher.watch(picture)
    assert watcher.stretches(np.arange(80) / 20) == [Stretch(0, 79)]


def test_motion_is_measured_for_each_frame(film):
    motion = scan(film, cuts=False, motion=True).motion
    assert motion is not None
    begins = [stretch.first for stretch in expected()]
    assert len(motion) == 232
    assert motion[0] == 0
    assert np.abs(motion[1:9]).max() < 0.1  # black
    assert motion[10:59].min() > 0.5
    assert (motion[begins[1:]] > 15).all()
    assert scan(film, cuts=False, motion=True).stretches == [Stretch(0, 231)]


def test_a_film_becomes_clips_of_its_shots(detector, film):
    prepared = prepare([(film, "a film")], lengths=Lengths(min_seconds=1.5, max_seconds=2.4), scenes=True, progress=False)
    assert [(round(clip.start * FPS), clip.frames, clip.caption) for clip in prepared.clips] == [
        (9, 48, "a film"),
        (59, 41, "a film"),
        (103, 30, "a film"),
        (180, 45, "a film"),
    ]
    assert prepared.dropped_frames == 2
    assert [(skipped.reason, round(skipped.start * FPS), skipped.frames) for skipped in prepared.skipped] == [
        ("black", 0, 9),
        ("black", 100, 3),
        ("still", 133, 44),
        ("too short", 177, 3),
        ("still", 225, 5),
        ("too short", 230, 2),
    ]
    assert prepared.skipped[-1] == Skipped(film, pytest.approx(11.5), pytest.approx(0.1), 2, "too short")
    assert len(prepared.motion) == 4
    assert min(prepared.motion) > 0.5


def test_windows_stay_inside_their_shot(detector, film):
    prepared = prepare([(film, "")], fps=10, lengths=Lengths(frames=9), scenes=True, progress=False)
    assert [round(clip.start * FPS) for clip in prepared.clips] == [9, 27, 59, 77, 103, 180, 198]
    shots = [stretch for stretch in expected() if stretch.kind == "shot"]
    dataset = ClipDataset(prepared.clips, 9, (HEIGHT, WIDTH))
    pictures = np.concatenate([pictures for _, pictures in PARTS])
    for place, clip in enumerate(prepared.clips):
        shown = ((dataset.fixed(place)["video"].permute(1, 2, 3, 0).numpy() + 1) * 127.5).astype(int)
        first = round(clip.start * FPS)
        numbers = list(range(first, first + 18, 2))
        assert any(shot.first <= first and numbers[-1] <= shot.last for shot in shots)
        assert np.abs(shown - pictures[numbers]).mean() < 4


def test_images_stay_clips_with_a_least_length(detector, film, tmp_path):
    Image.fromarray(moving(1, 1)[0]).save(tmp_path / "a.png")
    videos = [(str(tmp_path / "a.png"), "a picture"), (film, "a film")]
    prepared = prepare(videos, lengths=Lengths(min_seconds=2), scenes=True, progress=False)
    assert [(clip.caption, clip.frames) for clip in prepared.clips] == [
        ("a picture", 1),
        ("a film", 50),
        ("a film", 41),
        ("a film", 45),
    ]
    assert np.isnan(prepared.motion).tolist() == [True, False, False, False]


def test_films_without_a_usable_shot_are_refused(detector, tmp_path):
    write_video(tmp_path / "v.mp4", np.concatenate([black(10), still(50, 1)]), FPS)
    with pytest.raises(UserError, match="no clip is left: all 2 stretches of the videos are black or still"):
        prepare([(str(tmp_path / "v.mp4"), "")], scenes=True, progress=False)
    write_video(tmp_path / "v.mp4", np.concatenate([moving(10, 1), moving(20, 2)]), FPS)
    with pytest.raises(UserError, match=r"no video has 25 frames in one shot: the longest, .*v\.mp4, from 0\.50 s on, has 20"):
        prepare([(str(tmp_path / "v.mp4"), "")], lengths=Lengths(frames=25), scenes=True, progress=False)


def test_a_missing_extra_is_named(film, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("promag.data.scenes.find_spec", lambda name: None if name == "scenedetect" else find_spec(name))
    with pytest.raises(UserError, match=r"^scenes: PySceneDetect is not installed, .*; run pip install 'promag\[scenes\]'$"):
        prepare([(film, "")], scenes=True, progress=False)
