"""One self-contained HTML page for a comparison of token budgets: a player for the clips, tables, plots, a target to choose.

Figures (as they are written to results.jsonl) and the clips' videos go in, one file comes out. The page loads nothing from
elsewhere. H.264 in mp4 is what every browser plays, Safari on iOS included; its films are made at a quality where what it
loses is far below the errors that are looked at, with a key frame every few frames, so that stepping is quick.
"""
# ruff: noqa: RUF001 (the page is set with × and −)

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from promag.data.video import encode_mp4
from promag.evaluation.budgets import ORIGINAL, ClipFacts
from promag.training.run import write_atomically

from .budget_page_script import SCRIPT
from .budget_page_style import STYLE
from .budget_tables import cost_lines, figure_table, generation_lines, reconstruction_lines, token_lines
from .plots import COLOURS, Mark, marked_plot
from .report_style import PAGE
from .report_style import STYLE as REPORT_STYLE
from .tables import number

LIMIT = 28_000_000  # bytes of the page, below the 30 MB that mail and wikis take
CRF, KEY_EVERY = 15, 8
TILE = 128  # pixels: narrower videos are enlarged, or 4:2:0 would halve the resolution of their colours
ACROSS = 4  # tiles in a row of a film
POSTER = 112  # pixels


@dataclass(frozen=True, eq=False)
class BudgetReport:
    """All that the page shows.

    Args:
        title: of the page.
        budgets: figures by name, as `promag compare-budgets` records them; the levels of the checkpoint, most tokens
            first, then other autoencoders.
        levels: names of the checkpoint's levels.
        clips: in the order of `per_clip` of the figures.
        adaptive: what `adaptive_figures` returned, or None.
        curves: points (frames, value, measured) by plot and line.
        generation: figures by pipeline and ratio.
        facts: how it was measured.
    """

    title: str
    budgets: Mapping[str, Mapping[str, Any]]
    levels: Sequence[str]
    clips: Sequence[ClipFacts]
    adaptive: Mapping[str, Any] | None = None
    curves: Mapping[str, Mapping[str, Sequence[Mark]]] = field(default_factory=dict)
    generation: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)


def write_budget_page(path: Path, report: BudgetReport) -> int:
    """Write the page; return how many clips it shows, the worst first: as many as keep it below LIMIT.

    Worst is the lowest PSNR at the level of fewest tokens.
    """
    last = report.levels[-1]
    psnr = [row["psnr"] for row in report.budgets[last]["reconstruction"]["per_clip"]]
    order = sorted(range(len(report.clips)), key=lambda i: psnr[i])
    films: dict[int, str] = {}
    rest = len(_page(report, order, {}).encode())
    for i in order:
        film = base64.b64encode(_film(report.clips[i], list(report.budgets))).decode()
        if rest + sum(map(len, films.values())) + len(film) > LIMIT:
            break
        films[i] = film
    write_atomically(path, _page(report, [i for i in order if i in films], films))
    return len(films)


def _film(clip: ClipFacts, budgets: Sequence[str]) -> bytes:
    """Tile the original and every budget's video in rows of ACROSS, enlarged to about TILE pixels, as one mp4."""
    videos = [np.load(clip.videos[name]) for name in (ORIGINAL, *budgets)]
    times = enlargement(videos[0].shape[2])
    across = min(ACROSS, len(videos))
    videos += [np.zeros_like(videos[0])] * (-len(videos) % across)
    rows = [np.concatenate(videos[i : i + across], 2) for i in range(0, len(videos), across)]
    tiled = np.concatenate(rows, 1).repeat(times, 1).repeat(times, 2)
    return encode_mp4(tiled, clip.fps, crf=CRF, key_every=KEY_EVERY)


def enlargement(width: int) -> int:
    """Return by how much a video of this width is enlarged."""
    return max(1, round(TILE / width))


def _poster(clip: ClipFacts) -> str:
    """Return the middle frame of the original as the data URI of a small JPEG."""
    video = np.load(clip.videos[ORIGINAL], mmap_mode="r")
    picture = Image.fromarray(np.ascontiguousarray(video[len(video) // 2]))
    picture.thumbnail((POSTER, POSTER))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


# -- parts -----------------------------------------------------------------------------------------------------------


def _line(names: Sequence[str], name: str) -> str:
    return f"--line{names.index(name) % COLOURS}"


def _data(report: BudgetReport, order: Sequence[int]) -> str:
    names = list(report.budgets)
    first = np.load(report.clips[0].videos[ORIGINAL], mmap_mode="r")
    clips = []
    for i in order:
        clip = report.clips[i]
        per_clip = {name: report.budgets[name]["reconstruction"]["per_clip"][i]["psnr"] for name in names}
        per_frame = {name: [round(v, 3) for v in clip.psnr_per_frame[name]] for name in names}
        clips.append(
            {
                "name": clip.name,
                "caption": clip.caption,
                "fps": clip.fps,
                "frames": len(next(iter(per_frame.values()))),
                "psnr": per_clip,
                "per_frame": per_frame,
            }
        )
    found = {
        "clips": clips,
        "lines": {name: _line(names, name) for name in names},
        "every": max(report.budgets[name]["ratio"] for name in report.levels),
        "tile": {
            "width": first.shape[2],
            "height": first.shape[1],
            "scale": enlargement(first.shape[2]),
            "across": min(ACROSS, 1 + len(names)),
        },
        "adaptive": report.adaptive and _adaptive_data(report),
    }
    return json.dumps(found, ensure_ascii=False, allow_nan=False).replace("</", "<\\/")


def _adaptive_data(report: BudgetReport) -> dict[str, Any]:
    assert report.adaptive is not None
    levels = [{"name": name, **report.adaptive["tokens"][name]} for name in report.levels]
    by_level = [[part[name] for name in report.levels] for part in report.adaptive["clip_psnr"]]
    segments = [[[part[name] for name in report.levels] for part in clip] for clip in report.adaptive["segment_psnr"]]
    return {"levels": levels, "clips": by_level, "segments": segments, "names": [clip.name for clip in report.clips]}


def _lead(report: BudgetReport) -> str:
    cards = []
    for name, budget in report.budgets.items():
        count = next(value for value in (budget["tokens"]["1x2x2"], budget["tokens"]["1x1x1"]) if value is not None)
        cards.append(
            f'<li style="--line:var({_line(list(report.budgets), name)})"><span>{escape(name)} · {count:,} tokens</span>'
            f"<b>{budget['reconstruction']['psnr']:.2f} dB</b>"
            f"<span>SSIM {budget['reconstruction']['ssim']:.3f} · {budget['latent_values_per_pixel']:.3g} values/pixel</span>"
            "</li>"
        )
    return f'<ul class="lead">{"".join(cards)}</ul>'


def _summary(report: BudgetReport) -> str:
    frames, height, width, _ = np.load(report.clips[0].videos[ORIGINAL], mmap_mode="r").shape
    first, last = (report.budgets[name] for name in (report.levels[0], report.levels[-1]))
    lost = first["reconstruction"]["psnr"] - last["reconstruction"]["psnr"]
    text = f"{len(report.clips)} clips, {frames} frames of {width} × {height} pixels each."
    if len(report.levels) == 1:
        return text
    times = first["latent_values"] / last["latent_values"]
    return (
        f"{text} {report.levels[-1]} has {times:.1f} times fewer tokens than {report.levels[0]} and is {lost:.2f} dB below it."
    )


def _tiles(report: BudgetReport) -> str:
    video = np.load(report.clips[0].videos[ORIGINAL], mmap_mode="r")
    _, height, width, _ = video.shape
    names, drawn = list(report.budgets), ""
    for name in (ORIGINAL, *names):
        budget = report.budgets.get(name)
        line = f' style="--line:var({_line(names, name)})"' if budget else ""
        tokens = "" if budget is None else f"{budget['tokens']['1x2x2'] or budget['tokens']['1x1x1']:,} tokens"
        note = "what the others are compared with" if budget is None else ""
        drawn += (
            f'<figure class="tile" data-budget="{escape(name)}"{line}><figcaption><b>{escape(name)}</b><span>{tokens}</span>'
            f'</figcaption><div class="frame"><canvas width="{width}" height="{height}" role="img" '
            f'aria-label="{escape(name)}"></canvas></div><p>{note}</p></figure>'
        )
    return f'<div class="tiles" id="tiles" style="--across:{min(6, 1 + len(names))}">{drawn}</div>'


def _clip_table(report: BudgetReport, order: Sequence[int]) -> str:
    names, levels = list(report.budgets), report.levels
    heads = [("clip", ""), ("motion", "number"), *((f"{name} dB", "number") for name in names)]
    heads += [("SSIM", "number"), ("flicker", "number")]
    heads += [(f"lost by {levels[-1]}", "number")] if len(levels) > 1 else []
    heads += [("smallest", "")] if report.adaptive else []
    sorted_by = f"{levels[-1]} dB"
    head = "".join(
        f'<th scope="col" class="{kind}"{_sorted(text == sorted_by)}><button type="button">{escape(text)}</button></th>'
        for text, kind in heads
    )
    rows = ""
    for place, i in enumerate(order):
        clip, figures = report.clips[i], {name: report.budgets[name]["reconstruction"]["per_clip"][i] for name in names}
        last = figures[levels[-1]]
        values = [last["motion"], *(figures[name]["psnr"] for name in names), last["ssim"], last["flicker"]]
        values += [last["psnr"] - figures[levels[0]]["psnr"]] if len(levels) > 1 else []
        digits = [2, *[2] * len(names), 3, 2, 2]
        cells = "".join(
            f'<td class="number" data-value="{v}">{number(v, d)}</td>' for v, d in zip(values, digits, strict=False)
        )
        smallest = '<td class="smallest"></td>' if report.adaptive else ""
        rows += (
            f'<tr data-clip="{place}" data-place="{i}"><td><img src="{_poster(clip)}" alt="" width="56" height="56"></td>'
            f'<td data-value="{escape(clip.name)}"><button type="button">{escape(clip.name)}</button>'
            f"<small>{escape(clip.caption)}</small></td>{cells}{smallest}</tr>"
        )
    table = f'<table class="clips"><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return f'<div class="wide-table">{table}</div>'


def _sorted(yes: bool) -> str:
    return ' aria-sort="ascending"' if yes else ""


def _rate_distortion(report: BudgetReport) -> str:
    """Draw PSNR over tokens and over bits: all clips, and terciles of motion; each other autoencoder is a point."""

    def lines(x: Any) -> dict[str, list[Mark]]:
        found: dict[str, list[Mark]] = {}
        parts = {"all clips": "psnr", "least motion": "psnr_low_motion", "most motion": "psnr_top_motion"}
        for part, key in parts.items():
            marks = [(x(b), b["reconstruction"].get(key), True) for b in map(report.budgets.get, report.levels) if b]
            if all(mark[0] is not None and mark[1] is not None for mark in marks):
                found[part] = sorted(marks)
        for name, budget in report.budgets.items():
            if name not in report.levels and x(budget) is not None:
                found[name] = [(x(budget), budget["reconstruction"]["psnr"], True)]
        return found

    plots = (
        ("Tokens", "tokens of a clip, patch 1x2x2", lambda b: b["tokens"]["1x2x2"]),
        ("Stored values", "bits per pixel, 16 for each latent value", lambda b: b["stored_bits_per_pixel"]),
        ("Information", "bits per pixel, KL to a Gaussian per channel", lambda b: b["reconstruction"]["kl_bits_per_pixel"]),
    )
    drawn = ""
    for title, label, x in plots:
        if found := lines(x):
            own = sorted(report.levels, key=lambda name: x(report.budgets[name]) or 0)
            drawn += f"<figure><h3>{title}</h3>{marked_plot(found, label, 'PSNR (dB)', names=own)}</figure>"
    phases = {}
    for name in report.levels:
        values = report.budgets[name]["reconstruction"].get("psnr_per_frame")
        if values:
            phases[name] = [(float(i), value, True) for i, value in enumerate(values)]
    if phases:
        drawn += f"<figure><h3>By frame</h3>{marked_plot(phases, 'frame', 'PSNR (dB), mean of clips')}</figure>"
    return _section("Rate and distortion", RATE, f'<div class="plots">{drawn}</div>')


def _adaptive(report: BudgetReport) -> str:
    if report.adaptive is None:
        return ""
    found = report.adaptive
    values = [value for clip in found["clip_psnr"] for value in clip.values()]
    low, high = math.floor(min(values)), math.ceil(max(values))
    controls = (
        f'<div class="target"><label for="target">Wanted PSNR</label><input type="range" id="target" min="{low}" max="{high}" '
        f'step="0.1" value="{found["target"]}"><output id="aim" for="target"></output>'
        '<label><input type="radio" name="by" value="clip" checked> a level per clip</label>'
        f'<label><input type="radio" name="by" value="segment"> a level per segment of {found["segment_frames"]} frames</label>'
        '</div><p class="told" id="told" aria-live="polite"></p><div class="levels" id="levels"></div>'
    )
    return _section("A budget for each clip", ADAPTIVE, controls)


def _costs(report: BudgetReport) -> str:
    lines = cost_lines(report.budgets)
    plots = "".join(
        f"<figure><h3>{escape(title)}</h3>{marked_plot(drawn, 'frames of a clip', title.split(', ')[-1], log=True)}</figure>"
        for title, drawn in report.curves.items()
    )
    if not lines and not plots:
        return ""
    table = figure_table("Cost of a transformer", list(report.budgets), lines) if lines else ""
    return _section("What a budget costs", COSTS, f'{table}<div class="plots">{plots}</div>')


def _section(title: str, text: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{f'<p>{text}</p>' if text else ''}{content}</section>\n"


def _page(report: BudgetReport, order: Sequence[int], films: Mapping[int, str]) -> str:
    names = list(report.budgets)
    shown, count = len(order), len(report.clips)
    left_out = "" if shown == count else f" The {shown} worst of {count} clips are shown; figures are of all {count}."
    facts = "".join(f'<tr><th scope="row">{escape(k)}</th><td>{escape(v)}</td></tr>' for k, v in report.facts.items())
    figures = {**token_lines(report.budgets), **reconstruction_lines(report.budgets)}
    generation = ""
    if report.generation:
        table = figure_table("Pipeline", list(report.generation), generation_lines(report.generation))
        generation = _section("Generation", GENERATION, table)
    parts = [
        VIEWER.format(tiles=_tiles(report)),
        _section("Clips", CLIPS + left_out, _clip_table(report, order)),
        _section("Figures", FIGURES, figure_table("Budget", names, figures)),
        _rate_distortion(report),
        _adaptive(report),
        _costs(report),
        generation,
        _section("How this was measured", "", f'<table class="facts"><tbody>{facts}</tbody></table>') if facts else "",
    ]
    scripts = [
        f'<script type="application/json" id="data">{_data(report, order)}</script>\n',
        *(f'<script type="text/plain" id="film-{n}">{films[i]}</script>\n' for n, i in enumerate(order) if films),
        f"<script>{SCRIPT}</script>",
    ]
    return PAGE.format(
        style=REPORT_STYLE + STYLE,
        title=escape(report.title),
        lead=f"<p>{escape(_summary(report))}</p>{_lead(report)}",
        main="".join(parts),
        scripts="".join(scripts),
    )


CLIPS = "Worst first. Choose a clip to watch it; a heading sorts. SSIM and flicker are those of the fewest tokens."
FIGURES = "Every budget reconstructs the same frames of the same clips. Small print compares with the first column."
RATE = "Quality over what it takes. Lines join the levels of one checkpoint; an autoencoder with one level is a single mark."
ADAPTIVE = (
    "One checkpoint has every level, so each clip, or each segment that is coded alone, can have the cheapest that is good "
    "enough. Compared is the cheapest level for all whose worst case is no worse and that misses the target no more often. "
    "Dashed: the target is missed."
)
COSTS = (
    "Of one transformer on random latents, text encoding and decoding aside. Filled marks were measured; open ones, on dotted "
    "lines, follow from a curve fitted to these."
)
GENERATION = "Videos sampled for the prompts of generated clips, and what a scorer that sees only the video reads in them."

VIEWER = """<section class="viewer" id="viewer" aria-label="Player">
<header><h2 id="clip-name"></h2><p id="clip-caption"></p></header>
<video id="film" muted loop playsinline preload="auto" aria-hidden="true" tabindex="-1"></video>
{tiles}
<div class="scale" id="heat" hidden>error 0 <i></i> <span id="most">64</span> of 255 grey levels and more</div>
<div class="trace"><svg id="trace" viewBox="0 0 1000 84" preserveAspectRatio="none" role="img" \
aria-label="PSNR of each frame by budget"></svg><span class="high" id="high"></span><span class="low" id="low"></span></div>
<input type="range" id="scrub" min="0" max="1" step="1" value="0" aria-label="Frame">
<div class="buttons" role="group" aria-label="Playback">
<button type="button" id="play">Play</button>
<button type="button" id="back" aria-label="One frame back">‹</button>
<button type="button" id="forth" aria-label="One frame forth">›</button>
<output id="where"></output>
<label>Speed <select id="speed"><option value="0.1">0.1×</option><option value="0.25">0.25×</option>
<option value="0.5">0.5×</option><option value="1" selected>1×</option><option value="2">2×</option></select></label>
<span class="spacer"></span>
<button type="button" id="error" aria-pressed="false">Error map</button>
<label>Gain <select id="gain"><option value="1">1×</option><option value="2">2×</option>
<option value="4" selected>4×</option><option value="8">8×</option></select></label>
<button type="button" id="original" aria-pressed="false">Original in all</button>
<button type="button" id="out" aria-label="Zoom out">−</button>
<button type="button" id="zoomed" aria-label="Zoom, reset">1×</button>
<button type="button" id="in" aria-label="Zoom in">+</button>
</div>
<details><summary>Keys and gestures</summary><p><kbd>space</kbd> play, <kbd>←</kbd> <kbd>→</kbd> one frame, <kbd>j</kbd>
<kbd>l</kbd> eight frames, <kbd>e</kbd> error map, <kbd>o</kbd> original in all, <kbd>+</kbd> <kbd>−</kbd> <kbd>0</kbd> zoom,
<kbd>n</kbd> <kbd>p</kbd> next and previous clip. Click a picture to zoom in there, drag to move, pinch or Ctrl and wheel to
zoom. The curve shows the PSNR of each frame; click or drag on it to go there. Grey lines stand where a latent frame of the
fewest tokens ends.</p></details>
</section>
"""
