"""Strict decoding refuses real damage, both readers agree, and frames are those that were written."""

import contextlib
import os
import pickle
import struct
import subprocess
import sys
import threading
from fractions import Fraction

import av
import numpy as np
import pytest

from promag.data.video import (
    UnreadableVideo,
    decode_strictly,
    frame_times,
    read_frames,
    stream_frames,
    write_video,
)
from promag.data.video.decord_reader import read_with_decord
from promag.data.video.reader import read_with_pyav
from promag.data.video.source import within


def drifting(frames: int, height: int = 32, width: int = 64) -> np.ndarray:
    """Smooth colours that move to the right."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    waves = [np.sin((x - t) / 6), np.sin((y + t) / 5), np.cos((x + y - 2 * t) / 9)]
    return np.stack([127.5 + 100 * wave for wave in waves], axis=-1).round().astype(np.uint8)


def encode(path, pixels, times=None, aspect=Fraction(1)):
    """Encode without the care of `write_video`: frames at `times` (ms), pixels of a given aspect ratio."""
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = *pixels.shape[1:3], "yuv420p"
        stream.codec_context.sample_aspect_ratio = aspect
        stream.codec_context.time_base = Fraction(1, 1000)
        for k, frame in enumerate(pixels):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = int(40 * k if times is None else times[k]), Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def remux(source, target, change=lambda stream: None, keep=lambda number: True):
    """Copy the packets of a video that `keep` names by number, after `change(stream)`."""
    with av.open(source) as old, av.open(target, "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        change(stream)
        for number, packet in enumerate(old.demux(video=0)):
            if packet.dts is not None and keep(number):
                packet.stream = stream
                new.mux(packet)
    return target


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "clean.mp4"
    write_video(path, drifting(40), 25)
    return path


def test_importing_loads_no_decoder():
    code = "import promag.data.video, sys; print({'av', 'decord', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.parametrize("fps", [10, 23.976, 24000 / 1001, 30000 / 1001, 60])
def test_facts_of_a_written_video(tmp_path, fps):
    write_video(tmp_path / "a.mp4", drifting(9), fps)
    facts = decode_strictly(tmp_path / "a.mp4")
    assert (facts.frames, facts.width, facts.height) == (9, 64, 32)
    assert facts.fps == pytest.approx(fps, rel=1e-4)
    assert facts.duration == pytest.approx(9 / fps, rel=1e-4)
    np.testing.assert_allclose(facts.timestamps, np.arange(9) / fps, atol=1e-4)


def test_one_frame_is_a_video(tmp_path):
    write_video(tmp_path / "a.mp4", drifting(1), 24)
    facts = decode_strictly(tmp_path / "a.mp4")
    assert (facts.frames, facts.fps, facts.duration) == (1, 24, 1 / 24)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_variable_frame_rate_is_measured_by_timestamps(tmp_path, name):
    times = np.cumsum([0, *np.random.default_rng(0).integers(15, 120, 19)])
    facts = decode_strictly(encode(tmp_path / name, drifting(20), times))
    np.testing.assert_allclose(facts.timestamps, times / 1000, atol=1e-4)
    assert facts.fps == pytest.approx(19 / (times[-1] / 1000), rel=1e-3)


# -- damage ----------------------------------------------------------------------------------------------------------


def flip(data: bytes, places) -> bytes:
    damaged = bytearray(data)
    for place in places:
        damaged[place] ^= 16
    return bytes(damaged)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: b"", "cannot be opened"),
        (lambda data: b"no video at all\n" * 100, "cannot be opened"),
        (lambda data: data[: data.index(b"mdat") - 200], "cannot be opened"),
        (lambda data: data[: len(data) // 2], "states 40 frames, .* cut off"),
        (lambda data: data[:-20], "states 40 frames, 39 are there"),
        (lambda data: flip(data, range(data.index(b"mdat") + 1500, len(data), 700)), "decod"),
    ],
    ids=["empty", "text", "index cut", "half", "end cut", "bits flipped"],
)
def test_damaged_files_are_refused(clean, tmp_path, damage, reason):
    path = tmp_path / "damaged.mp4"
    path.write_bytes(damage(clean.read_bytes()))
    with pytest.raises(UnreadableVideo, match=reason) as caught:
        decode_strictly(path)
    assert caught.value.path == str(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_strict_decoding_finds_what_decord_hides(clean, tmp_path):
    pytest.importorskip("decord", reason="has wheels for x86-64 only")
    data, path, wanted = clean.read_bytes(), tmp_path / "flipped.mp4", list(range(40))
    right, hidden = read_with_decord(str(clean), wanted), 0
    for place in range(data.index(b"mdat") + 800, len(data), 300):
        path.write_bytes(flip(data, [place]))
        try:
            decode_strictly(path)
        except UnreadableVideo as error:
            if "decod" in error.reason:
                with contextlib.suppress(UnreadableVideo):  # some damage decord does see
                    hidden += np.abs(read_with_decord(str(path), wanted).astype(int) - right).mean() > 1
    assert hidden >= 2


def test_other_unreadable_files_are_refused(clean, tmp_path):
    with av.open(tmp_path / "sound.mp4", "w") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    encode(tmp_path / "thin.mp4", drifting(5), aspect=Fraction(1, 20))
    remux(clean, tmp_path / "tilted.mp4", lambda stream: stream.set_display_rotation(30))
    for name, size in (("small.ts", 64), ("large.ts", 96)):
        encode(tmp_path / name, drifting(30, size, size))
    (tmp_path / "joined.ts").write_bytes((tmp_path / "small.ts").read_bytes() + (tmp_path / "large.ts").read_bytes())
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile {clean}\n")
    (tmp_path / "playlist.mp4").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{clean}\n#EXT-X-ENDLIST\n")
    for name, reason in {
        "absent.mp4": "No such file",
        "sound.mp4": "no video stream",
        "thin.mp4": "states pixels of 1:20",
        "tilted.mp4": "turned by 30 degrees",
        "joined.ts": "corrupt|increase|those before",
        "list.mp4": "cannot be opened",
        "playlist.mp4": "cannot be opened",
    }.items():
        with pytest.raises(UnreadableVideo, match=reason):
            decode_strictly(tmp_path / name)


def test_frames_hidden_by_an_edit_list_are_not_read(clean, tmp_path):
    """A file cut without re-encoding contains frames that its edit list hides."""
    data = clean.read_bytes()
    # The edit list's media time says where in the track to begin: two frames later.
    place = data.index(b"elst") + 4 + 4 + 4 + 4
    later = int.from_bytes(data[place : place + 4], "big") + 2 * 12800 // 25
    (tmp_path / "cut.mp4").write_bytes(data[:place] + later.to_bytes(4, "big") + data[place + 4 :])
    facts = decode_strictly(tmp_path / "cut.mp4")
    assert (facts.frames, facts.decord) == (38, False)
    assert np.array_equal(read_frames(tmp_path / "cut.mp4", [0, 37, 5]), read_frames(clean, [2, 39, 7]))


def test_the_exception_survives_a_process_border():
    error = pickle.loads(pickle.dumps(UnreadableVideo("a.mp4", "frame 3 is corrupt")))
    assert (str(error), error.path, error.reason) == ("a.mp4: frame 3 is corrupt", "a.mp4", "frame 3 is corrupt")


# -- fast reading ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def videos(clean, tmp_path_factory):
    """Files of several kinds, all readable: name -> path."""
    folder = tmp_path_factory.mktemp("kinds")
    write_video(folder / "long.mp4", drifting(300), 30)  # key frames at 0 and 250, with B-frames between
    encode(folder / "variable.mkv", drifting(40), np.cumsum(np.random.default_rng(1).integers(15, 99, 40)))
    remux(clean, folder / "turned.mp4", lambda stream: stream.set_display_rotation(90))
    return {path.stem: str(path) for path in (clean, *folder.iterdir())}


def test_decord_is_not_used_for_long_videos(clean, monkeypatch):
    pytest.importorskip("decord", reason="has wheels for x86-64 only")
    frames = decode_strictly(clean).frames
    monkeypatch.setattr("promag.data.video.strict.LONG", frames)
    assert decode_strictly(clean, decord=True).decord
    monkeypatch.setattr("promag.data.video.strict.LONG", frames - 1)
    assert not decode_strictly(clean, decord=True).decord


@pytest.mark.parametrize("name", ["clean", "long", "variable", "turned"])
def test_decord_and_pyav_read_identical_frames(videos, name):
    pytest.importorskip("decord", reason="has wheels for x86-64 only")
    last = decode_strictly(videos[name]).frames - 1
    for wanted in ([0], [last], [17, 3, 3, last, 30], list(range(20, 37)), [last - 1, 1]):
        fast, slow = read_with_decord(videos[name], wanted), read_with_pyav(videos[name], wanted)
        assert fast.dtype == slow.dtype == np.uint8
        np.testing.assert_array_equal(fast, slow)


def test_frames_are_those_that_were_written(videos):
    wanted = [250, 0, 133, 299]
    read = read_frames(videos["long"], wanted)
    written = drifting(300).astype(int)
    assert read.shape == (4, 32, 64, 3)
    assert [int(np.abs(frame - written).mean(axis=(1, 2, 3)).argmin()) for frame in read] == wanted


def test_frames_are_streamed_in_order(videos):
    whole = read_frames(videos["long"], range(300))
    assert np.array_equal(np.stack(list(stream_frames(videos["long"]))), whole)
    wanted = [0, 0, 3, 3, 3, 250]
    assert np.array_equal(np.stack(list(stream_frames(videos["long"], wanted))), whole[wanted])
    for wrong, message in ([3, 2], "frame 2 after frame 3"), ([300], "frame 300; legal: 0 to 299"):
        with pytest.raises(ValueError, match=message):
            list(stream_frames(videos["long"], wrong))


TURNS = [(a, 0, 0, d) for a in (1, -1) for d in (1, -1)] + [(0, b, c, 0) for b in (1, -1) for c in (1, -1)]


@pytest.mark.parametrize("matrix", TURNS)
def test_turned_and_mirrored_files_are_shown_so(clean, tmp_path, matrix):
    """The display matrix moves x to a x + c y and y to b x + d y (ISO/IEC 14496-12, section 6.2.2)."""
    data, (a, b, c, d) = clean.read_bytes(), matrix
    place = data.index(b"tkhd") + 4 + 4 + 20 + 16
    fixed = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(data[:place] + fixed + data[place + 36 :])
    before = read_frames(clean, [5])[0]
    y, x = np.mgrid[: before.shape[0], : before.shape[1]]
    new_x, new_y = a * x + c * y, b * x + d * y
    facts = decode_strictly(tmp_path / "turned.mp4")
    expected = np.zeros((facts.height, facts.width, 3), np.uint8)
    expected[new_y - new_y.min(), new_x - new_x.min()] = before
    assert np.array_equal(read_frames(tmp_path / "turned.mp4", [5])[0], expected)


def test_rotation_is_applied(clean, videos):
    turned, upright = read_frames(videos["turned"], [5, 9]), read_frames(clean, [5, 9])
    np.testing.assert_array_equal(turned, np.rot90(upright, 1, axes=(1, 2)))
    facts = decode_strictly(videos["turned"])
    assert (facts.width, facts.height) == (32, 64)


@pytest.mark.parametrize("name", ["clean", "variable"])
def test_frame_times_are_those_of_the_strict_pass(videos, name):
    np.testing.assert_allclose(frame_times(videos[name]), decode_strictly(videos[name]).timestamps, atol=1e-4)


@pytest.mark.parametrize("wanted", [[], [-1], [40], [3, 99]])
def test_indices_outside_are_refused(clean, wanted):
    for read in (read_frames, read_with_pyav):
        with pytest.raises(ValueError, match="legal: 0 to 39"):
            read(str(clean), wanted)


def test_a_hanging_read_ends_at_its_time_limit(tmp_path):
    released = threading.Event()
    with pytest.raises(UnreadableVideo, match=r"a\.mp4: no answer within 0\.05 s"):
        within(0.05, tmp_path / "a.mp4", released.wait)
    released.set()  # let the thread end


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")  # opening it would block until somebody writes
    (tmp_path / "folder.mp4").mkdir()
    for name in ("pipe.mp4", "folder.mp4"):
        for read in (decode_strictly, frame_times, lambda path: read_frames(path, [0])):
            with pytest.raises(UnreadableVideo, match="not a file"):
                read(tmp_path / name)


def test_an_interlaced_frame_is_the_same_alone_and_among_others(tmp_path):
    with av.open(tmp_path / "interlaced.mp4", "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"flags": "+ildct+ilme", "x264-params": "tff=1", "g": "6"})
        stream.height, stream.width, stream.pix_fmt = 32, 64, "yuv420p"
        for frame in drifting(20):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    facts = decode_strictly(tmp_path / "interlaced.mp4")
    assert (facts.frames, facts.notes, facts.decord) == (20, ("deinterlaced",), False)
    whole = read_frames(tmp_path / "interlaced.mp4", range(20))
    for number in range(20):
        assert np.array_equal(read_frames(tmp_path / "interlaced.mp4", [number])[0], whole[number])


def test_pictures_of_a_parent_are_freed_in_a_forked_process(clean):
    """Loaders fork; decoders and scalers with threads of their own would hang when the child collects its garbage."""
    code = (
        "import gc, os, sys, promag.data.video.container as c\n"
        "gc.disable()\n"
        "with c.open_container(sys.argv[1]) as video:\n"
        "    kept = [video, *video.frames()]\n"
        "    pictures = [video.display.picture(f.decoded) for f in kept[1:]]\n"
        "kept.append(kept)\n"
        "del video, kept, pictures\n"
        "if not (child := os.fork()):\n"
        "    gc.collect(); os._exit(0)\n"
        "print(os.waitpid(child, 0)[1])"
    )
    call = [sys.executable, "-c", code, str(clean)]
    assert subprocess.run(call, capture_output=True, text=True, timeout=60).stdout == "0\n"
