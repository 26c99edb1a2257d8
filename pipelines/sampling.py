"""Videos for prompts and seeds: the same ones however many are made at once, with the time that each part took.

Videos are uint8 (T, H, W, 3).
"""

import dataclasses
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from promag.diffusion.text import NULL_CAPTION, Embedded
from promag.training.config import UserError
from promag.training.device import best_device
from promag.training.precision import Precision, autocast
from promag.training.progress import ProgressBar

from .inputs import NAMES, NEGATIVE_NAMES, unpack
from .text_to_video import ProMAGPipeline
from .timesteps import count_of_times

BATCH = 8  # videos sampled at once


@dataclass(frozen=True)
class Order:
    """One video to make: what it shows, and the seed of its noise."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class Draft:
    """How a video is drafted at a higher temporal ratio before it is refined at the one that is asked for."""

    ratio: int  # of the draft, more than that of the video
    steps: int  # of the draft
    strength: float  # share of the video's steps that refine the draft, below 1; 0 decodes the lifted draft as it is


@dataclass(frozen=True)
class Seconds:
    """What a call of the pipeline spent on its text (given first frames included), on denoising and on decoding."""

    text: float = 0.0
    denoising: float = 0.0
    decoding: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.text + self.denoising + self.decoding

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __str__(self) -> str:
        parts = (f"{part} {seconds:.2f} s" for part, seconds in dataclasses.asdict(self).items())
        return f"{', '.join(parts)}, together {self.total:.2f} s"


def load_pipeline(folder: str | Path) -> ProMAGPipeline:
    """Return the pipeline of a folder, on the GPU if there is one; raises UserError where none can be loaded."""
    if not (Path(folder) / "model_index.json").exists():
        raise UserError(f"pipeline {folder}: no model_index.json there; give a folder of `promag train-diffusion`")
    try:
        pipe: Any = ProMAGPipeline.from_pretrained(folder)
    except (OSError, ValueError, ImportError, AttributeError) as error:
        raise UserError(f"pipeline {folder}: cannot be loaded: {' '.join(str(error).split())}") from None
    return pipe.to(best_device())


def trained_ratios(pipe: Any) -> tuple[int, ...]:
    """Return the temporal ratios that a pipeline's transformer was trained at."""
    return tuple(sorted(map(int, pipe.transformer.config["latents_mean"] or {})))


def make_videos(
    pipe: Any,
    orders: Sequence[Order],
    batch: int = 1,
    precision: Precision = "auto",
    told: Callable[[int, int], None] | None = None,
    encode: Callable[[Sequence[str]], Embedded] | None = None,
    draft: Draft | None = None,
    **arguments: Any,
) -> Iterator[tuple[list[np.ndarray], Seconds]]:
    """Make the ordered videos, `batch` at once, and yield each batch's with the seconds it took.

    A video depends on its order and on `arguments` (the pipeline's) alone: another batch moves values by rounding.
    `told` is called after each denoising step with the steps done and those to do, of all batches together; `encode` encodes
    prompts, and the null caption, in place of the pipeline. With a `draft`, a video is sampled at its ratio first, its latents
    are lifted to the ratio asked for, without pixels, and refined there.
    Raises ValueError as the pipeline does, and for a draft that is no higher ratio or refined with all steps.
    """
    steps = arguments.get("num_inference_steps") or inspect.signature(pipe.__call__).parameters["num_inference_steps"].default
    ratio = arguments.get("temporal_ratio") or pipe.config["temporal_ratio"]
    calls = count_of_times(pipe.scheduler, steps)
    if draft is not None:
        if draft.ratio <= ratio or not 0 <= draft.strength < 1:
            raise ValueError(
                f"draft at {draft.ratio}x with denoise_strength {draft.strength:g} for a video at {ratio}x: a higher ratio and "
                "a strength from 0 to below 1 are needed"
            )
        calls = count_of_times(pipe.scheduler, draft.steps) + count_of_times(pipe.scheduler, steps, draft.strength)
    batches = range(0, len(orders), batch)
    for number, first in enumerate(batches):
        part = orders[first : first + batch]
        watch = Stopwatch(pipe, told, number * calls, len(batches) * calls)
        call = {
            **_text([order.prompt for order in part], encode),
            "generator": [torch.Generator().manual_seed(order.seed) for order in part],
            "callback_on_step_end": watch.step,
            **arguments,
        }
        with watch, autocast(pipe.device, precision):
            if draft is not None:
                higher = {"temporal_ratio": draft.ratio, "num_inference_steps": draft.steps, "output_type": "latent"}
                lifted = pipe.vae.lift(pipe(**{**call, **higher}).frames, draft.ratio, ratio)
                call |= {"latents": lifted, "denoise_strength": draft.strength}
            made = pipe(**call).frames
        yield list((made * 255).round().astype(np.uint8)), watch.seconds


def _text(prompts: list[str], encode: Callable[[Sequence[str]], Embedded] | None) -> dict[str, Any]:
    """Return the pipeline's arguments that say what to show."""
    if encode is None:
        return {"prompt": prompts}
    negative = unpack(encode([NULL_CAPTION] * len(prompts)))
    return dict(zip((*NAMES, *NEGATIVE_NAMES), (*unpack(encode(prompts)), *negative), strict=True))


class Stopwatch:
    """Times the parts of one call of a pipeline that gets `step` as its callback.

    Denoising begins at the transformer's first call and ends with the last step; what comes before is text, after it decoding.
    `told` gets the steps done, `before` this and in it, and `total`.
    """

    def __init__(self, pipe: Any, told: Callable[[int, int], None] | None = None, before: int = 0, total: int = 0):
        self.pipe, self.told, self.done, self.total = pipe, told, before, total
        self.first: float | None = None
        self.last: float | None = None

    def __enter__(self) -> "Stopwatch":
        self.hook = self.pipe.transformer.register_forward_pre_hook(self._begin)
        self.started = self._now()
        return self

    def __exit__(self, *failed: Any) -> None:
        self.hook.remove()
        self.ended = self._now()

    def step(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Be the pipeline's callback."""
        self.last = self._now()
        self.done += 1
        if self.told:
            self.told(self.done, self.total)
        return tensors

    @property
    def seconds(self) -> Seconds:
        """What the call took, once it is over."""
        first = self.started if self.first is None else self.first
        last = first if self.last is None else self.last
        return Seconds(first - self.started, last - first, self.ended - last)

    def _begin(self, *_: Any) -> None:
        if self.first is None:
            self.first = self._now()

    def _now(self) -> float:
        if self.pipe.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def sample_videos(pipe: Any, prompts: Sequence[str], *arguments: Any, **how: Any) -> list[np.ndarray]:
    """Sample one video per prompt, as `sample_timed` does."""
    return sample_timed(pipe, prompts, *arguments, **how)[0]


def sample_timed(
    pipe: Any,
    prompts: Sequence[str],
    steps: int,
    guidance: float,
    precision: Precision = "auto",
    first_seed: int = 0,
    name: str | None = "sampling",
    **how: Any,
) -> tuple[list[np.ndarray], Seconds]:
    """Sample one video per prompt; video i has noise of seed first_seed + i, whatever the number of prompts.

    A progress bar on stderr is called `name`; None for silence. `how` is what else `make_videos` takes. Returns the videos,
    and what all took, in batches.
    """
    videos: list[np.ndarray] = []
    spent = Seconds()
    orders = [Order(prompt, first_seed + i) for i, prompt in enumerate(prompts)]
    how |= {"num_inference_steps": steps, "guidance_scale": guidance}
    with ProgressBar(desc=name or "", unit="video", total=len(prompts), disable=name is None) as bar:
        for made, seconds in make_videos(pipe, orders, BATCH, precision, **how):
            videos += made
            spent += seconds
            bar.update(len(made))
    return videos, spent
