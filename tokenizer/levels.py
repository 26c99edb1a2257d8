"""What belongs to each level of an autoencoder: its start, the weights that a stage trains, and what decides its latents."""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor, nn

from .base import BASE_SETTINGS
from .geometry import check_ratio
from .growth import DecoderGrowth, FrameGrowth, Growth, LatentScale
from .inputs import check_ratios
from .layers import Handed, State


class Levels:
    """The part of an autoencoder that knows whose weights are whose, and what a new level starts from."""

    existing: Any
    config: Any
    own_config: Any
    encoder: nn.Module
    decoder: Any
    encoder_growth: nn.ModuleList
    decoder_growth: nn.ModuleList
    own_encoders: nn.ModuleDict
    own_decoders: nn.ModuleDict
    temporal_ratios: tuple[int, ...]
    level_channels: list[int]
    level_widths: list[int | None]
    base_ratio: int
    spatial_ratio: int
    served: int | None
    encoding_path: Any
    _encoder_at: Any
    modules: Any
    parameters: Any
    requires_grad_: Any

    def level_of(self, temporal_ratio: int | None) -> int:
        """Return the level (0 is the base) of a temporal ratio; None is the one that is served. Raises ValueError if absent."""
        if temporal_ratio is None:
            return len(self.encoder_growth) if self.served is None else self.temporal_ratios.index(self.served)
        check_ratio(temporal_ratio, self.temporal_ratios)
        return self.temporal_ratios.index(temporal_ratio)

    def lifts(self, temporal_ratio: int) -> tuple[int, ...]:
        """Return the lower ratios whose latent `lift` estimates from one of a ratio."""
        levels: list[Any] = list(self.decoder_growth)
        level = self.level_of(temporal_ratio)
        passed = [[own.hand_over for own in levels[low:level]] for low in range(level)]
        kept = [low for low, kinds in enumerate(passed) if kinds[0] != "wide" and "frames" not in kinds]
        return tuple(self.temporal_ratios[low] for low in kept)

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
        """Return the convolution kernels that map hidden features to hidden features, not those at pixels and latents.

        A projection of an existing autoencoder's latents, which levels grown on it begin with, counts as hidden.
        """
        ends = [end for module in self.modules() if hasattr(module, "ends") for end in module.ends()]  # pyright: ignore
        excluded = {id(p) for end in ends for p in end.parameters()}
        convolutions = (m for m in self.modules() if isinstance(m, nn.Conv2d | nn.Conv3d))
        return [p for m in convolutions for p in m.parameters() if p.ndim > 1 and id(p) not in excluded]

    def idle_heads(self, temporal_ratio: int) -> list[nn.Module]:
        """Return the lower levels' heads that encoding at a ratio does not run, because no key-frame latent starts there."""
        path: list[Any] = self.encoding_path(self.level_of(temporal_ratio))
        while path and getattr(path[-1], "adds_to_key_latent", False):
            path.pop()
        return [encoder.head for encoder in path[:-1]]

    def check_takes_base_latents(self, temporal_ratios: Sequence[int]) -> None:
        """Raise ValueError unless encoding at some ratios can start from the base's latents instead of pixels."""
        if self.existing is None or self.existing.features != "latents":
            raise ValueError("base latents: the levels see more of the base than its latents")
        check_ratios(temporal_ratios)
        for ratio in temporal_ratios:
            owner, _ = self._encoder_at(0, self.level_of(ratio))
            if owner:
                raise ValueError(
                    f"base latents: {ratio}x encodes with the copy of the base that {self.temporal_ratios[owner]}x has "
                    "(growth encoder 'finetune')"
                )

    def _head_to_start_from(self, growth: Growth, width: int) -> nn.Module:
        """Return the head of the level below; raises ValueError where it cannot read what a level adds at feature width."""
        encoders: list[Any] = [self.encoder, *self.encoder_growth]
        if self.existing or width != self.level_widths[-1]:
            raise ValueError(f"growth sum_at 'features' with width {width}: needs our own base and its width; use moments")
        if len(encoders) > 1 and encoders[-1].join is None and growth.latent != "dual":
            raise ValueError("growth sum_at 'features' on a level with sum_at 'moments': its head makes a residual alone")
        return encoders[-1].head

    def _new_decoder(self, growth: Growth, width: int, channels: int, scale: LatentScale | None) -> nn.Module:
        """Return the decoder of a new level whose latent has so many channels."""
        if growth.hand_over == "frames":
            pixels = (3 if self.existing else self.config["in_channels"], self.base_ratio, self.spatial_ratio)
            return FrameGrowth(width, channels, 1 + len(self.decoder_growth), pixels, growth, scale)
        place = (None, None) if growth.hand_over == "latent" else self._place_behind_conv_in(growth, width, channels)
        return DecoderGrowth(width, channels, self.level_channels[-1], growth, scale, *place)

    def _place_behind_conv_in(self, growth: Growth, width: int, channels: int) -> tuple[int, nn.Module | None]:
        """Return the channels behind the first convolution of the decoder below, and what a new one may begin with."""
        lower: Any = self.decoder_growth[-1] if self.decoder_growth else self.decoder
        if getattr(lower, "hand_over", None) == "frames":
            raise ValueError(f"growth hand_over {growth.hand_over!r} on a level with 'frames', which needs a latent")
        if growth.hand_over == "wide":
            if self.existing or width != self.level_widths[-1]:
                raise ValueError(
                    f"growth hand_over 'wide' with width {width}: needs our own base and its width; use both or latent"
                )
            if self.decoder_growth and lower.hand_over != "wide":
                raise ValueError(f"growth hand_over 'wide' on a level with {lower.hand_over!r}, which needs a latent; use both")
        if self.existing and not self.decoder_growth:
            return lower.wide_channels(), None
        conv_in = lower.conv_in if self.decoder_growth else lower.body[0]
        begin = conv_in if growth.hand_over == "wide" and conv_in.in_channels == channels else None
        return conv_in.out_channels, begin

    def encoding_fingerprint(self, temporal_ratio: int) -> str:
        """Return a SHA-256 of all that decides the latents of a ratio: the configuration and weights of what encodes there.

        Growing further levels or training decoders keeps it.
        """
        level, config = self.level_of(temporal_ratio), self.own_config
        base = self.existing.encoding_settings(level) if self.existing else {key: config[key] for key in BASE_SETTINGS}
        base = {key: value for key, value in base.items() if value is not None and (key, value) != ("framewise", 0)}
        growth = [asdict(replace(Growth(**grown), encoder="frozen", decoder="frozen")) for grown in config["growth"][:level]]
        for grown in growth:
            del grown["hand_over"]
            for name in ("width", "sum_at"):  # which earlier versions did not know
                if grown[name] == getattr(Growth, name):
                    del grown[name]
        digest = hashlib.sha256(json.dumps([base, growth], sort_keys=True).encode())
        for place, module in enumerate(self.encoding_path(level)):
            for name, value in sorted(module.state_dict().items()):
                digest.update(f"{place}.{name}".encode())
                digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def run_decoders(
    path: Sequence[Any], handed: Handed, states: list[State], convert: Callable[[nn.Module, Tensor], Tensor]
) -> Handed:
    """Call the modules from a latent down to pixels, or to a lower latent, each with its state, which is replaced.

    `convert` casts the input of a module to the module's type.
    """
    for i, module in enumerate(path):
        z, features = (None if part is None else convert(module, part) for part in handed)
        if isinstance(module, FrameGrowth) and z is not None:
            below = states[i + 1 :]
            frames, _ = run_decoders(path[i + 1 :], (z, None), below, convert)
            states[i + 1 :] = below
            x, states[i] = module(z, frames, states[i])  # pyright: ignore[reportArgumentType]
            return x, None
        handed, states[i] = module((z, features), states[i])
    return handed


def parameter_count(modules: Iterable[nn.Module]) -> int:
    """Return how many parameters the modules hold."""
    return sum(p.numel() for module in modules for p in module.parameters())
