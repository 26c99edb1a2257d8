"""Figures of `promag experiment growth-ablation` from its recorded lines: the table, what growth gains, and the curves."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from promag.training.config import UserError
from promag.training.files import read_json_lines

from .markdown import markdown_table

Row = Mapping[str, Any]
# Figures of the printed table: name, heading, digits after the point.
COLUMNS = (
    ("psnr", "PSNR", 2),
    ("psnr_top_motion", "top motion", 2),
    ("psnr_key", "key frames", 2),
    ("psnr_between", "in between", 2),
    ("ssim", "SSIM", 3),
    ("cvvdp", "JOD", 2),
    ("vmaf", "VMAF", 1),
    ("frechet_frames", "Fréchet", 2),
    ("flicker", "flicker", 2),
    ("high_frequency", "high freq.", 2),
    ("params", "M params", 2),
    ("steps", "steps", 0),
    ("flops", "PFLOP", 2),
    ("seconds", "minutes", 0),
)
UNITS = {"params": 1e6, "flops": 1e15, "seconds": 60}
RATIO = 16  # at which variants are compared
OURS = "progressive"
WIDE = "_16_channels"  # ends the names of variants with a wider latent, which are compared among themselves
WHAT = "growth ablation"
RECORDED_AS = (WHAT, "claim")  # what lines of the experiment are called, now and in older ones
# What is compared at 16x: metric, its unit.
DIFFERENCES = (
    ("psnr", "dB"),
    ("psnr_top_motion", "dB"),
    ("psnr_key", "dB"),
    ("psnr_between", "dB"),
    ("ssim", ""),
    ("cvvdp", "JOD"),
    ("vmaf", ""),
)


def table(rows: Iterable[Row]) -> str:
    """Return a Markdown table of means over seeds, one line for each variant, temporal ratio and size of the clips.

    A figure that no line has gets no column.
    """
    groups: dict[tuple[str, int, str], list[Row]] = {}
    rows = list(rows)
    columns = [column for column in COLUMNS if any(column[0] in row for row in rows)]
    for row in rows:
        groups.setdefault((row["variant"], row["ratio"], clip_size(row)), []).append(row)
    lines = []
    for (variant, ratio, size), group in groups.items():
        seeds, cells = ", ".join(str(row["seed"]) for row in group), []
        for name, _, digits in columns:
            values = [row[name] / UNITS.get(name, 1) for row in group if name in row]
            cells.append(f"{mean(values):.{digits}f}" if values else "-")
        lines.append([variant, f"{ratio}x", size, seeds, *cells])
    return markdown_table(["variant", "ratio", "clips", "seeds", *(heading for _, heading, _ in columns)], lines)


def clip_size(row: Row) -> str:
    """Return frames, height and width of the clips that a line was scored on, "65x64x64" for example."""
    return f"{row['frames']}x{row['size']}x{row['size']}"


def with_variant(line: Row) -> Row:
    """Return a line with its variant's name under "variant", where older lines have "arm"."""
    return {"variant" if key == "arm" else key: value for key, value in line.items()}


def read(path: Path) -> list[Row]:
    """Return the newest line of each variant, seed, ratio and size of the clips, in the order in which they first appear.

    Raises UserError without a file and for one without such lines.
    """
    if not path.is_file():
        raise UserError(f"results {path}: no such file; `promag experiment growth-ablation --record FILE` writes one")
    lines = read_json_lines(path)
    rows = [with_variant(line) for line in lines if line.get("what") in RECORDED_AS]
    if not rows:
        raise UserError(f"results {path}: none of its {len(lines)} lines is one of the growth ablation's")
    return list({(row["variant"], row["seed"], row["ratio"], clip_size(row)): row for row in rows}.values())


def gains(rows: Sequence[Row], ours: str = OURS) -> str:
    """Return a Markdown table of a variant, growth, minus each other way to 16x, on the seeds and clips that both have.

    A cell has the mean over seeds, where there are several the difference of each in brackets, and where lines hold the figures
    of single clips the standard error of the mean over clips, which are paired. Growth with a wider latent is compared
    with variants that have it too; the others with each other, and with growth that has it. A metric that no line has gets no
    column, one that a compared line lacks gets "-".
    """
    groups: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows:
        comparable = row["variant"].endswith(WIDE) == ours.endswith(WIDE) or row["variant"] == ours + WIDE
        if row["ratio"] == RATIO and comparable:
            groups.setdefault((row["variant"], clip_size(row)), {})[row["seed"]] = row
    compared = [(name, unit) for name, unit in DIFFERENCES if any(name in row for row in rows)]
    heads = [f"{name} {unit}".strip() for name, unit in compared]
    lines = []
    for (variant, size), others in groups.items():
        own = groups.get((ours, size), {})
        seeds = sorted(own.keys() & others.keys())
        if seeds and variant != ours:
            pairs = [(own[s], others[s]) for s in seeds]
            cells = [_difference(pairs, name) for name, _ in compared]
            compute = mean(own[s]["flops"] / others[s]["flops"] for s in seeds)
            lines.append([variant, size, ", ".join(map(str, seeds)), *cells, f"{compute:.2f}x"])
    return markdown_table([f"{ours} minus", "clips", "seeds", *heads, "compute"], lines)


def _difference(pairs: Sequence[tuple[Row, Row]], name: str) -> str:
    if not all(name in row for pair in pairs for row in pair):
        return "-"
    values = [own[name] - other[name] for own, other in pairs]
    each = ", ".join(f"{value:+.2f}" for value in values)
    error = _standard_error(pairs, name)
    return f"{mean(values):+.3f}" + (f" ± {error:.2g}" if error is not None else "") + (f" ({each})" if len(values) > 1 else "")


def _standard_error(pairs: Sequence[tuple[Row, Row]], name: str) -> float | None:
    """Return the standard error over clips of a metric's mean difference; None without figures of single clips."""
    clips = [tuple(line.get("per_clip", ()) for line in pair) for pair in pairs]
    chosen = list(range(len(clips[0][0])))
    if name == "psnr_top_motion":
        name = "psnr"
        chosen = sorted(chosen, key=lambda i: clips[0][0][i]["motion"])[-(len(chosen) // 3) :]
    parts = [part for pair in clips for part in pair]
    if len({len(part) for part in parts}) > 1 or len(chosen) < 2 or any(name not in part[0] for part in parts):
        return None
    values = [mean(own[i][name] - other[i][name] for own, other in clips) for i in chosen]
    return stdev(values) / math.sqrt(len(values))


Lines = dict[str, list[tuple[float, float]]]


def curves(rows: Sequence[Row]) -> dict[str, tuple[Lines, str]]:
    """Return the plots by name: validation PSNR of each variant at 16x, first seed, and the label of the x axis.

    Each size of clips has plots of its own; names begin with it.
    """
    plots: dict[str, tuple[Lines, str]] = {}
    sizes = dict.fromkeys(clip_size(row) for row in rows)
    for size in sizes:
        steps, compute, beyond_base = {}, {}, {}
        for row in rows:
            variant, stage = row["variant"], row["stage"]
            if clip_size(row) != size or row["ratio"] != RATIO or not row["curve"] or variant in steps:
                continue
            before, first = row["flops"] - stage["flops"], row["steps"] - stage["steps"]
            points = [(step, before + (step - first) / stage["steps"] * stage["flops"], psnr) for step, _, psnr in row["curve"]]
            inherited = row["inherited"]["flops"]
            steps[variant] = [(step, psnr) for step, _, psnr in points]
            compute[variant] = [(flops / 1e15, psnr) for _, flops, psnr in points]
            beyond_base[variant] = [((flops - inherited) / 1e15, psnr) for _, flops, psnr in points]
        if steps:
            plots[f"{size}-steps"] = (steps, "steps from scratch")
            plots[f"{size}-compute"] = (compute, "PFLOP from scratch")
            plots[f"{size}-compute-grown"] = (beyond_base, "PFLOP beyond the 4x model")
    return plots
