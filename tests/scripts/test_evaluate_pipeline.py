"""Prompt accuracy of a pipeline, and drafts against sampling from noise, by their scripts with random weights."""

import json
from pathlib import Path

import pytest
from diffusers.models.attention import FeedForward

from promag.diffusion.validation import training_figures
from promag.evaluation.prompt_accuracy import PARTS
from promag.scripts import evaluate_pipeline
from promag.scripts.experiments import draft_and_refine
from promag.training.config import UserError
from tests.tiny_pipeline import make_pipeline

FEW = ["--prompts", "3", "--steps", "2", "--precision", "fp32"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run whose pipeline has random weights, and the log of its training."""
    place = tmp_path_factory.mktemp("run") / "mine"
    make_pipeline(height=32, width=32).save_pretrained(place / "pipeline")
    stage = place / "4x-16x"
    stage.mkdir()
    lines = [{"step": 5, "validation_loss": 0.9, "train_seconds": 2.5}, {"step": 10, "loss": 1.0}]
    lines += [{"step": 10, "validation_loss": 0.5, "validation_loss_4x": 0.4, "validation_loss_16x": 0.6, "train_seconds": 5.0}]
    (stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return place


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_ratio_is_scored_on_both_kinds_of_prompts(run, tmp_path, capsys):
    record = tmp_path / "results.jsonl"
    evaluate_pipeline.main([str(run / "pipeline"), *FEW, "--record", str(record), "--note", "random"])
    printed = capsys.readouterr().out.splitlines()
    motions, printed = [line for line in printed if line[:2] == "  "], [line for line in printed if line[:2] != "  "]
    kinds = (", trained combinations", ", unseen combinations", ", reconstructions of as many unseen clips", "")
    assert [line.split(":")[0] for line in printed] == [f"mine {ratio}x{kind}" for ratio in (4, 16) for kind in kinds]
    assert printed[3] == "mine 4x: steps 10, seconds 5, validation_loss 0.4"
    results = lines(record)
    upper_limits = [line for line in results if line["what"] == "prompt accuracy of reconstructions"]
    assert [(line["ratio"], line["clips"], line["accuracy"].keys()) for line in upper_limits] == [
        (r, 3, {*PARTS}) for r in (4, 16)
    ]
    results = [line for line in results if line not in upper_limits]
    assert [(line["ratio"], line["unseen"]) for line in results] == [(4, False), (4, True), (16, False), (16, True)]
    for line in results:
        assert (line["prompts"], line["steps"], line["guidance"], line["note"]) == (3, 2, 4.0, "random")
        assert set(line["accuracy"]) == set(PARTS)
        right, clips = (sum(counts) for counts in zip(*line["right_by_motion"].values(), strict=True))
        assert (right, clips) == (round(3 * line["accuracy"]["all"][0]), 3)
        expected = ", ".join(f"{motion} {right} of {clips}" for motion, (right, clips) in line["right_by_motion"].items())
        assert motions.pop(0) == f"  all right by motion: {expected}"
        assert line["sampling_seconds"] > 0
        assert line["jitter"] > line["jitter_of_true_clips"] > 0  # of random weights
        assert line["high_frequency"] > 0
        loss = 0.4 if line["ratio"] == 4 else 0.6
        curve = line["training"].pop("curve")
        assert line["training"] == {"steps": 10, "seconds": 5.0, "validation_loss": loss}
        assert curve[-1] == [10, loss]


def test_the_first_call_at_a_ratio_is_not_timed(run, tmp_path, monkeypatch):
    now, shapes = [0.0], set()
    forward = FeedForward.forward

    def cold_start(*given):
        now[0] += 1 if given[1].shape in shapes else 1000
        shapes.add(given[1].shape)
        return forward(*given)

    monkeypatch.setattr(FeedForward, "forward", cold_start)
    monkeypatch.setattr("promag.pipelines.sampling.time.perf_counter", lambda: now[0])
    evaluate_pipeline.main([str(run / "pipeline"), *FEW, "--record", str(tmp_path / "results.jsonl")])
    seconds = [line["sampling_seconds"] for line in lines(tmp_path / "results.jsonl") if "sampling_seconds" in line]
    assert seconds == [seconds[0]] * 4
    assert seconds[0] < 100


def test_a_pipeline_without_its_run_is_scored_too(run, tmp_path, capsys):
    (run / "pipeline").rename(tmp_path / "moved")
    try:
        evaluate_pipeline.main([str(tmp_path / "moved"), *FEW, "--ratios", "16"])
    finally:
        (tmp_path / "moved").rename(run / "pipeline")
    assert len(capsys.readouterr().out.splitlines()) == 5
    assert training_figures(run, 8) == {}


def test_drafting_is_compared_with_sampling_from_noise(run, tmp_path, capsys):
    record, sheet = tmp_path / "results.jsonl", tmp_path / "sheet.png"
    ways = ["--strengths", "0", "0.5", "--from-noise-steps", "1", "3", "--draft-steps", "2", "--contact-sheet", str(sheet)]
    draft_and_refine.main([str(run / "pipeline"), *FEW, *ways, "--record", str(record)])
    draft, one, three, lifted, half = lines(record)
    assert [row["way"] for row in (draft, one, three)] == ["16x alone", "4x from noise, 1 steps", "4x from noise, 3 steps"]
    assert [row["way"] for row in (lifted, half)] == ["refined from 0", "refined from 0.5"]
    assert "rival" not in draft
    # A lifted draft without refinement equals the draft, because the higher level's decoder lifts first, too.
    assert lifted["psnr_to_draft"] > 50 > half["psnr_to_draft"]
    assert lifted["rival"] in (one["way"], three["way"])
    nearest = min((one, three), key=lambda row: abs(row["seconds"] - half["seconds"]))
    assert half["rival"] == nearest["way"]
    assert all(row["jitter"] > 0 and row["seconds"] > 0 for row in lines(record))
    assert len({row["jitter_of_true_clips"] for row in lines(record)}) == 1
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 6
    assert printed[-1] == str(sheet)
    assert sheet.exists()


def test_drafts_have_the_steps_and_the_guidance_of_the_pipeline(tmp_path):
    make_pipeline(height=32, width=32, num_inference_steps=2, guidance_scale=1.0).save_pretrained(tmp_path / "few")
    ways = ["--strengths", "0.5", "--from-noise-steps", "2", "--prompts", "1", "--precision", "fp32"]
    for given, (steps, guidance, draft_steps) in (
        ([], (2, 1.0, 2)),
        (["--steps", "4", "--guidance", "3"], (4, 3.0, 4)),
        (["--draft-steps", "1"], (2, 1.0, 1)),
    ):
        record = tmp_path / f"{len(given)}.jsonl"
        draft_and_refine.main([str(tmp_path / "few"), *ways, *given, "--record", str(record)])
        for line in lines(record):
            assert (line["steps"], line["guidance"], line["draft_steps"]) == (steps, guidance, draft_steps)


def test_a_first_block_cache_leaves_later_blocks_out(run, tmp_path, monkeypatch):
    calls = []
    forward = FeedForward.forward  # of each block
    monkeypatch.setattr(FeedForward, "forward", lambda *given: calls.append(given[0]) or forward(*given))
    counts, record = [], tmp_path / "results.jsonl"
    for cache in ([], ["--first-block-cache", "1000"]):
        calls.clear()
        words = ["--ratios", "16", "--prompts", "1", "--steps", "4", "--precision", "fp32", "--guidance", "1"]
        evaluate_pipeline.main([str(run / "pipeline"), *words, *cache, "--record", str(record)])
        counts.append(len(calls))
    blocks = len(make_pipeline().transformer.transformer_blocks)
    assert blocks > 1
    # Of two videos, whose first step runs every block, and of one untimed step before.
    assert counts == [2 * 4 * blocks + blocks, 2 * (blocks + 3) + blocks]
    assert [line.get("first_block_cache") for line in lines(record)] == [None] * 3 + [1000] * 3


def test_names_do_not_depend_on_the_working_directory(run, tmp_path, monkeypatch):
    monkeypatch.chdir(run / "pipeline")
    assert evaluate_pipeline.pipeline_name(Path(".")) == "mine"
    (tmp_path / "best").symlink_to(run / "pipeline")
    assert evaluate_pipeline.pipeline_name(tmp_path / "best") == "best"
    record = tmp_path / "results.jsonl"
    evaluate_pipeline.main([".", "--ratios", "4", "--prompts", "1", "--steps", "1", "--record", str(record)])
    assert [(line["pipeline"], line.get("training", {}).get("steps")) for line in lines(record)] == [
        *[("mine", 10)] * 2,
        ("mine", None),
    ]


def test_every_pipeline_is_checked_before_the_first_is_sampled(run, tmp_path, capsys):
    make_pipeline(height=32, width=32).save_pretrained(tmp_path / "other")
    config = json.loads((tmp_path / "other" / "transformer" / "config.json").read_text())
    for key in ("latents_mean", "latents_std"):
        config[key] = {"16": config[key]["16"]}
    (tmp_path / "other" / "transformer" / "config.json").write_text(json.dumps(config))
    both = [str(run / "pipeline"), str(tmp_path / "other"), *FEW]
    with pytest.raises(UserError, match=r"--ratios 4: .*other was trained at 16x"):
        evaluate_pipeline.main([*both, "--ratios", "4"])
    with pytest.raises(UserError, match=r"pipeline .*nowhere: no model_index\.json there"):
        evaluate_pipeline.main([both[0], str(tmp_path / "nowhere"), *FEW])
    with pytest.raises(UserError, match=r"--lora .*nowhere: no adapters there"):
        evaluate_pipeline.main([*both, "--lora", str(tmp_path / "nowhere")])
    assert capsys.readouterr().out == ""


def test_what_the_pipeline_refuses_is_named(tmp_path):
    pipe = make_pipeline(height=32, width=32, num_frames=18)
    pipe.save_pretrained(tmp_path / "odd")
    with pytest.raises(UserError, match=r"pipeline .*odd: 18 frames: 16x needs 1 \+ 16k"):
        evaluate_pipeline.main([str(tmp_path / "odd"), *FEW, "--ratios", "16"])


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (evaluate_pipeline, ["--ratios", "8"], "--ratios 8: .* was trained at 4x, 16x"),
        (evaluate_pipeline, ["--prompts", "0"], "--prompts 0: at least 1"),
        (evaluate_pipeline, ["--ratios", "4", "4"], "--ratios 4 4: 4 is given twice; give every value once"),
        (evaluate_pipeline, ["--first-block-cache", "0"], "--first-block-cache 0: a number above 0"),
        (draft_and_refine, ["--ratio", "8"], "--ratio 8: the pipeline was trained at 4x, 16x"),
        (draft_and_refine, ["--ratio", "16", "--prompts", "1", "--steps", "1"], "draft at 16x .* a higher ratio"),
        (evaluate_pipeline, ["--tokenizer", "nowhere"], "tokenizer nowhere: takes the place of a WanPipeline's own"),
        (evaluate_pipeline, ["--guidance", "nan"], "--guidance nan: a finite number is needed"),
        (draft_and_refine, ["--prompts", "0"], "--prompts 0: at least 1"),
        (draft_and_refine, ["--contact-sheet", "sheet.jpg"], r"--contact-sheet sheet\.jpg: a \.png file is needed"),
    ],
)
def test_mistakes_are_named(run, script, arguments, message):
    with pytest.raises(UserError, match=message):
        script.main([str(run / "pipeline"), *arguments])
