"""The causal video autoencoder: a 4x8x8 base and the levels grown on top of it, all in one model.

Shapes: B C T H W pixels in [-1, 1], b c t h w latents. Base: MAGVIT-v2 (arXiv 2310.05737, sec. 3) with a continuous,
diagonal-Gaussian latent; growth: ProMAG (arXiv 2501.05442), see growth.py.
"""

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin, get_parameter_dtype
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from promag.training.safetensors_only import SafetensorsOnly

from .base import INITIAL_LOGVAR, BaseConfig, BaseDecoder, BaseEncoder, init_from_block_means
from .encoding import Encoding
from .existing import (
    Existing,
    ExistingDecoder,
    ExistingEncoder,
    Features,
    OnExisting,
    cached_features,
    describe,
    halves,
    joined,
    load_existing,
)
from .geometry import check_chunk, check_frames, check_ratio
from .growth import EncoderGrowth, Growth, Projection
from .growth_file import read_growth, write_growth
from .inputs import check_latents, check_pixels, check_ratios
from .layers import START, Block, State, is_first
from .levels import Levels, run_decoders
from .tiling import TiledModel, Tiling

EXISTING_WIDTH = 192  # channels of a level's blocks on an existing autoencoder: a level takes some 12 M parameters


class AutoencoderKLProMAG(OnExisting, Levels, TiledModel, SafetensorsOnly, ModelMixin, AutoencoderMixin, ConfigMixin):
    """A causal video autoencoder whose temporal ratio was grown: one checkpoint encodes and decodes at every level.

    Args:
        in_channels: pixel channels, in [-1, 1].
        latent_channels, patch_size, block_out_channels, layers_per_block, strides, linear_shortcuts, framewise: those of
            `BaseConfig`.
        growth: one `Growth` (as a dictionary) for each level above the base; usually left to `grow()`.
        existing: an `Existing` (as a dictionary): the base is an autoencoder of diffusers, and all settings above but `growth`
            are without effect; usually left to `from_base()`.
        entries: what the pipelines of another autoencoder's family read from its configuration, for a model that takes its
            place.

    Raises ValueError for settings that do not fit together.
    """

    # model_index.json records this name: moving this file must not break a saved pipeline
    __module__ = "promag"
    _supports_gradient_checkpointing = True
    _repeated_blocks = [block.__name__ for block in Block.__subclasses__()]  # noqa: RUF012

    encoder: Any
    decoder: Any

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
        framewise: int = 0,
        growth: Sequence[dict[str, Any]] = (),
        existing: dict[str, Any] | None = None,
        entries: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.existing = None if existing is None else Existing(**existing)
        self.base_path: str | None = None  # the folder of an existing autoencoder
        self.served: int | None = None  # the ratio that None stands for; None: the highest
        if self.existing is None:
            base = BaseConfig(
                latent_channels=latent_channels,
                patch_size=patch_size,
                block_out_channels=tuple(block_out_channels),
                layers_per_block=layers_per_block,
                strides=tuple((time, space) for time, space in strides),
                linear_shortcuts=linear_shortcuts,
                framewise=framewise,
            )
            self.encoder, self.decoder = BaseEncoder(in_channels, base), BaseDecoder(in_channels, base)
            self.base_ratio, self.spatial_ratio = base.temporal_ratio, base.spatial_ratio
            self.latent_step, self.latent_channels, width = 1, latent_channels, block_out_channels[-1]
        else:
            self._split(self.existing.build(), self.existing)
            self.base_ratio, self.spatial_ratio = self.existing.temporal_ratio, self.existing.spatial_ratio
            self.latent_step, self.latent_channels, width = self.existing.latent_step, self.existing.latent_channels, None
        self.level_channels = [self.latent_channels]  # channels of each level's latent, lowest first
        self.level_widths = [width]  # channels of each level's features; None for those of an existing autoencoder
        self.encoder_growth, self.decoder_growth = nn.ModuleList(), nn.ModuleList()
        # level -> its own copy of everything below it that encodes, or decodes, in the order in which it is called
        self.own_encoders, self.own_decoders = nn.ModuleDict(), nn.ModuleDict()
        self.use_slicing, self.use_tiling, self.tiling = False, False, Tiling()
        for level in growth:
            self._add_level(Growth(**level))

    def _split(self, model: Any, existing: Existing) -> None:
        """Take an autoencoder of diffusers as the base."""
        encoding, decoding = halves(model)
        self.encoder, self.decoder = ExistingEncoder(encoding, existing), ExistingDecoder(decoding, existing)

    @classmethod
    def from_base(cls, base: Any, features: Features = "latents") -> "AutoencoderKLProMAG":
        """Take a causal video autoencoder of diffusers as the base: its latents and videos stay as they are, to the bit.

        Args:
            base: an AutoencoderKLWan or another one, or the folder of one; its weights are shared, not copied. Where it
                works by tiles or clip by clip, so does this model.
            features: what growth sees of it: its latents, which can be cached, or also what its encoder's last layer sees.

        Raises ValueError where 1 + r*N frames do not become 1 + N latent frames, and UserError for a folder without one.
        """
        path = None if isinstance(base, nn.Module) else os.path.abspath(base)
        base = base if path is None else load_existing(path)
        existing = describe(base, features)
        with torch.device("meta"):
            model = cls(existing=asdict(existing))
        model._split(base, existing)
        model.use_tiling, model.use_slicing = (getattr(base, name, False) for name in ("use_tiling", "use_slicing"))
        model.base_path = path
        return model.train(base.training)

    def base_model(self) -> Any:
        """Return the base as the class of diffusers that it is, its weights shared; raises ValueError for our own base."""
        if self.existing is None:
            raise ValueError("base_model: the base is this project's own, which no class of diffusers is for")
        return joined(self.existing, self.encoder, self.decoder)

    def save_growth(self, folder: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
        """Save what was grown, and of the base only class, configuration and fingerprint: a few to some tens of MB.

        Args:
            folder: gets growth.json and growth.safetensors.
            dtype: type in which the weights are saved; None for their own.

        Raises ValueError before anything was grown.
        """
        write_growth(self, Path(folder), dtype)

    @classmethod
    def load_growth(cls, folder: str | os.PathLike, base: Any = None) -> "AutoencoderKLProMAG":
        """Load what `save_growth` saved, on its base: an autoencoder or its folder.

        None is the folder that it was grown from, which is recorded where `from_base` loaded that. Raises UserError for a base
        that is not recorded, for another one than it was trained on, by name, and for a damaged folder.
        """
        return read_growth(cls, Path(folder), base)

    @property
    def config(self) -> Any:
        """The configuration, with what the pipelines of an existing autoencoder's family read from it."""
        own = self.own_config
        if not (stated := self.family_entries()):
            return own
        ratios = {
            **dict.fromkeys(("scale_factor_temporal", "temporal_compression_ratio"), self.temporal_ratios[self.level_of(None)]),
            **dict.fromkeys(("scale_factor_spatial", "spatial_compression_ratio"), self.spatial_ratio),
        }
        return FrozenDict({**own, **stated, **ratios, "latent_channels": self.latent_channels})

    def init_from_block_means(self) -> None:
        """Set the linear paths of an untrained base so that training starts from the colour means of blocks.

        Raises ValueError without linear shortcuts.
        """
        if self.existing or not self.config["linear_shortcuts"]:
            raise ValueError("init_from_block_means: this model has no linear shortcuts, so no linear paths to set")
        init_from_block_means(self.encoder, self.decoder)

    # -- levels ------------------------------------------------------------------------------------------------------

    @property
    def temporal_ratios(self) -> tuple[int, ...]:
        """The temporal ratios this model encodes at, lowest first."""
        return tuple(self.base_ratio * 2**i for i in range(1 + len(self.encoder_growth)))

    @property
    def temporal_compression_ratio(self) -> int:
        """The temporal ratio that is used where none is named, under the name that diffusers uses."""
        return self.temporal_ratios[self.level_of(None)]

    @property
    def spatial_compression_ratio(self) -> int:
        """Pixels per latent position along height and width."""
        return self.spatial_ratio

    def serve(self, temporal_ratio: int | None) -> "AutoencoderKLProMAG":
        """Let None stand for this ratio in all calls, as pipelines of other families make them; None for the highest again."""
        if temporal_ratio is not None:
            check_ratio(temporal_ratio, self.temporal_ratios)
        self.served = temporal_ratio
        return self

    def grow(self, growth: Growth | None = None) -> int:
        """Add a level of twice the temporal ratio and return that ratio.

        With a key-frame path (mixing is not "none") and `birth`, the new level's latent equals, until its first training
        step, the latent of the level below on every second frame; else its head starts as the base's, whose latent the
        averaging shortcuts then blur in time; a head of another width, or without those shortcuts, starts at random with low
        variance. The levels below are not touched. Raises ValueError for a growth that does not fit them, and then leaves the
        model as it was.
        """
        growth = growth or Growth()
        self._add_level(growth)
        newest: Any = self.encoder_growth[-1]
        if newest.join is not None:
            pass  # begins with the head of the level below
        elif not newest.adds_to_key_latent:
            same_width = self.level_widths[-1] == self.level_widths[0]  # never on an existing base
            if same_width and self.config["linear_shortcuts"]:
                newest.head.load_state_dict(self.encoder.head.state_dict())
            else:
                newest.head.start_at(slice(self.latent_channels, None), INITIAL_LOGVAR)
        reference = next(self.encoder.parameters())
        for module in self.level_modules(self.temporal_ratios[-1]):
            module.to(reference.device, reference.dtype).train(self.training)
        self.register_to_config(growth=[*self.config["growth"], asdict(growth)])
        return self.temporal_ratios[-1]

    def _add_level(self, growth: Growth) -> None:
        level = len(self.encoder_growth) + 1
        channels, lower = self.latent_channels, self.level_channels[-1]
        upper = channels * (2 if growth.latent == "dual" else 1)
        if upper < lower:
            raise ValueError("growth latent 'mixed' on a dual level: its channels would not hold the level below")
        below = self.level_widths[-1]
        width = growth.width or below or EXISTING_WIDTH
        # Each half has its own copy: `set_dtypes` may give them different types.
        scale = self.existing.scale() if self.existing else None
        decoder_scale = self.existing.scale() if self.existing else None
        project = None
        if below is None and self.existing and scale:
            project = Projection(channels + self.existing.feature_channels, width, scale)
        elif below and below != width:
            project = Projection(below, width)
        head = self._head_to_start_from(growth, width) if growth.sum_at == "features" else None
        decoder = self._new_decoder(growth, width, upper, decoder_scale)
        encoder = EncoderGrowth(width, channels, growth, project, scale, head)
        # Copies: the levels below keep what they have as it was.
        if growth.encoder == "finetune":
            self.own_encoders[str(level)] = nn.ModuleList(copy.deepcopy(m) for m in self.encoding_path(level - 1))
        if growth.decoder == "finetune":
            self.own_decoders[str(level)] = nn.ModuleList(copy.deepcopy(m) for m in self.decoding_path(level - 1))
        self.level_channels.append(upper)
        self.level_widths.append(width)
        self.encoder_growth.append(encoder)
        self.decoder_growth.append(decoder)

    def set_dtypes(self, encode: torch.dtype, decode: torch.dtype) -> None:
        """Give what encodes and what decodes a floating-point type each; inputs are converted, outputs are of that type."""
        for part in (self.encoder, self.encoder_growth, self.own_encoders):
            part.to(encode)
        for part in (self.decoder, self.decoder_growth, self.own_decoders):
            part.to(decode)

    # -- encoding ----------------------------------------------------------------------------------------------------

    @apply_forward_hook
    def encode(
        self, x: Tensor, temporal_ratio: int | None = None, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Encode clips or images.

        Args:
            x: B C 1+r*N H W in [-1, 1]; H and W multiples of s = `spatial_ratio`.
            temporal_ratio: one of `temporal_ratios`; None is the one that `serve` set, else the highest.

        Returns:
            `AutoencoderKLOutput` whose `latent_dist` is over b c 1+N H/s W/s.
        Raises ValueError for an illegal shape or ratio, naming the nearest legal ones.
        """
        level = self.level_of(temporal_ratio)
        self._check_pixels(x)
        check_frames(x.shape[2], self.temporal_ratios[level], self.latent_step)
        (moments,), _ = self._moments(x, [level], None)
        posterior = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def encode_levels(self, x: Tensor, temporal_ratios: Sequence[int]) -> list[DiagonalGaussianDistribution]:
        """Encode at several ratios at once; what the levels share is computed once. Shapes and errors as in `encode`."""
        check_ratios(temporal_ratios)
        levels = [self.level_of(ratio) for ratio in temporal_ratios]
        self._check_pixels(x)
        check_frames(x.shape[2], max(temporal_ratios), self.latent_step)
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
        self._check_pixels(x)
        check = check_frames if is_first(state) else check_chunk
        check(x.shape[2], self.temporal_ratios[level], self.latent_step)
        (moments,), state = self._moments(x, [level], state, f"encode_chunk at {self.temporal_ratios[level]}x")
        return DiagonalGaussianDistribution(moments), state

    def encode_base_latents(
        self, latents: Mapping[int, Tensor], temporal_ratios: Sequence[int]
    ) -> list[DiagonalGaussianDistribution]:
        """Encode at several ratios from the base's latents instead of pixels.

        Args:
            latents: by frame rate r = 1, 2, 4, ... the base's latents of x[:, :, ::r], b c t h w.
            temporal_ratios: as in `encode_levels`.

        The means are as from pixels, deviations are not. Raises ValueError where growth sees more of the base than its latents
        or a level trained its own copy of the base, and for a missing frame rate.
        """
        self.check_takes_base_latents(temporal_ratios)
        call = Encoding(None, None)
        for rate, features in cached_features(latents):
            for kind in ("features", "moments"):
                call.results[kind, (0, 0, rate)] = features
        levels = [self.level_of(ratio) for ratio in temporal_ratios]
        return [DiagonalGaussianDistribution(self._moments_at(level, level, 1, call)) for level in levels]

    def _check_pixels(self, x: Tensor) -> None:
        check_pixels(x, 3 if self.existing else self.config["in_channels"], self.spatial_ratio)

    def _moments(self, x: Tensor, levels: Sequence[int], state: State, kind: str = "") -> tuple[list[Tensor], State]:
        """Moments of `x` at each of `levels`; those and the features of each (level, frame rate) are computed once."""

        def encode(part: Tensor, state: State) -> tuple[list[Tensor], State]:
            call = Encoding(self._as(self.encoder, part), state)
            return [self._moments_at(level, level, 1, call) for level in levels], call.state

        return self._in_parts(x, state, encode, kind=kind)

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

    def _features_at(self, level: int, top: int, rate: int, call: Encoding) -> Tensor:
        owner, encoder = self._encoder_at(level, top)
        if level == 0:
            make = lambda s: encoder.features(call.frames(rate, owner, encoder.stem), s)  # noqa: E731
            return call.once("features", (owner, 0, rate), make)
        full = self._features_at(level - 1, top, rate, call)
        key = self._features_at(level - 1, top, 2 * rate, call) if encoder.uses_key_frames else None
        return call.once("features", (owner, level, rate), lambda s: encoder.features(full, key, s))

    def _moments_at(self, level: int, top: int, rate: int, call: Encoding) -> Tensor:
        owner, encoder = self._encoder_at(level, top)
        features = self._features_at(level, top, rate, call)
        if level == 0:
            return call.once("moments", (owner, 0, rate), lambda s: encoder.head(features, s))
        below = self._moments_at(level - 1, top, 2 * rate, call) if encoder.adds_to_key_latent else None
        return call.once("moments", (owner, level, rate), lambda s: encoder.moments(features, below, s))

    # -- decoding ----------------------------------------------------------------------------------------------------

    @apply_forward_hook
    def decode(self, z: Tensor, temporal_ratio: int | None = None, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Decode latents b c 1+N h w of one level to clips B C 1+r*N s*h s*w, s = `spatial_ratio`, about in [-1, 1]."""
        level = self.level_of(temporal_ratio)
        check_latents(z, self.level_channels[level])
        x, _ = self._run(z, self.decoding_path(level), None)
        return DecoderOutput(sample=x) if return_dict else (x,)

    @apply_forward_hook
    def decode_chunk(self, z: Tensor, state: State = START, temporal_ratio: int | None = None) -> tuple[Tensor, State]:
        """Decode the next latent frames of a stream (`state=START` first); the chunks together equal `decode`."""
        level = self.level_of(temporal_ratio)
        check_latents(z, self.level_channels[level])
        return self._run(z, self.decoding_path(level), state, f"decode_chunk at {self.temporal_ratios[level]}x")

    @apply_forward_hook
    def lift(self, z: Tensor, temporal_ratio: int, to_ratio: int) -> Tensor:
        """Estimate the latent of a lower ratio from a higher one, without pixels: b c 1+N h w -> b c 1+N*r/r' h w."""
        level, low = self.level_of(temporal_ratio), self.level_of(to_ratio)
        if low > level:
            raise ValueError(f"lift from {temporal_ratio}x to {to_ratio}x: the target must be the lower ratio")
        check_latents(z, self.level_channels[level])
        if low == level:
            return z
        if to_ratio not in self.lifts(temporal_ratio):
            raise ValueError(f"lift from {temporal_ratio}x to {to_ratio}x: these levels hand over no latent")
        return self._run(z, [self.decoder_growth[i - 1] for i in range(level, low, -1)], None)[0]

    def _run(self, z: Tensor, path: Sequence[nn.Module], state: State, kind: str = "") -> tuple[Tensor, State]:
        """Call the modules of a path one after the other on latents, part by part."""

        def run(part: Tensor, state: State) -> tuple[list[Tensor], State]:
            states = list(state or (state,) * len(path))
            x: Any = run_decoders(path, (part, None), states, self._as)[0]
            return [x], None if state is None else tuple(states)

        (x,), state = self._in_parts(z, state, run, self.spatial_ratio, kind)
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
