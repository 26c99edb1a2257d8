"""Which figures of token budgets stand in tables, how they are called and written: for the page and for the terminal."""
# ruff: noqa: RUF001

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from .tables import number


@dataclass(frozen=True)
class Line:
    """A figure of every column; `better` is 1 where higher is better, -1 where lower is, 0 where neither."""

    label: str
    values: tuple[float | None, ...]
    digits: int | None = None  # after the point; None is three significant ones
    better: int = 0
    notes: tuple[str, ...] = ()  # small print of each column, instead of a comparison
    factor: bool = False  # compare as a factor, not as a difference


Lines = Mapping[str, Sequence[Line]]  # by the title of their group


def token_lines(budgets: Mapping[str, Mapping[str, Any]]) -> Lines:
    """Return what a clip becomes."""

    def values(read: Callable[[Mapping[str, Any]], Any]) -> tuple[Any, ...]:
        return tuple(read(budget) for budget in budgets.values())

    return {
        "Token budget of a clip": [
            Line("Latent frames", values(lambda b: b["latent_frames"]), 0, factor=True),
            Line("Tokens, patch 1x2x2", values(lambda b: b["tokens"]["1x2x2"]), 0, factor=True),
            Line("Tokens, patch 1x1x1", values(lambda b: b["tokens"]["1x1x1"]), 0, factor=True),
            Line("Latent values", values(lambda b: b["latent_values"]), 0, factor=True),
            Line("Latent values per pixel", values(lambda b: b["latent_values_per_pixel"]), factor=True),
            Line("Bits per pixel, 16 for each value", values(lambda b: b["stored_bits_per_pixel"]), factor=True),
            Line("Bits per pixel, by KL", values(lambda b: b["reconstruction"]["kl_bits_per_pixel"]), factor=True),
        ]
    }


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
    ("flicker", "Flicker (grey levels)", 2, -1),
    ("high_frequency", "Fine detail kept (1 is all)", 3, 0),
)


def reconstruction_lines(budgets: Mapping[str, Mapping[str, Any]]) -> Lines:
    """Return how close clips come back; a metric that no budget has is left out, but for those that want weights."""
    lines = []
    for key, label, digits, better in RECONSTRUCTION:
        found = tuple(budget["reconstruction"].get(key) for budget in budgets.values())
        if any(value is not None for value in found) or key in ("lpips", "fvd"):
            absent = any(value is None for value in found) and key in ("lpips", "fvd")
            lines.append(Line(f"{label}{' (no weights given)' if absent else ''}", found, digits, better))
    return {"Reconstruction, means over clips": lines}


COSTS = (
    ("forward_gflops", "GFLOP of a forward pass, one clip", True),
    ("training_gflops", "GFLOP of a training step, one clip", True),
    ("train_step_seconds", "Training step, the whole batch (s)", True),
    ("denoising_seconds", "Denoising a video (s)", True),
    ("decoding_seconds", "Decoding a video (s)", True),
    ("train_peak_mib", "Peak memory of that training step (MiB)", True),
    ("denoising_peak_mib", "Peak memory of denoising (MiB)", True),
)


def cost_lines(budgets: Mapping[str, Mapping[str, Any]]) -> Lines:
    """Return what a transformer and decoding cost at each budget; empty where nothing was measured."""
    costs = [budget.get("cost") or {} for budget in budgets.values()]
    lines = [
        Line(label, tuple(cost.get(key) for cost in costs), None, -1, factor=factor)
        for key, label, factor in COSTS
        if any(cost.get(key) is not None for cost in costs)
    ]
    return {"At the length of the clips": lines} if lines else {}


def generation_lines(generation: Mapping[str, Mapping[str, Any]]) -> Lines:
    """Return how sampled videos follow their prompts, with 95 % intervals."""
    lines = []
    for part in ("colour", "motion", "shape", "all"):
        found = [figures["accuracy"][part] for figures in generation.values()]
        notes = tuple(f"{100 * low:.0f} to {100 * high:.0f}" for _, low, high in found)
        lines.append(Line(f"Prompt accuracy: {part} (%)", tuple(100 * value for value, _, _ in found), 0, 0, notes))
    for key, label, digits in (("clip_similarity", "CLIP similarity", 4), ("fvd", "FVD", 1)):
        values = tuple(figures.get(key) for figures in generation.values())
        absent = "" if any(value is not None for value in values) else " (no weights given)"
        lines.append(Line(label + absent, values, digits))
    lines.append(Line("Sampling a video (s)", tuple(f["sampling_seconds"] for f in generation.values()), None, -1, factor=True))
    return {"Generation": lines}


def figure_table(corner: str, columns: Sequence[str], lines: Lines) -> str:
    """Return an HTML table with a column for each budget; small print compares with the first."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    body = ""
    for title, group in lines.items():
        body += f'<tbody><tr class="group"><th scope="rowgroup" colspan="{len(columns) + 1}">{escape(title)}</th></tr>'
        for line in group:
            cells = "".join(_cell(line, i) for i in range(len(columns)))
            body += f'<tr><th scope="row">{escape(line.label)}</th>{cells}</tr>'
        body += "</tbody>"
    head = f'<thead><tr><th scope="col">{escape(corner)}</th>{head}</tr></thead>'
    return f'<div class="wide-table"><table class="budgets figures">{head}{body}</table></div>'


def text_table(columns: Sequence[str], lines: Lines) -> str:
    """Return the same figures as lines of text."""
    rows = [["", *columns]]
    for group in lines.values():
        rows += [[line.label, *("-" if v is None else number(v, line.digits) for v in line.values)] for line in group]
    wide = [max(len(row[i]) for row in rows) for i in range(len(columns) + 1)]
    return "\n".join(
        "  ".join([row[0].ljust(wide[0]), *(cell.rjust(w) for cell, w in zip(row[1:], wide[1:], strict=True))]) for row in rows
    )


def _cell(line: Line, i: int) -> str:
    value, first = line.values[i], line.values[0]
    if value is None:
        return f"<td>{dash()}</td>"
    text = number(value, line.digits)
    known = [v for v in line.values if v is not None]
    if line.better and len(known) > 1 and value == (max if line.better > 0 else min)(known) and known.count(value) == 1:
        text = f'<strong><span role="img" aria-label="best">★</span> {text}</strong>'
    note = line.notes[i] if line.notes else "" if i == 0 or first is None else _compared(line, value, first)
    return f"<td>{text}{f'<small>{note}</small>' if note else ''}</td>"


def _compared(line: Line, value: float, first: float) -> str:
    if not line.factor:
        return f"{'+' if value >= first else ''}{number(value - first, line.digits)}"
    if min(value, first) <= 0:
        return ""
    return f"{max(value / first, first / value):.2f}\N{MULTIPLICATION SIGN} {'less' if value < first else 'more'}"


def dash() -> str:
    """Return the mark of a figure that was not measured, as HTML."""
    return '<abbr title="not measured">–</abbr>'
