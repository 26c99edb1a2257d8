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
    factor: float = required("times as often as a clip without a weight that each of them is drawn; below 1: less often")

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


class CaptionWeightedSampler:
    """Draws numbers of clips by the weights of their captions: 8 bytes for each clip.

    The factors of all emphases that hold for a caption multiply. `found` counts the captions that each holds for.
    """

    def __init__(self, captions: Iterable[str], caption_weights: Sequence[CaptionWeight]):
        self.found = np.zeros(len(caption_weights), int)
        factors = np.array([one.factor for one in caption_weights])

        def weight(caption: str) -> float:
            held = np.array([one.holds(caption) for one in caption_weights])
            self.found += held
            return float(factors[held].prod())

        self.ends = np.fromiter((weight(caption) for caption in captions), float).cumsum()

    def draw(self, rng: np.random.Generator) -> int:
        """Return the number of a random clip, decided by `rng` alone."""
        place = np.searchsorted(self.ends, rng.uniform(0, self.ends[-1]), side="right")
        return min(int(place), len(self.ends) - 1)  # a number may round to the upper bound
