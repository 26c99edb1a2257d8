"""Tables of figures: one column for each token budget, one line for each figure; as HTML and text."""
# ruff: noqa: RUF001 (the page is set with × and −)

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Interval = tuple[float, float, float]  # value, and the ends of its 95 % interval
FEWER, LESS, FASTER = ("fewer", "more"), ("less", "more"), ("faster", "slower")


@dataclass(frozen=True)
class Cell:
    """A figure as written, its small print, whether it is the best of its line, and why it is absent."""

    text: str | None
    notes: tuple[str, ...] = ()
    best: bool = False
    reason: str | None = None


@dataclass(frozen=True)
class Line:
    """One figure of every column; None was not measured.

    Args:
        label: name of the figure.
        values: by column. Those behind the first are compared with it in small print.
        digits: digits after the point; None writes three significant digits.
        better: 1 where higher is better, -1 where lower is, 0 where neither.
        words: compare by a factor, for example "2.0× fewer" or "2.0× more"; without, by the difference.
        compared: whether to compare at all.
        spreads: standard deviations by column.
        intervals: ends of the 95 % intervals by column; they take the place of the comparison, and a value is the best only
            where its interval is clear of the others.
        reasons: why a value is absent, by column.
        hint: small print of the label.
    """

    label: str
    values: Sequence[float | None]
    digits: int | None = None
    better: int = 0
    words: tuple[str, str] | None = None
    compared: bool = True
    spreads: Sequence[float | None] = ()
    intervals: Sequence[tuple[float, float] | None] = ()
    reasons: Sequence[str | None] = ()
    hint: str = ""

    def cells(self) -> list[Cell]:
        """Return the text of each column."""
        best = self._best()
        return [
            Cell(None, reason=self.reasons[i] if self.reasons else None)
            if value is None
            else Cell(number(value, self.digits), tuple(self._notes(i, value)), i == best)
            for i, value in enumerate(self.values)
        ]

    def _notes(self, column: int, value: float) -> list[str]:
        if self.intervals:
            return [f"{end[0]:.0f} to {end[1]:.0f}" for end in [self.intervals[column]] if end]
        spread = self.spreads[column] if self.spreads else None
        notes = [] if spread is None else [f"± {number(spread, self.digits)}"]
        first = self.values[0]
        if column and self.compared and first is not None:
            notes.append(self._comparison(value, first))
        return [note for note in notes if note]

    def _comparison(self, value: float, first: float) -> str:
        if self.words is None:
            sign = "" if value < first else "+"
            difference = f"{sign}{number(value - first, self.digits)}"
            return difference if any(digit in difference for digit in "123456789") else "the same"
        if min(value, first) <= 0:
            return ""
        ratio = f"{max(value / first, first / value):.1f}"
        return "the same" if ratio == "1.0" else f"{ratio}× {self.words[value > first]}"

    def _best(self) -> int | None:
        """Return the column whose value, or interval, is on the better side of every other; None where there is none."""
        ends = {i: (v, v) for i, v in enumerate(self.values) if v is not None}
        ends |= {i: end for i, end in enumerate(self.intervals) if end is not None}
        for i, (low, high) in ends.items():
            others = [end for j, end in ends.items() if j != i]
            above, below = (all(low > end[1] for end in others), all(high < end[0] for end in others))
            if others and ((self.better > 0 and above) or (self.better < 0 and below)):
                return i
        return None


Lines = Mapping[str, Sequence[Line]]  # by the title of their group


def share_line(label: str, shares: Sequence[Interval | None], **options) -> Line:
    """Return a line of fractions in [0, 1], written in percent with their 95 % intervals."""
    values = [None if share is None else 100 * share[0] for share in shares]
    intervals = [None if share is None else (100 * share[1], 100 * share[2]) for share in shares]
    return Line(label, values, 0, intervals=intervals, **options)


def text_table(columns: Sequence[str], lines: Lines) -> str:
    """Return figures as lines of text."""
    rows = [["", *columns]]
    for group in lines.values():
        rows += [[line.label, *("-" if v is None else number(v, line.digits) for v in line.values)] for line in group]
    return align(rows)


def align(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as lines of text with aligned columns, numbers to the right of labels."""
    wide = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(wide[0]), *(cell.rjust(w) for cell, w in zip(row[1:], wide[1:], strict=True))]).rstrip()
        for row in rows
    )


def number(value: float, digits: int | None) -> str:
    """Return a number with so many digits after the point, or with three significant ones."""
    if digits is None:
        digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{digits}f}".replace("-", "−")
