"""Quality of generated videos at each token budget that a pipeline was trained for.

Videos are uint8 (T, H, W, 3). Prompts are captions of generated clips, so that a scorer can read the videos.
"""

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from promag.data.datasets import open_dataset
from promag.data.synthetic import Scene, render
from promag.pipelines.inputs import steps_and_guidance
from promag.pipelines.sampling import BATCH, sample_timed
from promag.tokenizer.metrics import from_uint8, high_frequency_energy, jitter
from promag.tokenizer.perceptual import frechet_distance
from promag.training.precision import Precision

from .prompt_accuracy import accuracies, scenes_to_score

Similarity = Callable[[np.ndarray, str], float]  # takes a video and its prompt


def warm_up(pipe: Any, ratio: int, prompts: int, guidance: float | None = None, precision: Precision = "auto") -> None:
    """Sample a first batch of `prompts` videos in one step, without timing it.

    The first call at a shape takes longer than those after it. Raises ValueError as the pipeline does.
    """
    captions = [scene.caption() for scene in scenes_to_score(min(prompts, BATCH), seed=0)]
    sample_timed(pipe, captions, 1, guidance, precision, name=None, temporal_ratio=ratio)


def generation_figures(
    pipe: Any,
    ratio: int,
    prompts: int,
    steps: int | None = None,
    guidance: float | None = None,
    similarity: Similarity | None = None,
    features: Callable[[Tensor], Tensor] | None = None,
    precision: Precision = "auto",
) -> dict[str, Any]:
    """Sample a video for each of `prompts` captions at one temporal ratio and return the figures.

    Keys: steps and guidance of the sampling, accuracy (value and 95 % interval by part), sampling_seconds (one video in a
    batch, decoding included, after `warm_up`), clip_similarity (mean over videos) and fvd (against as many generated clips of
    the pipeline's frames and size).

    Args:
        steps: denoising steps; None is the pipeline's own, as is guidance.
        similarity: a `ClipSimilarity`; without it clip_similarity is None.
        features: a `VideoFeatures`; without it, and for a single prompt, fvd is None.
    """
    pipe.set_progress_bar_config(disable=True)
    steps, guidance = steps_and_guidance(pipe.config, steps, guidance)
    scenes = scenes_to_score(prompts, seed=0)
    captions = [scene.caption() for scene in scenes]
    name = f"{ratio}x prompts"
    warm_up(pipe, ratio, prompts, guidance, precision)
    videos, seconds = sample_timed(pipe, captions, steps, guidance, precision, name=name, temporal_ratio=ratio)
    return {
        "ratio": ratio,
        "prompts": prompts,
        "steps": steps,
        "guidance": guidance,
        "accuracy": accuracies(videos, scenes),
        "sampling_seconds": seconds.total / prompts,
        "clip_similarity": fmean(map(similarity, videos, captions)) if similarity else None,
        "fvd": _fvd(videos, features) if features and prompts > 1 else None,
    }


def steadiness_and_sharpness(videos: Sequence[np.ndarray], scenes: Sequence[Scene]) -> dict[str, float]:
    """Return jitter and high-frequency energy of sampled videos beside rendered clips of the same scenes; means over videos.

    Keys: jitter, jitter_of_true_clips, high_frequency (over that of the rendered clip; below 1 is blur).
    """
    true = [render(scene, i, len(video), video.shape[1:3]) for i, (video, scene) in enumerate(zip(videos, scenes, strict=True))]
    pairs = [(_clip(video), _clip(clip)) for video, clip in zip(videos, true, strict=True)]
    return {
        "jitter": fmean(float(jitter(video)) for video, _ in pairs),
        "jitter_of_true_clips": fmean(float(jitter(clip)) for _, clip in pairs),
        "high_frequency": fmean(float(high_frequency_energy(video, clip)) for video, clip in pairs),
    }


def _clip(video: np.ndarray) -> Tensor:
    return from_uint8(torch.from_numpy(video[None]))


def _fvd(videos: Sequence[np.ndarray], features: Callable[[Tensor], Tensor]) -> float:
    frames, height, width, _ = videos[0].shape
    real = open_dataset("synthetic", "eval", frames, (height, width), len(videos))
    sampled = torch.cat([features(_clip(video)) for video in videos])
    true = torch.cat([features(real.fixed(i)["video"][None]) for i in range(len(videos))])
    return frechet_distance(true, sampled)
