"""The table of token budgets: one column for each temporal ratio, one line for each figure."""
# ruff: noqa: RUF001 (the page is set with × – and −)

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

Interval = tuple[float, float, float]  # value, and the ends of its 95 % interval


@dataclass(frozen=True)
class BudgetRow:
    """Figures of one temporal ratio; None is "not measured", and `missing` may say why, by field name.

    PSNR is in dB: mean and standard deviation over clips, and the mean of first frames alone. Times are in seconds.
    `accuracy` has fractions in [0, 1] by name (shape, colour, motion, all), `readable` the same of reconstructed clips: what
    a scorer cannot read there, no text-to-video model of that latent space can show. Raises ValueError for a reason given
    for a figure that does not exist.
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
    train_loss: float | None = None
    accuracy: Mapping[str, Interval] | None = None
    readable: Mapping[str, Interval] | None = None
    missing: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        names = [f.name for f in dataclasses.fields(self)][1:-1]
        if unknown := sorted(set(self.missing) - set(names)):
            raise ValueError(f"missing={unknown}: there are no such figures; legal: {', '.join(names)}")


@dataclass(frozen=True)
class _Line:
    """How a figure is named and written, which end of it is better, and how it is compared with the first column."""

    name: str
    label: str
    digits: int | None = None  # after the point; None is three significant ones
    better: int = 0  # 1 higher, -1 lower, 0 neither
    words: tuple[str, str] | None = None  # compare by "2.0× WORD" where it is smaller, larger; None is by difference
    spread: str = ""  # name of its standard deviation


GROUPS = {
    "Token budget": [
        _Line("latent_frames", "Latent frames", 0, words=("fewer", "more")),
        _Line("tokens", "Tokens", 0, words=("fewer", "more")),
        _Line("latent_values_per_pixel", "Latent values per pixel", words=("fewer", "more")),
    ],
    "Reconstruction": [
        _Line("psnr", "PSNR (dB), ± deviation between clips", 2, better=1, spread="psnr_std"),
        _Line("psnr_first", "PSNR of first frames (dB)", 2, better=1),
        _Line("ssim", "SSIM", 3, better=1),
    ],
    "Text to video": [
        _Line("train_step_seconds", "Training step (s)", better=-1, words=("faster", "slower")),
        _Line("denoising_seconds", "Denoising a video (s)", better=-1, words=("faster", "slower")),
        _Line("sampling_seconds", "Sampling a video, decoding included (s)", better=-1, words=("faster", "slower")),
        _Line("train_loss", "Training loss (each in its own latent space)", 3),
    ],
}

ACCURACIES = {
    "accuracy": "Prompt accuracy (%), with 95 % interval",
    "readable": "The same scorer on reconstructions (%): what a perfect text-to-video model would reach",
}


def budget_table(rows: Sequence[BudgetRow], chance: Mapping[str, float] | None) -> str:
    """Return the table as HTML with a note below; the first of `rows` is what the small print compares with."""
    head = "".join(f'<th scope="col">{row.ratio}×</th>' for row in rows)
    body = ""
    for title, lines in GROUPS.items():
        body += _group(title, "".join(_figure_line(line, rows) for line in lines), len(rows))
    for field_name, title in ACCURACIES.items():
        if names := dict.fromkeys(name for row in rows for name in getattr(row, field_name) or {}):
            lines = "".join(_accuracy_line(field_name, name, rows, chance or {}) for name in names)
            body += _group(title, lines, len(rows))
    reasons = "; ".join(f"{row.ratio}×: {reason}" for row in rows for reason in dict.fromkeys(row.missing.values()))
    return (
        f'<table class="budgets"><thead><tr><th scope="col">Temporal compression</th>{head}</tr></thead>{body}</table>'
        '<p class="small">★ best of its line; of accuracies only where it is clear of the other intervals. '
        f"– not measured{f' ({escape(reasons)})' if reasons else ''}.</p>"
    )


def dash(reason: str | None = None) -> str:
    """Return the mark of a figure that was not measured, as HTML."""
    return f'<abbr title="{escape(f"not measured: {reason}" if reason else "not measured")}">–</abbr>'


def _group(title: str, lines: str, columns: int) -> str:
    head = f'<tr class="group"><th scope="rowgroup" colspan="{columns + 1}">{escape(title)}</th></tr>'
    return f"<tbody>{head}{lines}</tbody>"


def _figure_line(line: _Line, rows: Sequence[BudgetRow]) -> str:
    values = [getattr(row, line.name) for row in rows]
    best = _best([None if v is None else (v, v, v) for v in values], line.better)
    cells = ""
    for i, (row, value) in enumerate(zip(rows, values, strict=True)):
        if value is None:
            cells += _cell(None, reason=row.missing.get(line.name))
            continue
        spread = getattr(row, line.spread) if line.spread else None
        small = [] if spread is None else [f"± {number(spread, line.digits)}"]
        if i and values[0] is not None:
            small.append(_compared(line, value, values[0]))
        cells += _cell(number(value, line.digits), small, i == best)
    return f'<tr><th scope="row">{escape(line.label)}</th>{cells}</tr>'


def _accuracy_line(figure: str, name: str, rows: Sequence[BudgetRow], chance: Mapping[str, float]) -> str:
    values = [(getattr(row, figure) or {}).get(name) for row in rows]
    best = _best(values, better=1)
    cells = ""
    for i, (row, value) in enumerate(zip(rows, values, strict=True)):
        if value is None:
            cells += _cell(None, reason=row.missing.get(figure))
        else:
            share, low, high = (f"{100 * v:.0f}" for v in value)
            cells += _cell(share, [f"{low} to {high}"], i == best)
    guess = f"<small>chance {100 * chance[name]:.{0 if chance[name] >= 0.01 else 2}f}</small>" if name in chance else ""
    return f'<tr><th scope="row">{escape(name)}{guess}</th>{cells}</tr>'


def _cell(text: str | None, small: Sequence[str] = (), best: bool = False, reason: str | None = None) -> str:
    if text is None:
        return f"<td>{dash(reason)}</td>"
    value = f'<strong><span role="img" aria-label="best">★</span> {text}</strong>' if best else text
    return f"<td>{value}{''.join(f'<small>{part}</small>' for part in small if part)}</td>"


def _best(values: Sequence[Interval | None], better: int) -> int | None:
    """Return the index of the value whose interval is on the better side of every other, None where none is."""
    known = {i: value for i, value in enumerate(values) if value is not None}
    for i, (_, low, high) in known.items():
        others = [known[j] for j in known if j != i]
        if others and (
            (better > 0 and all(low > other[2] for other in others))
            or (better < 0 and all(high < other[1] for other in others))
        ):
            return i
    return None


def _compared(line: _Line, value: float, first: float) -> str:
    if line.words is None:
        difference = f"{value - first:+.{line.digits}f}" if line.better else ""
        return "the same" if difference and not float(difference) else difference.replace("-", "−")
    if min(value, first) <= 0:
        return ""
    ratio = f"{max(value / first, first / value):.1f}"
    return "the same" if ratio == "1.0" else f"{ratio}× {line.words[value > first]}"


def number(value: float, digits: int | None) -> str:
    """Return a number with so many digits after the point, or with three significant ones."""
    if digits is None:
        digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{digits}f}".replace("-", "−")
