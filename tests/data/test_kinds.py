"""Every kind of video is read as it is shown, or refused in words; the values are known from how the files are made."""

import os
from fractions import Fraction

import av
import numpy as np
import pytest

from promag.data.video import UnreadableVideo, decode_strictly, frame_times, read_frames
from promag.scripts.reliability.corpus import picture
from promag.scripts.reliability.reference import to_sdr

BT601, BT709, BT2020 = (0.299, 0.114), (0.2126, 0.0722), (0.2627, 0.0593)  # weights of red and blue in luma
X264 = ("libx264", {"qp": "1", "bf": "2", "g": "10"})


def planes(rgb: np.ndarray, pixel_format: str, matrix=BT601, full: bool = False) -> list[np.ndarray]:
    """Return Y, Cb, Cr of (T, H, W, 3) in a format such as yuv420p10le, by the equations of ITU-R BT.601, BT.709, BT.2020."""
    bits = int(pixel_format.rsplit("p", 1)[1].removesuffix("le") or 8)
    red, green, blue = np.moveaxis(rgb / 255, -1, 0)
    weight_red, weight_blue = matrix
    luma = weight_red * red + (1 - weight_red - weight_blue) * green + weight_blue * blue
    chroma = [(blue - luma) / (2 - 2 * weight_blue), (red - luma) / (2 - 2 * weight_red)]
    if pixel_format.startswith(("yuv420", "yuv422")):
        chroma = [(plane[:, :, ::2] + plane[:, :, 1::2]) / 2 for plane in chroma]
    if pixel_format.startswith("yuv420"):
        chroma = [(plane[:, ::2] + plane[:, 1::2]) / 2 for plane in chroma]
    top, unit = 2**bits - 1, 2 ** (bits - 8)
    scaled = [luma * top if full else (16 + 219 * luma) * unit]
    scaled += [c * top + 128 * unit if full else (128 + 224 * c) * unit for c in chroma]
    return [plane.round().clip(0, top).astype(np.uint8 if bits == 8 else "<u2") for plane in scaled]


def frame_of(parts: list[np.ndarray], pixel_format: str) -> av.VideoFrame:
    """Return a frame of planes (H, W) or (H, W, C)."""
    height, width = parts[0].shape[:2]
    frame = av.VideoFrame(width, height, pixel_format)
    for plane, part in zip(frame.planes, parts, strict=True):
        lines = np.zeros((plane.height, plane.line_size), np.uint8)
        data = np.ascontiguousarray(part).view(np.uint8).reshape(len(part), -1)
        lines[: len(data), : data.shape[1]] = data
        plane.update(lines.tobytes())
    return frame


def encode(path, frames, codec=X264, times=None, rate=25, setup=lambda stream: None, name=None, **tags):
    """Encode frames (`frame_of`), at times in milliseconds if given; `tags` are attributes of the codec context."""
    with av.open(path, "w", format=name) as container:
        stream = container.add_stream(codec[0], rate=rate)
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, frames[0].format.name
        stream.options = codec[1]
        stream.codec_context.thread_count = 1
        for tag, value in tags.items():
            setattr(stream.codec_context, tag, value)
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        setup(stream)
        for number, frame in enumerate(frames):
            if times is not None:
                frame.pts, frame.time_base = int(times[number]), Fraction(1, 1000)
            else:
                frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def video(rgb, pixel_format="yuv420p", matrix=BT601, full=False):
    """Return the frames of (T, H, W, 3) in a YUV format."""
    return [frame_of(list(parts), pixel_format) for parts in zip(*planes(rgb, pixel_format, matrix, full), strict=True)]


def packed(pixels, pixel_format):
    """Return the frames of (T, H, W, C) in a format of one plane."""
    return [frame_of([frame], pixel_format) for frame in pixels]


def check(path, shown, most=9, times=None):
    """Assert that a file is read as `shown` (T, H, W, 3) but for `most` grey levels, at times in seconds, in any order."""
    facts = decode_strictly(path)
    assert (facts.frames, facts.height, facts.width) == shown.shape[:3]
    frames = read_frames(path, range(len(shown)))
    difference = np.abs(frames.astype(int) - shown).reshape(len(shown), -1)
    assert difference.max() <= most
    assert difference.mean() <= max(2.5, most / 4)
    scattered = [len(shown) - 1, 0, len(shown) // 2, 0]
    np.testing.assert_array_equal(read_frames(path, scattered), frames[scattered])
    wanted = np.arange(len(shown)) / 25 if times is None else np.asarray(times)
    np.testing.assert_allclose(facts.timestamps, wanted, atol=1e-3)
    np.testing.assert_allclose(frame_times(path), wanted, atol=1e-3)


RGB = picture(12)
RGBA = picture(12, alpha=True)
CODECS = {  # file: codec, pixel format, largest difference in grey levels
    "h264.mp4": (X264, "yuv420p", 9),
    "h264-10.mp4": (X264, "yuv420p10le", 9),
    "h264-422-10.mkv": (X264, "yuv422p10le", 7),
    "h264-444.mp4": (X264, "yuv444p", 4),
    "h264.ts": (X264, "yuv420p", 9),
    "h264.flv": (X264, "yuv420p", 9),
    "h265-10.mp4": (("libx265", {"x265-params": "qp=2:log-level=none:pools=1:keyint=10"}), "yuv420p10le", 9),
    "h265-12.mkv": (("libx265", {"x265-params": "qp=2:log-level=none:pools=1:keyint=10"}), "yuv444p12le", 6),
    "vp8.webm": (("libvpx", {"crf": "4", "b": "8M", "cpu-used": "8", "deadline": "realtime"}), "yuv420p", 16),
    "vp9.webm": (("libvpx-vp9", {"crf": "1", "b": "0", "auto-alt-ref": "1", "lag-in-frames": "8"}), "yuv420p", 9),
    "av1.mp4": (("libsvtav1", {"crf": "5", "preset": "8", "svtav1-params": "lp=1"}), "yuv420p", 16),
    "mpeg2.ts": (("mpeg2video", {"flags": "+qscale", "global_quality": "118", "bf": "2"}), "yuv420p", 16),
    "mpeg4.avi": (("mpeg4", {"flags": "+qscale", "global_quality": "118", "bf": "2"}), "yuv420p", 16),
    "wmv2.wmv": (("wmv2", {"flags": "+qscale", "global_quality": "118"}), "yuv420p", 16),
    "flv1.flv": (("flv", {"flags": "+qscale", "global_quality": "118"}), "yuv420p", 16),
    "prores.mov": (("prores_ks", {"profile": "3"}), "yuv422p10le", 7),
    "ffv1.mkv": (("ffv1", {"level": "3"}), "yuv444p16le", 1),
    "raw.avi": (("rawvideo", {}), "yuv420p", 9),
}  # fmt: skip


@pytest.mark.parametrize("name", CODECS)
def test_codecs_of_all_depths_and_samplings(tmp_path, name):
    codec, pixel_format, most = CODECS[name]
    check(encode(tmp_path / name, video(RGB, pixel_format), codec), RGB, most)


GREY = RGB.mean(axis=3, keepdims=True).astype(np.uint8)
THIRDS = RGB // np.array([32, 32, 64], np.uint8)  # 3, 3 and 2 bits of red, green and blue
PACKED = {  # file: codec, pixel format, pixels as stored, as shown
    "qtrle.mov": ("qtrle", "rgb24", RGB, RGB),
    "qtrle-grey.mov": ("qtrle", "gray", GREY, GREY.repeat(3, axis=3)),
    "png.mov": ("png", "rgb24", RGB, RGB),
    "raw.nut": ("rawvideo", "rgb24", RGB, RGB),
    "a.gif": ("gif", "rgb8", THIRDS @ np.array([[32], [4], [1]], np.uint8), THIRDS * np.array([36, 36, 85], np.uint8)),
}


@pytest.mark.parametrize("name", PACKED)
def test_codecs_without_chroma(tmp_path, name):
    codec, pixel_format, stored, shown = PACKED[name]
    check(encode(tmp_path / name, packed(stored, pixel_format), (codec, {})), shown, 4 if codec == "gif" else 0)


def on_white(rgba):
    alpha = rgba[..., 3:] / 255
    return rgba[..., :3] * alpha + 255 * (1 - alpha)


@pytest.mark.parametrize(("name", "codec"), [("argb.mov", "qtrle"), ("rgba.mov", "png"), ("rgba.apng", "apng")])
def test_transparent_pixels_lie_on_white(tmp_path, name, codec):
    pixels, pixel_format = (RGBA[..., [3, 0, 1, 2]], "argb") if codec == "qtrle" else (RGBA, "rgba")
    check(encode(tmp_path / name, packed(pixels, pixel_format), (codec, {})), on_white(RGBA), 1)


@pytest.mark.parametrize(
    ("name", "codec", "pixel_format"),
    [
        ("prores.mov", ("prores_ks", {"profile": "4", "alpha_bits": "16"}), "yuva444p10le"),
        ("vp9.webm", ("libvpx-vp9", {"crf": "1", "b": "0", "auto-alt-ref": "0", "cpu-used": "8"}), "yuva420p"),
    ],
)
def test_transparent_planes_lie_on_white(tmp_path, name, codec, pixel_format):
    bits, plain = (10, "yuv444p10le") if "10" in pixel_format else (8, "yuv420p")
    alpha = (RGBA[..., 3] / 255 * (2**bits - 1)).round().astype("<u2" if bits > 8 else np.uint8)
    parts = zip(*planes(RGB, plain), alpha, strict=True)
    frames = [frame_of(list(part), pixel_format) for part in parts]
    check(encode(tmp_path / name, frames, codec), on_white(RGBA), 10)


@pytest.mark.parametrize("width", [2, 6, 16, 24, 48, 72])
def test_narrow_pictures(tmp_path, width):
    rgb = np.broadcast_to(picture(9, 32, 8).mean(axis=2, keepdims=True).astype(np.uint8), (9, 32, width, 3))
    check(encode(tmp_path / "a.mp4", video(rgb)), rgb)


@pytest.mark.parametrize("size", [(31, 17), (63, 95), (1, 1)])
def test_odd_sizes(tmp_path, size):
    rgb = picture(6, *size)
    check(encode(tmp_path / "a.mp4", video(rgb, "yuv444p")), rgb, 4)


MATRICES = [("yuv444p", BT601, 6), ("yuv444p", BT709, 1), ("yuv444p10le", BT2020, 9)]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("pixel_format", "matrix", "number"), MATRICES)
def test_tagged_matrices_and_ranges(tmp_path, pixel_format, matrix, number, full):
    frames = video(RGB, pixel_format, matrix, full)
    check(encode(tmp_path / "a.mp4", frames, colorspace=number, color_range=2 if full else 1), RGB, 4)


@pytest.mark.parametrize(
    ("height", "width", "matrix"), [(16, 1280, BT709), (16, 1278, BT601), (578, 16, BT709), (576, 16, BT601), (720, 16, BT709)]
)
def test_the_matrix_of_untagged_files_follows_from_their_size(tmp_path, height, width, matrix):
    rgb = picture(2, height, width)
    check(encode(tmp_path / "a.mp4", video(rgb, "yuv444p", matrix)), rgb, 4)


@pytest.mark.parametrize(("transfer", "number"), [("pq", 16), ("hlg", 18)])
def test_high_dynamic_range_is_shown_on_a_display_of_reference_white(tmp_path, transfer, number):
    rgb = (120 + 0.08 * RGB).astype(np.uint8)  # within BT.709: at zero light, rounding grows without bound
    frames = video(rgb, "yuv444p10le", BT2020)
    path = encode(tmp_path / "a.mp4", frames, colorspace=9, color_primaries=9, color_trc=number, color_range=1)
    shown = np.stack([to_sdr(frame.astype(np.uint16) * 257, transfer) for frame in rgb])
    assert np.abs(shown.astype(int) - rgb).max() > 20  # it is not what SDR would be
    check(path, shown, 8)


@pytest.mark.parametrize(("transfer", "white"), [("pq", 0.58069), ("hlg", 0.75)])
def test_reference_white_and_black(transfer, white):
    """203 cd/m2 (BT.2408) is near the display's white, black stays black, and hues stay."""
    levels = np.array([[[0] * 3, [round(white * 65535)] * 3, [65535] * 3]], np.uint16)
    black, middle, most = to_sdr(levels, transfer)[0]
    assert black.tolist() == [0, 0, 0]
    assert most.tolist() == [255, 255, 255]
    assert 200 < middle[0] < 250
    assert len(set(middle.tolist())) == 1


# -- geometry --------------------------------------------------------------------------------------------------------

TURNS = {  # degrees counter-clockwise, mirrored: what a player does with the stored picture
    (0, False): lambda a: a,
    (90, False): lambda a: np.rot90(a, 1, (1, 2)),
    (180, False): lambda a: a[:, ::-1, ::-1],
    (270, False): lambda a: np.rot90(a, -1, (1, 2)),
    (0, True): lambda a: a[:, :, ::-1],
    (90, True): lambda a: np.rot90(a, 1, (1, 2))[:, :, ::-1],
    (180, True): lambda a: a[:, ::-1],
    (270, True): lambda a: np.rot90(a, -1, (1, 2))[:, :, ::-1],
}


@pytest.mark.parametrize(("degrees", "mirrored"), TURNS)
def test_display_matrices(tmp_path, degrees, mirrored):
    path = encode(tmp_path / "a.mp4", video(RGB), setup=lambda stream: stream.set_display_rotation(degrees, hflip=mirrored))
    check(path, TURNS[degrees, mirrored](RGB))


def test_an_oblique_display_matrix_is_refused(tmp_path):
    path = encode(tmp_path / "a.mp4", video(RGB), setup=lambda stream: stream.set_display_rotation(30))
    with pytest.raises(UnreadableVideo, match="30 degrees"):
        decode_strictly(path)


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
@pytest.mark.parametrize(("aspect", "width"), [(Fraction(2), 192), (Fraction(4, 3), 128), (Fraction(1, 2), 48)])
def test_pixels_that_are_not_square(tmp_path, ending, aspect, width):
    rgb = np.broadcast_to(RGB.mean(axis=2, keepdims=True).astype(np.uint8), RGB.shape)
    path = encode(tmp_path / f"a.{ending}", video(rgb), sample_aspect_ratio=aspect)
    check(path, np.broadcast_to(rgb[:, :, :1], (12, 64, width, 3)), 6)


@pytest.mark.parametrize("top", [True, False])
def test_fields_of_two_moments_become_one(tmp_path, top):
    """Each frame holds two moments; the one deinterlaced is near the first of them everywhere, woven it is not."""
    grey = np.arange(20, 20 + 24 * 8, 8, dtype=np.uint8)  # 24 moments
    moments = np.broadcast_to(grey[:, None, None, None], (24, 64, 96, 3))
    woven = moments[::2].copy()
    woven[:, int(top) :: 2] = moments[1::2, int(top) :: 2]
    codec = ("mpeg2video", {"flags": "+ildct+ilme+qscale", "global_quality": "118"})
    path = encode(tmp_path / "a.ts", video(woven, "yuv422p"), codec, field_order=2 if top else 3)
    with av.open(path) as container:
        assert next(container.decode(video=0)).interlaced_frame
    frames = read_frames(path, range(12)).astype(int)
    assert decode_strictly(path).frames == 12
    for number in (0, 5, 11):  # a frame depends on its neighbours, whichever frames are asked for
        np.testing.assert_array_equal(read_frames(path, [number])[0], frames[number])
    assert np.abs(np.diff(frames[:, 2:-2], axis=1)).max() <= 3
    assert np.abs(frames[:, 2:-2] - moments[::2, 2:-2]).max() <= 9


# -- times -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_held_frames_of_variable_rates(tmp_path, name):
    times = [0, 40, 55, 100, 1100, 1140, 1180, 4000, 4001, 4500, 4510, 4520]
    check(encode(tmp_path / name, video(RGB), times=times), RGB, times=np.array(times) / 1000)


def test_odd_delays_of_a_gif(tmp_path):
    rgb = np.zeros((5, 16, 16, 3), np.uint8)
    rgb[:] = (np.arange(5) * 36)[:, None, None, None]
    pixels = (np.arange(5, dtype=np.uint8) * 36 >> 5)[:, None, None, None] * np.uint8(0b00100100) | 0
    times = [0, 30, 500, 570, 2000]
    path = encode(tmp_path / "a.gif", packed(np.broadcast_to(pixels, (5, 16, 16, 1)), "rgb8"), ("gif", {}), times)
    facts = decode_strictly(path)
    np.testing.assert_allclose(facts.timestamps, np.array(times) / 1000, atol=1e-3)


def cut(path, later: int):
    """Let the edit list begin `later` frames into the file, as a cut without encoding does."""
    data = path.read_bytes()
    place = data.index(b"elst") + 4 + 4 + 4 + 4
    start = int.from_bytes(data[place : place + 4], "big") + later * 12800 // 25
    path.write_bytes(data[:place] + start.to_bytes(4, "big") + data[place + 4 :])
    return path


def test_a_clock_that_jumps_is_refused_in_broadcasts_alone(tmp_path):
    times = np.arange(12) * 40 + 20_000 * (np.arange(12) > 5)
    check(encode(tmp_path / "a.mkv", video(RGB), times=times), RGB, times=times / 1000)
    with pytest.raises(UnreadableVideo, match=r"clock jumps by 20\.0 s before frame 6"):
        decode_strictly(encode(tmp_path / "a.ts", video(RGB), times=times))


def test_a_matroska_file_that_starts_late_is_whole(tmp_path):
    times = 1500 + np.arange(12) * 40
    check(encode(tmp_path / "a.mkv", video(RGB), times=times), RGB)


def test_a_stream_without_key_frames_in_its_middle_is_read(tmp_path):
    codec = ("libx264", {"qp": "1", "g": "4", "intra-refresh": "1", "bf": "0"})
    check(encode(tmp_path / "a.mp4", video(RGB), codec), RGB)


def test_a_lossless_cut_begins_where_its_edit_list_says(tmp_path):
    check(cut(encode(tmp_path / "a.mp4", video(RGB)), 3), RGB[3:])


# -- streams and names -----------------------------------------------------------------------------------------------


def test_a_cover_picture_is_no_video(tmp_path):
    from av.stream import Disposition

    for name, with_video in (("with.mp4", True), ("alone.mp4", False)):
        with av.open(tmp_path / name, "w") as container:
            cover = container.add_stream("png", rate=25)
            cover.width, cover.height, cover.pix_fmt = 200, 200, "rgb24"
            cover.disposition = Disposition.attached_pic
            film = container.add_stream("libx264", rate=25) if with_video else None
            if film:
                film.width, film.height, film.pix_fmt, film.options = 96, 64, "yuv420p", {"qp": "1"}
            container.mux(cover.encode(packed(picture(1, 200, 200), "rgb24")[0]))
            for number, frame in enumerate(video(RGB)):
                if film:
                    frame.pts = number
                    container.mux(film.encode(frame))
            container.mux(film.encode() if film else cover.encode())
    check(tmp_path / "with.mp4", RGB)
    with pytest.raises(UnreadableVideo, match="cover picture"):
        decode_strictly(tmp_path / "alone.mp4")


@pytest.mark.parametrize("name", ["12:30.mp4", "file:x.mp4", "new\nline.mp4", "🎬.mp4", "\udcff.mp4", "-y.mp4", "%03d.mp4"])
def test_names_that_are_relative_and_odd(tmp_path, monkeypatch, name):
    encode(tmp_path / "plain.mp4", video(RGB))
    os.rename(tmp_path / "plain.mp4", tmp_path / name)
    monkeypatch.chdir(tmp_path)
    check(name, RGB)


# -- refused ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    return {ending: encode(folder / f"a.{ending}", video(RGB)).read_bytes() for ending in ("mp4", "mkv", "ts", "h264")}


def put(data: bytes, box: bytes, offset: int, *numbers: int) -> bytes:
    """Write numbers of four bytes into the contents of an MP4 box."""
    place = data.index(box) + 4 + offset
    new = b"".join(number.to_bytes(4, "big") for number in numbers)
    return data[:place] + new + data[place + len(new) :]


DAMAGED = {
    "empty.mp4": lambda good: b"",
    "text.mp4": lambda good: b"no video at all\n" * 100,
    "half.mp4": lambda good: good["mp4"][: len(good["mp4"]) // 2],
    "cut.mkv": lambda good: good["mkv"][: len(good["mkv"]) // 2],
    "two-billion-samples.mp4": lambda good: put(good["mp4"], b"stsz", 4, 1, 0x7FFFFFFF),
    "all-at-once.mp4": lambda good: put(good["mp4"], b"stts", 12, 0),
    "offsets.mp4": lambda good: put(good["mp4"], b"stco", 8, 0x7FFFFFFF),
    "playlist.mp4": lambda good: b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\na.ts\n#EXT-X-ENDLIST\n",
    "concat.mp4": lambda good: b"ffconcat version 1.0\nfile a.mp4\n",
    "joined.ts": lambda good: good["ts"] + good["ts"],
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_and_other_files_are_refused_in_words(tmp_path, good, name):
    for ending, data in good.items():
        (tmp_path / f"a.{ending}").write_bytes(data)
    (tmp_path / name).write_bytes(DAMAGED[name](good))
    with pytest.raises(UnreadableVideo) as caught:
        decode_strictly(tmp_path / name)
    assert caught.value.path == str(tmp_path / name)
    assert len(caught.value.reason.split()) > 2, caught.value.reason


@pytest.mark.parametrize(("size", "aspect", "reason"), [((96, 128), 1, "128x96"), ((64, 96), 2, "pixels of 2")])
def test_a_size_or_shape_that_changes_is_refused(tmp_path, good, size, aspect, reason):
    second = encode(tmp_path / "second.h264", video(picture(12, *size)), sample_aspect_ratio=Fraction(aspect))
    (tmp_path / "joined.h264").write_bytes(good["h264"] + second.read_bytes())
    with pytest.raises(UnreadableVideo, match=reason):
        decode_strictly(tmp_path / "joined.h264")


def test_a_wrong_checksum_among_right_ones_is_refused(tmp_path):
    data = bytearray(encode(tmp_path / "a.mkv", video(RGB), ("ffv1", {"level": "3", "slicecrc": "1"})).read_bytes())
    data[len(data) // 2] ^= 1  # its decoder would show something of the memory around
    (tmp_path / "a.mkv").write_bytes(data)
    with pytest.raises(UnreadableVideo, match=r"corrupt data after [1-9]"):
        decode_strictly(tmp_path / "a.mkv")


def test_an_avi_whose_index_leads_elsewhere_is_refused(tmp_path):
    data = bytearray(encode(tmp_path / "a.avi", video(RGB), ("mpeg4", {"g": "1"})).read_bytes())
    entry = data.index(b"idx1") + 8 + 16 * 5  # kind, flags, place and length of each frame
    data[entry : entry + 32] = data[entry + 16 : entry + 32] + data[entry : entry + 16]
    (tmp_path / "a.avi").write_bytes(data)
    with pytest.raises(UnreadableVideo, match="index leads to other frames"):
        decode_strictly(tmp_path / "a.avi")


@pytest.mark.parametrize("name", ["a.ts", "a.mp4", "a.mkv"])
def test_one_frame_is_a_video_in_every_container(tmp_path, name):
    check(encode(tmp_path / name, video(RGB[:1])), RGB[:1])
    assert decode_strictly(tmp_path / name).fps == 25
