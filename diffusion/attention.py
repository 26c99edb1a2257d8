"""Choose a transformer's attention kernel: by name, or automatically the best one that passes a test.

Names are those of diffusers' dispatch (native is PyTorch's scaled_dot_product_attention). An installed kernel may still fail
on a device, or ignore a mask that it does not support, so each one is compared with plain attention first.
"""

import logging
import textwrap
from typing import Any

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _check_attention_backend_requirements,
    _maybe_download_kernel_for_backend,
    dispatch_attention_fn,
)
from torch import Tensor

from promag.training.config import UserError

from .families import family_of
from .transformer import plain_attention

logger = logging.getLogger(__name__)

TOLERANCE = 0.02  # absolute, for values of about one in bf16


def choose_attention(
    transformer: Any,
    wanted: str,
    device: torch.device,
    dtype: torch.dtype,
    gradients: bool = True,
) -> str:
    """Set a transformer's attention backend, log the choice and return its description.

    Args:
        transformer: its attention modules get the backend; cross-attention that is masked keeps native if the backend takes no
            mask.
        wanted: a name of diffusers' dispatch, or auto for the first of the family's that works. On a CPU auto sets no backend,
            so short sequences of our transformer use plain matrix products.
        device: device on which the transformer will run.
        dtype: type in which it will run.
        gradients: whether it will be trained.

    Raises UserError for an unknown name, or if no wanted backend works here.
    """
    legal = ["auto", *(name.value for name in AttentionBackendName)]
    if wanted not in legal:
        raise UserError(f"attention {wanted!r}: use one of {', '.join(legal)}")
    family = family_of(transformer)
    if wanted == "auto" and device.type == "cpu":
        chosen = family.cpu_attention
    else:
        chosen = _first_working(transformer, family.attention if wanted == "auto" else (wanted,), device, dtype, gradients)
    logger.info("attention on %s: %s", device, chosen)
    return chosen


def _first_working(transformer: Any, names: tuple[str, ...], device: torch.device, dtype: torch.dtype, gradients: bool) -> str:
    head = transformer.config["attention_head_dim"]
    failures, family = [], family_of(transformer)
    for name in names:
        problem = probe(name, device, dtype, head, gradients)
        if problem is None:
            masked = probe(name, device, dtype, head, gradients, masked=True) if family.masks_text else None
            for block in family.blocks(transformer):
                block.attn1.set_attention_backend(name)
                block.attn2.set_attention_backend("native" if masked else name)
            return f"{name}, native for text ({masked})" if masked else name
        failures.append(f"{name} does not work on {device}: {problem}")
    raise UserError(f"attention: {'; '.join(failures)}; use auto, or native")


def probe(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, gradients: bool = True, masked: bool = False
) -> str | None:
    """Test a backend on a few tokens; return None if its output is correct, else one line that describes the problem."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 8, 2, head_dim, generator=generator).to(device, dtype) for _ in range(3))
    mask = (torch.arange(8, device=device) < 5).expand(2, 1, 1, 8) if masked else None
    q.requires_grad_(gradients)
    backend = AttentionBackendName(name)
    try:
        _check_attention_backend_requirements(backend)
        _maybe_download_kernel_for_backend(backend)
        output: Tensor = dispatch_attention_fn(q, k, v, attn_mask=mask, backend=backend)
        if gradients:
            output.sum().backward()
    except Exception as error:  # a missing or unsuitable kernel may raise anything
        return textwrap.shorten(f"{type(error).__name__}: {error}", 200)
    with torch.no_grad():
        difference = (output - plain_attention(q, k, v, mask)).abs().max().item()
    if not difference < TOLERANCE:
        return f"its result is off by {difference:.2g}" + (", a mask is not obeyed" if masked else "")
    return None
