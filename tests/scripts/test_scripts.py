"""All other scripts at their smallest size, with the demo's tokenizer and pipelines, and users' mistakes."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from promag.data.video import decode_strictly, read_frames
from promag.scripts import (
    cache_latents,
    evaluate_tokenizer,
    reconstruct,
    sample,
    train_diffusion,
    train_tokenizer,
)
from promag.tokenizer.autoencoder import AutoencoderKLProMAG
from promag.tokenizer.tiny_decoder import TinyDecoder
from promag.tokenizer.tiny_training import tiny_decoder_for
from promag.training.command_line import run_main
from promag.training.config import UserError
from tests.conftest import TINY, make_tokenizer
from tests.processes import run_python
from tests.scripts.conftest import LOOP, TINY_MODEL, overrides

RUN = {"log_every": 1, "validate_every": 2, "save_every": 2, "workers": 0}


def tokenizer_arguments(folder, **data):
    data = {
        "train": "synthetic",
        "extra_sources": None,
        "validation": "synthetic",
        "synthetic_clips": 4,
        "size": 32,
        "temporal_strides": [1],
        "validation_clips": 2,
        **data,
    }
    stages = {str(i): {"frames": 1 + 4 * 2**i, "latent_pretrain_steps": 0, "optimization": LOOP} for i in range(3)}
    values = {"output_dir": str(folder), "precision": "fp32", "model": TINY_MODEL, "data": data, "stages": stages, "run": RUN}
    return ["--config", "configs/tokenizer/tiny.yaml", *overrides(values)]


def diffusion_arguments(folder, tokenizer, **change):
    values = {
        "output_dir": str(folder),
        "tokenizer": str(tokenizer),
        "precision": "fp32",
        "text": {"width": 16, "layers": 1, "heads": 2},
        "model": {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8},
        "data": {
            "synthetic_clips": 3,
            "validation_clips": 2,
            "frames": 17,
            "size": 32,
            "cache": str(folder / "latents"),
            "shard_size": 1,
        },
        "optimization": LOOP,
        "samples": None,
        "run": RUN,
        **change,
    }
    return ["--config", "configs/diffusion/tiny.yaml", *overrides(values)]


def encoder(model, max_length=8, weights=None):
    return {"model": str(model), "weights": weights, "max_length": max_length}


def write_t5(folder):
    from transformers import T5Config, T5EncoderModel

    from promag.diffusion.text import learn_vocabulary

    vocabulary = learn_vocabulary(["a red disc"], 300)
    torch.manual_seed(0)  # with some random weights training is so sensitive to rounding that two processes seem to differ
    t5 = T5EncoderModel(T5Config(vocab_size=len(vocabulary), d_model=12, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    for part in (t5, vocabulary):
        part.save_pretrained(folder)
    return t5


def test_train_tokenizer_on_real_files(video_folder, tmp_path, capsys):
    from promag.scripts import prepare_clips

    for split in ("train", "eval"):
        prepare_clips.main([str(video_folder), "--split", split, "--out", str(tmp_path / f"{split}.jsonl")])
    clips = {"train": str(tmp_path / "train.jsonl"), "validation": str(tmp_path / "eval.jsonl")}
    train_tokenizer.main(tokenizer_arguments(tmp_path / "run", **clips, temporal_strides=[1, 2]))
    assert f"tokenizer: {tmp_path / 'run' / 'tokenizer'}" in capsys.readouterr().out
    shape = ["--frames", "17", "--size", "32", "--perceptual"]  # none
    evaluate_tokenizer.main([str(tmp_path / "run" / "tokenizer"), "--videos", str(video_folder), *shape])
    printed = [line for line in capsys.readouterr().out.splitlines() if "psnr" in line]
    assert [line.split()[0] for line in printed if "lifted" not in line and "control" not in line] == ["4x", "8x", "16x"]
    assert [line.split(":")[1].split("  psnr")[0] for line in printed if "control" in line] == [
        f" 4x on one frame of {step}, the others interpolated{way}" for step in (2, 4) for way in ("", " along their motion")
    ]
    assert [line.split()[2] for line in printed if "lifted" in line] == ["4x", "4x", "8x"]


def test_evaluate_tokenizer_agrees_with_the_report(demo_run, tmp_path, capsys):
    arguments = [str(demo_run / "tokenizer-run" / "tokenizer"), "--videos", "synthetic", "--count", "2", "--frames", "17"]
    arguments += ["--size", "32", "--precision", "fp32", "--perceptual"]  # none
    out, record = tmp_path / "out.json", tmp_path / "results.jsonl"
    evaluate_tokenizer.main([*arguments, "--out", str(out), "--record", str(record)])
    results = json.loads(out.read_text())["ratios"]
    report = json.loads((demo_run / "report.json").read_text())["rows"]
    for row in report:
        assert results[str(row["ratio"])]["psnr"] == pytest.approx(row["psnr"], abs=1e-4)
    recorded = json.loads(record.read_text())
    assert recorded["ratios"] == results
    assert recorded["training"]["seed"] == 0
    assert {name: stage["steps"] for name, stage in recorded["training"]["stages"].items()} == {"4x": 2, "8x": 2, "16x": 2}


def test_evaluate_tokenizer_compares_with_the_one_before(tmp_path, capsys):
    for name, levels, settle in (("before", 2, 0.05), ("after", 2, 0.06), ("small", 1, 0.05)):
        make_tokenizer(levels=levels, settle=settle).save_pretrained(tmp_path / name)
    AutoencoderKLProMAG(**{**TINY, "strides": ((1, 2), (2, 1))}).save_pretrained(tmp_path / "2x")
    before, after, record = str(tmp_path / "before"), str(tmp_path / "after"), tmp_path / "results.jsonl"
    shape = ["--videos", "synthetic", "--count", "2", "--frames", "9", "--size", "32", "--precision", "fp32"]
    shape += ["--perceptual"]  # none
    evaluate_tokenizer.main([after, *shape, "--against", before, "--rounds", "1", "--record", str(record)])
    evaluate_tokenizer.main([before, *shape, "--record", str(record)])
    first, second = (json.loads(line) for line in record.read_text().splitlines())
    rows = first["against"]["ratios"]
    assert rows.keys() == {"4", "8"}
    for ratio in ("4", "8"):
        assert rows[ratio].keys() == {"before", "after", "after on latents of before"}
        assert rows[ratio]["after"]["psnr"] == first["ratios"][ratio]["psnr"]
        assert rows[ratio]["before"]["psnr"] == pytest.approx(second["ratios"][ratio]["psnr"])
    assert "against" not in second
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "before:" in line] == [f"4x, before: {before}", f"8x, before: {before}"]
    assert len([line for line in lines if line.startswith("decode_seconds")]) == 2
    capsys.readouterr()
    evaluate_tokenizer.main([after, *shape, "--against", str(tmp_path / "small"), "--rounds", "1"])
    assert [line for line in capsys.readouterr().out.splitlines() if "before:" in line] == [f"4x, before: {tmp_path / 'small'}"]
    with pytest.raises(UserError, match=r"--against .*2x: has 2x, .*after has 4x, 8x: no ratio in both"):
        evaluate_tokenizer.main([after, *shape, "--against", str(tmp_path / "2x")])


def test_evaluate_tokenizer_compares_with_a_tiny_decoder(tmp_path, capsys):
    tokenizer = make_tokenizer(levels=2, settle=0.05)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    tiny_decoder_for(tokenizer, width=8, layers=1).save_pretrained(tmp_path / "tiny")
    shape = ["--videos", "synthetic", "--count", "2", "--frames", "9", "--size", "32", "--precision", "fp32", "--rounds", "1"]
    call = [str(tmp_path / "tokenizer"), *shape, "--perceptual", "--tiny-decoder"]
    evaluate_tokenizer.main([*call, str(tmp_path / "tiny"), "--record", str(tmp_path / "results.jsonl")])
    record = json.loads((tmp_path / "results.jsonl").read_text())
    rows = record["tiny_decoder"]["ratios"]
    assert rows.keys() == {"4", "8"}
    for ratio, row in rows.items():
        assert row.keys() == {"tokenizer", "tiny decoder"}
        assert row["tokenizer"]["psnr"] == record["ratios"][ratio]["psnr"] != row["tiny decoder"]["psnr"]
        assert row["tiny decoder"]["decoder_parameters"] < row["tokenizer"]["decoder_parameters"]
        assert row["tiny decoder"]["decode_seconds"] > 0
    assert f"4x, tiny decoder: {tmp_path / 'tiny'}" in capsys.readouterr().out.splitlines()
    TinyDecoder((4, 8, 16), (4, 4, 4)).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"--tiny-decoder .*other: tiny decoder: its temporal ratios are \(4, 8, 16\)"):
        evaluate_tokenizer.main([*call, str(tmp_path / "other")])


def test_the_contact_sheet_draws_the_clips_with_most_motion(demo_run, tmp_path, capsys):
    tokenizer, out = demo_run / "tokenizer-run" / "tokenizer", tmp_path / "new" / "sheet.png"
    arguments = [str(tokenizer), "--videos", "synthetic", "--count", "4", "--frames", "17", "--size", "32"]
    arguments += ["--contact-sheet", str(out), "--perceptual"]  # none
    evaluate_tokenizer.main([*arguments, "--also", f"again={tokenizer}:16"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.endswith("dB")]
    assert [line[2] for line in lines] == ["4x", "8x", "16x", "again"] * 3
    assert all(high[3:] == again[3:] for high, again in zip(lines[2::4], lines[3::4], strict=True))
    clips = [line[1] for line in lines[::4]]
    assert len(set(clips)) == 3
    with Image.open(out) as image:
        whole = image.size
    evaluate_tokenizer.main([*arguments, "--clips", clips[1], "--across", "3"])
    assert [line.split() for line in capsys.readouterr().out.splitlines() if line.endswith("dB")] == lines[4:7]
    with Image.open(out) as image:
        assert image.width < whole[0]
        assert image.height < whole[1] / 3
    make_tokenizer(levels=1, base={**TINY, "patch_size": 16}).save_pretrained(tmp_path / "coarse")
    for change, message in (
        (["--also", f"a={tokenizer}"], "NAME=CHECKPOINT:RATIO is needed"),
        (["--also", f"a={tokenizer}:12"], "temporal ratio 12: this tokenizer has 4x, 8x, 16x"),
        (["--clips", "4"], "--clips 4: there are 0 to 3"),
        (["--contact-sheet", "sheet.jpg"], r"sheet\.jpg: a \.png file is needed"),
        (["--also", f"a={tmp_path / 'coarse'}:4", "--size", "48"], "--also a=.*:4: height 48: needs a multiple of 32"),
        *(([f"--{name}", "0"], f"--{name} 0: at least 1 is needed") for name in ("across", "scale", "rounds", "count")),
    ):
        with pytest.raises(UserError, match=message):
            evaluate_tokenizer.main([*arguments, *change])
    (tmp_path / "file").touch()
    unwritable = ["--count", "1", "--contact-sheet", str(tmp_path / "file" / "a.png")]
    with pytest.raises(UserError, match=r"--contact-sheet .*a\.png: cannot be written: Not a directory"):
        evaluate_tokenizer.main([*arguments, *unwritable, "--out", str(tmp_path / "a.json")])
    assert not (tmp_path / "a.json").exists()


def test_reconstruct_puts_every_ratio_beside_the_original(demo_run, video_folder, tmp_path, capsys):
    tokenizer = str(demo_run / "tokenizer-run" / "tokenizer")
    results = []
    for chunk in ("16", "32"):
        out = tmp_path / f"{chunk}.mp4"
        reconstruct.main([tokenizer, str(video_folder / "v0.mp4"), "--out", str(out), "--chunk", chunk])
        facts = decode_strictly(out)
        assert (facts.frames, facts.height, facts.width, facts.fps) == (20, 64, 4 * 64 + 3 * 4, 10)
        printed = [line.split("dB")[0].split() for line in capsys.readouterr().out.splitlines() if "psnr" in line]
        results.append({line[0]: float(line[2]) for line in printed})
    assert results[0] == pytest.approx(results[1], abs=0.011)  # printed with two digits
    assert list(results[0]) == ["4x", "8x", "16x"]
    original = read_frames(video_folder / "v0.mp4", range(20)).astype(int)
    shown = read_frames(tmp_path / "16.mp4", range(20))[:, :, :64].astype(int)
    assert np.abs(shown - original).mean() < 6  # H.264 twice
    reconstruct.main(
        [tokenizer, str(video_folder / "v0.mp4"), "--out", str(out), "--ratios", "4", "--frames", "3", "--tile", "32"]
    )
    assert decode_strictly(out).frames == 3
    with pytest.raises(UserError, match="chunk of 24 frames: 16x needs"):
        reconstruct.main([tokenizer, str(video_folder / "v0.mp4"), "--out", str(out), "--chunk", "24"])
    with pytest.raises(UserError, match="temporal ratio 5: this tokenizer has 4x"):
        reconstruct.main([tokenizer, str(video_folder / "v0.mp4"), "--out", str(out), "--ratios", "5"])


def test_train_diffusion_at_another_ratio(demo_run, tmp_path, capsys):
    tokenizer = demo_run / "tokenizer-run" / "tokenizer"
    arguments = diffusion_arguments(tmp_path, tokenizer, budgets=[{"ratio": 8, "share": 1}])
    cache_latents.main(arguments)
    assert json.loads((tmp_path / "latents" / "train-8x" / "index.json").read_text())["shape"] == [4, 3, 4, 4]
    train_diffusion.main(arguments)
    assert f"pipeline: {tmp_path / 'pipeline'}" in capsys.readouterr().out
    config = json.loads((tmp_path / "pipeline" / "transformer" / "config.json").read_text())
    assert list(config["latents_mean"]) == ["8"]
    lines = [json.loads(x) for x in (tmp_path / "8x" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines if "loss" in r] == [1, 2]
    assert [r["step"] for r in lines if "validation_loss" in r] == [2]


def test_samples_while_training_are_videos_in_tensorboard(demo_run, tmp_path):
    """The noise is the same each time; the last samples equal the finished pipeline's, which has the same weights."""
    from promag import ProMAGPipeline
    from promag.pipelines.sampling import sample_videos
    from tests.training.test_trackers import shown_videos

    prompts = ["a red disc", "a blue plus moves up"]
    samples = {"prompts": prompts, "every": 2, "steps": 2, "guidance": 2.0}
    loop = {**LOOP, "steps": 4, "learning_rate": 0.01}
    train_diffusion.main(
        diffusion_arguments(tmp_path, demo_run / "tokenizer-run" / "tokenizer", samples=samples, optimization=loop)
    )
    results = shown_videos(tmp_path)
    assert sorted(results) == [f"16x/{i} {prompt}" for i, prompt in enumerate(prompts)]
    pipe = ProMAGPipeline.from_pretrained(tmp_path / "pipeline")
    for name, expected in zip(sorted(results), sample_videos(pipe, prompts, 2, 2.0, name=None), strict=True):
        assert [step for step, _, _ in results[name]] == [2, 4]
        first, last = (video.astype(int) for _, video, _ in results[name])
        assert last.shape == (17, 32, 32, 3)
        assert np.abs(last - expected).mean() < 3  # 256 colours a frame
        assert np.abs(last - expected).mean() < np.abs(first - expected).mean()
    with pytest.raises(UserError, match="samples every 3: a multiple of validate_every, 2, is needed"):
        train_diffusion.main([*diffusion_arguments(tmp_path, "none"), *overrides({"samples": {**samples, "every": 3}})])


def test_one_model_is_trained_at_several_budgets_and_samples_at_each(demo_run, tmp_path):
    from promag import ProMAGPipeline

    tokenizer, loop = demo_run / "tokenizer-run" / "tokenizer", {**LOOP, "steps": 6}
    budgets = [{"ratio": ratio, "share": share} for ratio, share in ((16, 2), (4, 1), (8, 1))]
    train_diffusion.main(diffusion_arguments(tmp_path, tokenizer, optimization=loop, budgets=budgets))
    lines = [json.loads(x) for x in (tmp_path / "16x-4x-8x" / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "validation_loss" in line][-1]
    by_ratio = [last[f"validation_loss_{ratio}x"] for ratio in (4, 8, 16)]
    assert last["validation_loss"] == pytest.approx(sum(by_ratio) / 3)
    tokens = {round(line["tokens_per_second"] / line["samples_per_second"]) for line in lines if "loss" in line}
    assert tokens <= {2 * 4, 3 * 4, 5 * 4}
    assert len(tokens) > 1
    pipe = ProMAGPipeline.from_pretrained(tmp_path / "pipeline")
    assert list(pipe.transformer.config["temporal_ratios"]) == [16, 4, 8]
    frames = {r: pipe("a red disc", num_inference_steps=1, temporal_ratio=r).frames for r in (None, 16, 8, 4)}
    assert all(video.shape == (1, 17, 32, 32, 3) for video in frames.values())
    latents = {r: pipe("a", num_inference_steps=1, temporal_ratio=r, output_type="latent").frames for r in (16, 8, 4)}
    assert [x.shape[2] for x in latents.values()] == [2, 3, 5]


def test_a_frozen_text_encoder_by_path(demo_run, tmp_path):
    from transformers import T5EncoderModel

    from promag import ProMAGPipeline

    t5 = write_t5(tmp_path / "t5")
    text = {"encoders": [encoder(tmp_path / "t5")]}
    train_diffusion.main(diffusion_arguments(tmp_path / "run", demo_run / "tokenizer-run" / "tokenizer", text=text))
    kept = load_file(tmp_path / "run" / "pipeline" / "text_encoder" / "model.safetensors")
    before = t5.state_dict()
    assert len(kept) > 5
    assert all(torch.equal(value, before[name]) for name, value in kept.items())
    pipe = ProMAGPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert type(pipe.text_encoder) is T5EncoderModel
    assert pipe.text_encoder_2 is None
    assert pipe("a red disc", num_inference_steps=1).frames.shape == (1, 17, 32, 32, 3)


def test_three_text_encoders_at_once(demo_run, tmp_path):
    """A cached frozen T5, a jointly trained small CLIP, and a frozen OpenCLIP tower make one pipeline."""
    from transformers import CLIPTextModel, T5EncoderModel

    from promag import OpenCLIPTextModel, ProMAGPipeline
    from tests.diffusion.test_text import OPEN_CLIP, write_openclip

    write_t5(tmp_path / "t5")
    tower = write_openclip(tmp_path / "open", OPEN_CLIP)
    encoders = [encoder(tmp_path / "t5"), encoder("small", 12), encoder(f"open_clip:local-dir:{tower}", 14)]
    arguments = diffusion_arguments(
        tmp_path / "run",
        demo_run / "tokenizer-run" / "tokenizer",
        text={"encoders": encoders, "width": 16, "layers": 1, "heads": 2},
    )
    cache_latents.main(arguments)
    train_diffusion.main(arguments)
    pipe = ProMAGPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    kinds = [type(part) for part in (pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3)]
    assert kinds == [T5EncoderModel, CLIPTextModel, OpenCLIPTextModel]
    assert pipe.transformer.config["text_dim"] == [12, 16, 16]
    assert pipe.transformer.config["pooled_dim"] == 16 + 24
    assert [part.shape for part in pipe.encode_prompt("a red disc")[0]] == [(1, 8, 12), (1, 12, 16), (1, 14, 16)]
    assert pipe("a red disc", num_inference_steps=1).frames.shape == (1, 17, 32, 32, 3)
    cached = {path.name for path in (tmp_path / "run" / "latents").iterdir() if path.is_dir()}
    assert cached == {f"{split}-{what}" for split in ("train", "eval") for what in ("16x", "text-1", "text-3")}
    changed = overrides({"text": {"encoders": [encoders[2], *encoders[1:]]}})
    with pytest.raises(UserError, match="train-text-1: was made from another text encoder"):
        cache_latents.main([*arguments, *changed])


def test_interrupted_diffusion_is_bit_for_bit_the_same(demo_run, tmp_path):

    tokenizer, loop = demo_run / "tokenizer-run" / "tokenizer", {**LOOP, "steps": 4}
    train_diffusion.main(diffusion_arguments(tmp_path / "whole", tokenizer, optimization=loop))
    for _ in range(2):
        train_diffusion.main(
            diffusion_arguments(tmp_path / "parts", tokenizer, optimization=loop, run={**RUN, "stop_after": 2})
        )
    for part in ("transformer/diffusion_pytorch_model", "text_encoder/model"):
        a, b = (load_file(tmp_path / run / "pipeline" / f"{part}.safetensors") for run in ("whole", "parts"))
        assert all((a[k] == b[k]).all() for k in a)


def test_sample_writes_what_the_pipeline_gives(demo_run, tmp_path, capsys):
    pipeline = str(demo_run / "video-16x" / "pipeline")
    prompts = ["--prompt", "a red disc grows", "--prompt", "a blue plus moves up"]
    sample.main([pipeline, *prompts, "--frames", "33", "--steps", "2", "--out", str(tmp_path / "v.mp4")])
    for i in range(2):
        facts = decode_strictly(tmp_path / f"v-0{i}.mp4")
        assert (facts.frames, facts.height, facts.width, facts.fps) == (33, 32, 32, 16)
    first = read_frames(tmp_path / "v-00.mp4", range(33))
    sample.main([pipeline, *prompts[:2], "--frames", "33", "--steps", "2", "--out", str(tmp_path / "again.mp4")])
    assert np.array_equal(first, read_frames(tmp_path / "again.mp4", range(33)))


def test_sample_starts_from_an_image_or_a_clip(demo_run, video_folder, tmp_path):
    from PIL import Image

    pipeline, clip = str(demo_run / "video-16x" / "pipeline"), video_folder / "v0.mp4"
    frames = read_frames(clip, [0, 19])
    Image.fromarray(frames[1]).save(tmp_path / "last.png")
    samples = []
    for name, opening in (("image", tmp_path / "last.png"), ("video", clip)):
        out = tmp_path / f"{name}.mp4"
        sample.main([pipeline, "--prompt", "a", "--steps", "1", "--out", str(out), f"--{name}", str(opening)])
        samples.append(read_frames(out, range(17)).astype(int))
    # There are two latent frames and one must be generated, so only the clip's last frame, the image, is conditioning.
    assert np.abs(samples[0] - samples[1]).mean() < 3
    sample.main([pipeline, "--prompt", "a", "--steps", "1", "--out", str(tmp_path / "free.mp4")])
    assert np.abs(samples[0] - read_frames(tmp_path / "free.mp4", range(17))).mean() > 3
    with pytest.raises(UserError, match=r"nowhere\.png: No such file"):
        sample.main([pipeline, "--prompt", "a", "--out", str(tmp_path / "v.mp4"), "--image", "nowhere.png"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budgets": [{"ratio": 32, "share": 1}], "data": {"frames": 33}}, "temporal ratio 32: this tokenizer has 4x, 8x, 16x"),
        ({"budgets": [{"ratio": 8, "share": 1}, {"ratio": 8, "share": 2}]}, r"budgets \[8, 8\]: one or more ratios"),
        ({"budgets": [{"ratio": 8, "share": 0}]}, r"budget 8x, share 0\.0: must be above 0"),
        ({"data": {"frames": 20}}, "20 frames: 16x needs"),
        ({"data": {"size": 40, "frames": 17}}, "not divisible by patch"),
        ({"tokenizer": "nowhere"}, "tokenizer nowhere: no config.json"),
        ({"modle": 1}, "unknown key modle"),
        ({"attention": "flash"}, "flash does not work on cpu"),
        ({"text": {"encoders": [encoder("nowhere")]}}, "text encoder nowhere: cannot be loaded"),
        ({"text": {"encoders": [encoder("small"), encoder("small")]}}, "the small one at most once"),
        ({"text": {"encoders": []}}, r"text encoders \[\]: one to three are needed"),
        ({"data": {"train": "nowhere.jsonl", "frames": 17}}, "nowhere.jsonl"),
    ],
)
def test_diffusion_mistakes_are_named(demo_run, tmp_path, change, message):
    base = diffusion_arguments(tmp_path, demo_run / "tokenizer-run" / "tokenizer")
    with pytest.raises(UserError, match=message):
        train_diffusion.main([*base, *overrides(change)])


def test_a_cache_of_another_tokenizer_is_refused(demo_run, tmp_path):
    cache = overrides({"data": {"cache": str(demo_run / "latents")}})
    arguments = diffusion_arguments(tmp_path, demo_run / "tokenizer-run" / "tokenizer")
    with pytest.raises(UserError, match="was made from other clips"):
        cache_latents.main([*arguments, *cache])


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (train_tokenizer, ["--config", "none.yaml"], "config none.yaml: No such file or directory"),
        (sample, ["nowhere", "--prompt", "a", "--out", "a.mp4"], "pipeline nowhere: no model_index.json there"),
        (evaluate_tokenizer, ["nowhere", "--videos", "synthetic"], "tokenizer nowhere: no config.json there"),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2(monkeypatch, capsys, script, arguments, message):
    monkeypatch.setattr(sys, "argv", [script.__file__, *arguments])
    assert run_main(script.main) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_a_script_run_as_a_file_exits_with_the_status():
    code = "import runpy; runpy.run_path('scripts/sample.py', run_name='__main__')"
    done = run_python(code, "nowhere", "--prompt", "a", "--out", "a.mp4")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "pipeline nowhere: no model_index.json there" in done.stderr


def test_sample_and_evaluate_name_illegal_sizes(demo_run, tmp_path):
    pipeline = str(demo_run / "video-16x" / "pipeline")
    with pytest.raises(UserError, match=r"20 frames: 16x needs 1 \+ 16k"):
        sample.main([pipeline, "--prompt", "a", "--frames", "20", "--out", str(tmp_path / "v.mp4")])
    with pytest.raises(UserError, match="60 frames: 16x needs"):
        evaluate_tokenizer.main([pipeline, "--videos", "synthetic", "--frames", "60"])
