"""The page of a run: token budgets, reconstructions, samples, curves and facts; written early and rewritten as it proceeds.

Figures and uint8 videos (T, H, W, 3) go in, files come out; no model is known here. The columns of one clip lie in one
video, hence in step.
"""
# ruff: noqa: RUF001 (the page is set with ×)

import dataclasses
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from promag.training.files import write_atomically

from .page import render_page
from .plots import line_plot
from .side_by_side import Film, make_film
from .tables import FASTER, FEWER, Interval, Line, Lines, share_line


@dataclass(frozen=True, eq=False)
class ReconstructionClip:
    """An unseen clip and its reconstruction at each temporal ratio, uint8 (T, H, W, 3) each, with PSNR in dB."""

    name: str
    caption: str
    fps: float
    original: np.ndarray
    by_ratio: Mapping[int, np.ndarray]
    psnr: Mapping[int, float]

    @cached_property
    def film(self) -> Film:
        """The original and the reconstructions, encoded once however often a page shows this clip."""
        _check_figures(self.name, self.psnr, self.by_ratio)
        return make_film(self.name, {"original": self.original, **_by_label(self.by_ratio)}, self.fps)


@dataclass(frozen=True, eq=False)
class SampleClip:
    """Videos sampled for one prompt, by temporal ratio; `read` is what a scorer read in each, and whether it matches."""

    prompt: str
    fps: float
    by_ratio: Mapping[int, np.ndarray]
    read: Mapping[int, tuple[str, bool]] | None

    @cached_property
    def film(self) -> Film:
        """The videos, encoded once however often a page shows this clip."""
        _check_figures(self.prompt, self.read or {}, self.by_ratio)
        return make_film(self.prompt, _by_label(self.by_ratio), self.fps)


@dataclass(frozen=True)
class BudgetRow:
    """Figures of one temporal ratio; None was not measured, and `missing` may say why, by field name.

    PSNR is in dB: mean and standard deviation over clips, and the mean of first frames alone. Times are in seconds.
    `accuracy` has fractions in [0, 1] by name (shape, colour, motion, all). `readable` is the same of reconstructed clips,
    an upper bound for any text-to-video model of that latent space. Raises ValueError for a reason given for a figure that
    does not exist.
    """

    ratio: int
    latent_frames: int | None = None
    tokens: int | None = None
    latent_values_per_pixel: float | None = None
    psnr: float | None = None
    psnr_std: float | None = None
    psnr_first: float | None = None
    ssim: float | None = None
    train_step_seconds: float | None = None
    denoising_seconds: float | None = None
    sampling_seconds: float | None = None
    validation_loss: float | None = None
    accuracy: Mapping[str, Interval] | None = None
    readable: Mapping[str, Interval] | None = None
    missing: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        names = [f.name for f in dataclasses.fields(self)][1:-1]
        if unknown := sorted(set(self.missing) - set(names)):
            raise ValueError(f"missing={unknown}: there are no such figures; legal: {', '.join(names)}")


@dataclass(frozen=True, eq=False)
class Report:
    """Everything that the page shows; a section without content is left out. The first of `rows` is the baseline.

    `chance` is the accuracy of guessing, by the names of `BudgetRow.accuracy`. `curves` has (step, value) points by name; a
    name "plot/line" puts the line into the plot of that name, which should end with the unit. `shipped` and
    `shipped_reconstructions` come from checkpoints that were trained before this run; they stand before the run's own.
    """

    title: str
    summary: Sequence[str] = ()
    rows: Sequence[BudgetRow] = ()
    chance: Mapping[str, float] | None = None
    reconstructions: Sequence[ReconstructionClip] = ()
    samples: Sequence[SampleClip] = ()
    curves: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    shipped: Sequence[SampleClip] = ()
    shipped_reconstructions: Sequence[ReconstructionClip] = ()


@dataclass(frozen=True)
class Progress:
    """Progress of an unfinished run.

    Args:
        stage: the running part, for example "1/3 tokenizer, 8x: step 120 of 400".
        fraction: share of the whole run that is done, in [0, 1].
        seconds_left: expected time to go; None while it is not known.
        reload_seconds: the open page loads itself again after so many seconds, unless its reader has paused the videos.

    Raises ValueError for figures outside these ranges.
    """

    stage: str
    fraction: float
    seconds_left: float | None = None
    reload_seconds: int = 15

    def __post_init__(self):
        if not (0 <= self.fraction <= 1 and self.reload_seconds >= 1 and 0 <= (self.seconds_left or 0) < math.inf):
            raise ValueError(f"{self}: fraction from 0 to 1, seconds_left from 0 and reload_seconds from 1 are legal")

    @property
    def time_left(self) -> str:
        """The time to go in words, empty while it is not known."""
        if self.seconds_left is None:
            return ""
        minutes = math.ceil(self.seconds_left / 60)
        return "less than a minute to go" if minutes <= 1 else f"about {minutes} minutes to go"


def write_report(folder: str | os.PathLike, report: Report, progress: Progress | None = None) -> Path:
    """Write `report.html`, `report.json` (all but the pixels) and `videos/*.mp4` into `folder`; return the page's path.

    Call it with `progress` as soon as there is something to show, and again whenever there is more: the page says how far
    the run is, names the sections still to come, and reloads itself. Pass the same clip objects again, which are then not
    encoded again. The last call, without `progress`, writes the finished page. Nothing is kept between calls.

    Each file appears only when whole, the page last. Before anything is written, ValueError is raised for videos of one
    clip that differ in shape or are not uint8 (T, H, W, 3) with even sizes, and for figures that are not finite.
    """
    folder = Path(folder)
    groups: dict[str, Sequence[ReconstructionClip | SampleClip]] = {
        "reconstruction": report.reconstructions,
        "sample": report.samples,
        "shipped": report.shipped,
        "shipped-reconstruction": report.shipped_reconstructions,
    }
    files = {f"videos/{g}-{i:02d}.mp4": clip.film.mp4 for g, clips in groups.items() for i, clip in enumerate(clips, 1)}
    figures = json.dumps(_figures(report, progress), indent=1, ensure_ascii=False) + "\n"
    files |= {"report.json": figures.encode(), "report.html": _page(report, progress).encode()}
    for name, content in files.items():
        write_atomically(folder / name, content)
    return folder / "report.html"


def _page(report: Report, progress: Progress | None) -> str:
    names = [f"{row.ratio}×" for row in report.rows]
    reasons = [f"{row.ratio}×: {reason}" for row in report.rows for reason in dict.fromkeys(row.missing.values())]
    contents = {"Token budgets": report.rows, "Reconstructions": report.reconstructions, "Samples": report.samples}
    return render_page(
        "demo.html",
        report=report,
        progress=progress,
        to_come=[title for title, content in contents.items() if not content],
        written=time.strftime("%H:%M:%S"),
        columns=names,
        lines=budget_lines(report.rows, report.chance or {}),
        reasons="; ".join(reasons),
        plots=_plots(report.curves),
    )


def _plots(curves: Mapping[str, Sequence[tuple[float, float]]]) -> dict[str, Markup]:
    plots: dict[str, dict[str, Sequence[tuple[float, float]]]] = {}
    for name, points in curves.items():
        plot, _, line = name.rpartition("/")
        plots.setdefault(plot, {})[line] = points
    return {name: Markup(line_plot(lines, "training step", name or "value")) for name, lines in plots.items()}


def budget_lines(rows: Sequence[BudgetRow], chance: Mapping[str, float]) -> Lines:
    """Return the figures of rows as the lines of a table."""

    def line(name: str, label: str, *settings: Any, spread: str = "", **options: Any) -> Line:
        if spread:
            options["spreads"] = [getattr(row, spread) for row in rows]
        reasons = [row.missing.get(name) for row in rows]
        return Line(label, [getattr(row, name) for row in rows], *settings, reasons=reasons, **options)

    def shares(name: str) -> list[Line]:
        reasons = [row.missing.get(name) for row in rows]
        values = [getattr(row, name) or {} for row in rows]
        hints = {k: f"chance {100 * v:.{0 if v >= 0.01 else 2}f}" for k, v in chance.items()}
        return [
            share_line(part, [v.get(part) for v in values], better=1, reasons=reasons, hint=hints.get(part, ""))
            for part in dict.fromkeys(part for v in values for part in v)
        ]

    groups = {
        "Token budget": [
            line("latent_frames", "Latent frames", 0, words=FEWER),
            line("tokens", "Tokens", 0, words=FEWER),
            line("latent_values_per_pixel", "Latent values per pixel", words=FEWER),
        ],
        "Reconstruction": [
            line("psnr", "PSNR (dB), ± deviation between clips", 2, 1, spread="psnr_std"),
            line("psnr_first", "PSNR of first frames (dB)", 2, 1),
            line("ssim", "SSIM", 3, 1),
        ],
        "Text to video": [
            line("train_step_seconds", "Training step (s)", None, -1, FASTER),
            line("denoising_seconds", "Denoising a video (s)", None, -1, FASTER),
            line("sampling_seconds", "Sampling a video, decoding included (s)", None, -1, FASTER),
            line("validation_loss", "Validation loss (each in its own latent space)", 3, compared=False),
        ],
        "Prompt accuracy (%), with 95 % interval": shares("accuracy"),
        "The same scorer on reconstructions (%): the upper bound for text to video": shares("readable"),
    }
    return {title: lines for title, lines in groups.items() if lines}


# -- figures and checks ----------------------------------------------------------------------------------------------


def _figures(report: Report, progress: Progress | None) -> dict[str, Any]:
    """Return the content of `report.json`; ValueError names a figure that is not finite."""
    figures = {
        "title": report.title,
        "summary": report.summary,
        "progress": progress and dataclasses.asdict(progress),
        "rows": [dataclasses.asdict(row) for row in report.rows],
        "chance": report.chance,
        "reconstructions": [_facts(c, f"reconstruction-{i:02d}") for i, c in enumerate(report.reconstructions, 1)],
        "samples": [_facts(c, f"sample-{i:02d}") for i, c in enumerate(report.samples, 1)],
        "shipped": [_facts(c, f"shipped-{i:02d}") for i, c in enumerate(report.shipped, 1)],
        "shipped_reconstructions": [
            _facts(c, f"shipped-reconstruction-{i:02d}") for i, c in enumerate(report.shipped_reconstructions, 1)
        ],
        "curves": report.curves,
        "facts": report.facts,
    }
    return {name: _plain(value, name) for name, value in figures.items()}


def _facts(clip: ReconstructionClip | SampleClip, name: str) -> dict[str, Any]:
    frames, height, width = clip.film.shape
    video = {"frames": frames, "height": height, "width": width, "video": f"videos/{name}.mp4", "columns": clip.film.labels}
    if isinstance(clip, ReconstructionClip):
        return {"name": clip.name, "caption": clip.caption, "fps": clip.fps, "psnr": clip.psnr, **video}
    return {"prompt": clip.prompt, "fps": clip.fps, "read": clip.read, **video}


def _plain(value: Any, name: str) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner, f"{name}.{key}") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, f"{name}.{i}") for i, inner in enumerate(value)]
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value}: figures must be finite; give None for one that was not measured")
    return value


def _by_label(by_ratio: Mapping[int, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{ratio}×": by_ratio[ratio] for ratio in sorted(by_ratio)}


def _check_figures(title: str, figures: Mapping[int, Any], by_ratio: Mapping[int, np.ndarray]) -> None:
    if extra := sorted(set(figures) - set(by_ratio)):
        raise ValueError(f"{title!r} has figures at {extra} without videos; it has those of {sorted(by_ratio)}")
