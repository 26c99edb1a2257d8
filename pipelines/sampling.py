"""Sampling videos for prompts and seeds, independently of the batch size, and timing the parts of each call.

Videos are uint8 (T, H, W, 3).
"""

import dataclasses
import inspect
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from promag.diffusion.text import NULL_CAPTION, Embedded
from promag.tokenizer.geometry import check_integer, latent_frames
from promag.training.config import UserError
from promag.training.device import best_device
from promag.training.precision import PRECISIONS, Precision, autocast
from promag.training.progress import ProgressBar

from .background import Background
from .conditioning_frames import count_opening, read_conditioning_frames
from .inputs import (
    NAMES,
    NEGATIVE_NAMES,
    check_counts,
    check_prompts,
    steps_and_guidance,
    unpack,
    with_defaults,
)
from .stock import StockPipeline, is_stock, load_stock
from .text_to_video import ProMAGPipeline
from .timesteps import check_flow, count_model_calls

# What `make_videos` itself gives the pipeline: prompts, noise and the form of the videos.
SET_HERE = {*NAMES, *NEGATIVE_NAMES, "prompt", "generator", "num_videos_per_prompt", "output_type", "return_dict", "latents"}
SET_HERE |= {"denoise_strength", "callback_on_step_end", "callback_on_step_end_tensor_inputs"}
BATCH = 8  # videos sampled at once


@dataclass(frozen=True)
class SampleRequest:
    """One video to sample: its prompt, and the seed of its noise."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class Draft:
    """A draft at a higher temporal ratio, which is refined at the ratio of the video."""

    ratio: int  # higher than the video's
    steps: int  # denoising steps of the draft
    strength: float  # share of the video's steps that refine the draft, below 1; 0 decodes the draft at the video's ratio


@dataclass(frozen=True)
class Seconds:
    """Seconds of the parts of a pipeline call: encoding text (and first frames), denoising, decoding.

    Decoding that overlaps with the next denoising counts only while it is waited for: the parts add up to the time passed.
    """

    text: float = 0.0
    denoising: float = 0.0
    decoding: float = 0.0

    @property
    def total(self) -> float:
        """Sum of the parts."""
        return self.text + self.denoising + self.decoding

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __str__(self) -> str:
        parts = (f"{part} {seconds:.2f} s" for part, seconds in dataclasses.asdict(self).items())
        return f"{', '.join(parts)}, together {self.total:.2f} s"


def load_pipeline(folder: str | Path) -> ProMAGPipeline:
    """Load the pipeline in a folder, onto the GPU if there is one; raises UserError if it cannot be loaded."""
    _check_index_there(folder)
    if is_stock(folder):
        raise UserError(f"pipeline {folder}: a WanPipeline, which sample, evaluate-pipeline and compare-budgets take")
    return ProMAGPipeline.from_pretrained(folder).to(best_device())


def open_pipeline(
    folder: str | Path, tokenizer: str | Path | None = None, offload: bool = False
) -> ProMAGPipeline | StockPipeline:
    """Load our own or a stock WanPipeline from a folder.

    Args:
        folder: the pipeline's.
        tokenizer: folder of an autoencoder that takes the place of a WanPipeline's own; it must know the same latents.
        offload: hold on the GPU only the model that computes, and the others in main memory, instead of all on the GPU.

    Raises UserError if one of both cannot be loaded, and for `offload` without a GPU.
    """
    _check_index_there(folder)
    device = best_device()
    if offload and device.type == "cpu":
        raise UserError("offload: there is no GPU here to move models to; leave it out")
    if is_stock(folder):
        pipe: Any = load_stock(folder, tokenizer)
    elif tokenizer is None:
        pipe = ProMAGPipeline.from_pretrained(folder)
    else:
        raise UserError(f"tokenizer {tokenizer}: takes the place of a WanPipeline's own; {folder} is none; leave it out")
    if not offload:
        return pipe.to(device)
    getattr(pipe, "pipe", pipe).enable_model_cpu_offload(device=device)
    return pipe


def _check_index_there(folder: str | Path) -> None:
    if not (Path(folder) / "model_index.json").exists():
        raise UserError(f"pipeline {folder}: no model_index.json there; give a folder of `promag train-diffusion`")


def check_seeds(seeds: Sequence[Any]) -> None:
    """Raise ValueError for a seed that is no whole number from 0 to 2^63 - 1."""
    for seed in seeds:
        check_integer("seed", seed)
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed {seed!r:.100}: a whole number from 0 to 2^63 - 1 is needed")


def trained_ratios(pipe: Any) -> tuple[int, ...]:
    """Return the temporal ratios that a pipeline's transformer was trained at."""
    if isinstance(pipe, StockPipeline):
        return tuple(sorted(pipe.temporal_ratios))
    return tuple(sorted(map(int, pipe.transformer.config["latents_mean"] or {})))


def execution_device(pipe: Any) -> torch.device:
    """Return the device on which a pipeline computes; offloaded models lie elsewhere between their calls."""
    return getattr(pipe, "pipe", pipe)._execution_device


def make_videos(
    pipe: Any,
    requests: Sequence[SampleRequest],
    batch: int = 1,
    precision: Precision = "auto",
    on_progress: Callable[[int, int], None] | None = None,
    encode: Callable[[Sequence[str]], Embedded] | None = None,
    draft: Draft | None = None,
    overlap: bool = False,
    **arguments: Any,
) -> Iterator[tuple[list[np.ndarray], Seconds]]:
    """Sample the requested videos, `batch` at once, and yield the videos and the seconds of each batch.

    A video depends only on its request and on the pipeline's arguments; another batch size moves values by rounding.

    Args:
        pipe: the pipeline.
        requests: the videos.
        batch: videos sampled at once.
        precision: precision of the model calls.
        on_progress: called after each denoising step with the steps done and the steps in total, over all batches.
        encode: encodes prompts, and the null caption, in place of the pipeline.
        draft: samples each video at a higher ratio first and refines it at the video's ratio. Its latents are lifted there
            without pixels, or decoded and encoded again where a tokenizer's latents do not lift. The refined video opens with
            the first of the frames of `video` that the draft opens with.
        overlap: decode each batch while the next one is denoised, which takes memory for both at once.
        arguments: further arguments of the pipeline.

    Raises ValueError as the pipeline does, for arguments that are set here, for illegal seeds, for a draft at a ratio that is
    not higher or refined with all steps, and for overlap with a draft or a pipeline that moves its models between devices.
    """
    ratio, calls = _check(pipe, requests, batch, precision, draft, overlap, arguments)
    batches, device = range(0, len(requests), batch), execution_device(pipe)

    def decode(latents: Tensor) -> list[np.ndarray]:
        with autocast(device, precision):
            frames = pipe.decode_latents(latents, ratio)
        return list((frames * 255).round().astype(np.uint8))

    with Background(device) if overlap else nullcontext() as background:
        pending: deque[tuple[Callable[[], list[np.ndarray]], Seconds]] = deque()
        for number, first in enumerate(batches):
            part = requests[first : first + batch]
            watch = Stopwatch(pipe, on_progress, number * calls, len(batches) * calls)
            call = {
                **_text([request.prompt for request in part], encode),
                "generator": [torch.Generator().manual_seed(request.seed) for request in part],
                "callback_on_step_end": watch.step,
                "output_type": "latent",
                **arguments,
            }
            with watch, autocast(device, precision):
                if draft is not None:
                    higher = {"temporal_ratio": draft.ratio, "num_inference_steps": draft.steps}
                    latents = _at_lower_ratio(pipe.vae, pipe(**{**call, **higher}).frames, draft.ratio, ratio)
                    call |= {"latents": latents, "denoise_strength": draft.strength}
                    if arguments.get("video") is not None:
                        call["video"] = _opening_of_draft(pipe, arguments, draft.ratio, ratio)
                decoding = partial(decode, pipe(**call).frames)
            pending.append((background.submit(decoding) if background else decoding, watch.seconds))
            if len(pending) > int(overlap):  # with overlap the newest batch stays in the background
                yield _finish(*pending.popleft())
        while pending:
            yield _finish(*pending.popleft())


def _check(
    pipe: Any,
    requests: Sequence[SampleRequest],
    batch: int,
    precision: Precision,
    draft: Draft | None,
    overlap: bool,
    arguments: Mapping[str, Any],
) -> tuple[int, int]:
    """Check what `make_videos` got; return the videos' temporal ratio and the model calls of a batch."""
    parameters = inspect.signature(pipe.__call__).parameters
    if wrong := arguments.keys() - parameters.keys() | arguments.keys() & SET_HERE:
        legal = sorted(parameters.keys() - SET_HERE)
        raise ValueError(f"{', '.join(sorted(wrong))}: no argument that can be given here; legal are {', '.join(legal)}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r:.100}: use one of {', '.join(PRECISIONS)}")
    steps, _ = steps_and_guidance(pipe.config, *map(arguments.get, ("num_inference_steps", "guidance_scale")))
    (ratio,) = with_defaults(pipe.config, temporal_ratio=arguments.get("temporal_ratio"))
    check_counts(batch=batch, temporal_ratio=ratio)
    check_prompts([request.prompt for request in requests] or "", None, None, None)
    check_seeds([request.seed for request in requests])
    check_flow(pipe.scheduler)
    if not isinstance(overlap, bool):
        raise ValueError(f"overlap {overlap!r:.100}: True or False is needed")
    if overlap and getattr(getattr(pipe, "pipe", pipe), "_all_hooks", None):
        raise ValueError("overlap: this pipeline holds one model at a time on its device; overlap needs all of them there")
    if overlap and draft is not None:
        raise ValueError("overlap: a draft needs the tokenizer, which decodes the batch before it; leave one of the two out")
    if draft is None:
        return ratio, count_model_calls(pipe.scheduler, steps)
    if not isinstance(draft, Draft):
        raise ValueError(f"draft {draft!r:.100}: a Draft is needed")
    if isinstance(pipe, StockPipeline):
        raise ValueError("draft: a WanPipeline starts from noise; leave drafts out")
    check_counts(draft_ratio=draft.ratio, draft_steps=draft.steps)
    if draft.ratio <= ratio or not 0 <= draft.strength < 1:
        raise ValueError(
            f"draft at {draft.ratio}x with denoise_strength {draft.strength:g} for a video at {ratio}x: a higher ratio and "
            "a strength from 0 to below 1 are needed"
        )
    return ratio, count_model_calls(pipe.scheduler, draft.steps) + count_model_calls(pipe.scheduler, steps, draft.strength)


@torch.no_grad()
def _at_lower_ratio(vae: Any, latents: Tensor, ratio: int, lower: int) -> Tensor:
    """Return latents of a lower ratio: lifted without pixels where they lift, else those of the decoded video."""
    if lower in vae.lifts(ratio):
        return vae.lift(latents, ratio, lower)
    video = vae.decode(latents, ratio).sample.clamp(-1, 1)
    return vae.encode(video, lower).latent_dist.mode()


def _opening_of_draft(pipe: Any, arguments: Mapping[str, Any], ratio: int, lower: int) -> Tensor:
    """Return the frames of `video` that open the refinement of a draft, B T C H W in [0, 1].

    They are the first of those that the draft opened with: a call by itself takes a clip's last frames, fewer at a lower ratio.
    """
    names = ("height", "width", "num_frames")
    *size, frames = with_defaults(pipe.config, **{name: arguments.get(name) for name in names})
    pixels: Any = read_conditioning_frames(None, arguments["video"], tuple(size), pipe.video_processor)
    limit = pipe.transformer.config["condition_frames"]
    step = pipe.vae.latent_step
    drafted = count_opening(pixels.shape[2], ratio, limit, latent_frames(frames, ratio), step)
    kept = count_opening(drafted, lower, limit, latent_frames(frames, lower), step)
    return (pixels[:, :, -drafted:][:, :, :kept] / 2 + 0.5).movedim(1, 2)


def _finish(decode: Callable[[], list[np.ndarray]], seconds: Seconds) -> tuple[list[np.ndarray], Seconds]:
    """Decode a batch, or wait until it is decoded; return its videos and its seconds, this call's included."""
    began = time.perf_counter()
    videos = decode()
    return videos, dataclasses.replace(seconds, decoding=time.perf_counter() - began)


def _text(prompts: list[str], encode: Callable[[Sequence[str]], Embedded] | None) -> dict[str, Any]:
    """Return the prompts as arguments of the pipeline, encoded if `encode` is given."""
    if encode is None:
        return {"prompt": prompts}
    negative = unpack(encode([NULL_CAPTION] * len(prompts)))
    return dict(zip((*NAMES, *NEGATIVE_NAMES), (*unpack(encode(prompts)), *negative), strict=True))


class Stopwatch:
    """Times the parts of one call of a pipeline that returns latents and gets `step` as its callback.

    Denoising lasts from the first call of the transformer to the end; text comes before it. `on_progress` gets the steps done,
    including those `before` this call, and `total`.
    """

    def __init__(self, pipe: Any, on_progress: Callable[[int, int], None] | None = None, before: int = 0, total: int = 0):
        self.pipe, self.on_progress, self.done, self.total = pipe, on_progress, before, total
        self.first: float | None = None

    def __enter__(self) -> "Stopwatch":
        self.hook = self.pipe.transformer.register_forward_pre_hook(self._begin)
        self.started = self._now()
        return self

    def __exit__(self, *failed: Any) -> None:
        self.hook.remove()
        self.ended = self._now()

    def step(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Report the end of a denoising step; pass this as the pipeline's callback."""
        self.done += 1
        if self.on_progress:
            self.on_progress(self.done, self.total)
        return tensors

    @property
    def seconds(self) -> Seconds:
        """Seconds of the parts; available after the call."""
        first = self.started if self.first is None else self.first
        return Seconds(first - self.started, self.ended - first)

    def _begin(self, *_: Any) -> None:
        if self.first is None:
            self.first = self._now()

    def _now(self) -> float:
        if (device := execution_device(self.pipe)).type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # the background has another
        return time.perf_counter()


def sample_videos(pipe: Any, prompts: Sequence[str], *arguments: Any, **options: Any) -> list[np.ndarray]:
    """Sample one video per prompt; arguments are those of `sample_timed`."""
    return sample_timed(pipe, prompts, *arguments, **options)[0]


def sample_timed(
    pipe: Any,
    prompts: Sequence[str],
    steps: int | None = None,
    guidance: float | None = None,
    precision: Precision = "auto",
    first_seed: int = 0,
    name: str | None = "sampling",
    **options: Any,
) -> tuple[list[np.ndarray], Seconds]:
    """Sample one video per prompt; video i has noise of seed first_seed + i, whatever the number of prompts.

    Steps and guidance that are None are the pipeline's defaults. `name` labels the progress bar on stderr; None hides the bar.
    `options` are further arguments of `make_videos`. Returns the videos and the seconds of all batches.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise ValueError(f"prompts {prompts!r:.100}: a list of texts is needed")
    check_seeds([first_seed])
    videos: list[np.ndarray] = []
    spent = Seconds()
    requests = [SampleRequest(prompt, first_seed + i) for i, prompt in enumerate(prompts)]
    options |= {"num_inference_steps": steps, "guidance_scale": guidance}
    with ProgressBar(desc=name or "", unit="video", total=len(prompts), disable=name is None) as bar:
        for sampled, seconds in make_videos(pipe, requests, BATCH, precision, **options):
            videos += sampled
            spent += seconds
            bar.update(len(sampled))
    return videos, spent
