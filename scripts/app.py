"""Serve a web page for trying a tokenizer and a text-to-video pipeline.

It samples videos at a token budget and shows what each budget keeps of a video.

It is served on this machine alone unless --host says otherwise, and loads nothing from elsewhere.
"""

import argparse
import os
import socket
from collections.abc import Sequence
from typing import Any

from promag.evaluation.sampling_cost import Pace, measure_pace
from promag.pipelines.sampling import load_pipeline
from promag.reports.uploads import UploadLimits
from promag.reports.web_app import AppBackend, build_app, import_gradio
from promag.scripts._options import share
from promag.scripts._parts import TINY_DECODER, enable_tiny_decoder
from promag.tokenizer.checkpoint import load_tokenizer
from promag.training.command_line import Parser, run_main
from promag.training.config import UserError, one_line
from promag.training.device import best_device
from promag.training.precision import choose_precision


def main(argv: Sequence[str]) -> int:
    """Load the models, serve the page and say where until the process is told to end."""
    arguments = _parse(argv)
    limits = UploadLimits(arguments.max_megabytes, arguments.max_seconds, arguments.max_frames)
    if not (arguments.pipeline or arguments.tokenizer):
        raise UserError("nothing to show: give --tokenizer FOLDER, --pipeline FOLDER or both")
    if arguments.tiny_decoder is not None and not arguments.pipeline:
        raise UserError("--tiny-decoder: decodes sampled videos; give --pipeline FOLDER, or leave it out")
    import_gradio()  # what is missing shows before models are loaded and timed, which takes minutes
    _check_port(arguments.host, arguments.port)
    pipe: Any = load_pipeline(arguments.pipeline) if arguments.pipeline else None
    if arguments.tiny_decoder is not None:
        enable_tiny_decoder(pipe, arguments.tiny_decoder)
    tokenizer: Any = load_tokenizer(arguments.tokenizer) if arguments.tokenizer else getattr(pipe, "vae", None)
    tokenizer.to(best_device()).eval()
    precision, pace = choose_precision(arguments.precision, best_device()), Pace()
    if pipe is not None:
        pipe.set_progress_bar_config(disable=True)
        print("measuring what a video takes on this machine", flush=True)
        pace = measure_pace(pipe, precision, print)
    blocks, options = build_app(AppBackend(tokenizer, pipe, pace, limits, precision))
    try:
        _, address, _ = blocks.launch(server_name=arguments.host, server_port=arguments.port, **options)
    except OSError as error:
        raise _cannot_be_served(arguments.host, arguments.port, error) from None
    print(f"the page is at {address}", flush=True)
    blocks.block_thread()
    return 0


def _check_port(host: str, port: int) -> None:
    """Raise UserError where no server can listen at an address."""
    if not 0 <= port < 2**16:
        raise UserError(f"--port {port}: 0 to {2**16 - 1} are legal")
    try:
        kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(kind, socket.SOCK_STREAM) as probe:
            if os.name != "nt":  # a port that a server left a moment ago is free
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise _cannot_be_served(host, port, error) from None


def _cannot_be_served(host: str, port: int, error: Exception) -> UserError:
    return UserError(
        f"--host {host}, --port {port}: cannot be served there: {one_line(error)}; choose another --port or --host"
    )


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    limits = UploadLimits()
    parser = Parser(__doc__)
    parser.add_argument("--tokenizer", help="folder of a tokenizer; left out: the pipeline's own")
    parser.add_argument("--pipeline", help="folder that `promag train-diffusion` wrote; left out: no text to video")
    parser.add_argument("--tiny-decoder", **TINY_DECODER)
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at; 0.0.0.0 is every one of this machine")
    parser.add_argument("--port", type=int, default=7860, help="port to serve at")
    share(parser, "--precision")
    parser.add_argument("--max-megabytes", type=float, default=limits.megabytes, help="size limit of an upload")
    parser.add_argument("--max-seconds", type=float, default=limits.seconds, help="length limit of an upload")
    parser.add_argument("--max-frames", type=int, default=limits.frames, help="frame limit of an upload")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(run_main(main))
