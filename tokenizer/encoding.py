"""One call of the encoder: what its levels compute at each frame rate, each once.

Shapes: B C T H W pixels, b c t h w latents.
"""

from collections.abc import Callable

from torch import Tensor

from .layers import START, State, is_first


class Encoding:
    """One call of the encoder: its pixels, the results so far, and the stream's state before and after.

    Results and states have the key (kind, (owner, level, rate)): features or moments of a level, computed from every
    rate-th frame by the encoder that the level `owner` trained for itself, 0 for the shared one. At 16x, level 2:

        moments  (0, 2, 1)   = key-frame moments (0, 1, 2) + residual of features (0, 2, 1)
        moments  (0, 1, 2)   = key-frame moments (0, 0, 4) + residual of features (0, 1, 2)
        moments  (0, 0, 4)   from features (0, 0, 4)
        features (0, 2, 1)   from features (0, 1, 1), the full path, and (0, 1, 2), the key frames
        features (0, 1, 1)   from features (0, 0, 1) and (0, 0, 2)
        features (0, 1, 2)   from features (0, 0, 2) and (0, 0, 4)
        features (0, 0, r)   from every r-th frame of the stem (0, 0, 1), for r = 1, 2, 4
        stem     (0, 0, 1)   what the base makes of each frame of the pixels alone

    So the base runs at three frame rates and 8x at two, each once, and its stem at one. Without pixels, results of the base are
    given.
    """

    def __init__(self, x: Tensor | None, state: State):
        self.x, self.before = x, state
        self.results: dict[tuple[str, tuple[int, int, int]], Tensor] = {}
        self.state: State = None if state is None else {}

    def frames(self, rate: int, owner: int, stem: Callable[[Tensor], Tensor]) -> Tensor:
        """Return what a base's stem makes of every rate-th frame.

        Frame 0 opens a clip; a later chunk starts one frame after a multiple of the rate.
        """
        x = self.x
        if x is None:
            raise ValueError(f"latents of every {rate}th frame: they are needed, too; cache them")
        made = self.once("stem", (owner, 0, 1), lambda state: (stem(x), state))
        return made[:, :, (0 if is_first(self.before) else rate - 1) :: rate]

    def once(self, kind: str, place: tuple[int, int, int], compute: Callable[[State], tuple[Tensor, State]]) -> Tensor:
        """Return the result of this kind, owner, level and frame rate; `compute` is called the first time."""
        key = (kind, place)
        if key not in self.results:
            before = self.before.get(key, START) if isinstance(self.before, dict) else self.before
            self.results[key], after = compute(before)
            if self.state is not None:
                self.state[key] = after
        return self.results[key]
