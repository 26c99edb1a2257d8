"""Image-to-video and continuation: conditioning frames stay unchanged, and invalid input is named."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from promag.pipelines.conditioning_frames import count_opening
from promag.tokenizer.geometry import check_frames, latent_frames
from tests.pipelines.conftest import call
from tests.tiny_pipeline import PROMPTS


@pytest.fixture
def clip():
    """40 16 24 3 in [0, 1]: colours that drift."""
    coarse = torch.rand(1, 3, 6, 3, 4, generator=torch.Generator().manual_seed(3))
    video = torch.nn.functional.interpolate(coarse, (40, 16, 24), mode="trilinear")[0]
    return video.permute(1, 2, 3, 0).numpy()


def encoded(pipe, clip, ratio):
    x = torch.from_numpy(clip).permute(3, 0, 1, 2)[None] * 2 - 1
    with torch.no_grad():
        return pipe.vae.encode(x, ratio).latent_dist.mode()


@pytest.mark.parametrize(("ratio", "given"), [(16, 17), (4, 5)])
def test_a_continued_clip_opens_with_its_last_frames_unchanged(pipe, clip, ratio, given):
    latents = call(pipe, video=clip, num_frames=33, temporal_ratio=ratio, output_type="latent")
    expected = encoded(pipe, clip[-given:], ratio)
    assert torch.allclose(latents[:, :, :2], expected, atol=1e-5)
    assert latents.shape[2] == 1 + 32 // ratio
    free = call(pipe, num_frames=33, temporal_ratio=ratio, output_type="latent")
    assert not torch.allclose(latents[:, :, 2:], free[:, :, 2:], atol=1e-3)


def test_the_decoded_first_frame_is_the_reconstructed_image(pipe, clip):
    frames = call(pipe, image=clip[0], guidance_scale=3.0)
    with torch.no_grad():
        alone = pipe.vae.decode(encoded(pipe, clip[:1], 16), 16).sample[0, :, 0]
    assert np.allclose(frames[0, 0], (alone / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy(), atol=1e-4)
    short = call(pipe, video=clip[:3])  # too few frames for a second latent frame: only the last one is conditioning
    assert np.allclose(short[0, 0], call(pipe, image=clip[2])[0, 0], atol=1e-5)


def test_every_image_type_gives_the_same_video(pipe, clip):
    picture = Image.fromarray((clip[0] * 255).round().astype("uint8"))
    exact = np.asarray(picture).astype("float32") / 255
    expected = call(pipe, image=exact)
    for image in (picture, picture.convert("RGBA"), [picture], torch.from_numpy(exact).permute(2, 0, 1), exact[None]):
        assert np.allclose(call(pipe, image=image), expected, atol=1e-5)
    tensor = torch.from_numpy(clip).permute(0, 3, 1, 2)
    pictures = [Image.fromarray((frame * 255).round().astype("uint8")) for frame in clip]
    expected = call(pipe, video=clip)
    for video in (tensor, list(clip), list(tensor), clip[None], [tensor], tensor[None]):
        assert np.allclose(call(pipe, video=video), expected, atol=1e-5)
    for video in (pictures, [pictures]):
        assert np.allclose(call(pipe, video=video), expected, atol=0.1)


def test_pictures_are_shown_as_those_that_are_trained_on(pipe):
    transparent = Image.new("RGBA", (24, 16), (0, 0, 0, 0))
    deep = Image.fromarray(np.full((16, 24), 30000, np.uint16))
    for picture, grey in ((transparent, 255), (deep, round(30000 / 257))):
        plain = Image.new("RGB", (24, 16), (grey,) * 3)
        assert np.array_equal(call(pipe, image=picture), call(pipe, image=plain))
    with pytest.raises(ValueError, match="image: its pixels have 32 bits: 8 or 16 a channel can be shown"):
        call(pipe, image=Image.new("F", (24, 16)))


def test_each_prompt_may_have_its_own_image(pipe, clip):
    two = call(pipe, PROMPTS, image=[clip[0], clip[30]], num_videos_per_prompt=2, generator=None)
    assert np.allclose(two[0, 0], two[1, 0], atol=1e-5)
    assert np.allclose(two[2, 0], call(pipe, image=clip[30])[0, 0], atol=1e-5)
    one = call(pipe, PROMPTS, image=clip[0], generator=None)
    assert np.allclose(one[0, 0], one[1, 0], atol=1e-5)


def test_callbacks_cannot_change_conditioning_frames(pipe, clip):
    zeros = {"callback_on_step_end": lambda p, i, t, seen: {"latents": torch.zeros_like(seen["latents"])}}
    latents = call(pipe, image=clip[0], output_type="latent", **zeros)
    assert torch.allclose(latents[:, :, :1], encoded(pipe, clip[:1], 16), atol=1e-5)
    assert torch.equal(latents[:, :, 1:], torch.full_like(latents[:, :, 1:], 0.5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": np.zeros((16, 16, 3))}, r"image of 16x16 \(height x width\): 16x24 is needed"),
        ({"image": Image.new("RGB", (16, 24))}, r"image of 24x16 \(height x width\): 16x24"),
        ({"video": torch.zeros(5, 3, 8, 24)}, r"video of 8x24 \(height x width\): 16x24"),
        ({"image": np.zeros((16, 24, 3), "uint8")}, "uint8: floats, H W C with 3 channels, are needed"),
        ({"image": torch.zeros(1, 16, 24)}, "floats, C H W with 3 channels"),
        ({"image": np.full((16, 24, 3), 2.0)}, r"values from 2 to 2: values in \[0, 1\]"),
        ({"image": "picture.png"}, "image of type str: a PIL picture"),
        ({"image": []}, "image: an empty list"),
        ({"video": [np.zeros((5, 16, 24, 3)), np.zeros((6, 16, 24, 3))]}, "clips of 5, 6 frames"),
        ({"image": np.zeros((3, 16, 24, 3))}, "image: 3 given; use one, or one for each of the 1 prompts"),
        ({"image": np.zeros((16, 24, 3)), "video": np.zeros((5, 16, 24, 3))}, "at most one of them"),
        ({"image": np.zeros((16, 24, 3)), "num_frames": 1}, "num_frames 1 with image: no frame is left to make; use 17"),
    ],
)
def test_mistakes_are_named(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        call(pipe, **arguments)


def test_a_model_trained_without_conditioning_frames_refuses_them(pipe):
    config = dict(pipe.transformer.config)
    try:
        pipe.transformer.register_to_config(condition_frames=0)
        with pytest.raises(ValueError, match="image: this transformer was trained without given frames"):
            call(pipe, image=np.zeros((16, 24, 3)))
    finally:
        pipe.transformer.register_to_config(condition_frames=config["condition_frames"])


@given(
    count=st.integers(1, 200),
    ratio=st.sampled_from([4, 8, 16]),
    limit=st.integers(1, 9),
    frames=st.integers(2, 20),
    latent_step=st.integers(1, 3),
)
def test_what_opens_a_video_is_a_legal_clip_that_leaves_a_frame_to_make(count, ratio, limit, frames, latent_step):
    opening = count_opening(count, ratio, limit, frames, latent_step)
    assert 1 <= opening <= count
    assert latent_frames(opening, ratio) <= min(limit, frames - 1)
    check_frames(opening, ratio, latent_step)
    longer = opening + ratio * latent_step
    assert longer > count or latent_frames(longer, ratio) > min(limit, frames - 1)
