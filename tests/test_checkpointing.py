"""Gradient checkpointing gives all models the same gradients with less memory."""

import functools

import pytest
import torch

from promag import AutoencoderKLProMAG, ProMAGTransformer3DModel
from promag.evaluation.memory import peak_live_bytes
from promag.tokenizer.growth import Growth
from tests.conftest import make_tokenizer
from tests.diffusion.test_transformer import SMALL, inputs
from tests.existing_models import small_existing


def whole_tokenizer():
    model = make_tokenizer(settle=0.05).train()
    x = torch.rand(1, 3, 33, 32, 32, generator=torch.Generator().manual_seed(0))
    return model, lambda: model(x, 16).sample.square().mean()


def grown_level():
    """A stage with frozen levels below, and its own level trained on latents and on pixels."""
    model = make_tokenizer(settle=0.05).train()
    model.train_only(16)
    x = torch.rand(2, 3, 17, 16, 16, generator=torch.Generator().manual_seed(0))

    def loss():
        posterior, target = model.encode_levels(x, (16, 8))
        fit = (model.lift(posterior.mode(), 16, 8) - target.mode()).square().mean()
        return fit + model.decode(posterior.mode(), 16).sample.square().mean()

    return model, loss


STRETCHED = ("Wan 2.1", "Wan 2.2", "CogVideoX")  # coded stretch by stretch


def existing(name, features="latents", hand_over="latent", whole=False):
    """A level on an autoencoder of diffusers; with `whole` the autoencoder is trained too, on a clip and on an image."""
    model = AutoencoderKLProMAG.from_base(small_existing(name), features)
    model.grow(Growth(width=16, hand_over=hand_over))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in (*model.encoder_growth.parameters(), *model.decoder_growth.parameters()):
            parameter.add_(torch.randn_like(parameter) * 0.05)
    ratio = 2 * model.base_ratio
    model.train().requires_grad_(True) if whole else model.train().train_only(ratio)
    side = 2 * model.spatial_ratio
    x = torch.rand(1, 3, 1 + 2 * ratio, side, side) * 2 - 1

    def loss():
        error = (model(x, ratio).sample - x).square().mean()
        if whole:
            error = error + (model(x, model.base_ratio).sample - x).square().mean()
            error = error + (model(x[:, :, :1], model.base_ratio).sample - x[:, :, :1]).square().mean()
        return error

    return model, loss


def transformer():
    torch.manual_seed(0)
    model = ProMAGTransformer3DModel(**{**SMALL, "num_layers": 6}, local_convolution=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model, lambda: model(**inputs(b=4, t=9)).sample.square().mean()


def built(build, checkpointing):
    model, loss = build()
    if checkpointing:
        model.enable_gradient_checkpointing()
    return model, loss


def gradients(build, checkpointing):
    """Return the gradients by their names, and the loss."""
    model, loss = built(build, checkpointing)
    value = loss()
    value.backward()
    return {"loss": value.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def peak_activations(build, checkpointing):
    model, loss = built(build, checkpointing)
    return peak_live_bytes(lambda: loss().backward()) - sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("build", [whole_tokenizer, grown_level, transformer])
def test_gradients_are_equal_bit_for_bit(build):
    plain, again = gradients(build, False), gradients(build, True)
    assert plain.keys() == again.keys()
    assert len(plain) > 10
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize(("features", "hand_over"), [("latents", "latent"), ("encoder", "both")])
@pytest.mark.parametrize("name", STRETCHED)
def test_an_existing_autoencoder_is_trained_alike_stretch_by_stretch(name, features, hand_over):
    build = functools.partial(existing, name, features, hand_over, whole=True)
    plain, again = gradients(build, False), gradients(build, True)
    assert plain.keys() == again.keys()
    assert sum(name.startswith(("encoder.model", "decoder.model")) for name in plain) > 40
    assert torch.equal(plain.pop("loss"), again["loss"])
    for name, gradient in plain.items():
        assert torch.allclose(gradient, again[name], rtol=1e-4, atol=1e-6 * float(gradient.abs().max()) + 1e-9), name


@pytest.mark.parametrize("build", [whole_tokenizer, transformer, *(functools.partial(existing, name) for name in STRETCHED)])
def test_activations_take_less_than_half(build):
    assert peak_activations(build, True) < 0.5 * peak_activations(build, False)


def test_streams_and_inference_are_unchanged(tokenizer, clip):
    model = make_tokenizer(settle=0.05)
    model.enable_gradient_checkpointing()
    with torch.no_grad():
        assert torch.equal(model(clip, 16).sample, tokenizer(clip, 16).sample)
    parts, state = [], ()
    for chunk in (clip[:, :, :17], clip[:, :, 17:]):
        posterior, state = model.encode_chunk(chunk, state, 16)
        parts.append(posterior.mode())
    assert torch.allclose(torch.cat(parts, 2), tokenizer.encode(clip, 16).latent_dist.mode(), atol=1e-5)
    model.disable_gradient_checkpointing()
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
