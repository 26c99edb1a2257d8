"""Gradient checkpointing gives both models the same gradients with less memory."""

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from promag import ProMAGTransformer3DModel
from tests.conftest import make_tokenizer
from tests.diffusion.test_transformer import SMALL, inputs


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
    model, loss = built(build, checkpointing)
    loss().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def peak_activations(build, checkpointing):
    model, loss = built(build, checkpointing)
    tracker = MemTracker()
    tracker.track_external(model)
    with tracker:
        loss().backward()
    kinds = next(iter(tracker.get_tracker_snapshot("peak").values()))
    return next(size for kind, size in kinds.items() if str(kind).endswith("ACT"))


@pytest.mark.parametrize("build", [whole_tokenizer, grown_level, transformer])
def test_gradients_are_equal_bit_for_bit(build):
    plain, again = gradients(build, False), gradients(build, True)
    assert plain.keys() == again.keys()
    assert len(plain) > 10
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize("build", [whole_tokenizer, transformer])
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
