"""Measure a tokenizer's reconstructions at every temporal ratio.

With --contact-sheet the frames of some clips are drawn too, the original above its reconstructions.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from promag.data.datasets import open_evaluation
from promag.reports.contact_sheet import write_contact_sheet
from promag.scripts._options import share
from promag.tokenizer.checkpoint import load_tokenizer
from promag.tokenizer.geometry import check_frames, check_ratio, check_size
from promag.tokenizer.metrics import PROTOCOL, evaluate_fully, evaluate_lift, motion, psnr, to_uint8
from promag.tokenizer.perceptual import LPIPS, VideoFeatures
from promag.training.command_line import Parser, run_main
from promag.training.config import UserError, load_yaml
from promag.training.device import best_device
from promag.training.files import write_atomically
from promag.training.precision import choose_precision
from promag.training.run import append_result


def main(argv: Sequence[str]) -> int:
    """Print one line per ratio; with --out write them, with --record append them to a results file."""
    parser = Parser(__doc__)
    share(parser, "checkpoint", "--videos", "--split", "--frames", "--size", "--count", "--precision", "--lpips", "--fvd")
    sheet = parser.add_argument_group("contact sheet")
    share(sheet, "--contact-sheet")
    sheet.add_argument("--also", nargs="+", default=[], metavar="NAME=CHECKPOINT:RATIO", help="draw these tokenizers' too")
    sheet.add_argument("--clips", type=int, nargs="+", help="numbers of clips, from 0; left out: the three with most motion")
    sheet.add_argument("--across", type=int, default=9, help="pictures per line, evenly over the clip")
    sheet.add_argument("--scale", type=int, default=1, help="enlargement of the pictures")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the figures here")
    share(parser, "--record", "--note")
    arguments = parser.parse_args(argv)

    model: Any = load_tokenizer(arguments.checkpoint)
    model.to(best_device())
    precision = choose_precision(arguments.precision, best_device())
    try:
        check_frames(arguments.frames, model.temporal_ratios[-1])
        check_size(arguments.size, arguments.size)
    except ValueError as error:
        raise UserError(str(error)) from None
    clips = open_evaluation(arguments.videos, arguments.split, arguments.frames, arguments.size, arguments.count)
    drawn = _check_sheet(arguments, len(clips)) if arguments.contact_sheet else []
    lpips = LPIPS.load(arguments.lpips).to(best_device()) if arguments.lpips else None
    features = VideoFeatures(arguments.fvd) if arguments.fvd else None
    results = {}
    for ratio in model.temporal_ratios:
        started = time.perf_counter()
        videos = (clips.fixed(i)["video"][None] for i in range(len(clips)))
        results[ratio] = evaluate_fully(model, videos, ratio, lpips, features, precision)
        videos = (clips.fixed(i)["video"][None] for i in range(len(clips)))
        results[ratio]["lift"] = evaluate_lift(model, videos, ratio, precision)
        figures = {key: value for key, value in results[ratio].items() if isinstance(value, int | float)}
        summary = "  ".join(f"{key} {value:.4g}" for key, value in figures.items())
        print(f"{ratio:>3}x  {summary}  ({time.perf_counter() - started:.1f} s)")
        for low, lifted in results[ratio]["lift"].items():
            print(f"      lifted to {low}x  latent error {lifted['latent_error']:.4g}  psnr {lifted['psnr']:.4g}")
    if arguments.contact_sheet:
        levels = [(f"{ratio}x", model, ratio) for ratio in model.temporal_ratios]
        _draw(arguments, clips, [*levels, *drawn])
    absent = [name for name in ("lpips", "fvd") if getattr(arguments, name) is None]
    if absent:
        print(f"not measured for want of weights: {', '.join(absent)}")
    record = {
        "what": "reconstruction",
        "note": arguments.note,
        "training": trained_by(arguments.checkpoint),
        "videos": Path(arguments.videos).name,
        "split": arguments.split,
        "frames": arguments.frames,
        "size": arguments.size,
        "precision": precision,
        "protocol": f"first {arguments.frames} frames, centre crop, posterior mean; {PROTOCOL}",
        "ratios": {str(ratio): values for ratio, values in results.items()},
    }
    if arguments.out:
        write_atomically(arguments.out, json.dumps(record, indent=1))
    if arguments.record:
        append_result(arguments.record, record)
    return 0


def _check_sheet(arguments: argparse.Namespace, count: int) -> list[tuple[str, Any, int]]:
    """Return name, model and ratio of the tokenizers that are drawn too; raises UserError for mistakes."""
    if arguments.contact_sheet.suffix.lower() != ".png":
        raise UserError(f"--contact-sheet {arguments.contact_sheet}: a .png file is needed")
    for i in arguments.clips or ():
        if not 0 <= i < count:
            raise UserError(f"--clips {i}: there are 0 to {count - 1}")
    return [_load(text, arguments.frames) for text in arguments.also]


def _load(text: str, frames: int) -> tuple[str, Any, int]:
    """Return name, model and ratio of NAME=CHECKPOINT:RATIO."""
    name, equals, place = text.partition("=")
    checkpoint, colon, ratio = place.rpartition(":")
    if not (name and equals and checkpoint and colon and ratio.isdecimal()):
        raise UserError(f"--also {text}: NAME=CHECKPOINT:RATIO is needed, for example ours=runs/tokenizer-tiny/tokenizer:16")
    model: Any = load_tokenizer(checkpoint)
    try:
        check_ratio(int(ratio), model.temporal_ratios)
        check_frames(frames, int(ratio))
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
    print(write_contact_sheet(arguments.contact_sheet, sheet, arguments.across, arguments.scale))


def trained_by(checkpoint: str) -> dict[str, Any] | None:
    """Return seed, and steps and seconds of each stage, of the training that the checkpoint lies in; None if in none."""
    run = Path(checkpoint).parent
    if not (run / "config.yaml").exists():
        return None
    stages = {done.parent.name: json.loads(done.read_text(encoding="utf-8")) for done in sorted(run.glob("*/done.json"))}
    return {"seed": load_yaml(str(run / "config.yaml")).get("seed"), "stages": stages}


if __name__ == "__main__":
    raise SystemExit(run_main(main))
