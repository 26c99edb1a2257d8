"""Prompt accuracy: how often sampled videos show the shape, the colour and the motion that their prompts ask for.

Videos are uint8 (T, H, W, 3). The scorer reads generated clips only (evaluation/synthetic_scorer.py).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from promag.data.synthetic import MOTIONS, Scene, parse_caption, sample_scene
from promag.tokenizer.metrics import to_uint8
from promag.training.precision import Precision, autocast

from . import synthetic_scorer as scorer

PARTS = ("shape", "colour", "motion", "all")


def scenes_to_score(count: int, seed: int, unseen: bool = False) -> list[Scene]:
    """Draw scenes whose captions are prompts, of trained or of held-out combinations; the seed alone decides them."""
    rng = np.random.default_rng((seed, 7))
    return [sample_scene(rng, unseen=unseen) for _ in range(count)]


def accuracies(videos: Sequence[np.ndarray], scenes: Sequence[Scene]) -> dict[str, tuple[float, float, float]]:
    """Return how often the scorer reads what the prompt said: value and 95 % Wilson interval for each part."""
    return accuracy_figures(videos, scenes)["accuracy"]


def accuracy_figures(videos: Sequence[np.ndarray], scenes: Sequence[Scene]) -> dict[str, Any]:
    """Return accuracy, as `accuracies` does, and right_by_motion: how many videos of each motion are all right, of how many."""
    scores = [scorer.score(video, scene) for video, scene in zip(videos, scenes, strict=True)]
    found = {}
    for part in PARTS:
        right = sum(bool(getattr(score, part)) for score in scores)
        found[part] = (right / len(scores), *scorer.wilson_interval(right, len(scores)))
    motions: dict[str, tuple[int, int]] = {}
    for motion in MOTIONS:
        right = [bool(score.all) for score, scene in zip(scores, scenes, strict=True) if scene.motion == motion]
        motions |= {motion: (sum(right), len(right))} if right else {}
    return {"accuracy": found, "right_by_motion": motions}


def in_words(accuracy: Mapping[str, tuple[float, float, float]]) -> str:
    """Return accuracies in per cent, with their intervals."""
    return ", ".join("{} {:.0f} % ({:.0f} to {:.0f})".format(part, *(100 * x for x in accuracy[part])) for part in PARTS)


def describe(video: np.ndarray, scene: Scene) -> tuple[str, bool]:
    """Return what the scorer reads in a video, in words, and whether it is what was asked for."""
    reading = scorer.read_scene(video)
    said = " ".join(str(part) for part in (reading.colour, reading.shape, reading.motion) if part)
    if reading.other:
        said += f", {reading.other[1]} {reading.other[0]}"
    return said or "nothing readable", bool(scorer.score(video, scene).all)


@torch.no_grad()
def accuracies_of_reconstructions(
    model: Any, items: Sequence[Mapping[str, Any]], temporal_ratio: int, precision: Precision = "auto"
) -> dict[str, tuple[float, float, float]]:
    """Score what the tokenizer makes of generated clips, as `accuracies` does.

    No text-to-video model of a latent space shows more than the tokenizer's decoder can: this is its ceiling. `items` hold
    video, (C, T, H, W) in [-1, 1], and caption.
    """
    videos = []
    for item in items:
        with autocast(model.device, precision):
            output = model(item["video"][None].to(model.device), temporal_ratio).sample
        videos.append(to_uint8(output)[0].cpu().numpy())
    return accuracies(videos, [parse_caption(item["caption"]) for item in items])
