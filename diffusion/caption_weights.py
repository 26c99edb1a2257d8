"""Sampling weights of clips by words of their captions, for concepts that a model learns slowly."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from promag.training.config import required


@dataclass(frozen=True)
class CaptionWeight:
    """A sampling weight for the clips whose captions contain some words."""

    words: str = required("whole words that the caption contains in this order; upper or lower case")
    factor: float = required("how often these clips are sampled relative to clips without a weight; below 1: less often")

    def __post_init__(self) -> None:
        """Raise ValueError for empty words and for a factor that is not finite and above 0."""
        if not self.words.strip():
            raise ValueError(f"caption_weights on words {self.words!r}: name the words of a caption")
        if not 0 < self.factor < float("inf"):
            raise ValueError(f"caption_weights on {self.words!r}, factor {self.factor}: a finite number above 0 is needed")

    def holds(self, caption: str) -> bool:
        """Return whether a caption contains the words."""
        words = r"\s+".join(re.escape(word) for word in self.words.split())
        return re.search(rf"(?<!\w){words}(?!\w)", caption, re.IGNORECASE) is not None


def clip_weights(captions: Iterable[str], caption_weights: Sequence[CaptionWeight]) -> tuple[np.ndarray, np.ndarray]:
    """Return each clip's sampling weight, and how many captions match each of `caption_weights`.

    The factors of all matching caption weights multiply.
    """
    counts = np.zeros(len(caption_weights), int)
    factors = np.array([weight.factor for weight in caption_weights])

    def factor(caption: str) -> float:
        matching = np.array([weight.holds(caption) for weight in caption_weights])
        counts[:] += matching
        return float(factors[matching].prod())

    return np.fromiter((factor(caption) for caption in captions), float), counts
