import numpy as np
import pytest

from promag.data.video import write_video
from promag.reports.uploads import UploadLimits, check_upload
from promag.training.config import UserError
from tests.data.test_video import drifting

LIMITS = UploadLimits(megabytes=0.05, seconds=2.0, frames=25, side=100)


def written(path, frames=10, height=32, width=64, fps=10):
    write_video(path, drifting(frames, height, width), fps)
    return path


def test_a_video_within_the_limits_is_described(tmp_path):
    facts = check_upload(written(tmp_path / "v.MP4".lower()), LIMITS)
    assert (facts.frames, facts.height, facts.width, facts.fps) == (10, 32, 64, 10)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "v.txt",
            None,
            r"v\.txt: not a kind of video that is taken; mp4, .* at most 0\.05 MB, 2 s, 25 frames, 100 pixels",
        ),
        ("v.mp4", b"no video at all", r"v\.mp4: cannot be read as a video: "),
        ("v.mp4", bytes(60_000), r"v\.mp4: 0\.1 MB; at most 0\.05 MB are taken"),
        ("v.mp4", {"frames": 24, "fps": 8}, r"v\.mp4: 2\.9 s and 24 frames; at most 2 s and 25 frames are taken"),
        ("v.mp4", {"frames": 30, "fps": 30}, r"v\.mp4: 1\.0 s and 30 frames; at most 2 s and 25 frames are taken"),
        ("v.mp4", {"width": 112}, r"v\.mp4: 112x32 pixels; at most 100 a side are taken"),
    ],
)
def test_what_is_refused_is_named_with_what_is_legal(tmp_path, name, change, message):
    path = tmp_path / name
    written(path, **change) if isinstance(change, dict) else path.write_bytes(change or b"text")
    with pytest.raises(UserError, match=message) as error:
        check_upload(path, LIMITS)
    assert str(tmp_path) not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_damaged_video_is_refused(tmp_path):
    path = written(tmp_path / "v.mp4", frames=20)
    data = bytearray(path.read_bytes())
    middle = data.index(b"mdat") + 2000
    data[middle : middle + 1500] = np.random.default_rng(0).bytes(1500)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"v\.mp4: cannot be read as a video"):
        check_upload(path, LIMITS)
