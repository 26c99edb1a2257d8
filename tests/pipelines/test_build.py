"""From clips of several buckets to a pipeline: a cache for each bucket and one trained model."""

import dataclasses
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from promag import ProMAGPipeline
from promag.diffusion.config import DiffusionConfig, TextEncoderConfig
from promag.diffusion.few_steps import FewSteps
from promag.diffusion.text import learn_vocabulary, small_clip
from promag.diffusion.train import open_text
from promag.pipelines.build import cache, train_pipeline
from promag.tokenizer.checkpoint import find_damage
from promag.training.config import UserError, build, load_yaml
from tests.conftest import make_tokenizer
from tests.scripts.test_scripts import encoder, write_t5

BUCKETS = ((17, 32, 32, None), (17, 32, 48, 1), (33, 32, 32, 2))


@pytest.fixture
def config(tmp_path) -> DiffusionConfig:
    write_t5(tmp_path / "t5")
    make_tokenizer(settle=0.05).save_pretrained(tmp_path / "tokenizer")
    values = load_yaml("configs/diffusion/tiny.yaml")
    buckets = [dict(zip(("frames", "height", "width", "batch_size"), b, strict=True)) for b in BUCKETS]
    values["data"] |= {
        "synthetic_clips": 3,
        "validation_clips": 2,
        "frames": 17,
        "size": 32,
        "buckets": buckets,
        "shard_size": 2,
    }
    values["data"] |= {"cache": str(tmp_path / "latents")}
    values["model"] |= {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
    values["text"] |= {"encoders": [encoder(tmp_path / "t5"), encoder("small")], "width": 16, "layers": 1, "heads": 2}
    values["optimization"] |= {"steps": 3, "batch_size": 1, "warmup": 1}
    values["run"] |= {"log_every": 1, "validate_every": 3, "save_every": 3, "workers": 0, "trackers": []}
    values["samples"] |= {"prompts": ["a red disc"], "every": 3, "steps": 1}
    values |= {"output_dir": str(tmp_path / "run"), "tokenizer": str(tmp_path / "tokenizer"), "precision": "fp32"}
    return build(DiffusionConfig, values, "test")


def test_clips_of_several_buckets_are_cached_apart_and_trained_together(config, tmp_path, capsys):
    cached = cache(config, make_tokenizer(settle=0.05))
    assert "17x32x32: 3 clips, 17x32x48: 3 clips, 33x32x32: 3 clips" in capsys.readouterr().out
    for split, count in (("train", 3), ("eval", 2)):
        assert [str(part.bucket) for part in cached[split]] == ["17x32x32", "17x32x48", "33x32x32"]
        for part, latent in zip(cached[split], ((2, 4, 4), (2, 4, 6), (3, 4, 4)), strict=True):
            assert [folder.name for folder in part.latents] == [f"{split}-16x-{part.bucket}"]
            assert {n: folder.name for n, folder in part.texts.items()} == {1: f"{split}-text-1-{part.bucket}"}
            shards = sorted(part.latents[0].glob("shard-*"))
            shapes = [safe_open(shard, "pt").get_slice("latents").get_shape() for shard in shards]
            assert sum(shape[0] for shape in shapes) == count
            assert all(tuple(shape[2:]) == latent for shape in shapes)
    folder = train_pipeline(config)
    pipe = ProMAGPipeline.from_pretrained(folder)
    assert (pipe.config["num_frames"], pipe.config["height"], pipe.config["width"]) == (17, 32, 32)
    for size in ({}, {"width": 48}, {"num_frames": 33}):
        pipe.set_progress_bar_config(disable=True)
        frames = pipe("a red disc", num_inference_steps=1, generator=torch.Generator().manual_seed(0), **size).frames
        assert frames.shape[1:4] == (size.get("num_frames", 17), 32, size.get("width", 32))
    assert "cached" not in capsys.readouterr().out  # training used the existing cache
    os.rename(tmp_path / "latents", tmp_path / "moved")
    data = dataclasses.replace(config.data, cache=str(tmp_path / "moved"))
    assert train_pipeline(dataclasses.replace(config, data=data)) == folder
    assert "cached" not in capsys.readouterr().out
    os.rename(tmp_path / "moved", tmp_path / "latents")
    whole = {path: path.read_bytes() for path in folder.rglob("*.safetensors")}
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    for damage in (lambda: weights.write_bytes(whole[weights][:-1]), weights.unlink, lambda: shutil.rmtree(folder / "vae")):
        damage()
        assert find_damage(folder) is not None
        assert train_pipeline(config) == folder  # from its last checkpoint
        assert {path: path.read_bytes() for path in folder.rglob("*.safetensors")} == whole


def test_a_dual_latents_key_frames_are_denoised_ahead_in_training_and_sampling(config, tmp_path):
    """2 + resume + 1 steps equal 3; the pipeline keeps the lead, and its video depends on it."""
    with pytest.raises(UserError, match=r"base_ahead 0\.3: the 16x latents of tokenizer .* have no residual channels; grow"):
        train_pipeline(dataclasses.replace(config, base_ahead=0.3))
    make_tokenizer(settle=0.05, latent="dual").save_pretrained(tmp_path / "dual")
    data = dataclasses.replace(config.data, cache=str(tmp_path / "dual-latents"), buckets=None)
    text = dataclasses.replace(config.text, encoders=config.text.encoders[1:])
    condition = dataclasses.replace(config.condition, probability=0.5)
    leading = dataclasses.replace(
        config, base_ahead=0.3, tokenizer=str(tmp_path / "dual"), data=data, text=text, condition=condition
    )
    folder = train_pipeline(leading)
    for part in (2, None):
        run = dataclasses.replace(leading.run, stop_after=part, save_every=1)
        resumed = train_pipeline(dataclasses.replace(leading, run=run, output_dir=str(tmp_path / "parts")))
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (resumed / weights).read_bytes() == (folder / weights).read_bytes()
    pipe = ProMAGPipeline.from_pretrained(folder)
    assert pipe.transformer.config["base_ahead"] == 0.3
    assert pipe.transformer.residual_time_embed.linear_2.weight.any()
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(1))
    for given in ({}, {"image": image}):
        call = {"num_inference_steps": 4, "output_type": "latent", **given}
        latents = pipe("a red disc", generator=torch.Generator().manual_seed(0), **call).frames
        assert latents.shape == (1, 8, 2, 4, 4)
    with pytest.raises(UserError, match=r"started with other settings .base_ahead is 0\.3 there, 0\.2 now"):
        train_pipeline(dataclasses.replace(leading, base_ahead=0.2))


def test_a_distilled_pipeline_samples_as_its_student_learned_and_one_trained_further_does_not(config, tmp_path):
    data = dataclasses.replace(config.data, buckets=None)
    text = dataclasses.replace(config.text, encoders=config.text.encoders[1:])
    samples = dataclasses.replace(config.samples, steps=None)
    config = dataclasses.replace(config, data=data, text=text, samples=samples)
    config = dataclasses.replace(config, budgets=tuple(dataclasses.replace(config.budgets[0], ratio=r) for r in (16, 8)))

    def train(init, name, **change):
        new = {"init": init and str(init), "output_dir": str(tmp_path / name), "model": None if init else config.model}
        folder = train_pipeline(dataclasses.replace(config, **new, **change))
        pipe = ProMAGPipeline.from_pretrained(folder)
        return folder, [pipe.config[name] for name in ("num_inference_steps", "guidance_scale", "temporal_ratio")], pipe

    whole, usual, _ = train(None, "whole")
    few = FewSteps(steps=2, teacher_steps=4)
    distilled, own, pipe = train(whole, "few", few_steps=few, budgets=config.budgets[1:])
    _, again, _ = train(distilled, "again", budgets=config.budgets[1:])
    assert (usual, own, again) == ([30, 4.0, 16], [2, 1.0, 8], [30, 4.0, 8])
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="temporal_ratio 16: the transformer was trained at 8x"):
        pipe("a red disc", temporal_ratio=16)
    calls = []
    pipe.transformer.register_forward_pre_hook(lambda *inputs: calls.append(len(inputs[2]["hidden_states"])), with_kwargs=True)
    pipe("a red disc")
    assert calls == [1, 1]


def test_a_published_small_text_encoder_is_trained_in_float32(config, tmp_path):
    vocabulary = learn_vocabulary(["a red disc"], 300, 10)
    small_clip(vocabulary, 16, 1, 2).bfloat16().save_pretrained(tmp_path / "init" / "text_encoder")
    vocabulary.save_pretrained(tmp_path / "init" / "tokenizer")
    small = dataclasses.replace(config.text, encoders=(TextEncoderConfig(max_length=10),))
    further = dataclasses.replace(config, init=str(tmp_path / "init"), model=None, text=small)
    text = open_text(further, [SimpleNamespace(texts=(), captions=lambda: iter(["a red disc"]))])
    assert {parameter.dtype for parameter in text.parameters()} == {torch.float32}


def test_sizes_are_checked_at_the_tokenizers_spatial_ratio(config, monkeypatch):
    vae = make_tokenizer()
    monkeypatch.setattr(type(vae), "spatial_compression_ratio", 16)
    with pytest.raises(UserError, match=r"tokenizer .*: latent of 2x2x3 .* not divisible by patch \(1, 2, 2\)"):
        cache(config, vae)


def test_frames_are_checked_at_the_steps_in_which_the_tokenizers_base_decodes(config):
    vae = make_tokenizer()
    vae.latent_step = 2  # as of CogVideoX
    with pytest.raises(UserError, match=r"tokenizer .*: 17 frames: 16x needs 1 \+ 32k; use 1 or 33"):
        cache(config, vae)


def test_a_frozen_text_encoder_of_init_is_not_trained_as_the_small_one(config, tmp_path):
    small = dataclasses.replace(config.text, encoders=config.text.encoders[1:])
    further = dataclasses.replace(config, init=str(tmp_path / "t5"), model=None, text=small)
    with pytest.raises(UserError, match="its text encoder 1, a T5EncoderModel, was not trained with the transformer"):
        open_text(further, [SimpleNamespace(texts=())])


def test_a_run_with_complete_caches_loads_no_text_encoder(config, tmp_path):
    """The encoder's weights are garbage of the same size and time, which is not noticed until their time changes."""
    before = cache(config, make_tokenizer(settle=0.05))
    weights = tmp_path / "t5" / "model.safetensors"
    stat, whole = weights.stat(), weights.read_bytes()
    weights.write_bytes(bytes(stat.st_size))
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert cache(config, make_tokenizer(settle=0.05)) == before
    os.utime(weights)
    with pytest.raises(Exception, match="header"):
        cache(config, make_tokenizer(settle=0.05))
    weights.write_bytes(whole)  # the same encoder, newly written
    assert cache(config, make_tokenizer(settle=0.05)) == before


def test_another_text_encoder_in_the_same_folder_is_still_refused(config, tmp_path):
    cache(config, make_tokenizer(settle=0.05))
    other = write_t5(tmp_path / "t5")
    with torch.no_grad():
        other.shared.weight.add_(1)
    other.save_pretrained(tmp_path / "t5")
    with pytest.raises(UserError, match="was made from another text encoder"):
        cache(config, make_tokenizer(settle=0.05))
