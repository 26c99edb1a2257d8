"""What a sampling is told in words: the prompts and what guidance moves away from, encoded.

Users give and get plain tensors - of several text encoders, a sequence with one of each. Shapes: b videos, L text tokens,
D width; masks b L, nonzero where a token is real.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from promag.diffusion.text import Embedded

NAMES = ("prompt_embeds", "prompt_attention_mask", "pooled_prompt_embeds")
NEGATIVE_NAMES = tuple(f"negative_{name}" for name in NAMES)

Tensors = Tensor | Sequence[Tensor]


def pack(tokens: Tensors, masks: Tensors | None, pooled: Tensor | None, names: Sequence[str] = NAMES) -> Embedded:
    """Return given tensors as one value; raises ValueError, under the arguments' names, for those that do not fit together."""
    tokens = (tokens,) if isinstance(tokens, Tensor) else tuple(tokens)
    if masks is None:
        raise ValueError(f"{names[0]} without {names[1]}: both are needed, as encode_prompt returns them")
    masks = (masks,) if isinstance(masks, Tensor) else tuple(masks)
    shapes, masked = [tuple(part.shape[:2]) for part in tokens], [tuple(part.shape) for part in masks]
    if shapes != masked or len({shape[0] for shape in shapes}) != 1:
        raise ValueError(f"{names[1]} of shapes {masked}: {shapes} are needed, those of {names[0]}, all for as many prompts")
    if pooled is not None and len(pooled) != shapes[0][0]:
        raise ValueError(f"{names[2]} of {len(pooled)} prompts: {names[0]} are of {shapes[0][0]}")
    return Embedded(tokens, masks, pooled)


def unpack(text: Embedded) -> tuple[Tensors, Tensors, Tensor | None]:
    """Return the tensors of `text` as users see them."""
    tokens, masks = (parts[0] if len(parts) == 1 else parts for parts in (text.tokens, text.masks))
    return tokens, masks, text.pooled


@dataclass(frozen=True)
class Prompts:
    """The prompts of all videos and, where guidance is on, as many negative ones. Raises ValueError for another number."""

    text: Embedded
    negative: Embedded | None

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.negative is not None and (found := len(self.negative.tokens[0])) != (needed := len(self)):
            raise ValueError(f"negative prompts: {found} for {needed} videos; give as many as prompts")

    def __len__(self) -> int:
        return len(self.text.tokens[0])

    @cached_property
    def guided(self) -> Embedded:
        """The negative prompts and, after them, the prompts: the order that diffusers' caches expect."""
        if self.negative is None:
            raise ValueError("guidance_scale was raised above 1 while sampling: begin with one above 1")
        return self.negative.merge(self.text, lambda a, b: torch.cat([a, b]))

    def tensors(self) -> dict[str, Any]:
        """Return all tensors by the names of the call's arguments; None for those that are not there."""
        negative = (None,) * 3 if self.negative is None else unpack(self.negative)
        return {**dict(zip(NAMES, unpack(self.text), strict=True)), **dict(zip(NEGATIVE_NAMES, negative, strict=True))}

    def changed(self, tensors: Mapping[str, Any]) -> "Prompts":
        """Return the prompts with some tensors replaced; this same value if all of them are the old ones."""
        old = self.tensors()
        new = {name: tensors.get(name, value) for name, value in old.items()}
        if all(new[name] is value for name, value in old.items()):
            return self
        text, negative = ([new[name] for name in names] for names in (NAMES, NEGATIVE_NAMES))
        return Prompts(pack(*text), None if negative[0] is None else pack(*negative, names=NEGATIVE_NAMES))
