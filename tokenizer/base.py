"""Encoder and decoder of the base level: MAGVIT-v2 (arXiv 2310.05737, sec. 3) with a continuous, diagonal-Gaussian latent.

Shapes: B C T H W pixels in [-1, 1] and features, b c t h w latents; strides are (time, space) of each down-sampling.
"""

from dataclasses import dataclass, fields
from math import prod
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from promag.training.config import plain, setting

from .geometry import check_counts, check_integer
from .layers import FRAMEWISE, CausalConv3d, Chain, Downsample, Handed, Head, Kernel, ResBlock, State, Upsample

# Share of the features' mean square that is added to all. Features of natural clips are nearly collinear: without it the
# solution has large weights that cancel each other, until the first steps of training move the features apart.
RIDGE = 1e-2
# Log-variance at the start of training: little noise, so that the first steps learn to reconstruct.
INITIAL_LOGVAR = -6.0
SPATIAL_RATIOS = (8, 16, 32)  # those of this project's models and of the autoencoders that are distilled


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """The shape of a base.

    Raises ValueError for settings that do not fit together.
    """

    latent_channels: int = setting(8, "channels of the latent at every level, twice as many at dual ones")
    patch_size: int = setting(1, "side of the pixel patches that become channels in front")
    block_out_channels: tuple[int, ...] = setting((128, 256, 256, 512), "widths from fine to coarse")
    layers_per_block: int = setting(2, "residual blocks at each width, in the encoder and in the decoder")
    strides: tuple[tuple[int, int], ...] = setting(
        ((1, 2), (2, 2), (2, 2)), "(time, space) of each down-sampling between two widths"
    )
    linear_shortcuts: bool = setting(
        True,
        "averaging and duplicating shortcuts around resampling, and linear skips around the heads; false for MAGVIT-v2's "
        "blocks alone",
    )
    framewise: int = setting(
        0,
        "how many of the finest widths see one frame alone, by kernels of 1x3x3: cheaper, and computed once for all frame "
        "rates at which growth sees a clip",
    )

    def __post_init__(self) -> None:
        """Raise ValueError for settings that do not fit together."""
        widths, strides, framewise = self.block_out_channels, self.strides, self.framewise
        for name in ("latent_channels", "patch_size", "block_out_channels", "layers_per_block", "strides"):
            check_counts(name, plain(getattr(self, name)))
        if len(strides) != len(widths) - 1:
            raise ValueError(f"{len(strides)} strides: {len(widths)} widths need one fewer than widths")
        if self.spatial_ratio not in SPATIAL_RATIOS:
            legal = ", ".join(map(str, SPATIAL_RATIOS))
            raise ValueError(f"patch_size times spatial strides is {self.spatial_ratio}: it must be one of {legal}")
        check_integer("framewise", framewise)
        if not 0 <= framewise <= len(strides) or any(time > 1 for time, _ in strides[: max(0, framewise - 1)]):
            raise ValueError(
                f"framewise {framewise} with strides {[list(stride) for stride in strides]}: a number of the finest widths is "
                f"needed, from 0 to {len(strides)}, without a stride of time between them"
            )

    @property
    def temporal_ratio(self) -> int:
        """Frames per latent frame."""
        return prod(time for time, _ in self.strides)

    @property
    def spatial_ratio(self) -> int:
        """Pixels per latent position, along height and along width."""
        return self.patch_size * prod(space for _, space in self.strides)


# Arguments of AutoencoderKLProMAG that decide what its own base computes.
BASE_SETTINGS = ("in_channels", *(field.name for field in fields(BaseConfig)))


class BaseEncoder(nn.Module):
    """Pixels to features and moments of the base level."""

    def __init__(self, in_channels: int, base: BaseConfig):
        super().__init__()
        widths, layers, strides = base.block_out_channels, base.layers_per_block, base.strides
        shortcuts, framewise = base.linear_shortcuts, base.framewise
        self.patch, self.space = base.patch_size, base.spatial_ratio
        blocks: list[nn.Module] = [CausalConv3d(in_channels * self.patch**2, widths[0], _kernel(0, framewise))]
        for i, width in enumerate(widths):
            blocks += [ResBlock(width, zero=shortcuts, kernel=_kernel(i, framewise)) for _ in range(layers)]
            if i < len(strides):
                time, space = strides[i]
                blocks.append(Downsample(width, widths[i + 1], time, space, shortcuts, _kernel(i, framewise, time)))
        self.body = Chain(blocks)
        # The layers at the front of the body that see one frame alone.
        self.stem_layers = 1 + framewise * (layers + 1) - (strides[framewise - 1][0] > 1) if framewise else 0
        self.head = Head(widths[-1], 2 * base.latent_channels, shortcut=shortcuts)
        self.head.start_at(slice(base.latent_channels, None), INITIAL_LOGVAR)

    def stem(self, x: Tensor) -> Tensor:
        """B C T H W -> B C' T H' W': what is made of each frame alone, the same at every frame rate."""
        x = rearrange(x, "b c t (h p) (w q) -> b (c p q) t h w", p=self.patch, q=self.patch)
        x = x.contiguous(memory_format=torch.channels_last_3d)
        for layer in self.body[: self.stem_layers]:
            x, _ = layer(x)
        return x

    def features(self, stem: Tensor, state: State = None) -> tuple[Tensor, State]:
        """B C' 1+r*N H' W' -> B D 1+N h w."""
        return self.body[self.stem_layers :](stem, state)

    def ends(self) -> list[nn.Module]:
        """Return the layers at pixels and latents."""
        return [self.body[0], self.head]


class BaseDecoder(nn.Module):
    """Latents of the base level to pixels."""

    def __init__(self, out_channels: int, base: BaseConfig):
        super().__init__()
        widths, layers, strides = base.block_out_channels, base.layers_per_block, base.strides
        shortcuts, framewise = base.linear_shortcuts, base.framewise
        self.patch = base.patch_size
        blocks: list[nn.Module] = [CausalConv3d(base.latent_channels, widths[-1])]
        for i in reversed(range(len(widths))):
            blocks += [ResBlock(widths[i], zero=shortcuts, kernel=_kernel(i, framewise)) for _ in range(layers)]
            if i > 0:
                time, space = strides[i - 1]
                blocks.append(Upsample(widths[i], widths[i - 1], time, space, shortcuts, _kernel(i - 1, framewise, time)))
        self.body = Chain(blocks)
        self.head = Head(widths[0], out_channels * self.patch**2, shortcut=shortcuts, kernel=_kernel(0, framewise))

    def forward(self, handed: Handed, state: State = None) -> tuple[Handed, State]:
        """B c 1+N h w, or features behind the first convolution, B D 1+N h w -> B C 1+r*N H W."""
        z, features = (None if part is None else part.contiguous(memory_format=torch.channels_last_3d) for part in handed)
        s_body, s_head = state or (state, state)
        h, s_body = self.body(z, s_body, features)
        h, s_head = self.head(h, s_head)
        x = rearrange(h, "b (c p q) t h w -> b c t (h p) (w q)", p=self.patch, q=self.patch)
        return (x, None), None if state is None else (s_body, s_head)

    def ends(self) -> list[nn.Module]:
        """Return the layers at latents and pixels."""
        return [self.body[0], self.head]


def _kernel(width: int, framewise: int, time: int = 1) -> Kernel:
    """Return the kernel at a width, counted from the finest: the first `framewise` see one frame alone, unless time changes."""
    return FRAMEWISE if width < framewise and time == 1 else 3


@torch.no_grad()
def init_from_block_means(encoder: BaseEncoder, decoder: BaseDecoder) -> None:
    """Set the linear paths of an untrained encoder and decoder with shortcuts so that training starts from block means.

    Every residual branch is zero at the start, so both are linear maps. Their outer layers are solved for: the first latent
    channels are the colour means of a block, and the decoder paints blocks in these colours. The first hundred steps then
    refine a picture that is already there.
    """
    into, out = encoder.body[0], decoder.body[0]
    assert isinstance(into, CausalConv3d)
    assert isinstance(out, CausalConv3d)
    colours, latents = into.in_channels // encoder.patch**2, out.in_channels
    for conv in (into, out):  # look at one position alone
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)  # pyright: ignore[reportArgumentType]
    nn.init.orthogonal_(into.weight[:, :, -1, 1, 1])
    # Each latent channel fills a run of features: depth-to-space then gives every position in a block the same.
    width = out.out_channels
    out.weight[range(width), torch.arange(width) * latents // width, -1, 1, 1] = 1
    flat = torch.eye(colours).view(colours, colours, 1, 1, 1).expand(-1, -1, 1, encoder.space, encoder.space)
    features = encoder.features(encoder.stem(flat))[0].flatten(1).T  # D x colours
    skips: Any = encoder.head.skip, decoder.head.skip
    skips[0].weight[:colours, :, 0, 0, 0] = torch.linalg.pinv(features)
    units = torch.eye(latents).view(latents, latents, 1, 1, 1)
    spread = decoder.body(units)[0][:, :, 0, 0, 0].T  # widths[0] x latents, the same at every position
    painted = torch.zeros(skips[1].out_channels, latents)
    painted.view(colours, -1, latents)[range(colours), :, range(colours)] = 1  # output channels are (colour, p, q)
    skips[1].weight[:, :, 0, 0, 0] = painted @ torch.linalg.pinv(spread)
    for skip, count in zip(skips, (latents, None), strict=True):
        nn.init.zeros_(skip.bias[:count])


@torch.no_grad()
def fit_linear_paths(encoder: BaseEncoder, decoder: BaseDecoder, x: Tensor, z: Tensor) -> None:
    """Set the linear paths of an untrained encoder and decoder with shortcuts to fit given clips and latents.

    As in `init_from_block_means`, whose outer layers are taken; the skips of both heads then solve the least-squares problems
    x -> z and z -> x. x: B C 1+r*N H W, z: b c 1+N h w.
    """
    init_from_block_means(encoder, decoder)
    skips: Any = encoder.head.skip, decoder.head.skip
    pixels = rearrange(x, "b c t (h p) (w q) -> b (c p q) t h w", p=decoder.patch, q=decoder.patch)
    encoded = encoder.features(encoder.stem(x))[0]
    for skip, features, target in ((skips[0], encoded, z), (skips[1], decoder.body(z)[0], pixels)):
        weight, bias = least_squares(features, target)
        skip.weight[: len(weight), :, 0, 0, 0] = weight
        skip.bias[: len(bias)] = bias


def least_squares(features: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """B D T H W and B C T H W -> C x D weights and C biases with a small squared error and small weights (ridge regression)."""
    rows, wanted = (rearrange(part, "b c t h w -> (b t h w) c").double() for part in (features, target))
    rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
    products = rows.T @ rows
    products += RIDGE * products.diagonal().mean() * torch.eye(len(products), dtype=products.dtype, device=products.device)
    solution = torch.linalg.solve(products, rows.T @ wanted).T
    return solution[:, :-1].to(target.dtype), solution[:, -1].to(target.dtype)
