"""Measure whether growing 4x -> 8x -> 16x beats training 16x directly.

Every variant is trained by the same trainer on the same clips and scored on the same unseen ones. A finished variant is not
trained again, an unfinished one continues; `--only-variants progressive` runs some variants and what they start from.
`promag experiment growth-ablation report RESULTS.jsonl` prints and draws what was recorded.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from promag.data.datasets import open_dataset
from promag.evaluation.growth_ablation import OURS, RATIO, WHAT, WIDE, curves, gains, read, table
from promag.pipelines.base_latents import open_base_latents
from promag.reports.plots import plot_file
from promag.tokenizer.autoencoder import AutoencoderKLProMAG
from promag.tokenizer.base import BaseConfig
from promag.tokenizer.checkpoint import load_tokenizer
from promag.tokenizer.config import StageConfig, TokenizerConfig, TokenizerDataConfig
from promag.tokenizer.existing import Features, existing_class
from promag.tokenizer.interpolation import Interpolated, kinds_for
from promag.tokenizer.levels import parameter_count
from promag.tokenizer.metrics import PROTOCOL, evaluate_fully, evaluate_lift
from promag.tokenizer.objectives import LATENTS, StageObjective
from promag.tokenizer.packaged_metrics import PerceptualMetrics, open_perceptual
from promag.tokenizer.train import train_only, train_tokenizer
from promag.training.command_line import Parser, continues, parse_config, run_main
from promag.training.config import UserError, check_seed, required, setting
from promag.training.device import best_device
from promag.training.files import read_json_lines, write_atomically
from promag.training.loop import RunConfig, seeded
from promag.training.precision import Precision, autocast, check_training_precision, choose_for_run
from promag.training.run import append_result

COSTS = ("steps", "clips_seen", "frames_seen", "seconds", "flops")


@dataclass(frozen=True)
class Baseline:
    """Another architecture."""

    name: str = required("class of diffusers, AutoencoderKLWan for example")
    config: dict[str, Any] = required("keyword arguments of the class")
    features: Features = setting("latents", "what levels grown on it see: its latents, or its encoder's features too")

    def build(self) -> Any:
        """Return it with random weights."""
        return AutoencoderKLProMAG.from_base(existing_class(self.name)(**self.config), self.features)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to reach a ratio. Exactly one of `base`, `model` and `baseline` says what it starts from."""

    name: str = required("name in the results")
    seeds: tuple[int, ...] = setting((0,), "one training for each")
    base: str | None = setting(None, "an earlier variant whose tokenizer, of the same seed, it continues")
    model: BaseConfig | None = setting(None, "a tokenizer of ours from scratch")
    baseline: Baseline | None = setting(None, "another architecture from scratch")
    stages: tuple[StageConfig, ...] = required("stages to train, one after the other")

    def __post_init__(self) -> None:
        """Raise ValueError unless one start is given, and for a seed that cannot be."""
        if sum(start is not None for start in (self.base, self.model, self.baseline)) != 1:
            raise ValueError(f"variant {self.name}: exactly one of base, model and baseline is needed")
        for seed in self.seeds:
            check_seed(seed)


@dataclass(frozen=True, kw_only=True)
class AblationConfig:
    """The whole experiment."""

    output_dir: str = required("folder of the variants' run directories")
    record: str | None = setting(None, "results file that gets a JSON line for each variant, seed and ratio; null for none")
    only_variants: tuple[str, ...] | None = setting(None, "names of variants to run, with those they start from; null runs all")
    perceptual: tuple[str, ...] | None = setting(
        None, "metrics from packages that scores have: cvvdp, vmaf, frechet_frames; null takes those installed"
    )
    precision: Precision = setting("auto", "auto measures which of bf16 and fp32 is faster")
    gradient_checkpointing: bool = setting(
        False, "compute blocks again in the backward pass: less memory, a second forward pass"
    )
    compile: bool = setting(False, "compile the repeated blocks: minutes at the start, then faster steps; for GPUs")
    frames: int = setting(65, "frames of the clips that are scored")
    data: TokenizerDataConfig = setting(TokenizerDataConfig(), "clips to train on and, never trained on, to score")
    run: RunConfig = setting(RunConfig(), "logging, validation, checkpoints")
    variants: tuple[Variant, ...] = required("in an order in which each one's base comes before it")

    def __post_init__(self) -> None:
        """Raise ValueError for names that do not resolve."""
        check_training_precision(self.precision)
        known: dict[str, Variant] = {}
        for variant in self.variants:
            if variant.name in known:
                raise ValueError(f"variant {variant.name}: there are two of that name")
            if variant.base is not None:
                base = known.get(variant.base)
                if base is None or not set(variant.seeds) <= set(base.seeds):
                    raise ValueError(
                        f"variant {variant.name}: base {variant.base} must be an earlier variant with seeds {variant.seeds}"
                    )
            known[variant.name] = variant
        unknown = sorted(set(self.only_variants or ()) - known.keys())
        if unknown:
            raise ValueError(f"only_variants {', '.join(unknown)}: the variants are {', '.join(known)}")


@continues
def main(argv: Sequence[str]) -> int:
    """Train and score the variants that are not finished, then print the table of all that are; `report` prints results."""
    if argv[:1] == ["report"]:
        return report(argv[1:])
    config = parse_config(AblationConfig, argv, __doc__ or "")
    runs = [run_folder(config, variant.name, seed) for variant in config.variants for seed in variant.seeds]
    config = replace(config, precision=choose_for_run(config.precision, best_device(), *runs))
    rows = run_variants(config, config.only_variants or tuple(variant.name for variant in config.variants))
    if rows is None:
        print("stopped early; the same command continues")
    else:
        print(table(rows))
    return 0


def run_variants(config: AblationConfig, names: Sequence[str], seeds: Sequence[int] | None = None) -> list[Any] | None:
    """Train and score the named variants and their bases, with `seeds` or each variant's own; None if stopped early."""
    variants = {variant.name: variant for variant in config.variants}
    wanted = {name for chosen in names for name in _lineage(variants, chosen)}
    rows: list[dict[str, Any]] = []
    for variant in (variant for variant in config.variants if variant.name in wanted):
        for seed in variant.seeds if seeds is None else seeds:
            print(f"== {variant.name}, seed {seed}", flush=True)
            folder = train_variant(config, variant, seed)
            if folder is None:
                return None
            rows += score_variant(config, variants, variant, seed, folder)
    return rows


def report(argv: Sequence[str]) -> int:
    """Print the table of recorded lines, what growth gains on the other ways to 16x, and draw PSNR by steps and compute."""
    parser = Parser(
        prog="promag experiment growth-ablation report",
        description=f"{report.__doc__} The newest line of each variant, seed, ratio and size of the clips counts.",
    )
    parser.add_argument("results", type=Path, help="results file that the experiment recorded")
    parser.add_argument("--out", type=Path, help="folder for the plots; without it none are drawn")
    parser.add_argument("--ours", nargs="+", help=f"variants that the others are subtracted from; default: {OURS}, wide or not")
    parser.add_argument("--variants", nargs="+", help="variants to show; default: all")
    arguments = parser.parse_args(argv)
    rows = read(arguments.results)
    known = dict.fromkeys(row["variant"] for row in rows)
    if unknown := [name for name in (*(arguments.ours or ()), *(arguments.variants or ())) if name not in known]:
        raise UserError(f"variants {', '.join(unknown)}: {arguments.results} has {', '.join(known)}")
    rows = [row for row in rows if row["variant"] in (arguments.variants or known)]
    print(table(rows))
    for ours in arguments.ours or (OURS, OURS + WIDE):
        if any(row["variant"] == ours for row in rows):
            print("\n" + gains(rows, ours))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        for name, (lines, x_label) in curves(rows).items():
            path = arguments.out / f"growth-ablation-{name}.svg"
            write_atomically(path, plot_file(lines, x_label, f"PSNR at {RATIO}x, dB"))
            print(path)
    return 0


def _lineage(variants: Mapping[str, Variant], name: str) -> list[str]:
    """Return the names of a variant and of all it starts from, the first one first."""
    base = variants[name].base
    return [*(_lineage(variants, base) if base else ()), name]


def run_folder(config: AblationConfig, name: str, seed: int) -> Path:
    """Return the run directory of a variant's training."""
    return Path(config.output_dir) / f"{name}-{seed}"


def train_variant(config: AblationConfig, variant: Variant, seed: int) -> Path | None:
    """Train one variant with one seed; None if stopped early."""
    baseline = variant.baseline
    cached = any(stage.latent_pretrain_steps for stage in variant.stages)
    tokenizer = TokenizerConfig(
        output_dir=str(run_folder(config, variant.name, seed)),
        seed=seed,
        precision=config.precision,
        gradient_checkpointing=config.gradient_checkpointing,
        compile=config.compile,
        init=str(run_folder(config, variant.base, seed) / "tokenizer") if variant.base else None,
        model=variant.model,
        data=config.data if cached else replace(config.data, latent_cache=None),
        stages=variant.stages,
        run=config.run,
    )
    return train_tokenizer(tokenizer, baseline.build if baseline else None, open_base_latents)


# -- scores ----------------------------------------------------------------------------------------------------------


def score_variant(
    config: AblationConfig, variants: Mapping[str, Variant], variant: Variant, seed: int, folder: Path
) -> list[Any]:
    """Score one trained variant at the ratios it added, record the lines and return them; a scored variant is read back."""
    kept = run_folder(config, variant.name, seed) / "scores.json"
    if kept.exists():
        return json.loads(kept.read_text(encoding="utf-8"))
    model: Any = load_tokenizer(folder)
    model.to(best_device())
    clips, fps = _clips_to_score(config)
    perceptual = open_perceptual(best_device(), config.perceptual)
    shape = (config.data.size, config.data.size)
    for line in perceptual.not_measured(*shape):
        print(f"not measured: {line}", flush=True)
    inherited = [
        _cost(config, variants[name], seed, stage)
        for name in _lineage(variants, variant.name)[:-1]
        for stage in variants[name].stages
    ]
    own = [_cost(config, variant, seed, stage) for stage in variant.stages]
    rows = []
    for ratio, i in last_trained(variant.stages).items():
        stage = variant.stages[i]
        spent = _total(inherited + own[: i + 1])
        row = {
            "what": WHAT,
            "variant": variant.name,
            "seed": seed,
            "ratio": ratio,
            "split": "eval",
            "frames": config.frames,
            "size": config.data.size,
            "params": _used_parameters(model, ratio),
            **spent,
            # What of it went into this stage alone, and what into the variants that this one starts from.
            "stage": own[i],
            "inherited": _total(inherited),
            **evaluate_fully(model, clips, ratio, perceptual, config.precision, fps),
            "lift": evaluate_lift(model, clips, ratio, config.precision),
            "curve": _curve(config, variant, seed, stage, ratio, spent),
            "protocol": f"first {config.frames} frames, centre crop, posterior mean; {PROTOCOL}{perceptual.protocol(*shape)}",
        }
        rows.append(row)
        if variant.base is None and not variant.baseline and ratio == 4:
            rows += _score_fewer_frames(config, model, row, clips, fps, perceptual)
    if config.record:
        for row in rows:
            append_result(config.record, _rounded(row))
    write_atomically(kept, json.dumps(rows))
    return rows


def _clips_to_score(config: AblationConfig) -> tuple[list[Tensor], list[float]]:
    """Return the validation clips, each 1 C T H W, and their frames per second."""
    source = open_dataset(config.data.validation, "eval", config.frames, config.data.size, config.data.validation_clips)
    count = len(source) if Path(config.data.validation).suffix.lower() == ".jsonl" else config.data.validation_clips
    items = [source.fixed(i) for i in range(count)]
    return [item["video"][None] for item in items], [float(item["fps"]) for item in items]


def _score_fewer_frames(
    config: AblationConfig,
    model: Any,
    row: dict[str, Any],
    clips: Sequence[Tensor],
    fps: Sequence[float],
    perceptual: PerceptualMetrics,
) -> list[dict[str, Any]]:
    """Return rows beside a variant's `row` where its model encodes every 2nd and every 4th frame alone."""
    rows, variant, ratio = [], row["variant"], row["ratio"]
    for step in (2, 4):
        # The paper's observation: the lowest level on subsampled clips, scored on the frames that are left.
        fewer, rates = [clip[:, :, ::step] for clip in clips], [rate / step for rate in fps]
        part = evaluate_fully(model, fewer, ratio, perceptual, config.precision, rates)
        rows.append({**row, "variant": f"{variant}, every {_nth(step)} frame", "subsampled": step, **part, "curve": []})
        # The control: the other frames are interpolated, which makes as many latents as at a higher ratio.
        for kind in kinds_for(config.data.size, config.data.size):
            higher = step * ratio
            part = evaluate_fully(Interpolated(model, kind), clips, higher, perceptual, config.precision, fps)
            name = f"{variant}, {kind} interpolation"
            rows.append({**row, "variant": name, "ratio": higher, "interpolated": kind, **part, "curve": []})
    return rows


def last_trained(stages: Sequence[StageConfig]) -> dict[int, int]:
    """Return, for each ratio that stages train, which of them changed its level last: what it cost is spent up to there.

    A stage changes the levels that it trains, and with `trainable` all or decoder those below its own, which share weights.
    """
    last: dict[int, int] = {}
    for i, stage in enumerate(stages):
        shared = [ratio for ratio in last if ratio < stage.ratio] if stage.trainable != "new" else []
        last |= dict.fromkeys((*shared, *stage.turns), i)
    return dict(sorted(last.items(), key=lambda item: (item[1], item[0])))


def _nth(step: int) -> str:
    return {2: "2nd"}.get(step, f"{step}th")


def _used_parameters(model: Any, ratio: int) -> int:
    """Count the weights that encoding and decoding at a ratio touch."""
    level = model.level_of(ratio)
    encoders = model.encoding_path(level)
    return parameter_count([*encoders, *model.decoding_path(level)]) - parameter_count(model.idle_heads(ratio))


def _cost(config: AblationConfig, variant: Variant, seed: int, stage: StageConfig) -> dict[str, float]:
    """Return steps, clips, frames, seconds and FLOPs of one stage's training; seconds are this machine's."""
    latent, pixels = _steps(stage)
    per_step = stage.optimization.batch_size * stage.optimization.accumulate
    clips = pixels * per_step + latent * _latent_batch(config, stage) * stage.optimization.accumulate
    done = run_folder(config, variant.name, seed) / stage.name / "done.json"
    return {
        "steps": stage.optimization.steps,
        "clips_seen": clips,
        "frames_seen": clips * stage.frames,
        "seconds": json.loads(done.read_text(encoding="utf-8"))["seconds"],
        "flops": _stage_flops(config, variant, seed, stage),
    }


def _total(costs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: sum(cost[key] for cost in costs) for key in COSTS}


def _stage_flops(config: AblationConfig, variant: Variant, seed: int, stage: StageConfig) -> float:
    """Count the FLOPs of a stage: one forward and backward of each kind of step, times how many there were."""
    folder = run_folder(config, variant.name, seed) / "tokenizer"
    model: Any = load_tokenizer(folder)
    added = ratios = [r for r in model.temporal_ratios if r <= stage.ratio]
    below = [s.ratio for s in variant.stages if s.ratio < stage.ratio]
    if stage.growth:
        added = [r for r in ratios if r > max(below, default=_base_highest(config, variant, seed, ratios[0]))]
    train_only(model, stage, added)
    objective = StageObjective(model, stage, added)
    side, accumulate = config.data.size, stage.optimization.accumulate
    video: dict[str, Any] = {"video": torch.zeros(1, 3, stage.frames, side, side)}
    first = video
    if config.data.latent_cache:
        with torch.no_grad():
            rates = [2**level for level in range(1 + model.level_of(stage.ratio))]
            clip, lowest = video["video"], model.temporal_ratios[0]
            first = {f"{LATENTS}{r}": model.encode(clip[:, :, ::r], lowest).latent_dist.mode() for r in rates}
    latent, pixels = _steps(stage)
    total = 0.0
    turns = len(stage.turns)
    for batch, step, count in (
        (first, 0, latent * _latent_batch(config, stage)),
        *((video, latent + turn, pixels * stage.optimization.batch_size / turns) for turn in range(turns)),
    ):
        if count:
            with FlopCounterMode(display=False) as counter, autocast("cpu", config.precision):
                objective(batch, [seeded(0)], step)["loss"].backward()
            total += counter.get_total_flops() * count * accumulate
    return total


def _steps(stage: StageConfig) -> tuple[int, int]:
    """Return how many steps of a stage regress latents, and how many reconstruct pixels."""
    latent = min(stage.latent_pretrain_steps, stage.optimization.steps) if stage.growth else 0
    return latent, stage.optimization.steps - latent


def _latent_batch(config: AblationConfig, stage: StageConfig) -> int:
    """Return the clips of a batch in the steps that regress latents."""
    cached = stage.latent_batch_size if config.data.latent_cache else None
    return cached or stage.optimization.batch_size


def _base_highest(config: AblationConfig, variant: Variant, seed: int, lowest: int) -> int:
    """Return the highest ratio that a variant starts from: its base's, or its architecture's own."""
    if variant.base is None:
        return lowest
    return load_tokenizer(run_folder(config, variant.base, seed) / "tokenizer").temporal_ratios[-1]


def _curve(
    config: AblationConfig, variant: Variant, seed: int, stage: StageConfig, ratio: int, spent: Mapping[str, Any]
) -> list[list[float]]:
    """Return validation points of a stage at a ratio: steps and seconds since the first variant began, PSNR."""
    folder = run_folder(config, variant.name, seed) / stage.name
    points = read_json_lines(folder / "metrics.jsonl")
    before = spent["steps"] - stage.optimization.steps
    since = spent["seconds"] - json.loads((folder / "done.json").read_text(encoding="utf-8"))["seconds"]
    key = "psnr" if ratio == stage.ratio else f"psnr_{ratio}x"
    return [[before + p["step"], since + p["train_seconds"], p[key]] for p in points if key in p]


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list) else value


if __name__ == "__main__":
    raise SystemExit(run_main(main))
