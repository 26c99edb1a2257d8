"""Figures of `promag experiment generation` from its recorded lines: the table, and differences between models."""

from collections.abc import Iterable, Mapping, Sequence
from math import sqrt
from pathlib import Path
from statistics import mean
from typing import Any

from promag.training.config import UserError
from promag.training.files import read_json_lines

from .markdown import markdown_table
from .synthetic_scorer import wilson_interval

Row = Mapping[str, Any]
WHAT = "generation"
KINDS = ("trained", "unseen")  # combinations of the prompts


def read(path: Path) -> list[Row]:
    """Return the newest line of each model and seed, in the order in which they first appear.

    Raises UserError without a file and for one without such lines.
    """
    lines = read_json_lines(path) if path.is_file() else []
    rows = {(row["model"], row["seed"]): row for row in lines if row.get("what") == WHAT}
    if not rows:
        raise UserError(f"results {path}: no lines of the experiment; `promag experiment generation --record FILE` writes them")
    return list(rows.values())


def table(rows: Iterable[Row]) -> str:
    """Return a Markdown table, one line for each model: accuracies over all seeds' videos, means of the other figures."""
    heads = ["model", "ratio", "tokens", "channels", "seeds"]
    heads += [f"all right, {kind}" for kind in KINDS] + ["shape, unseen", "motion, unseen", "ceiling"]
    heads += ["validation loss", "jitter (true)", "high freq.", "PFLOP", "PFLOP of tokenizer"]
    lines = []
    for model, group in _by_model(rows).items():
        first, seeds = group[0], ", ".join(str(row["seed"]) for row in group)
        cells = [model, f"{first['ratio']}x", f"{first['tokens']:,}", str(first["channels"]), seeds]
        cells += [_percent(*_right(group, kind, "all")) for kind in KINDS]
        cells += [_percent(*_right(group, "unseen", part)) for part in ("shape", "motion")]
        cells.append(f"{100 * mean(row['reconstructions']['all'][0] for row in group):.0f}%")
        cells.append(f"{mean(row['training']['validation_loss'] for row in group):.3f}")
        sampled, true, sharp = (
            mean(row[name] for row in group) for name in ("jitter", "jitter_of_true_clips", "high_frequency")
        )
        cells += [f"{sampled:.2f} ({true:.2f})", f"{sharp:.2f}", f"{mean(row['flops'] for row in group) / 1e15:.2f}"]
        cells.append(f"{mean(row['tokenizer']['flops'] for row in group) / 1e15:.2f}")
        lines.append(cells)
    return markdown_table(heads, lines)


def differences(rows: Iterable[Row], than: str) -> str:
    """Return a Markdown table of each model's accuracy minus another's, in points with 95 % intervals, over all common seeds.

    Raises UserError if there is no line of the other model.
    """
    groups = _by_model(rows)
    if than not in groups:
        raise UserError(f"--than {than}: the models are {', '.join(groups)}")
    heads = [f"minus {than}, in points", "seeds", *(f"{part}, {kind}" for kind in KINDS for part in ("motion", "all"))]
    lines = []
    for model, group in groups.items():
        seeds = sorted({row["seed"] for row in group} & {row["seed"] for row in groups[than]})
        if model == than or not seeds:
            continue
        own, other = ([row for row in part if row["seed"] in seeds] for part in (group, groups[than]))
        cells = []
        for kind in KINDS:
            for part in ("motion", "all"):
                value, low, high = difference_interval(_right(own, kind, part), _right(other, kind, part))
                cells.append(f"{100 * value:+.0f} ({100 * low:+.0f} to {100 * high:+.0f})")
        lines.append([model, ", ".join(map(str, seeds)), *cells])
    return markdown_table(heads, lines)


def difference_interval(first: tuple[int, int], second: tuple[int, int]) -> tuple[float, float, float]:
    """Return the difference of two proportions, successes of n each, and its 95 % interval.

    Source: Newcombe 1998, "Interval estimation for the difference between independent proportions", method 10.
    """
    (p, low, high), (q, other_low, other_high) = ((k / n, *wilson_interval(k, n)) for k, n in (first, second))
    below, above = sqrt((p - low) ** 2 + (other_high - q) ** 2), sqrt((high - p) ** 2 + (q - other_low) ** 2)
    return p - q, p - q - below, p - q + above


def _by_model(rows: Iterable[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["model"], []).append(row)
    return groups


def _right(group: Sequence[Row], kind: str, part: str) -> tuple[int, int]:
    """Return how many of all seeds' videos are right in a part and how many there are."""
    return sum(round(row[kind]["accuracy"][part][0] * row["prompts"]) for row in group), sum(row["prompts"] for row in group)


def _percent(right: int, count: int) -> str:
    low, high = wilson_interval(right, count)
    return f"{100 * right / count:.0f}% ({100 * low:.0f}-{100 * high:.0f})"
