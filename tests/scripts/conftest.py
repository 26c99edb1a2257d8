"""The smallest demo run, whose tokenizer and pipelines the tests of the other scripts use."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from promag.data.synthetic import clip
from promag.data.video import write_video
from promag.training.command_line import parse_config
from promag.training.config import load_yaml
from tests.tiny_pipeline import make_pipeline

TINY_MODEL = {
    "latent_channels": 4,
    "patch_size": 4,
    "block_out_channels": [16, 16, 16],
    "layers_per_block": 1,
    "strides": [[2, 2], [2, 1]],
    "framewise": 0,
}


def overrides(values: dict, prefix: str = "") -> list[str]:
    """Turn nested values into --dotted.name=value arguments, as a shell user types them."""
    arguments = []
    for key, value in values.items():
        if isinstance(value, dict):
            arguments += overrides(value, f"{prefix}{key}.")
        else:
            arguments.append(f"--{prefix}{key}={value if isinstance(value, str) else json.dumps(value)}")
    return arguments


LOOP = {"steps": 2, "batch_size": 1, "warmup": 1}
LIFTED = {"hand_over": "latent"}
SMALLEST = overrides(
    {
        "precision": "fp32",
        "size": 32,
        "frames": 17,
        "synthetic_clips": 4,
        "evaluation_clips": 2,
        "prompts": 2,
        "scored": 3,
        "steps": 2,
        "shipped": None,
        "tokenizer": TINY_MODEL,
        "text": {"width": 16, "layers": 1, "heads": 2},
        "transformer": {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8},
        "condition": {"probability": 0.5},
        "diffusion": {**LOOP, "batch_size": 4},  # validation scores as many at once
        "stages": {
            "0": {"frames": 5, "optimization": LOOP},
            # latents that lift, which drafts need
            "1": {"frames": 9, "growth": LIFTED, "latent_pretrain_steps": 1, "optimization": LOOP},
            "2": {"frames": 17, "growth": LIFTED, "latent_pretrain_steps": 1, "optimization": LOOP},
        },
        "run": {"log_every": 1, "validate_every": 2, "save_every": 2, "workers": 0, "trackers": []},
    }
)
DEMO = ["--config", "configs/demo.yaml", *SMALLEST]


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory) -> Path:
    from promag.demo.config import DemoConfig, diffusion_config
    from promag.pipelines.build import train_pipeline
    from promag.scripts.demo import main

    run, shipped = tmp_path_factory.mktemp("demo") / "run", tmp_path_factory.mktemp("shipped")
    torch.set_num_threads(1)
    make_pipeline(height=32, width=32).save_pretrained(shipped)
    assert main([*DEMO, "--output-dir", str(run), "--shipped", str(shipped), "--record", str(run / "results.jsonl")]) == 0
    config = replace(parse_config(DemoConfig, [*DEMO, "--output-dir", str(run)], ""), ratios=(16,))
    alone = diffusion_config(config, run / "tokenizer-run" / "tokenizer", "synthetic", "synthetic")
    train_pipeline(replace(alone, output_dir=str(run / "video-16x")))  # the demo's own model is trained at two ratios
    return run


@pytest.fixture(scope="session")
def video_folder(tmp_path_factory) -> Path:
    """Four short real files with captions beside them."""
    folder = tmp_path_factory.mktemp("videos")
    lines = ["file,caption,split"]
    for i in range(4):
        pixels, scene = clip(i, "eval", 20, 64)
        write_video(folder / f"v{i}.mp4", pixels, 10)
        lines.append(f"v{i}.mp4,{scene.caption()},{'train' if i else 'eval'}")
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")
    return folder


def preset(name: str) -> dict:
    return load_yaml(f"configs/{name}.yaml")
