import ast
import functools
import inspect
import json
import math
import textwrap

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils.source_code_parsing_utils import ReturnNameVisitor
from hypothesis import given
from hypothesis import strategies as st

from promag import ProMAGPipeline, ProMAGTransformer3DModel
from promag.diffusion.text import learn_vocabulary
from promag.pipelines import text_to_video
from promag.pipelines.inputs import NAMES, NEGATIVE_NAMES, unpack
from promag.pipelines.sampling import sample_videos
from tests.pipelines.conftest import call, like, seed
from tests.tiny_pipeline import PROMPTS, make_pipeline


def test_defaults_are_those_of_training_and_values_are_colours(pipe):
    frames = call(pipe)
    assert frames.shape == (1, 17, 16, 24, 3)
    assert frames.min() >= 0
    assert frames.max() <= 1


@pytest.mark.parametrize(("ratio", "frames"), [(4, 33), (16, 33), (4, 1), (16, 1)])
def test_budgets_and_lengths(pipe, ratio, frames):
    assert call(pipe, num_frames=frames, temporal_ratio=ratio).shape == (1, frames, 16, 24, 3)
    latents = call(pipe, num_frames=frames, temporal_ratio=ratio, output_type="latent")
    assert latents.shape == (1, 4, 1 + (frames - 1) // ratio, 2, 3)


def test_output_types_show_the_same_video(pipe):
    array, tensor, pictures = (call(pipe, output_type=t) for t in ("np", "pt", "pil"))
    assert np.allclose(array, tensor.permute(0, 1, 3, 4, 2).numpy(), atol=1e-6)
    assert np.abs(np.stack([np.asarray(p) for p in pictures[0]]) / 255 - array[0]).max() <= 0.5 / 255 + 1e-6


def test_the_same_generator_gives_the_same_video(pipe):
    assert np.array_equal(call(pipe), call(pipe))
    assert not np.array_equal(call(pipe), call(pipe, generator=seed(1)))


def test_a_batch_equals_its_prompts_one_by_one(pipe):
    batch = call(pipe, PROMPTS, generator=[seed(0), seed(1)])
    for i, prompt in enumerate(PROMPTS):
        assert np.allclose(batch[i], call(pipe, prompt, generator=seed(i))[0], atol=1e-4)


def test_a_generators_videos_do_not_depend_on_their_number(pipe):
    one, three = call(pipe), call(pipe, [*PROMPTS, PROMPTS[0]], num_videos_per_prompt=2)
    assert len(three) == 6
    assert np.allclose(three[0], one[0], atol=1e-4)
    assert np.allclose(call(pipe, num_videos_per_prompt=2), three[:2], atol=1e-4)
    assert np.abs(three[1] - three[0]).max() > 1e-3


def test_only_guidance_of_one_ignores_the_negative_prompt(pipe):
    alone = call(pipe, guidance_scale=1)
    assert np.array_equal(alone, call(pipe, guidance_scale=0))
    assert np.array_equal(alone, call(pipe, guidance_scale=1, negative_prompt="a blue square"))
    assert not np.array_equal(call(pipe), call(pipe, negative_prompt="a blue square"))
    assert not np.array_equal(call(pipe), alone)


def embeds(pipe, prompt=PROMPTS[0], **arguments):
    """Return the results of encode_prompt by the names of the call's arguments."""
    with torch.no_grad():
        return dict(zip((*NAMES, *NEGATIVE_NAMES), pipe.encode_prompt(prompt, **arguments), strict=True))


@pytest.mark.parametrize("which", ["pipe", "two_encoders"])
def test_prompt_embeds_with_their_masks_replace_the_prompt(which, request):
    pipe = request.getfixturevalue(which)
    encoded = embeds(pipe, PROMPTS, negative_prompt=["a", "b"])
    expected = call(pipe, PROMPTS, negative_prompt=["a", "b"], num_videos_per_prompt=2)
    assert np.array_equal(call(pipe, None, **encoded, num_videos_per_prompt=2), expected)
    positive = {name: encoded[name] for name in NAMES}
    assert np.array_equal(call(pipe, None, **positive), call(pipe, PROMPTS))
    tokens, pooled = positive["prompt_embeds"], positive["pooled_prompt_embeds"]
    tokens = tokens.double() if isinstance(tokens, torch.Tensor) else [part.double() for part in tokens]
    double = {"prompt_embeds": tokens, "pooled_prompt_embeds": None if pooled is None else pooled.double()}
    assert np.array_equal(call(pipe, None, **{**positive, **double}), call(pipe, PROMPTS))  # cast to the transformer's type
    assert np.array_equal(call(pipe, None, **positive, negative_prompt="a"), call(pipe, PROMPTS, negative_prompt="a"))
    negative = {name: encoded[name] for name in NEGATIVE_NAMES}
    assert np.array_equal(call(pipe, PROMPTS, **negative), call(pipe, PROMPTS, negative_prompt=["a", "b"]))


def test_times_are_shifted_for_the_tokens_of_the_tokenizers_spatial_ratio(pipe, monkeypatch):
    counts, set_flow_times = [], text_to_video.set_flow_times

    def spy(scheduler, steps, count, *rest):
        counts.append(count)
        return set_flow_times(scheduler, steps, count, *rest)

    monkeypatch.setattr(text_to_video, "set_flow_times", spy)
    monkeypatch.setattr(type(pipe.vae), "spatial_compression_ratio", 16)
    latents = call(pipe, height=32, width=48, num_inference_steps=1, output_type="latent")
    assert latents.shape[2:] == (2, 2, 3)
    assert counts == [2 * 2 * 3]


def test_return_names_of_encode_prompt_can_be_parsed():
    visitor = ReturnNameVisitor()
    visitor.visit(ast.parse(textwrap.dedent(inspect.getsource(ProMAGPipeline.encode_prompt))))
    assert tuple(visitor.return_names) == (*NAMES, *NEGATIVE_NAMES)


def test_encode_prompt_repeats_rows_for_each_video_and_skips_unneeded_guidance(pipe):
    encoded = embeds(pipe, PROMPTS, num_videos_per_prompt=3, do_classifier_free_guidance=False, max_sequence_length=8)
    assert encoded["prompt_embeds"].shape == (6, 8, 16)
    assert encoded["prompt_attention_mask"].shape == (6, 8)
    assert torch.equal(encoded["pooled_prompt_embeds"][2], encoded["pooled_prompt_embeds"][0])
    assert all(encoded[name] is None for name in NEGATIVE_NAMES)


def test_a_pipeline_without_text_encoders_takes_embeds(pipe):
    bare = like(pipe, text_encoder=None, tokenizer=None)
    encoded = embeds(pipe)
    assert np.array_equal(call(bare, None, **encoded), call(pipe))
    with pytest.raises(ValueError, match="no text encoder is loaded: give prompt_embeds"):
        call(bare, None, **{name: encoded[name] for name in NAMES})


def test_text_can_be_encoded_by_a_pipeline_of_text_encoders_alone(pipe):
    words = like(pipe, transformer=None, vae=None, scheduler=None)
    assert torch.equal(embeds(words)["negative_prompt_embeds"], embeds(pipe)["negative_prompt_embeds"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_attention_mask": None}, "prompt_embeds without prompt_attention_mask: both are needed"),
        ({"negative_prompt_attention_mask": None}, "negative_prompt_embeds without negative_prompt_attention_mask"),
        ({"prompt_attention_mask": torch.ones(1, 7)}, r"of shapes \[\(1, 7\)\]: \[\(1, 10\)\] are needed"),
        ({"pooled_prompt_embeds": torch.ones(2, 16)}, "pooled_prompt_embeds of 2 prompts: prompt_embeds are of 1"),
        (
            {"prompt_embeds": torch.ones(1, 10, 16).long()},
            r"prompt_embeds of shape \(1, 10, 16\), int64: embeddings are floating",
        ),
        (
            {"prompt_embeds": torch.ones(1, 10, 17), "prompt_attention_mask": torch.ones(1, 10)},
            r"prompt_embeds of widths \[17\]: this transformer needs \[16\]",
        ),
        ({"pooled_prompt_embeds": torch.ones(1, 17)}, "pooled_prompt_embeds of width 17: this transformer needs 16"),
        (
            {
                "negative_prompt_embeds": torch.ones(2, 10, 16),
                "negative_prompt_attention_mask": torch.ones(2, 10),
                "negative_pooled_prompt_embeds": torch.ones(2, 16),
            },
            "negative prompts: 2 for 1 videos; give as many as prompts",
        ),
        ({"prompt": "a disc"}, "prompt and prompt_embeds: exactly one"),
        ({"negative_prompt": "a disc"}, "negative_prompt and negative_prompt_embeds: at most one"),
    ],
)
def test_embeds_that_do_not_fit_are_named(pipe, changes, message):
    with pytest.raises(ValueError, match=message):
        call(pipe, **{"prompt": None, **embeds(pipe), **changes})


def test_several_videos_for_a_prompt(pipe):
    frames = call(pipe, PROMPTS, num_videos_per_prompt=2, generator=[seed(n) for n in range(4)])
    assert np.allclose(frames[3], call(pipe, PROMPTS[1], generator=seed(3))[0], atol=1e-4)


def test_given_latents_are_the_initial_noise(pipe):
    noise = torch.randn(1, 4, 2, 2, 3, generator=seed())
    assert np.array_equal(call(pipe, latents=noise, generator=None), call(pipe))


@pytest.mark.parametrize("strength", [0.5, 0.75])
def test_refining_runs_the_last_steps_from_noised_latents(pipe, strength):
    """It equals a whole sampling whose latents are replaced at that time."""
    clean, noise = torch.randn(2, 1, 4, 2, 2, 3, generator=seed(5))
    arguments = {"num_inference_steps": 4, "output_type": "latent"}
    given = {**arguments, "latents": clean, "denoise_strength": strength, "generator": seed(6)}
    steps = []
    refined = call(pipe, **given, callback_on_step_end=lambda p, i, t, x: steps.append(float(t)) or {})
    noise = torch.randn(1, 4, 2, 2, 3, generator=seed(6))
    count = round(4 * strength)
    assert len(steps) == count

    def exchange(p, step, time, tensors):
        if step != 3 - count:
            return {}
        level = p.scheduler.sigmas[4 - count]
        assert float(level) * 1000 == pytest.approx(steps[0])
        return {"latents": (1 - level) * (clean - 0.5) / 0.5 + level * noise}  # the mean and deviation of these latents

    assert torch.allclose(refined, call(pipe, **arguments, callback_on_step_end=exchange), atol=1e-5)
    assert torch.allclose(call(pipe, **{**given, "denoise_strength": 0.0}), clean, atol=1e-6)


def test_callbacks_see_every_step_may_change_latents_and_stop(pipe):
    seen = []

    def watch(p, step, time, tensors):
        seen.append((step, float(time), tensors["latents"].shape))
        return {"latents": torch.zeros_like(tensors["latents"])}

    latents = call(pipe, callback_on_step_end=watch, output_type="latent")
    assert [step for step, _, _ in seen] == [0, 1]
    assert seen[0][1] == 1000
    assert torch.equal(latents, torch.full_like(latents, 0.5))  # zeros, denormalised

    def stop(p, step, time, tensors):
        p._interrupt = True
        seen.append(step)
        return {}

    seen.clear()
    call(pipe, callback_on_step_end=stop, num_inference_steps=5)
    assert seen == [0]


def test_callbacks_may_change_prompts_and_guidance_while_sampling(pipe):
    assert pipe._callback_tensor_inputs == ["latents", *NAMES, *NEGATIVE_NAMES]
    other = embeds(pipe, PROMPTS[1], negative_prompt="a")

    def swap(p, step, time, tensors):
        assert list(tensors) == pipe._callback_tensor_inputs
        assert float(p.current_timestep) == float(time)
        return {**tensors, **other} if step == 0 else tensors

    arguments = {"num_inference_steps": 2, "callback_on_step_end_tensor_inputs": pipe._callback_tensor_inputs}
    swapped = call(pipe, callback_on_step_end=swap, **arguments)
    assert np.abs(swapped - call(pipe)).max() > 1e-3
    assert pipe.current_timestep is None

    # The second step uses the other prompt: from the same latents it equals that prompt's own step.
    first, second = [], []
    call(pipe, callback_on_step_end=lambda p, i, t, x: first.append(x["latents"]), output_type="latent")
    resume = lambda p, i, t, x: second.append(x["latents"]) or ({"latents": first[0]} if i == 0 else {})  # noqa: E731
    expected = call(pipe, PROMPTS[1], negative_prompt="a", callback_on_step_end=resume)
    assert np.allclose(swapped, expected, atol=1e-5)

    def unguide(p, step, time, tensors):
        p._guidance_scale = 1.0
        return {}

    off = call(pipe, callback_on_step_end=unguide, output_type="latent")
    assert pipe.num_timesteps == 2
    assert not torch.allclose(off, call(pipe, output_type="latent"), atol=1e-3)

    def raise_guidance(p, step, time, tensors):
        p._guidance_scale = 2.0
        return {}

    with pytest.raises(ValueError, match="guidance_scale was raised above 1 while sampling"):
        call(pipe, guidance_scale=1, callback_on_step_end=raise_guidance)


def test_callback_objects_of_diffusers_choose_their_tensors(pipe):
    class Halve(PipelineCallback):
        tensor_inputs = ["latents"]  # noqa: RUF012

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            return {"latents": callback_kwargs["latents"] / 2}

    halve = lambda p, i, t, tensors: {"latents": tensors["latents"] / 2}  # noqa: E731
    expected = call(pipe, callback_on_step_end=halve)
    one = Halve(cutoff_step_ratio=None, cutoff_step_index=1)
    assert np.array_equal(call(pipe, callback_on_step_end=one), expected)
    twice = MultiPipelineCallbacks([one, one])
    assert np.abs(call(pipe, callback_on_step_end=twice) - expected).max() > 1e-3


def test_the_progress_bar_counts_steps(pipe, capsys):
    shown = like(pipe)
    shown.set_progress_bar_config(disable=False)
    call(shown, num_inference_steps=3)
    assert "3/3" in capsys.readouterr().err


def test_a_tuple_holds_the_frames(pipe):
    (frames,) = pipe(PROMPTS[0], num_inference_steps=2, generator=seed(), return_dict=False)
    assert np.array_equal(frames, call(pipe))


@pytest.fixture(scope="module")
def two_encoders(pipe):
    """The same pipeline with a second text encoder, a T5 of another width."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(3)
    vocabulary = learn_vocabulary(PROMPTS, 300, max_length=12)
    sizes = {"d_model": 24, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    t5 = T5EncoderModel(T5Config(vocab_size=len(vocabulary), **sizes)).eval()
    transformer = ProMAGTransformer3DModel.from_config({**pipe.transformer.config, "text_dim": [16, 24]})
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return like(pipe, transformer=transformer, tokenizer_2=vocabulary, text_encoder_2=t5)


def test_a_second_text_encoder_is_saved_loaded_and_used(two_encoders, tmp_path):
    two_encoders.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["text_encoder_2"] == ["transformers", "T5EncoderModel"]
    assert index["text_encoder_3"] == [None, None]
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    expected = call(two_encoders)
    assert np.array_equal(call(loaded), expected)
    with torch.no_grad():
        for parameter in loaded.text_encoder_2.parameters():
            parameter.zero_()
    assert np.abs(call(loaded) - expected).max() > 1e-3


def test_each_text_encoder_may_have_its_own_length(two_encoders):
    short = call(two_encoders, max_sequence_length=[None, 8])
    assert np.allclose(short, call(two_encoders), atol=1e-4)  # the prompt is shorter still
    assert np.allclose(call(two_encoders, max_sequence_length=10), call(two_encoders), atol=1e-4)
    with pytest.raises(ValueError, match=r"max_sequence_length \[8, 8, 8\]: give one number, or one for each of 2"):
        call(two_encoders, max_sequence_length=[8, 8, 8])
    with pytest.raises(ValueError, match="11 text tokens: this encoder takes 1 to 10"):
        call(two_encoders, max_sequence_length=11)


def test_the_default_negative_prompt_is_the_dropped_caption_of_training(two_encoders, tmp_path):
    """The null embedding in the cache, and that of the jointly trained encoder, are the pipeline's default."""
    from promag.diffusion.latent_cache import LatentFingerprint, write_latents
    from promag.diffusion.text_cache import CaptionEncoder, EmbeddingCache, TextFingerprint, write_embeddings

    class Clips:
        def fixed(self, index):
            return {"video": torch.full((3, 17, 8, 8), float(index)), "caption": PROMPTS[index], "fps": 8.0}

    pair = two_encoders.tokenizer_2, two_encoders.text_encoder_2
    latents = LatentFingerprint("tokenizer", "clips", 16, 17, 8, 8, "float32", 2)
    write_latents({tmp_path / "z": latents}, 2, Clips(), lambda x, ratios: [x[:, :, :2, ::8, ::8]])
    write_embeddings(tmp_path / "t", TextFingerprint("e", "clips", 12, "float32", 2), tmp_path / "z", lambda: pair)
    cache = EmbeddingCache(tmp_path / "t", 2)
    text = CaptionEncoder([None, cache], two_encoders.tokenizer, two_encoders.text_encoder)
    batch = {"caption": PROMPTS[:1], **{key: value[None] for key, value in cache.row(0).items()}}
    with torch.no_grad():
        kept, dropped = text(batch), text(batch, [True])
    given = dict(zip((*NAMES, *NEGATIVE_NAMES), (*unpack(kept), *unpack(dropped)), strict=True))
    from_training = call(two_encoders, None, **given)
    assert np.allclose(from_training, call(two_encoders), atol=1e-4)
    assert not np.allclose(from_training, call(two_encoders, negative_prompt="a"), atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 20}, r"20 frames: 16x needs 1 \+ 16k; use 17 or 33"),
        ({"height": 20}, "height 20: needs a multiple of 8; use 16 or 24"),
        ({"temporal_ratio": 8}, "temporal_ratio 8: the transformer was trained at 4x, 16x"),
        ({"temporal_ratio": 32}, "temporal ratio 32: this tokenizer has 4x, 8x, 16x"),
        ({"num_inference_steps": 0}, "num_inference_steps 0"),
        ({"output_type": "gif"}, "output_type 'gif': use one of np, pil, pt, latent"),
        ({"prompt": None}, "exactly one of them"),
        ({"prompt": 5}, "prompt 5"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt: 2 texts"),
        ({"generator": [seed(0), seed(1)]}, "generator: 2 given"),
        ({"latents": torch.zeros(1, 4, 3, 2, 3)}, r"\(1, 4, 2, 2, 3\) is needed"),
        ({"denoise_strength": 1.5}, "denoise_strength 1.5: 0 to 1"),
        ({"denoise_strength": 0.5}, "denoise_strength 0.5: needs the latents to start from"),
        ({"fps": -1.0}, "fps -1.0"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"\['noise'\]: a list of these is legal: latents, prompt_embeds"),
    ],
)
def test_mistakes_are_named(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        call(pipe, **arguments)


COUNTS = (
    "height",
    "width",
    "num_frames",
    "temporal_ratio",
    "num_inference_steps",
    "num_videos_per_prompt",
    "max_sequence_length",
)
NO_COUNT = st.sampled_from([0, -1, 1.5, 17.9, 16.0, math.nan, math.inf, True, "16", b"1", {}]) | st.integers(max_value=0)
NO_NUMBER = st.sampled_from([math.nan, math.inf, -math.inf, True, "4", [4.0], {}])


one_pipeline = functools.cache(make_pipeline)  # hypothesis takes no fixtures of a test


@given(st.sampled_from(COUNTS), NO_COUNT)
def test_counts_must_be_whole_numbers_above_zero(name, value):
    with pytest.raises(ValueError, match=f"{name} .*: a whole number of at least 1 is needed"):
        call(one_pipeline(), **{name: value})


@given(st.sampled_from(["fps", "guidance_scale", "denoise_strength"]), NO_NUMBER)
def test_a_number_that_is_not_finite_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} .*: a finite number is needed"):
        call(one_pipeline(), **{name: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fps": 0}, "fps 0: must be above 0"),
        ({"fps": 0.0}, "fps 0.0: must be above 0"),
        ({"generator": 42}, "generator 42: a torch.Generator"),
        ({"generator": [seed(0), 1]}, "generator"),
        ({"latents": torch.full((1, 4, 2, 2, 3), math.nan)}, "latents: all values must be finite"),
        ({"latents": np.zeros((1, 4, 2, 2, 3))}, "latents of type ndarray"),
        ({"max_sequence_length": [0]}, "max_sequence_length 0"),
    ],
)
def test_zeros_and_other_types_are_named(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        call(pipe, **arguments)


def test_numbers_of_numpy_are_accepted(pipe):
    expected = call(pipe, num_frames=33, guidance_scale=2.0, fps=8.0)
    result = call(pipe, num_frames=np.int64(33), guidance_scale=np.float32(2), fps=np.int32(8), num_inference_steps=np.int16(2))
    assert np.array_equal(result, expected)


def test_sampled_videos_do_not_depend_on_their_number(pipe):
    prompts = [PROMPTS[0]] * 9
    whole = sample_videos(pipe, prompts, steps=2, guidance=2.0)
    last = sample_videos(pipe, prompts[8:], steps=2, guidance=2.0, first_seed=8)
    assert len(whole) == 9
    assert np.abs(whole[8].astype(int) - last[0].astype(int)).max() <= 1  # a batch sums floats in another order
    assert np.abs(whole[8].astype(int) - whole[0].astype(int)).max() > 1


def test_a_prompt_that_is_too_long_is_named_once_with_its_lost_end(pipe, caplog):
    for _ in range(2):
        call(pipe, ["a red disc moves left and a blue square grows", "a red disc"], max_sequence_length=6)
    (record,) = caplog.records
    assert record.getMessage() == (
        "prompt 'a red disc moves left and a blue square grows' is longer than the text encoder's 6 tokens: "
        "'left and a blue square grows' is cut off"
    )
    kept = call(pipe, "a red disc moves", max_sequence_length=6)
    assert np.array_equal(kept, call(pipe, "a red disc moves left and a blue square grows", max_sequence_length=6))
