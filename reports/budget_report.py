"""The page of a comparison of token budgets: a player for the clips, tables, plots, and the cheapest budget for a target.

Figures (as they are written to results.jsonl) and the clips' videos go in, one file comes out. H.264 in mp4 is what every
browser plays, Safari on iOS included. Films are encoded at a quality whose errors are far below those of the budgets, with a
key frame every few frames, so that stepping is quick.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from promag.evaluation.budgets import ORIGINAL, ClipFacts
from promag.training.files import write_atomically

from .page import jpeg_uri, render_page
from .plots import Mark, colour, marked_plot
from .side_by_side import Film, make_film
from .tables import FASTER, FEWER, LESS, Line, Lines, number, share_line

LIMIT = 28_000_000  # bytes of the page, below the 30 MB that mail and wikis take
CRF, KEY_EVERY = 15, 8
COLUMNS = 4  # tiles in a row of a film
POSTER = 112  # pixels


@dataclass(frozen=True, eq=False)
class BudgetReport:
    """Everything that the page shows.

    Args:
        title: title of the page.
        budgets: figures by name, as `promag compare-budgets` records them; the levels of the checkpoint, most tokens
            first, then other autoencoders.
        levels: names of the checkpoint's levels.
        clips: in the order of `per_clip` of the figures.
        adaptive: the result of `adaptive_figures`, or None.
        curves: points (frames, value, measured) by plot and line.
        generation: figures by pipeline and ratio.
        facts: how the figures were measured.
        weights: names among NEEDS_WEIGHTS whose weights were given.
    """

    title: str
    budgets: Mapping[str, Mapping[str, Any]]
    levels: Sequence[str]
    clips: Sequence[ClipFacts]
    adaptive: Mapping[str, Any] | None = None
    curves: Mapping[str, Mapping[str, Sequence[Mark]]] = field(default_factory=dict)
    generation: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    weights: Collection[str] = ()

    def per_clip(self, budget: str, clip: int) -> Mapping[str, Any]:
        """Return the figures of one clip at a budget."""
        return self.budgets[budget]["reconstruction"]["per_clip"][clip]

    @property
    def patch(self) -> str:
        """The patch size by which tokens are compared: 1x2x2 where it divides the latents of all budgets, else 1x1x1."""
        return "1x2x2" if all(budget["tokens"]["1x2x2"] is not None for budget in self.budgets.values()) else "1x1x1"


def write_budget_page(path: Path, report: BudgetReport) -> int:
    """Write the page; return how many clips it shows, the worst first: one, and more as long as it stays below LIMIT.

    The worst clip has the lowest PSNR at the level of fewest tokens.
    """
    order = sorted(range(len(report.clips)), key=lambda i: report.per_clip(report.levels[-1], i)["psnr"])
    films = [_film(report.clips[order[0]], list(report.budgets))]
    size = len(_page(report, order, films).encode())
    for i in order[1:]:
        film = _film(report.clips[i], list(report.budgets))
        size += len(film.base64)
        if size > LIMIT:
            break
        films.append(film)
    write_atomically(path, _page(report, order[: len(films)], films))
    return len(films)


def _film(clip: ClipFacts, budgets: Sequence[str]) -> Film:
    videos = {name: np.load(clip.videos[name]) for name in (ORIGINAL, *budgets)}
    return make_film(clip.name, videos, clip.fps, COLUMNS, CRF, KEY_EVERY)


def _poster(clip: ClipFacts) -> str:
    """Return the middle frame of the original as the data URI of a small JPEG."""
    video = np.load(clip.videos[ORIGINAL], mmap_mode="r")
    picture = Image.fromarray(np.ascontiguousarray(video[len(video) // 2]))
    picture.thumbnail((POSTER, POSTER))
    return jpeg_uri(picture)


# -- the page --------------------------------------------------------------------------------------------------------


def _page(report: BudgetReport, order: Sequence[int], films: Sequence[Film]) -> str:
    names, count = list(report.budgets), len(report.clips)
    colours = {name: colour(i) for i, name in enumerate(names)}
    tokens = {name: budget["tokens"][report.patch] for name, budget in report.budgets.items()}
    left_out = f" The {len(order)} worst of {count} clips are shown; figures are of all {count}."
    return render_page(
        "budgets.html",
        report=report,
        summary=_summary(report),
        colours=colours,
        tokens=tokens,
        player={
            "clips": [_clip_data(report, i) for i in order],
            "layout": films[0].layout,
            "every": max(report.budgets[name]["ratio"] for name in report.levels),
        },
        tiles=[
            (ORIGINAL, "", "", "the reference of the others"),
            *((name, f"{tokens[name]:,} tokens", colours[name], "") for name in names),
        ],
        films=[film.base64 for film in films],
        left_out=left_out if len(order) < count else "",
        clip_heads=_clip_heads(report),
        clip_rows=[_clip_row(report, i) for i in order],
        figure_lines={**token_lines(report.budgets), **reconstruction_lines(report.budgets, report.weights)},
        rate_plots=_rate_plots(report),
        levels=_levels(report, colours) if report.adaptive else None,
        costs=cost_lines(report.budgets),
        cost_plots={
            title: Markup(marked_plot(lines, "frames of a clip", title.split(", ")[-1], log=True))
            for title, lines in report.curves.items()
        },
        generation=generation_lines(report.generation, report.weights) if report.generation else {},
    )


def _summary(report: BudgetReport) -> str:
    frames, height, width, _ = np.load(report.clips[0].videos[ORIGINAL], mmap_mode="r").shape
    first, last = (report.budgets[name] for name in (report.levels[0], report.levels[-1]))
    text = (
        f"{len(report.clips)} clips, {frames} frames of {width} \N{MULTIPLICATION SIGN} {height} pixels each. "
        f"Tokens are of patches of {report.patch}."
    )
    if len(report.levels) == 1:
        return text
    lost = first["reconstruction"]["psnr"] - last["reconstruction"]["psnr"]
    times = first["tokens"][report.patch] / last["tokens"][report.patch]
    return (
        f"{text} {report.levels[-1]} has {times:.1f} times fewer tokens than {report.levels[0]} and is {lost:.2f} dB below it."
    )


def _clip_data(report: BudgetReport, i: int) -> dict[str, Any]:
    clip, names = report.clips[i], list(report.budgets)
    return {
        "name": clip.name,
        "caption": clip.caption,
        "fps": clip.fps,
        "frames": len(clip.psnr_per_frame[names[0]]),
        "psnr": {name: report.per_clip(name, i)["psnr"] for name in names},
        "per_frame": {name: [round(value, 3) for value in clip.psnr_per_frame[name]] for name in names},
    }


def _clip_heads(report: BudgetReport) -> list[dict[str, Any]]:
    names, last = list(report.budgets), report.levels[-1]
    figures = ["motion", *(f"{name} dB" for name in names), "SSIM", "flicker"]
    figures += [f"lost by {last} (dB)"] if len(report.levels) > 1 else []
    heads = [{"text": "clip", "number": False}, *({"text": text, "number": True} for text in figures)]
    heads += [{"text": "smallest", "number": False}] if report.adaptive else []
    return [{**head, "sorted": head["text"] == f"{last} dB"} for head in heads]


def _clip_row(report: BudgetReport, i: int) -> dict[str, Any]:
    names = list(report.budgets)
    last, first = report.per_clip(report.levels[-1], i), report.per_clip(report.levels[0], i)
    figures = [(last["motion"], 2), *((report.per_clip(name, i)["psnr"], 2) for name in names)]
    figures += [(last["ssim"], 3), (last["flicker"], 2)]
    figures += [(first["psnr"] - last["psnr"], 2)] if len(report.levels) > 1 else []
    written = [(value, number(value, digits)) for value, digits in figures]
    return {"clip": report.clips[i], "place": i, "poster": _poster(report.clips[i]), "figures": written}


def _rate_plots(report: BudgetReport) -> dict[str, Markup]:
    """Draw PSNR over tokens and over bits: all clips, and terciles of motion; each other autoencoder is a point."""

    def lines(x: Callable[[Mapping[str, Any]], float | None]) -> dict[str, list[Mark]]:
        drawn: dict[str, list[Mark]] = {}
        parts = {"all clips": "psnr", "least motion": "psnr_low_motion", "most motion": "psnr_top_motion"}
        for part, key in parts.items():
            points = [(x(b), b["reconstruction"].get(key)) for b in (report.budgets[name] for name in report.levels)]
            marks = [(a, b, True) for a, b in points if a is not None and b is not None]
            if len(marks) == len(points):
                drawn[part] = sorted(marks)
        for name, budget in report.budgets.items():
            if name not in report.levels and (place := x(budget)) is not None:
                drawn[name] = [(place, budget["reconstruction"]["psnr"], True)]
        return drawn

    axes: dict[str, tuple[str, Callable[[Mapping[str, Any]], float | None]]] = {
        "Tokens": (f"tokens of a clip, patch {report.patch}", lambda b: b["tokens"][report.patch]),
        "Stored values": ("bits per pixel, 16 for each latent value", lambda b: b["stored_bits_per_pixel"]),
        "Information": ("bits per pixel, KL to a Gaussian per channel", lambda b: b["reconstruction"]["kl_bits_per_pixel"]),
    }
    plots = {}
    for title, (label, x) in axes.items():
        if drawn := lines(x):
            own = sorted(report.levels, key=lambda name: x(report.budgets[name]) or 0)
            plots[title] = Markup(marked_plot(drawn, label, "PSNR (dB)", names=own))
    by_frame = {name: report.budgets[name]["reconstruction"].get("psnr_per_frame") for name in report.levels}
    frames = {name: [(float(i), v, True) for i, v in enumerate(values)] for name, values in by_frame.items() if values}
    if frames:
        plots["By frame"] = Markup(marked_plot(frames, "frame", "PSNR (dB), mean of clips"))
    return plots


def _levels(report: BudgetReport, colours: Mapping[str, str]) -> dict[str, Any]:
    """Return the data of the target slider: PSNR of clips and segments at each level, and the levels' tokens."""
    assert report.adaptive is not None
    clips = [[part[name] for name in report.levels] for part in report.adaptive["clip_psnr"]]
    segments, whole = (
        [[[part[name] for name in report.levels] for part in clip] for clip in report.adaptive[key]]
        for key in ("segment_psnr", "segment_psnr_of_whole")
    )
    values = [value for clip in clips for value in clip]
    return {
        "levels": [{"name": name, "line": colours[name], **report.adaptive["tokens"][name]} for name in report.levels],
        "clips": clips,
        "segments": segments,
        "whole": whole,
        "names": [clip.name for clip in report.clips],
        "lowest": math.floor(min(values)),
        "highest": math.ceil(max(values)),
    }


# -- lines of the tables, on the page and in the terminal ----------------------------------------------------------------

RECONSTRUCTION = (
    ("psnr", "PSNR (dB)", 2, 1),
    ("psnr_first", "PSNR, first frames", 2, 1),
    ("psnr_key", "PSNR, key frames (0, r, 2r, ...)", 2, 1),
    ("psnr_between", "PSNR, frames in between", 2, 1),
    ("psnr_low_motion", "PSNR, third with least motion", 2, 1),
    ("psnr_mid_motion", "PSNR, middle third", 2, 1),
    ("psnr_top_motion", "PSNR, third with most motion", 2, 1),
    ("ssim", "SSIM", 4, 1),
    ("ms_ssim", "MS-SSIM", 4, 1),
    ("lpips", "LPIPS", 4, -1),
    ("fvd", "FVD", 1, -1),
    ("cvvdp", "ColorVideoVDP (JOD, 10 is best)", 2, 1),
    ("vmaf", "VMAF (0 to 100)", 1, 1),
    ("frechet_frames", "Fréchet distance of frames", 2, -1),
    ("flicker", "Flicker (grey levels)", 2, -1),
    ("high_frequency", "Fine detail kept (1 is all)", 3, 0),
)
NEEDS_WEIGHTS = ("lpips", "fvd", "clip_similarity")
COSTS = (
    ("forward_gflops", "GFLOP of a forward pass, one clip", LESS),
    ("training_gflops", "GFLOP of a training step, one clip", LESS),
    ("train_step_seconds", "Training step, the whole batch (s)", FASTER),
    ("denoising_seconds", "Denoising a video (s)", FASTER),
    ("decoding_seconds", "Decoding a video (s)", FASTER),
    ("train_peak_mib", "Peak memory of that training step (MiB)", LESS),
    ("denoising_peak_mib", "Peak memory of denoising (MiB)", LESS),
)


def token_lines(budgets: Mapping[str, Mapping[str, Any]]) -> Lines:
    """Return the size of a clip's latent at each budget."""

    def line(label: str, read: Callable[[Mapping[str, Any]], float | None], digits: int | None = None) -> Line:
        return Line(label, [read(budget) for budget in budgets.values()], digits, words=FEWER if digits == 0 else LESS)

    return {
        "Token budget of a clip": [
            line("Latent frames", lambda b: b["latent_frames"], 0),
            line("Tokens, patch 1x2x2", lambda b: b["tokens"]["1x2x2"], 0),
            line("Tokens, patch 1x1x1", lambda b: b["tokens"]["1x1x1"], 0),
            line("Latent values", lambda b: b["latent_values"], 0),
            line("Latent values per pixel", lambda b: b["latent_values_per_pixel"]),
            line("Bits per pixel, 16 for each value", lambda b: b["stored_bits_per_pixel"]),
            line("Bits per pixel, by KL", lambda b: b["reconstruction"]["kl_bits_per_pixel"]),
        ]
    }


def reconstruction_lines(budgets: Mapping[str, Mapping[str, Any]], weights: Collection[str] = ()) -> Lines:
    """Return the quality of reconstructions; a metric that no budget has is left out unless it needs weights.

    `weights` names those of NEEDS_WEIGHTS whose weights were given, as for `generation_lines`.
    """
    lines = []
    for key, label, digits, better in RECONSTRUCTION:
        values = [budget["reconstruction"].get(key) for budget in budgets.values()]
        if any(value is not None for value in values) or key in NEEDS_WEIGHTS:
            lines.append(Line(label + _absence(key, values, weights), values, digits, better))
    return {"Reconstruction, means over clips": lines}


def cost_lines(budgets: Mapping[str, Mapping[str, Any]]) -> Lines:
    """Return the costs of a transformer and of decoding at each budget; empty where nothing was measured."""
    costs = [budget.get("cost") or {} for budget in budgets.values()]
    lines = [
        Line(label, [cost.get(key) for cost in costs], None, -1, words)
        for key, label, words in COSTS
        if any(cost.get(key) is not None for cost in costs)
    ]
    return {"At the length of the clips": lines} if lines else {}


def generation_lines(generation: Mapping[str, Mapping[str, Any]], weights: Collection[str] = ()) -> Lines:
    """Return how videos were sampled, and how well they follow their prompts, with 95 % intervals."""
    rows = list(generation.values())
    parts = ("colour", "motion", "shape", "all")
    settings = {"steps": ("Denoising steps", 0), "guidance": ("Guidance; 1 is none", 1)}
    lines = [Line(label, [row[key] for row in rows], digits, compared=False) for key, (label, digits) in settings.items()]
    lines += [share_line(f"Prompt accuracy: {part} (%)", [row["accuracy"][part] for row in rows]) for part in parts]
    for key, label, digits in (("clip_similarity", "CLIP similarity", 4), ("fvd", "FVD", 1)):
        values = [row.get(key) for row in rows]
        lines.append(Line(label + _absence(key, values, weights), values, digits))
    lines.append(Line("Sampling a video (s)", [row["sampling_seconds"] for row in rows], None, -1, FASTER))
    return {"Generation": lines}


def _absence(key: str, values: Sequence[float | None], weights: Collection[str]) -> str:
    """Return why a metric of NEEDS_WEIGHTS has no value; empty where it has."""
    if key not in NEEDS_WEIGHTS or None not in values:
        return ""
    return " (needs at least 2 videos)" if key in weights else " (no weights given)"
