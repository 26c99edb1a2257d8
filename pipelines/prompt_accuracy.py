"""Prompt accuracy: how often sampled videos show the shape, the colour and the motion that their prompts ask for.

Videos are uint8 (T, H, W, 3). The scorer reads generated clips only (training/shapes_scorer.py).
"""

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch

from ..diffusion.text import NULL_CAPTION, Embedded
from ..training import shapes_scorer as scorer
from ..training.shapes import Scene, sample_scene

BATCH = 8  # videos sampled at once
PARTS = ("shape", "colour", "motion", "all")


def scenes_to_score(count: int, seed: int, held_out: bool = False) -> list[Scene]:
    """Draw scenes whose captions are prompts, of trained or of held-out combinations; the seed alone decides them."""
    rng = np.random.default_rng((seed, 7))
    return [sample_scene(rng, held_out=held_out) for _ in range(count)]


def sample_videos(
    pipe: Any,
    prompts: Sequence[str],
    steps: int,
    guidance: float,
    precision: Literal["bf16", "no"] = "no",
    first_seed: int = 0,
    name: str | None = "sampling",
    encode: Callable[[Sequence[str]], Embedded] | None = None,
) -> list[np.ndarray]:
    """Sample one video per prompt; video i has noise of seed first_seed + i, whatever the number of prompts.

    What is done is told on stderr under `name`, None for silence. `encode` encodes prompts in place of the pipeline.
    """
    ask: Callable[[Sequence[str]], Embedded] = encode or pipe.encode_prompt
    videos: list[np.ndarray] = []
    started = time.perf_counter()
    for first in range(0, len(prompts), BATCH):
        part = list(prompts[first : first + BATCH])
        generators = [torch.Generator().manual_seed(first_seed + first + i) for i in range(len(part))]
        with autocast(pipe.device, precision):
            text, null = ask(part), ask([NULL_CAPTION] * len(part))
            how = {"num_inference_steps": steps, "guidance_scale": guidance, "generator": generators}
            frames = pipe(prompt_embeds=text, negative_prompt_embeds=null, **how).frames
        videos += list((frames * 255).round().astype(np.uint8))
        if name is None:
            continue
        to_go = (time.perf_counter() - started) / len(videos) * (len(prompts) - len(videos))
        print(f"\r{name}: {len(videos)}/{len(prompts)} videos, {to_go:.0f} s to go ", end="", file=sys.stderr, flush=True)
    if name is not None:
        print(file=sys.stderr)
    return videos


def autocast(device: torch.device, precision: Literal["bf16", "no"]) -> contextlib.AbstractContextManager:
    """Return the context in which models of float32 weights run at `precision`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def accuracies(videos: Sequence[np.ndarray], scenes: Sequence[Scene]) -> dict[str, tuple[float, float, float]]:
    """Return how often the scorer reads what the prompt said: value and 95 % Wilson interval for each part."""
    scores = [scorer.score(video, scene) for video, scene in zip(videos, scenes, strict=True)]
    found = {}
    for part in PARTS:
        right = sum(bool(getattr(score, part)) for score in scores)
        found[part] = (right / len(scores), *scorer.wilson_interval(right, len(scores)))
    return found
