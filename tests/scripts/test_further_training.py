"""Training a pipeline further: all of it, or adapters that pipelines load and unload."""

import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from promag import ProMAGPipeline
from promag.scripts import train_diffusion
from promag.training.config import UserError
from tests.scripts.conftest import LOOP, overrides
from tests.scripts.test_scripts import RUN, diffusion_arguments, encoder

RANK, TARGETS = 2, ["to_q", "to_v", "ff.net.2"]
# These are the demo's clips and settings, so its pipeline has the statistics of the latents.
TEXT = {"encoders": [encoder("small", 16)]}


@pytest.fixture(scope="module")
def base(demo_run):
    return demo_run / "video-16x" / "pipeline"


def arguments(demo_run, folder, base, lora, **change):
    loop = {**LOOP, "steps": 3, "muon_learning_rate": None, "learning_rate": 1.0}
    change = {"init": str(base), "model": None, "lora": lora, "optimization": loop, "text": TEXT, **change}
    return diffusion_arguments(folder, demo_run / "tokenizer-run" / "tokenizer", **change)


@pytest.fixture(scope="module")
def lora(demo_run, base, tmp_path_factory):
    run = tmp_path_factory.mktemp("lora")
    train_diffusion.main(arguments(demo_run, run, base, {"rank": RANK, "alpha": 4, "targets": TARGETS}))
    return run


def load(folder):
    pipe = ProMAGPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sampled(pipe, **options):
    generator = torch.Generator().manual_seed(0)
    return pipe("a red disc grows", num_inference_steps=2, generator=generator, output_type="latent", **options).frames


def test_adapters_alone_are_trained_and_saved(lora, base):
    saved = load_file(lora / "lora" / "pytorch_lora_weights.safetensors")
    assert {name.split(".lora_")[0].split(".", 3)[-1] for name in saved} == {
        "attn1.to_q",
        "attn1.to_v",
        "attn2.to_q",
        "attn2.to_v",
        "ff.net.2",
    }
    assert {min(tensor.shape) for tensor in saved.values()} == {RANK}
    checkpoint = load_file(next((lora / "16x").glob("step-*")) / "weights.safetensors")
    assert len(checkpoint) == len(saved)
    assert all("lora" in name for name in checkpoint)
    assert not (lora / "pipeline").exists()


def test_a_pipeline_loads_weights_and_unloads_adapters(lora, base, demo_run):
    pipe = load(base)
    before, weights = sampled(pipe), {n: p.clone() for n, p in pipe.transformer.state_dict().items()}
    pipe.load_lora_weights(lora / "lora")
    adapted = sampled(pipe)
    assert not torch.allclose(adapted, before, atol=1e-4)
    assert torch.equal(sampled(pipe, attention_kwargs={"scale": 0.0}), before)
    assert torch.allclose(sampled(pipe, attention_kwargs={"scale": 1.0}), adapted, atol=1e-6)
    pipe.fuse_lora()
    assert torch.allclose(sampled(pipe), adapted, atol=1e-4)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    after = pipe.transformer.state_dict()
    pipe = load(base)
    pipe.load_lora_weights(lora / "lora", adapter_name="mine")
    pipe.set_adapters("mine", 0.0)
    assert torch.equal(sampled(pipe), before)
    pipe.unload_lora_weights()
    assert torch.equal(sampled(pipe), before)
    assert weights.keys() == after.keys()
    assert all(torch.equal(weights[name], value) for name, value in pipe.transformer.state_dict().items())


def test_saved_adapters_equal_the_trained_ones(lora, base, demo_run):
    """The averaged adapters of the last checkpoint, added to the base by hand, equal those of load_lora_weights."""
    from promag.diffusion.finetune import Lora, add_lora
    from promag.training.run import checkpoints, load_checkpoint

    pipe = load(base)
    add_lora(pipe.transformer, Lora(RANK, 4, tuple(TARGETS)))
    averaged = load_checkpoint(checkpoints(lora / "16x")[-1])[0]["ema"]
    own = dict(pipe.transformer.named_parameters())
    with torch.no_grad():
        for name, value in averaged.items():
            own[name.removeprefix("transformer.")].copy_(value)
    other = load(base)
    other.load_lora_weights(lora / "lora")
    assert torch.equal(sampled(pipe), sampled(other))


def test_interrupted_adapters_are_bit_for_bit_the_same(lora, base, demo_run, tmp_path):
    settings = {"rank": RANK, "alpha": 4, "targets": TARGETS}
    for _ in range(2):
        train_diffusion.main(arguments(demo_run, tmp_path, base, settings, run={**RUN, "stop_after": 2}))
    whole, parts = (load_file(run / "lora" / "pytorch_lora_weights.safetensors") for run in (lora, tmp_path))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_all_weights_are_trained_further_from_a_pipeline(demo_run, base, tmp_path, capsys):
    tiny = {**LOOP, "muon_learning_rate": None, "learning_rate": 1e-9}
    train_diffusion.main(arguments(demo_run, tmp_path, base, None, optimization=tiny, condition={"probability": 0.5}))
    assert f"pipeline: {tmp_path / 'pipeline'}" in capsys.readouterr().out
    before, after = load(base), load(tmp_path / "pipeline")
    assert after.transformer.config["latents_mean"] == before.transformer.config["latents_mean"]
    assert np.allclose(sampled(after), sampled(before), atol=1e-4)
    assert after.tokenizer.get_vocab() == before.tokenizer.get_vocab()
    for part in ("transformer", "text_encoder"):
        moved = [
            not torch.equal(a, b)
            for a, b in zip(getattr(before, part).parameters(), getattr(after, part).parameters(), strict=True)
        ]
        assert any(moved), part


def test_a_new_budget_is_added_and_cut_captions_are_counted(demo_run, base, tmp_path, capsys):
    change = {"budgets": [{"ratio": 8, "share": 1}], "text": {"encoders": [encoder("small", 6)]}}
    train_diffusion.main(arguments(demo_run, tmp_path, base, None, **change))
    assert re.search(r"captions: 2 of 3 texts have more than 6 tokens and are cut; 'a .*' loses '", capsys.readouterr().out)
    config = load(tmp_path / "pipeline").transformer.config
    assert set(config["latents_mean"]) == {"8", "16"}
    assert config["latents_mean"]["16"] == load(base).transformer.config["latents_mean"]["16"]
    assert list(config["temporal_ratios"]) == [8, 16]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora": {"rank": 0, "alpha": 1, "targets": ["to_q"]}}, "lora rank 0"),
        (
            {"lora": {"rank": 1, "alpha": 1, "targets": ["to_x"]}},
            "lora target 'to_x': no linear layer ends so; the layers are attn1.to_k",
        ),
        ({"budgets": [{"ratio": 8, "share": 1}]}, "budget 8x: the transformer of init was trained at 16x"),
        (
            {"condition": {"probability": 1.0, "frames": 2}, "data": {"frames": 33}},
            "condition frames 2: the transformer",
        ),
        ({"init": None}, "init None, model null: exactly one"),
        ({"init": "nowhere"}, "nowhere"),
    ],
)
def test_mistakes_are_named(demo_run, base, tmp_path, change, message):
    given = arguments(demo_run, tmp_path, base, {"rank": 1, "alpha": 1, "targets": ["to_q"]})
    with pytest.raises(UserError, match=message):
        train_diffusion.main([*given, *overrides(change)])


def test_adapters_need_a_trained_transformer(demo_run, tmp_path):
    given = diffusion_arguments(
        tmp_path, demo_run / "tokenizer-run" / "tokenizer", lora={"rank": 1, "alpha": 1, "targets": ["to_q"]}
    )
    with pytest.raises(UserError, match="lora: adapters need a trained transformer"):
        train_diffusion.main(given)
