"""One growth stage r -> 2r on top of a frozen tokenizer of ratio r (ProMAG, arXiv 2501.05442).

Shapes: B C T H W features, b c t h w latents. With 1+2N level-r latent frames on the whole clip and 1+N on its even frames:

    full path        level-r features of x            1+2N frames -> blocks -> causal stride-2 convolution -> 1+N
    key-frame path   level-r features of x[:, :, ::2]  1+N frames, the same grid
    mixing           queries from the first, keys and values from the second, then blocks modulated by the second
    head             moments of the 2r latent = level-r moments of x[:, :, ::2] + a residual that starts at zero
    decoder          blocks -> temporal depth-to-space -> estimate of the level-r latent of x, 1+2N frames
      or, `frames`   what level r decodes from the 2r latent, with frames interpolated between, plus a difference from zero

So at birth the 2r latent equals the level-r latent of the subsampled clip, exactly. A dual latent keeps that key-frame
latent as it is, frozen, beside as many channels of residual. With `frames` the pixels start as those of the level below on the
subsampled clip, interpolated.

`PAPER_GROWTH` is the growth that the method figure of the authors' project page draws: an affine map of the key-frame features
scales the normalised features of the full path (AdaNorm), blocks and down-sampling follow, the key-frame features are added at
feature width, and the decoder hands over features instead of a latent. The figure does not show how the key frames' grid, which
has half the frames, meets the finer one: here each key frame scales the two frames that down-sampling joins with it. Block
counts, widths and kernels are not in it either: those are our choice.
"""

import copy
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promag.training.config import setting

from .geometry import check_integer
from .layers import (
    Block,
    CausalConv3d,
    Chain,
    ChannelNorm,
    Downsample,
    Handed,
    Head,
    ResBlock,
    State,
    Unfold,
    Upsample,
    checkpointed,
    enter,
    is_first,
    zero_init,
)

Mixing = Literal["attention", "adanorm", "adanorm_late", "concat", "none"]
SumAt = Literal["moments", "features"]
HandOver = Literal["latent", "wide", "both", "frames"]
Lower = Literal["frozen", "finetune"]
Latent = Literal["mixed", "dual"]

RESIDUAL_LOGVAR = -6.0  # the residual half of a dual latent has little noise at the start


@dataclass(frozen=True)
class Growth:
    """Settings of one growth stage; the autoencoder's config stores them per level."""

    mixing: Mixing = setting(
        "attention",
        "how key-frame features join those of all frames: adanorm scales these before down-sampling, adanorm_late after it; "
        "none takes no key frames",
    )
    sum_at: SumAt = setting(
        "moments", "where the key frames' own path is added: to the moments of the latent, or to features before a new head"
    )
    hand_over: HandOver = setting(
        "latent",
        "what the decoder below gets: an estimate of its latent, wide features behind its first convolution, or both; frames: "
        "it decodes the new latent as key frames, the level interpolates between these and adds a residual; wide and frames "
        "cannot be lifted",
    )
    birth: bool = setting(True, "the new latent starts as the key frames' latent; false: the head starts untrained")
    latent: Latent = setting("mixed", "dual keeps the key frames' latent unchanged, beside as many channels of residual")
    encoder: Lower = setting("frozen", "finetune: the level trains its own copy of everything that encodes below it")
    decoder: Lower = setting("frozen", "finetune: the level trains its own copy of everything that decodes below it")
    layers: int = setting(1, "residual blocks before and after the mixing, and in the decoder")
    window: int = setting(3, "key frames that the attention sees")
    heads: int = setting(4, "attention heads; they divide the level's width")
    width: int | None = setting(
        None, "channels of the level's blocks; null for those of the level below, and 192 on an existing autoencoder"
    )

    def __post_init__(self) -> None:
        """Raise ValueError for values outside what is legal."""
        choices = {
            "mixing": Mixing,
            "sum_at": SumAt,
            "hand_over": HandOver,
            "latent": Latent,
            "encoder": Lower,
            "decoder": Lower,
        }
        for name, legal in choices.items():
            if (value := getattr(self, name)) not in get_args(legal):
                raise ValueError(f"growth {name} {value!r}: use one of {', '.join(get_args(legal))}")
        for name in ("layers", "window", "heads"):
            check_integer(f"growth {name}", getattr(self, name))
            if getattr(self, name) < 1:
                raise ValueError(f"growth {name} {getattr(self, name)}: at least 1 is needed")
        if self.width is not None:
            check_integer("growth width", self.width)
            if self.width < 1:
                raise ValueError(f"growth width {self.width}: at least 1 is needed")
        if self.latent == "dual" and (self.mixing == "none" or not self.birth):
            raise ValueError(f"growth latent 'dual' with mixing {self.mixing!r}, birth {self.birth}: needs a key-frame latent")
        if self.hand_over == "frames" and (self.mixing == "none" or not self.birth or self.latent == "dual"):
            given = f"mixing {self.mixing!r}, birth {self.birth}, latent {self.latent!r}"
            raise ValueError(f"growth hand_over 'frames' with {given}: needs a mixed latent that starts as the key frames'")
        if self.sum_at == "features" and (self.mixing == "none" or not self.birth):
            raise ValueError(f"growth sum_at 'features' with mixing {self.mixing!r}, birth {self.birth}: needs key frames")


PAPER_GROWTH = Growth(mixing="adanorm", sum_at="features", hand_over="wide")


def named_growth(value: Any) -> Any:
    """Return the settings that a name stands for, and anything but a name as it is; raises ValueError for unknown names."""
    if not isinstance(value, str):
        return value
    if value != "paper":
        raise ValueError(f"growth {value!r}: paper is the one that has a name; else give its settings")
    return PAPER_GROWTH


class CrossLevelAttention(Block):
    """Queries of the full path look at key-frame features of the same place, in a causal window of frames.

    Each head has a learned bias for each frame of the window; the first frame is repeated before the first.
    """

    def __init__(self, channels: int, heads: int, window: int):
        super().__init__()
        if channels % heads:
            raise ValueError(f"growth heads {heads}: must divide the level's width of {channels}")
        self.heads, self.window = heads, window
        self.norm_full, self.norm_key = ChannelNorm(channels), ChannelNorm(channels)
        self.to_q = CausalConv3d(channels, channels, 1)
        self.to_kv = CausalConv3d(channels, 2 * channels, 1)
        self.bias = nn.Parameter(torch.zeros(window, heads, 1, 1, 1))
        self.to_out = CausalConv3d(channels, channels, 1)

    @checkpointed
    def forward(self, full: Tensor, state: State, key: Tensor) -> tuple[Tensor, State]:
        """`full` and `key` of B C T H W -> `full` plus the attended values; the state is the last window-1 key frames."""
        frames, before = full.shape[2], self.window - 1
        if is_first(state):
            past = F.pad(key, (0, 0, 0, 0, before, 0), mode="replicate") if before else key
        else:
            past = torch.cat([state, key], 2)
        q = self.to_q(self.norm_full(full))[0].unflatten(1, (self.heads, -1))  # B heads d T H W
        k, v = self.to_kv(self.norm_key(past))[0].unflatten(1, (2, self.heads, -1)).unbind(1)
        slots = [slice(i, i + frames) for i in range(self.window)]
        scores = torch.stack([(q * k[:, :, :, s]).sum(2) for s in slots], 1) * q.shape[2] ** -0.5
        weights = (scores.float() + self.bias).softmax(1).to(v.dtype)  # B window heads T H W
        attended = torch.stack([weights[:, i, :, None] * v[:, :, :, s] for i, s in enumerate(slots)]).sum(0)
        tail = None if state is None else past[:, :, past.shape[2] - before :].clone()
        return full + self.to_out(attended.flatten(1, 2))[0], tail


class AdaNorm(nn.Module):
    """Normalised features of the full path, scaled and shifted by an affine map of the key-frame features."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = ChannelNorm(channels, affine=False)
        self.affine = CausalConv3d(channels, 2 * channels, 1)
        zero_init(self.affine)

    def forward(self, full: Tensor, key: Tensor) -> Tensor:
        """B C T H W and the same -> the same."""
        scale, shift = self.affine(key)[0].chunk(2, 1)
        return self.norm(full) * (1 + scale) + shift


def twice(x: Tensor, first: bool) -> Tensor:
    """B C 1+N H W -> B C 1+2N H W: every frame but the clip's first stands twice, beside the two that were joined in it."""
    doubled = x.repeat_interleave(2, 2)
    return doubled[:, :, 1:] if first else doubled


class LatentScale(nn.Module):
    """Mean and deviation of each latent channel, by which latents are normalised inside a level; 0 and 1 for our own base."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor):
        super().__init__()
        self.register_buffer("mean", mean.view(-1, 1, 1, 1), persistent=False)
        self.register_buffer("std", std.view(-1, 1, 1, 1), persistent=False)

    def padded(self, channels: int) -> "LatentScale":
        """Return the scale of a latent of `channels` channels: those of a dual latent's residual have mean 0."""
        more = channels - len(self.mean)
        if not more:
            return self
        mean, std = self.mean.flatten(), self.std.flatten()
        return LatentScale(torch.cat([mean, torch.zeros(more)]), torch.cat([std, std[:more]]))

    def normalise(self, z: Tensor) -> Tensor:
        """B c t h w -> the same, in units of the deviation."""
        mean, std = (part.to(z.device) for part in (self.mean, self.std))  # group offloading moves buffers for `forward` alone
        return ((z - mean) / std).to(z.dtype)

    def enlarge(self, residual: Tensor) -> Tensor:
        """Turn a residual in units of the deviation into one of the latent."""
        return (residual * self.std.to(residual.device)).to(residual.dtype)


class Projection(nn.Module):
    """Features of the level below at the width of a level; of an existing encoder's, moments first, it takes the means."""

    def __init__(self, channels: int, width: int, scale: LatentScale | None = None):
        super().__init__()
        self.scale = scale
        self.conv = CausalConv3d(channels, width, 1)

    def forward(self, features: Tensor) -> Tensor:
        """B D T H W -> B width T H W; with a scale from B 2c+D T H W."""
        if self.scale is not None:
            c = len(self.scale.mean)
            features = torch.cat([self.scale.normalise(features[:, :c]), features[:, 2 * c :]], 1)
        return self.conv(features)[0]


class EncoderGrowth(nn.Module):
    """From level-r features at two frame rates to level-2r features and moments; `latent_channels` are the base's.

    `project` maps features of another width than `channels`; `scale` is that of an existing autoencoder's latents; `below` is
    the head of the level below, with which a sum at features begins.
    """

    def __init__(
        self,
        channels: int,
        latent_channels: int,
        growth: Growth,
        project: nn.Module | None = None,
        scale: LatentScale | None = None,
        below: nn.Module | None = None,
    ):
        super().__init__()
        self.mixing = growth.mixing
        self.project, self.scale = project, scale
        before, after = (2 * growth.layers, 0) if growth.mixing == "adanorm" else (growth.layers, growth.layers)
        self.blocks_full = Chain(ResBlock(channels) for _ in range(before))
        self.down = Downsample(channels, channels, time=2, space=1)
        guided = growth.mixing == "attention"
        if guided:
            self.mix = CrossLevelAttention(channels, growth.heads, growth.window)
        elif growth.mixing == "concat":
            self.mix = CausalConv3d(2 * channels, channels, 1)
        elif growth.mixing in ("adanorm", "adanorm_late"):
            self.mix = AdaNorm(channels)
        self.blocks_mixed = nn.ModuleList(ResBlock(channels, guide_channels=channels if guided else 0) for _ in range(after))
        self.join = None
        if growth.sum_at == "features":
            self.join = CausalConv3d(channels, channels, 1)
            zero_init(self.join)
        # Without a key-frame latent to start from, the head alone makes the latent, so it cannot start at zero.
        self.adds_to_key_latent = growth.birth and growth.mixing != "none" and (self.join is None or growth.latent == "dual")
        if self.join is None or growth.latent == "dual":
            self.head: Any = Head(channels, 2 * latent_channels, zero=self.adds_to_key_latent)
        else:
            self.head = copy.deepcopy(below)
        self.dual, self.latent_channels = growth.latent == "dual", latent_channels
        if self.dual:
            self.head.start_at(slice(latent_channels, None), RESIDUAL_LOGVAR)

    @property
    def uses_key_frames(self) -> bool:
        """Tell whether `features` needs the key-frame path."""
        return self.mixing != "none"

    def features(self, full: Tensor, key: Tensor | None, state: State = None) -> tuple[Tensor, State]:
        """B C 1+2N H W and B C 1+N H W -> B C 1+N H W."""
        if self.project is not None:
            full, key = self.project(full), None if key is None else self.project(key)
        if self.mixing == "adanorm":
            full = self.mix(full, twice(key, is_first(state)))  # pyright: ignore[reportArgumentType]
        s_full, s_down, s_mix, *s_blocks = state or (state,) * (3 + len(self.blocks_mixed))
        h, s_full = self.blocks_full(full, s_full)
        h, s_down = self.down(h, s_down)
        if self.mixing == "attention":
            h, s_mix = self.mix(h, s_mix, key)
        elif self.mixing == "concat":
            h = h + self.mix(torch.cat([h, key], 1))[0]  # pyright: ignore
        elif self.mixing == "adanorm_late":
            h = self.mix(h, key)
        guide = key if self.mixing == "attention" else None
        for i, block in enumerate(self.blocks_mixed):
            h, s_blocks[i] = block(h, s_blocks[i], guide)
        if self.join is not None:
            h = key + self.join(h)[0]
        return h, None if state is None else (s_full, s_down, s_mix, *s_blocks)

    def moments(self, features: Tensor, key_moments: Tensor | None, state: State = None) -> tuple[Tensor, State]:
        """Level-2r features and level-r moments of the even frames -> level-2r moments, b 2c 1+N h w."""
        residual, state = self.head(features, state)
        if self.scale is not None:
            means, logvars = residual.chunk(2, 1)
            residual = torch.cat([self.scale.enlarge(means), logvars], 1)
        if key_moments is None:
            return residual, state
        if not self.dual:
            return key_moments + residual, state
        halves = zip(key_moments.chunk(2, 1), residual.chunk(2, 1), strict=True)  # means, then log-variances
        return torch.cat([part for key, own in halves for part in (key[:, : self.latent_channels], own)], 1), state

    def ends(self) -> list[nn.Module]:
        """Return the layers at latents."""
        return [self.head]


class DecoderGrowth(nn.Module):
    """From a level-2r latent, 1+N frames, to what the decoder of level r takes, 1+2N frames.

    That is an estimate of the level-r latent, of as many or fewer channels, or features of `wide_channels` that go behind its
    first convolution, or both. `conv_in` is a convolution to begin with, where features are handed over alone.
    """

    def __init__(
        self,
        channels: int,
        latent_channels: int,
        lower_channels: int,
        growth: Growth,
        scale: LatentScale | None = None,
        wide_channels: int | None = None,
        conv_in: nn.Module | None = None,
    ):
        super().__init__()
        self.lower_channels, self.hand_over = lower_channels, growth.hand_over
        self.scale_in, self.scale_out = (scale and scale.padded(c) for c in (latent_channels, lower_channels))
        self.conv_in = CausalConv3d(latent_channels, channels) if conv_in is None else copy.deepcopy(conv_in)
        self.blocks_in = Chain(ResBlock(channels) for _ in range(growth.layers))
        self.up = Upsample(channels, channels, time=2, space=1)
        self.blocks_out = Chain(ResBlock(channels) for _ in range(growth.layers))
        self.head = None if growth.hand_over == "wide" else Head(channels, lower_channels, zero=True)
        self.wide = Head(channels, wide_channels, zero=True) if growth.hand_over == "both" else None  # pyright: ignore

    def forward(self, handed: Handed, state: State = None) -> tuple[Handed, State]:
        """b c 1+N h w, or B C 1+N h w behind the first convolution -> b c' 1+2N h w and B C' 1+2N h w.

        At birth every latent frame but the first stands twice.
        """
        z, features = handed
        s = list(state or (state,) * 6)
        normalised = self.scale_in.normalise(z) if self.scale_in and z is not None else z
        h, s[0] = enter(self.conv_in, normalised, features, s[0])
        h, s[1] = self.blocks_in(h, s[1])
        h, s[2] = self.up(h, s[2])
        h, s[3] = self.blocks_out(h, s[3])
        estimate = wide = None
        if self.head is None:
            wide = h
        else:
            residual, s[4] = self.head(h, s[4])
            residual = self.scale_out.enlarge(residual) if self.scale_out else residual
            estimate = twice(z[:, : self.lower_channels], is_first(state)) + residual  # pyright: ignore[reportOptionalSubscript]
        if self.wide is not None:
            wide, s[5] = self.wide(h, s[5])
        return (estimate, wide), None if state is None else tuple(s)

    def ends(self) -> list[nn.Module]:
        """Return the layers at latents."""
        return [self.conv_in, *(() if self.head is None else (self.head,))]


class FrameGrowth(nn.Module):
    """From a level-2r latent, 1+N frames, and the frames that the level below makes of it, to twice as many frames.

    Args:
        channels: width of the blocks.
        latent_channels: channels of the latent.
        doublings: temporal up-samplings by 2 from this latent to the grid of the base's latents.
        pixels: channels of the pixels; frames, and pixels a side, for each position of the base's latents.
        growth: the level's settings.
        scale: scale of the latents of an existing autoencoder.
    """

    hand_over = "frames"

    def __init__(
        self,
        channels: int,
        latent_channels: int,
        doublings: int,
        pixels: tuple[int, int, int],
        growth: Growth,
        scale: LatentScale | None = None,
    ):
        super().__init__()
        self.scale = scale
        self.conv_in = CausalConv3d(latent_channels, channels)
        blocks: list[nn.Module] = [ResBlock(channels) for _ in range(growth.layers)]
        for _ in range(doublings):
            blocks += [Upsample(channels, channels, time=2, space=1), *(ResBlock(channels) for _ in range(growth.layers))]
        self.blocks = Chain(blocks)
        self.unfold = Unfold(channels, *pixels, zero=True)

    def forward(self, z: Tensor, frames: Tensor, state: State = None) -> tuple[Tensor, State]:
        """b c 1+N h w and B C 1+rN H W -> B C 1+2rN H W; at birth the mean of two frames stands between them."""
        last, *s = state or (state,) * 4
        h = z if self.scale is None else self.scale.normalise(z)
        h, s[0] = self.conv_in(h.contiguous(memory_format=torch.channels_last_3d), s[0])
        h, s[1] = self.blocks(h, s[1])
        difference, s[2] = self.unfold(h, s[2])
        x = halfway(frames, None if is_first(state) else last) + difference
        return x, None if state is None else (frames[:, :, -1:].clone(), *s)

    def ends(self) -> list[nn.Module]:
        """Return the layers at latents and pixels."""
        return [self.conv_in, self.unfold.conv, self.unfold.skip]


def halfway(x: Tensor, before: Tensor | None = None) -> Tensor:
    """B C 1+N H W -> B C 1+2N H W: the mean of two frames between them; or B C N H W -> 2N with the frame before them."""
    whole = x if before is None else torch.cat([before, x], 2)
    pairs = torch.stack([(whole[:, :, 1:] + whole[:, :, :-1]) / 2, whole[:, :, 1:]], 3).flatten(2, 3)
    return torch.cat([whole[:, :, :1], pairs], 2) if before is None else pairs
