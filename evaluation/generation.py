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
from promag.pipelines.sampling import sample_timed
from promag.tokenizer.metrics import from_uint8
from promag.tokenizer.perceptual import frechet_distance
from promag.training.precision import Precision

from .prompt_accuracy import accuracies, scenes_to_score

Similarity = Callable[[np.ndarray, str], float]  # takes a video and its prompt


def generation_figures(
    pipe: Any,
    ratio: int,
    prompts: int,
    steps: int,
    guidance: float,
    similarity: Similarity | None = None,
    features: Callable[[Tensor], Tensor] | None = None,
    precision: Precision = "auto",
) -> dict[str, Any]:
    """Sample a video for each of `prompts` captions at one temporal ratio and return the figures.

    Keys: accuracy (value and 95 % interval by part), sampling_seconds (one video in a batch, decoding included),
    clip_similarity (mean over videos) and fvd (against as many generated clips of the pipeline's frames and size).

    Args:
        similarity: a `ClipSimilarity`; without it clip_similarity is None.
        features: a `VideoFeatures`; without it, and for a single prompt, fvd is None.
    """
    pipe.set_progress_bar_config(disable=True)
    scenes = scenes_to_score(prompts, seed=0)
    captions = [scene.caption() for scene in scenes]
    name = f"{ratio}x prompts"
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


def _fvd(videos: Sequence[np.ndarray], features: Callable[[Tensor], Tensor]) -> float:
    frames, height, width, _ = videos[0].shape
    real = open_dataset("synthetic", "eval", frames, (height, width), len(videos))
    sampled = torch.cat([features(from_uint8(torch.from_numpy(video[None]))) for video in videos])
    true = torch.cat([features(real.fixed(i)["video"][None]) for i in range(len(videos))])
    return frechet_distance(true, sampled)
