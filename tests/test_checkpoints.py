"""The models in checkpoints/ load and are small, and their cards quote the recorded figures."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from promag.data.datasets import SyntheticDataset
from promag.data.synthetic import is_unseen, parse_caption
from promag.evaluation.prompt_accuracy import PARTS, accuracies
from promag.pipelines.sampling import load_pipeline, sample_videos
from promag.scripts._parts import load_lora
from promag.tokenizer.checkpoint import load_tokenizer
from promag.tokenizer.metrics import psnr
from promag.tokenizer.tiny_decoder import load_tiny_decoder

FOLDER = Path("checkpoints")
TINY, VIDEO, FAST = (FOLDER / name for name in ("tiny", "tiny-video", "tiny-video-fast"))


def test_the_checkpoints_are_small_and_are_safetensors():
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert sum(map(len, {file.read_bytes() for file in files})) < 60e6  # git stores equal files once
    assert {file.suffix for file in files} == {".safetensors", ".json", ".md"}


@pytest.mark.parametrize("file", sorted(FOLDER.rglob("*.safetensors")), ids=lambda file: file.parent.name)
def test_the_weights_are_bf16(file):
    with safe_open(file, "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118


@torch.no_grad()
def test_the_tiny_tokenizer_reconstructs_unseen_clips_at_every_ratio():
    model = load_tokenizer(TINY)
    assert model.temporal_ratios == (4, 8, 16)
    video = SyntheticDataset("eval", 1, 33, 64).fixed(0)["video"][None]
    blurred = torch.nn.functional.avg_pool3d(video, (1, 8, 8)).repeat_interleave(8, 3).repeat_interleave(8, 4)
    for ratio in model.temporal_ratios:
        assert psnr(model(video, ratio).sample, video) > psnr(blurred, video) + 3


def test_the_card_quotes_the_recorded_figures():
    lines = [json.loads(line) for line in Path("docs/results/reconstruction.jsonl").read_text().splitlines()]
    (record,) = [line for line in lines if line.get("note") == f"published as {TINY}"][-1:]
    card = (TINY / "README.md").read_text()
    for ratio, figures in record["ratios"].items():
        assert f"| {ratio}x | {figures['psnr']:.2f} |" in card
        assert figures["psnr"] == pytest.approx(sum(clip["psnr"] for clip in figures["per_clip"]) / figures["clips"], abs=1e-4)


def test_the_tiny_pipeline_follows_its_prompts():
    """The pipeline was trained on these combinations; it has a copy of the tokenizer beside it."""
    pipe = load_pipeline(VIDEO)
    pipe.set_progress_bar_config(disable=True)
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (VIDEO / "vae" / name).read_bytes() == (TINY / name).read_bytes()
    scenes = [parse_caption(text) for text in ("a red disc moves left", "a blue disc grows", "a green plus moves down")]
    assert not any(is_unseen(scene) for scene in scenes)
    videos = sample_videos(pipe, [scene.caption() for scene in scenes], steps=12, guidance=4.0, name=None)
    assert videos[0].shape == (65, 64, 64, 3)
    accuracy = accuracies(videos, scenes)
    assert accuracy["colour"][0] == 1
    assert accuracy["motion"][0] == 1


@torch.no_grad()
def test_the_fast_adapters_follow_their_prompts_in_their_own_steps_by_the_tiny_decoder():
    pipe = load_pipeline(VIDEO)
    pipe.set_progress_bar_config(disable=True)
    assert load_lora(pipe, FAST) == [16]
    pipe.enable_tiny_decoder()
    scenes = [parse_caption(text) for text in ("a red disc moves left", "a blue disc grows", "a green plus moves down")]
    videos = sample_videos(pipe, [scene.caption() for scene in scenes], name=None)
    assert (pipe.num_timesteps, pipe.guidance_scale) == (4, 1.0)
    accuracy = accuracies(videos, scenes)
    assert (accuracy["colour"][0], accuracy["motion"][0]) == (1, 1)


@torch.no_grad()
def test_the_tiny_decoder_reconstructs_unseen_clips_at_every_ratio():
    tokenizer, tiny = load_tokenizer(TINY), load_tiny_decoder(VIDEO / "tiny_decoder")
    video = SyntheticDataset("eval", 1, 33, 64).fixed(0)["video"][None]
    blurred = torch.nn.functional.avg_pool3d(video, (1, 8, 8)).repeat_interleave(8, 3).repeat_interleave(8, 4)
    for ratio in tokenizer.temporal_ratios:
        z = tokenizer.encode(video, ratio).latent_dist.mode()
        assert psnr(tiny.decode(z, ratio).sample, video) > psnr(blurred, video) + 3


@pytest.mark.parametrize(("folder", "ratios"), [(VIDEO, (4, 8, 16)), (FAST, (16,))], ids=["pipeline", "adapters"])
def test_the_cards_of_text_to_video_quote_the_recorded_figures(folder, ratios):
    lines = [json.loads(line) for line in Path("docs/results/training.jsonl").read_text().splitlines()]
    records = [line for line in lines if line.get("note") == f"published as {folder}"][-3 * len(ratios) :]
    kinds = {False: "trained", True: "unseen", None: "reconstructions of unseen clips"}
    assert [(line["ratio"], line.get("unseen")) for line in records] == [(ratio, kind) for ratio in ratios for kind in kinds]
    card = (folder / "README.md").read_text()
    for line in records:
        kind = kinds[line.get("unseen")]
        shares = ["{:.0f}% ({:.0f}%-{:.0f}%)".format(*(100 * x for x in line["accuracy"][part])) for part in PARTS]
        assert f"| {line['ratio']}x | {kind} | {' | '.join(shares)} |" in card
