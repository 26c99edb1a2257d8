"""Run the whole system at a small size and write a page of results.

It grows a tokenizer 4x -> 8x -> 16x, trains text-to-video at 4x and at 16x, and compares them.

What an earlier call trained is used again, and what it left unfinished continues.
"""

import copy
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from promag import ProMAGPipeline
from promag.data.clip_index import save_clips
from promag.data.clips import list_videos, prepare
from promag.data.datasets import open_dataset
from promag.data.tar_stream import IN_ORDER
from promag.diffusion.conditioning import Condition
from promag.diffusion.config import BudgetConfig, DiffusionConfig, DiffusionDataConfig, TextConfig, TransformerConfig
from promag.diffusion.latent_cache import Scale
from promag.evaluation import synthetic_scorer as scorer
from promag.evaluation.cost import denoising, measure_in_turns, sampling, train_step
from promag.evaluation.prompt_accuracy import (
    accuracies,
    accuracies_of_reconstructions,
    describe,
    scenes_to_score,
)
from promag.pipelines.build import cache_latents, train_pipeline
from promag.pipelines.sampling import load_pipeline, sample_videos
from promag.reports.contact_sheet import write_contact_sheet
from promag.reports.demo_report import BudgetRow, ReconstructionClip, Report, SampleClip, write_report
from promag.tokenizer.checkpoint import load_tokenizer
from promag.tokenizer.config import AutoencoderConfig, StageConfig, TokenizerConfig, TokenizerDataConfig
from promag.tokenizer.geometry import SPATIAL_RATIO, latent_frames, tokens
from promag.tokenizer.metrics import PROTOCOL, evaluate, psnr, to_uint8
from promag.tokenizer.train import train_tokenizer
from promag.training.command_line import parse_config, run_main
from promag.training.config import UserError, required, setting, to_plain
from promag.training.device import best_device
from promag.training.files import read_json_lines
from promag.training.loop import RunConfig
from promag.training.optimizers import OptimizationConfig
from promag.training.precision import Precision, autocast, check_training_precision, choose_for_run
from promag.training.run import append_result, provenance


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Sizes and lengths of the demo."""

    output_dir: str = setting("runs/demo", "run directory")
    videos: str | None = setting(None, "folder of real videos, 65 frames or longer; null generates clips")
    record: str | None = setting(None, "results file that gets a JSON line with the report's figures; null for none")
    seed: int = setting(0, "decides weights, data order and noise")
    precision: Precision = setting("auto", "auto measures which of bf16 and fp32 is faster")
    size: int = setting(64, "height and width in pixels")
    frames: int = setting(65, "frames that text-to-video is trained on and samples: 1 + 16k")
    synthetic_clips: int = setting(1024, "generated clips that are trained on")
    validation_fraction: float = setting(0.1, "part of real videos kept for evaluation, at least one")
    evaluation_clips: int = setting(24, "clips reconstructed for the report's figures")
    shipped: str | None = setting(
        "checkpoints/tiny-video", "trained pipeline whose samples come first, where clips are generated; null for none"
    )
    ratios: tuple[int, ...] = setting((4, 16), "temporal ratios at which text-to-video is trained")
    prompts: int = setting(8, "prompts whose samples are shown")
    scored: int = setting(64, "generated-clip prompts sampled at each ratio and read by the scorer")
    steps: int = setting(16, "denoising steps")
    guidance: float = setting(3.0, "classifier-free guidance")
    tokenizer: AutoencoderConfig = required("the tokenizer's base")
    stages: tuple[StageConfig, ...] = required("the tokenizer's levels")
    text: TextConfig = setting(TextConfig(), "text encoders")
    transformer: TransformerConfig = required("text-to-video transformer")
    caption_dropout: float = setting(0.1, "part of the captions dropped, for guidance")
    shift: float = setting(3.0, "of times towards noise, at 256 tokens")
    condition: Condition = setting(Condition(), "given first frames, for image-to-video and continuation")
    latent_scale: Scale = setting("global", "whether latent channels are scaled each or all alike")
    diffusion: OptimizationConfig = setting(OptimizationConfig(muon_learning_rate=0.02), "optimisation of the transformers")
    run: RunConfig = setting(RunConfig(), "logging, validation, checkpoints")

    def __post_init__(self) -> None:
        """Raise ValueError where ratios and frames do not fit together."""
        check_training_precision(self.precision)
        levels = [stage.ratio for stage in self.stages]
        unknown = [ratio for ratio in self.ratios if ratio not in levels]
        if unknown or not self.ratios:
            raise ValueError(f"ratios {self.ratios}: choose among the stages' {', '.join(map(str, levels))}")
        latent_frames(self.frames, max(levels))


def main(argv: Sequence[str]) -> int:
    """Train, sample, compare, and print where the report and the videos lie."""
    config = parse_config(DemoConfig, argv, __doc__ or "")
    started, run = time.perf_counter(), Path(config.output_dir)
    precision = choose_for_run(config.precision, best_device(), run / "tokenizer-run")
    config = dataclasses.replace(config, precision=precision)
    clips = index_videos(config, run) if config.videos else ("synthetic", "synthetic")
    shipped = sample_shipped(config, run) if config.shipped and not config.videos else []

    say("1/3 tokenizer: 4x, then grown on top of what is frozen below")
    tokenizer = train_tokenizer(tokenizer_config(config, run, *clips))
    if tokenizer is None:
        return stopped()
    say(f"2/3 text-to-video at {' and '.join(f'{r}x' for r in config.ratios)}, on the same number of clips seen")
    trainings = {ratio: diffusion_config(config, run, ratio, tokenizer, *clips) for ratio in config.ratios}
    vae = load_tokenizer(tokenizer)
    for split in ("train", "eval"):  # all ratios in one pass over the clips; the trainings find them cached
        cache_latents(trainings[config.ratios[0]], split, vae, config.ratios)
    pipelines = {}
    for ratio, training in trainings.items():
        folder = train_pipeline(training)
        if folder is None:
            return stopped()
        pipelines[ratio] = folder
    say("3/3 reconstructions, samples and timings")
    report = dataclasses.replace(make_report(config, run, tokenizer, pipelines, clips[1], started), shipped=shipped)
    page = write_report(run, report)
    shown = [(clip.caption, {"original": clip.original, **by_name(clip.by_ratio)}) for clip in report.reconstructions]
    write_contact_sheet(run / "reconstructions.png", shown)
    write_contact_sheet(run / "samples.png", [(clip.prompt, by_name(clip.by_ratio)) for clip in report.samples])
    if config.record:
        figures = json.loads((run / "report.json").read_text(encoding="utf-8"))
        seconds = round(time.perf_counter() - started)
        settings = to_plain(dataclasses.replace(config, record=None))  # where it is recorded is no setting of the run
        record = {"what": "demo", "seed": config.seed, "seconds": seconds, "config": settings}
        append_result(config.record, {**record, "rows": figures["rows"], "facts": figures["facts"]})
    say(f"\nreport: {page}\nfigures: {run / 'report.json'}\nvideos: {run / 'videos'}, frames in *.png beside them")
    return 0


def say(text: str) -> None:
    """Print a line at once, also where the output is a file."""
    print(text, flush=True)


def by_name(videos: Mapping[int, np.ndarray]) -> dict[str, np.ndarray]:
    """Name the videos of each ratio as people write it."""
    return {f"{ratio}x": video for ratio, video in videos.items()}


def stopped() -> int:
    """Say that the demo was interrupted, for which 0 is the right exit status."""
    say("stopped early; the same command continues")
    return 0


def sample_shipped(config: DemoConfig, run: Path) -> list[SampleClip]:
    """Sample the trained pipeline that comes with the project, at its own default ratio, and write the frames at once."""
    say(f"first: samples of {config.shipped}, which was trained before")
    pipe: Any = load_pipeline(config.shipped or "")
    pipe.set_progress_bar_config(disable=True)
    ratio, scenes = pipe.config["temporal_ratio"], scenes_to_score(config.prompts, config.seed)
    how = {"steps": config.steps, "guidance": config.guidance, "precision": config.precision}
    videos = sample_videos(pipe, [s.caption() for s in scenes], **how, name=f"{ratio}x prompts", temporal_ratio=ratio)
    clips = [
        SampleClip(s.caption(), pipe.config["fps"], {ratio: v}, {ratio: describe(v, s)})
        for s, v in zip(scenes, videos, strict=True)
    ]
    run.mkdir(parents=True, exist_ok=True)
    sheet = write_contact_sheet(run / "shipped.png", [(clip.prompt, by_name(clip.by_ratio)) for clip in clips])
    say(f"frames: {sheet}")
    return clips


def index_videos(config: DemoConfig, run: Path) -> tuple[str, str]:
    """Index a folder of videos, a part of them held out, and return both indices; an index that is there is kept."""
    paths = run / "clips" / "train.jsonl", run / "clips" / "eval.jsonl"
    if all(path.exists() for path in paths):
        say(f"clips: the indices in {paths[0].parent} are used again")
        return str(paths[0]), str(paths[1])
    prepared = prepare(list_videos(config.videos or ""))
    for path, reason in prepared.quarantined:
        say(f"left out {path}: {reason}")
    long = sorted((c for c in prepared.clips if c.frames >= config.frames), key=lambda clip: clip.sha256)
    short = len(prepared.clips) - len(long)
    if short:
        say(f"left out {short} of {len(prepared.clips)} videos that are shorter than {config.frames} frames")
    if len(long) < 2:
        raise UserError(
            f"videos {config.videos}: {len(long)} of {len(prepared.clips)} have {config.frames} frames; at least 2 are needed, "
            "one to train on and one to evaluate"
        )
    held = max(1, round(config.validation_fraction * len(long)))
    # Ordered by content, so that names and dates do not decide what is held out.
    for path, part in zip(paths, (long[held:], long[:held]), strict=True):
        save_clips(path, part)
    say(f"clips: {len(long) - held} to train on, {held} held out")
    return str(paths[0]), str(paths[1])


def tokenizer_config(config: DemoConfig, run: Path, train: str, evaluation: str) -> TokenizerConfig:
    """Return the tokenizer training that the demo's settings mean."""
    return TokenizerConfig(
        output_dir=str(run / "tokenizer-run"),
        seed=config.seed,
        precision=config.precision,
        model=config.tokenizer,
        data=TokenizerDataConfig(
            train=train,
            validation=evaluation,
            synthetic_clips=config.synthetic_clips,
            size=config.size,
            temporal_strides=(1,),
            validation_clips=8,
            sharding=IN_ORDER,
        ),
        stages=config.stages,
        run=config.run,
    )


def diffusion_config(
    config: DemoConfig, run: Path, ratio: int, tokenizer: Path, train: str, evaluation: str
) -> DiffusionConfig:
    """Return the text-to-video training at one ratio that the demo's settings mean."""
    return DiffusionConfig(
        output_dir=str(run / f"video-{ratio}x"),
        seed=config.seed,
        precision=config.precision,
        tokenizer=str(tokenizer),
        budgets=(BudgetConfig(ratio=ratio),),
        caption_dropout=config.caption_dropout,
        shift=config.shift,
        condition=config.condition,
        text=config.text,
        model=config.transformer,
        data=DiffusionDataConfig(
            train=train,
            validation=evaluation,
            synthetic_clips=config.synthetic_clips,
            validation_clips=16,
            frames=config.frames,
            size=config.size,
            cache=str(run / "latents"),
            scale=config.latent_scale,
        ),
        optimization=config.diffusion,
        run=dataclasses.replace(config.run, workers=0),  # cached latents are read in a millisecond
    )


# -- the report ------------------------------------------------------------------------------------------------------


def make_report(
    config: DemoConfig, run: Path, tokenizer: Path, pipelines: dict[int, Path], evaluation: str, started: float
) -> Report:
    """Reconstruct, sample and measure; return all that the report shows."""
    model = load_tokenizer(tokenizer)
    source = open_dataset(evaluation, "eval", config.frames, config.size, config.evaluation_clips)
    items = [source.fixed(i) for i in range(min(config.evaluation_clips, len(source)))]
    quality = {r: evaluate(model, (item["video"][None] for item in items), r, config.precision) for r in model.temporal_ratios}

    loaded = {ratio: ProMAGPipeline.from_pretrained(folder) for ratio, folder in pipelines.items()}
    for pipe in loaded.values():
        pipe.set_progress_bar_config(disable=True)
    scenes = scenes_to_score(max(config.prompts, config.scored), config.seed) if not config.videos else []
    prompts = [s.caption() for s in scenes[: config.prompts]] or [item["caption"] for item in items[: config.prompts]]
    how = {"steps": config.steps, "guidance": config.guidance, "precision": config.precision}
    samples = {ratio: sample_videos(pipe, prompts, **how, name=f"{ratio}x prompts") for ratio, pipe in loaded.items()}
    accuracy = {}
    for ratio, pipe in loaded.items():
        if scenes:
            more = [s.caption() for s in scenes[config.prompts :]]
            videos = samples[ratio] + sample_videos(pipe, more, **how, first_seed=config.prompts, name=f"{ratio}x scored")
            accuracy[ratio] = accuracies(videos, scenes)

    readable = (
        {r: accuracies_of_reconstructions(model, items, r, config.precision) for r in model.temporal_ratios} if scenes else {}
    )
    times = measure(config, loaded, prompts)
    rows = [
        budget_row(config, ratio, quality[ratio], times, accuracy.get(ratio), readable.get(ratio), run)
        for ratio in model.temporal_ratios
    ]
    first = items[0]["video"]
    values = {r: model.config["latent_channels"] / (SPATIAL_RATIO**2) * latent_frames(config.frames, r) for r in quality}
    rows = [dataclasses.replace(row, latent_values_per_pixel=values[row.ratio] / first.shape[1]) for row in rows]
    return Report(
        title="ProMAG demo: one tokenizer, three token budgets",
        summary=summarise(config, quality, times, accuracy),
        rows=rows,
        chance=scorer.chance() if scenes else None,
        reconstructions=[reconstruct(model, i, item, config.precision) for i, item in enumerate(items[:4])],
        samples=[
            SampleClip(
                prompt=prompt,
                fps=loaded[config.ratios[0]].config["fps"],
                by_ratio={ratio: samples[ratio][i] for ratio in loaded},
                read={r: describe(samples[r][i], scenes[i]) for r in loaded} if scenes else None,
            )
            for i, prompt in enumerate(prompts)
        ],
        curves=curves(config, run),
        facts=facts(config, run, len(items), len(scenes), started),
    )


def measure(config: DemoConfig, pipelines: Mapping[int, Any], prompts: list[str]) -> dict[str, dict[int, float]]:
    """Measure each ratio's train step, the denoising alone and whole sampling, per video; seconds by name and ratio."""
    size = {"frames": config.frames, "height": config.size, "width": config.size}
    batch, steps, count = config.diffusion.batch_size, config.steps, len(prompts)
    training, denoised, sampled = {}, {}, {}
    for ratio, pipe in pipelines.items():
        own = copy.deepcopy(pipe.transformer)
        training[ratio] = train_step(
            own, **size, ratio=ratio, batch_size=batch, optimization=config.diffusion, precision=config.precision
        )
        denoised[ratio] = denoising(
            pipe.transformer, **size, ratio=ratio, steps=steps, videos=count, precision=config.precision
        )
        sampled[ratio] = sampling(pipe, prompts, steps, config.guidance, ratio, config.precision)
    return {
        "train_step_seconds": measure_in_turns(training),
        "denoising_seconds": {r: s / count for r, s in measure_in_turns(denoised, rounds=3).items()},
        "sampling_seconds": {r: s / count for r, s in measure_in_turns(sampled, rounds=3).items()},
    }


@torch.no_grad()
def reconstruct(model: Any, index: int, item: dict[str, Any], precision: Precision) -> ReconstructionClip:
    """Reconstruct one clip at every ratio."""
    x = item["video"][None]
    with autocast("cpu", precision):
        outputs = {ratio: model(x, ratio).sample.float() for ratio in model.temporal_ratios}
    return ReconstructionClip(
        name=f"clip {index}",
        caption=item["caption"],
        fps=float(item["fps"]),
        original=to_uint8(x)[0].numpy(),
        by_ratio={ratio: to_uint8(output)[0].numpy() for ratio, output in outputs.items()},
        psnr={ratio: float(psnr(output, x)) for ratio, output in outputs.items()},
    )


def budget_row(
    config: DemoConfig,
    ratio: int,
    quality: dict[str, float],
    times: Mapping[str, Mapping[int, float]],
    accuracy: dict[str, tuple[float, float, float]] | None,
    readable: dict[str, tuple[float, float, float]] | None,
    run: Path,
) -> BudgetRow:
    """Return one ratio's figures; what was not measured is said to be so."""
    missing: dict[str, str] = {}
    if ratio not in config.ratios:
        missing = dict.fromkeys((*times, "train_loss", "accuracy"), f"no text-to-video model was trained at {ratio}x")
    elif not readable:
        missing = {"accuracy": "real videos have no scorer"}
    return BudgetRow(
        ratio=ratio,
        latent_frames=latent_frames(config.frames, ratio),
        tokens=tokens(config.frames, config.size, config.size, ratio, config.transformer.patch_size),
        psnr=quality["psnr"],
        psnr_std=quality["psnr_std"],
        psnr_first=quality["psnr_first"],
        ssim=quality["ssim"],
        train_step_seconds=times["train_step_seconds"].get(ratio),
        denoising_seconds=times["denoising_seconds"].get(ratio),
        sampling_seconds=times["sampling_seconds"].get(ratio),
        train_loss=last_value(run / f"video-{ratio}x" / f"{ratio}x" / "metrics.jsonl", "loss"),
        accuracy=accuracy,
        readable=readable,
        missing=missing,
    )


def summarise(config: DemoConfig, quality, times: Mapping[str, Mapping[int, float]], accuracy) -> list[str]:
    """Return the report's first sentences."""
    low, high = config.ratios[0], config.ratios[-1]
    quality_said = ", ".join(f"{values['psnr']:.1f} dB at {ratio}x" for ratio, values in quality.items())
    said = [f"One checkpoint reconstructs {config.frames} frames of unseen clips with {quality_said}."]
    if low != high:
        faster = {name: seconds[low] / seconds[high] for name, seconds in times.items()}
        said.append(
            f"With {latent_frames(config.frames, high)} instead of {latent_frames(config.frames, low)} latent frames, "
            f"{high}x text-to-video trains {faster['train_step_seconds']:.1f} times, denoises "
            f"{faster['denoising_seconds']:.1f} times and samples, decoding included, "
            f"{faster['sampling_seconds']:.1f} times as fast as {low}x."
        )
    for ratio, found in accuracy.items():
        parts = ", ".join(f"{part} {value:.0%}" for part, (value, _, _) in found.items() if part != "all")
        said.append(f"After {config.diffusion.steps} steps the {ratio}x model's videos show what the prompt says: {parts}.")
    return said


def curves(config: DemoConfig, run: Path) -> dict[str, list[tuple[float, float]]]:
    """Return validation curves: PSNR of each stage and held-out loss of each text-to-video model."""
    found = {}
    for stage in config.stages:
        name = f"{stage.ratio}x"
        found[f"Validation PSNR, dB/{name}"] = points(run / "tokenizer-run" / name / "metrics.jsonl", "psnr")
    for ratio in config.ratios:
        found[f"Training loss of text-to-video/{ratio}x"] = points(
            run / f"video-{ratio}x" / f"{ratio}x" / "metrics.jsonl", "loss"
        )
    return {name: values for name, values in found.items() if values}


def points(file: Path, key: str) -> list[tuple[float, float]]:
    """Return (step, value) of one key of a metrics file."""
    records = read_json_lines(file) if file.exists() else []
    return [(float(r["step"]), float(r[key])) for r in records if key in r]


def last_value(file: Path, key: str) -> float | None:
    """Return a metric's mean over the last tenth of the log lines, at least one; None without any."""
    values = [value for _, value in points(file, key)]
    tail = values[-max(1, len(values) // 10) :]
    return sum(tail) / len(tail) if tail else None


def facts(config: DemoConfig, run: Path, clips: int, scored: int, started: float) -> dict[str, str]:
    """Return the key-value pairs at the report's end."""
    known = provenance()
    optimizers = "AdamW" if config.diffusion.muon_learning_rate is None else "Muon with AdamW"
    trained = [
        f"{s.ratio}x {s.optimization.steps} steps of {s.optimization.batch_size} clips of {s.frames} frames"
        for s in config.stages
    ]
    said = {
        "Commit": known["commit"],
        "Machine": known["machine"],
        "Versions": ", ".join(f"{k} {v}" for k, v in known["versions"].items()),
        "Seed": str(config.seed),
        "This call took": f"{(time.perf_counter() - started) / 60:.1f} minutes",
        "Clips": f"videos of {config.videos}" if config.videos else f"{config.synthetic_clips} generated clips",
        "Tokenizer training": "; ".join(trained),
        "Text-to-video training": f"{config.diffusion.steps} steps of {config.diffusion.batch_size} clips at each ratio",
        "Reconstruction protocol": f"{clips} unseen clips, {config.frames} frames, {config.size}x{config.size}; {PROTOCOL}",
        "Sampling": (
            f"{config.steps} steps, guidance {config.guidance}, {config.precision}; seconds per video in a batch of "
            f"{config.prompts} prompts: the transformer alone, and from text to pixels"
        ),
        "Train step": f"batch {config.diffusion.batch_size}, forward, backward and {optimizers}, median of 5 in turns",
    }
    if scored:
        said["Prompt accuracy"] = f"{scored} prompts of trained combinations, one video each; Wilson 95 % intervals"
    return said


if __name__ == "__main__":
    raise SystemExit(run_main(main))
