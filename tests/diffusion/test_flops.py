import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from promag import ProMAGTransformer3DModel
from promag.diffusion.flops import forward_flops, training_flops

CONFIG = {"in_channels": 4, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 8}


CHANGES = [
    {},
    {"pooled_dim": 6},
    {"local_convolution": True},
    {"patch_size": (1, 1, 1)},
    {"text_dim": (8, 12)},
    {"base_ahead": 0.3},
]


@pytest.mark.parametrize("change", CHANGES)
def test_the_formula_agrees_with_what_torch_counts(change):
    model = ProMAGTransformer3DModel(**{**CONFIG, **change})
    x, lengths = torch.randn(3, 4, 5, 8, 4), (7, 3)[: len(model.text_dims)]
    text = [torch.randn(3, length, width) for length, width in zip(lengths, model.text_dims, strict=True)]
    pooled = torch.randn(3, 6) if "pooled_dim" in change else None
    tokens = 5 * 8 * 4 // (1 if "patch_size" in change else 4)
    with FlopCounterMode(display=False) as counter:
        out = model(x, torch.full((3,), 500.0), text, pooled_projections=pooled, temporal_ratio=16).sample
    assert counter.get_total_flops() == forward_flops(model.config, tokens, lengths, batch=3)
    if "local_convolution" in change:
        return  # torch counts the backward pass of a depthwise convolution as if it were a dense one
    with FlopCounterMode(display=False) as counter:
        out.square().mean().backward()
    # No gradient reaches pixels and text, so the backward pass has a little less than twice the FLOPs of the forward pass.
    both = counter.get_total_flops() + forward_flops(model.config, tokens, lengths, batch=3)
    assert 0.93 < both / training_flops(model.config, tokens, lengths, batch=3) <= 1
