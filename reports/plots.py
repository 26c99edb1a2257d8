"""Line plots as inline SVG in the page's colours, without a plotting library."""
# ruff: noqa: RUF001 (a minus sign)

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from .page import asset

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 290, 56, 26, 12, 52  # SVG units: the whole, and the margins
DASHES = ("none", "7 3", "2 3", "9 3 2 3")  # lines differ in more than their colour
COLOURS = 6  # the style sheets define --line0 to --line5
MAX_MARKS = 24  # a line with more points is drawn without marks

Point = tuple[float, float]
Mark = tuple[float, float, bool]  # x, y, and whether it was measured; others are drawn open, their line dotted
Place = Callable[[float, float], Point]  # from values to SVG units


def line_plot(lines: Mapping[str, Sequence[Point]], x_label: str, y_label: str) -> str:
    """Return an SVG with axes, ticks and one line of (x, y) points per name, and its legend as an HTML list.

    Raises ValueError for a line without points.
    """
    drawn, description = _draw_lines(lines, x_label, y_label)
    legend = [(_stroke(i), name, _last(points)) for i, (name, points) in enumerate(lines.items())]
    return _with_legend(drawn, description, legend)


def plot_file(lines: Mapping[str, Sequence[Point]], x_label: str, y_label: str) -> str:
    """Return the same plot as the text of an SVG file that stands alone, legend and colours (light and dark) included."""
    drawn, description = _draw_lines(lines, x_label, y_label)
    for i, (name, points) in enumerate(lines.items()):
        y = HEIGHT + 18 * i + 4
        drawn += f'<path {_stroke(i)} d="M{LEFT} {y}h32"/><text x="{LEFT + 42}" y="{y}" dy="0.35em">'
        drawn += f"{escape(name)}: {_last(points)}</text>"
    height = HEIGHT + 18 * len(lines) + 8
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img"'
    return f"{opening}><title>{escape(description)}</title><style>{asset('plot.css')}</style>{drawn}</svg>\n"


def marked_plot(
    lines: Mapping[str, Sequence[Mark]], x_label: str, y_label: str, log: bool = False, names: Sequence[str] = ()
) -> str:
    """Return an SVG with a mark for every point of each line, and its legend as an HTML list.

    With `log` both axes are logarithmic; `names` stand beside the marks of the first line. Raises ValueError for a line
    without points and for points that a logarithmic axis does not have.
    """
    for name, marks in lines.items():
        if not marks or (log and min(min(x, y) for x, y, _ in marks) <= 0):
            raise ValueError(f"the line {name!r} has {len(marks)} points: at least one is needed, above 0 on logarithmic axes")
    xs, ys = zip(*((x, y) for marks in lines.values() for x, y, _ in marks), strict=True)
    x_ticks, y_ticks = (_log_ticks(min(v), max(v)) if log else _ticks(min(v), max(v), 4) for v in (xs, ys))
    place = _place((x_ticks[0], x_ticks[-1]), (y_ticks[0], y_ticks[-1]), log)
    drawn = _axes(x_ticks, y_ticks, place, x_label, y_label, _log_texts if log else _texts)
    drawn += "".join(_marked_line(i, marks, place) for i, marks in enumerate(lines.values()))
    for (x, y, _), text in zip(next(iter(lines.values())), names, strict=False):
        a, b = place(x, y)
        end = ' text-anchor="end"' if a > WIDTH / 2 else ""
        drawn += f'<text class="mark-name" x="{a - 7 if end else a + 7}" y="{b - 7}"{end}>{escape(text)}</text>'
    ends = "; ".join(f"{name} from {_last([marks[0][:2]])} to {_last([marks[-1][:2]])}" for name, marks in lines.items())
    legend = [(f'class="line" style="stroke:{colour(i)}"', name, "") for i, name in enumerate(lines)]
    return _with_legend(drawn, f"{y_label} by {x_label}: {ends}", legend)


def _draw_lines(lines: Mapping[str, Sequence[Point]], x_label: str, y_label: str) -> tuple[str, str]:
    """Return axes and lines as SVG elements, and a description in words."""
    for name, points in lines.items():
        if not points:
            raise ValueError(f"the line {name!r} has no points to plot; leave it out")
    xs, ys = zip(*(point for points in lines.values() for point in points), strict=True)
    left, right = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1
    y_ticks = _ticks(min(ys), max(ys), 4)
    x_ticks = [tick for tick in _ticks(left, right, 3) if left <= tick <= right]
    place = _place((left, right), (y_ticks[0], y_ticks[-1]))
    drawn, ends = _axes(x_ticks, y_ticks, place, x_label, y_label, _texts), []
    for i, (name, points) in enumerate(lines.items()):
        x, y = place(*points[-1])
        drawn += f'<polyline {_stroke(i)} points="{" ".join("{},{}".format(*place(*point)) for point in points)}"/>'
        drawn += f'<circle cx="{x}" cy="{y}" r="3.5" style="fill:{colour(i)}"/>'
        ends.append(f"{name} ends with {_last(points)}")
    return drawn, f"{y_label} by {x_label}: {'; '.join(ends)}"


def _with_legend(drawn: str, description: str, legend: Sequence[tuple[str, str, str]]) -> str:
    """Return the SVG and its legend: the attributes of a swatch, a name and small print for each line."""
    items = "".join(
        f'<li><svg class="swatch" viewBox="0 0 32 8" aria-hidden="true"><path {line} d="M0 4H32"/></svg>{escape(name)}'
        f"{f' <small>{small}</small>' if small else ''}</li>"
        for line, name, small in legend
    )
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(description)}">{drawn}</svg>'
    return f'{svg}<ul class="legend">{items}</ul>'


def _place(x_range: Point, y_range: Point, log: bool = False) -> Place:
    scale: Callable[[float], float] = math.log10 if log else float
    (left, right), (low, high) = (map(scale, ends) for ends in (x_range, y_range))

    def place(x: float, y: float) -> Point:
        along, up = (scale(x) - left) / (right - left), (scale(y) - low) / (high - low)
        return round(LEFT + along * (WIDTH - LEFT - RIGHT), 1), round(HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM), 1)

    return place


def _marked_line(line: int, marks: Sequence[Mark], place: Place) -> str:
    drawn, stroke = "", f"stroke:{colour(line)}"
    for (x, y, _), (x1, y1, measured) in itertools.pairwise(marks):
        (a, b), (c, d) = place(x, y), place(x1, y1)
        drawn += f'<path class="line{"" if measured else " guess"}" style="{stroke}" d="M{a} {b}L{c} {d}"/>'
    for x, y, measured in marks if len(marks) <= MAX_MARKS else ():
        a, b = place(x, y)
        fill = f' style="fill:{colour(line)}"' if measured else f' class="open" style="{stroke}"'
        drawn += f'<circle cx="{a}" cy="{b}" r="3.5"{fill}/>'
    return drawn


def colour(line: int) -> str:
    """Return the CSS colour of a line by its place."""
    return f"var(--line{line % COLOURS})"


def _stroke(line: int) -> str:
    return f'class="line" style="stroke:{colour(line)};stroke-dasharray:{DASHES[line % len(DASHES)]}"'


def _last(points: Sequence[Point]) -> str:
    x, y = points[-1]
    value = f"{y:.2f}" if abs(y) >= 1 or y == 0 else f"{y:.3g}"
    return f"{value} at {x:,.0f}" if abs(x) >= 100 else f"{value} at {x:.3g}"


def _axes(
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    place: Place,
    x_label: str,
    y_label: str,
    texts: Callable[[Sequence[float]], Sequence[str]],
) -> str:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    drawn = ""
    for tick, text in zip(y_ticks, texts(y_ticks), strict=True):
        y = place(x_ticks[0], tick)[1]
        drawn += f'<path class="grid" d="M{LEFT} {y}H{right}"/>'
        drawn += f'<text x="{LEFT - 8}" y="{y}" dy="0.35em" text-anchor="end">{text}</text>'
    for tick, text in zip(x_ticks, texts(x_ticks), strict=True):
        x = place(tick, y_ticks[0])[0]
        drawn += f'<path class="axis" d="M{x} {bottom}v5"/>'
        drawn += f'<text x="{x}" y="{bottom + 20}" text-anchor="middle">{text}</text>'
    drawn += f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{right}"/>'
    drawn += f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>'
    turned = f'transform="translate(14 {(TOP + bottom) / 2}) rotate(-90)"'
    return drawn + f'<text {turned} text-anchor="middle">{escape(y_label)}</text>'


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Return evenly spaced round numbers that enclose [low, high], at least `count` steps."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    # The logarithm of 0.3 / 3 is that of 0.1, though the quotient is a little less.
    step = max(m * power for m in (1, 2, 5) if m * power <= span / count * (1 + 1e-9))
    first, last = math.floor(low / step), math.ceil(high / step)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def _texts(ticks: Sequence[float]) -> list[str]:
    digits = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    return [f"{tick:,.{digits}f}".replace("-", "−") for tick in ticks]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2, 5 times powers of ten, or those powers alone over more than two decades, that enclose [low, high]."""
    steps = (1, 2, 5) if high / low < 100 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 2)
    ticks = [step * 10.0**power for power in powers for step in steps]
    first = max(i for i, tick in enumerate(ticks) if tick <= low * (1 + 1e-9))
    last = min(i for i, tick in enumerate(ticks) if i > first and tick >= high * (1 - 1e-9))
    return ticks[first : last + 1]


def _log_texts(ticks: Sequence[float]) -> list[str]:
    return [f"{tick:,.0f}" if tick >= 1 else f"{tick:g}" for tick in ticks]
