"""Compare token budgets, a tokenizer's own and other autoencoders', on the same clips.

Writes figures (results.jsonl) and one self-contained page (report.html) with the videos side by side, in step.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from promag.data.datasets import open_evaluation
from promag.diffusion.config import DiffusionConfig
from promag.evaluation.adaptive_budget import adaptive_figures
from promag.evaluation.budgets import Budget, baseline_budget, check_budgets, compare_reconstructions, own_budgets
from promag.evaluation.clip_similarity import ClipSimilarity, load_similarity
from promag.evaluation.cost import LENGTHS, BudgetCosts, Effort, fit_errors
from promag.evaluation.generation import generation_figures
from promag.pipelines.inputs import DEFAULTS, steps_and_guidance
from promag.pipelines.sampling import open_pipeline, trained_ratios
from promag.reports.budget_report import (
    BudgetReport,
    cost_lines,
    generation_lines,
    reconstruction_lines,
    token_lines,
    write_budget_page,
)
from promag.reports.plots import Mark
from promag.reports.tables import text_table
from promag.scripts._options import check_at_least_one, check_writable, name_of, share
from promag.scripts.evaluate_pipeline import pipeline_name
from promag.tokenizer.checkpoint import load_tokenizer
from promag.tokenizer.geometry import check_frames
from promag.tokenizer.metrics import PROTOCOL
from promag.tokenizer.packaged_metrics import PerceptualMetrics, open_perceptual
from promag.tokenizer.perceptual import check_fvd_frames
from promag.training.command_line import Parser, run_main
from promag.training.config import UserError
from promag.training.device import best_device
from promag.training.precision import Precision, choose_precision
from promag.training.run import append_result, provenance

COSTED_STEPS = DEFAULTS["num_inference_steps"]  # the transformer that is measured belongs to no pipeline


def main(argv: Sequence[str]) -> int:
    """Measure, print tables, write results and the page; with --record append the results to a results file."""
    arguments, config = _parser().parse_with_config(DiffusionConfig, argv, preset="diffusion/tiny")
    if arguments.costs and config.model is None:
        raise UserError(
            f"--config {arguments.config}: model null: costs need a configuration with a transformer of its own, or --no-costs"
        )
    _check_arguments(arguments)
    budgets = _budgets(arguments)
    pipelines = _pipelines(arguments)
    clips = open_evaluation(arguments.videos, arguments.split, arguments.frames, arguments.size, arguments.count)
    perceptual = open_perceptual(best_device(), arguments.perceptual, arguments.lpips, arguments.fvd)
    similarity = load_similarity(arguments.clip, arguments.clip_weights)
    given = {"lpips": perceptual.lpips, "fvd": perceptual.video_features, "clip_similarity": similarity}
    weights = [name for name, metric in given.items() if metric]
    shape = (arguments.frames, arguments.size, arguments.size)
    results = _Results(arguments, config, perceptual, len(clips))
    with tempfile.TemporaryDirectory() as folder:
        reconstructions, facts = compare_reconstructions(budgets, clips, Path(folder), perceptual, _log, config.precision)
        figures = {b.name: {**b.facts(*shape), "reconstruction": reconstructions[b.name]} for b in budgets}
        print(text_table(list(figures), {**token_lines(figures), **reconstruction_lines(figures, weights)}))
        results.add("reconstruction", *({"budget": name, **row} for name, row in figures.items()))
        own = [budget for budget in budgets if budget.own]
        aim = (arguments.segment, arguments.target, config.precision)
        adaptive = adaptive_figures(own, reconstructions, facts, clips, shape, *aim)
        print(_adaptive_text(adaptive))
        results.add("adaptive budget", adaptive)
        costs, lengths = _measure_costs(budgets, config, arguments) if arguments.costs else ({}, {})
        costed = {name: {**row, "cost": costs.get(name)} for name, row in figures.items()}
        if costs:
            print(text_table(list(costed), cost_lines(costed)))
            results.add("cost", *({"budget": name, **row} for name, row in costs.items()))
        if lengths:
            results.add("cost by length", {"points": lengths, "error_at_longest_from_shorter": fit_errors(lengths)})
        generation = _generate(pipelines, arguments, config.precision, similarity, perceptual)
        if generation:
            print(text_table(list(generation), generation_lines(generation, weights)))
            results.add("generation", *({"pipeline": name, **row} for name, row in generation.items()))
        report = BudgetReport(
            title=f"Token budgets of {name_of(arguments.tokenizer)} on {Path(name_of(arguments.videos)).stem}",
            budgets=costed,
            levels=[budget.name for budget in own],
            clips=facts,
            adaptive=adaptive,
            curves=_curves(lengths),
            generation=generation,
            facts=_facts(results, arguments, perceptual),
            weights=weights,
        )
        shown = write_budget_page(arguments.out / "report.html", report)
    page = arguments.out / "report.html"
    print(f"{page}: {shown} of {len(clips)} clips, {page.stat().st_size / 1e6:.1f} MB")
    return 0


def _parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--tokenizer", required=True, help="folder of a tokenizer, or of a pipeline")
    parser.add_argument("--out", type=Path, required=True, help="folder to write results.jsonl and report.html to")
    parser.add_argument(
        "--also",
        nargs="+",
        default=[],
        metavar="NAME=PATH[:RATIO]",
        help="other autoencoders of diffusers, and other tokenizers; of one with several levels the temporal ratio is needed",
    )
    parser.add_argument(
        "--pipelines", nargs="+", default=[], metavar="DIR", help="trained pipelines to sample from, ours or WanPipelines"
    )
    share(parser, "--videos", "--split", "--frames", "--size", "--count")
    parser.add_argument("--target", type=float, default=25.0, help="PSNR in dB that each clip should have, at its own level")
    parser.add_argument("--segment", type=int, default=17, help="frames of the segments that can have a level each")
    parser.add_argument("--costs", action=argparse.BooleanOptionalAction, default=True, help="measure the transformer's cost")
    share(parser, "--steps", help=f"denoising steps; left out: each pipeline's own, and {COSTED_STEPS} for costs")
    share(parser, "--train-batch-size", "--guidance", "--prompts")
    share(parser, "--perceptual", "--lpips", "--fvd", "--clip", "--clip-weights", "--record", "--note")
    share(parser, "--rounds", default=3)
    parser.add_argument("--curve-seconds", type=float, default=120.0, help="for costs by length; the rest is extrapolated")
    return parser


class _Results:
    """The lines of results.jsonl and of --record, which are written as soon as they are measured.

    There is one for each budget, kind of figure and pipeline, each with its protocol.
    """

    def __init__(self, arguments: argparse.Namespace, config: DiffusionConfig, perceptual: PerceptualMetrics, clips: int):
        self.path, self.record = arguments.out / "results.jsonl", arguments.record
        self.protocols = _protocols(arguments, config, perceptual)
        self.common = {
            "note": arguments.note,
            "videos": name_of(arguments.videos),
            "split": arguments.split,
            "clips": clips,
            "frames": arguments.frames,
            "size": arguments.size,
        }
        self.path.unlink(missing_ok=True)

    def add(self, what: str, *rows: dict[str, Any]) -> None:
        """Write a line for each row of figures."""
        for row in rows:
            line = {"what": what, **row, **self.common, "protocol": self.protocols[what]}
            append_result(self.path, line)
            if self.record:
                append_result(self.record, _without_clips(line))


def _protocols(arguments: argparse.Namespace, config: DiffusionConfig, perceptual: PerceptualMetrics) -> dict[str, str]:
    """Return the protocol of each kind of figure."""
    coded = f"first {arguments.frames} frames, centre crop, posterior mean; {PROTOCOL}"
    precision = choose_precision(config.precision, best_device())
    return {
        "reconstruction": coded + perceptual.protocol(arguments.size, arguments.size),
        "adaptive budget": f"{coded}; segments of {arguments.segment} frames are coded alone, whole clips at the fixed level",
        "cost": (
            f"preset {Path(arguments.config).stem}, {precision}, random latents and text; train step of "
            f"{arguments.train_batch_size} clips with its optimisers, {arguments.steps or COSTED_STEPS} denoising steps of one "
            f"video with guidance, decoding it; medians of {arguments.rounds} rounds in turns; peaks leave out what was "
            "allocated before; FLOPs counted, of one clip"
        ),
        "cost by length": (
            "one clip, one denoising step; points that are not measured follow a + b N + c N^2 fitted to those that are"
        ),
        "generation": f"{precision}; Wilson 95 % intervals; decoding included, after an untimed call at each ratio",
    }


def _check_arguments(arguments: argparse.Namespace) -> None:
    """Refuse illegal numbers, and files that cannot be written, before a model is loaded."""
    numbers = ("frames", "size", "count", "segment", "train_batch_size", "steps", "rounds", "prompts")
    check_at_least_one(arguments, *numbers)
    if not math.isfinite(arguments.target):
        raise UserError(f"--target {arguments.target:g}: a finite number is needed")
    check_fvd_frames(arguments.fvd, arguments.frames)
    results = [arguments.out / name for name in ("results.jsonl", "report.html")]
    for path in results:
        check_writable("--out", path, [arguments.videos])
    check_writable("--record", arguments.record, [arguments.videos, *results], appended=True)


def _budgets(arguments: argparse.Namespace) -> list[Budget]:
    """Load the models that are compared and check the names, frames and sizes that were given."""
    model: Any = load_tokenizer(arguments.tokenizer)
    budgets = own_budgets(model)
    try:
        for name in ("frames", "segment"):
            check_frames(getattr(arguments, name), model.temporal_ratios[-1], model.latent_step)
            if getattr(arguments, name) == 1 and len(budgets) > 1:
                more = 1 + model.temporal_ratios[-1] * model.latent_step
                raise UserError(f"--{name} 1: one frame has the same tokens at every level; use {more} or more")
        budgets += [_other_budget(text) for text in arguments.also]
        check_budgets(budgets, arguments.size, arguments.size)
    except ValueError as error:
        raise UserError(str(error)) from None
    for budget in budgets:
        budget.model.to(best_device())
    return budgets


def _other_budget(text: str) -> Budget:
    """Load the model of NAME=PATH[:RATIO]; raises UserError where it lacks the ratio, or has several and none is named."""
    name, equals, place = text.partition("=")
    path, _, ratio = place.rpartition(":") if place.rpartition(":")[2].isdecimal() else (place, "", "")
    if not (name and equals and path):
        raise UserError(
            f"--also {text}: NAME=PATH or NAME=PATH:RATIO is needed, for example wan=models/Wan2.1/vae or "
            "ours=runs/tokenizer-tiny/tokenizer:16"
        )
    try:
        return baseline_budget(name, path, int(ratio) if ratio else None)
    except ValueError as error:
        raise UserError(f"--also {text}: {error}") from None


def _measure_costs(
    budgets: Sequence[Budget], config: DiffusionConfig, arguments: argparse.Namespace
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Return figures at the clips' length, and points over lengths, by budget."""
    try:
        costs = BudgetCosts(budgets, config, arguments.size, arguments.size)
    except ValueError as error:
        raise UserError(str(error)) from None
    steps = arguments.steps or COSTED_STEPS
    effort = Effort(arguments.train_batch_size, steps, arguments.rounds, seconds=arguments.curve_seconds)
    _log(f"measuring costs: {arguments.rounds} rounds at {arguments.frames} frames")
    rows = costs.measure_length(arguments.frames, effort)
    _log(f"measuring costs from {LENGTHS[0]} to {LENGTHS[-1]} frames, for about {arguments.curve_seconds:.0f} s")
    settings = {"preset": Path(arguments.config).stem, "batch": arguments.train_batch_size, "steps": steps}
    return {name: {**row, **settings} for name, row in rows.items()}, costs.measure_lengths(effort)


CURVES = {
    "Arithmetic of a training step, GFLOP": "training_gflops",
    "Training step of one clip, s": "train_step_seconds",
    "Denoising step with guidance, s": "denoising_step_seconds",
    "Peak memory of forward and backward, MiB": "gradient_peak_mib",
}


def _curves(lengths: dict[str, Any]) -> dict[str, dict[str, list[Mark]]]:
    """Return the points of each plot; arithmetic is counted at every length, so none of its points is fitted."""
    if not lengths:
        return {}
    return {
        title: {
            name: [(point["frames"], point[key], point["measured"] or key == "training_gflops") for point in points]
            for name, points in lengths.items()
        }
        for title, key in CURVES.items()
    }


def _pipelines(arguments: argparse.Namespace) -> dict[str, Any]:
    """Load the pipelines, by a name that tells them apart, and check the steps and guidance that they are given."""
    pipelines: dict[str, Any] = {}
    for folder in map(Path, arguments.pipelines):
        name = pipeline_name(folder)
        if name in pipelines:
            raise UserError(f"pipeline {folder}: another one is called {name} too; names of folders must differ")
        pipelines[name] = open_pipeline(folder)
        check_fvd_frames(arguments.fvd, pipelines[name].config["num_frames"], f"videos of pipeline {folder}")
        try:
            steps_and_guidance(pipelines[name].config, arguments.steps, arguments.guidance)
        except ValueError as error:
            raise UserError(f"pipeline {folder}: {error}") from None
    return pipelines


def _generate(
    pipelines: dict[str, Any],
    arguments: argparse.Namespace,
    precision: Precision,
    similarity: ClipSimilarity | None,
    perceptual: PerceptualMetrics,
) -> dict[str, dict[str, Any]]:
    """Sample from every pipeline at each of its ratios; return figures by pipeline and ratio."""
    asked = (arguments.prompts, arguments.steps, arguments.guidance, similarity, perceptual.video_features, precision)
    figures = {}
    for name, pipe in pipelines.items():
        for ratio in trained_ratios(pipe):
            try:
                figures[f"{name} at {ratio}x"] = generation_figures(pipe, ratio, *asked)
            except ValueError as error:
                raise UserError(f"pipeline {name}: {error}") from None
    return figures


def _without_clips(record: dict[str, Any]) -> dict[str, Any]:
    """Leave out the figures of single clips: the page and results.jsonl have them."""
    kept = {key: value for key, value in record.items() if key not in ("clip_psnr", "segment_psnr", "segment_psnr_of_whole")}
    if "reconstruction" in kept:
        kept["reconstruction"] = {key: value for key, value in kept["reconstruction"].items() if key != "per_clip"}
    return kept


def _facts(results: _Results, arguments: argparse.Namespace, perceptual: PerceptualMetrics) -> dict[str, str]:
    facts, common = provenance(), results.common
    absent = perceptual.not_measured(arguments.size, arguments.size)
    absent += ["clip: no model given, --clip takes it"] if arguments.pipelines and arguments.clip is None else []
    return {
        "Clips": f"{common['clips']} of {common['videos']}{' ' + common['split'] if common['split'] else ''}",
        "Protocol": results.protocols["reconstruction"],
        "Not measured": "; ".join(absent) or "nothing",
        "Machine": facts["machine"],
        "Commit": facts["commit"],
        "Versions": ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
    }


def _adaptive_text(adaptive: dict[str, Any]) -> str:
    lines = []
    for by in ("clip", "segment"):
        row = adaptive[f"by_{by}"]
        counts = ", ".join(f"{count} at {name}" for name, count in row["parts"].items())
        lines.append(
            f"{row['target']:g} dB by {by}: {counts}; {row['tokens']} tokens, {abs(100 * row['saved']):.1f} % "
            f"{'more' if row['saved'] < 0 else 'fewer'} than {row['fixed']} everywhere ({row['fixed_tokens']} tokens, worst "
            f"case {row['fixed_worst']:.2f} dB); worst case {row['worst']:.2f} dB, {row['missed']} miss the target"
        )
    return "\n".join(lines)


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(run_main(main))
