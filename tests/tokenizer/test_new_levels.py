"""How a new level begins, before its first training step."""

import pytest
import torch

from promag import AutoencoderKLProMAG
from promag.tokenizer.base import INITIAL_LOGVAR
from promag.tokenizer.growth import Growth
from tests.conftest import TINY, make_tokenizer
from tests.tokenizer.test_autoencoder import moments


@pytest.mark.parametrize("mixing", ["attention", "adanorm", "adanorm_late", "concat"])
@pytest.mark.parametrize("sum_at", ["moments", "features"])
def test_birth_law_new_latent_is_the_lower_latent_of_every_second_frame(clip, mixing, sum_at):
    model = make_tokenizer(levels=1, settle=0.05)
    for ratio in (8, 16):
        model.grow(Growth(mixing=mixing, sum_at=sum_at))
        below = moments(model, clip[:, :, ::2], ratio // 2)
        assert torch.equal(moments(model, clip, ratio), below)
        with torch.no_grad():  # the next level's test must not need this one untrained
            for parameter in model.encoder_growth[-1].parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)


def test_birth_law_of_the_decoder_repeats_every_latent_frame_but_the_first():
    model = make_tokenizer(levels=2)
    z = torch.randn(1, 4, 3, 2, 2)
    assert torch.equal(model.lift(z, 8, 4), z[:, :, [0, 1, 1, 2, 2]])


def test_without_key_frames_the_new_latent_is_not_the_lower_one(clip):
    model = make_tokenizer(levels=2, mixing="none")
    assert (moments(model, clip, 8) - moments(model, clip[:, :, ::2], 4)).abs().max() > 1e-3


@pytest.mark.parametrize(("mixing", "birth"), [("none", True), ("none", False), ("attention", False)])
def test_a_head_that_starts_at_random_has_low_variance(clip, mixing, birth):
    model = AutoencoderKLProMAG(**{**TINY, "linear_shortcuts": False})
    model.grow(Growth(mixing=mixing, birth=birth))
    assert torch.allclose(model.encode(clip, 8).latent_dist.logvar, torch.tensor(INITIAL_LOGVAR))
