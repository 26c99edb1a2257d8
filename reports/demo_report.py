"""One self-contained HTML page for the outcome of a run: token budgets, reconstructions, samples, curves and facts.

Figures and uint8 videos (T, H, W, 3) go in, files come out; no model is known here. The page loads nothing from
elsewhere: its videos are data URIs, its plots inline SVG. The columns of one clip lie in one video, hence in step.
"""
# ruff: noqa: RUF001 (the page is set with × and curly quotes)

import base64
import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from promag.data.video import encode_mp4, written_whole

from .grid import GAP, grid
from .plots import line_plot
from .report_style import PAGE, SCRIPT, STYLE
from .tables import BudgetRow, budget_table, dash

CRF = 20
COLUMN = 128  # pixels; narrower videos are enlarged, or 4:2:0 would halve the resolution of their colours


@dataclass(frozen=True, eq=False)
class ReconstructionClip:
    """An unseen clip and what each temporal ratio makes of it, uint8 (T, H, W, 3) each, with PSNR in dB."""

    name: str
    caption: str
    fps: float
    original: np.ndarray
    by_ratio: Mapping[int, np.ndarray]
    psnr: Mapping[int, float]


@dataclass(frozen=True, eq=False)
class SampleClip:
    """Videos sampled for one prompt, by temporal ratio; `read` has what a scorer read in each, and if it matches."""

    prompt: str
    fps: float
    by_ratio: Mapping[int, np.ndarray]
    read: Mapping[int, tuple[str, bool]] | None


@dataclass(frozen=True, eq=False)
class Report:
    """All that the page shows. The first of `rows` is the one that the others are compared with.

    `chance` has the accuracy of guessing, by the names of `BudgetRow.accuracy`. `curves` has (step, PSNR in dB) points
    by name; a name "plot/line" puts the line into the plot of that name. `shipped` are samples of a pipeline that was trained
    before, shown above all else.
    """

    title: str
    summary: Sequence[str]
    rows: Sequence[BudgetRow]
    chance: Mapping[str, float] | None
    reconstructions: Sequence[ReconstructionClip]
    samples: Sequence[SampleClip]
    curves: Mapping[str, Sequence[tuple[float, float]]]
    facts: Mapping[str, str]
    shipped: Sequence[SampleClip] = ()


def write_report(folder: str | os.PathLike, report: Report) -> Path:
    """Write `report.html`, `report.json` (all but the pixels) and `videos/*.mp4` into `folder`; return the page's path.

    Each file appears only when whole, the page last. Before anything is written, ValueError is raised for videos of one
    clip that differ in shape or are not uint8 (T, H, W, 3) with even sizes, and for figures that are not finite.
    """
    folder = Path(folder)
    films = [_film(f"reconstruction-{i:02d}", clip) for i, clip in enumerate(report.reconstructions, 1)]
    films += [_film(f"sample-{i:02d}", clip) for i, clip in enumerate(report.samples, 1)]
    films += [_film(f"shipped-{i:02d}", clip) for i, clip in enumerate(report.shipped, 1)]
    figures = json.dumps(_figures(report, films), indent=1, ensure_ascii=False) + "\n"
    files = {f"videos/{film.name}.mp4": film.mp4 for film in films}
    files |= {"report.json": figures.encode(), "report.html": _page(report, films).encode()}
    for name, content in files.items():
        with written_whole(folder / name) as aside:
            Path(aside).write_bytes(content)
    return folder / "report.html"


# -- videos ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Film:
    """The videos of one clip side by side in one mp4; `shape` is (T, H, W) of one, `size` is (H, W) of the whole."""

    name: str
    labels: list[str]
    shape: tuple[int, ...]
    size: tuple[int, ...]
    mp4: bytes


def _film(name: str, clip: ReconstructionClip | SampleClip) -> _Film:
    columns = {"original": clip.original} if isinstance(clip, ReconstructionClip) else {}
    columns |= {f"{ratio}×": clip.by_ratio[ratio] for ratio in sorted(clip.by_ratio)}
    title, notes = (clip.name, clip.psnr) if isinstance(clip, ReconstructionClip) else (clip.prompt, clip.read or {})
    if extra := sorted(set(notes) - set(clip.by_ratio)):
        raise ValueError(f"{title!r} has figures at {extra} without videos; it has those of {sorted(clip.by_ratio)}")
    shapes = {label: (video.shape, str(video.dtype)) for label, video in columns.items()}
    first = next(iter(columns.values()), np.empty(0))
    if len(set(shapes.values())) != 1 or first.dtype != np.uint8 or first.ndim != 4 or first.shape[-1] != 3:
        found = ", ".join(f"{label} is {dtype} {shape}" for label, (shape, dtype) in shapes.items()) or "there is none"
        raise ValueError(f"videos of {title!r}: {found}; all must be uint8 (T, H, W, 3) of one shape")
    frames = _side_by_side(list(columns.values()))
    return _Film(name, list(columns), first.shape[:3], frames.shape[1:3], encode_mp4(frames, clip.fps, crf=CRF))


def _side_by_side(videos: Sequence[np.ndarray]) -> np.ndarray:
    """Return videos (T, H, W, 3) as one, enlarged to about COLUMN pixels each, with a grey bar between."""
    times = max(1, round(COLUMN / videos[0].shape[2]))
    return grid([video.repeat(times, axis=1).repeat(times, axis=2) for video in videos], len(videos))


def _strip(film: _Film, notes: Sequence[str], described: str) -> str:
    """Return a film with a label above and a note (HTML) below each column, on the same grid."""
    height, width = film.size
    data = base64.b64encode(film.mp4).decode()
    labels = "".join(f"<span>{escape(label)}</span>" for label in film.labels)
    below = "".join(f"<span>{note}</span>" for note in notes)
    return (
        f'<div class="strip" style="--columns:{len(film.labels)};--gap:{100 * GAP / width:.4f}%">'
        f'<div class="labels">{labels}</div>'
        f'<video width="{width}" height="{height}" autoplay muted loop playsinline '
        f'aria-label="{escape(described)}: {escape(", ".join(film.labels))}, side by side" '
        f'src="data:video/mp4;base64,{data}"></video>'
        f'<div class="notes">{below}</div></div>'
    )


def _reconstructions(clips: Sequence[ReconstructionClip], films: Sequence[_Film]) -> str:
    figures = []
    for clip, film in zip(clips, films, strict=True):
        frames, height, width = film.shape
        psnr = [f"{clip.psnr[r]:.2f} dB" if r in clip.psnr else dash() for r in sorted(clip.by_ratio)]
        figures.append(
            f'<figure class="wide"><figcaption><h3>{escape(clip.name)}</h3><p>{escape(clip.caption)}</p>'
            f'<p class="small">{frames} frames of {width} × {height} pixels, {clip.fps:g} a second</p></figcaption>'
            f"{_strip(film, ['PSNR', *psnr], clip.name)}</figure>"
        )
    text = "Unseen clips, encoded and decoded at each temporal compression. Columns of one clip play in step."
    return _section("Reconstructions", text, "".join(figures))


def _samples(title: str, clips: Sequence[SampleClip], films: Sequence[_Film]) -> str:
    figures = []
    for clip, film in zip(clips, films, strict=True):
        read = {} if clip.read is None else {r: _verdict(clip.read.get(r)) for r in sorted(clip.by_ratio)}
        caption = f"<figcaption><h3>“{escape(clip.prompt)}”</h3></figcaption>"
        figures.append(f"<figure>{caption}{_strip(film, list(read.values()), clip.prompt)}</figure>")
    text = "One video for each prompt and temporal compression."
    if any(clip.read for clip in clips):
        text += " Below each: what a scorer that sees only the video reads in it, ✓ where that is what was asked for."
    return _section(title, text, f'<div class="cards">{"".join(figures)}</div>')


def _verdict(read: tuple[str, bool] | None) -> str:
    if read is None:
        return dash()
    text, matches = read
    mark = ("yes", "✓", "matches") if matches else ("no", "✗", "does not match")
    return f'<span class="{mark[0]}" role="img" aria-label="{mark[2]}">{mark[1]}</span> {escape(text)}'


# -- page ------------------------------------------------------------------------------------------------------------


def _curves(curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    plots: dict[str, dict[str, Sequence[tuple[float, float]]]] = {}
    for name, points in curves.items():
        plot, _, line = name.rpartition("/")
        plots.setdefault(plot, {})[line] = points
    figures = "".join(
        f"<figure>{f'<h3>{escape(name)}</h3>' if name else ''}{line_plot(lines, 'training step', 'PSNR (dB)')}</figure>"
        for name, lines in plots.items()
    )
    return _section("Training curves", "PSNR of unseen clips while training.", f'<div class="plots">{figures}</div>')


def _facts(facts: Mapping[str, str]) -> str:
    lines = "".join(f'<tr><th scope="row">{escape(k)}</th><td>{escape(v)}</td></tr>' for k, v in facts.items())
    return _section("How this was measured", "", f'<table class="facts"><tbody>{lines}</tbody></table>')


def _section(title: str, text: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{f'<p>{escape(text)}</p>' if text else ''}{content}</section>\n"


def _page(report: Report, films: Sequence[_Film]) -> str:
    """Return the page; sections without content are left out."""
    count, end = len(report.reconstructions), len(report.reconstructions) + len(report.samples)
    videos = _samples(SHIPPED, report.shipped, films[end:]) if report.shipped else ""
    videos += _reconstructions(report.reconstructions, films[:count]) if count else ""
    videos += _samples("Samples", report.samples, films[count:end]) if report.samples else ""
    parts = [
        _section("Token budgets", BUDGETS, budget_table(report.rows, report.chance)) if report.rows else "",
        f'<div class="videos">{CONTROLS}{videos}</div>' if videos else "",
        _curves(report.curves) if report.curves else "",
        _facts(report.facts) if report.facts else "",
    ]
    return PAGE.format(
        style=STYLE,
        title=escape(report.title),
        lead="".join(f"<p>{escape(sentence)}</p>" for sentence in report.summary),
        main="".join(parts),
        scripts=f"<script>{SCRIPT}</script>",
    )


BUDGETS = (
    "Temporal compression r turns 1 + rN frames into 1 + N latent frames, the tokens of the text-to-video model. "
    "Small print compares with the first column."
)

SHIPPED = "Samples of the trained pipeline that comes with the project"

CONTROLS = """<div class="controls" role="group" aria-label="Video playback">
<button type="button" id="play">Pause all</button>
<label>Speed <select id="speed"><option value="0.1">0.1×</option><option value="0.25">0.25×</option>
<option value="0.5">0.5×</option><option value="1" selected>1×</option><option value="2">2×</option></select></label>
</div>
"""


# -- figures ---------------------------------------------------------------------------------------------------------


def _figures(report: Report, films: Sequence[_Film]) -> dict[str, Any]:
    """Return what `report.json` holds; ValueError names a figure that is not finite."""
    clips = [
        *({"name": c.name, "caption": c.caption, "fps": c.fps, "psnr": c.psnr} for c in report.reconstructions),
        *({"prompt": c.prompt, "fps": c.fps, "read": c.read} for c in (*report.samples, *report.shipped)),
    ]
    for clip, film in zip(clips, films, strict=True):
        frames, height, width = film.shape
        clip |= {"frames": frames, "height": height, "width": width}
        clip |= {"video": f"videos/{film.name}.mp4", "columns": film.labels}
    count, end = len(report.reconstructions), len(report.reconstructions) + len(report.samples)
    figures = {
        "title": report.title,
        "summary": report.summary,
        "rows": [dataclasses.asdict(row) for row in report.rows],
        "chance": report.chance,
        "reconstructions": clips[:count],
        "samples": clips[count:end],
        "shipped": clips[end:],
        "curves": report.curves,
        "facts": report.facts,
    }
    return {name: _plain(value, name) for name, value in figures.items()}


def _plain(value: Any, name: str) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner, f"{name}.{key}") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, f"{name}.{i}") for i, inner in enumerate(value)]
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value}: figures must be finite; give None for one that was not measured")
    return value
