"""The demo's page while it trains: rewritten now and then from the files of the run."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from promag.reports.demo_report import Progress, Report, write_report

from .config import DemoConfig, stage_folder, video_folder
from .figures import TITLE, curves, points

REWRITE_SECONDS = 15.0
# Seconds that two x86-64 cores take in float32: they decide how the bar is divided, not how long a run is expected to last.
BASE_FRAME, GROWN_FRAME, LATENT_FRAME, CACHED_FRAME = 0.006, 0.0035, 0.0018, 0.0016  # for one clip, a step or once
TURNS_FRAME = 0.01  # for one clip and a step that trains all levels by turns
TOKEN = 1 / 6000  # for a training step of the transformer
SCORED_VIDEO, FIGURES = 0.6, 30.0


@dataclass(frozen=True)
class Part:
    """One part of the run: its share of the whole, in arbitrary seconds, and how much of it is done, in [0, 1]."""

    name: str
    seconds: float
    done: Callable[[], float]


def parts(config: DemoConfig) -> list[Part]:
    """Return the parts of a run in order."""
    run_parts = []
    for stage in config.stages:
        steps, frames = stage.optimization.steps, stage.frames * stage.optimization.batch_size
        latent = min(stage.latent_pretrain_steps, steps)
        cost = GROWN_FRAME if stage.growth else TURNS_FRAME if stage.by_turns else BASE_FRAME
        seconds = frames * (latent * LATENT_FRAME + (steps - latent) * cost)
        folder = stage_folder(config, stage)
        run_parts.append(Part(f"1/3 tokenizer, {stage.name}", seconds, _trained(folder, steps)))
    cached = _clips(config) * config.frames * CACHED_FRAME
    run_parts.append(Part("2/3 caching latents", cached, lambda: _cached(config)))
    mean = sum(config.tokens(ratio) for ratio in config.ratios) / len(config.ratios)
    seconds = config.diffusion.steps * config.diffusion.batch_size * mean * TOKEN
    run_parts.append(Part("2/3 text-to-video", seconds, _trained(video_folder(config), config.diffusion.steps)))
    last = FIGURES + (0 if config.videos else len(config.ratios) * config.scored * SCORED_VIDEO)
    return [*run_parts, Part("3/3 samples, scores and timings", last, lambda: 0.0)]


def _trained(folder: Path, steps: int) -> Callable[[], float]:
    def done() -> float:
        if (folder / "done.json").exists():
            return 1.0
        logged = points(folder / "metrics.jsonl", "step")
        return min(1.0, logged[-1][0] / steps) if logged else 0.0

    return done


def _clips(config: DemoConfig) -> int:
    """Return how many clips are trained on."""
    index = Path(config.output_dir) / "clips" / "train.jsonl"
    return index.read_bytes().count(b"\n") if config.videos and index.exists() else config.synthetic_clips


def _cached(config: DemoConfig) -> float:
    folders = list((Path(config.output_dir) / "latents").glob("train-*x"))
    if any((folder / "index.json").exists() for folder in folders):
        return 1.0
    begun = [folder for folder in folders if (folder / "fingerprint.json").exists()]
    if not begun:
        return 0.0
    shard_size = json.loads((begun[0] / "fingerprint.json").read_text(encoding="utf-8"))["shard_size"]
    shards = -(-_clips(config) // shard_size)
    return min(1.0, len(list(begun[0].glob("shard-*.safetensors"))) / shards)


class LivePage:
    """Rewrites the page of a run in a thread of its own, inside a `with` block, until the run's last report is written.

    `report` is what there is to show beside the curves; set it whenever there is more.
    """

    def __init__(self, config: DemoConfig, seconds: float = REWRITE_SECONDS):
        self.config, self.seconds = config, seconds
        self.report = Report(title=TITLE)
        self.parts = parts(config)
        self.started, self.done_before = time.monotonic(), self._done()
        self._over, self._lock = threading.Event(), threading.Lock()

    def __enter__(self) -> "LivePage":
        self.thread = threading.Thread(target=self._rewrite, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.thread.join()

    def write(self) -> Path:
        """Write the page as the run is now."""
        with self._lock:
            report = replace(self.report, curves=curves(self.config))
            return write_report(self.config.output_dir, report, self.progress())

    def progress(self) -> Progress:
        """Return how far the run is; the time to go follows from what this call has done so far."""
        part = next((part for part in self.parts if part.done() < 1), self.parts[-1])
        done = self._done()
        since, here = time.monotonic() - self.started, done - self.done_before
        return Progress(part.name, done, since / here * (1 - done) if here > 0.01 else None)

    def _done(self) -> float:
        return sum(part.seconds * part.done() for part in self.parts) / sum(part.seconds for part in self.parts)

    def _rewrite(self) -> None:
        while not self._over.wait(self.seconds):
            self.write()
