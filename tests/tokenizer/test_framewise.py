"""Tests of widths that see one frame alone."""

import inspect

import pytest
import torch

from promag import AutoencoderKLProMAG
from promag.tokenizer.base import BASE_SETTINGS
from tests.conftest import TINY, make_tokenizer
from tests.tokenizer.test_autoencoder import check_chunks_equal_the_whole, moments

FINER = {**TINY, "patch_size": 2, "block_out_channels": (16,) * 4, "strides": ((1, 2), (2, 2), (2, 1))}
FRAMEWISE = [{**TINY, "framewise": 1}, {**FINER, "framewise": 1}, {**FINER, "framewise": 2}]


@pytest.mark.parametrize(("base", "convolutions"), zip(FRAMEWISE, (3, 4, 6), strict=True))  # down-sampling in space among them
@torch.no_grad()
def test_framewise_widths_are_computed_once_for_all_frame_rates(base, convolutions, monkeypatch):
    model = make_tokenizer(settle=0.05, base=base)
    torch.manual_seed(2)
    x = torch.rand(1, 3, 17, 16, 16) * 2 - 1
    stem = model.encoder.stem
    whole = stem(x)
    for t in range(17):  # each frame is seen alone
        assert torch.allclose(stem(x[:, :, t : t + 1]), whole[:, :, t : t + 1], atol=1e-6)
    framewise = [m for m in model.encoder.body.modules() if getattr(m, "kernel_size", None) == (1, 3, 3)]
    assert len(framewise) == convolutions
    expected, frames = moments(model, x, 16), []
    monkeypatch.setattr(model.encoder, "stem", lambda part: frames.append(part.shape[2]) or stem(part))
    assert torch.equal(moments(model, x, 16), expected)
    assert frames == [17]
    monkeypatch.setattr(model.encoder, "stem", stem)
    # the base sees every second and fourth frame as if these were the clip
    for rate, ratio in ((2, 8), (4, 16)):
        features = model.encoder.features(stem(x[:, :, ::rate]))[0]
        assert torch.allclose(features, model.encoder.features(whole[:, :, ::rate])[0], atol=1e-5)
        assert moments(model, x[:, :, ::rate], 4).shape == moments(model, x, ratio).shape


@pytest.mark.parametrize("base", FRAMEWISE)
@pytest.mark.parametrize("plan", [(1, 16, 16), (17, 16)])
@torch.no_grad()
def test_chunks_equal_the_whole_with_framewise_widths(base, plan):
    model = make_tokenizer(settle=0.05, base=base)
    check_chunks_equal_the_whole(model, plan)
    torch.manual_seed(2)
    x = torch.rand(1, 3, 33, 16, 16) * 2 - 1
    changed = x.clone()
    changed[:, :, 17] += 0.5
    assert torch.equal(model(x, 4).sample[:, :, :17], model(changed, 4).sample[:, :, :17])


@torch.no_grad()
def test_framewise_widths_start_from_block_means_and_keep_the_birth_law(clip):
    torch.manual_seed(0)
    model = AutoencoderKLProMAG(**FRAMEWISE[2])
    model.init_from_block_means()
    flat = torch.tensor([0.5, -0.25, 0.75]).view(1, 3, 1, 1, 1).expand(1, 3, 5, 16, 24)
    assert torch.allclose(model.decode(model.encode(flat).latent_dist.mode()).sample, flat, atol=1e-5)
    model.grow()
    assert torch.allclose(moments(model, clip, 8), moments(model, clip[:, :, ::2], 4), atol=1e-6)


def test_framewise_widths_enter_the_fingerprint_only_where_there_are_some():
    def fingerprint(model):
        return model.encoding_fingerprint(4)

    plain, framewise = (make_tokenizer(1, base={**TINY, "framewise": count}) for count in (0, 1))
    before = fingerprint(plain)
    assert before == fingerprint(make_tokenizer(1))
    assert before != fingerprint(framewise)


OTHER_SETTINGS = {
    "growth": "each level of it enters the fingerprint beside the base",
    "existing": "enters the fingerprint in place of the base's settings",
    "entries": "only pipelines of another family read it; nothing is computed by it",
}


def test_every_setting_of_the_base_enters_the_fingerprint():
    """One that is left out lets a cache of another variant's latents be reused where the weights are equal."""
    settings = inspect.signature(AutoencoderKLProMAG.__init__).parameters.keys() - {"self"}
    assert settings == {*BASE_SETTINGS, *OTHER_SETTINGS}
    assert not {*BASE_SETTINGS} & {*OTHER_SETTINGS}
