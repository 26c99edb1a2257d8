"""A tiny decoder of a tokenizer's latents, at every ratio: for previews, and for pipelines whose decoding takes too long.

The idea is TAEHV's (github.com/madebyollin/taehv): a few narrow layers that learn what a large decoder makes of its latents.
All layers work on the grid of the latents, and the last one unfolds each position into pixels. Each level doubles the frames
for the one below it, by layers that all higher levels share.

Shapes: b c t h w latents, B C T H W pixels in [-1, 1].
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from einops import rearrange
from torch import Tensor, nn

from promag.training.config import UserError
from promag.training.safetensors_only import SafetensorsOnly

from .base import least_squares
from .geometry import check_ratio
from .inputs import check_latents
from .layers import START, CausalConv3d, ResBlock, State, Unfold, Upsample
from .tiling import TiledModel, Tiling


class TinyDecoder(TiledModel, SafetensorsOnly, ModelMixin, AutoencoderMixin, ConfigMixin):
    """Decodes the latents of a tokenizer at each of its ratios, whole or chunk by chunk, in a fraction of its decoder's time.

    Args:
        temporal_ratios: the tokenizer's, powers of two, each twice the one before.
        latent_channels: channels of the latent at each of them.
        spatial_ratio: pixels per latent position along height and width.
        out_channels: channels of the pixels.
        width: channels of all layers.
        layers: residual blocks, which all ratios share.

    Raises ValueError for ratios that do not double, and for other settings that do not fit together.
    """

    # model_index.json records this name: moving this file must not break a saved pipeline
    __module__ = "promag"

    @register_to_config
    def __init__(
        self,
        temporal_ratios: Sequence[int] = (4, 8, 16),
        latent_channels: Sequence[int] = (16, 16, 16),
        spatial_ratio: int = 8,
        out_channels: int = 3,
        width: int = 64,
        layers: int = 2,
    ):
        super().__init__()
        _check_settings(temporal_ratios, latent_channels, min(spatial_ratio, out_channels, width, layers))
        self.temporal_ratios = tuple(temporal_ratios)
        self.level_channels = tuple(latent_channels)
        self.spatial_ratio = spatial_ratio
        self.use_slicing = self.use_tiling = False
        self.tiling = Tiling()
        self.entries = nn.ModuleList(CausalConv3d(channels, width) for channels in latent_channels)
        # from each level above the lowest to the one below it
        self.doubling = nn.ModuleList(Upsample(width, width, 2, 1) for _ in temporal_ratios[1:])
        self.blocks = nn.ModuleList(ResBlock(width) for _ in range(layers))
        self.to_pairs = nn.ModuleList(Upsample(width, width, 2, 1) for _ in range(temporal_ratios[0].bit_length() - 2))
        self.unfold = Unfold(width, out_channels, 2, spatial_ratio)

    @property
    def temporal_compression_ratio(self) -> int:
        """The temporal ratio that is used where none is named: the highest."""
        return self.temporal_ratios[-1]

    @property
    def spatial_compression_ratio(self) -> int:
        """Pixels per latent position along height and width."""
        return self.spatial_ratio

    def hidden_kernels(self) -> list[nn.Parameter]:
        """Return the convolution kernels that map hidden features to hidden features, not those at pixels and latents."""
        hidden = (self.doubling, self.blocks, self.to_pairs, self.unfold.expand)
        return [p for modules in hidden for p in modules.parameters() if p.ndim > 1]

    @torch.no_grad()
    def fit_linear_path(self, latents: Sequence[Tensor], x: Tensor) -> None:
        """Start an untrained decoder as the linear map that fits clips B C T H W best, given their latents at each ratio.

        Every residual branch is zero at the start: entries copy a latent's channels, and what unfolds solves for the pixels.
        """
        for entry in self.entries:
            conv: Any = entry
            nn.init.zeros_(conv.weight)
            nn.init.zeros_(conv.bias)
            channels = min(conv.in_channels, conv.out_channels)
            conv.weight[range(channels), range(channels), -1, 1, 1] = 1
        features = [self._run(self._path(level)[:-1], z, None)[0] for level, z in enumerate(latents)]
        _fit(self.unfold, torch.cat(features), torch.cat([x] * len(features)))

    def check_latents_of(self, tokenizer: Any) -> None:
        """Raise ValueError unless a tokenizer's latents have the ratios, channels and pixels per position of this decoder's."""
        for name, mine, other in (
            ("temporal ratios", self.temporal_ratios, tuple(tokenizer.temporal_ratios)),
            ("latent channels", self.level_channels, tuple(tokenizer.level_channels)),
            ("pixels per latent position", self.spatial_ratio, tokenizer.spatial_compression_ratio),
        ):
            if mine != other:
                raise ValueError(f"tiny decoder: its {name} are {mine}, the tokenizer's {other}; they must be equal")

    @apply_forward_hook
    def decode(self, z: Tensor, temporal_ratio: int | None = None, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Decode latents b c 1+N h w of one ratio, None for the highest, to clips B C 1+r*N H W, about in [-1, 1].

        Raises ValueError for another ratio or other channels.
        """
        x, _ = self._decode(z, None, temporal_ratio)
        return DecoderOutput(sample=x) if return_dict else (x,)

    @apply_forward_hook
    def decode_chunk(self, z: Tensor, state: State = START, temporal_ratio: int | None = None) -> tuple[Tensor, State]:
        """Decode the next latent frames of a stream (`state=START` first); the chunks together equal `decode`."""
        return self._decode(z, state, temporal_ratio)

    def forward(self, z: Tensor, temporal_ratio: int | None = None) -> Tensor:
        """Decode, as `decode` does, to a tensor."""
        return self._decode(z, None, temporal_ratio)[0]

    def _decode(self, z: Tensor, state: State, temporal_ratio: int | None) -> tuple[Tensor, State]:
        ratio = self.temporal_compression_ratio if temporal_ratio is None else temporal_ratio
        check_ratio(ratio, self.temporal_ratios)
        level = self.temporal_ratios.index(ratio)
        check_latents(z, self.level_channels[level])

        def decode(part: Tensor, before: State) -> tuple[list[Tensor], State]:
            x, after = self._run(self._path(level), part, before)
            return [x], after

        kind = f"decode_chunk at {ratio}x of a tiny decoder"
        (x,), state = self._in_parts(z, state, decode, self.spatial_ratio, kind)
        return x, state

    def _run(self, path: Sequence[nn.Module], z: Tensor, state: State) -> tuple[Tensor, State]:
        """Call layers one after the other."""
        states = list(state or (state,) * len(path))
        h = z.contiguous(memory_format=torch.channels_last_3d)
        for i, layer in enumerate(path):
            h, states[i] = layer(h, states[i])
        return h, None if state is None else tuple(states)

    def _path(self, level: int) -> list[nn.Module]:
        """Return the layers from a level's latent to pixels, in their order."""
        doubling = list(self.doubling)[:level][::-1]
        return [self.entries[level], *doubling, *self.blocks, *self.to_pairs, self.unfold]


def load_tiny_decoder(folder: str | os.PathLike) -> TinyDecoder:
    """Load a tiny decoder for inference; raises UserError for a folder that does not hold one."""
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"tiny decoder {folder}: no config.json there; give a folder of `promag train-tiny-decoder`")
    return TinyDecoder.from_pretrained(folder).eval()


@torch.no_grad()
def _fit(unfold: Unfold, x: Tensor, pixels: Tensor) -> None:
    """Set the linear map of an unfolding to the least-squares solution from features B C 1+N h w to B C' 1+t*N H W."""
    front = pixels[:, :, :1].expand(-1, -1, unfold.time - 1, -1, -1)
    target = torch.cat([front, pixels], 2)
    target = rearrange(target, "b c (t u) (h p) (w q) -> b (c u p q) t h w", u=unfold.time, p=unfold.space, q=unfold.space)
    weight, bias = least_squares(x.float(), target.float())
    unfold.skip.weight.copy_(weight[:, :, None, None, None])
    unfold.skip.bias.copy_(bias)  # pyright: ignore[reportOptionalMemberAccess]


def _check_settings(temporal_ratios: Sequence[int], latent_channels: Sequence[int], least: int) -> None:
    ratios = list(temporal_ratios)
    lowest = ratios[0] if ratios else 0
    if lowest < 2 or lowest & (lowest - 1) or ratios != [lowest * 2**i for i in range(len(ratios))]:
        raise ValueError(f"temporal_ratios {ratios}: powers of two from 2 are needed, each twice the one before")
    if len(latent_channels) != len(ratios) or min(latent_channels) < 1:
        raise ValueError(f"latent_channels {list(latent_channels)}: a number for each of the ratios {ratios} is needed")
    if least < 1:
        raise ValueError(f"spatial_ratio, out_channels, width or layers {least}: at least 1 is needed")
