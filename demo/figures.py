"""Measurements of the trained demo for its report: reconstructions, samples, prompt accuracy and seconds."""

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from promag.data.datasets import open_dataset
from promag.evaluation import synthetic_scorer as scorer
from promag.evaluation.budgets import CodedSize
from promag.evaluation.cost import TransformerAlone, denoising, sampling, train_step
from promag.evaluation.prompt_accuracy import accuracies, accuracies_of_reconstructions, describe, scenes_to_score
from promag.evaluation.speed.step import WeightUpdate
from promag.evaluation.speed.timing import measure_in_turns
from promag.pipelines.sampling import load_pipeline, sample_videos
from promag.reports.demo_report import BudgetRow, ReconstructionClip, Report, SampleClip
from promag.tokenizer.geometry import latent_frames, ratio_names
from promag.tokenizer.metrics import PROTOCOL, evaluate, psnr, to_uint8
from promag.training.files import read_json_lines
from promag.training.precision import Precision, autocast, choose_precision
from promag.training.run import provenance

from .config import SHIPPED, DemoConfig, stage_folder, video_folder

TITLE = "ProMAG demo: one tokenizer, three token budgets"
LEFT_OUT = "Samples of the trained pipeline"  # name of the fact that they are left out
SHOWN = 4  # clips whose reconstructions the page shows
# What text-to-video learns in the demo's minutes. Shapes need a token for each latent position and an hour or more: the
# samples of checkpoints/tiny-video, first on the page, had both.
LEARNED = ("colour", "motion")
Accuracy = Mapping[str, tuple[float, float, float]]  # fraction and 95 % interval, by the part of the prompt
SecondsByRatio = Mapping[str, Mapping[int, float]]  # by name and ratio


@dataclass(frozen=True)
class Measured:
    """Figures by temporal ratio; accuracies are empty for real videos, which have no scorer."""

    quality: Mapping[int, Mapping[str, float]]
    seconds: SecondsByRatio
    accuracy: Mapping[int, Accuracy]
    readable: Mapping[int, Accuracy]
    channels: Mapping[int, int]  # channels of the latents


def read_clips(config: DemoConfig, source: str, count: int) -> list[Mapping[str, Any]]:
    """Return the first clips that are never trained on, at most `count`."""
    clips = open_dataset(source, "eval", config.frames, config.size, count)
    return [clips.fixed(i) for i in range(min(count, len(clips)))]


@torch.no_grad()
def reconstruct(
    model: Any, clips: Sequence[Mapping[str, Any]], precision: Precision, ratios: Sequence[int]
) -> list[ReconstructionClip]:
    """Reconstruct clips at every one of some ratios."""
    shown = []
    for number, clip in enumerate(clips):
        x = clip["video"][None]
        with autocast(model.device, precision):
            outputs = {ratio: model(x.to(model.device), ratio).sample.float().cpu() for ratio in ratios}
        shown.append(
            ReconstructionClip(
                name=f"clip {number}",
                caption=clip["caption"],
                fps=float(clip["fps"]),
                original=to_uint8(x)[0].numpy(),
                by_ratio={ratio: to_uint8(output)[0].numpy() for ratio, output in outputs.items()},
                psnr={ratio: float(psnr(output, x)) for ratio, output in outputs.items()},
            )
        )
    return shown


def shipped_absent(config: DemoConfig) -> str:
    """Return why there are no samples of the pipeline that comes with the project, where its folder is absent; else nothing.

    Another folder than the default, which a user named, must be there.
    """
    absent = config.shipped == SHIPPED and not config.videos and not Path(SHIPPED).exists()
    return f"{SHIPPED} is not in this folder; a checkout of the project has it, and --shipped FOLDER names another" * absent


def sample_shipped(config: DemoConfig) -> tuple[list[SampleClip], list[ReconstructionClip]]:
    """Return samples of the trained pipeline that comes with the project, at its default ratio, and its reconstructions."""
    pipe: Any = load_pipeline(config.shipped or "")
    pipe.set_progress_bar_config(disable=True)
    ratio, scenes = pipe.config["temporal_ratio"], scenes_to_score(config.prompts, config.seed)
    prompts = [scene.caption() for scene in scenes]
    name = f"{config.shipped} {ratio}x"
    videos = sample_videos(pipe, prompts, precision=config.precision, name=name, temporal_ratio=ratio)
    samples = [
        SampleClip(prompt, pipe.config["fps"], {ratio: video}, {ratio: describe(video, scene)})
        for prompt, video, scene in zip(prompts, videos, scenes, strict=True)
    ]
    clips = read_clips(config, "synthetic", 2)
    fitting = [r for r in pipe.vae.temporal_ratios if (config.frames - 1) % r == 0]
    return samples, reconstruct(pipe.vae, clips, config.precision, fitting)


def make_report(config: DemoConfig, model: Any, pipeline: Path, source: str, started: float) -> Report:
    """Reconstruct, sample and measure; return all that the page shows of this run."""
    clips = read_clips(config, source, config.evaluation_clips)
    quality = {r: evaluate(model, (c["video"][None] for c in clips), r, config.precision) for r in model.temporal_ratios}

    pipe: Any = load_pipeline(pipeline)
    pipe.set_progress_bar_config(disable=True)
    scenes = scenes_to_score(max(config.prompts, config.scored), config.seed) if not config.videos else []
    prompts = [scene.caption() for scene in scenes] or [clip["caption"] for clip in clips[: config.prompts]]
    options = {"steps": config.steps, "guidance": config.guidance, "precision": config.precision}
    videos = {r: sample_videos(pipe, prompts, **options, name=f"{r}x videos", temporal_ratio=r) for r in config.ratios}
    scores = {ratio: accuracies(made, scenes) for ratio, made in videos.items()} if scenes else {}
    accuracy = {ratio: {part: score[part] for part in LEARNED} for ratio, score in scores.items()}
    scored = model.temporal_ratios if scenes else ()
    readable = {r: accuracies_of_reconstructions(model, clips, r, config.precision) for r in scored}
    channels = dict(zip(model.temporal_ratios, model.level_channels, strict=True))
    measured = Measured(quality, measure_seconds(config, pipe, prompts[: config.prompts]), accuracy, readable, channels)
    return Report(
        title=TITLE,
        summary=summarise(config, measured),
        rows=[budget_row(config, ratio, measured) for ratio in model.temporal_ratios],
        chance=scorer.chance() if scenes else None,
        reconstructions=reconstruct(model, clips[:SHOWN], config.precision, model.temporal_ratios),
        samples=[
            SampleClip(
                prompt=prompt,
                fps=pipe.config["fps"],
                by_ratio={ratio: videos[ratio][i] for ratio in config.ratios},
                read={r: describe(videos[r][i], scenes[i]) for r in config.ratios} if scenes else None,
            )
            for i, prompt in enumerate(prompts[: config.prompts])
        ],
        curves=curves(config),
        facts=facts(config, len(clips), len(scenes), len(prompts[: config.prompts]), started),
    )


def measure_seconds(config: DemoConfig, pipe: Any, prompts: Sequence[str]) -> SecondsByRatio:
    """Measure at each ratio a training step, denoising one video, and sampling one from text to pixels."""
    batch, steps, count = config.diffusion.batch_size, config.steps, len(prompts)
    trained, transformer = copy.deepcopy(pipe.transformer), pipe.transformer
    precision = choose_precision(config.precision, trained.device)
    update = WeightUpdate(TransformerAlone(trained), config.diffusion, precision)
    training, denoised, sampled = {}, {}, {}
    for ratio in config.ratios:
        size = CodedSize(config.frames, config.size, config.size, ratio, config.tokenizer.spatial_ratio)
        training[ratio] = train_step(trained, size, batch, update, config.precision)
        denoised[ratio] = denoising(transformer, size, steps, count, config.precision)
        sampled[ratio] = sampling(pipe, list(prompts), steps, config.guidance, ratio, config.precision)
    return {
        "train_step_seconds": measure_in_turns(training),
        "denoising_seconds": {r: s / count for r, s in measure_in_turns(denoised, rounds=3).items()},
        "sampling_seconds": {r: s / count for r, s in measure_in_turns(sampled, rounds=3).items()},
    }


def budget_row(config: DemoConfig, ratio: int, measured: Measured) -> BudgetRow:
    """Return one ratio's figures; `missing` has the reasons for those that were not measured."""
    missing: dict[str, str] = {}
    if ratio not in config.ratios:
        untrained = f"no text-to-video model was trained at {ratio}x"
        missing = dict.fromkeys((*measured.seconds, "validation_loss", "accuracy"), untrained)
    elif not measured.readable:
        missing = {"accuracy": "real videos have no scorer"}
    key = f"validation_loss_{ratio}x" if len(config.ratios) > 1 else "validation_loss"
    losses = points(video_folder(config) / "metrics.jsonl", key) if ratio in config.ratios else []
    values = measured.channels[ratio] * latent_frames(config.frames, ratio)
    return BudgetRow(
        ratio=ratio,
        latent_frames=latent_frames(config.frames, ratio),
        tokens=config.tokens(ratio),
        latent_values_per_pixel=values / config.tokenizer.spatial_ratio**2 / config.frames,
        **{key: measured.quality[ratio][key] for key in ("psnr", "psnr_std", "psnr_first", "ssim")},
        **{key: seconds.get(ratio) for key, seconds in measured.seconds.items()},
        validation_loss=losses[-1][1] if losses else None,
        accuracy=measured.accuracy.get(ratio),
        readable=measured.readable.get(ratio),
        missing=missing,
    )


def summarise(config: DemoConfig, measured: Measured) -> list[str]:
    """Return the report's first sentences."""
    low, high = config.ratios[0], config.ratios[-1]
    decibels = ", ".join(f"{values['psnr']:.1f} dB at {ratio}x" for ratio, values in measured.quality.items())
    sentences = [f"One checkpoint reconstructs {config.frames} frames of unseen clips with {decibels}."]
    if low != high:
        faster = {name: seconds[low] / seconds[high] for name, seconds in measured.seconds.items()}
        sentences.append(
            f"With {latent_frames(config.frames, high)} instead of {latent_frames(config.frames, low)} latent frames, "
            f"{high}x text-to-video trains {faster['train_step_seconds']:.1f} times, denoises "
            f"{faster['denoising_seconds']:.1f} times and samples, decoding included, "
            f"{faster['sampling_seconds']:.1f} times as fast as {low}x."
        )
    for ratio, accuracy in measured.accuracy.items():
        parts = ", ".join(f"{part} {value:.0%}" for part, (value, _, _) in accuracy.items())
        sentences.append(f"After {config.diffusion.steps} steps its videos at {ratio}x show what the prompt asks for: {parts}.")
    return sentences


def curves(config: DemoConfig) -> dict[str, list[tuple[float, float]]]:
    """Return the curves logged so far: the validation PSNR of each stage and the training loss of text-to-video."""
    curves_by_name = {
        f"Validation PSNR, dB/{stage.name}": points(stage_folder(config, stage) / "metrics.jsonl", "psnr")
        for stage in config.stages
    }
    curves_by_name["Training loss of text-to-video/"] = points(video_folder(config) / "metrics.jsonl", "loss")
    return {name: values for name, values in curves_by_name.items() if values}


def points(file: Path, key: str) -> list[tuple[float, float]]:
    """Return (step, value) of one key of a metrics file."""
    records = read_json_lines(file) if file.exists() else []
    return [(float(r["step"]), float(r[key])) for r in records if key in r]


def facts(config: DemoConfig, clips: int, scored: int, prompts: int, started: float) -> dict[str, str]:
    """Return the key-value pairs at the report's end."""
    known, diffusion = provenance(), config.diffusion
    optimizers = "AdamW" if diffusion.muon_learning_rate is None else "Muon with AdamW"
    trained = [
        f"{s.name} {s.optimization.steps} steps of {s.optimization.batch_size} clips of {s.frames} frames"
        for s in config.stages
    ]
    pairs = {
        "Commit": known["commit"],
        "Machine": known["machine"],
        "Precision": config.precision,
        "Versions": ", ".join(f"{k} {v}" for k, v in known["versions"].items()),
        "Seed": str(config.seed),
        "This call took": f"{(time.perf_counter() - started) / 60:.1f} minutes",
        "Clips": f"videos of {config.videos}" if config.videos else f"{config.synthetic_clips} generated clips",
        "Tokenizer training": "; ".join(trained),
        "Text-to-video training": (
            f"{diffusion.steps} steps of {diffusion.batch_size} clips, one ratio a step: " + ratio_names(config.ratios)
        ),
        "Reconstruction protocol": f"{clips} unseen clips, {config.frames} frames, {config.size}x{config.size}; {PROTOCOL}",
        "Sampling": (
            f"{config.steps} steps, guidance {config.guidance}; seconds per video in a batch of "
            f"{prompts} prompts: the transformer alone, and from text to pixels"
        ),
        "Train step": f"batch {diffusion.batch_size}, forward, backward and {optimizers}, median of 5 in turns",
    }
    if scored:
        pairs["Prompt accuracy"] = (
            f"{scored} prompts of trained combinations, one video each; Wilson 95 % intervals. Colour and motion alone: "
            "shapes take longer to learn than a demo lasts"
        )
    return pairs
