"""Other video autoencoders of diffusers behind the interface that our training and evaluation use, for comparisons."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor, nn

from .geometry import check_frames, check_ratio

# What diffusers' video autoencoders call their convolutions at pixels and latents.
ENDS = {"conv_in", "conv_out", "quant_conv", "post_quant_conv"}


class PeerAutoencoder(nn.Module):
    """A causal video autoencoder of diffusers with one temporal ratio: 1 + ratio*N frames to 1 + N latent frames.

    Args:
        model: an AutoencoderKLWan or another one whose `encode` gives a `latent_dist` and whose `decode` gives a `sample`.
        temporal_ratio: pixel frames per latent frame; None asks the model.

    Raises ValueError where the ratio is unknown.
    """

    def __init__(self, model: Any, temporal_ratio: int | None = None):
        super().__init__()
        self.model = model
        known = temporal_ratio or model.config.get("scale_factor_temporal") or model.config.get("temporal_compression_ratio")
        if not known:
            raise ValueError(f"{type(model).__name__}: its temporal ratio is not in its config; give temporal_ratio")
        self.temporal_ratios = (int(known),)

    @property
    def config(self) -> Any:
        """The model's own configuration."""
        return self.model.config

    @property
    def device(self) -> Any:
        """Where the weights are."""
        return self.model.device

    @property
    def dtype(self) -> Any:
        """Of the weights."""
        return self.model.dtype

    def train_only(self, *temporal_ratios: int) -> list[nn.Parameter]:
        """Make every weight trainable: a peer has one level."""
        for ratio in temporal_ratios:
            check_ratio(ratio, self.temporal_ratios)
        self.requires_grad_(True)
        return list(self.parameters())

    def inherited_modules(self, added: Sequence[int]) -> list[nn.Module]:
        """Return nothing: the one level of a peer starts from no other."""
        return []

    def enable_gradient_checkpointing(self) -> None:
        """Let the model compute blocks again in the backward pass; raises ValueError where it cannot."""
        self.model.enable_gradient_checkpointing()

    def hidden_kernels(self) -> list[nn.Parameter]:
        """Return the 2D and 3D kernels that map hidden features to hidden features, not those at pixels and latents."""
        convolutions = ((n, m) for n, m in self.named_modules() if isinstance(m, nn.Conv2d | nn.Conv3d))
        hidden = (m for name, m in convolutions if ENDS.isdisjoint(name.split(".")))
        return [p for m in hidden for p in m.parameters() if p.ndim > 1]

    def encode(self, x: Tensor, temporal_ratio: int | None = None) -> AutoencoderKLOutput:
        """B C 1+r*N H W in [-1, 1] -> the posterior over b c 1+N h w."""
        check_frames(x.shape[2], self._ratio(temporal_ratio))
        return self.model.encode(x)

    def decode(self, z: Tensor, temporal_ratio: int | None = None) -> DecoderOutput:
        """b c 1+N h w -> B C 1+r*N H W."""
        self._ratio(temporal_ratio)
        return self.model.decode(z)

    def forward(self, x: Tensor, temporal_ratio: int | None = None) -> DecoderOutput:
        """Encode and decode the posterior's mean."""
        return self.decode(self.encode(x, temporal_ratio).latent_dist.mode(), temporal_ratio)

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the model as diffusers does."""
        self.model.save_pretrained(folder)

    def _ratio(self, temporal_ratio: int | None) -> int:
        if temporal_ratio is not None:
            check_ratio(temporal_ratio, self.temporal_ratios)
        return self.temporal_ratios[0]


def build_peer(name: str, config: dict[str, Any]) -> PeerAutoencoder:
    """Build an untrained peer from the name of its class in diffusers; raises ValueError for an unknown one."""
    return PeerAutoencoder(_class(name)(**config))


def load_peer(name: str, folder: str | Path) -> PeerAutoencoder:
    """Load a peer that `save_pretrained` saved, for inference."""
    return PeerAutoencoder(_class(name).from_pretrained(folder)).eval()


def _class(name: str) -> Any:
    found = getattr(diffusers, name, None) if name.startswith("AutoencoderKL") else None
    if found is None:
        raise ValueError(f"peer {name!r}: diffusers {diffusers.__version__} has no autoencoder of that name")
    return found
