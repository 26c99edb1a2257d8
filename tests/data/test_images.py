"""An image is a clip of one frame, from a file, from memory and through the index."""

import io

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from promag.data.clips import prepare
from promag.data.datasets import ClipDataset
from promag.data.listing import list_videos
from promag.data.video import IMAGE_FPS, UnreadableVideo, VideoBytes, decode_strictly, frame_times, read_frames
from promag.data.video.images import ImageError, read_image
from promag.training.config import UserError
from tests.data.conftest import counting

RED_LEFT = np.zeros((20, 40, 3), np.uint8)
RED_LEFT[:, :20, 0] = 200


def encoded(kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(RED_LEFT).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("JPEG", {"quality": 95}), ("WEBP", {"lossless": True})])
def test_formats(kind, options, tmp_path):
    data = encoded(kind, **options)
    (tmp_path / "a").write_bytes(data)
    for source in (data, tmp_path / "a"):
        pixels = read_image(source)
        assert (pixels.shape, pixels.dtype) == ((1, 20, 40, 3), np.uint8)
        assert np.abs(pixels[0, :, :18].astype(int) - RED_LEFT[:, :18]).max() <= 3


def test_orientation_palettes_and_transparency():
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    turned = read_image(encoded("JPEG", quality=95, exif=exif))
    assert turned.shape == (1, 40, 20, 3)
    assert turned[0, :18, :, 0].min() > 190  # the left half is above
    clear = Image.new("RGBA", (4, 2), (0, 0, 255, 0))
    buffer = io.BytesIO()
    clear.save(buffer, "PNG")
    assert read_image(buffer.getvalue()).min() == 255
    buffer = io.BytesIO()
    Image.fromarray(RED_LEFT).convert("P").save(buffer, "PNG")
    assert read_image(buffer.getvalue())[0, 5, 5].tolist()[0] > 180


def saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_depths_and_channels():
    deep = Image.fromarray(np.array([[0, 257, 32896, 65535]], np.uint16))
    assert read_image(saved(deep))[0, 0, :, 1].tolist() == [0, 1, 128, 255]
    assert read_image(saved(deep, "TIFF"))[0, 0, :, 1].tolist() == [0, 1, 128, 255]
    grey = Image.fromarray(np.array([[[10, 255], [10, 0]]], np.uint8), "LA")
    assert read_image(saved(grey))[0, 0].tolist() == [[10] * 3, [255] * 3]
    inks = Image.new("CMYK", (2, 2), (255, 0, 0, 0))
    assert read_image(saved(inks, "TIFF"))[0, 0, 0].tolist() == [0, 255, 255]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([0, 0, 255, 9, 8, 7])
    assert read_image(saved(palette, transparency=0))[0, 0].tolist() == [[255] * 3, [9, 8, 7]]
    assert read_image(saved(Image.new("1", (8, 8), 1)))[0, 0, 0].tolist() == [255] * 3
    with pytest.raises(ImageError, match="32 bits"):
        read_image(saved(Image.new("F", (2, 2)), "TIFF"))


def test_colours_follow_the_files_colour_profile():
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    picture = Image.fromarray(RED_LEFT)
    same = read_image(saved(picture, icc_profile=lab.tobytes()))
    assert np.abs(same.astype(int) - RED_LEFT).max() <= 1
    assert np.array_equal(read_image(saved(picture, icc_profile=b"no profile"))[0], RED_LEFT)


def swapping() -> bytes:
    """Return a profile by which what is stored as red is green, and the reverse."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"tmp ", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"tmp ", b"gXYZ", 1)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "P with transparency"])
def test_the_colour_profile_is_that_of_every_kind_of_picture(mode):
    options = {"transparency": 1} if "transparency" in mode else {}
    if mode.startswith("P"):
        picture = Image.new("P", (2, 1))
        picture.putpalette([200, 0, 0, 0, 0, 90])
    else:
        picture = Image.new(mode, (2, 1), (200, 0, 0))
    shown = read_image(saved(picture, icc_profile=swapping(), **options))[0, 0, 0]
    assert np.abs(shown.astype(int) - [0, 200, 0]).max() <= 2


def test_a_profile_is_followed_before_colours_are_blended_with_white():
    picture = Image.new("RGBA", (1, 1), (200, 0, 0, 51))  # a fifth of it
    shown = read_image(saved(picture, icc_profile=swapping()))[0, 0, 0]
    assert np.abs(shown.astype(int) - [204, 244, 204]).max() <= 2


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_pictures_of_several_frames_are_refused(kind):
    frames = [Image.new("RGB", (16, 16), (shade, 0, 0)) for shade in (0, 90, 180)]
    with pytest.raises(ImageError, match="holds 3 pictures"):
        read_image(saved(frames[0], kind, save_all=True, append_images=frames[1:]))


def test_an_image_is_read_as_a_video_of_one_frame():
    image = VideoBytes("shard.tar: 7.png", encoded("PNG"))
    facts = decode_strictly(image)
    assert (facts.frames, facts.width, facts.height, facts.fps) == (1, 40, 20, IMAGE_FPS)
    assert frame_times(image).tolist() == [0]
    assert np.array_equal(read_frames(image, [0, 0]), np.stack([RED_LEFT] * 2))
    with pytest.raises(ValueError, match="legal: 0 to 0"):
        read_frames(image, [1])


@pytest.mark.parametrize("data", [b"", b"text", encoded("PNG")[:60], encoded("JPEG")[:-40]])
def test_damaged_images_are_named(data):
    with pytest.raises(UnreadableVideo, match=r"shard.tar: 7.jpg: "):
        decode_strictly(VideoBytes("shard.tar: 7.jpg", data))


def flipped(data: bytes, bit: int) -> bytes:
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


def test_whatever_pil_raises_for_damage_names_the_image():
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    with pytest.raises(ImageError, match="required argument is not an integer"):
        read_image(encoded("JPEG", exif=flipped(exif.tobytes(), 139)))
    with pytest.raises(ImageError, match="Missing dimensions"):
        read_image(flipped(encoded("TIFF"), 64))


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_damaged_avif_is_named():
    data, reasons = encoded("AVIF"), set()
    for bit in range(640, 760, 3):
        try:
            read_image(flipped(data, bit))
        except ImageError as error:
            reasons.add(str(error))
    assert any("Failed to decode" in reason for reason in reasons)


def test_images_are_indexed_on_request(tmp_path):
    counting(tmp_path / "clip.mp4", 6)
    (tmp_path / "red_left.png").write_bytes(encoded("PNG"))
    assert [caption for _, caption in list_videos(tmp_path)] == ["clip"]
    both = list_videos(tmp_path, images=True)
    assert [caption for _, caption in both] == ["clip", "red left"]
    prepared = prepare(both, fps=40, progress=False)
    assert [(c.frames, c.width, c.height) for c in prepared.clips] == [(7, 64, 32), (1, 40, 20)]
    assert [path for path, _ in prepared.slower] == [both[0][0]]  # an image has no rate
    item = ClipDataset(prepared.clips[1:], 1, (20, 40)).item(0, np.random.default_rng(0))
    assert item["video"].shape == (3, 1, 20, 40)
    assert (item["video"][0, 0, :, :20].mean().item() + 1) * 127.5 == pytest.approx(200, abs=1)
    (tmp_path / "list.csv").write_text("file,caption\nred_left.png,a red half\n")
    assert list_videos(tmp_path / "list.csv") == [(both[1][0], "a red half")]
    (tmp_path / "only_stage").mkdir()
    with pytest.raises(UserError, match=r"holds no video \(no files\); videos end in .*\.webp"):
        list_videos(tmp_path / "only_stage", images=True)


def test_a_video_in_memory_is_read_like_its_file(tmp_path):
    path = counting(tmp_path / "a.mp4", 12)
    video = VideoBytes("shard.tar: a.mp4", (tmp_path / "a.mp4").read_bytes())
    strict, there = decode_strictly(video), decode_strictly(path)
    assert (strict.frames, strict.fps, strict.width) == (there.frames, there.fps, there.width) == (12, 30, 64)
    for _ in range(20):  # the decoder keeps no pointer into freed memory
        assert np.array_equal(read_frames(video, [7, 0, 11]), read_frames(path, [7, 0, 11]))
    assert np.array_equal(frame_times(video), frame_times(path))
    with pytest.raises(UnreadableVideo, match=r"^shard.tar: a.mp4: "):
        read_frames(VideoBytes("shard.tar: a.mp4", video.data[:900]), [0])
