"""Videos are written whole, in the right colours, for every player."""

import av
import numpy as np
import pytest

from promag.data.video import decode_strictly, encode_mp4, read_frames, write_video
from tests.data.test_video import drifting


def test_colours_survive(tmp_path):
    colours = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (128, 64, 200), (0, 0, 0)], np.uint8)
    frames = np.repeat(np.repeat(colours, 16, axis=0)[None, None], 32, axis=1).repeat(3, axis=0)
    write_video(tmp_path / "colours.mp4", frames, 24, crf=1)
    read = read_frames(tmp_path / "colours.mp4", [1])[0, 16, 8::16]
    assert np.abs(read.astype(int) - colours).max() <= 3


def test_encoded_bytes_play_while_they_load(tmp_path):
    data = encode_mp4(drifting(8), 12)
    assert data.index(b"moov") < data.index(b"mdat")
    (tmp_path / "a.mp4").write_bytes(data)
    facts = decode_strictly(tmp_path / "a.mp4")
    assert (facts.frames, facts.fps) == (8, 12)
    with av.open(tmp_path / "a.mp4") as container:
        assert (container.streams.video[0].codec.name, container.streams.video[0].pix_fmt) == ("h264", "yuv420p")


def test_a_lower_quality_is_smaller():
    assert len(encode_mp4(drifting(8), 12, crf=40)) < len(encode_mp4(drifting(8), 12, crf=18))


@pytest.mark.parametrize("crf", [0, 52])
def test_invalid_qualities_are_refused(crf):
    with pytest.raises(ValueError, match=f"crf {crf}: .* 1 to 51"):
        encode_mp4(drifting(1), 12, crf=crf)


@pytest.mark.parametrize(
    ("shape", "fps", "message"),
    [
        ((2, 33, 64, 3), 24, "33x64 .* use 32x64 or 34x64"),
        ((2, 33, 65, 3), 24, "use 32x64 or 34x66"),
        ((0, 32, 64, 3), 24, "T >= 1"),
        ((2, 32, 64, 4), 24, "uint8"),
        ((2, 32, 64, 3), 0, "fps 0"),
    ],
)
def test_frames_that_cannot_be_written_are_refused(tmp_path, shape, fps, message):
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / "a.mp4", np.zeros(shape, np.uint8), fps)
    with pytest.raises(ValueError, match="float64"):
        write_video(tmp_path / "a.mp4", np.zeros((2, 32, 64, 3)), 24)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    with pytest.raises(av.error.FFmpegError):  # wider than H.264 allows
        write_video(path, np.zeros((1, 2, 20_000, 3), np.uint8), 24)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_same_frames_become_the_same_file():
    """Smooth, slowly changing pictures: those that x264's macroblock tree encoded differently from call to call."""
    y, x, t = np.meshgrid(np.arange(64), np.arange(64), np.arange(33), indexing="ij")
    waves = [np.sin((x + k * y) / 9 + t / (3 + k)) + np.sin((y - k * x) / 5) for k in range(3)]
    frames = (np.stack(waves, -1) * 50 + 120).astype(np.uint8).transpose(2, 0, 1, 3)
    assert len({encode_mp4(frames, 16) for _ in range(12)}) == 1


def test_key_frames_are_at_the_requested_places(tmp_path):
    import av

    frames = np.full((20, 32, 32, 3), 90, np.uint8)  # without a cut, where x264 sets one on its own
    for key_every, wanted in ((8, [0, 8, 16]), (None, [0])):
        write_video(tmp_path / "v.mp4", frames, 10, key_every=key_every)
        with av.open(str(tmp_path / "v.mp4")) as container:
            assert [i for i, frame in enumerate(container.decode(video=0)) if frame.key_frame] == wanted
