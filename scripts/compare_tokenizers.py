"""Draw the same clips as several tokenizers reconstruct them, with PSNR."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from promag.data.datasets import open_dataset
from promag.reports.contact_sheet import write_contact_sheet
from promag.tokenizer.geometry import check_frames, check_ratio, check_size
from promag.tokenizer.metrics import motion, psnr, to_uint8
from promag.tokenizer.train import load_tokenizer
from promag.training.config import UserError, run_main


def main(argv: Sequence[str]) -> int:
    """Write the sheet and print the PSNR of each clip and tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "tokenizers", nargs="+", metavar="NAME=CHECKPOINT:RATIO", help="what to call it, where it is, which ratio"
    )
    parser.add_argument("--videos", required=True, help="a clips.jsonl, or shapes")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--clips", type=int, nargs="+", help="numbers of clips, from 0; left out: the three with most motion")
    parser.add_argument("--frames", type=int, default=65, help="frames from the start of each clip")
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels")
    parser.add_argument("--across", type=int, default=9, help="pictures per line, evenly over the clip")
    parser.add_argument("--scale", type=int, default=1, help="by how much pixels are enlarged")
    arguments = parser.parse_args(argv)
    if arguments.out.suffix != ".png":
        raise UserError(f"--out {arguments.out}: a .png file is needed")
    models = [_load(text, arguments.frames, arguments.size) for text in arguments.tokenizers]

    source = open_dataset(arguments.videos, "eval", arguments.frames, arguments.size, 64)
    chosen = arguments.clips
    if chosen is None:
        chosen = sorted(range(len(source)), key=lambda i: -float(motion(source.fixed(i)["video"][None])))[:3]
    sheet = []
    for i in chosen:
        if not 0 <= i < len(source):
            raise UserError(f"--clips {i}: there are 0 to {len(source) - 1}")
        clip, caption = source.fixed(i)["video"][None], source.fixed(i)["caption"]
        lines: dict[str, np.ndarray] = {"original": to_uint8(clip)[0].numpy()}
        for name, model, ratio in models:
            with torch.no_grad():
                output = model(clip, ratio).sample
            value = float(psnr(output, clip))
            lines[f"{name}, {value:.1f} dB"] = to_uint8(output)[0].numpy()
            print(f"clip {i}  {name}  {value:.2f} dB")
        sheet.append((f"{i}: {caption}", lines))
    print(write_contact_sheet(arguments.out, sheet, arguments.across, arguments.scale))
    return 0


def _load(text: str, frames: int, size: int) -> tuple[str, Any, int]:
    """Return name, model and ratio of NAME=CHECKPOINT:RATIO."""
    name, equals, place = text.partition("=")
    checkpoint, colon, ratio = place.rpartition(":")
    if not (name and equals and checkpoint and colon and ratio.isdecimal()):
        raise UserError(f"{text}: NAME=CHECKPOINT:RATIO is needed, for example ours=runs/tokenizer-tiny/tokenizer:16")
    model = load_tokenizer(checkpoint)
    try:
        check_ratio(int(ratio), model.temporal_ratios)
        check_frames(frames, int(ratio))
        check_size(size, size)
    except ValueError as error:
        raise UserError(f"{text}: {error}") from None
    return name, model, int(ratio)


if __name__ == "__main__":
    raise SystemExit(run_main(main))
