"""Measure what the same text-to-video transformer makes of the latents of each tokenizer.

Tokenizers are trained as variants of the growth ablation, on generated clips, and a transformer on the latents of each. All
samples are scored by the same prompts. A finished training is not repeated, an unfinished one continues; `--only-models grown`
runs some models and the tokenizers that they need.
`promag experiment generation report RESULTS.jsonl` prints what was recorded.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from promag.diffusion.config import BudgetConfig, DiffusionConfig, DiffusionDataConfig, TextConfig, TransformerConfig
from promag.diffusion.flops import training_flops
from promag.diffusion.validation import training_figures
from promag.evaluation.generation import steadiness_and_sharpness, warm_up
from promag.evaluation.generation_experiment import WHAT, differences, read, table
from promag.evaluation.prompt_accuracy import accuracy_figures, scenes_to_score
from promag.pipelines.build import train_pipeline
from promag.pipelines.sampling import load_pipeline, sample_timed
from promag.scripts.evaluate_pipeline import reconstructions
from promag.tokenizer.geometry import tokens
from promag.training.command_line import Parser, continues, parse_config, run_main
from promag.training.config import required, setting
from promag.training.device import best_device
from promag.training.files import write_atomically
from promag.training.loop import RunConfig
from promag.training.optimizers import OptimizationConfig
from promag.training.precision import Precision, check_training_precision, choose_for_run
from promag.training.run import append_result

from .growth_ablation import AblationConfig, run_folder, run_variants

SETTINGS = ("prompts", "steps", "guidance", "clips")  # settings that decide the scores
PROTOCOL = (
    "same transformer, clips, batches and schedule for all models; one video for each prompt, noise seeded by its number; "
    "prompts of trained and of unseen combinations; seconds after an untimed call; jitter and high-frequency energy beside "
    "rendered clips of those captions; FLOPs of the transformer's forward and backward passes by formula"
)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A text-to-video model of one tokenizer's latents."""

    name: str = required("name in the results")
    variant: str = required("the tokenizer, of the same seed")
    ratio: int = setting(16, "temporal ratio of the latents")
    base_ahead: float = setting(0.0, "lead of the key frames' channels of dual latents in denoising")
    steps: int = required("optimiser steps")
    batch_size: int | None = setting(None, "clips per process and batch; null for the optimisation's")
    seeds: tuple[int, ...] = setting((0,), "one training for each")


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """The whole experiment."""

    output_dir: str = required("folder of latents and of the models' run directories")
    record: str | None = setting(None, "results file that gets a JSON line for each model and seed; null for none")
    only_models: tuple[str, ...] | None = setting(None, "names of models to run, with their tokenizers; null runs all")
    precision: Precision = setting("auto", "auto measures which of bf16 and fp32 is faster")
    tokenizers: AblationConfig = required("the training of the tokenizers; on generated clips, so that prompts can be scored")
    clips: int = setting(4096, "generated clips that every model is trained on")
    text: TextConfig = setting(TextConfig(), "text encoders")
    transformer: TransformerConfig = required("the transformer of every model")
    shift: float = setting(3.0, "shift of the times towards noise, at 256 tokens")
    optimization: OptimizationConfig = setting(OptimizationConfig(muon_learning_rate=0.02), "optimisation of every model")
    run: RunConfig = setting(RunConfig(), "logging, validation, checkpoints of every model")
    prompts: int = setting(256, "prompts of trained and as many of unseen combinations")
    steps: int = setting(16, "denoising steps")
    guidance: float = setting(4.0, "classifier-free guidance")
    models: tuple[Model, ...] = required("models to compare")

    def __post_init__(self) -> None:
        """Raise ValueError for names and seeds that do not resolve, and for numbers that cannot be meant."""
        check_training_precision(self.precision)
        seeds = {variant.name: set(variant.seeds) for variant in self.tokenizers.variants}
        names = [model.name for model in self.models]
        for model in self.models:
            if names.count(model.name) > 1:
                raise ValueError(f"model {model.name}: there are two of that name")
            if not set(model.seeds) <= seeds.get(model.variant, set()):
                raise ValueError(f"model {model.name}: variant {model.variant} must be a tokenizer with seeds {model.seeds}")
        if unknown := sorted(set(self.only_models or ()) - set(names)):
            raise ValueError(f"only_models {', '.join(unknown)}: the models are {', '.join(names)}")
        for name in ("prompts", "steps", "clips"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: at least 1 is needed")


@continues
def main(argv: Sequence[str]) -> int:
    """Train and score the models that are not finished, then print a table; `report` prints results."""
    if argv[:1] == ["report"]:
        return report(argv[1:])
    config = parse_config(GenerationConfig, argv, __doc__ or "")
    models = [model for model in config.models if model.name in (config.only_models or [m.name for m in config.models])]
    runs = [model_folder(config, model, seed) for model in config.models for seed in model.seeds]
    config = replace(config, precision=choose_for_run(config.precision, best_device(), *runs))
    config = replace(config, tokenizers=replace(config.tokenizers, precision=config.precision))
    rows = []
    for model in models:
        for seed in model.seeds:
            trained = run_variants(config.tokenizers, [model.variant], [seed])
            print(f"== {model.name}, seed {seed}", flush=True)
            folder = train_pipeline(diffusion_config(config, model, seed)) if trained is not None else None
            if trained is None or folder is None:
                print("stopped early; the same command continues")
                return 0
            tokenizer = next(row for row in reversed(trained) if (row["variant"], row["ratio"]) == (model.variant, model.ratio))
            rows.append(score_model(config, model, seed, folder, tokenizer))
    print(table(rows))
    return 0


def report(argv: Sequence[str]) -> int:
    """Print the table of recorded lines and the differences between models; the newest line of a model and seed counts."""
    parser = Parser(prog="promag experiment generation report", description=report.__doc__)
    parser.add_argument("results", type=Path, help="results file that the experiment recorded")
    parser.add_argument("--than", default="direct", help="model that the others are compared with")
    arguments = parser.parse_args(argv)
    rows = read(arguments.results)
    print(f"{table(rows)}\n\n{differences(rows, arguments.than)}")
    return 0


def model_folder(config: GenerationConfig, model: Model, seed: int) -> Path:
    """Return the run directory of a model's training."""
    return Path(config.output_dir) / f"{model.name}-{seed}"


def diffusion_config(config: GenerationConfig, model: Model, seed: int) -> DiffusionConfig:
    """Return the text-to-video training of one model with one seed."""
    tokenizer = run_folder(config.tokenizers, model.variant, seed)
    return DiffusionConfig(
        output_dir=str(model_folder(config, model, seed)),
        seed=seed,
        precision=config.precision,
        tokenizer=str(tokenizer / "tokenizer"),
        budgets=(BudgetConfig(ratio=model.ratio),),
        base_ahead=model.base_ahead,
        shift=config.shift,
        text=config.text,
        model=config.transformer,
        data=DiffusionDataConfig(
            train="synthetic",
            validation="synthetic",
            synthetic_clips=config.clips,
            frames=config.tokenizers.frames,
            size=config.tokenizers.data.size,
            cache=str(Path(config.output_dir) / "latents" / tokenizer.name),
        ),
        optimization=optimization_of(config, model),
        run=config.run,
    )


def optimization_of(config: GenerationConfig, model: Model) -> OptimizationConfig:
    """Return how a model is optimised."""
    return replace(config.optimization, steps=model.steps, batch_size=model.batch_size or config.optimization.batch_size)


def score_model(config: GenerationConfig, model: Model, seed: int, folder: Path, tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Sample and score a trained model, record the line and return it; with the same settings it is read back."""
    kept, settings = folder.parent / "scores.json", {name: getattr(config, name) for name in SETTINGS}
    if kept.exists():
        row = json.loads(kept.read_text(encoding="utf-8"))
        if {name: row[name] for name in SETTINGS} == settings:
            return row
    pipe: Any = load_pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    frames, size = config.tokenizers.frames, config.tokenizers.data.size
    trained = optimization_of(config, model)
    clips = trained.batch_size * trained.accumulate
    length = tokens(frames, size, size, model.ratio, config.transformer.patch_size, pipe.vae.spatial_compression_ratio)
    text = [encoder.tokens for encoder in config.text.encoders]
    row = {
        "what": WHAT,
        "model": model.name,
        "variant": model.variant,
        "seed": seed,
        "ratio": model.ratio,
        "base_ahead": model.base_ahead,
        "tokens": length,
        "channels": pipe.transformer.config["in_channels"],
        "params": sum(p.numel() for p in pipe.transformer.parameters()),
        "batch_size": clips,
        "flops": model.steps * training_flops(pipe.transformer.config, length, text, clips),
        "training": training_figures(folder.parent, model.ratio),
        "tokenizer": {key: tokenizer[key] for key in ("psnr", "psnr_key", "steps", "flops")},
        **settings,
    }
    videos, scenes = [], []
    warm_up(pipe, model.ratio, config.prompts, config.guidance, config.precision)
    for unseen in (False, True):
        part = scenes_to_score(config.prompts, seed=0, unseen=unseen)
        captions, name = [scene.caption() for scene in part], f"{model.name}, {'unseen' if unseen else 'trained'}"
        sampled, spent = sample_timed(
            pipe, captions, config.steps, config.guidance, config.precision, name=name, temporal_ratio=model.ratio
        )
        row["unseen" if unseen else "trained"] = {
            **accuracy_figures(sampled, part),
            "sampling_seconds": spent.total / len(sampled),
        }
        videos, scenes = videos + sampled, scenes + part
    row |= steadiness_and_sharpness(videos, scenes)
    row |= {"reconstructions": reconstructions(pipe, model.ratio, config.prompts, config.precision), "protocol": PROTOCOL}
    if config.record:
        append_result(config.record, row)
    write_atomically(kept, json.dumps(row))
    return row


if __name__ == "__main__":
    raise SystemExit(run_main(main))
