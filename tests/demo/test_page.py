"""The page while the demo trains: its progress and remaining time, and that it is rewritten from the run's files."""

import dataclasses
import json
import time

import pytest

from promag.demo.config import DemoConfig, stage_folder, video_folder
from promag.demo.figures import Measured, budget_row, curves
from promag.demo.page import LivePage, parts
from promag.reports.demo_report import Report
from promag.training.command_line import parse_config
from promag.training.config import load_yaml


@pytest.fixture
def config(tmp_path) -> DemoConfig:
    return parse_config(DemoConfig, ["--config", "configs/demo.yaml", "--output_dir", str(tmp_path)], "")


def log(folder, *steps, **figures):
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps({"step": step, **figures}) + "\n" for step in steps)


def cache(config, shards, whole=False):
    for ratio in config.ratios:
        folder = config_folder = video_folder(config).parents[1] / "latents" / f"train-{ratio}x"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "fingerprint.json").write_text('{"shard_size": 64}')
        for number in range(shards):
            (folder / f"shard-{number:05d}.safetensors").touch()
        if whole:
            (config_folder / "index.json").touch()


def test_progress_of_a_run_follows_from_its_files(config):
    page = LivePage(config)
    assert page.progress().stage == "1/3 tokenizer, 4x"
    assert page.progress().fraction == 0
    first, second, _, caching, video, last = parts(config)
    whole = sum(part.seconds for part in parts(config))
    steps = config.stages[0].optimization.steps
    log(stage_folder(config, config.stages[0]), 1, steps // 2, loss=1.0)
    with open(stage_folder(config, config.stages[0]) / "metrics.jsonl", "a") as file:
        file.write('{"step": 39')  # a line that is being written
    assert page.progress().fraction == pytest.approx(first.seconds / 2 / whole)
    for stage in config.stages:
        stage_folder(config, stage).mkdir(exist_ok=True)
        (stage_folder(config, stage) / "done.json").touch()
    assert second.done() == 1
    cache(config, shards=4)
    assert page.progress().stage == "2/3 caching latents"
    assert caching.done() == 4 / (config.synthetic_clips / 64)
    cache(config, shards=4, whole=True)
    log(video_folder(config), config.diffusion.steps // 4, loss=1.0)
    assert page.progress().stage == "2/3 text-to-video"
    assert page.progress().fraction == pytest.approx((whole - last.seconds - 0.75 * video.seconds) / whole)
    log(video_folder(config), config.diffusion.steps, loss=1.0)
    assert page.progress().stage == "3/3 samples, scores and timings"
    assert page.progress().fraction == pytest.approx(1 - last.seconds / whole)


def test_the_remaining_time_follows_from_this_calls_speed(config):
    log(stage_folder(config, config.stages[0]), config.stages[0].optimization.steps // 2)  # by an earlier call
    page = LivePage(config)
    assert page.progress().seconds_left is None
    before = page.progress().fraction
    page.started -= 100
    (stage_folder(config, config.stages[0]) / "done.json").touch()
    progress = page.progress()
    expected = 100 / (progress.fraction - before) * (1 - progress.fraction)
    assert progress.seconds_left == pytest.approx(expected, rel=0.01)


def test_it_is_rewritten_until_the_run_is_over(config, tmp_path):
    page = LivePage(config, seconds=0.05)
    page.report = Report(title="a run")
    with page:
        assert "1/3 tokenizer, 4x" in page.write().read_text()
        log(stage_folder(config, config.stages[0]), 20, psnr=21.5)
        deadline = time.monotonic() + 20
        while not json.loads((tmp_path / "report.json").read_text())["curves"]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert json.loads((tmp_path / "report.json").read_text())["curves"] == {"Validation PSNR, dB/4x": [[20.0, 21.5]]}
    assert not page.thread.is_alive()


def test_a_last_stage_by_turns_is_a_part_and_a_curve_of_its_own(config, tmp_path):
    last = config.stages[-1]
    turns = dataclasses.replace(last, growth=None, latent_pretrain_steps=0, trainable="all", by_turns=(4, 8, 16))
    config = dataclasses.replace(config, stages=(*config.stages, turns))
    part = parts(config)[3]
    assert part.name == "1/3 tokenizer, 4x-8x-16x"
    assert part.seconds == pytest.approx(last.frames * last.optimization.batch_size * last.optimization.steps * 0.01)
    log(tmp_path / "tokenizer-run" / "4x-8x-16x", last.optimization.steps // 2, psnr=21.5)
    assert part.done() == pytest.approx(0.5)
    assert curves(config) == {"Validation PSNR, dB/4x-8x-16x": [(last.optimization.steps // 2, 21.5)]}


def test_runs_without_a_scorer_or_growth_are_estimated_shorter(config):
    real = dataclasses.replace(config, videos="folder")
    assert parts(real)[-1].seconds == 30
    assert parts(config)[-1].seconds > 60
    assert load_yaml("configs/demo.yaml")["stages"][0].get("growth") is None
    base, grown = parts(config)[0].seconds, parts(config)[1].seconds
    assert base > grown


def test_tokens_follow_the_spatial_ratio_of_the_tokenizer(config):
    coarse = dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, patch_size=8))
    quality = dict.fromkeys(("psnr", "psnr_std", "psnr_first", "ssim"), 1.0)
    row, coarse_row = (budget_row(c, 4, Measured({4: quality}, {}, {}, {}, {4: 16})) for c in (config, coarse))
    assert (row.tokens, coarse_row.tokens) == (17 * 4 * 4, 17 * 2 * 2)
    assert (row.latent_values_per_pixel, coarse_row.latent_values_per_pixel) == (16 * 17 / 65 / 64, 16 * 17 / 65 / 256)
    assert parts(config)[4].seconds == 4 * parts(coarse)[4].seconds


def test_a_dual_level_has_more_latent_values(config):
    quality = dict.fromkeys(("psnr", "psnr_std", "psnr_first", "ssim"), 1.0)
    plain, dual = (budget_row(config, 16, Measured({16: quality}, {}, {}, {}, {16: n})) for n in (16, 32))
    assert dual.latent_values_per_pixel == 2 * plain.latent_values_per_pixel


def test_a_cache_that_begins_and_one_of_videos_have_their_share(config):
    folder = video_folder(config).parents[1] / "latents" / "train-4x"
    folder.mkdir(parents=True)
    caching = next(part for part in parts(config) if "caching" in part.name)
    assert caching.done() == 0  # made, but the fingerprint is not written yet
    (folder / "fingerprint.json").write_text('{"shard_size": 64}')
    (folder / "shard-00000.safetensors").touch()
    index = folder.parents[1] / "clips" / "train.jsonl"
    index.parent.mkdir()
    index.write_text("{}\n" * 128)
    real = dataclasses.replace(config, videos="folder")
    assert next(part for part in parts(real) if "caching" in part.name).done() == 0.5
