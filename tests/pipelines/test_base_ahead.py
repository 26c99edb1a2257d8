"""A pipeline whose transformer was trained with a lead: the schedulers move each half of the channels by its own time."""

import itertools

import pytest
import torch
from diffusers import DiffusionPipeline, FirstBlockCacheConfig, FlowMatchLCMScheduler

from promag.diffusion.ahead import half_times, interpolate, paced
from promag.diffusion.flow import euler_step, flow_times, guide, sample_flow, token_shift
from tests.pipelines.conftest import call, seed
from tests.pipelines.test_timesteps import scheduler
from tests.tiny_pipeline import PROMPTS, make_pipeline

LEAD = 0.3


@pytest.fixture
def leading():
    """The tiny pipeline with a lead, and an embedding of the residual's time that is not zero."""
    pipe = make_pipeline()
    pipe.transformer.set_base_ahead(LEAD)
    with torch.no_grad():
        for parameter in pipe.transformer.residual_time_embed.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return pipe


def sample(pipe, name="euler", **given):
    pipe.scheduler = scheduler(name, pipe.scheduler.config)
    return call(pipe, **{"output_type": "latent", **given})


def distance(a, b):
    return float((a - b).norm() / b.norm())


def test_euler_and_heun_follow_the_same_path(leading):
    exact = sample(leading, num_inference_steps=500)
    for name in ("euler", "heun"):
        assert distance(sample(leading, name, num_inference_steps=40), exact) < 0.03
        assert call(leading, num_inference_steps=1).shape == (1, 17, 16, 24, 3)
    plain = make_pipeline()
    assert distance(sample(plain, num_inference_steps=40), exact) > 0.05


def test_the_pure_sampler_equals_the_pipeline(leading):
    """Each half moves by its own change of time: the pace of a step, not of its beginning."""
    noise, steps = torch.randn(1, 4, 2, 2, 3, generator=seed()), 5
    (tokens, mask, pooled, *negative) = leading.encode_prompt(PROMPTS[0])

    @torch.no_grad()
    def model(x, t):
        both = [
            leading.transformer(x, 1000 * t, *text, temporal_ratio=16, fps=8).sample
            for text in ((tokens, mask, pooled), negative)
        ]
        return guide(*both, 4.0)

    times = flow_times(steps, token_shift(12, leading.scheduler.config["shift"]))
    by_hand = noise
    for time, next_time in itertools.pairwise(times):
        velocity = model(by_hand, time[None])
        pairs = zip(by_hand.chunk(2, 1), velocity.chunk(2, 1), half_times(time, LEAD), half_times(next_time, LEAD), strict=True)
        by_hand = torch.cat([x + (after - before) * v for x, v, before, after in pairs], 1)
    pure = sample_flow(model, noise, times, step=paced(euler_step, LEAD))
    assert torch.allclose(pure, by_hand, atol=1e-4)
    sampled = leading.transformer.normalise(sample(leading, latents=noise, num_inference_steps=steps), 16)
    assert torch.allclose(sampled, by_hand, atol=1e-3)


def test_refining_starts_from_each_half_at_its_own_time(leading):
    given = torch.randn(1, 4, 2, 2, 3, generator=seed(5))
    assert torch.allclose(sample(leading, latents=given, denoise_strength=0.0), given, atol=1e-5)
    started = []
    hook = leading.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: started.append((kwargs["hidden_states"][:1], kwargs["timestep"][:1] / 1000)),
        with_kwargs=True,
    )
    sample(leading, latents=given, denoise_strength=0.5, num_inference_steps=4)
    hook.remove()
    x, time = started[0]
    noise = torch.randn(1, 4, 2, 2, 3, generator=seed())
    assert torch.allclose(x, interpolate(leading.transformer.normalise(given, 16), noise, time, LEAD), atol=1e-5)


def test_given_frames_stay_and_a_batch_equals_its_prompts(leading):
    image = torch.rand(3, 16, 24, generator=seed(1))
    latents = sample(leading, image=image)
    encoded = leading.vae.encode(2 * image[None, :, None] - 1, 16).latent_dist.mode()
    assert torch.allclose(latents[:, :, :1], encoded, atol=1e-4)
    batch = sample(leading, prompt=PROMPTS, generator=[seed(0), seed(1)])
    for i, prompt in enumerate(PROMPTS):
        assert torch.allclose(batch[i : i + 1], sample(leading, prompt=prompt, generator=seed(i)), atol=1e-4)


def test_the_lead_is_saved_with_the_pipeline(leading, tmp_path):
    leading.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.transformer.config["base_ahead"] == LEAD
    assert torch.allclose(sample(again), sample(leading), atol=1e-4)


def test_the_first_block_cache_works(leading):
    exact = sample(leading, num_inference_steps=6)
    leading.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    assert torch.allclose(sample(leading, num_inference_steps=6), exact, atol=1e-4)


@pytest.mark.parametrize("name", ["unipc", "dpm++", "lcm", "stochastic"])
def test_schedulers_that_mix_times_are_refused(leading, name):
    config = leading.scheduler.config
    if name in ("lcm", "stochastic"):
        kind = FlowMatchLCMScheduler if name == "lcm" else type(leading.scheduler)
        leading.scheduler = kind.from_config(config, stochastic_sampling=name == "stochastic")
    else:
        leading.scheduler = scheduler(name, config)
    message = (
        "base_ahead 0.3, two times in each step; use FlowMatchEulerDiscreteScheduler or FlowMatchHeunDiscreteScheduler, without"
    )
    with pytest.raises(ValueError, match=f"scheduler .*Scheduler: .* {message} stochastic_sampling"):
        call(leading)
