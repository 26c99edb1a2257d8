"""Sample videos from a trained pipeline, from text alone or from a first image or clip too: one mp4 per prompt."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from promag.diffusion.attention import choose_attention
from promag.training.config import UserError, run_main
from promag.training.video import frame_times, pick_by_time, read_frames, write_video


def main(argv: Sequence[str]) -> int:
    """Sample each prompt and print where its video lies and how long it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("pipeline", help="folder that train_diffusion.py wrote")
    parser.add_argument("--prompt", action="append", required=True, help="text; give it again for more videos")
    parser.add_argument("--out", type=Path, required=True, help="mp4 file; with several prompts they are numbered")
    parser.add_argument("--num-frames", type=int, help="frames; left out: what it was trained on")
    parser.add_argument("--height", type=int, help="pixels; left out: what it was trained on")
    parser.add_argument("--width", type=int, help="pixels; left out: what it was trained on")
    parser.add_argument("--temporal-ratio", type=int, help="token budget; left out: what it was trained at")
    parser.add_argument("--steps", type=int, default=30, help="denoising steps")
    parser.add_argument("--guidance", type=float, default=4.0, help="classifier-free guidance; 1 turns it off")
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt's noise; the next prompts count on")
    parser.add_argument("--fps", type=float, help="frame rate told to the model and written; left out: as trained")
    parser.add_argument("--attention", default="auto", help="attention backend of diffusers, tried before it is used")
    opening = parser.add_mutually_exclusive_group()
    opening.add_argument("--image", type=Path, help="picture to start from; scaled and cropped to the video's size")
    opening.add_argument("--video", type=Path, help="clip to continue from its last frames; scaled and cropped likewise")
    arguments = parser.parse_args(argv)

    from promag import ProMAGPipeline

    if not (Path(arguments.pipeline) / "model_index.json").exists():
        raise UserError(f"pipeline {arguments.pipeline}: no model_index.json there; give a folder of train_diffusion.py")
    if arguments.out.suffix != ".mp4":
        raise UserError(f"--out {arguments.out}: an .mp4 file is needed")
    pipe: Any = ProMAGPipeline.from_pretrained(arguments.pipeline)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    choose_attention(pipe.transformer, arguments.attention, pipe.device, pipe.transformer.dtype, gradients=False)
    size = (arguments.width or pipe.config["width"], arguments.height or pipe.config["height"])
    fps = arguments.fps or pipe.config["fps"]
    given: dict[str, Any] = {}
    if arguments.image:
        given = {"image": open_image(arguments.image, size)}
    elif arguments.video:
        given = {"video": last_pictures(arguments.video, size, fps, arguments.num_frames or pipe.config["num_frames"])}
    for i, prompt in enumerate(arguments.prompt):
        started = time.perf_counter()
        try:
            frames = pipe(
                prompt,
                num_frames=arguments.num_frames,
                height=arguments.height,
                width=arguments.width,
                temporal_ratio=arguments.temporal_ratio,
                num_inference_steps=arguments.steps,
                guidance_scale=arguments.guidance,
                fps=arguments.fps,
                generator=torch.Generator().manual_seed(arguments.seed + i),
                **given,
            ).frames[0]
        except ValueError as error:
            raise UserError(str(error)) from None
        out = arguments.out if len(arguments.prompt) == 1 else arguments.out.with_stem(f"{arguments.out.stem}-{i:02d}")
        write_video(out, (frames * 255).round().astype("uint8"), fps)
        print(f"{out}: {prompt!r}, {len(frames)} frames in {time.perf_counter() - started:.1f} s")
    return 0


def open_image(path: Path, size: tuple[int, int]) -> Image.Image:
    """Read a picture, scaled to cover (width, height) and cropped in the centre."""
    try:
        with Image.open(path) as picture:
            return ImageOps.fit(ImageOps.exif_transpose(picture).convert("RGB"), size)
    except OSError as error:
        raise UserError(f"--image {path}: cannot be read: {error}") from None


def last_pictures(path: Path, size: tuple[int, int], fps: float, most: int) -> list[Image.Image]:
    """Read a clip's last frames, `fps` of them a second and at most `most`, each as `open_image` does."""
    stamps = frame_times(path)
    times = np.arange(stamps[-1], -1e-6, -1 / fps)[:most][::-1]
    frames = read_frames(path, pick_by_time(stamps, times))
    return [ImageOps.fit(Image.fromarray(frame), size) for frame in frames]


if __name__ == "__main__":
    raise SystemExit(run_main(main))
