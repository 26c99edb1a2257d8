"""The generation experiment at its smallest size, its preset, and its report."""

import json

import pytest
import yaml

from promag.evaluation.generation_experiment import difference_interval, differences, table
from promag.evaluation.synthetic_scorer import wilson_interval
from promag.scripts.experiments import generation
from promag.training.command_line import parse_config
from promag.training.config import UserError
from tests.scripts.conftest import TINY_MODEL

STEPS = {"steps": 2, "batch_size": 1, "warmup": 1}
LOOP = {"validate_every": 2, "log_every": 1, "workers": 0, "trackers": []}
DATA = {"train": "synthetic", "validation": "synthetic", "temporal_strides": [1]}
VARIANTS = [
    {"name": "base", "model": TINY_MODEL, "stages": [{"ratio": 4, "frames": 5, "optimization": STEPS}]},
    {
        "name": "dual",
        "base": "base",
        "stages": [{"ratio": 8, "frames": 9, "growth": {"latent": "dual", "heads": 2}, "optimization": STEPS}],
    },
]
MODELS = [
    {"name": "direct", "variant": "base", "ratio": 4, "steps": 2},
    {"name": "ahead", "variant": "dual", "ratio": 8, "base_ahead": 0.3, "steps": 3},
]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generation")
    values = {
        "output_dir": str(folder / "runs"),
        "record": str(folder / "generation.jsonl"),
        "precision": "fp32",
        "tokenizers": {
            "output_dir": str(folder / "runs" / "tokenizers"),
            "frames": 17,
            "perceptual": [],
            "data": {**DATA, "synthetic_clips": 4, "size": 32, "validation_clips": 2},
            "run": LOOP,
            "variants": VARIANTS,
        },
        "clips": 4,
        "text": {"width": 16, "layers": 1, "heads": 2},
        "transformer": {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8},
        "optimization": {**STEPS, "batch_size": 16},  # validation scores as many of its 64 clips at once
        "run": LOOP,
        "prompts": 2,
        "steps": 2,
        "models": MODELS,
    }
    path = folder / "generation.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def lines(config):
    assert generation.main(["--config", str(config)]) == 0
    return [json.loads(line) for line in (config.parent / "generation.jsonl").read_text().splitlines()]


def test_a_line_for_each_model(lines):
    assert [(line["what"], line["model"], line["ratio"], line["base_ahead"]) for line in lines] == [
        ("generation", "direct", 4, 0.0),
        ("generation", "ahead", 8, 0.3),
    ]
    direct, ahead = lines
    assert (direct["tokens"], ahead["tokens"]) == (5 * 2 * 2, 3 * 2 * 2)
    assert (direct["channels"], ahead["channels"]) == (4, 8)  # dual latents have the residual's channels too
    assert (direct["tokenizer"]["steps"], ahead["tokenizer"]["steps"]) == (2, 4)
    assert ahead["flops"] / 3 < direct["flops"] / 2
    for line in lines:
        for kind in ("trained", "unseen"):
            assert sum(count for _, count in line[kind]["right_by_motion"].values()) == 2
        assert line["training"]["validation_loss"] > 0
        assert line["jitter_of_true_clips"] == lines[0]["jitter_of_true_clips"] > 0
        assert {"commit", "machine", "protocol", "reconstructions", "high_frequency"} <= line.keys()


def test_a_second_call_trains_and_scores_nothing_again_and_the_report_prints_the_lines(lines, config, capsys):
    record = config.parent / "generation.jsonl"
    before = record.read_text()
    assert generation.main(["--config", str(config), "--only-models", "[direct]"]) == 0
    output = capsys.readouterr().out
    assert "4x: already trained" in output
    assert "dual" not in output
    assert record.read_text() == before
    assert generation.main(["--config", str(config), "--only-models", "[direct]", "--record", "null", "--prompts", "1"]) == 0
    kept = config.parent / "runs" / "direct-0" / "scores.json"
    assert json.loads(kept.read_text())["prompts"] == 1
    assert generation.main(["report", str(record)]) == 0
    output = capsys.readouterr().out
    assert "| ahead | 8x | 12 | 8 | 0 |" in output
    assert "| minus direct, in points | seeds |" in output


def test_mistakes_are_named(config, tmp_path):
    run = ["--config", str(config)]
    with pytest.raises(UserError, match="model direct: variant other must be a tokenizer with seeds"):
        generation.main([*run, "--models.0.variant", "other"])
    with pytest.raises(UserError, match="model direct: variant base must be a tokenizer with seeds"):
        generation.main([*run, "--models.0.seeds", "[1]"])
    with pytest.raises(UserError, match="model ahead: there are two of that name"):
        generation.main([*run, "--models.0.name", "ahead"])
    with pytest.raises(UserError, match="only_models other: the models are direct, ahead"):
        generation.main([*run, "--only-models", "[other]"])
    with pytest.raises(UserError, match="prompts 0: at least 1"):
        generation.main([*run, "--prompts", "0"])
    with pytest.raises(UserError, match="no lines of the experiment"):
        generation.main(["report", str(tmp_path / "none.jsonl")])


def row(model, seed, right):
    accuracy = dict.fromkeys(("shape", "colour", "motion", "all"), (right / 4, 0, 1))
    scored = {"trained": {"accuracy": accuracy}, "unseen": {"accuracy": accuracy}, "reconstructions": accuracy, "prompts": 4}
    figures = {"jitter": 1, "jitter_of_true_clips": 2, "high_frequency": 1, "training": {"validation_loss": 0.5}}
    costs = {"tokens": 320, "channels": 8, "flops": 1e15, "tokenizer": {"flops": 2e15}}
    return {"model": model, "seed": seed, "ratio": 16, **scored, **figures, **costs}


def test_seeds_are_counted_together():
    rows = [row("direct", 0, 1), row("direct", 1, 2), row("ours", 0, 3), row("ours", 1, 4), row("ours", 2, 0)]
    low, high = wilson_interval(3, 8)
    assert f"| direct | 16x | 320 | 8 | 0, 1 | 38% ({100 * low:.0f}-{100 * high:.0f}) |" in table(rows)
    value, low, high = difference_interval((7, 8), (3, 8))  # the seeds that both have
    assert value == 0.5
    assert f"| ours | 0, 1 | +50 ({100 * low:+.0f} to {100 * high:+.0f}) |" in differences(rows, "direct")
    with pytest.raises(UserError, match="--than warm: the models are direct, ours"):
        differences(rows, "warm")


def test_the_interval_of_a_difference_is_the_published_one():
    # Newcombe 1998, table II, method 10: 56 of 70 against 48 of 80, and 9 of 10 against 3 of 10.
    assert difference_interval((56, 70), (48, 80)) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)
    assert difference_interval((9, 10), (3, 10)) == pytest.approx((0.6, 0.1705, 0.8090), abs=1e-4)


def test_the_preset_compares_16x_models_of_equal_size_and_steps():
    config = parse_config(generation.GenerationConfig, ["--config", "generation/cpu"], "")
    assert {model.steps for model in config.models if model.ratio == 16} == {1500}
    assert {model.name: model.variant for model in config.models}["grown_dual_ahead"] == "grown_dual"
