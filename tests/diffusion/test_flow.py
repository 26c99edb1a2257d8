import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from promag.diffusion.flow import denoised, guide, interpolate, sample_times, shift_times, token_shift, velocity


@given(st.floats(0, 1))
def test_the_velocity_leads_back_to_the_clean_latent(time):
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 3, 4, 2, 2, generator=generator), torch.randn(2, 3, 4, 2, 2, generator=generator)
    times = torch.full((2,), time)
    noisy = interpolate(x, noise, times)
    assert torch.allclose(denoised(noisy, velocity(x, noise), times), x, atol=1e-5)
    assert torch.allclose(interpolate(x, noise, torch.zeros(2)), x)
    assert torch.allclose(interpolate(x, noise, torch.ones(2)), noise)


@given(st.floats(0.01, 0.99), st.floats(-2, 3))
def test_the_shift_multiplies_the_odds(time, mu):
    t = torch.tensor(time, dtype=torch.float64)
    shifted = shift_times(t, mu)
    assert torch.isclose(shifted / (1 - shifted), math.exp(mu) * t / (1 - t), rtol=1e-9)


@given(st.integers(1, 10000), st.floats(0.5, 12))
def test_shift_is_what_the_scheduler_applies(tokens, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=True)
    mu = token_shift(tokens, scheduler.config["shift"])
    scheduler.set_timesteps(sigmas=[0.8, 0.4], mu=mu)
    assert torch.allclose(scheduler.sigmas[:2], shift_times(torch.tensor([0.8, 0.4]), mu), atol=1e-5)


def test_four_times_the_tokens_double_the_shift():
    assert math.exp(token_shift(256, 3.0)) == pytest.approx(3)
    assert math.exp(token_shift(1024, 3.0)) == pytest.approx(6)


def test_times_are_logit_normal_and_repeatable():
    draw = [sample_times(0.7, [torch.Generator().manual_seed(5)] * 20000) for _ in range(2)]
    assert torch.equal(*draw)
    logits = torch.logit(draw[0].double())
    assert logits.mean().item() == pytest.approx(0.7, abs=0.03)
    assert logits.std().item() == pytest.approx(1.0, abs=0.03)


def test_guidance_of_one_is_the_prediction_with_text():
    a, b = torch.tensor([2.0]), torch.tensor([1.0])
    assert guide(a, b, 1.0).item() == 2
    assert guide(a, b, 3.0).item() == 4
