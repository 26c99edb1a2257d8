"""Figures of `promag experiment growth-ablation` from its recorded lines: the table, what growth gains, and the curves."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from promag.training.config import UserError

Row = Mapping[str, Any]
# Figures of the printed table: name, heading, digits after the point.
COLUMNS = (
    ("psnr", "PSNR", 2),
    ("psnr_top_motion", "top motion", 2),
    ("psnr_key", "key frames", 2),
    ("psnr_between", "in between", 2),
    ("ssim", "SSIM", 3),
    ("flicker", "flicker", 2),
    ("high_frequency", "high freq.", 2),
    ("params", "M params", 2),
    ("steps", "steps", 0),
    ("flops", "PFLOP", 2),
    ("seconds", "minutes", 0),
)
UNITS = {"params": 1e6, "flops": 1e15, "seconds": 60}
RATIO = 16  # at which the ways are compared
OURS = "progressive"
WIDE = "_16_channels"  # ends the names of arms with a wider latent, which are compared among themselves
# What is compared at 16x: metric, its unit.
DIFFERENCES = (("psnr", "dB"), ("psnr_top_motion", "dB"), ("psnr_key", "dB"), ("psnr_between", "dB"), ("ssim", ""))


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return a Markdown table of means over seeds, one line for each arm and ratio."""
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["arm"], row["ratio"]), []).append(row)
    lines = ["| arm | ratio | seeds | " + " | ".join(heading for _, heading, _ in COLUMNS) + " |"]
    lines.append("| --- " * (3 + len(COLUMNS)) + "|")
    for (arm, ratio), group in groups.items():
        seeds, cells = ", ".join(str(row["seed"]) for row in group), []
        for name, _, digits in COLUMNS:
            values = [row[name] / UNITS.get(name, 1) for row in group if name in row]
            cells.append(f"{mean(values):.{digits}f}" if values else "-")
        lines.append(f"| {arm} | {ratio}x | {seeds} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def read(path: Path) -> list[Row]:
    """Return the newest line of each arm, seed and ratio, in the order in which they first appear."""
    if not path.is_file():
        raise UserError(f"results {path}: no such file; `promag experiment growth-ablation --record FILE` writes one")
    lines = [json.loads(line) for line in path.read_text().splitlines() if line]
    newest = {(r["arm"], r["seed"], r["ratio"]): r for r in lines if r.get("what") == "claim"}
    if not newest:
        raise UserError(f"results {path}: none of its {len(lines)} lines is one of the growth ablation's")
    return list(newest.values())


def gains(rows: Sequence[Row], ours: str = OURS) -> str:
    """Return a Markdown table of an arm, growth, minus each other way to 16x, on the seeds that both were trained with.

    Of several seeds each cell has the mean, and in brackets the difference of each. Growth with a wider latent is compared
    with ways that have it too; the others with each other, and with growth that has it.
    """
    by_arm: dict[str, dict[int, Row]] = {}
    for row in rows:
        alike = row["arm"].endswith(WIDE) == ours.endswith(WIDE) or row["arm"] == ours + WIDE
        if row["ratio"] == RATIO and alike:
            by_arm.setdefault(row["arm"], {})[row["seed"]] = row
    own = by_arm.pop(ours, {})
    heads = [f"{name} {unit}".strip() for name, unit in DIFFERENCES]
    lines = ["| " + " | ".join([f"{ours} minus", "seeds", *heads, "compute"]) + " |", "| --- " * (3 + len(heads)) + "|"]
    for arm, theirs in by_arm.items():
        seeds = sorted(own.keys() & theirs.keys())
        if seeds:
            cells = [_difference([own[s][name] - theirs[s][name] for s in seeds]) for name, _ in DIFFERENCES]
            compute = mean(own[s]["flops"] / theirs[s]["flops"] for s in seeds)
            lines.append("| " + " | ".join([arm, ", ".join(map(str, seeds)), *cells, f"{compute:.2f}x"]) + " |")
    return "\n".join(lines)


def _difference(values: Sequence[float]) -> str:
    each = ", ".join(f"{value:+.2f}" for value in values)
    return f"{mean(values):+.3f}" + (f" ({each})" if len(values) > 1 else "")


def curves(rows: Sequence[Row]) -> dict[str, tuple[dict[str, list[tuple[float, float]]], str]]:
    """Return, by name of a plot, its lines (validation PSNR of each way at 16x, first seed) and the label of its x axis."""
    steps, compute, without = {}, {}, {}
    chosen: dict[str, Row] = {}
    for row in rows:
        if row["ratio"] == RATIO and row["curve"]:
            chosen.setdefault(row["arm"], row)
    for arm, row in chosen.items():
        stage, before = row["stage"], row["flops"] - row["stage"]["flops"]
        first = row["steps"] - stage["steps"]
        points = [(step, before + (step - first) / stage["steps"] * stage["flops"], psnr) for step, _, psnr in row["curve"]]
        inherited = row["inherited"]["flops"]
        steps[arm] = [(step, psnr) for step, _, psnr in points]
        compute[arm] = [(flops / 1e15, psnr) for _, flops, psnr in points]
        without[arm] = [((flops - inherited) / 1e15, psnr) for _, flops, psnr in points]
    if not chosen:
        return {}
    return {
        "steps": (steps, "steps from scratch"),
        "compute": (compute, "PFLOP from scratch"),
        "compute-grown": (without, "PFLOP beyond the 4x model"),
    }
