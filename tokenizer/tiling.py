"""Large pictures tile by tile and batches clip by clip: overlapping tiles are computed one by one and blended linearly.

Shapes: B C T H W pixels or latents; tiles are cut from the last two dimensions. Cutting composes with streaming: each part
has a state of its own, so memory holds the activations of one part and, between two chunks, every part's state.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from .geometry import check_size
from .layers import State, is_first

logger = logging.getLogger(__name__)

Call = Callable[[Tensor, State], tuple[list[Tensor], State]]


@dataclass(frozen=True)
class Tiling:
    """Height and width of a tile and the distance between the starts of two tiles, in pixels; all multiples of 8.

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

    def boxes(self, height: int, width: int, pixels: int = 1) -> list[list[slice]]:
        """Return the rows and the columns of the tiles of a picture, whose positions are `pixels` pixels a side."""
        sides = ((height, self.height, self.stride_height), (width, self.width, self.stride_width))
        return [
            [slice(start, min(size, start + tile // pixels)) for start in tile_starts(size, tile // pixels, stride // pixels)]
            for size, tile, stride in sides
        ]


Layout = tuple[tuple[int, ...], bool, Tiling | None]  # batch, height and width of an input, and how it is split


@dataclass(frozen=True, eq=False)
class PartStates:
    """The states of a stream's parts, and the input, the tiles and the kind of call that they belong to."""

    layout: Layout
    parts: tuple[State, ...]
    kind: str = ""


def in_parts(
    x: Tensor,
    state: State,
    call: Call,
    slicing: bool = False,
    tiling: Tiling | None = None,
    pixels: int = 1,
    kind: str = "",
) -> tuple[list[Tensor], State]:
    """Apply a function clip by clip with `slicing`, tile by tile with `tiling`, and put its outputs together.

    Args:
        x: B C T H W, `pixels` pixels a side at each position: 1 for pixels, the spatial ratio for latents.
        state: as every layer takes it; a later chunk must be split like the first.
        call: (part of x, its state) -> (outputs of any spatial scale, the new state).
        slicing: call it for each clip of the batch.
        tiling: call it for each tile; None for whole pictures.
        pixels: see `x`.
        kind: what `call` does, which every chunk of a stream must share, such as "encode_chunk at 16x".

    Raises ValueError for a later chunk of another kind, batch, size or tiling than the first.
    """
    layout: Layout = ((len(x), *x.shape[3:]), slicing, tiling)
    clips = x.split(1) if slicing else (x,)
    rows, columns = tiling.boxes(x.shape[3], x.shape[4], pixels) if tiling else ([slice(None)], [slice(None)])
    count = len(clips) * len(rows) * len(columns)
    if is_first(state):
        states = [state] * count
    elif isinstance(state, PartStates) and state.kind != kind:
        raise ValueError(
            f"{kind}: the state is that of {state.kind}; give the state of the chunk before, or START for a first chunk"
        )
    elif isinstance(state, PartStates) and state.layout == layout:
        states = list(state.parts)
    else:
        began = _describe(state.layout) if isinstance(state, PartStates) else f"a {type(state).__name__}"
        raise ValueError(f"chunk of {_describe(layout)}: the state is that of {began}; a stream must keep both")
    outputs: list[list[Tensor]] = []
    for i, clip in enumerate(clips):
        first = i * len(rows) * len(columns)
        if len(rows) == len(columns) == 1:
            whole, states[first] = call(clip, states[first])
        else:
            whole = _blended(clip, states, first, call, rows, columns)
        outputs.append(whole)
    joined = [torch.cat(parts) if slicing else parts[0] for parts in zip(*outputs, strict=True)]
    return joined, None if state is None else PartStates(layout, tuple(states), kind)


def _describe(layout: Layout) -> str:
    (batch, height, width), slicing, tiling = layout
    tiles = "without tiles"
    if tiling:
        tiles = f"in tiles of {tiling.height}x{tiling.width} every {tiling.stride_height}x{tiling.stride_width}"
    return f"{batch} x {height}x{width} {tiles}{', sliced' if slicing else ''}"


def tile_starts(size: int, tile: int, stride: int) -> list[int]:
    """Return where tiles start along one side: every `stride`, the last one flush with the end."""
    return [*range(0, max(0, size - tile), stride), max(0, size - tile)]


def _blended(x: Tensor, states: list[State], first: int, call: Call, rows: list[slice], columns: list[slice]) -> list[Tensor]:
    """Call every tile, whose states stand in `states` from `first` on and are replaced, and blend the outputs."""
    totals: list[Tensor] = []
    outputs: list[Tensor] = []
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            place = first + i * len(columns) + j
            outputs, states[place] = call(x[..., row, column], states[place])
            scales = [Fraction(y.shape[-1], column.stop - column.start) for y in outputs]
            if not totals:
                totals = [
                    y.new_zeros(*y.shape[:-2], *(int(side * scale) for side in x.shape[-2:]), dtype=torch.float32)
                    for y, scale in zip(outputs, scales, strict=True)
                ]
            for total, y, scale in zip(totals, outputs, scales, strict=True):
                down, across = (_weights(spans, k, scale, y.device) for spans, k in ((rows, i), (columns, j)))
                top, left = int(row.start * scale), int(column.start * scale)
                total[..., top : top + y.shape[-2], left : left + y.shape[-1]] += down[:, None] * across * y
    return [total.to(y.dtype) for total, y in zip(totals, outputs, strict=True)]


def _weights(spans: list[slice], index: int, scale: Fraction, device: torch.device) -> Tensor:
    """Return the share of one tile in each of its positions along one side; the shares of all tiles sum to 1."""
    starts, stop = [int(span.start * scale) for span in spans], int(spans[index].stop * scale)
    here = torch.arange(starts[index], stop, device=device)
    length = stop - starts[index]
    ramps = [_ramp(starts, k, length, here) for k in range(len(starts))]
    return ramps[index] / torch.stack(ramps).sum(0)


def _ramp(starts: list[int], index: int, length: int, positions: Tensor) -> Tensor:
    """Return 1 inside a tile, falling linearly to 0 where a neighbour overlaps, and 0 outside, at some positions."""
    inside = positions - starts[index] + 0.5
    weights = ((inside > 0) & (inside < length)).float()
    if index > 0 and (before := starts[index - 1] + length - starts[index]) > 0:
        weights = torch.minimum(weights, (inside / before).clamp_min(0))
    if index + 1 < len(starts) and (after := starts[index] + length - starts[index + 1]) > 0:
        weights = torch.minimum(weights, ((length - inside) / after).clamp_min(0))
    return weights


class TiledModel:
    """The part of an autoencoder that works tile by tile and clip by clip; `spatial_ratio` is pixels per latent position."""

    spatial_ratio: int
    use_slicing: bool
    use_tiling: bool
    tiling: Tiling

    def enable_tiling(
        self,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        tile_sample_stride_height: int | None = None,
        tile_sample_stride_width: int | None = None,
    ) -> None:
        """Encode and decode pictures larger than a tile tile by tile; sizes in pixels, None keeps what was set before.

        Raises ValueError for sizes that are no multiples of the spatial ratio and for a stride above the tile.
        """
        sizes = {
            "height": tile_sample_min_height,
            "width": tile_sample_min_width,
            "stride_height": tile_sample_stride_height,
            "stride_width": tile_sample_stride_width,
        }
        tiling = replace(self.tiling, **{key: size for key, size in sizes.items() if size is not None})
        check_size(tiling.height, tiling.width, self.spatial_ratio)
        check_size(tiling.stride_height, tiling.stride_width, self.spatial_ratio)
        self.tiling, self.use_tiling = tiling, True

    def enable_group_offload(
        self,
        onload_device: torch.device,
        offload_device: torch.device = torch.device("cpu"),  # noqa: B008 (the signature of diffusers)
        offload_type: str = "block_level",
        **options: Any,
    ) -> None:
        """Keep weights on `offload_device` and bring them to `onload_device` layer by layer, as diffusers' models do.

        "block_level" is replaced by "leaf_level" with a warning: diffusers loads blocks in `forward`, which `encode` and
        `decode` do not call.
        """
        if offload_type == "block_level":
            logger.warning(
                "%s: group offloading uses leaf_level, because encode and decode do not call whole blocks", type(self).__name__
            )
            offload_type = "leaf_level"
        models: Any = super()
        models.enable_group_offload(onload_device, offload_device, offload_type, **options)

    def _in_parts(self, x: Tensor, state: State, call: Call, pixels: int = 1, kind: str = "") -> tuple[list[Tensor], State]:
        return in_parts(x, state, call, self.use_slicing, self.tiling if self.use_tiling else None, pixels, kind)
