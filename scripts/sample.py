"""Sample videos from a trained pipeline.

Every prompt is sampled at every seed, from text alone or from a first image or clip too.

A video depends on its prompt and its seed alone: other prompts, seeds and --batch-size change nothing but rounding.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from promag.data.tables import read_lines
from promag.data.video import (
    IMAGE_EXTENSIONS,
    READER,
    decode_strictly,
    is_image,
    pick_by_time,
    read_frames,
    write_video,
)
from promag.diffusion.attention import choose_attention
from promag.evaluation.clip_similarity import load_similarity
from promag.pipelines.inputs import steps_and_guidance
from promag.pipelines.sampling import Draft, SampleRequest, Seconds, execution_device, make_videos, open_pipeline
from promag.reports.contact_sheet import write_contact_sheet
from promag.reports.side_by_side import grid
from promag.scripts._options import check_at_least_one, check_different, check_writable, share
from promag.scripts._parts import TINY_DECODER, TOKENIZER, enable_tiny_decoder, load_lora
from promag.training.command_line import Parser, run_main
from promag.training.config import UserError
from promag.training.files import write_atomically
from promag.training.gif import MOST_FPS, encode_gif
from promag.training.progress import ProgressBar

MP4, GIF = ".mp4", ".gif"
CRF = 18
SHEET_WIDTH = 96  # pixels of a frame on the contact sheet, which narrower videos are enlarged to


def main(argv: Sequence[str]) -> int:
    """Sample, write each video as soon as it is made, and say where all lies and what took how long."""
    arguments = _parse(argv)
    prompts = _prompts(arguments)
    _check_numbers(arguments)
    _check_files(arguments, len(prompts) * len(arguments.seed))
    clip = load_similarity(arguments.clip, arguments.clip_weights)
    pipe: Any = open_pipeline(arguments.checkpoint, arguments.tokenizer, arguments.offload)
    if arguments.lora is not None:
        load_lora(pipe, arguments.lora)
    if arguments.tiny_decoder is not None:
        enable_tiny_decoder(pipe, arguments.tiny_decoder)
    device = execution_device(pipe)
    choose_attention(pipe.transformer, arguments.attention, device, pipe.transformer.dtype, gradients=False)
    fps = arguments.fps or pipe.config["fps"]
    if fps > MOST_FPS and GIF in _kinds(arguments):
        raise UserError(f"{fps:g} fps: a GIF has at most {MOST_FPS}; write an {MP4}")

    requests = [SampleRequest(prompt, seed) for prompt in prompts for seed in arguments.seed]
    shown: list[np.ndarray] = []  # pictures for the overviews
    similarities: list[float] = []
    spent, done, shape = Seconds(), 0, (0, 0, 0, 0)
    try:
        for batch, seconds in _sampled(arguments, pipe, requests, fps):
            spent += seconds
            for video in batch:
                order, place = requests[done], _numbered(arguments.out, done, len(requests))
                done, shape = done + 1, video.shape
                if arguments.grid or arguments.contact_sheet:
                    shown.append(video)
                summary = write(place, video, fps, arguments.crf)
                if clip:
                    similarities.append(clip(video, order.prompt))
                    summary += f", CLIP similarity {similarities[-1]:.4f}"
                print(f"{place}: {order.prompt!r}, seed {order.seed}, {summary}", flush=True)
    except ValueError as error:
        raise UserError(str(error)) from None
    videos = _count(done, shape)
    _write_overviews(arguments, prompts, shown, videos, fps)
    ratio = arguments.ratio or pipe.config["temporal_ratio"]
    drafted = f", drafted at {arguments.draft_ratio}x" if arguments.draft_ratio else ""
    steps, guidance = steps_and_guidance(pipe.config, arguments.steps, arguments.guidance)
    guided = f"with guidance {guidance:g}" if guidance > 1 else "without guidance"
    print(f"{videos} at {ratio}x{drafted}, {steps} steps {guided} on {device}: {spent}")
    if similarities:
        print(f"mean CLIP similarity {np.mean(similarities):.4f} by {arguments.clip}")
    else:
        print("not measured for want of weights: CLIP similarity (--clip)")
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("checkpoint", help="folder of a pipeline")
    add("--prompt", action="append", default=[], help="text; give it again for more videos")
    add("--prompt-file", type=Path, help="text file with a prompt a line, after those of --prompt; empty lines do not count")
    add("--negative-prompt", default="", help="text that guidance moves away from")
    add("--seed", type=int, nargs="+", default=[0], help="seeds of the noise; every prompt is sampled at each")
    add("--out", type=Path, required=True, help="mp4 or GIF file; several videos are numbered")
    add("--grid", type=Path, help="mp4 or GIF file with all videos in step: with several seeds, a row for each prompt")
    share(parser, "--contact-sheet")
    add("--crf", type=int, help=f"quality of an mp4, 1 (best) to 51; left out: {CRF}")
    add("--frames", type=int, help="frames; left out: what it was trained on")
    add("--height", type=int, help="pixels; left out: what it was trained on")
    add("--width", type=int, help="pixels; left out: what it was trained on")
    add("--ratio", type=int, help="temporal ratio; left out: the first it was trained at")
    add("--draft-ratio", type=int, help="sample at this higher ratio first and refine the result at --ratio")
    add("--draft-steps", type=int, help="denoising steps of the draft; left out: --steps")
    add("--denoise-strength", type=float, help="share of --steps that refine a draft, 0 to below 1; left out: 0.5")
    share(parser, "--steps", "--guidance", "--batch-size", "--precision")
    add("--overlap", action="store_true", help="on a GPU: decode each batch while the next is denoised; takes memory for both")
    add("--fps", type=float, help="frame rate of the video, an input of the model; left out: as trained")
    add("--tiny-decoder", **TINY_DECODER)
    share(parser, "--lora")
    add("--tokenizer", **TOKENIZER)
    add("--offload", action="store_true", help="hold on the GPU only the model that computes, the others in main memory")
    add("--attention", default="auto", help="attention backend of diffusers, tried before it is used")
    opening = parser.add_mutually_exclusive_group()
    opening.add_argument("--image", type=Path, help="picture to start from; scaled and cropped to the video's size")
    opening.add_argument("--video", type=Path, help="clip to continue from its last frames; scaled and cropped likewise")
    share(parser, "--clip", "--clip-weights")
    return parser.parse_args(argv)


def _prompts(arguments: argparse.Namespace) -> list[str]:
    prompts = list(arguments.prompt)
    if arguments.prompt_file:
        try:
            prompts += filter(None, read_lines(arguments.prompt_file))
        except UserError as error:
            raise UserError(f"--prompt-file {error}") from None
    if not prompts:
        raise UserError("no prompts: give --prompt TEXT, or --prompt-file with a prompt a line")
    return prompts


def _kinds(arguments: argparse.Namespace) -> list[str]:
    """Return the endings of the films to write, in small letters."""
    return [path.suffix.lower() for path in (arguments.out, arguments.grid) if path]


def _check_files(arguments: argparse.Namespace, count: int) -> None:
    """Refuse what could not be written, and what would overwrite an input, before anything is computed."""
    others: list[Path | None] = [arguments.image, arguments.video, arguments.prompt_file]
    for name, kinds in (("out", (MP4, GIF)), ("grid", (MP4, GIF)), ("contact_sheet", (".png",))):
        path, option = getattr(arguments, name), f"--{name.replace('_', '-')}"
        if path is None:
            continue
        if path.suffix.lower() not in kinds:
            raise UserError(f"{option} {path}: a file that ends in {' or '.join(kinds)} is needed")
        paths = [_numbered(path, number, count) for number in range(count)] if name == "out" else [path]
        for place in paths:
            check_writable(option, place, others)
        others += paths
    if arguments.crf is not None and MP4 not in _kinds(arguments):
        raise UserError(f"--crf {arguments.crf}: a GIF has no such quality; leave it out")


def _check_numbers(arguments: argparse.Namespace) -> None:
    check_at_least_one(arguments, "frames", "height", "width", "steps", "draft_steps", "batch_size")
    if (fps := arguments.fps) is not None and not fps > 0:
        raise UserError(f"--fps {fps:g}: must be above 0")
    if arguments.crf is not None and not 1 <= arguments.crf <= 51:
        raise UserError(f"--crf {arguments.crf}: 1 (best) to 51 are legal")
    for seed in arguments.seed:
        if not 0 <= seed < 2**63:
            raise UserError(f"--seed {seed}: 0 to 2^63 - 1 are legal")
    check_different("--seed", arguments.seed)


def _sampled(
    arguments: argparse.Namespace, pipe: Any, requests: Sequence[SampleRequest], fps: float
) -> Iterator[tuple[list[np.ndarray], Seconds]]:
    """Make the videos, with a progress bar over the steps of all."""
    pipe.set_progress_bar_config(disable=True)
    with ProgressBar(desc=f"denoising {len(requests)}", unit="step") as bar:

        def on_progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        options = {"on_progress": on_progress, "draft": _draft(arguments, pipe), "overlap": arguments.overlap}
        options |= _call(arguments, pipe, fps)
        yield from make_videos(pipe, requests, arguments.batch_size, arguments.precision, **options)


def _draft(arguments: argparse.Namespace, pipe: Any) -> Draft | None:
    steps, strength = arguments.draft_steps, arguments.denoise_strength
    if arguments.draft_ratio is None:
        for option, value in (("--draft-steps", steps), ("--denoise-strength", strength)):
            if value is not None:
                raise UserError(f"{option} {value:g}: name the ratio of the draft, --draft-ratio")
        return None
    steps = steps or arguments.steps or pipe.config["num_inference_steps"]
    return Draft(arguments.draft_ratio, steps, 0.5 if strength is None else strength)


def _call(arguments: argparse.Namespace, pipe: Any, fps: float) -> dict[str, Any]:
    """Return the pipeline's arguments, beside prompts and noise."""
    size = (arguments.width or pipe.config["width"], arguments.height or pipe.config["height"])
    given: dict[str, Any] = {}
    if arguments.image:
        given = {"image": open_image(arguments.image, size)}
    elif arguments.video:
        given = {"video": last_pictures(arguments.video, size, fps, arguments.frames or pipe.config["num_frames"])}
    return {
        "negative_prompt": arguments.negative_prompt,
        "num_frames": arguments.frames,
        "height": arguments.height,
        "width": arguments.width,
        "temporal_ratio": arguments.ratio,
        "num_inference_steps": arguments.steps,
        "guidance_scale": arguments.guidance,
        "fps": arguments.fps,
        **given,
    }


def open_image(path: Path, size: tuple[int, int]) -> Image.Image:
    """Read a picture as training does, scaled to cover (width, height) and cropped in the centre."""
    if not is_image(path):
        raise UserError(f"--image {path}: a picture is needed ({' '.join(IMAGE_EXTENSIONS)}); --video takes clips")
    return ImageOps.fit(Image.fromarray(read_frames(path, [0])[0]), size)


def last_pictures(path: Path, size: tuple[int, int], fps: float, most: int) -> list[Image.Image]:
    """Read a clip's last frames, `fps` of them a second and at most `most`, each as `open_image` does."""
    facts = READER.call(decode_strictly, path)
    times = np.arange(facts.timestamps[-1], -1e-6, -1 / fps)[:most][::-1]
    frames = READER.call(read_frames, path, pick_by_time(facts.timestamps, times))
    return [ImageOps.fit(Image.fromarray(frame), size) for frame in frames]


def _numbered(path: Path, number: int, count: int) -> Path:
    return path if count == 1 else path.with_stem(f"{path.stem}-{number:0{max(2, len(str(count - 1)))}d}")


def _write_overviews(
    arguments: argparse.Namespace, prompts: Sequence[str], videos: Sequence[np.ndarray], count: str, fps: float
) -> None:
    """Write the grid and the contact sheet where they are asked for."""
    seeds = arguments.seed
    if arguments.grid:
        columns = len(seeds) if len(seeds) > 1 else math.ceil(math.sqrt(len(prompts)))
        summary = write(arguments.grid, grid(videos, columns), fps, arguments.crf)
        print(f"{arguments.grid}: {count}, {columns} in a row, {summary}")
    if arguments.contact_sheet:
        rows = [videos[i : i + len(seeds)] for i in range(0, len(videos), len(seeds))]
        clips = [
            (prompt, {f"seed {seed}": video for seed, video in zip(seeds, row, strict=True)})
            for prompt, row in zip(prompts, rows, strict=True)
        ]
        scale = max(1, SHEET_WIDTH // videos[0].shape[2])
        print(f"{write_contact_sheet(arguments.contact_sheet, clips, scale=scale)}: frames of {count}")


def _count(videos: int, shape: tuple[int, ...]) -> str:
    frames, height, width, _ = shape
    return f"{videos} video{'s' if videos > 1 else ''} of {frames} frames of {width}x{height}"


def write(path: Path, video: np.ndarray, fps: float, crf: int | None) -> str:
    """Write an mp4 or a GIF, by the ending of `path`, and return in words what was written."""
    length = f"{len(video)} frames at {fps:g} fps"
    if path.suffix.lower() == MP4:
        write_video(path, video, fps, CRF if crf is None else crf)
        return f"{length}, crf {CRF if crf is None else crf}"
    write_atomically(path, encode_gif(video, fps))
    return f"{length}, 256 colours a frame"


if __name__ == "__main__":
    raise SystemExit(run_main(main))
