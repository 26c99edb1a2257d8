"""Frame interpolation behind a tokenizer's lowest level: what higher ratios must beat.

Shapes: B C T H W in [-1, 1].
"""

from typing import Any, Literal, get_args

import torch
from diffusers.models.autoencoders.vae import DecoderOutput
from einops import rearrange
from torch import Tensor, nn

from promag.data.video.interpolation import SMALLEST, interpolate_motion

from .metrics import from_uint8, to_uint8

Kind = Literal["linear", "motion"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def kinds_for(height: int, width: int) -> tuple[Kind, ...]:
    """Return the kinds that take pictures of a size; motion is estimated from 32 pixels a side on."""
    return KINDS if min(height, width) >= SMALLEST else ("linear",)


class Interpolated(nn.Module):
    """A tokenizer's lowest level on every k-th frame, the frames between interpolated: a control for higher ratios.

    It has as many latents as a level grown to k times the lowest ratio. "linear" blends the frames on both sides; "motion"
    compensates for motion, by FFmpeg's minterpolate.
    """

    def __init__(self, model: Any, kind: Kind = "linear"):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"interpolation {kind!r}: use one of {', '.join(KINDS)}")
        self.model, self.kind = model, kind

    @property
    def device(self) -> Any:
        """The device of the weights."""
        return self.model.device

    @property
    def dtype(self) -> Any:
        """The type of the weights."""
        return self.model.dtype

    def forward(self, x: Tensor, temporal_ratio: int) -> DecoderOutput:
        """B C 1+k*r*N H W -> the same."""
        lowest = self.model.temporal_ratios[0]
        step = temporal_ratio // lowest
        coded = self.model(x[:, :, ::step], lowest).sample.float()
        if self.kind == "motion":
            videos = [interpolate_motion(video.numpy(), step) for video in to_uint8(coded).cpu()]
            whole = torch.cat([from_uint8(torch.from_numpy(video)[None]) for video in videos]).to(coded.device)
            whole[:, :, ::step] = coded
            return DecoderOutput(sample=whole)
        flat = rearrange(coded, "b c t h w -> b (c h w) t")
        between = nn.functional.interpolate(flat, x.shape[2], mode="linear", align_corners=True)
        return DecoderOutput(sample=rearrange(between, "b (c h w) t -> b c t h w", c=x.shape[1], h=x.shape[3]))
