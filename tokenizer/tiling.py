"""Large pictures tile by tile: overlapping tiles are computed one by one and blended linearly.

Shapes: ... H W; a tile is cut from the last two dimensions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from .geometry import SPATIAL_RATIO, check_size


@dataclass(frozen=True)
class Tiling:
    """Height and width of a tile and how far apart tiles start, in pixels; all multiples of 8.

    A picture no larger than a tile is not cut. Neighbouring tiles overlap by tile minus stride: at least what a position
    sees of its surroundings, or seams appear. Raises ValueError for sizes that do not fit together.
    """

    height: int = 256
    width: int = 256
    stride_height: int = 192
    stride_width: int = 192

    def __post_init__(self) -> None:
        """Check the sizes."""
        check_size(self.height, self.width)
        check_size(self.stride_height, self.stride_width)
        for name, tile, stride in (
            ("height", self.height, self.stride_height),
            ("width", self.width, self.stride_width),
        ):
            if stride > tile:
                raise ValueError(f"tiles of {name} {tile} every {stride}: the stride must not exceed the tile")

    def encode(self, x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        """Pixels ... H W -> latents ... H/8 W/8."""
        return _tiled(x, call, (self.height, self.width), (self.stride_height, self.stride_width), Fraction(1, SPATIAL_RATIO))

    def decode(self, z: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        """Latents ... h w -> pixels ... 8h 8w."""
        tile, stride = (self.height, self.width), (self.stride_height, self.stride_width)
        small, step = ((a // SPATIAL_RATIO, b // SPATIAL_RATIO) for a, b in (tile, stride))
        return _tiled(z, call, small, step, Fraction(SPATIAL_RATIO))


def tile_starts(size: int, tile: int, stride: int) -> list[int]:
    """Return where tiles start along one side: every `stride`, the last one flush with the end."""
    return [*range(0, max(0, size - tile), stride), max(0, size - tile)]


def _tiled(
    x: Tensor, call: Callable[[Tensor], Tensor], tile: tuple[int, int], stride: tuple[int, int], scale: Fraction
) -> Tensor:
    rows, columns = (tile_starts(x.shape[axis - 2], tile[axis], stride[axis]) for axis in (0, 1))
    if len(rows) == len(columns) == 1:
        return call(x)
    total, weights = None, None
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            y = call(x[..., row : row + tile[0], column : column + tile[1]])
            if total is None or weights is None:
                height, width = (int(side * scale) for side in x.shape[-2:])
                total = y.new_zeros(*y.shape[:-2], height, width, dtype=torch.float32)
                weights = total.new_zeros(height, width)
            vertical = _ramps(rows, i, y.shape[-2], scale, total.device)
            weight = vertical[:, None] * _ramps(columns, j, y.shape[-1], scale, total.device)
            top, left = int(row * scale), int(column * scale)
            place = (..., slice(top, top + y.shape[-2]), slice(left, left + y.shape[-1]))
            total[place] += weight * y
            weights[place[1:]] += weight
    assert total is not None
    assert weights is not None
    return (total / weights).to(y.dtype)  # pyright: ignore[reportPossiblyUnboundVariable]


def _ramps(starts: list[int], index: int, length: int, scale: Fraction, device: torch.device) -> Tensor:
    """Return the weights of one tile along one side: 1 inside, falling linearly where a neighbour overlaps."""
    here, tile = int(starts[index] * scale), torch.arange(length, device=device) + 0.5
    weights = torch.ones(length, device=device)
    if index > 0 and (before := int(starts[index - 1] * scale) + length - here) > 0:
        weights = torch.minimum(weights, tile / before)
    if index + 1 < len(starts) and (after := here + length - int(starts[index + 1] * scale)) > 0:
        weights = torch.minimum(weights, (length - tile) / after)
    return weights
