"""Measure a tokenizer's reconstructions at every temporal ratio.

With --against it is compared, at the ratios that both have, with the autoencoder that it was trained from, or with its
teacher; with --tiny-decoder its decoder is compared with a tiny one. With --contact-sheet the frames of some clips are drawn
too, the original above its reconstructions.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from promag.data.datasets import open_evaluation
from promag.evaluation import before_after
from promag.reports.contact_sheet import write_contact_sheet
from promag.scripts._options import SHARED, check_at_least_one, check_different, check_writable, name_of, share
from promag.tokenizer.checkpoint import load_tokenizer
from promag.tokenizer.config import TokenizerConfig
from promag.tokenizer.geometry import check_frames, check_ratio, check_size, ratio_names
from promag.tokenizer.interpolation import Interpolated, kinds_for
from promag.tokenizer.metrics import PROTOCOL, evaluate_fully, evaluate_lift, motion, psnr, to_uint8
from promag.tokenizer.packaged_metrics import PerceptualMetrics, frame_rates, open_perceptual
from promag.tokenizer.perceptual import check_fvd_frames
from promag.tokenizer.stages import finished_stages
from promag.tokenizer.tiny_decoder import TinyDecoder, load_tiny_decoder
from promag.training.command_line import Parser, run_main
from promag.training.config import UserError
from promag.training.device import best_device
from promag.training.files import write_atomically
from promag.training.precision import Chosen, choose_precision
from promag.training.run import append_result, read_config

ROUNDS, ACROSS = SHARED["--rounds"]["default"], 9


def main(argv: Sequence[str]) -> int:
    """Print one line per ratio; with --out write them, with --record append them to a results file."""
    arguments = _parser().parse_args(argv)
    _check_arguments(arguments)

    model: Any = load_tokenizer(arguments.checkpoint)
    model.to(best_device())
    precision = choose_precision(arguments.precision, best_device())
    ratios = _ratios(arguments, model)
    before, common = _before(arguments, ratios) if arguments.against else (None, ())
    tiny = _tiny_decoder(arguments.tiny_decoder, model) if arguments.tiny_decoder else None
    clips = open_evaluation(arguments.videos, arguments.split, arguments.frames, arguments.size, arguments.count)
    drawn = _check_sheet(arguments, len(clips), ratios) if arguments.contact_sheet else []
    perceptual = open_perceptual(best_device(), arguments.perceptual, arguments.lpips, arguments.fvd)
    fps = frame_rates(clips, perceptual)

    def videos() -> Iterator[torch.Tensor]:
        return (clips.fixed(i)["video"][None] for i in range(len(clips)))

    results = {ratio: _measure(model, videos, ratio, arguments.size, perceptual, precision, fps) for ratio in ratios}
    options = (precision, arguments.rounds or ROUNDS, perceptual, fps)
    compared = {ratio: before_after.compare(before, model, videos, ratio, results[ratio], *options) for ratio in common}
    for ratio, rows in compared.items():
        print(f"{ratio}x, before: {arguments.against}\n{before_after.table(rows)}")
    decoded = {
        ratio: before_after.compare_tiny_decoder(model, tiny, videos, ratio, results[ratio], *options)
        for ratio in (ratios if tiny else ())
    }
    for ratio, rows in decoded.items():
        print(f"{ratio}x, tiny decoder: {arguments.tiny_decoder}\n{before_after.table(rows)}")
    for line in perceptual.not_measured(arguments.size, arguments.size):
        print(f"not measured: {line}")
    record = _record(arguments, precision, perceptual, results, compared, decoded)
    if arguments.out:
        write_atomically(arguments.out, json.dumps(record, indent=1))
    if arguments.record:
        append_result(arguments.record, record)
    if arguments.contact_sheet:
        levels = [(f"{ratio}x", model, ratio) for ratio in ratios]
        _draw(arguments, clips, [*levels, *drawn])
    return 0


def _parser() -> Parser:
    parser = Parser(__doc__)
    share(parser, "checkpoint", "--videos", "--split", "--frames", "--size", "--count", "--ratios", "--precision")
    share(parser, "--perceptual", "--lpips", "--fvd")
    parser.add_argument("--against", metavar="CHECKPOINT", help="compare with this tokenizer: before a training, or a teacher")
    parser.add_argument("--tiny-decoder", metavar="FOLDER", help="compare the tokenizer's decoder with this one")
    share(parser, "--rounds", default=None, help=f"measurements of a comparison, whose median counts; left out: {ROUNDS}")
    sheet = parser.add_argument_group("contact sheet")
    share(sheet, "--contact-sheet")
    sheet.add_argument("--also", nargs="+", metavar="NAME=CHECKPOINT:RATIO", help="draw these tokenizers' too")
    sheet.add_argument("--clips", type=int, nargs="+", help="numbers of clips, from 0; left out: the three with most motion")
    sheet.add_argument("--across", type=int, help=f"pictures per line, evenly over the clip; left out: {ACROSS}")
    sheet.add_argument("--scale", type=int, help="enlargement of the pictures; left out: 1")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the figures here")
    share(parser, "--record", "--note")
    return parser


def _measure(
    model: Any,
    videos: Callable[[], Iterator[torch.Tensor]],
    ratio: int,
    size: int,
    perceptual: PerceptualMetrics,
    precision: Chosen,
    fps: Sequence[float],
) -> dict[str, Any]:
    """Return, and print, the figures at a ratio, with those of lower levels whose frames in between are interpolated."""
    started = time.perf_counter()
    results = evaluate_fully(model, videos(), ratio, perceptual, precision, fps)
    results["lift"] = evaluate_lift(model, videos(), ratio, precision)
    figures = {key: value for key, value in results.items() if isinstance(value, int | float)}
    summary = "  ".join(f"{key} {value:.4g}" for key, value in figures.items())
    print(f"{ratio:>3}x  {summary}  ({time.perf_counter() - started:.1f} s)")
    for low, lifted in results["lift"].items():
        print(f"      lifted to {low}x  latent error {lifted['latent_error']:.4g}  psnr {lifted['psnr']:.4g}")
    if (step := ratio // model.temporal_ratios[0]) > 1:
        for kind in kinds_for(size, size):
            control = evaluate_fully(Interpolated(model, kind), videos(), ratio, perceptual, precision, fps)
            results["interpolated" if kind == "linear" else "interpolated_by_motion"] = control
            how = "interpolated" if kind == "linear" else "interpolated along their motion"
            print(f"      control: {ratio // step}x on one frame of {step}, the others {how}  psnr {control['psnr']:.4g}")
    return results


def _record(
    arguments: argparse.Namespace,
    precision: Chosen,
    perceptual: PerceptualMetrics,
    results: Mapping[int, Any],
    compared: Mapping[int, Any],
    decoded: Mapping[int, Any],
) -> dict[str, Any]:
    """Return the line that is written: figures by ratio, and what they were measured on."""
    coded = f"first {arguments.frames} frames, centre crop, posterior mean; {PROTOCOL}"
    record = {
        "what": "reconstruction",
        "note": arguments.note,
        "training": trained_by(arguments.checkpoint),
        "videos": name_of(arguments.videos),
        "split": arguments.split,
        "frames": arguments.frames,
        "size": arguments.size,
        "precision": precision,
        "protocol": f"{coded}{perceptual.protocol(arguments.size, arguments.size)}",
        "ratios": {str(ratio): values for ratio, values in results.items()},
    }
    if arguments.against:
        record["against"] = {
            "training": trained_by(arguments.against),
            "protocol": before_after.PROTOCOL,
            "ratios": {str(ratio): rows for ratio, rows in compared.items()},
        }
    if arguments.tiny_decoder:
        record["tiny_decoder"] = {"protocol": before_after.SECONDS, "ratios": {str(r): rows for r, rows in decoded.items()}}
    return record


def _check_arguments(arguments: argparse.Namespace) -> None:
    """Refuse illegal numbers, options without effect and files that cannot be written, before a model is loaded."""
    check_at_least_one(arguments, "count", "rounds", "across", "scale")
    for name in ("also", "clips", "across", "scale"):
        if getattr(arguments, name) is not None and not arguments.contact_sheet:
            raise UserError(f"--{name}: is of the contact sheet; give --contact-sheet FILE.png, or leave it out")
    if arguments.rounds is not None and not (arguments.against or arguments.tiny_decoder):
        raise UserError(f"--rounds {arguments.rounds}: nothing is timed without --against or --tiny-decoder; leave it out")
    for name in ("ratios", "clips"):
        check_different(f"--{name}", getattr(arguments, name))
    if (sheet := arguments.contact_sheet) and sheet.suffix.lower() != ".png":
        raise UserError(f"--contact-sheet {sheet}: a .png file is needed")
    check_fvd_frames(arguments.fvd, arguments.frames)
    others = [arguments.videos, arguments.lpips, arguments.fvd]
    check_writable("--out", arguments.out, others)
    check_writable("--contact-sheet", arguments.contact_sheet, [*others, arguments.out])
    check_writable("--record", arguments.record, [*others, arguments.out, arguments.contact_sheet], appended=True)


def _ratios(arguments: argparse.Namespace, model: Any) -> tuple[int, ...]:
    """Return the ratios that are measured; raises UserError where the tokenizer lacks one or does not take the clips at it."""
    ratios = tuple(arguments.ratios or model.temporal_ratios)
    for ratio in sorted(ratios, reverse=True):  # lengths that suit the highest suit all
        try:
            check_ratio(ratio, model.temporal_ratios)
        except ValueError as error:
            raise UserError(f"--ratios: {error}") from None
        check_shape(arguments, model, ratio)
    return ratios


def _tiny_decoder(folder: str, model: Any) -> TinyDecoder:
    """Load a tiny decoder of a tokenizer's latents; raises UserError where it is one of others."""
    tiny: Any = load_tiny_decoder(folder)
    try:
        tiny.check_latents_of(model)
    except ValueError as error:
        raise UserError(f"--tiny-decoder {folder}: {error}") from None
    return tiny.to(best_device(), model.dtype)


def check_shape(arguments: argparse.Namespace, model: Any, ratio: int) -> None:
    """Raise UserError where a tokenizer does not take the clips at a ratio."""
    try:
        check_frames(arguments.frames, ratio, model.latent_step)
        check_size(arguments.size, arguments.size, model.spatial_compression_ratio)
    except ValueError as error:
        raise UserError(str(error)) from None


def _before(arguments: argparse.Namespace, ratios: Sequence[int]) -> tuple[Any, list[int]]:
    """Return the tokenizer to compare with and those of the ratios that it has; raises UserError where it has none."""
    before: Any = load_tokenizer(arguments.against)
    common = [ratio for ratio in ratios if ratio in before.temporal_ratios]
    if not common:
        own, other = ratio_names(ratios), ratio_names(before.temporal_ratios)
        kind = "is measured at" if arguments.ratios else "has"
        raise UserError(f"--against {arguments.against}: has {other}, {arguments.checkpoint} {kind} {own}: no ratio in both")
    check_shape(arguments, before, max(common))
    return before.to(best_device()), common


def _check_sheet(arguments: argparse.Namespace, count: int, ratios: Sequence[int]) -> list[tuple[str, Any, int]]:
    """Return name, model and ratio of the tokenizers that are drawn too; raises UserError for mistakes."""
    for i in arguments.clips or ():
        if not 0 <= i < count:
            raise UserError(f"--clips {i}: there are 0 to {count - 1}")
    names = [text.partition("=")[0] for text in arguments.also or ()]
    check_different("--also", names)
    if taken := {f"{ratio}x" for ratio in ratios}.intersection(names):
        raise UserError(f"--also {min(taken)}: names a level of {arguments.checkpoint} already; choose another name")
    return [_load(text, arguments) for text in arguments.also or ()]


def _load(text: str, arguments: argparse.Namespace) -> tuple[str, Any, int]:
    """Return name, model and ratio of NAME=CHECKPOINT:RATIO; raises UserError where it does not take the clips."""
    name, equals, place = text.partition("=")
    checkpoint, colon, ratio = place.rpartition(":")
    if not (name and equals and checkpoint and colon and ratio.isdecimal()):
        raise UserError(f"--also {text}: NAME=CHECKPOINT:RATIO is needed, for example ours=runs/tokenizer-tiny/tokenizer:16")
    model: Any = load_tokenizer(checkpoint)
    try:
        check_ratio(int(ratio), model.temporal_ratios)
        check_shape(arguments, model, int(ratio))
    except ValueError as error:
        raise UserError(f"--also {text}: {error}") from None
    return name, model.to(best_device()), int(ratio)


def _draw(arguments: argparse.Namespace, clips: Any, tokenizers: Sequence[tuple[str, Any, int]]) -> None:
    """Write the contact sheet and print the PSNR of each clip and tokenizer."""
    chosen = arguments.clips
    if chosen is None:
        chosen = sorted(range(len(clips)), key=lambda i: -float(motion(clips.fixed(i)["video"][None])))[:3]
    sheet = []
    for i in chosen:
        clip, caption = clips.fixed(i)["video"][None], clips.fixed(i)["caption"]
        lines: dict[str, np.ndarray] = {"original": to_uint8(clip)[0].numpy()}
        for name, model, ratio in tokenizers:
            with torch.no_grad():
                output = model(clip.to(model.device), ratio).sample.cpu()
            value = float(psnr(output, clip))
            lines[f"{name}, {value:.1f} dB"] = to_uint8(output)[0].numpy()
            print(f"clip {i}  {name}  {value:.2f} dB")
        sheet.append((f"{i}: {caption}", lines))
    print(write_contact_sheet(arguments.contact_sheet, sheet, arguments.across or ACROSS, arguments.scale or 1))


def trained_by(checkpoint: str) -> dict[str, Any] | None:
    """Return seed, and steps and seconds of each stage, of the training that the checkpoint lies in; None if in none."""
    run = Path(checkpoint).resolve().parent
    config = read_config(run, TokenizerConfig) if (run / "config.yaml").exists() else {}
    if "stages" not in config:
        return None
    return {"seed": config["seed"], "stages": {name: done for name, _, done in finished_stages(run, config)}}


if __name__ == "__main__":
    raise SystemExit(run_main(main))
