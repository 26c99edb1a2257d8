"""The web app: sample at a token budget, and see what each budget keeps of an uploaded video.

`AppBackend` turns settings into HTML and knows nothing of Gradio; `build_app` lays out its buttons with Gradio.
"""
# ruff: noqa: RUF001 (the page is set with ×)

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from promag.data.video import IsolatedReader, UnreadableVideo, at_constant_rate, encode_mp4, stream_frames
from promag.evaluation.sampling_cost import Pace, sampling_cost
from promag.pipelines.sampling import SampleRequest, make_videos, trained_ratios
from promag.training.config import UserError
from promag.training.precision import Precision

from .page import asset, render_part
from .plots import colour
from .side_by_side import Comparison, Film, chunk_of, enlargement, fit_size, make_film
from .uploads import KINDS, MEGABYTE, UploadLimits, check_upload, unreadable

CRF, KEY_EVERY = 14, 8
TILE = 256  # pixels: narrower videos are enlarged
SIDES = (64, 128, 256)  # pixels of the shorter side of a reconstruction
LONGEST = 3  # times the shorter side: the longer one, at most
WORK = 300.0  # seconds that one comparison, or the steps of one video, may take
DECODERS, DECODER_MEMORY, DECODER_SECONDS = 3, 2**29, 60.0  # processes that read uploads; bytes and seconds for each
LONGEST_PROMPT = 2000  # characters
KEPT = 3600  # seconds that uploaded files stay on the disk
QUEUE = 16  # visitors that wait; the models serve one at a time

OnProgress = Callable[[int, int], None]  # done, total


class AppBackend:
    """A tokenizer, and a pipeline or none, that serve the page's visitors one at a time; uploads are read in child processes.

    Args:
        tokenizer: reconstructs videos.
        pipe: samples videos; without, `lengths`, `costs` and `sample` cannot be called.
        pace: how fast this machine was at each ratio.
        limits: limits for uploaded videos.
        precision: precision of sampling and reconstructing.
    """

    def __init__(self, tokenizer: Any, pipe: Any, pace: Pace, limits: UploadLimits, precision: Precision = "auto"):
        self.tokenizer, self.pipe, self.pace, self.limits = tokenizer, pipe, pace, limits
        self.precision: Precision = precision
        self.lock = threading.Lock()
        self.reader = IsolatedReader(DECODER_MEMORY, total=DECODER_SECONDS, processes=DECODERS)

    @property
    def lengths(self) -> list[int]:
        """Frame counts that every trained ratio allows, up to the trained one."""
        step, longest = max(trained_ratios(self.pipe)) * self.pipe.vae.latent_step, self.pipe.config["num_frames"]
        return [*range(1 + step, longest, step), longest]

    def costs(self, ratio: int, frames: int, steps: float, guidance: float) -> str:
        """Return the table of the costs at every ratio with these settings; the row of `ratio` is marked."""
        rows, sources = [], set()
        for trained in trained_ratios(self.pipe):
            cost = sampling_cost(self.pipe, trained, frames, int(steps), guidance)
            seconds, source = self.pace.expect(cost) or (None, None)
            rows.append({"cost": cost, "flops": _flops(cost.flops), "expected": f"{seconds.total:.1f} s" if seconds else "–"})
            sources |= {source} - {None}
        return _part("costs", rows=rows, ratio=ratio, source=_join(sorted(sources)))

    def sample(
        self,
        prompt: str,
        negative: str,
        ratio: int,
        frames: int,
        steps: float,
        guidance: float,
        seed: float | None,
        on_progress: OnProgress,
    ) -> str:
        """Sample one video; `on_progress` is called after each step."""
        if max(len(prompt), len(negative)) > LONGEST_PROMPT:
            return _part(
                "message", text=f"a prompt of {max(len(prompt), len(negative))} characters: {LONGEST_PROMPT} are legal"
            )
        if seed is None or not 0 <= seed < 2**63:
            return _part("message", text=f"seed {seed}: 0 to 2^63 - 1 are legal")
        ended = None

        def in_time(done: int, total: int) -> None:
            nonlocal ended
            ended = ended or time.monotonic() + WORK  # from the first step: others may have been served before
            if time.monotonic() > ended:
                raise UserError(f"not sampled within {WORK:g} s, the limit of this page; choose fewer steps or frames")
            on_progress(done, total)

        order, options = SampleRequest(prompt, int(seed)), {"negative_prompt": negative, "num_frames": frames}
        options |= {"num_inference_steps": int(steps), "temporal_ratio": ratio, "guidance_scale": guidance}
        try:
            with self.lock:
                ((videos, seconds),) = make_videos(self.pipe, [order], 1, self.precision, in_time, **options)
        except (UserError, ValueError) as error:
            return _part("message", text=str(error))
        cost = sampling_cost(self.pipe, ratio, frames, int(steps), guidance)
        self.pace.learn(cost, seconds, "the last video")
        film = make_film(prompt, {prompt: videos[0]}, self.pipe.config["fps"], crf=CRF, tile=TILE)
        return _part("sample", film=film, prompt=prompt, seed=order.seed, cost=cost, seconds=str(seconds))

    def compare(self, path: str | None, side: int, on_progress: OnProgress) -> str:
        """Reconstruct an uploaded video at every ratio, its shorter side `side` pixels, in the player of the pages.

        `on_progress` is called with frames.
        """
        if path is None:
            return _part("message", text="no video was given: choose a file first")
        try:
            return self._compare(path, side, on_progress)
        except UnreadableVideo as error:
            return _part("message", text=f"{Path(path).name}: {unreadable(error)}")
        except UserError as error:
            return _part("message", text=str(error))

    def _compare(self, path: str, side: int, on_progress: OnProgress) -> str:
        ratios, name = self.tokenizer.temporal_ratios, Path(path).name
        facts = check_upload(path, self.limits, self.reader)
        size = fit_size(facts.height, facts.width, side, LONGEST * side, self.tokenizer.spatial_ratio)
        scale = min(enlargement(size[1], TILE), enlargement(size[0], LONGEST * TILE))
        fps, numbers = at_constant_rate(facts.timestamps, facts.fps, self.limits.frames / self.limits.seconds)
        count, chunk = len(numbers), chunk_of(*size, ratios, self.tokenizer.latent_step)
        pictures = self.reader.stream(stream_frames, path, numbers.tolist(), size)
        with self.lock, contextlib.closing(pictures), torch.no_grad():
            comparison = Comparison(
                self.tokenizer, ratios, pictures, count, chunk, scale, self.precision, lambda done: on_progress(done, count)
            )
            mp4 = encode_mp4(self._in_time(comparison, name), fps, CRF, KEY_EVERY)
        labels = [f"{ratio}×" for ratio in ratios]
        film = Film(("original", *labels), (count, *size), fps, scale, 1 + len(ratios), mp4)
        clip = {
            "name": name,
            "caption": f"{facts.frames} frame{'s' * (facts.frames > 1)} of {facts.width}x{facts.height} at {facts.fps:.3g} a "
            f"second, processed at {size[1]}x{size[0]}{''.join(f', {note}' for note in facts.notes)}",
            "fps": fps,
            "frames": count,
            "psnr": {f"{ratio}×": comparison.psnr(ratio) for ratio in ratios},
            "per_frame": {f"{ratio}×": [round(x, 2) for x in comparison.frame_psnr[ratio]] for ratio in ratios},
        }
        speeds = [f"{count / comparison.seconds[ratio]:.1f} frames/s" for ratio in ratios]
        tiles = [("original", "", "", ""), *((labels[i], speeds[i], colour(i), "") for i in range(len(ratios)))]
        return _part(
            "comparison", player={"clips": [clip], "layout": film.layout, "every": max(ratios)}, tiles=tiles, film=film
        )

    def _in_time(self, chunks: Iterable[np.ndarray], name: str) -> Iterator[np.ndarray]:
        """Yield the chunks; raises UserError after WORK seconds."""
        ended = time.monotonic() + WORK
        for chunk in chunks:
            yield chunk
            if time.monotonic() > ended:
                advice = "choose a smaller side, or give a shorter video"
                raise UserError(f"{name}: not compared within {WORK:g} s, the limit of this page; {advice}")


def import_gradio() -> Any:
    """Import Gradio without its analytics and its downloads; raises UserError where it cannot be imported."""
    # Gradio reads this when it is imported; without it, it asks its makers for news and a hub for models.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio as gr
        from gradio import processing_utils
    except ImportError as error:
        raise UserError(f"the page needs gradio, which cannot be imported: {error}; run pip install 'promag[app]'") from None

    async def refuse(url: str, cache_dir: str) -> str:
        raise gr.Error(f"{url:.100}: this page takes uploaded files, no addresses")

    # A request may name an address where the page's own name an upload; Gradio would load it whole, whatever its size.
    processing_utils.async_ssrf_protected_download = refuse
    return gr


def build_app(backend: AppBackend) -> tuple[Any, dict[str, Any]]:
    """Return Gradio's blocks and their launch options: no analytics, nothing loaded from elsewhere, nothing shared.

    Raises UserError where Gradio cannot be imported.
    """
    gr = import_gradio()
    with gr.Blocks(title="ProMAG", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as blocks:
        gr.Markdown("# ProMAG\nOne video tokenizer, three token budgets, and text-to-video in its latent space.")
        with gr.Tabs(selected="text" if backend.pipe is not None else "video"):
            with gr.Tab("Text to video", id="text"):
                _text_tab(gr, backend) if backend.pipe is not None else gr.HTML(_part("no_pipeline"))
            with gr.Tab("Reconstruct a video", id="video"):
                _video_tab(gr, backend)
    blocks.queue(max_size=QUEUE)
    fonts: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    options = {
        "theme": gr.themes.Base(primary_hue="blue", neutral_hue="stone", **fonts),
        "head": f"<style>{asset('page.css')}</style><script>{asset('page.js')}</script>",
        "max_file_size": int(backend.limits.megabytes * MEGABYTE),
        "footer_links": [],
        "share": False,
        "ssr_mode": False,
        "prevent_thread_lock": True,
        "quiet": True,
    }
    return blocks, options


def _text_tab(gr: Any, backend: AppBackend) -> None:
    ratios, trained = trained_ratios(backend.pipe), backend.pipe.config
    with gr.Row():
        with gr.Column():
            prompt = gr.Textbox("", label="Prompt", placeholder="a red disc moves left", lines=2, elem_id="prompt")
            ratio = gr.Radio([(f"{r}×", r) for r in ratios], value=trained["temporal_ratio"], label="Budget", elem_id="budget")
            costs = gr.HTML(elem_id="costs")
            frames = gr.Dropdown(backend.lengths, value=trained["num_frames"], label="Frames")
            with gr.Accordion("More", open=False):
                negative = gr.Textbox("", label="Negative prompt")
                steps = gr.Slider(1, 100, value=trained["num_inference_steps"], step=1, label="Denoising steps")
                guidance = gr.Slider(1, 15, value=trained["guidance_scale"], step=0.5, label="Guidance; 1 turns it off")
                seed = gr.Number(0, label="Seed: the same one gives the same video", precision=0)
            button = gr.Button("Make the video", variant="primary", elem_id="make")
        with gr.Column():
            result = gr.HTML(_part("waiting", text="The video will be here."), elem_id="video")

    def make(*values: Any, progress: Any = gr.Progress()) -> str:  # noqa: B008 (Gradio's way to show progress)
        return backend.sample(*values, on_progress=lambda done, total: progress((done, total), unit="steps"))

    settings = [ratio, frames, steps, guidance]
    gr.on([part.change for part in settings], backend.costs, settings, costs, show_progress="hidden")
    inputs = [prompt, negative, ratio, frames, steps, guidance, seed]
    sampled = gr.on([button.click, prompt.submit], make, inputs, result, concurrency_limit=1, concurrency_id="model")
    sampled.then(backend.costs, settings, costs, show_progress="hidden")
    costs.value = backend.costs(ratio.value, frames.value, steps.value, guidance.value)


def _video_tab(gr: Any, backend: AppBackend) -> None:
    with gr.Row():
        file = gr.File(label="Video", file_types=list(KINDS), height=140, elem_id="file", scale=3)
        with gr.Column(scale=2):
            side = gr.Radio([(f"{s} pixels", s) for s in SIDES], value=SIDES[0], label="Shorter side", elem_id="side")
            button = gr.Button("Compare", variant="primary", elem_id="compare")
    gr.HTML(_part("note", text=f"Accepted: videos of any kind, {backend.limits}."))
    columns = " | ".join(("original", *(f"{r}×" for r in backend.tokenizer.temporal_ratios)))
    result = gr.HTML(_part("waiting", text=f"{columns}, in step, with the PSNR of every frame"), elem_id="comparison")

    def compare(path: str | None, side: int, progress: Any = gr.Progress()) -> str:  # noqa: B008
        return backend.compare(path, side, on_progress=lambda done, total: progress((done, total), unit="frames"))

    # Files are examined side by side; the backend's lock leaves the models to one visitor at a time.
    button.click(compare, [file, side], result, concurrency_limit=QUEUE)


def _part(part: str, **values: Any) -> str:
    return render_part("app.html", part, **values)


def _flops(flops: float) -> str:
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if flops >= size:
            return f"{flops / size:.3g} {unit}FLOPs"
    return f"{flops / 1e6:.3g} MFLOPs"


def _join(words: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))
