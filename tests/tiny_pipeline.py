"""The smallest pipeline with every part and random weights."""

from collections.abc import Sequence

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from promag import ProMAGPipeline
from promag.diffusion.text import learn_vocabulary, small_clip
from promag.scripts.reliability.odd_arguments import make_transformer
from tests.conftest import make_tokenizer

PROMPTS = ["a red disc moves left", "a blue square grows"]
SIZES = {"height": 16, "width": 24, "num_frames": 17, "fps": 8.0, "temporal_ratio": 16}


def make_pipeline(prompts: Sequence[str] = PROMPTS, **trained) -> ProMAGPipeline:
    """Return a pipeline with random weights that is configured as trained at 4x and 16x on 17 frames of 24x16."""
    torch.manual_seed(0)
    vocabulary = learn_vocabulary(prompts, 300, max_length=10)
    transformer = make_transformer()
    pipe = ProMAGPipeline(
        vocabulary,
        small_clip(vocabulary, width=16, layers=1, heads=2),
        transformer,
        make_tokenizer(settle=0.05),
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        **{**SIZES, **trained},
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
