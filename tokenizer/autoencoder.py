"""The causal video autoencoder: a 4x8x8 base and the levels grown on top of it, all in one model.

Shapes: B C T H W pixels in [-1, 1], b c t h w latents. Base: MAGVIT-v2 (arXiv 2310.05737, sec. 3) with a continuous,
diagonal-Gaussian latent; growth: ProMAG (arXiv 2501.05442), see growth.py.
"""

import copy
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from math import prod
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin, get_parameter_dtype
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from promag.training.safetensors_only import SafetensorsOnly

from .base import BaseDecoder, BaseEncoder, init_from_block_means
from .geometry import SPATIAL_RATIO, check_chunk, check_frames, check_ratio
from .growth import DecoderGrowth, EncoderGrowth, Growth
from .inputs import check_latents, check_pixels, check_ratios
from .layers import START, Block, State, is_first
from .tiling import Call, Tiling, in_parts

# The settings of the base that decide what its encoder computes.
BASE_SETTINGS = (
    "in_channels",
    "latent_channels",
    "patch_size",
    "block_out_channels",
    "layers_per_block",
    "strides",
    "linear_shortcuts",
)


class _Encoding:
    """One call of the encoder: its pixels, the results so far, and the stream's state before and after.

    Results and states have the key (kind, (owner, level, rate)): features or moments of a level, computed from every
    rate-th frame by the encoder that the level `owner` trained for itself, 0 for the shared one. At 16x, level 2:

        moments  (0, 2, 1)   = key-frame moments (0, 1, 2) + residual of features (0, 2, 1)
        moments  (0, 1, 2)   = key-frame moments (0, 0, 4) + residual of features (0, 1, 2)
        moments  (0, 0, 4)   from features (0, 0, 4)
        features (0, 2, 1)   from features (0, 1, 1), the full path, and (0, 1, 2), the key frames
        features (0, 1, 1)   from features (0, 0, 1) and (0, 0, 2)
        features (0, 1, 2)   from features (0, 0, 2) and (0, 0, 4)
        features (0, 0, r)   from pixels x[:, :, ::r], for r = 1, 2, 4

    So the base runs at three frame rates and 8x at two, each once.
    """

    def __init__(self, x: Tensor, state: State):
        self.x, self.before = x, state
        self.results: dict[tuple[str, tuple[int, int, int]], Tensor] = {}
        self.state: State = None if state is None else {}

    def frames(self, rate: int) -> Tensor:
        """Return every rate-th frame: frame 0 opens a clip; a later chunk starts one frame after a multiple of the rate."""
        return self.x[:, :, (0 if is_first(self.before) else rate - 1) :: rate]

    def once(self, kind: str, place: tuple[int, int, int], compute: Callable[[State], tuple[Tensor, State]]) -> Tensor:
        """Return the result of this kind, owner, level and frame rate; `compute` is called the first time."""
        key = (kind, place)
        if key not in self.results:
            before = self.before.get(key, START) if isinstance(self.before, dict) else self.before
            self.results[key], after = compute(before)
            if self.state is not None:
                self.state[key] = after
        return self.results[key]


class AutoencoderKLProMAG(SafetensorsOnly, ModelMixin, AutoencoderMixin, ConfigMixin):
    """A causal video autoencoder whose temporal ratio was grown: one checkpoint encodes and decodes at every level.

    Args:
        in_channels: pixel channels, in [-1, 1].
        latent_channels: channels of the latent, the same at every level but twice as many at dual ones.
        patch_size: side of the pixel patches that become channels in front.
        block_out_channels: widths of the base, from fine to coarse.
        layers_per_block: residual blocks at each width, in the encoder and in the decoder.
        strides: (time, space) of each down-sampling between two widths.
        linear_shortcuts: averaging and duplicating shortcuts around resampling and linear skips around the heads; without
            them the base has MAGVIT-v2's blocks alone.
        growth: one `Growth` (as a dictionary) for each level above the base; usually left to `grow()`.

    Raises ValueError for settings that do not fit together.
    """

    # model_index.json records this name: moving this file must not break a saved pipeline
    __module__ = "promag"
    _supports_gradient_checkpointing = True
    _repeated_blocks = [block.__name__ for block in Block.__subclasses__()]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        latent_channels: int = 8,
        patch_size: int = 1,
        block_out_channels: Sequence[int] = (128, 256, 256, 512),
        layers_per_block: int = 2,
        strides: Sequence[Sequence[int]] = ((1, 2), (2, 2), (2, 2)),
        linear_shortcuts: bool = True,
        growth: Sequence[dict[str, Any]] = (),
    ):
        super().__init__()
        if len(strides) != len(block_out_channels) - 1:
            raise ValueError(f"{len(strides)} strides: {len(block_out_channels)} widths need one fewer than widths")
        if (space := patch_size * prod(s for _, s in strides)) != SPATIAL_RATIO:
            raise ValueError(f"patch_size times spatial strides is {space}: it must be {SPATIAL_RATIO}")
        base = (latent_channels, patch_size, block_out_channels, layers_per_block, strides, linear_shortcuts)
        self.encoder = BaseEncoder(in_channels, *base)
        self.decoder = BaseDecoder(in_channels, *base)
        self.base_ratio = prod(t for t, _ in strides)
        self.level_channels = [latent_channels]  # of each level's latent, lowest first
        self.encoder_growth = nn.ModuleList()
        self.decoder_growth = nn.ModuleList()
        # level -> its own copy of everything below it that encodes, or decodes, in the order in which it is called
        self.own_encoders, self.own_decoders = nn.ModuleDict(), nn.ModuleDict()
        self.use_slicing = self.use_tiling = False
        self.tiling = Tiling()
        for level in growth:
            self._add_level(Growth(**level))

    def init_from_block_means(self) -> None:
        """Set the linear paths of an untrained base so that training starts from the colour means of blocks.

        Raises ValueError without linear shortcuts.
        """
        if not self.config["linear_shortcuts"]:
            raise ValueError("init_from_block_means: this model has no linear shortcuts, so no linear paths to set")
        init_from_block_means(self.encoder, self.decoder)

    # -- memory ------------------------------------------------------------------------------------------------------

    def enable_tiling(
        self,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        tile_sample_stride_height: int | None = None,
        tile_sample_stride_width: int | None = None,
    ) -> None:
        """Encode and decode pictures larger than a tile tile by tile; sizes in pixels, None keeps what was set before.

        Raises ValueError for sizes that are no multiples of 8 and for a stride above the tile.
        """
        sizes = {
            "height": tile_sample_min_height,
            "width": tile_sample_min_width,
            "stride_height": tile_sample_stride_height,
            "stride_width": tile_sample_stride_width,
        }
        self.tiling = replace(self.tiling, **{key: size for key, size in sizes.items() if size is not None})
        self.use_tiling = True

    def set_dtypes(self, encode: torch.dtype, decode: torch.dtype) -> None:
        """Give what encodes and what decodes a floating-point type each; inputs are converted, outputs are of that type."""
        for part in (self.encoder, self.encoder_growth, self.own_encoders):
            part.to(encode)
        for part in (self.decoder, self.decoder_growth, self.own_decoders):
            part.to(decode)

    def _in_parts(self, x: Tensor, state: State, call: Call, pixels: int = 1) -> tuple[list[Tensor], State]:
        return in_parts(x, state, call, self.use_slicing, self.tiling if self.use_tiling else None, pixels)

    # -- levels ------------------------------------------------------------------------------------------------------

    @property
    def temporal_ratios(self) -> tuple[int, ...]:
        """The temporal ratios this model encodes at, lowest first."""
        return tuple(self.base_ratio * 2**i for i in range(1 + len(self.encoder_growth)))

    @property
    def temporal_compression_ratio(self) -> int:
        """The highest temporal ratio, under the name that diffusers uses."""
        return self.temporal_ratios[-1]

    @property
    def spatial_compression_ratio(self) -> int:
        """Pixels per latent position along height and width."""
        return SPATIAL_RATIO

    def grow(self, growth: Growth | None = None) -> int:
        """Add a level of twice the temporal ratio and return that ratio.

        With a key-frame path (mixing is not "none") and `birth`, the new level's latent equals, until its first training
        step, the latent of the level below on every second frame; else its head starts as the base's, whose latent the
        averaging shortcuts then blur in time. The levels below are not touched.
        """
        growth = growth or Growth()
        self._add_level(growth)
        newest: Any = self.encoder_growth[-1]
        if not newest.adds_to_key_latent and self.config["linear_shortcuts"]:
            newest.head.load_state_dict(self.encoder.head.state_dict())
        reference = next(self.encoder.parameters())
        for module in self.level_modules(self.temporal_ratios[-1]):
            module.to(reference.device, reference.dtype).train(self.training)
        self.register_to_config(growth=[*self.config["growth"], asdict(growth)])
        return self.temporal_ratios[-1]

    def _add_level(self, growth: Growth) -> None:
        width, channels = self.config["block_out_channels"][-1], self.config["latent_channels"]
        level = len(self.encoder_growth) + 1
        # Copies: the levels below keep what they have as it was.
        if growth.encoder == "finetune":
            self.own_encoders[str(level)] = nn.ModuleList(copy.deepcopy(m) for m in self.encoding_path(level - 1))
        if growth.decoder == "finetune":
            self.own_decoders[str(level)] = nn.ModuleList(copy.deepcopy(m) for m in self.decoding_path(level - 1))
        lower, upper = self.level_channels[-1], channels * (2 if growth.latent == "dual" else 1)
        if upper < lower:
            raise ValueError("growth latent 'mixed' on a dual level: its channels would not hold the level below")
        self.level_channels.append(upper)
        self.encoder_growth.append(EncoderGrowth(width, channels, growth))
        self.decoder_growth.append(DecoderGrowth(width, upper, lower, growth))

    def level_of(self, temporal_ratio: int | None) -> int:
        """Return the level (0 is the base) of a temporal ratio; None is the highest. Raises ValueError if absent."""
        if temporal_ratio is None:
            return len(self.encoder_growth)
        check_ratio(temporal_ratio, self.temporal_ratios)
        return self.temporal_ratios.index(temporal_ratio)

    def level_modules(self, temporal_ratio: int) -> list[nn.Module]:
        """Return the modules that belong to one level and to no level below: what its training stage trains."""
        level = self.level_of(temporal_ratio)
        if level == 0:
            return [self.encoder, self.decoder]
        return [self.encoder_growth[level - 1], self.decoder_growth[level - 1], *self._copies(level)]

    def inherited_modules(self, added: Sequence[int]) -> list[nn.Module]:
        """Return the modules that are not new when the levels of some ratios are: the other levels, and copies of these."""
        others = [self.level_modules(ratio) for ratio in self.temporal_ratios if ratio not in added]
        copies = [self._copies(self.level_of(ratio)) for ratio in added]
        return list(itertools.chain(*others, *copies))

    def _copies(self, level: int) -> list[nn.Module]:
        return [own[str(level)] for own in (self.own_encoders, self.own_decoders) if str(level) in own]

    def train_only(self, *temporal_ratios: int) -> list[nn.Parameter]:
        """Freeze everything but the parameters of some levels, and return those."""
        self.requires_grad_(False)
        for module in itertools.chain.from_iterable(self.level_modules(ratio) for ratio in temporal_ratios):
            module.requires_grad_(True)
        return [p for p in self.parameters() if p.requires_grad]

    def hidden_kernels(self) -> list[nn.Parameter]:
        """Return the convolution kernels that map hidden features to hidden features, not those at pixels and latents."""
        ends = [end for module in self.modules() if hasattr(module, "ends") for end in module.ends()]  # pyright: ignore
        excluded = {id(p) for end in ends for p in end.parameters()}
        convolutions = (m for m in self.modules() if isinstance(m, nn.Conv3d))
        return [p for m in convolutions for p in m.parameters() if p.ndim > 1 and id(p) not in excluded]

    def idle_heads(self, temporal_ratio: int) -> list[nn.Module]:
        """Return the lower levels' heads that encoding at a ratio does not run, because no key-frame latent starts there."""
        path: list[Any] = self.encoding_path(self.level_of(temporal_ratio))
        while path and getattr(path[-1], "adds_to_key_latent", False):
            path.pop()
        return [encoder.head for encoder in path[:-1]]

    def encoding_fingerprint(self, temporal_ratio: int) -> str:
        """Return a SHA-256 of all that decides the latents of a ratio: the configuration and weights of what encodes there.

        Growing further levels or training decoders keeps it.
        """
        level, config = self.level_of(temporal_ratio), self.config
        base = {key: config[key] for key in BASE_SETTINGS}
        growth = [asdict(replace(Growth(**grown), encoder="frozen", decoder="frozen")) for grown in config["growth"][:level]]
        digest = hashlib.sha256(json.dumps([base, growth], sort_keys=True).encode())
        for place, module in enumerate(self.encoding_path(level)):
            for name, value in sorted(module.state_dict().items()):
                digest.update(f"{place}.{name}".encode())
                digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    # -- encoding ----------------------------------------------------------------------------------------------------

    @apply_forward_hook
    def encode(
        self, x: Tensor, temporal_ratio: int | None = None, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Encode clips or images.

        Args:
            x: B C 1+r*N H W in [-1, 1]; H and W multiples of 8.
            temporal_ratio: one of `temporal_ratios`; None is the highest.

        Returns:
            `AutoencoderKLOutput` whose `latent_dist` is over b c 1+N H/8 W/8.
        Raises ValueError for an illegal shape or ratio, naming the nearest legal ones.
        """
        level = self.level_of(temporal_ratio)
        check_pixels(x, self.config["in_channels"])
        check_frames(x.shape[2], self.temporal_ratios[level])
        (moments,), _ = self._moments(x, [level], None)
        posterior = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def encode_levels(self, x: Tensor, temporal_ratios: Sequence[int]) -> list[DiagonalGaussianDistribution]:
        """Encode at several ratios at once; what the levels share is computed once. Shapes and errors as in `encode`."""
        check_ratios(temporal_ratios)
        levels = [self.level_of(ratio) for ratio in temporal_ratios]
        check_pixels(x, self.config["in_channels"])
        check_frames(x.shape[2], max(temporal_ratios))
        return [DiagonalGaussianDistribution(m) for m in self._moments(x, levels, None)[0]]

    @apply_forward_hook
    def encode_chunk(
        self, x: Tensor, state: State = START, temporal_ratio: int | None = None
    ) -> tuple[DiagonalGaussianDistribution, State]:
        """Encode the next chunk of a stream: 1+r*N frames first (`state=START`), then multiples of r.

        Returns the posterior of the chunk's latent frames and the state for the next call; the chunks together equal
        `encode` of the whole.
        """
        level = self.level_of(temporal_ratio)
        check_pixels(x, self.config["in_channels"])
        (check_frames if is_first(state) else check_chunk)(x.shape[2], self.temporal_ratios[level])
        (moments,), state = self._moments(x, [level], state)
        return DiagonalGaussianDistribution(moments), state

    def _moments(self, x: Tensor, levels: Sequence[int], state: State) -> tuple[list[Tensor], State]:
        """Moments of `x` at each of `levels`; those and the features of each (level, frame rate) are computed once."""

        def encode(part: Tensor, state: State) -> tuple[list[Tensor], State]:
            call = _Encoding(self._as(self.encoder, part), state)
            return [self._moments_at(level, level, 1, call) for level in levels], call.state

        return self._in_parts(x, state, encode)

    def encoding_path(self, level: int) -> list[nn.Module]:
        """The modules from pixels up to a level's latent; a level that fine-tuned what is below it uses its copy."""
        return [self._encoder_at(i, level)[1] for i in range(level + 1)]

    def _encoder_at(self, level: int, top: int) -> tuple[int, Any]:
        """Return whose copy of a level's encoder is used on the way up to the level `top` (0: the shared one), and it."""
        for owner in range(top, level, -1):
            if str(owner) in self.own_encoders:
                copies: Any = self.own_encoders[str(owner)]
                return owner, copies[level]
        return 0, self.encoder_growth[level - 1] if level else self.encoder

    def _features_at(self, level: int, top: int, rate: int, call: "_Encoding") -> Tensor:
        owner, encoder = self._encoder_at(level, top)
        if level == 0:
            return call.once("features", (owner, 0, rate), lambda s: encoder.features(call.frames(rate), s))
        full = self._features_at(level - 1, top, rate, call)
        key = self._features_at(level - 1, top, 2 * rate, call) if encoder.uses_key_frames else None
        return call.once("features", (owner, level, rate), lambda s: encoder.features(full, key, s))

    def _moments_at(self, level: int, top: int, rate: int, call: "_Encoding") -> Tensor:
        owner, encoder = self._encoder_at(level, top)
        features = self._features_at(level, top, rate, call)
        if level == 0:
            return call.once("moments", (owner, 0, rate), lambda s: encoder.head(features, s))
        below = self._moments_at(level - 1, top, 2 * rate, call) if encoder.adds_to_key_latent else None
        return call.once("moments", (owner, level, rate), lambda s: encoder.moments(features, below, s))

    # -- decoding ----------------------------------------------------------------------------------------------------

    @apply_forward_hook
    def decode(self, z: Tensor, temporal_ratio: int | None = None, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Decode latents b c 1+N h w of one level to clips B C 1+r*N 8h 8w, about in [-1, 1]."""
        level = self.level_of(temporal_ratio)
        check_latents(z, self.level_channels[level])
        x, _ = self._decode(z, level, None)
        return DecoderOutput(sample=x) if return_dict else (x,)

    @apply_forward_hook
    def decode_chunk(self, z: Tensor, state: State = START, temporal_ratio: int | None = None) -> tuple[Tensor, State]:
        """Decode the next latent frames of a stream (`state=START` first); the chunks together equal `decode`."""
        level = self.level_of(temporal_ratio)
        check_latents(z, self.level_channels[level])
        return self._decode(z, level, state)

    @apply_forward_hook
    def lift(self, z: Tensor, temporal_ratio: int, to_ratio: int) -> Tensor:
        """Estimate the latent of a lower ratio from a higher one, without pixels: b c 1+N h w -> b c 1+N*r/r' h w."""
        level, low = self.level_of(temporal_ratio), self.level_of(to_ratio)
        if low > level:
            raise ValueError(f"lift from {temporal_ratio}x to {to_ratio}x: the target must be the lower ratio")
        check_latents(z, self.level_channels[level])
        return self._run(z, [self.decoder_growth[i - 1] for i in range(level, low, -1)], None)[0] if low < level else z

    def _decode(self, z: Tensor, level: int, state: State) -> tuple[Tensor, State]:
        return self._run(z, self.decoding_path(level), state)

    def _run(self, z: Tensor, path: Sequence[nn.Module], state: State) -> tuple[Tensor, State]:
        """Call the modules of a path one after the other on latents, part by part."""

        def run(part: Tensor, state: State) -> tuple[list[Tensor], State]:
            states = list(state or (state,) * len(path))
            for i, module in enumerate(path):
                part, states[i] = module(self._as(module, part), states[i])
            return [part], None if state is None else tuple(states)

        (x,), state = self._in_parts(z, state, run, SPATIAL_RATIO)
        return x, state

    def decoding_path(self, level: int) -> list[nn.Module]:
        """The modules from a level's latent down to pixels; a level that fine-tuned what is below it uses its copy."""
        if level == 0:
            return [self.decoder]
        own: Any = dict(self.own_decoders).get(str(level))
        return [self.decoder_growth[level - 1], *(self.decoding_path(level - 1) if own is None else own)]

    def _as(self, module: nn.Module, x: Tensor) -> Tensor:
        """Convert an input to a module's type; under autocast, which tensors without data do not know, it decides instead."""
        autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
        return x if autocast else x.to(get_parameter_dtype(module))

    def forward(
        self,
        sample: Tensor,
        temporal_ratio: int | None = None,
        sample_posterior: bool = False,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> DecoderOutput | tuple[Tensor]:
        """Encode and decode: B C 1+r*N H W in [-1, 1] to the same."""
        posterior = self.encode(sample, temporal_ratio).latent_dist  # pyright: ignore
        z = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(z, temporal_ratio, return_dict)


def parameter_count(modules: Iterable[nn.Module]) -> int:
    """Return how many parameters the modules hold."""
    return sum(p.numel() for module in modules for p in module.parameters())
