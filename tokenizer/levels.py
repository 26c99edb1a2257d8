"""What belongs to each level of an autoencoder: which weights a stage trains, and what decides a level's latents."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import nn

from .growth import Growth

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


class Levels:
    """The part of an autoencoder that knows whose weights are whose."""

    existing: Any
    config: Any
    encoder: nn.Module
    decoder: nn.Module
    encoder_growth: nn.ModuleList
    decoder_growth: nn.ModuleList
    own_encoders: nn.ModuleDict
    own_decoders: nn.ModuleDict
    temporal_ratios: tuple[int, ...]
    level_of: Any
    encoding_path: Any
    modules: Any
    parameters: Any
    requires_grad_: Any

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
        convolutions = (m for m in self.modules() if isinstance(m, nn.Conv2d | nn.Conv3d))
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
        existing = asdict(self.existing) if self.existing else {key: config[key] for key in BASE_SETTINGS}
        base = {key: value for key, value in existing.items() if value is not None}
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


def parameter_count(modules: Iterable[nn.Module]) -> int:
    """Return how many parameters the modules hold."""
    return sum(p.numel() for module in modules for p in module.parameters())
