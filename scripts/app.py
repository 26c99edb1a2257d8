"""Serve a web page for trying a tokenizer and a text-to-video pipeline.

It samples videos at a token budget and shows what each budget keeps of a video.

It is served on this machine alone unless --host says otherwise, and asks nothing of any other.
"""
# ruff: noqa: RUF001 (the page is set with ×)

import argparse
import os
from collections.abc import Sequence
from typing import Any

from promag.evaluation.sampling_cost import Pace, measure_pace
from promag.pipelines.sampling import load_pipeline, trained_ratios
from promag.reports import app_html as page
from promag.reports.app_backend import Studio
from promag.reports.uploads import KINDS, MEGABYTE, UploadLimits
from promag.tokenizer.checkpoint import load_tokenizer
from promag.training.config import UserError, run_main
from promag.training.device import best_device
from promag.training.precision import HELP, PRECISIONS, choose_precision

SIDES = (64, 128, 256)  # pixels of the shorter side of what is reconstructed
KEPT = 3600  # seconds that uploaded files stay on the disk
QUEUE = 16  # visitors that wait; one is computed for at a time


def main(argv: Sequence[str]) -> int:
    """Load the models, serve the page and say where until the process is told to end."""
    arguments = _parse(argv)
    limits = UploadLimits(arguments.max_megabytes, arguments.max_seconds, arguments.max_frames)
    if not (arguments.pipeline or arguments.tokenizer):
        raise UserError("nothing to show: give --tokenizer FOLDER, --pipeline FOLDER or both")
    pipe: Any = load_pipeline(arguments.pipeline) if arguments.pipeline else None
    tokenizer: Any = load_tokenizer(arguments.tokenizer) if arguments.tokenizer else getattr(pipe, "vae", None)
    tokenizer.to(best_device()).eval()
    precision, pace = choose_precision(arguments.precision, best_device()), Pace()
    if pipe is not None:
        pipe.set_progress_bar_config(disable=True)
        print("measuring what a video takes on this machine", flush=True)
        pace = measure_pace(pipe, precision, print)
    blocks, launch = build_page(Studio(tokenizer, pipe, pace, limits, precision))
    try:
        _, address, _ = blocks.launch(server_name=arguments.host, server_port=arguments.port, **launch)
    except OSError as error:
        raise UserError(
            f"--host {arguments.host}, --port {arguments.port}: cannot be served there: {' '.join(str(error).split())}"
        ) from None
    print(f"the page is at {address}", flush=True)
    blocks.block_thread()
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    limits = UploadLimits()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--tokenizer", help="folder of a tokenizer; left out: the pipeline's own")
    parser.add_argument("--pipeline", help="folder that `promag train-diffusion` wrote; left out: no text to video")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at; 0.0.0.0 is every one of this machine")
    parser.add_argument("--port", type=int, default=7860, help="port to serve at")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help=HELP)
    parser.add_argument("--max-megabytes", type=float, default=limits.megabytes, help="of an uploaded video")
    parser.add_argument("--max-seconds", type=float, default=limits.seconds, help="of an uploaded video")
    parser.add_argument("--max-frames", type=int, default=limits.frames, help="of an uploaded video")
    return parser.parse_args(argv)


def build_page(studio: Studio) -> tuple[Any, dict[str, Any]]:
    """Return gradio's blocks, and how to launch them: no analytics, no fonts or scripts from elsewhere, nothing shared."""
    # Read when gradio is imported: else it asks its makers for news, and a hub for models.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio as gr
    except ImportError as error:
        raise UserError(f"the page needs gradio, which cannot be imported: {error}; extra app") from None

    with gr.Blocks(title="ProMAG", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as blocks:
        gr.Markdown("# ProMAG\nOne video tokenizer, three token budgets, and text-to-video in its latent space.")
        with gr.Tabs(selected="text" if studio.pipe is not None else "video"):
            with gr.Tab("Text to video", id="text"):
                _text_tab(gr, studio) if studio.pipe is not None else gr.HTML(page.NO_PIPELINE)
            with gr.Tab("Reconstruct a video", id="video"):
                _video_tab(gr, studio)
    blocks.queue(max_size=QUEUE)
    fonts: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    launch = {
        "theme": gr.themes.Base(primary_hue="blue", neutral_hue="stone", **fonts),
        "css": page.STYLE,
        "head": f"<script>{page.SCRIPT}</script>",
        "max_file_size": int(studio.limits.megabytes * MEGABYTE),
        "footer_links": [],
        "share": False,
        "ssr_mode": False,
        "prevent_thread_lock": True,
        "quiet": True,
    }
    return blocks, launch


def _text_tab(gr: Any, studio: Studio) -> None:
    ratios, trained = trained_ratios(studio.pipe), studio.pipe.config
    with gr.Row():
        with gr.Column():
            prompt = gr.Textbox("", label="Prompt", placeholder="a red disc moves left", lines=2, elem_id="prompt")
            ratio = gr.Radio([(f"{r}×", r) for r in ratios], value=trained["temporal_ratio"], label="Budget", elem_id="budget")
            costs = gr.HTML(elem_id="costs")
            frames = gr.Dropdown(studio.lengths, value=trained["num_frames"], label="Frames")
            with gr.Accordion("More", open=False):
                negative = gr.Textbox("", label="Negative prompt")
                steps = gr.Slider(1, 100, value=30, step=1, label="Denoising steps")
                guidance = gr.Slider(1, 15, value=4, step=0.5, label="Guidance; 1 turns it off")
                seed = gr.Number(0, label="Seed: the same one is the same video", precision=0)
            button = gr.Button("Make the video", variant="primary", elem_id="make")
        with gr.Column():
            result = gr.HTML(page.waiting("The video will be here."), elem_id="video")

    def make(*values: Any, progress: Any = gr.Progress()) -> str:  # noqa: B008 (how gradio is told to show progress)
        return studio.sample(*values, told=lambda done, total: progress((done, total), unit="steps"))

    settings = [ratio, frames, steps, guidance]
    gr.on([part.change for part in settings], studio.costs, settings, costs, show_progress="hidden")
    inputs = [prompt, negative, ratio, frames, steps, guidance, seed]
    made = gr.on([button.click, prompt.submit], make, inputs, result, concurrency_limit=1, concurrency_id="model")
    made.then(studio.costs, settings, costs, show_progress="hidden")
    costs.value = studio.costs(trained["temporal_ratio"], trained["num_frames"], 30, 4.0)


def _video_tab(gr: Any, studio: Studio) -> None:
    with gr.Row():
        file = gr.File(label="Video", file_types=list(KINDS), height=140, elem_id="file", scale=3)
        with gr.Column(scale=2):
            side = gr.Radio([(f"{s} pixels", s) for s in SIDES], value=SIDES[0], label="Shorter side", elem_id="side")
            button = gr.Button("Compare", variant="primary", elem_id="compare")
    gr.HTML(f'<p class="promag small">Taken are {studio.limits}.</p>')
    columns = " | ".join(("original", *(f"{r}×" for r in studio.tokenizer.temporal_ratios)))
    result = gr.HTML(page.waiting(f"{columns}, in step, with the PSNR of every frame"), elem_id="comparison")

    def compare(path: str | None, side: int, progress: Any = gr.Progress()) -> str:  # noqa: B008
        return studio.compare(path, side, told=lambda done, total: progress((done, total), unit="frames"))

    button.click(compare, [file, side], result, concurrency_limit=1, concurrency_id="model")


if __name__ == "__main__":
    raise SystemExit(run_main(main))
