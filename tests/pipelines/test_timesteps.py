"""Schedulers are exchangeable: they follow the same path, at the same times, to the same video."""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from promag.diffusion.flow import flow_times, guide, sample_flow, shift_times, token_shift
from promag.pipelines.timesteps import set_flow_times
from tests.pipelines.conftest import call, like, seed
from tests.tiny_pipeline import PROMPTS

CPU = torch.device("cpu")
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SCHEDULERS = {
    "euler": (FlowMatchEulerDiscreteScheduler, {}),
    "heun": (FlowMatchHeunDiscreteScheduler, {}),
    "unipc": (UniPCMultistepScheduler, FLOW),
    "dpm++": (DPMSolverMultistepScheduler, FLOW),
}
GRID = torch.linspace(1, 0.1, 10)
GRIDS = {"heun": torch.linspace(1, 0.001, 10)}  # it takes no times and divides the range from 1 to 1/1000


def scheduler(name, config, **changes):
    kind, more = SCHEDULERS[name]
    return kind.from_config(config, **more, **changes)


@pytest.fixture(scope="module")
def exact(pipe):
    """The latents at the end of the path."""
    return call(pipe, num_inference_steps=200, output_type="latent")


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_converges_to_the_same_latents(pipe, exact, name):
    swapped = like(pipe, scheduler=scheduler(name, pipe.scheduler.config))
    errors = {
        steps: float((call(swapped, num_inference_steps=steps, output_type="latent") - exact).norm() / exact.norm())
        for steps in (5, 40)
    }
    assert errors[40] < 0.025
    assert errors[5] > 0.03
    assert call(swapped, num_inference_steps=1).shape == (1, 17, 16, 24, 3)


def test_a_scheduler_of_several_evaluations_a_step_ends_where_euler_does(pipe, exact):
    swapped = like(pipe, scheduler=DPMSolverSinglestepScheduler.from_config(pipe.scheduler.config, **FLOW))
    latents = call(swapped, num_inference_steps=40, output_type="latent")
    assert float((latents - exact).norm() / exact.norm()) < 0.025


REFINED = {"latents": torch.randn(1, 4, 2, 2, 3, generator=seed(5)), "denoise_strength": 0.7, "output_type": "latent"}


@pytest.fixture(scope="module")
def exactly_refined(pipe):
    return call(pipe, num_inference_steps=200, **REFINED)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_refines_to_the_same_latents(pipe, exactly_refined, name):
    swapped = like(pipe, scheduler=scheduler(name, pipe.scheduler.config))
    refined = call(swapped, num_inference_steps=40, **REFINED)
    assert float((refined - exactly_refined).norm() / exactly_refined.norm()) < 0.025
    unchanged = call(swapped, num_inference_steps=4, **{**REFINED, "denoise_strength": 0.0})
    assert torch.allclose(unchanged, REFINED["latents"], atol=1e-5)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_batch_equals_its_prompts_one_by_one_under_every_scheduler(pipe, name):
    swapped = like(pipe, scheduler=scheduler(name, pipe.scheduler.config))
    batch = call(swapped, PROMPTS, num_inference_steps=3, generator=[seed(0), seed(1)])
    for i, prompt in enumerate(PROMPTS):
        alone = call(swapped, prompt, num_inference_steps=3, generator=seed(i))
        assert abs(batch[i] - alone[0]).max() < 1e-4


def test_stochastic_schedulers_draw_noise_from_each_videos_generator(pipe):
    noisy = like(pipe, scheduler=scheduler("dpm++", pipe.scheduler.config, algorithm_type="sde-dpmsolver++"))
    batch = call(noisy, PROMPTS, num_inference_steps=3, generator=[seed(0), seed(1)])
    for i, prompt in enumerate(PROMPTS):
        assert abs(batch[i] - call(noisy, prompt, num_inference_steps=3, generator=seed(i))[0]).max() < 1e-4


@pytest.mark.parametrize("name", SCHEDULERS)
def test_times_are_shifted_for_the_tokens_as_in_training(name):
    trained = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    built = scheduler(name, trained.config)
    times = 1000 * set_flow_times(built, 10, 64, CPU)[:-1]
    straight = shift_times(GRIDS.get(name, GRID), token_shift(64, 3.0)) * 1000
    assert torch.allclose(times.unique().flip(0), straight, rtol=0.02, atol=4)
    assert torch.allclose(times, built.timesteps.float(), atol=1)
    assert built.sigmas[-1] == 0
    assert set_flow_times(built, 10, 64, CPU)[-1] == 0
    before = dict(built.config)
    set_flow_times(built, 10, 1024, CPU)
    assert dict(built.config) == before


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_constant_shift_is_kept(name):
    constant = {"flow_shift": 2.0} if "use_flow_sigmas" in SCHEDULERS[name][1] else {"shift": 2.0}
    built = SCHEDULERS[name][0](**SCHEDULERS[name][1], **constant)
    times = [1000 * set_flow_times(built, 10, count, CPU)[:-1] for count in (64, 1024)]
    assert torch.equal(*times)
    expected = shift_times(GRIDS.get(name, GRID), math.log(2)) * 1000
    assert torch.allclose(times[0].unique().flip(0), expected, rtol=0.02, atol=4)


@pytest.mark.parametrize(
    "built", [DDIMScheduler(), UniPCMultistepScheduler(), DPMSolverMultistepScheduler(use_flow_sigmas=True)]
)
def test_a_scheduler_that_integrates_no_flow_is_refused(pipe, built):
    with pytest.raises(ValueError, match=f"scheduler {type(built).__name__}: .* use FlowMatchEulerDiscreteScheduler"):
        call(like(pipe, scheduler=built))


@torch.no_grad()
def test_the_pure_sampler_equals_the_pipeline_bit_for_bit(pipe):
    """The default scheduler is Euler's method; conditioning frames and guidance included."""
    options = {"num_frames": 33, "num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"}
    picture = torch.rand(3, 16, 24, generator=seed(2))
    expected = call(pipe, image=picture, **options)
    tokens, masks, pooled, *negative = pipe.encode_prompt([PROMPTS[0]])
    both = [torch.cat([a, b]) for a, b in zip(negative, (tokens, masks, pooled), strict=True)]

    def model(x, times):
        x, times = torch.cat([x] * 2), torch.cat([times] * 2)
        without, with_text = pipe.transformer(x, 1000 * times, *both, temporal_ratio=16, fps=8.0).sample.chunk(2)
        return guide(with_text, without, 3.0)

    times = pipe.scheduler.sigmas
    assert torch.allclose(times, flow_times(4, token_shift(18, pipe.scheduler.config["shift"])), atol=1e-6)
    encoded = pipe.vae.encode(2 * picture[None, :, None] - 1, 16).latent_dist.mode()
    result = sample_flow(
        model,
        torch.randn(1, 4, 3, 2, 3, generator=seed()),
        times,
        conditioning=pipe.transformer.normalise(encoded, 16),
    )
    assert torch.equal(pipe.transformer.denormalise(result, 16), expected)
