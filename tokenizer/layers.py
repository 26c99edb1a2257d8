"""Causal 3D layers with linear shortcuts, whole or chunk by chunk.

Shapes: B C T H W. Sources: causal convolutions and depth-to-space resampling, MAGVIT-v2 (arXiv 2310.05737, sec. 3);
averaging and duplicating shortcuts around resampling, DC-AE (arXiv 2410.10733, sec. 3.1).

State: every layer is called as `y, state = layer(x, state)`. `None` means "the whole clip" and comes back as `None`;
`START` means "the first chunk of a stream"; what a streamed call returns goes into the next one. The first frame stands
alone: a whole clip or a first chunk has 1 + r*N frames, a later chunk r*N.

Gradient checkpointing: on whole clips, layers whose `gradient_checkpointing` is set (ModelMixin does it) keep their input
alone and compute the rest again in the backward pass.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .convolution import conv3d

State = Any
START: State = ()
Kernel = int | tuple[int, int, int]  # one size, or those of time, height and width
FRAMEWISE: Kernel = (1, 3, 3)  # sees one frame alone
EXPANSION = 4  # hidden channels of a perceptron, over those that it gets
Handed = tuple[
    Tensor | None, Tensor | None
]  # what a decoder takes: a latent, features for behind its first convolution, or both


def is_first(state: State) -> bool:
    """Tell whether a call with this state sees the first frame of the clip."""
    return state is None or (isinstance(state, tuple) and not state)


def checkpointed(forward: Callable[..., tuple[Tensor, State]]) -> Callable[..., tuple[Tensor, State]]:
    """Wrap a layer's `forward(self, x, state, ...)` so that gradient checkpointing may compute it again."""

    @functools.wraps(forward)
    def call(self: Any, x: Tensor, state: State = None, *more: Any) -> tuple[Tensor, State]:
        if state is None and self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(functools.partial(forward, self), x, None, *more)
        return forward(self, x, state, *more)

    return call


class Block(nn.Module):
    """A layer that gradient checkpointing may compute again and that is compiled by itself."""

    gradient_checkpointing = False


class CausalConv3d(nn.Conv3d):
    """A 3D convolution whose output at a frame sees that frame and earlier ones only.

    Time is padded in front by repeating the first frame, space symmetrically with zeros. A temporal stride s keeps frames
    0, s, 2s, ..., so 1 + s*N frames become 1 + N.
    """

    def __init__(self, channels_in: int, channels_out: int, kernel: Kernel = 3, stride=(1, 1, 1)):
        kt, kh, kw = (kernel,) * 3 if isinstance(kernel, int) else kernel
        super().__init__(channels_in, channels_out, (kt, kh, kw), stride, padding=(0, kh // 2, kw // 2))
        self.front = kt - 1  # frames repeated before the first one
        # frames that the next chunk's first output still sees; below 0 that output begins so many frames after the chunk
        self.kept = kt - stride[0]

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:  # pyright: ignore
        """B C T H W -> B C' T' H' W'."""
        if is_first(state):
            x = F.pad(x, (0, 0, 0, 0, self.front, 0), mode="replicate") if self.front else x
        elif self.kept > 0:
            x = torch.cat([state, x], 2)
        elif self.kept < 0:
            x = x[:, :, -self.kept :]
        tail = None if state is None else x[:, :, x.shape[2] - self.kept :].clone() if self.kept > 0 else x[:, :, :0]
        y = conv3d(x, self.weight, self.bias, self.stride, self.padding)  # pyright: ignore[reportArgumentType]
        return y, tail


class ChannelNorm(nn.Module):
    """Layer normalisation over the channels of each position: no statistics cross time or space."""

    def __init__(self, channels: int, affine: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        """B C T H W -> the same."""
        # A channels-last tensor permutes to a contiguous one: the fused kernel then runs at full speed.
        x, weight, bias = x.permute(0, 2, 3, 4, 1), self.weight, self.bias
        half = x.is_cuda and x.dtype != torch.float32
        if half and weight is not None and bias is not None:
            weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        # Autocast would widen what is normalised, and with it all up to the next convolution: on a GPU that is bound by
        # memory it costs more than the convolutions. The kernel computes in float32 whatever it reads and writes.
        with torch.autocast("cuda", enabled=False) if half else contextlib.nullcontext():
            y = F.layer_norm(x, (self.channels,), weight, bias, 1e-6)
        return y.permute(0, 4, 1, 2, 3)


class ResBlock(Block):
    """norm - SiLU - conv, twice, plus the input; the second convolution starts at zero, unless `zero` is False.

    With `guide_channels`, both normalisations are scaled and shifted by a guide of the same B T H W.
    """

    def __init__(self, channels: int, guide_channels: int = 0, zero: bool = True, kernel: Kernel = 3):
        super().__init__()
        self.norm1 = ChannelNorm(channels, affine=not guide_channels)
        self.conv1 = CausalConv3d(channels, channels, kernel)
        self.norm2 = ChannelNorm(channels, affine=not guide_channels)
        self.conv2 = CausalConv3d(channels, channels, kernel)
        self.modulation = CausalConv3d(guide_channels, 4 * channels, 1) if guide_channels else None
        if zero:
            zero_init(self.conv2)
        if self.modulation is not None:
            zero_init(self.modulation)

    @checkpointed
    def forward(self, x: Tensor, state: State = None, guide: Tensor | None = None) -> tuple[Tensor, State]:
        """B C T H W -> the same."""
        s1, s2 = state or (state, state)
        if self.modulation is None:
            h, s1 = self.conv1(F.silu(self.norm1(x)), s1)
            h, s2 = self.conv2(F.silu(self.norm2(h)), s2)
        else:
            scale1, shift1, scale2, shift2 = self.modulation(guide)[0].chunk(4, 1)
            h, s1 = self.conv1(F.silu(self.norm1(x) * (1 + scale1) + shift1), s1)
            h, s2 = self.conv2(F.silu(self.norm2(h) * (1 + scale2) + shift2), s2)
        return x + h, None if state is None else (s1, s2)


class Downsample(Block):
    """A strided causal convolution beside an averaging shortcut; time by `time`, space by `space` (1 or 2).

    The shortcut gathers the time x space x space neighbours of an output position into channels and averages groups of
    them; in time these are the frames that end at the kept one, the first frame repeated. Without `shortcut` there is the
    convolution alone.
    """

    def __init__(self, channels_in: int, channels_out: int, time: int, space: int, shortcut: bool = True, kernel: Kernel = 3):
        super().__init__()
        if shortcut and channels_in * time * space**2 % channels_out:
            raise ValueError(
                f"down-sampling {channels_in} -> {channels_out} channels by {time}x{space}x{space}: "
                f"{channels_in * time * space**2} gathered channels are no multiple of {channels_out}"
            )
        self.time, self.space, self.channels_out, self.shortcut = time, space, channels_out, shortcut
        self.conv = CausalConv3d(channels_in, channels_out, kernel, (time, space, space))
        if shortcut:
            zero_init(self.conv)

    @checkpointed
    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        """B C 1+t*N H W -> B C' 1+N H/s W/s."""
        if not self.shortcut:
            return self.conv(x, state)
        y = x
        if is_first(state) and self.time > 1:
            y = F.pad(x, (0, 0, 0, 0, self.time - 1, 0), mode="replicate")
        y = rearrange(y, "b c (t u) (h p) (w q) -> b (c u p q) t h w", u=self.time, p=self.space, q=self.space)
        y = y.unflatten(1, (self.channels_out, -1)).mean(2)
        h, state = self.conv(x, state)
        return h + y, state


class Upsample(Block):
    """A causal convolution to depth-to-space beside a duplicating shortcut; time by `time`, space by `space`.

    After a temporal up-sampling the first time-1 frames are dropped at once, so the first frame stays alone. Without
    `shortcut` there is the convolution alone.
    """

    def __init__(self, channels_in: int, channels_out: int, time: int, space: int, shortcut: bool = True, kernel: Kernel = 3):
        super().__init__()
        if shortcut and channels_out * time * space**2 % channels_in:
            raise ValueError(
                f"up-sampling {channels_in} -> {channels_out} channels by {time}x{space}x{space}: "
                f"{channels_out * time * space**2} spread channels are no multiple of {channels_in}"
            )
        self.time, self.space = time, space
        self.repeats = channels_out * time * space**2 // channels_in if shortcut else 0
        self.conv = CausalConv3d(channels_in, channels_out * time * space**2, kernel)
        if shortcut:
            zero_init(self.conv)

    @checkpointed
    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        """B C 1+N H W -> B C' 1+t*N H*s W*s."""
        first = is_first(state)
        h, state = self.conv(x, state)
        if self.repeats:
            h = h + x.repeat_interleave(self.repeats, 1)
        # Channels last, as convolutions and norms want it: any other layout would be copied once more, at the larger size.
        spread = "b t h w (c u p q) -> b (t u) (h p) (w q) c"
        h = rearrange(h.movedim(1, -1), spread, u=self.time, p=self.space, q=self.space).movedim(-1, 1)
        return (h[:, :, self.time - 1 :] if first else h), state


class Head(Block):
    """norm - SiLU - conv, with a linear skip around it unless `shortcut` is False; all zero at first with `zero`."""

    def __init__(self, channels_in: int, channels_out: int, zero: bool = False, shortcut: bool = True, kernel: Kernel = 3):
        super().__init__()
        self.norm = ChannelNorm(channels_in)
        self.conv = CausalConv3d(channels_in, channels_out, kernel)
        self.skip = CausalConv3d(channels_in, channels_out, 1) if shortcut else None
        if shortcut or zero:
            zero_init(self.conv)
        if zero and self.skip is not None:
            zero_init(self.skip)

    @torch.no_grad()
    def start_at(self, channels: slice, value: float) -> None:
        """Initialise some output channels to one value everywhere."""
        linear = self.conv if self.skip is None else self.skip
        linear.weight[channels] = 0
        linear.bias[channels] = value  # pyright: ignore[reportOptionalSubscript]

    @checkpointed
    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        """B C T H W -> B C' T H W."""
        h, state = self.conv(F.silu(self.norm(x)), state)
        return h if self.skip is None else h + self.skip(x)[0], state


class Unfold(Block):
    """A perceptron of each position beside a linear map, whose channels become `time` frames of `space` x `space` pixels.

    The first time - 1 frames are dropped, so the first frame stays alone. All zero at first with `zero`.
    """

    def __init__(self, channels_in: int, channels_out: int, time: int, space: int, zero: bool = False):
        super().__init__()
        self.time, self.space = time, space
        pixels, hidden = channels_out * time * space**2, EXPANSION * channels_in
        self.norm = ChannelNorm(channels_in)
        self.expand = CausalConv3d(channels_in, hidden, 1)
        self.conv = CausalConv3d(hidden, pixels, 1)
        self.skip = CausalConv3d(channels_in, pixels, 1)
        zero_init(self.conv)
        if zero:
            zero_init(self.skip)

    @checkpointed
    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        """B C 1+N h w -> B C' 1+t*N H W."""
        h = self.conv(F.silu(self.expand(self.norm(x))[0]))[0] + self.skip(x)[0]
        h = rearrange(h, "b (c u p q) t h w -> b c (t u) (h p) (w q)", u=self.time, p=self.space, q=self.space)
        return (h[:, :, self.time - 1 :] if is_first(state) else h), None if state is None else (None,)


class Chain(nn.ModuleList):
    """Layers called one after the other, their states in a tuple."""

    def forward(self, x: Tensor | None, state: State = None, handed: Tensor | None = None) -> tuple[Tensor, State]:
        """B C T H W -> the last layer's output; `handed` features are added behind the first layer, or stand for it."""
        first, *rest = self
        states = list(state or (state,) * len(self))
        h, states[0] = enter(first, x, handed, states[0])
        for i, layer in enumerate(rest, 1):
            h, states[i] = layer(h, states[i])
        return h, None if state is None else tuple(states)


def enter(conv: nn.Module, z: Tensor | None, features: Tensor | None, state: State = None) -> tuple[Tensor, State]:
    """Return what a decoder's first convolution makes of a latent, plus features handed over to that place; or either alone."""
    if z is None:
        assert features is not None
        return features, state
    h, state = conv(z, state)
    return (h if features is None else h + features), state


def zero_init(conv: nn.Conv3d) -> None:
    """Zero-initialise a layer so that only its shortcut contributes."""
    nn.init.zeros_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
