"""Measure prompt accuracy, flicker and sharpness of pipelines at every token budget.

They are measured on trained and on unseen combinations. Prompt accuracy is also measured on the
tokenizer's reconstructions, which no text-to-video model of its latents can exceed.

Prompts are captions of generated clips (`data.train: synthetic`): a scorer reads shape, colour and motion back; jitter and
high-frequency energy are compared with clips rendered for the same captions. For a pipeline in the folder of its run, the
steps, seconds and validation loss of its training are printed too.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import FirstBlockCacheConfig

from promag.data.datasets import open_dataset
from promag.diffusion.validation import training_figures
from promag.evaluation.generation import steadiness_and_sharpness, warm_up
from promag.evaluation.prompt_accuracy import (
    accuracies_of_reconstructions,
    accuracy_figures,
    format_accuracy,
    scenes_to_score,
)
from promag.pipelines.inputs import steps_and_guidance
from promag.pipelines.sampling import open_pipeline, sample_timed, trained_ratios
from promag.scripts._options import check_at_least_one, check_different, check_writable, name_of, share
from promag.scripts._parts import TOKENIZER, load_lora
from promag.training.command_line import Parser, run_main
from promag.training.config import UserError
from promag.training.device import best_device
from promag.training.precision import Precision, choose_precision
from promag.training.run import append_result

PROTOCOL = (
    "one video for each prompt, noise seeded by its number; Wilson 95 % intervals; seconds of a video, decoding included, "
    "after an untimed call at each ratio"
)


def main(argv: Sequence[str]) -> int:
    """Sample, score, print a line for each pipeline, ratio and kind of prompts, and append them to --record."""
    arguments = _parse(argv)
    arguments.precision = choose_precision(arguments.precision, best_device())
    pipe: Any = None
    known: Sequence[int] = ()
    for folder in arguments.checkpoints:  # a mistake in the last one shows before the first is sampled
        pipe, known = _open(folder, arguments)
    settings = {"note": arguments.note}
    if arguments.first_block_cache is not None:
        settings["first_block_cache"] = arguments.first_block_cache
    for part in ("lora", "tokenizer"):
        if (place := getattr(arguments, part)) is not None:
            settings[part] = str(place)
    for folder in arguments.checkpoints:
        if len(arguments.checkpoints) > 1:  # one at a time is in memory
            pipe, known = _open(folder, arguments)
        name = pipeline_name(folder)
        for ratio in arguments.ratios or known:
            trained, facts = training_figures(folder.resolve().parent, ratio), {"pipeline": name, "ratio": ratio, **settings}
            for unseen in (False, True):
                try:
                    if not unseen:
                        warm_up(pipe, ratio, arguments.prompts, arguments.guidance, arguments.precision)
                    figures = _figures(pipe, ratio, unseen, arguments)
                except ValueError as error:
                    raise UserError(f"pipeline {folder}: {error}") from None
                accuracy = format_accuracy(figures["accuracy"])
                quality = (
                    f"jitter {figures['jitter']:.3f} (of the true clips {figures['jitter_of_true_clips']:.3f}), "
                    f"high-frequency energy {figures['high_frequency']:.3f} of theirs"
                )
                print(f"{name} {ratio}x, {'unseen' if unseen else 'trained'} combinations: {accuracy}; {quality}")
                motions = [f"{motion} {right} of {count}" for motion, (right, count) in figures["right_by_motion"].items()]
                print(f"  all right by motion: {', '.join(motions)}")
                if arguments.record:
                    record = {"what": "prompt accuracy", "unseen": unseen, **facts, **figures, "training": trained}
                    append_result(arguments.record, {**record, "protocol": PROTOCOL})
            ceiling = reconstructions(pipe, ratio, arguments.prompts, arguments.precision)
            print(f"{name} {ratio}x, reconstructions of as many unseen clips: {format_accuracy(ceiling)}")
            if arguments.record:
                record = {"what": "prompt accuracy of reconstructions", **facts, "clips": arguments.prompts}
                append_result(arguments.record, {**record, "accuracy": ceiling})
            if trained:
                figures = {key: value for key, value in trained.items() if key != "curve"}
                print(f"{name} {ratio}x: " + ", ".join(f"{key} {value:g}" for key, value in figures.items()))
    return 0


def pipeline_name(folder: Path) -> str:
    """Return the name of a pipeline's folder; where that is called pipeline, the name of its run."""
    name = name_of(folder)
    return folder.resolve().parent.name if name == "pipeline" else name


def _open(folder: Path, arguments: argparse.Namespace) -> tuple[Any, Sequence[int]]:
    """Load a pipeline as it is measured; return it and the ratios that it was trained at, with adapters those of both.

    Raises UserError for other ratios in --ratios.
    """
    pipe: Any = open_pipeline(folder, arguments.tokenizer)
    pipe.set_progress_bar_config(disable=True)
    legal = trained_ratios(pipe) if arguments.lora is None else load_lora(pipe, arguments.lora)
    for ratio in arguments.ratios or ():
        if ratio not in legal:
            raise UserError(f"--ratios {ratio}: {arguments.lora or folder} was trained at {', '.join(f'{r}x' for r in legal)}")
    if (threshold := arguments.first_block_cache) is not None:
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    return pipe, legal


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("checkpoints", nargs="+", type=Path, metavar="checkpoint", help="folder of a pipeline")
    add(
        "--first-block-cache",
        type=float,
        metavar="THRESHOLD",
        help="diffusers' cache: a step whose first block changes by a smaller share than this leaves the other blocks out",
    )
    add("--tokenizer", **TOKENIZER)
    share(parser, "--ratios", "--prompts", "--steps", "--guidance", "--precision", "--lora", "--record", "--note")
    arguments = parser.parse_args(argv)
    if (threshold := arguments.first_block_cache) is not None and not threshold > 0:
        raise UserError(f"--first-block-cache {threshold:g}: a number above 0 is needed")
    check_numbers(arguments)
    check_different("--ratios", arguments.ratios)
    check_writable("--record", arguments.record, appended=True)
    return arguments


def check_numbers(arguments: argparse.Namespace) -> None:
    """Raise UserError for prompts or steps below 1, and for guidance that is not finite."""
    check_at_least_one(arguments, "prompts", "steps")
    if (guidance := arguments.guidance) is not None and not math.isfinite(guidance):
        raise UserError(f"--guidance {guidance:g}: a finite number is needed")


def _figures(pipe: Any, ratio: int, unseen: bool, arguments: argparse.Namespace) -> dict[str, Any]:
    scenes = scenes_to_score(arguments.prompts, seed=0, unseen=unseen)
    steps, guidance = steps_and_guidance(pipe.config, arguments.steps, arguments.guidance)
    settings = {"prompts": arguments.prompts, "steps": steps, "guidance": guidance, "precision": arguments.precision}
    videos, seconds = sample_timed(
        pipe,
        [scene.caption() for scene in scenes],
        steps,
        guidance,
        arguments.precision,
        name=f"{ratio}x",
        temporal_ratio=ratio,
    )
    quality = steadiness_and_sharpness(videos, scenes)
    return {**settings, **accuracy_figures(videos, scenes), **quality, "sampling_seconds": seconds.total / len(videos)}


def reconstructions(pipe: Any, ratio: int, clips: int, precision: Precision = "auto") -> dict[str, tuple[float, float, float]]:
    """Return the accuracy of the tokenizer's reconstructions of unseen generated clips, the ceiling of the pipeline's."""
    config = pipe.config
    source = open_dataset("synthetic", "eval", config["num_frames"], (config["height"], config["width"]), clips)
    return accuracies_of_reconstructions(pipe.vae, [source.fixed(i) for i in range(clips)], ratio, precision)


if __name__ == "__main__":
    raise SystemExit(run_main(main))
