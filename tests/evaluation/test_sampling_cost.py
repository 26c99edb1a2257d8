import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler
from torch.utils.flop_counter import FlopCounterMode

from promag.evaluation.sampling_cost import Pace, SamplingCost, measure_pace, sampling_cost
from promag.pipelines.inputs import NAMES, NEGATIVE_NAMES
from promag.pipelines.sampling import Seconds, trained_ratios
from tests.conftest import TINY, make_tokenizer
from tests.tiny_pipeline import make_pipeline


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline()


@pytest.mark.parametrize(("ratio", "latents", "guidance"), [(4, 9, 2.0), (16, 3, 2.0), (16, 3, 1), (16, 3, 0), (16, 3, 0.5)])
def test_tokens_and_flops_are_those_of_a_sampling(pipe, ratio, latents, guidance):
    cost = sampling_cost(pipe, ratio, 33, steps=3, guidance=guidance)
    assert (cost.latent_frames, cost.tokens) == (latents, latents * 2 * 3)
    counter = FlopCounterMode(display=False)
    text = dict(zip((*NAMES, *NEGATIVE_NAMES), pipe.encode_prompt("", ""), strict=True))
    options = {**text, "output_type": "latent"}
    with counter, torch.no_grad():
        pipe(num_frames=33, temporal_ratio=ratio, num_inference_steps=3, guidance_scale=guidance, **options)
    assert cost.flops == counter.get_total_flops()


def test_a_scheduler_of_second_order_calls_the_transformer_twice_a_step_but_the_last():
    pipe = make_pipeline()
    cost = sampling_cost(pipe, 16, 33, 3, 2.0)
    pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    heun = sampling_cost(pipe, 16, 33, 3, 2.0)
    assert heun.flops == cost.flops / 3 * 5
    pace = Pace()
    pace.learn(sampling_cost(pipe, 16, 33, 2, 2.0), Seconds(0, 3, 0), "before")
    assert pace.expect(heun) == (Seconds(0, 5, 0), "before")


def test_tokens_follow_the_spatial_ratio_of_the_tokenizer():
    coarse = make_pipeline(height=32, width=48)
    coarse.register_modules(vae=make_tokenizer(base={**TINY, "patch_size": 8}))
    assert sampling_cost(coarse, 4, 33, 3, 2.0).tokens == 9 * 2 * 3  # 16 pixels a side


def test_frames_that_a_ratio_does_not_allow_are_refused(pipe):
    with pytest.raises(ValueError, match="20 frames: 16x needs"):
        sampling_cost(pipe, 16, 20, 3, 4.0)


def test_expectations_follow_the_last_measurement():
    pace, cost = Pace(), SamplingCost(16, 33, 3, 18, 100.0)
    assert pace.expect(cost) is None
    pace.learn(cost, Seconds(1, 2, 3), "before")
    assert pace.expect(cost) == (Seconds(1, 2, 3), "before")
    assert pace.expect(SamplingCost(16, 66, 6, 36, 250.0)) == (Seconds(1, 5, 6), "before")
    pace.learn(cost, Seconds(1, 4, 3), "last")
    assert pace.expect(cost) == (Seconds(1, 4, 3), "last")
    assert pace.expect(SamplingCost(4, 33, 9, 54, 300.0)) is None


def test_the_pace_is_measured_with_the_guidance_of_the_pipeline():
    pace = measure_pace(make_pipeline(guidance_scale=1.0), "fp32", lambda _: None)
    counted = sampling_cost(make_pipeline(), 16, 17, 2, 1.0)
    assert pace._last[16][0] == counted


def test_every_trained_ratio_is_measured(pipe):
    lines = []
    pace = measure_pace(pipe, "fp32", lines.append)
    assert [line.split()[0] for line in lines] == ["4x:", "16x:"]
    for ratio in trained_ratios(pipe):
        expected = pace.expect(sampling_cost(pipe, ratio, 17, 2, 2.0))
        assert expected
        assert expected[0].denoising > 0
        assert expected[1] == "2 steps at the start"
