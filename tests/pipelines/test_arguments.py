"""Odd arguments: the right answer, or a ValueError of one line that names what was given. The script has the long version."""

import functools
import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from promag.pipelines.sampling import SampleRequest, make_videos, sample_videos
from promag.pipelines.timesteps import FLOW_SETTINGS
from promag.scripts.reliability.odd_arguments import odd_arguments
from promag.scripts.reliability.outcomes import ANSWERED, REFUSED, Case, outcome
from tests.pipelines.conftest import call, like, seed
from tests.tiny_pipeline import PROMPTS, make_pipeline

one_pipeline = functools.cache(make_pipeline)  # hypothesis takes no fixtures of a test


def test_odd_arguments_are_answered_or_refused_by_name(pipe):
    cases = list(odd_arguments(pipe))[::3]
    outcomes = {case.what: outcome(case) for case in cases}
    assert {what: result for what, result in outcomes.items() if result not in (ANSWERED, REFUSED)} == {}
    assert sum(result == REFUSED for result in outcomes.values()) > 150


LEGAL = {
    "height": st.sampled_from([None, 8, 16]),
    "width": st.sampled_from([None, 8, 24]),
    "num_frames": st.sampled_from([None, 1, 17]),
    "num_inference_steps": st.integers(1, 2),
    "guidance_scale": st.floats(-2, 8),
    "num_videos_per_prompt": st.integers(1, 2),
    "temporal_ratio": st.sampled_from([None, 4, 16]),
    "fps": st.none() | st.floats(0.1, 240),
    "generator": st.none() | st.builds(seed, st.integers(0, 9)),
    "max_sequence_length": st.none() | st.integers(2, 10),
    "output_type": st.sampled_from(["np", "pt", "pil", "latent"]),
    "negative_prompt": st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    "attention_kwargs": st.sampled_from([None, {}, {"scale": 0.5}]),
}
NAMES = [*LEGAL, "latents", "image", "denoise_strength", "prompt"]
ODD = st.one_of(
    st.integers(-3, 3),
    st.floats(),
    st.booleans(),
    st.text(max_size=5),
    st.binary(max_size=3),
    st.none(),
    st.lists(st.integers(-1, 20) | st.text(max_size=3) | st.none(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=1),
    st.sampled_from([10**30, np.float32("nan"), np.int64(2), torch.ones(2), np.ones(2), ..., object]),
)


@settings(max_examples=60)
@given(st.fixed_dictionaries({}, optional=LEGAL), st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_legal_arguments_of_every_kind_are_answered(arguments, prompt):
    case = Case("pipe", lambda: one_pipeline()(prompt, **{"num_inference_steps": 1, **arguments}).frames, ())
    assert outcome(case) == ANSWERED


@settings(max_examples=150)
@given(
    st.dictionaries(st.sampled_from([*LEGAL, "latents", "image", "denoise_strength", "prompt"]), ODD, min_size=1, max_size=3)
)
def test_any_value_of_any_argument_is_answered_or_refused_in_one_line(arguments):
    call = {"prompt": PROMPTS[0], "num_inference_steps": 1, **arguments}
    assert outcome(Case("pipe", lambda: one_pipeline()(**call).frames, ("",))) in (ANSWERED, REFUSED)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (["a", 5], r"prompt \['a', 5\]: a text or a list of texts is needed"),
        ([["a"]], r"prompt \[\['a'\]\]: a text or a list of texts"),
        ("a \ud800", r"prompt 'a \\ud800': holds half of a surrogate pair"),
        ([], r"prompt \[\]: a text"),
    ],
)
def test_prompts_that_are_no_texts_are_named(pipe, prompt, message):
    with pytest.raises(ValueError, match=message):
        call(pipe, prompt)
    with pytest.raises(ValueError, match=f"negative_{message}"):
        call(pipe, negative_prompt=prompt)


@pytest.mark.parametrize("prompt", ["", "\x00\x07\x1b[31m", "disc " * 20_000, "\u202e\U0001f600 čtyři"])
def test_texts_of_every_kind_are_sampled_and_what_is_cut_is_named_in_a_short_line(pipe, prompt, caplog):
    assert np.isfinite(call(pipe, prompt)).all()
    assert all(len(record.getMessage()) < 600 for record in caplog.records)
    assert len(caplog.records) >= (len(prompt) > 1000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance_scale": 10**30}, r"latents sampled with guidance_scale 1e\+30 at 8 fps: holds NaN or infinite values"),
        ({"guidance_scale": 10**400}, "guidance_scale 1000*: a finite number is needed"),
        ({"guidance_scale": 1e308}, r"latents sampled with guidance_scale 1e\+308 at 8 fps: holds NaN or infinite values"),
        ({"num_frames": 1 + 16 * 10**8}, r"num_frames, num_videos_per_prompt: \d+ tokens; at most 16777216"),
        ({"num_inference_steps": 10**6}, "num_inference_steps 1000000: at most 100000"),
        ({"image": torch.full((3, 16, 24), math.nan)}, "image with values from nan to nan"),
        ({"attention_kwargs": {"sclae": 1}}, r"attention_kwargs \{'sclae': 1\}: a dictionary that may hold scale"),
        ({"callback_on_step_end": 5}, "callback_on_step_end 5: a function"),
        ({"callback_on_step_end": lambda *_: 5}, "callback_on_step_end returned 5: a dictionary"),
        ({"callback_on_step_end": lambda *_: {"latents": torch.ones(2)}}, "returned latents tensor"),
    ],
)
def test_what_would_end_in_a_black_video_or_out_of_memory_is_refused(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        call(pipe, **arguments)


def test_a_further_scheduler_samples(pipe):
    assert np.isfinite(call(like(pipe, scheduler=FlowMatchLCMScheduler()), num_inference_steps=3)).all()


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (DDIMScheduler(), r"scheduler DDIMScheduler: .* use FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, "),
        # Both of these would leave noise in the video: diffusers ends their flow before time 0.
        (DEISMultistepScheduler(**FLOW_SETTINGS), "scheduler DEISMultistepScheduler: the transformer predicts the velocity"),
        (
            UniPCMultistepScheduler(**FLOW_SETTINGS, final_sigmas_type="sigma_min"),
            r"scheduler UniPC.*'final_sigmas_type': 'sigma_min'.*: its times .* do not fall from at most 1 to 0",
        ),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), r"scheduler FlowMatchEuler.*'invert_sigmas': True.*do not fall"),
        (FlowMatchEulerDiscreteScheduler(shift=math.nan), r"scheduler FlowMatchEulerDiscreteScheduler with \{'shift': nan\}"),
    ],
)
def test_schedulers_that_cannot_sample_are_named_with_those_that_can(pipe, made, message):
    with pytest.raises(ValueError, match=message):
        call(like(pipe, scheduler=made))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output_type": "latent"}, "output_type: no argument that can be given here; legal are attention_kwargs, fps"),
        ({"fpps": 8}, "fpps: no argument"),
        ({"precision": "fp8"}, "precision 'fp8': use one of"),
        ({"draft": 5}, "draft 5: a Draft is needed"),
    ],
)
def test_batches_of_videos_take_only_arguments_that_they_can_use(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        list(make_videos(pipe, [SampleRequest(PROMPTS[0], 0)], **arguments))


@pytest.mark.parametrize("number", [-1, 1.5, True, "0", 2**63])
def test_seeds_are_whole_numbers(pipe, number):
    with pytest.raises(ValueError, match="seed"):
        list(make_videos(pipe, [SampleRequest(PROMPTS[0], number)]))
    with pytest.raises(ValueError, match="seed"):
        sample_videos(pipe, PROMPTS[:1], 1, 1.0, first_seed=number, name=None)


def test_a_single_prompt_is_no_list_of_its_letters(pipe):
    with pytest.raises(ValueError, match="prompts 'a red disc moves left': a list of texts is needed"):
        sample_videos(pipe, PROMPTS[0], 1, 1.0, name=None)


def test_frames_that_the_tokenizers_base_cannot_decode_are_refused_before_denoising(pipe):
    own = like(pipe)
    own.vae.latent_step = 2  # as of CogVideoX
    with pytest.raises(ValueError, match=r"17 frames: 16x needs 1 \+ 32k; use 1 or 33"):
        call(own)
