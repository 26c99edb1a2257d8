"""Publishing the demo's text-to-video model beside the demo's tokenizer."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE as LORA
from safetensors.torch import load_file, save

from promag.data.synthetic import MOTIONS
from promag.diffusion.config import DiffusionConfig
from promag.pipelines.build import train_pipeline
from promag.pipelines.lora import recorded_sampling
from promag.pipelines.sampling import load_pipeline
from promag.reports.tokenizer_card import clip_shapes
from promag.scripts import publish
from promag.tokenizer.checkpoint import load_tokenizer, save_model
from promag.tokenizer.tiny_training import tiny_decoder_for
from promag.training.command_line import parse_config
from promag.training.config import UserError

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def tokenizer(demo_run, tmp_path_factory):
    """The demo's tokenizer as it would be published."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    model = load_tokenizer(demo_run / "tokenizer-run" / "tokenizer")
    save_model(model.to(torch.bfloat16), folder)
    return folder


@pytest.fixture(scope="module")
def published(demo_run, tokenizer):
    """The demo's pipeline as it would be published; its figures are in results.jsonl beside it."""
    out, few = tokenizer.parent / "video", ["--prompts", "3", "--steps", "2", "--licence", "cc-by-4.0"]
    words = [str(demo_run / "video-16x" / "pipeline"), "--tokenizer", str(tokenizer), "--out", str(out), *few]
    publish.main(["pipeline", *words, "--record", str(out.with_name("results.jsonl"))])
    return out


def test_a_published_pipeline_has_its_tokenizer_and_a_card_with_its_figures(demo_run, tokenizer, published):
    source, out, record = demo_run / "video-16x" / "pipeline", published, published.with_name("results.jsonl")
    assert (out / "vae" / WEIGHTS).read_bytes() == (tokenizer / WEIGHTS).read_bytes()
    assert not (out / "vae").is_symlink()
    weights, trained = (load_file(folder / "transformer" / WEIGHTS) for folder in (out, source))
    assert all(torch.equal(value, trained[key].bfloat16()) for key, value in weights.items())
    alone = shutil.copytree(out, tokenizer.parent.with_name("alone"))  # without the tokenizer beside it
    assert load_pipeline(alone)("a red disc", num_inference_steps=1).frames.shape == (1, 17, 32, 32, 3)
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert [line.get("unseen") for line in lines] == [False, True, None]
    assert not [file for file in out.rglob("*.json") if str(source.parent) in file.read_text()]
    card = (out / "README.md").read_text()
    for line, kind in zip(lines, ("trained", "unseen", "reconstructions of unseen clips"), strict=True):
        assert line["note"] == f"published as {out}"
        assert f"| 16x | {kind} | {100 * line['accuracy']['shape'][0]:.0f}% (" in card
    assert "| 16x | 4 of 17 frames at 32x32 | - | 2 | 4 |" in card
    for line, kind in zip(lines[:2], ("trained", "unseen"), strict=True):
        asked = {motion: "{} of {}".format(*line["right_by_motion"].get(motion, (0, 0))) for motion in MOTIONS}
        assert f"| 16x | {kind} | {' | '.join(asked.values())} |" in card
    assert card.startswith("---\nlicense: cc-by-4.0\n")


def test_a_student_of_a_published_pipeline_is_published_with_a_tiny_decoder(demo_run, tokenizer, published, tmp_path):
    run, few = shutil.copytree(demo_run / "video-16x", tmp_path / "student"), ["--prompts", "1", "--steps", "1"]
    config = yaml.safe_load((run / "config.yaml").read_text())
    config |= {"init": str(published), "few_steps": {"steps": 4, "guidance": 3.0, "teacher_steps": 12}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    tiny = tmp_path / "tiny"
    tiny_decoder_for(load_tokenizer(tokenizer), width=8, layers=1).save_pretrained(tiny)
    out, decoder = tmp_path / "checkpoints" / "fast", ["--tiny-decoder", str(tiny)]
    publish.main(["pipeline", str(run / "pipeline"), "--tokenizer", str(tokenizer), "--out", str(out), *decoder, *few])
    pipe = load_pipeline(out)
    pipe.enable_tiny_decoder()
    assert pipe("a red disc", num_inference_steps=1).frames.shape == (1, 17, 32, 32, 3)
    card = (out / "README.md").read_text()
    assert f"The first training starts from {published}. Every training" in card
    assert "| 12 steps, guidance 3, to 4 |" in card
    assert "# pipe.enable_tiny_decoder() decodes faster" in card


def test_the_adapters_of_a_student_are_published_for_the_pipeline_they_were_trained_on(
    demo_run, published, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    video, record = shutil.copytree(published, Path("checkpoints/video")), Path("record.jsonl")
    options = {
        "config": demo_run / "video-16x" / "config.yaml",
        "init": video,
        "model": "null",
        "output-dir": "run",
        "lora": "{rank: 2}",
        "few-steps": "{steps: 2, teacher_steps: 4}",
        "optimization.steps": 1,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    folder = train_pipeline(parse_config(DiffusionConfig, words, ""))
    assert folder == Path("run/lora")
    out = Path("checkpoints/fast")
    few = ["--prompts", "3", "--record", str(record)]
    publish.main(["lora", str(folder), "--pipeline", str(video), "--out", str(out), *few])
    assert {file.name for file in out.iterdir()} == {LORA, "README.md"}
    trained, weights = (load_file(place / LORA) for place in (folder, out))
    assert {name: weight.bfloat16() for name, weight in trained.items()}.keys() == weights.keys()
    assert all(torch.equal(trained[name].bfloat16(), weight) for name, weight in weights.items())
    sampling = {"temporal_ratios": [16], "num_inference_steps": 2, "guidance_scale": 1.0}
    assert recorded_sampling(out / LORA) == sampling
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert [(line["ratio"], line.get("unseen"), line.get("lora")) for line in lines] == [
        (16, kind, str(out)) for kind in (False, True, None)
    ]
    assert [(line["steps"], line["guidance"]) for line in lines[:2]] == [(2, 1.0)] * 2
    card = (out / "README.md").read_text()
    assert "LoRA adapters for the transformer of `checkpoints/video`, trained at 16x, and sampled in 2 steps without" in card
    assert "temporal_ratio=16, num_inference_steps=2, guidance_scale=1)" in card
    assert "| 4 steps, guidance 4, to 2 |" in card
    assert "The first training starts from checkpoints/video. " in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(compile(code, "card", "exec"), {})
    assert Path("video.mp4").stat().st_size > 500

    with pytest.raises(UserError, match=r"16x: no pytorch_lora_weights\.safetensors there; give RUN/lora"):
        publish.main(["lora", "run/16x", "--pipeline", str(video), "--out", "other"])
    earlier = Path(shutil.copytree("run", "earlier")) / "lora" / LORA
    earlier.write_bytes(save(load_file(earlier)))  # without metadata
    with pytest.raises(UserError, match=r"states no temporal ratios; delete earlier/lora and run"):
        publish.main(["lora", "earlier/lora", "--pipeline", str(video), "--out", "other"])
    other = load_pipeline(video)
    with torch.no_grad():
        next(other.transformer.parameters()).add_(1)
    other.save_pretrained("checkpoints/other")
    with pytest.raises(UserError, match=r"--pipeline .*other: 1 weights are not those of the adapters' training, "):
        publish.main(["lora", str(folder), "--pipeline", "checkpoints/other", "--out", "other"])


def test_publishing_again_keeps_the_tokenizer_beside_it(demo_run, tokenizer):
    source, out = demo_run / "video-16x" / "pipeline", tokenizer.parent / "again"
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in tokenizer.iterdir()}
    (out / "vae").parent.mkdir()
    (out / "vae").symlink_to(tokenizer)
    (out / "model_index.json").write_text("{}")
    for _ in range(2):
        publish.main(
            ["pipeline", str(source), "--tokenizer", str(tokenizer), "--out", str(out), "--prompts", "1", "--steps", "1"]
        )
    assert not (out / "vae").is_symlink()
    assert before == {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in tokenizer.iterdir()}


def test_the_cards_batch_is_that_of_all_processes(tmp_path):
    (tmp_path / "config.yaml").write_text("optimization: {batch_size: 4, accumulate: 3}\n")
    assert publish.samples_a_step(tmp_path) == 12
    for step, batch in (("step-00000002", 12), ("step-00000010", 24)):
        (tmp_path / "16x" / step).mkdir(parents=True)
        (tmp_path / "16x" / step / "state.json").write_text(json.dumps({"global_batch": batch}))
    assert publish.samples_a_step(tmp_path) == 24


def test_the_card_names_the_buckets_or_the_one_size(demo_run, tmp_path):
    run = shutil.copytree(demo_run / "video-16x", tmp_path / "run", ignore=shutil.ignore_patterns("pipeline"))
    config = yaml.safe_load((run / "config.yaml").read_text())
    buckets = [{"frames": 17, "height": 32, "width": 32}, {"frames": 1, "height": 64, "width": 32}]
    for data, shapes in (
        ({"buckets": buckets}, ["17 frames at 32x32", "1 frames at 64x32"]),
        ({"buckets": None, "size": [32, 48]}, ["17 frames at 32x48"]),
    ):
        config["data"] |= data
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        (training,) = publish.list_trainings(run)
        assert clip_shapes(training, " at ") == shapes


def test_mistakes_are_named(demo_run, tokenizer, tmp_path, monkeypatch):
    source = demo_run / "video-16x" / "pipeline"
    other = load_tokenizer(tokenizer)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    save_model(other, tmp_path / "other")
    with pytest.raises(UserError, match="1 weights are not the pipeline's own"):
        publish.main(["pipeline", str(source), "--tokenizer", str(tmp_path / "other"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("a card")
    for option, value, message in (
        ("--prompts", "0", "--prompts 0: at least 1 is needed"),
        ("--guidance", "nan", "--guidance nan: a finite number is needed"),
    ):
        with pytest.raises(UserError, match=message):
            publish.main(
                ["pipeline", str(source), "--tokenizer", str(tokenizer), "--out", str(tmp_path / "out"), option, value]
            )
        assert (tmp_path / "out" / "README.md").read_text() == "a card"
    monkeypatch.chdir(source)  # whose run is known there too
    with pytest.raises(UserError, match="1 weights are not the pipeline's own"):
        publish.main(["pipeline", ".", "--tokenizer", str(tmp_path / "other"), "--out", str(tmp_path / "out")])
    with pytest.raises(UserError, match=r"--out .*: would overwrite \., which this command uses too; give another name"):
        publish.main(["pipeline", ".", "--tokenizer", str(tokenizer), "--out", str(source.parent)])
    shutil.copytree(source, tmp_path / "pipeline")
    with pytest.raises(UserError, match=r"no config\.yaml there; give RUN/pipeline"):
        publish.main(["pipeline", str(tmp_path / "pipeline"), "--tokenizer", str(tokenizer), "--out", str(tmp_path / "out")])
