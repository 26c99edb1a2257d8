"""Text of the videos that are sampled while training: frozen encoders read the prompts once and are let go of."""

from collections.abc import Sequence
from typing import Any

import torch

from promag.diffusion.config import TextConfig, TextEncoderConfig
from promag.diffusion.text import NULL_CAPTION, Embedded, encode, load_frozen, side_by_side, tokenize


class SampleText:
    """Encodes the same prompts again and again: by the text model that learns anew, by frozen ones the first time alone.

    Args:
        text: the text encoders of a training.
        prompts: all that will be asked for, beside the null caption.
    """

    def __init__(self, text: TextConfig, prompts: Sequence[str]):
        self.text, self.prompts = text, list(dict.fromkeys([*prompts, NULL_CAPTION]))
        self._kept: dict[TextEncoderConfig, Embedded] = {}

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], learned: tuple[Any, Any] | None) -> Embedded:
        """Return what all encoders make of some of the prompts; `learned` are tokenizer and model of the one that learns."""
        parts = []
        for encoder in self.text.encoders:
            if encoder == self.text.small and learned:
                tokenizer, model = learned
                parts.append(encode(model, tokenize(tokenizer, prompts)))
            else:
                rows = torch.tensor([self.prompts.index(prompt) for prompt in prompts])
                parts.append(self._frozen(encoder).map(lambda x, rows=rows: x[rows]))
        return side_by_side(parts)

    def _frozen(self, encoder: TextEncoderConfig) -> Embedded:
        if encoder not in self._kept:
            tokenizer, model = load_frozen(encoder.model, encoder.weights, encoder.max_length)
            self._kept[encoder] = encode(model, tokenize(tokenizer, self.prompts)).map(torch.Tensor.cpu)
        return self._kept[encoder]
