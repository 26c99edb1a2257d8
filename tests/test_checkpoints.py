"""What lies under checkpoints/: it loads, is small, and its card quotes the recorded figures."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from promag.tokenizer.metrics import psnr
from promag.tokenizer.train import load_tokenizer
from promag.training.datasets import ShapesDataset

FOLDER = Path("checkpoints")
TINY = FOLDER / "tiny"


def test_all_of_them_together_stay_small_and_are_safetensors():
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 40e6
    assert {file.suffix for file in files} == {".safetensors", ".json", ".md"}


def test_the_weights_are_bf16():
    with safe_open(TINY / "diffusion_pytorch_model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118


@torch.no_grad()
def test_the_tiny_tokenizer_reconstructs_what_it_never_saw_at_every_ratio():
    model = load_tokenizer(TINY)
    assert model.temporal_ratios == (4, 8, 16)
    video = ShapesDataset("eval", 1, 33, 64).fixed(0)["video"][None]
    blurred = torch.nn.functional.avg_pool3d(video, (1, 8, 8)).repeat_interleave(8, 3).repeat_interleave(8, 4)
    for ratio in model.temporal_ratios:
        assert psnr(model(video, ratio).sample, video) > psnr(blurred, video) + 3


def test_the_card_quotes_the_recorded_figures():
    lines = [json.loads(line) for line in Path("docs/results/reconstruction.jsonl").read_text().splitlines()]
    (record,) = [line for line in lines if line["note"] == f"published as {TINY}"][-1:]
    card = (TINY / "README.md").read_text()
    for ratio, figures in record["ratios"].items():
        assert f"| {ratio}x | {figures['psnr']:.2f} |" in card
        assert figures["psnr"] == pytest.approx(sum(clip["psnr"] for clip in figures["per_clip"]) / figures["clips"], abs=1e-4)
