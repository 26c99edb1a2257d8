"""Conditioning frames: they are drawn, they do not count in the loss, and a model learns to use them."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from promag.diffusion.conditioning import Condition, draw_cond_mask, mean_over_generated, times_of_frames
from promag.diffusion.flow import interpolate, sample_times
from promag.diffusion.objective import FlowObjective
from promag.diffusion.text import draw_dropped, learn_vocabulary, small_clip
from promag.diffusion.text_cache import CaptionEncoder
from promag.diffusion.transformer import ProMAGTransformer3DModel
from promag.training.loop import seeded


def generators(count):
    return [seeded(0, n) for n in range(count)]


def test_conditioning_frames_come_first_and_leave_some_to_generate():
    given = draw_cond_mask(Condition(0.5, 3), 5, generators(4000))
    counts = given.sum(1)
    assert torch.equal(given, torch.arange(5) < counts[:, None])
    shares = torch.bincount(counts, minlength=6) / 4000
    assert torch.allclose(shares, torch.tensor([0.5, 1 / 6, 1 / 6, 1 / 6, 0, 0]), atol=0.03)
    assert draw_cond_mask(Condition(1.0, 3), 2, generators(50)).sum(1).tolist() == [1] * 50
    assert draw_cond_mask(Condition(1.0, 3), 1, generators(2)) is None
    untouched = generators(1)
    assert draw_cond_mask(Condition(0.0, 3), 5, untouched) is None
    assert torch.equal(torch.rand(1, generator=untouched[0]), torch.rand(1, generator=generators(1)[0]))


def test_conditioning_frames_stay_clean_and_do_not_count_in_the_loss():
    x, noise = torch.randn(2, 4, 3, 2, 2), torch.randn(2, 4, 3, 2, 2)
    given = torch.tensor([[True, True, False], [False, False, False]])
    times = times_of_frames(torch.tensor([0.7, 0.4]), given)
    assert torch.allclose(times, torch.tensor([[0, 0, 0.7], [0.4, 0.4, 0.4]]))
    noisy = interpolate(x, noise, times)
    assert torch.equal(noisy[0, :, :2], x[0, :, :2])
    assert torch.allclose(noisy[1], 0.6 * x[1] + 0.4 * noise[1])
    errors = torch.rand(2, 4, 3, 2, 2)
    mean = mean_over_generated(errors, given)
    assert torch.allclose(mean, torch.stack([errors[0, :, 2].mean(), errors[1].mean()]))


def objective(condition, seed=0):
    torch.manual_seed(seed)
    vocabulary = learn_vocabulary(["a"], 300, max_length=4)
    transformer = ProMAGTransformer3DModel(
        in_channels=4,
        patch_size=(1, 1, 1),
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=8,
        text_dim=16,
        pooled_dim=16,
    )
    text = SimpleNamespace(learning_rate=1e-3)
    flow = {"shift": 3.0, "base_ahead": 0.0}
    config = SimpleNamespace(caption_dropout=0.0, **flow, condition=condition, text=text, optimization=text)
    return FlowObjective(transformer, CaptionEncoder([None], vocabulary, small_clip(vocabulary, 16, 1, 2)), config)


def batch(count, seed=0):
    """Clips in which all frames are equal, so the first one determines the others."""
    x = torch.randn(count, 4, 1, 2, 2, generator=seeded(seed)).expand(-1, -1, 3, -1, -1).contiguous()
    return {"latents": x, "caption": ["a"] * count, "fps": torch.full((count,), 8.0), "ratio": torch.full((count,), 16)}


def test_probability_zero_trains_without_conditioning():
    losses = [objective(c)(batch(3), generators(3), 0)["loss"] for c in (Condition(0.0, 1), Condition(0.0, 2))]
    model = objective(Condition(0.0, 1))
    drawn, b = generators(3), batch(3)
    text = model.text(b, draw_dropped(0.0, drawn))
    times = sample_times(model.mu(b["latents"]), drawn)
    noise = randn_tensor(b["latents"].shape, drawn)
    plain = model.errors(b["latents"], noise, times, text, b["fps"], 16).mean()
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], plain)


def test_one_time_for_all_frames_is_the_time_of_each():
    model = objective(Condition(0.0, 1)).transformer
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        rest = {"encoder_hidden_states": torch.randn(2, 4, 16), "pooled_projections": torch.randn(2, 16), "temporal_ratio": 16}
        x, times = torch.randn(2, 4, 3, 2, 2), torch.tensor([200.0, 700.0])
        whole = model(x, times, **rest).sample
        assert torch.allclose(model(x, times[:, None].expand(-1, 3), **rest).sample, whole, atol=1e-5)
        other = model(x, torch.tensor([[0.0, 200, 200], [700, 700, 700]]), **rest).sample
    assert not torch.allclose(other[0], whole[0], atol=1e-3)
    assert torch.allclose(other[1], whole[1], atol=1e-5)
    with pytest.raises(
        ValueError, match=r"timestep of shape \(2, 2\): \(2,\) is legal, with patches of one frame \(2, 3\) too"
    ):
        model(x, torch.zeros(2, 2), **rest)


def test_a_trained_model_uses_its_conditioning_frames():
    """In still clips the first frame determines all others: with it as conditioning, the error must be far lower."""
    model = objective(Condition(0.7, 1))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for step in range(80):
        loss = model(batch(16, step), [seeded(step, n) for n in range(16)], step)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    unseen, noise, times = batch(64, 10**6), torch.randn(64, 4, 3, 2, 2, generator=seeded(5)), torch.full((64,), 0.9)
    given = (torch.arange(3) < 1).expand(64, -1)
    with torch.no_grad():
        arguments = (unseen["latents"], noise, times, model.text(unseen), unseen["fps"], 16)
        without, conditioned = model.errors(*arguments).mean(), model.errors(*arguments, given).mean()
        mismatched = (torch.randn_like(arguments[0]), *arguments[1:])  # with the first frame of another clip
        mismatched[0][:, :, 1:] = unseen["latents"][:, :, 1:]
        misled = model.errors(*mismatched, given).mean()
    assert conditioned < 0.5 * without
    assert misled > 2 * conditioned


@pytest.mark.parametrize("change", [{"probability": 1.5}, {"probability": -0.1}, {"frames": 0}])
def test_illegal_settings_are_named(change):
    with pytest.raises(ValueError, match=r"a probability in \[0, 1\], 1 frame or more"):
        dataclasses.replace(Condition(0.5, 1), **change)
