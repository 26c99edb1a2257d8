"""Measure a tokenizer's reconstructions at every temporal ratio."""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from promag.data.datasets import open_evaluation
from promag.tokenizer.geometry import check_frames, check_size
from promag.tokenizer.metrics import PROTOCOL, evaluate_fully, evaluate_lift
from promag.tokenizer.perceptual import LPIPS, VideoFeatures
from promag.tokenizer.train import load_tokenizer
from promag.training.config import UserError, load_yaml, run_main
from promag.training.device import best_device
from promag.training.run import append_result, write_atomically


def main(argv: Sequence[str]) -> int:
    """Print one line per ratio; with --json write them, with --record append them to a results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("checkpoint", help="folder of a tokenizer, or of a pipeline")
    parser.add_argument("--videos", required=True, help="folder, CSV, JSONL, one video, a clips.jsonl, tar shards, or shapes")
    parser.add_argument("--split", help="keep these rows of a CSV")
    parser.add_argument("--frames", type=int, default=65, help="frames from the start of each clip")
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels")
    parser.add_argument("--count", type=int, default=64, help="generated clips, where --videos is shapes")
    parser.add_argument("--lpips", help="folder with the weights of vgg16 (torchvision) and vgg.pth (lpips), for LPIPS")
    parser.add_argument("--fvd", help="TorchScript file of an I3D, for FVD")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--record", type=Path, help="append a JSON line with commit and machine to this results file")
    parser.add_argument("--note", default="", help="what the recorded line says about the checkpoint")
    arguments = parser.parse_args(argv)

    model: Any = load_tokenizer(arguments.checkpoint)
    model.to(best_device())
    try:
        check_frames(arguments.frames, model.temporal_ratios[-1])
        check_size(arguments.size, arguments.size)
    except ValueError as error:
        raise UserError(str(error)) from None
    clips = open_evaluation(arguments.videos, arguments.split, arguments.frames, arguments.size, arguments.count)
    lpips = LPIPS.load(arguments.lpips).to(best_device()) if arguments.lpips else None
    features = VideoFeatures(arguments.fvd) if arguments.fvd else None
    results = {}
    for ratio in model.temporal_ratios:
        started = time.perf_counter()
        videos = (clips.fixed(i)["video"][None] for i in range(len(clips)))
        results[ratio] = evaluate_fully(model, videos, ratio, lpips, features)
        results[ratio]["lift"] = evaluate_lift(model, (clips.fixed(i)["video"][None] for i in range(len(clips))), ratio)
        figures = {key: value for key, value in results[ratio].items() if isinstance(value, int | float)}
        found = "  ".join(f"{key} {value:.4g}" for key, value in figures.items())
        print(f"{ratio:>3}x  {found}  ({time.perf_counter() - started:.1f} s)")
        for low, lifted in results[ratio]["lift"].items():
            print(f"      lifted to {low}x  latent error {lifted['latent_error']:.4g}  psnr {lifted['psnr']:.4g}")
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
        "protocol": f"first {arguments.frames} frames, centre crop, posterior mean; {PROTOCOL}",
        "ratios": {str(ratio): values for ratio, values in results.items()},
    }
    if arguments.json:
        write_atomically(arguments.json, json.dumps(record, indent=1))
    if arguments.record:
        append_result(arguments.record, record)
    return 0


def trained_by(checkpoint: str) -> dict[str, Any] | None:
    """Return seed, and steps and seconds of each stage, of the training that the checkpoint lies in; None if in none."""
    run = Path(checkpoint).parent
    if not (run / "config.yaml").exists():
        return None
    stages = {done.parent.name: json.loads(done.read_text()) for done in sorted(run.glob("*/done.json"))}
    return {"seed": load_yaml(str(run / "config.yaml")).get("seed"), "stages": stages}


if __name__ == "__main__":
    raise SystemExit(run_main(main))
