"""What a pipeline knows goes with its parts, and a saved folder says how to load it."""

import json

import diffusers
import numpy as np
import pytest

from promag import ProMAGPipeline, ProMAGTransformer3DModel
from promag.pipelines.inputs import DEFAULTS
from promag.pipelines.sampling import sample_videos
from tests.pipelines.conftest import call, like
from tests.tiny_pipeline import PROMPTS, SIZES, make_pipeline

USUAL = {**SIZES, "num_inference_steps": 30, "guidance_scale": 4.0}
OTHER = {"num_frames": 33, "fps": 12.5, "temporal_ratio": 4, "num_inference_steps": 3, "guidance_scale": 0.0}
OTHER = {**USUAL, **OTHER}


def defaults(pipe):
    return {name: pipe.config[name] for name in DEFAULTS}


def test_a_pipeline_made_of_anothers_components_samples_what_that_one_samples():
    pipe = make_pipeline(**OTHER)
    again = ProMAGPipeline(**pipe.components)
    again.set_progress_bar_config(disable=True)
    assert defaults(again) == OTHER
    assert np.array_equal(call(again), call(pipe))
    assert call(again).shape == (1, 33, 16, 24, 3)
    assert defaults(ProMAGPipeline.from_pipe(pipe)) == OTHER
    assert defaults(ProMAGPipeline.from_pipe(pipe, fps=24.0)) == {**OTHER, "fps": 24.0}


def test_pipelines_that_share_a_transformer_keep_their_own_defaults():
    one = make_pipeline()
    two = ProMAGPipeline(**one.components, **{name: OTHER[name] for name in ("fps", "num_frames")})
    assert defaults(ProMAGPipeline(**one.components)) == USUAL
    assert defaults(ProMAGPipeline(**two.components)) == {**USUAL, "fps": 12.5, "num_frames": 33}
    assert defaults(one) == USUAL


def test_a_saved_transformer_carries_the_defaults_and_an_old_folder_loads_as_before(tmp_path):
    pipe = make_pipeline(**OTHER)
    pipe.save_pretrained(tmp_path)
    alone = ProMAGTransformer3DModel.from_pretrained(tmp_path, subfolder="transformer")
    assert defaults(ProMAGPipeline(**{**pipe.components, "transformer": alone})) == OTHER
    path = tmp_path / "transformer" / "config.json"
    config = json.loads(path.read_text())
    del config["sample_defaults"]  # as earlier versions saved it
    path.write_text(json.dumps(config))
    old = ProMAGPipeline.from_pretrained(tmp_path)
    assert defaults(old) == defaults(ProMAGPipeline(**old.components)) == OTHER


def test_a_call_takes_the_pipelines_own_steps_and_guidance(tmp_path):
    make_pipeline(num_inference_steps=3, guidance_scale=1.0).save_pretrained(tmp_path)
    assert "in 3 steps without guidance." in (tmp_path / "README.md").read_text()
    few = ProMAGPipeline.from_pretrained(tmp_path)
    few.set_progress_bar_config(disable=True)
    own = call(few, num_inference_steps=None)
    assert np.array_equal(own, call(few, num_inference_steps=3, guidance_scale=1.0))
    (video,) = sample_videos(few, PROMPTS[:1], precision="fp32", name=None)
    assert np.array_equal((own[0] * 255).round().astype(np.uint8), video)
    path = tmp_path / "model_index.json"
    index = json.loads(path.read_text())
    del index["num_inference_steps"], index["guidance_scale"]  # as earlier versions saved it
    path.write_text(json.dumps(index))
    config = tmp_path / "transformer" / "config.json"
    values = json.loads(config.read_text())
    for name in ("num_inference_steps", "guidance_scale"):
        del values["sample_defaults"][name]
    config.write_text(json.dumps(values))
    assert defaults(ProMAGPipeline.from_pretrained(tmp_path)) == USUAL


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_frames", 0, "num_frames 0: a whole number of at least 1"),
        ("height", 16.5, "height 16.5: a whole"),
        ("fps", float("nan"), "fps nan: a finite number"),
        ("fps", 0, "fps 0: must be above 0"),
        ("num_inference_steps", 0, "num_inference_steps 0: a whole number of at least 1"),
        ("guidance_scale", float("inf"), "guidance_scale inf: a finite number"),
        ("scheduler", 5, "5 is no SchedulerMixin"),
        ("vae", "vae", "'vae' is no Module"),
    ],
)
def test_illegal_defaults_and_parts_are_refused_when_a_pipeline_is_made(pipe, name, value, message):
    with pytest.raises(ValueError, match=message):
        ProMAGPipeline(**{**pipe.components, **SIZES, name: value})


@pytest.mark.parametrize("part", ["transformer", "vae", "scheduler"])
def test_a_call_names_the_part_that_a_pipeline_was_made_without(pipe, part):
    with pytest.raises(ValueError, match=f"{part}: this pipeline was made without one"):
        call(like(pipe, **{part: None}))


def test_a_saved_folder_says_what_diffusers_alone_would_not(pipe, tmp_path, monkeypatch):
    pipe.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert (
        'import promag\nfrom diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained("PATH/OF/' in card
    )
    with monkeypatch.context() as alone:  # as where `import promag` did not name its classes to diffusers
        alone.delitem(diffusers._class_to_module, "ProMAGPipeline")
        alone.delattr(diffusers, "ProMAGPipeline", raising=False)
        with pytest.raises(AttributeError) as refused:
            diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert str(refused.value) == "module diffusers has no attribute ProMAGPipeline"
    assert str(refused.value) in card
    (tmp_path / "README.md").write_text("mine")
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
