"""The smallest pipeline with every part and random weights."""

from collections.abc import Sequence

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from promag import ProMAGPipeline, ProMAGTransformer3DModel
from promag.diffusion.text import learn_vocabulary, small_clip
from tests.conftest import make_tokenizer

PROMPTS = ["a red disc moves left", "a blue square grows"]
SIZES = {"height": 16, "width": 24, "num_frames": 17, "fps": 8.0, "temporal_ratio": 16}


def make_pipeline(prompts: Sequence[str] = PROMPTS, **trained) -> ProMAGPipeline:
    """Return a pipeline with random weights that is configured as trained at 4x and 16x on 17 frames of 24x16."""
    torch.manual_seed(0)
    vocabulary = learn_vocabulary(prompts, 300, max_length=10)
    statistics = {str(r): [0.5] * 4 for r in (4, 16)}
    transformer = ProMAGTransformer3DModel(
        in_channels=4,
        patch_size=(1, 1, 1),
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        text_dim=16,
        pooled_dim=16,
        condition_frames=2,
        latents_mean=statistics,
        latents_std=statistics,
    )
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
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
