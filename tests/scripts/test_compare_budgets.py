import json
import re

import pytest
import torch

from promag.pipelines.stock import StockDefaults, StockPipeline
from promag.scripts import evaluate_pipeline
from promag.scripts.compare_budgets import main
from promag.scripts.evaluate_tokenizer import main as evaluate
from promag.training.config import UserError
from tests.evaluation.test_clip_similarity import write_clip
from tests.existing_models import small_existing
from tests.tiny_pipeline import make_pipeline
from tests.wan import make_grown, make_stock


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("wan")
    small_existing("Wan 2.1").save_pretrained(folder)
    return folder


def test_one_command_compares_levels_baselines_costs_and_pipelines(demo_run, baseline, tmp_path, capsys):
    tokenizer = next(demo_run.glob("**/vae")).parent
    clips = ["--videos", "synthetic", "--count", "3", "--frames", "17", "--size", "32", "--perceptual"]  # no metrics
    little = ["--train-batch-size", "1", "--steps", "1", "--rounds", "1", "--curve-seconds", "0", "--prompts", "2"]
    smallest = ["--model.num_layers", "1", "--model.num_attention_heads", "2", "--model.attention_head_dim", "8"]
    pipeline = demo_run / "video-16x" / "pipeline"
    record, out = tmp_path / "budgets.jsonl", tmp_path / "report"
    arguments = ["--tokenizer", str(tokenizer), *clips, "--also", f"wan={baseline}", "--pipelines", str(pipeline)]
    clip = ["--clip", str(write_clip(tmp_path / "clip"))]
    assert main([*arguments, *little, *smallest, *clip, "--out", str(out), "--record", str(record)]) == 0
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [line["what"] for line in lines] == [
        *["reconstruction"] * 4,
        "adaptive budget",
        *["cost"] * 4,
        "cost by length",
        "generation",
    ]
    assert all(line["commit"] and line["machine"] and line["versions"] and line["protocol"] for line in lines)

    assert evaluate([str(tokenizer), *clips, "--out", str(tmp_path / "alone.json")]) == 0
    alone = json.loads((tmp_path / "alone.json").read_text())["ratios"]
    for line in lines[:3]:
        figures = alone[str(line["ratio"])]
        for control in ("lift", "interpolated", "interpolated_by_motion"):
            figures.pop(control, None)
        assert {key: line["reconstruction"][key] for key in figures} == figures
    assert lines[3]["budget"] == "wan"
    assert len(lines[3]["reconstruction"]["per_clip"]) == 3

    recorded = record.read_text()
    assert "per_clip" not in recorded
    assert "clip_psnr" not in recorded
    assert str(tmp_path) not in recorded
    assert lines[-1]["pipeline"] == "video-16x at 16x"
    assert -1 < lines[-1]["clip_similarity"] < 1
    page = (out / "report.html").read_text()
    assert '<th scope="row">CLIP similarity<' in page
    assert "CLIP similarity (no weights given)" not in page
    assert "Training step of one clip" in page
    assert "video-16x at 16x" in page
    shown = capsys.readouterr().out
    assert f"{lines[2]['reconstruction']['psnr']:.2f}" in shown


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--also", "wan"], "--also wan: NAME=PATH or NAME=PATH:RATIO is needed"),
        (["--also", "wan=:4"], "--also wan=:4: NAME=PATH or NAME=PATH:RATIO is needed"),
        (["--also", "wan=nowhere:4"], "--also wan=nowhere:4: tokenizer nowhere: no config.json there"),
        (["--frames", "18"], "18 frames: 16x needs 1 + 16k; use 17 or 33"),
        (["--segment", "16"], "16 frames: 16x needs 1 + 16k"),
        (["--segment", "1"], "--segment 1: one frame has the same tokens at every level; use 17 or more"),
        (["--frames", "1"], "--frames 1: one frame has the same tokens at every level; use 17 or more"),
        (["--target", "nan"], "--target nan: a finite number is needed"),
        (["--config", "diffusion/wan"], "--config diffusion/wan: model null: costs need a configuration with a transformer"),
        (["--model.layers", "3"], "unknown key model.layers"),
        (["--rounds", "0"], "--rounds 0: at least 1 is needed"),
        (["--fvd", "i3d.pt", "--frames", "9"], "--fvd i3d.pt: clips of 9 frames; at least 10 are needed"),
        (["--clip", "nowhere"], "clip nowhere: no config.json there"),
        (["--clip-weights", "weights.pt"], "--clip-weights weights.pt: name the model they belong to"),
    ],
)
def test_mistakes_are_named(demo_run, tmp_path, change, message):
    tokenizer = next(demo_run.glob("**/vae")).parent
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        main(["--tokenizer", str(tokenizer), "--videos", "synthetic", "--out", str(tmp_path), *change])


@pytest.mark.parametrize("name", ["frames", "segment"])
def test_lengths_suit_an_autoencoder_that_takes_latent_frames_by_twos(tmp_path, name):
    torch.manual_seed(0)
    small_existing("CogVideoX").save_pretrained(tmp_path / "cog")
    call = ["--tokenizer", str(tmp_path / "cog"), "--videos", "synthetic", "--out", str(tmp_path / "report"), "--no-costs"]
    with pytest.raises(UserError, match=r"^13 frames: 4x needs 1 \+ 8k; use 9 or 17$"):
        main([*call, f"--{name}", "13"])


def test_another_tokenizer_is_compared_at_the_ratio_that_is_named(demo_run, tmp_path):
    tokenizer = next(demo_run.glob("**/vae")).parent
    clips = ["--videos", "synthetic", "--count", "1", "--frames", "17", "--size", "32"]
    call = ["--tokenizer", str(tokenizer), *clips, "--no-costs", "--precision", "fp32", "--out", str(tmp_path / "report")]
    for ratio, message in (
        ("", f"--also b={tokenizer}: {tokenizer} has 4x, 8x, 16x; name one of them, b={tokenizer}:16"),
        (":32", f"--also b={tokenizer}:32: temporal ratio 32: this tokenizer has 4x, 8x, 16x"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            main([*call, "--also", f"b={tokenizer}{ratio}"])
    main([*call, "--also", f"b={tokenizer}:16"])
    lines = [json.loads(line) for line in (tmp_path / "report" / "results.jsonl").read_text().splitlines()]
    rows = {line["budget"]: line for line in lines if line["what"] == "reconstruction"}
    assert list(rows) == ["4x", "8x", "16x", "b"]
    assert rows["b"]["reconstruction"] == rows["16x"]["reconstruction"] != rows["4x"]["reconstruction"]
    alone = [*clips, "--precision", "fp32", "--ratios", "4", "--out", str(tmp_path / "alone.json")]
    assert evaluate([str(tokenizer), *alone]) == 0  # with the same perceptual metrics: those installed
    figures = json.loads((tmp_path / "alone.json").read_text())["ratios"]["4"]
    assert figures.pop("lift") == {}
    assert {key: rows["4x"]["reconstruction"][key] for key in figures} == figures


def test_what_a_pipeline_refuses_is_named(demo_run, tmp_path):
    make_pipeline(height=32, width=32, num_frames=18).save_pretrained(tmp_path / "odd")
    call = ["--tokenizer", str(tmp_path / "odd"), "--videos", "synthetic", "--count", "1", "--frames", "17", "--size", "32"]
    call += ["--perceptual", "--no-costs", "--precision", "fp32", "--prompts", "1", "--pipelines", str(tmp_path / "odd")]
    with pytest.raises(UserError, match=r"pipeline odd: 18 frames: 4x needs 1 \+ 4k"):
        main([*call, "--out", str(tmp_path / "report")])
    make_pipeline(height=32, width=32, num_frames=5).save_pretrained(tmp_path / "odd")
    with pytest.raises(UserError, match=r"--fvd i3d\.pt: videos of pipeline .*odd of 5 frames; at least 10 are needed"):
        main([*call, "--fvd", "i3d.pt", "--out", str(tmp_path / "report")])


def test_steps_and_guidance_are_checked_before_anything_is_measured(demo_run, tmp_path):
    tokenizer, pipeline = next(demo_run.glob("**/vae")).parent, demo_run / "video-16x" / "pipeline"
    arguments = ["--tokenizer", str(tokenizer), "--videos", "synthetic", "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match=f"pipeline {pipeline}: guidance_scale nan: a finite number"):
        main([*arguments, "--pipelines", str(pipeline), "--guidance", "nan"])
    assert not (tmp_path / "out").exists()


def test_what_was_measured_before_a_mistake_shows_is_kept(demo_run, tmp_path):
    tokenizer, record = next(demo_run.glob("**/vae")).parent, tmp_path / "record.jsonl"
    arguments = ["--videos", "synthetic", "--count", "1", "--frames", "17", "--size", "32", "--perceptual"]
    with pytest.raises(UserError, match="flash does not work on cpu"):
        main(
            ["--tokenizer", str(tokenizer), *arguments, "--attention", "flash", "--out", str(tmp_path), "--record", str(record)]
        )
    for path in (tmp_path / "results.jsonl", record):
        kinds = [json.loads(line)["what"] for line in path.read_text().splitlines()]
        assert kinds == ["reconstruction"] * 3 + ["adaptive budget"]


def test_a_stock_pipeline_with_a_grown_autoencoder_is_compared_at_all_its_ratios(tmp_path, capsys):
    grown = make_grown()
    grown.save_pretrained(tmp_path / "grown")
    defaults = StockDefaults(32, 32, 17, 8.0, num_inference_steps=2, guidance_scale=1.0, max_sequence_length=8)
    StockPipeline(make_stock(vae=grown), defaults).save_pretrained(tmp_path / "wan")
    arguments = [
        "--tokenizer",
        str(tmp_path / "grown"),
        "--videos",
        "synthetic",
        "--count",
        "1",
        "--frames",
        "17",
        "--size",
        "32",
    ]
    arguments += ["--pipelines", str(tmp_path / "wan"), "--no-costs", "--prompts", "1", "--precision", "fp32"]
    assert main([*arguments, "--out", str(tmp_path / "report")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "report" / "results.jsonl").read_text().splitlines()]
    generated = [line for line in lines if line["what"] == "generation"]
    assert [(line["pipeline"], line["ratio"]) for line in generated] == [(f"wan at {ratio}x", ratio) for ratio in (4, 8, 16)]
    assert all(line["sampling_seconds"] > 0 for line in generated)
    assert {(line["steps"], line["guidance"]) for line in generated} == {(2, 1.0)}  # the pipeline's own
    assert re.search(r"^Denoising steps +2 +2 +2$", shown := capsys.readouterr().out, re.MULTILINE), shown
    evaluate_pipeline.main([str(tmp_path / "wan"), "--ratios", "16", "--prompts", "1", "--steps", "1", "--precision", "fp32"])
    printed = [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if line[:2] != "  "]
    kinds = ("trained combinations", "unseen combinations", "reconstructions of as many unseen clips")
    assert printed == [f"wan 16x, {kind}" for kind in kinds]
