"""Parts of the page to try things on, as HTML: what a budget costs, a sampled video, a comparison that plays with its plot.

Videos are uint8 (T, H, W, 3) or mp4 bytes. Nothing is loaded from elsewhere: videos are data URIs, plots inline SVG.
"""
# ruff: noqa: RUF001 (the page is set with × and curly quotes)

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape

from promag.evaluation.sampling_cost import SamplingCost
from promag.pipelines.sampling import Seconds

from .plots import LEFT, RIGHT, WIDTH, line_plot
from .side_by_side import GAP

COLUMN = 256  # pixels: narrower videos are enlarged, or 4:2:0 would halve the resolution of their colours

NO_PIPELINE = """
<div class="promag note">
<p>This page was started with a tokenizer alone. To try the text-to-video pipeline that comes with the project:</p>
<pre>promag app --pipeline checkpoints/tiny-video</pre>
<p>It knows generated clips alone: <q>a red disc moves left</q>. For your own it is <code>promag train-diffusion</code>;
docs/training.md has the order of steps.
Meanwhile, <b>Reconstruct a video</b> shows what the tokenizer keeps of a clip at each budget.</p>
</div>
"""


def message(text: str) -> str:
    """Return a mistake of the reader's, to be seen and to be read out."""
    return f'<div class="promag error" role="alert">{escape(text)}</div>'


def waiting(text: str) -> str:
    """Return what stands where a result will come."""
    return f'<div class="promag hint">{escape(text)}</div>'


def cost_table(costs: Sequence[tuple[SamplingCost, tuple[Seconds, str] | None]], chosen: int) -> str:
    """Return a table of what a video costs at each ratio, the chosen one marked; costs come with their expected seconds."""
    rows = "".join(_cost_row(cost, expected, cost.ratio == chosen, costs[0][0]) for cost, expected in costs)
    when = {expected[1] for _, expected in costs if expected}
    told = f"Seconds are expectations for this machine, from {_and(sorted(when))}." if when else "No time was measured yet."
    return (
        '<div class="promag"><table class="costs"><thead><tr><th>Budget</th><th>Latent frames</th><th>Tokens</th>'
        f"<th>Transformer</th><th>Expected</th></tr></thead><tbody>{rows}</tbody></table>"
        f'<p class="small">{escape(told)} The transformer’s arithmetic is of all steps, guidance included.</p></div>'
    )


def _cost_row(cost: SamplingCost, expected: tuple[Seconds, str] | None, chosen: bool, first: SamplingCost) -> str:
    saved = "" if cost is first else f" <small>{first.tokens / cost.tokens:.1f}× fewer</small>"
    time = f"{expected[0].total:.1f} s" if expected else "–"
    return (
        f'<tr{" class=chosen" if chosen else ""}><th scope="row">{cost.ratio}×</th><td>{cost.latent_frames}</td>'
        f"<td>{cost.tokens:,}{saved}</td><td>{_flops(cost.flops)}</td><td>{time}</td></tr>"
    )


def _flops(flops: float) -> str:
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if flops >= size:
            return f"{flops / size:.3g} {unit}FLOPs"
    return f"{flops / 1e6:.3g} MFLOPs"


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def sampled(mp4: bytes, prompt: str, seed: int, cost: SamplingCost, spent: Seconds, fps: float, width: int) -> str:
    """Return a sampled video with what it cost; `width` is that of its frames."""
    name = f"promag-{cost.ratio}x-seed-{seed}.mp4"
    facts = f"{cost.ratio}×, {cost.tokens:,} tokens, {cost.frames} frames at {fps:g} a second, seed {seed}."
    shown = min(512, max(COLUMN, width))
    return (
        f'<figure class="promag sample"><figcaption>{escape(prompt) or "(no text)"}</figcaption>'
        f'<video style="max-width:{shown}px" controls autoplay muted loop playsinline aria-label="{escape(prompt)}" '
        f'src="{_uri(mp4)}"></video><p>{escape(facts)} <a download="{name}" href="{_uri(mp4)}">Save the video</a></p>'
        f'<p class="small">Measured: {escape(str(spent))}.</p></figure>'
    )


def comparison(
    mp4: bytes,
    size: tuple[int, int],
    frame_psnr: Mapping[int, Sequence[float]],
    psnr: Mapping[int, float],
    seconds: Mapping[int, float],
    described: str,
) -> str:
    """Return original | each ratio in one video, hence in step, above the PSNR of every frame with a line at the one shown.

    Args:
        mp4: the columns side by side.
        size: (height, width) of the whole in pixels.
        frame_psnr: dB of each frame by ratio.
        psnr: dB of the whole video by ratio.
        seconds: what encoding and decoding took, by ratio.
        described: what the video is.
    """
    frames, columns = len(next(iter(frame_psnr.values()))), 1 + len(frame_psnr)
    head = "".join(f"<span>{escape(label)}</span>" for label in ("original", *(f"{r}×" for r in frame_psnr)))
    notes = [f"<b>{psnr[r]:.2f} dB</b><br><small>{frames / seconds[r]:.1f} frames/s</small>" for r in frame_psnr]
    below = "".join(f"<span>{note}</span>" for note in ("PSNR<br><small>computed here at</small>", *notes))
    lines = {f"{ratio}×": list(enumerate(values)) for ratio, values in frame_psnr.items()}
    plot = line_plot(lines, "frame", "PSNR (dB)") if frames > 1 else ""
    data = escape(json.dumps({f"{r}×": [round(x, 2) for x in values] for r, values in frame_psnr.items()}))
    place = f"--left:{100 * LEFT / WIDTH:.3f}%;--right:{100 * RIGHT / WIDTH:.3f}%"
    return (
        f'<div class="promag comparison" data-psnr="{data}"><p class="small">{escape(described)}</p>'
        f'<div class="strip" style="--columns:{columns};--gap:{100 * GAP / size[1]:.4f}%"><div class="labels">{head}</div>'
        f'<video width="{size[1]}" height="{size[0]}" autoplay muted loop playsinline '
        f'aria-label="original and reconstructions at {_and([f"{r}×" for r in frame_psnr])}, side by side" '
        f'src="{_uri(mp4)}"></video><div class="notes">{below}</div></div>'
        f'{CONTROLS}<div class="plot" style="{place}"><div class="cursor" hidden></div>{plot}</div></div>'
    )


def _uri(mp4: bytes) -> str:
    return f"data:video/mp4;base64,{base64.b64encode(mp4).decode()}"


CONTROLS = """<div class="controls"><button type="button">Pause</button>
<label>Speed <select><option value="0.1">0.1×</option><option value="0.25">0.25×</option><option value="0.5">0.5×</option>
<option value="1" selected>1×</option></select></label><output></output></div>"""

STYLE = """
.promag { --line0: #0068b5; --line1: #c94f00; --line2: #008060; --line3: #a2448e; --line4: #7a6a00; --line5: #555a60;
  --rule: #dddcd6; --soft: #5c6166; }
.dark .promag { --line0: #5fb0f5; --line1: #ff9a4d; --line2: #4cc9a4; --line3: #e19ad2; --line4: #d8c65a; --line5: #b5bac0;
  --rule: #3f4349; --soft: #a3a8ae; }
.promag p { margin: 0 0 0.5rem; max-width: 46rem; }
.promag small, .promag .small, p.promag.small { font-size: 0.8125rem; color: var(--soft); }
.promag pre { padding: 0.75rem 1rem; border: 1px solid var(--rule); border-radius: 6px; overflow-x: auto; }
.promag.error { padding: 0.75rem 1rem; border-left: 4px solid #c5372c; border-radius: 4px; background: #c5372c1f;
  overflow-wrap: anywhere; }
.promag.hint { padding: 3rem 1rem; text-align: center; color: var(--soft); border: 1px dashed var(--rule); border-radius: 8px; }
.promag table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; margin-bottom: 0.5rem; }
.promag th, .promag td { padding: 0.35rem 0.6rem; text-align: right; font-weight: 400; border: 0 solid var(--rule);
  border-bottom-width: 1px; }
.promag th:first-child { text-align: left; }
.promag thead th { color: var(--soft); font-size: 0.8125rem; }
.promag .chosen { background: color-mix(in srgb, var(--line0) 14%, transparent); }
.promag .chosen th { font-weight: 700; }
.promag video { display: block; width: 100%; height: auto; image-rendering: pixelated; border-radius: 3px; }
.promag figcaption { font-weight: 600; margin-bottom: 0.5rem; }
.promag.sample { margin: 0; }
.promag.sample video { margin-bottom: 0.75rem; }
.promag .strip > div { display: grid; grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); column-gap: var(--gap);
  text-align: center; font-variant-numeric: tabular-nums; line-height: 1.35; }
.promag .labels { padding-bottom: 0.3rem; font-weight: 600; }
.promag .notes { padding-top: 0.4rem; }
.promag .controls { display: flex; flex-wrap: wrap; align-items: center; gap: 0.4rem 1rem; margin-top: 0.75rem; }
.promag .controls button { min-width: 5rem; padding: 0.25rem 0.75rem; border: 1px solid var(--rule); border-radius: 6px;
  cursor: pointer; }
.promag .controls select { padding: 0.2rem 1.75rem 0.2rem 0.5rem; border: 1px solid var(--rule); border-radius: 6px;
  background-color: transparent; }
.promag .controls output { font-variant-numeric: tabular-nums; }
.promag .plot { position: relative; container-type: inline-size; max-width: 640px; margin: 0.75rem auto 0; cursor: crosshair; }
.promag .plot svg:not(.swatch) { display: block; width: 100%; height: auto; }
.promag .plot text { font-size: 10px; fill: var(--soft); }
.promag .axis { stroke: var(--soft); fill: none; }
.promag .grid { stroke: var(--rule); fill: none; }
.promag .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.promag .legend { display: flex; flex-wrap: wrap; justify-content: center; gap: 0.2rem 1.5rem; margin: 0.3rem 0 0; padding: 0;
  list-style: none; }
.promag .swatch { display: inline-block; width: 32px; height: 8px; margin-right: 0.4rem; vertical-align: middle; }
.promag .cursor { position: absolute; top: 2.5cqw; height: 47.1cqw; width: 1.5px; background: currentColor; opacity: 0.55;
  left: calc(var(--left) + (100% - var(--left) - var(--right)) * var(--at, 0)); pointer-events: none; }
@media (max-width: 640px) { .promag th, .promag td { padding: 0.35rem 0.25rem; } .promag .strip { font-size: 0.8125rem; } }
"""

# In each comparison the line of the plot and the words beside the controls follow the frame shown; a click goes to one.
SCRIPT = """
const of = part => ({video: part.querySelector("video"), cursor: part.querySelector(".cursor"),
  psnr: JSON.parse(part.dataset.psnr)});

function begin(part) {
  const {video} = of(part), button = part.querySelector("button"), plot = part.querySelector(".plot");
  part.dataset.begun = "yes";
  video.addEventListener("play", () => { button.textContent = "Pause"; });
  video.addEventListener("pause", () => { button.textContent = "Play"; });
  button.addEventListener("click", () => { video.paused ? video.play() : video.pause(); });
  part.querySelector("select").addEventListener("change", event => { video.playbackRate = Number(event.target.value); });
  plot.addEventListener("click", event => {
    const box = plot.getBoundingClientRect(), style = getComputedStyle(plot);
    const [left, right] = ["--left", "--right"].map(name => parseFloat(style.getPropertyValue(name)) / 100);
    const at = ((event.clientX - box.left) / box.width - left) / (1 - left - right);
    const frames = Object.values(of(part).psnr)[0].length;
    const frame = Math.round(Math.min(1, Math.max(0, at)) * (frames - 1));
    video.pause();
    video.currentTime = (frame + 0.5) / frames * video.duration;
  });
}

function follow() {
  for (const part of document.querySelectorAll(".comparison")) {
    if (!part.dataset.begun) begin(part);
    const {video, cursor, psnr} = of(part), frames = Object.values(psnr)[0].length;
    if (!video.duration) continue;
    const frame = Math.min(frames - 1, Math.floor(video.currentTime / video.duration * frames));
    if (cursor.dataset.frame === String(frame)) continue;
    cursor.dataset.frame = frame;
    cursor.hidden = frames < 2;
    cursor.style.setProperty("--at", frame / Math.max(1, frames - 1));
    const each = Object.entries(psnr).map(([ratio, values]) => `${ratio} ${values[frame].toFixed(1)}`);
    part.querySelector("output").textContent = `frame ${frame}: ${each.join(", ")} dB`;
  }
  requestAnimationFrame(follow);
}
requestAnimationFrame(follow);
"""
