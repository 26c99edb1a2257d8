"""Prompt accuracy: how often sampled videos show the shape, the colour and the motion of their prompts.

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
    """Draw scenes whose captions serve as prompts, from trained or from unseen combinations, by the seed alone."""
    rng = np.random.default_rng((seed, 7))
    return [sample_scene(rng, unseen=unseen) for _ in range(count)]


def accuracies(videos: Sequence[np.ndarray], scenes: Sequence[Scene]) -> dict[str, tuple[float, float, float]]:
    """Return the share of videos that the scorer reads as prompted: value and 95 % Wilson interval for each of PARTS."""
    return accuracy_figures(videos, scenes)["accuracy"]


def accuracy_figures(videos: Sequence[np.ndarray], scenes: Sequence[Scene]) -> dict[str, Any]:
    """Return accuracy, as `accuracies` does, and right_by_motion: for each motion, the videos that are all right and all."""
    scores = [scorer.score(video, scene) for video, scene in zip(videos, scenes, strict=True)]
    accuracy = {}
    for part in PARTS:
        right = sum(bool(getattr(score, part)) for score in scores)
        accuracy[part] = (right / len(scores), *scorer.wilson_interval(right, len(scores)))
    motions: dict[str, tuple[int, int]] = {}
    for motion in MOTIONS:
        right = [bool(score.all) for score, scene in zip(scores, scenes, strict=True) if scene.motion == motion]
        motions |= {motion: (sum(right), len(right))} if right else {}
    return {"accuracy": accuracy, "right_by_motion": motions}


def format_accuracy(accuracy: Mapping[str, tuple[float, float, float]]) -> str:
    """Return accuracies in per cent with their intervals, as one line."""
    return ", ".join("{} {:.0f} % ({:.0f} to {:.0f})".format(part, *(100 * x for x in accuracy[part])) for part in PARTS)


def describe(video: np.ndarray, scene: Scene) -> tuple[str, bool]:
    """Return the scorer's reading of a video as text, and whether it is what the scene says."""
    reading = scorer.read_scene(video)
    text = " ".join(str(part) for part in (reading.colour, reading.shape, reading.motion) if part)
    if reading.other:
        text += f", {reading.other[1]} {reading.other[0]}"
    return text or "nothing readable", bool(scorer.score(video, scene).all)


@torch.no_grad()
def accuracies_of_reconstructions(
    model: Any, items: Sequence[Mapping[str, Any]], temporal_ratio: int, precision: Precision = "auto"
) -> dict[str, tuple[float, float, float]]:
    """Score the tokenizer's reconstructions of generated clips, as `accuracies` does.

    This is the ceiling of every text-to-video model of that latent space. `items` hold video, (C, T, H, W) in [-1, 1], and
    caption.
    """
    videos = []
    for item in items:
        with autocast(model.device, precision):
            output = model(item["video"][None].to(model.device), temporal_ratio).sample
        videos.append(to_uint8(output)[0].cpu().numpy())
    return accuracies(videos, [parse_caption(item["caption"]) for item in items])
