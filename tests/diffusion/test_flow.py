import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from promag.diffusion.flow import (
    StopSampling,
    euler_step,
    flow_times,
    guide,
    interpolate,
    sample_flow,
    sample_times,
    shift_times,
    token_shift,
    velocity,
)


@given(st.floats(0, 1))
def test_the_velocity_gives_back_the_clean_latent(time):
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 3, 4, 2, 2, generator=generator), torch.randn(2, 3, 4, 2, 2, generator=generator)
    times = torch.full((2,), time)
    noisy = interpolate(x, noise, times)
    assert torch.allclose(noisy - time * velocity(x, noise), x, atol=1e-5)
    assert torch.allclose(interpolate(x, noise, torch.zeros(2)), x)
    assert torch.allclose(interpolate(x, noise, torch.ones(2)), noise)


@given(st.floats(0.01, 0.99), st.floats(-2, 3))
def test_the_shift_multiplies_the_odds(time, mu):
    t = torch.tensor(time, dtype=torch.float64)
    shifted = shift_times(t, mu)
    assert torch.isclose(shifted / (1 - shifted), math.exp(mu) * t / (1 - t), rtol=1e-9)


@given(st.integers(1, 10000), st.floats(0.5, 12))
def test_the_shift_equals_the_schedulers(tokens, shift):
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


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def midpoint_step(model, x, time, next_time):
    """Take one step of the midpoint method, as an integration rule of a user's own: second order, two model calls."""
    half = (next_time - time) / 2
    return x + 2 * half * model(x + half * model(x, time), time + half)


@given(st.integers(1, 50), st.integers(1, 10000), st.floats(0.5, 12))
def test_sampling_times_are_those_of_the_saved_scheduler(steps, tokens, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=True)
    mu = token_shift(tokens, shift)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).numpy(), mu=mu)
    assert torch.allclose(flow_times(steps, mu), scheduler.sigmas, atol=1e-6)


@pytest.mark.parametrize("step", [euler_step, midpoint_step])
@pytest.mark.parametrize("times", [[1, 0], [1.0, 0.3, 0.0], flow_times(7, 1.0)])
def test_straight_paths_are_exact_in_any_steps(step, times):
    clean, noise = random(2, 3, 4, 2, 2), random(2, 3, 4, 2, 2, seed=1)
    result = sample_flow(lambda x, t: velocity(clean, noise), noise, times, step=step)
    assert torch.allclose(result, clean, atol=1e-6)


@pytest.mark.parametrize(("step", "order"), [(euler_step, 1), (midpoint_step, 2)])
def test_errors_shrink_with_the_order_of_the_method(step, order):
    """The solution of dx/dt = 2 t x has x(0) = x(1) / e."""
    noise = random(1, 1, 2, 2, 2)

    def error(steps):
        times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        result = sample_flow(lambda x, t: 2 * t.view(-1, 1, 1, 1, 1) * x, noise, times, step=step)
        return float((result - noise / math.e).norm())

    assert math.log2(error(40) / error(80)) == pytest.approx(order, abs=0.05)


@pytest.mark.parametrize("step", [euler_step, midpoint_step])
def test_conditioning_frames_stay_clean_and_have_time_zero(step):
    noise, conditioning = random(2, 3, 4, 2, 2), random(2, 3, 1, 2, 2, seed=1)

    def model(x, times):
        assert torch.equal(x[:, :, :1], conditioning)
        assert times.shape == (2, 4)
        assert not times[:, 0].any()
        assert times[0, 1] == times[1, 3] > 0
        return torch.full_like(x, 2.0)

    result = sample_flow(model, noise, [1, 0.5, 0], step=step, conditioning=conditioning)
    assert torch.equal(result[:, :, :1], conditioning)
    assert torch.allclose(result[:, :, 1:], noise[:, :, 1:] - 2)
    assert torch.equal(noise, random(2, 3, 4, 2, 2))


def test_a_callback_sees_each_step_and_may_change_the_latents_or_end_the_sampling():
    seen = []

    def callback(number, time, x):
        seen.append((number, time.item()))
        if number == 2:
            raise StopSampling
        return x + 1 if number == 1 else None

    noise = torch.zeros(1, 1, 1, 1, 1)
    result = sample_flow(lambda x, t: torch.zeros_like(x), noise, [1, 0.75, 0.5, 0.25, 0], callback=callback)
    assert seen == [(0, 0.75), (1, 0.5), (2, 0.25)]
    assert result.item() == 1


@given(st.lists(st.floats(-1, 2, width=16) | st.just(math.nan), min_size=1, max_size=4))
def test_times_that_rise_or_leave_the_path_are_refused(times):
    noise = torch.zeros(1, 1, 1, 1, 1)
    legal = all(0 <= t <= 1 for t in times) and sorted(times, reverse=True) == times
    if legal:
        assert sample_flow(lambda x, t: torch.ones_like(x), noise, times).item() == pytest.approx(times[-1] - times[0])
    else:
        with pytest.raises(ValueError, match=r"times .*: a row of numbers is needed, from at most 1 down"):
            sample_flow(lambda x, t: x, noise, times)


@pytest.mark.parametrize("steps", [0, -1, 2.0, math.nan])
def test_a_sampling_has_a_whole_number_of_steps(steps):
    with pytest.raises(ValueError, match=r"steps .*: a whole number from 1 to 100000 is needed"):
        flow_times(steps)


@pytest.mark.parametrize("mu", [math.nan, math.inf, 1e308, True, "1", None])
def test_a_shift_that_moves_all_times_to_one_end_is_named(mu):
    with pytest.raises(ValueError, match=r"mu .*: a number from -50 to 50 is needed"):
        flow_times(4, mu)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, "model None: a function is needed"),
        ({"step": "euler"}, "step 'euler': a function is needed"),
        ({"noise": torch.zeros(1, 2, 3)}, r"noise of shape \(1, 2, 3\), torch\.float32: a floating-point tensor b c t h w"),
        ({"times": "x"}, "times 'x': a row of numbers"),
        ({"times": None}, "times None: a row of numbers"),
        (
            {"conditioning": torch.zeros(3, 4, 1, 2, 2)},
            r"conditioning of shape \(3, 4, 1, 2, 2\): \(1, 4, 1 to 3, 2, 2\) is needed",
        ),
        ({"conditioning": torch.zeros(1, 4, 4, 2, 2)}, "conditioning of shape"),
    ],
)
def test_inputs_of_a_sampling_that_do_not_fit_are_named(change, message):
    given = {"model": lambda x, t: x, "noise": torch.zeros(1, 4, 3, 2, 2), "times": [1, 0], **change}
    with pytest.raises(ValueError, match=message):
        sample_flow(**given)
