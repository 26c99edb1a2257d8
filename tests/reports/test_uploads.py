import sys

import numpy as np
import pytest
from PIL import Image

from promag.data.video import IsolatedReader, UnreadableVideo, decode_strictly, read_header, stream_frames, write_video
from promag.reports.uploads import UploadLimits, check_upload
from promag.training.config import UserError
from tests.data.child_functions import most_memory
from tests.data.test_kinds import RGB, encode, video
from tests.data.test_video import drifting

LIMITS = UploadLimits(megabytes=0.05, seconds=2.0, frames=25, side=100)


def written(path, frames=10, height=32, width=64, fps=10):
    write_video(path, drifting(frames, height, width), fps)
    return path


def test_a_video_within_the_limits_is_described(tmp_path):
    facts = check_upload(written(tmp_path / "v.MP4".lower()), LIMITS)
    assert (facts.frames, facts.height, facts.width, facts.fps) == (10, 32, 64, 10)


def test_a_recording_that_begins_late_is_as_long_as_its_frames(tmp_path):
    path = encode(tmp_path / "late.ts", video(RGB), times=3_600_000 + np.arange(len(RGB)) * 40)
    assert read_header(path, 100 * 100).seconds == pytest.approx(len(RGB) * 0.04, abs=0.05)
    assert check_upload(path, LIMITS).frames == len(RGB)


def test_what_a_file_holds_decides_not_its_name(tmp_path):
    Image.fromarray(np.full((32, 64, 3), 90, np.uint8)).save(tmp_path / "p.png")
    assert (check_upload(tmp_path / "p.png", LIMITS).frames, check_upload(tmp_path / "p.png", LIMITS).width) == (1, 64)
    assert check_upload(written(tmp_path / "v.mp4").rename(tmp_path / "no-ending"), LIMITS).frames == 10
    Image.new("RGB", (300, 200)).save(tmp_path / "large.png")
    with pytest.raises(UserError, match=r"large\.png: .*300x200 pixels"):
        check_upload(tmp_path / "large.png", LIMITS)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "v.txt",
            None,
            r"v\.txt: cannot be read as a video: .*; at most 0\.05 MB, 2 s, 25 frames, 100 pixels",
        ),
        ("v.mp4", b"no video at all", r"v\.mp4: cannot be read as a video: "),
        ("v.mp4", bytes(60_000), r"v\.mp4: 0\.1 MB; at most 0\.05 MB are accepted"),
        ("v.mp4", {"frames": 24, "fps": 8}, r"v\.mp4: 2\.9 s and 24 frames; at most 2 s and 25 frames are accepted"),
        ("v.mp4", {"frames": 30, "fps": 30}, r"v\.mp4: 1\.0 s and 30 frames; at most 2 s and 25 frames are accepted"),
        ("v.mp4", {"width": 112}, r"v\.mp4: 112x32 pixels; at most 100 a side are accepted"),
    ],
)
def test_uploads_beyond_the_limits_are_refused_with_the_limits(tmp_path, name, change, message):
    path = tmp_path / name
    written(path, **change) if isinstance(change, dict) else path.write_bytes(change or b"text")
    with pytest.raises(UserError, match=message) as error:
        check_upload(path, LIMITS)
    assert str(tmp_path) not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_and_one_that_shows_nothing_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"absent\.mp4: No such file"):
        check_upload(tmp_path / "absent.mp4", LIMITS)
    data = bytearray(written(tmp_path / "v.mp4").read_bytes())
    start = data.index(b"elst") + 16  # where the edit list begins: behind the last frame
    data[start : start + 4] = (10_000_000).to_bytes(4, "big")
    (tmp_path / "v.mp4").write_bytes(data)
    with pytest.raises(UserError, match=r"v\.mp4: "):
        check_upload(tmp_path / "v.mp4", LIMITS)


def test_a_damaged_video_is_refused(tmp_path):
    path = written(tmp_path / "v.mp4", frames=20)
    data = bytearray(path.read_bytes())
    middle = data.index(b"mdat") + 2000
    data[middle : middle + 1500] = np.random.default_rng(0).bytes(1500)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"v\.mp4: cannot be read as a video"):
        check_upload(path, LIMITS)


def with_stated_size(path, side):
    """Write another picture size into the container of an mp4 than its frames have."""
    data = bytearray(path.read_bytes())
    sample, track = data.index(b"avc1", data.index(b"stsd")) + 28, data.index(b"tkhd") + 80
    data[sample : sample + 4] = 2 * side.to_bytes(2, "big")
    data[track : track + 2] = data[track + 4 : track + 6] = side.to_bytes(2, "big")
    path.write_bytes(data)


needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="no peak of memory on this system")


@needs_proc
@pytest.mark.parametrize("stated", [6144, 64])
def test_a_huge_picture_is_refused_before_a_frame_is_decoded(tmp_path, stated):
    small, huge = written(tmp_path / "small.mp4"), tmp_path / "huge.mp4"
    write_video(huge, np.broadcast_to(np.uint8(90), (1, 6144, 6144, 3)), 8)
    assert huge.stat().st_size < 2**20
    with_stated_size(huge, stated)
    reader, limits = IsolatedReader(), UploadLimits(megabytes=4, side=2048)
    check_upload(small, limits, reader)  # loads the libraries
    before = reader.call(most_memory, small)
    with pytest.raises(UserError, match=r"^huge\.mp4: 6144x6144 pixels; at most 2048 a side are accepted$"):
        check_upload(huge, limits, reader)
    assert 0 <= reader.call(most_memory, small) - before < 32e6  # one frame is 57 MB


@needs_proc
def test_memory_does_not_grow_with_the_length_of_an_upload(tmp_path):
    path, reader = tmp_path / "v.mp4", IsolatedReader()
    write_video(path, np.broadcast_to(np.uint8(90), (50, 1024, 1024, 3)), 25)
    check_upload(written(tmp_path / "small.mp4"), LIMITS, reader)  # loads the libraries
    before = reader.call(most_memory, path)
    assert check_upload(path, UploadLimits(), reader).frames == 50
    pictures = list(reader.stream(stream_frames, path, None, (64, 64)))
    assert [picture.shape for picture in pictures] == [(64, 64, 3)] * 50
    assert 0 <= reader.call(most_memory, path) - before < 100e6  # all frames are 157 MB


def test_an_image_named_as_a_video_is_measured_too(tmp_path):
    """Its name ends in mp4, its content is a PNG."""
    Image.new("L", (6144, 6144)).save(tmp_path / "v.mp4", "PNG")
    with pytest.raises(UserError, match=r"v\.mp4: cannot be read as a video: cannot be opened"):
        check_upload(tmp_path / "v.mp4", UploadLimits(side=100))


def test_no_frame_beyond_the_limit_is_decoded(tmp_path):
    path = written(tmp_path / "v.mp4", width=128, height=64)
    assert decode_strictly(path, max_pixels=128 * 64).width == 128
    with pytest.raises(UnreadableVideo, match="cannot be opened or decoded"):
        decode_strictly(path, max_pixels=16 * 16)
