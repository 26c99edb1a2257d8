"""Drawing some clips more often than others, by the words of their captions: for what a model is slow to learn."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from promag.training.config import required


@dataclass(frozen=True)
class CaptionWeight:
    """Clips that are drawn more or less often than others."""

    words: str = required("clips whose caption holds these words, whole and in this order, in upper or lower case")
    factor: float = required("times that each of them comes for one time of a clip without a weight; below 1: less often")

    def __post_init__(self) -> None:
        """Raise ValueError for a caption weight that no clip can have."""
        if not self.words.strip():
            raise ValueError(f"caption_weights on words {self.words!r}: name the words of a caption")
        if not 0 < self.factor < float("inf"):
            raise ValueError(f"caption_weights on {self.words!r}, factor {self.factor}: a finite number above 0 is needed")

    def holds(self, caption: str) -> bool:
        """Tell whether a caption has the words."""
        words = r"\s+".join(re.escape(word) for word in self.words.split())
        return re.search(rf"(?<!\w){words}(?!\w)", caption, re.IGNORECASE) is not None


def clip_weights(captions: Iterable[str], caption_weights: Sequence[CaptionWeight]) -> tuple[np.ndarray, np.ndarray]:
    """Return how often each clip comes by its caption, and how many captions have the words of each of `caption_weights`.

    The factors of all that hold for a caption multiply.
    """
    counts = np.zeros(len(caption_weights), int)
    factors = np.array([weight.factor for weight in caption_weights])

    def factor(caption: str) -> float:
        matching = np.array([weight.holds(caption) for weight in caption_weights])
        counts[:] += matching
        return float(factors[matching].prod())

    return np.fromiter((factor(caption) for caption in captions), float), counts
