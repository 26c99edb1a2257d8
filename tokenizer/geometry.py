"""Frame and token arithmetic: the one home of every count in the system.

Causal tokenizers code the first frame alone, so at temporal ratio r, 1 + r*N pixel frames <-> 1 + N latent frames.
"""

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

SPATIAL_RATIO = 8


def stage_name(ratios: Iterable[int]) -> str:
    """Return the name of a training stage at these temporal ratios, which is its folder in a run: 16x, or 4x-8x-16x."""
    return "-".join(f"{ratio}x" for ratio in ratios)


def ratio_names(ratios: Iterable[int]) -> str:
    """Return ratios in words: 4x, 8x, 16x."""
    return ", ".join(f"{ratio}x" for ratio in ratios)


def check_integer(name: str, value: Any) -> None:
    """Raise ValueError for a value that is not an integer: 16.0, True, "16" or None."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} {value!r}: an integer is needed")


def check_counts(name: str, value: Any) -> None:
    """Raise ValueError for a value with anything but integers from 1 up in it, at any depth of sequences."""
    parts = [value]
    while parts:
        part = parts.pop()
        if isinstance(part, list | tuple):
            parts += part
        elif isinstance(part, bool) or not isinstance(part, Integral) or part < 1:
            raise ValueError(f"{name} {value!r}: whole numbers from 1 up are needed")


def latent_frames(frames: int, ratio: int) -> int:
    """Return the latent frames of `frames` pixel frames at temporal ratio `ratio`; raises ValueError if illegal."""
    check_frames(frames, ratio)
    return 1 + (frames - 1) // ratio


def nearest_frames(frames: int, ratio: int) -> tuple[int, ...]:
    """Return the legal frame counts around `frames`: one if it is legal, else the next lower and higher."""
    check_integer("frames", frames)
    if frames < 1:
        return (1,)
    below = 1 + (frames - 1) // ratio * ratio
    return (below,) if below == frames else (below, below + ratio)


def check_frames(frames: int, ratio: int, latent_step: int = 1) -> None:
    """Raise ValueError, with the nearest legal counts, unless `frames` is 1 + ratio*N, N a multiple of `latent_step`."""
    step = ratio * latent_step
    legal = nearest_frames(frames, step)
    if legal != (frames,):
        use = " or ".join(map(str, legal))
        raise ValueError(f"{frames} frames: {ratio}x needs 1 + {step}k; use {use}")


def check_chunk(frames: int, ratio: int, latent_step: int = 1) -> None:
    """Raise ValueError unless `frames` can follow an earlier chunk of a stream: a positive multiple of ratio*latent_step."""
    check_integer("frames", frames)
    step = ratio * latent_step
    if frames < step or frames % step:
        legal = sorted({max(step, frames // step * step), max(step, -(-frames // step) * step)})
        use = " or ".join(map(str, legal))
        raise ValueError(f"{frames} frames in a later chunk: {ratio}x needs a multiple of {step}; use {use}")


def check_size(height: int, width: int, multiple: int = SPATIAL_RATIO, of_width: int | None = None) -> None:
    """Raise ValueError, with the nearest legal sizes, unless height and width are positive multiples of `multiple`.

    `of_width` is the width's, where that has another one.
    """
    for name, value, step in (("height", height, multiple), ("width", width, of_width or multiple)):
        check_integer(name, value)
        if value < step or value % step:
            legal = sorted({max(step, value // step * step), max(step, -(-value // step) * step)})
            raise ValueError(f"{name} {value}: needs a multiple of {step}; use {' or '.join(map(str, legal))}")


def check_ratio(ratio: int, legal: Sequence[int]) -> None:
    """Raise ValueError unless `ratio` is one of the tokenizer's temporal ratios."""
    if isinstance(ratio, bool) or not isinstance(ratio, Integral) or ratio not in legal:
        have = ratio_names(legal)
        grown = max(legal)
        grows = isinstance(ratio, Integral) and ratio > grown and ratio % grown == 0
        hint = f"; grow it to {ratio}x first" if grows else ""
        raise ValueError(f"temporal ratio {ratio!r}: this tokenizer has {have}{hint}")


def tokens(
    frames: int,
    height: int,
    width: int,
    ratio: int,
    patch: tuple[int, int, int] = (1, 2, 2),
    spatial: int = SPATIAL_RATIO,
) -> int:
    """Return how many tokens a diffusion transformer of patch size (t, h, w) sees for one clip.

    A latent side that the patch does not divide raises ValueError.
    """
    check_size(height, width, spatial)
    t, h, w = latent_frames(frames, ratio), height // spatial, width // spatial
    if t % patch[0] or h % patch[1] or w % patch[2]:
        raise ValueError(f"latent of {t}x{h}x{w} (frames x height x width): not divisible by patch {patch}")
    return (t // patch[0]) * (h // patch[1]) * (w // patch[2])
