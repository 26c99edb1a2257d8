"""Other video autoencoders of diffusers behind the interface that our training and evaluation use, for comparisons."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor, nn

from promag.tokenizer.geometry import check_frames, check_ratio
from promag.training.config import one_line
from promag.training.safetensors_only import check_files, read_mapping

PROBE = 64  # pixels: height and width of the clip by which a loaded autoencoder's arithmetic is learned
# What diffusers' video autoencoders call their convolutions at pixels and latents.
ENDS = {"conv_in", "conv_out", "quant_conv", "post_quant_conv"}


class BaselineAutoencoder(nn.Module):
    """A causal video autoencoder of diffusers with one temporal ratio: 1 + ratio*N frames to 1 + N latent frames.

    Args:
        model: an AutoencoderKLWan or another one whose `encode` gives a `latent_dist` and whose `decode` gives a `sample`.
        temporal_ratio: pixel frames per latent frame; None asks the model.

    Raises ValueError where the ratio is unknown.
    """

    def __init__(self, model: Any, temporal_ratio: int | None = None):
        super().__init__()
        self.model = model
        ratio = temporal_ratio or _stated_ratio(model)
        if not ratio:
            raise ValueError(f"{type(model).__name__}: its temporal ratio is not in its config; give temporal_ratio")
        self.temporal_ratios = (int(ratio),)

    @property
    def config(self) -> Any:
        """The model's own configuration."""
        return self.model.config

    @property
    def device(self) -> Any:
        """The device of the weights."""
        return self.model.device

    @property
    def dtype(self) -> Any:
        """The type of the weights."""
        return self.model.dtype

    def train_only(self, *temporal_ratios: int) -> list[nn.Parameter]:
        """Make every weight trainable: there is one level."""
        for ratio in temporal_ratios:
            check_ratio(ratio, self.temporal_ratios)
        self.requires_grad_(True)
        return list(self.parameters())

    def inherited_modules(self, added: Sequence[int]) -> list[nn.Module]:
        """Return no modules: the one level starts from no other."""
        return []

    def enable_gradient_checkpointing(self) -> None:
        """Let the model recompute blocks in the backward pass; raises ValueError where it cannot."""
        self.model.enable_gradient_checkpointing()

    def compile_repeated_blocks(self, **options: Any) -> None:
        """Compile the blocks that the model repeats; raises ValueError where it names none."""
        self.model.compile_repeated_blocks(**options)

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
        if self.config.get("timestep_conditioning"):  # LTX from 0.9.1 on: the decoder also takes away noise, here none
            return self.model.decode(z, temb=z.new_zeros(len(z)))
        return self.model.decode(z)

    def forward(self, x: Tensor, temporal_ratio: int | None = None) -> DecoderOutput:
        """Encode and decode the posterior's mean; latents are not scaled in between."""
        return self.decode(self.encode(x, temporal_ratio).latent_dist.mode(), temporal_ratio)

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the model as diffusers does."""
        self.model.save_pretrained(folder)

    def _ratio(self, temporal_ratio: int | None) -> int:
        if temporal_ratio is not None:
            check_ratio(temporal_ratio, self.temporal_ratios)
        return self.temporal_ratios[0]


def build_baseline(name: str, config: dict[str, Any]) -> BaselineAutoencoder:
    """Build an untrained autoencoder by its class in diffusers; raises ValueError for an unknown class."""
    return BaselineAutoencoder(_class(name)(**config))


def load_baseline(name: str, folder: str | Path) -> BaselineAutoencoder:
    """Load an autoencoder that `save_pretrained` saved, for inference; only from safetensors."""
    return BaselineAutoencoder(_class(name).from_pretrained(folder, use_safetensors=True)).eval()


@dataclass(frozen=True, eq=False)
class OpenedBaseline:
    """An autoencoder and its arithmetic: it takes 1 + step*k frames whose sides are multiples of `spatial`."""

    model: BaselineAutoencoder
    spatial: int
    channels: int
    step: int


def open_baseline(folder: str | Path) -> OpenedBaseline:
    """Load any causal video autoencoder of diffusers by the class that its config.json names.

    Its arithmetic is learned by coding small clips. Raises ValueError for a folder without an autoencoder and for one that
    does not map 1 + ratio*N frames to 1 + N latent frames and back.
    """
    config = Path(folder) / "config.json"
    if not config.is_file():
        raise ValueError(f"autoencoder {folder}: no config.json there; give a folder that save_pretrained wrote")
    name = str(read_mapping(config).get("_class_name"))
    check_files(Path(folder))
    try:
        model = load_baseline(name, folder)
    except Exception as error:  # whatever diffusers raises for files that are not what it expects
        raise ValueError(f"autoencoder {folder}: cannot be loaded: {one_line(error)}") from None
    try:
        return probe_baseline(model)
    except ValueError as error:
        raise ValueError(f"autoencoder {folder}: {error}") from None


def probe_baseline(model: BaselineAutoencoder) -> OpenedBaseline:
    """Learn an autoencoder's arithmetic by coding small clips, which takes no time on the meta device.

    Raises ValueError where it does not map 1 + ratio*N frames to 1 + N latent frames and back.
    """
    ratio, problem = model.temporal_ratios[0], ""
    for count in (1, 2):  # CogVideoX decodes latent frames in pairs and takes 1 + 8k frames
        clip = torch.zeros(1, 3, 1 + count * ratio, PROBE, PROBE, dtype=model.dtype, device=model.device)
        try:
            with torch.no_grad():
                latent = model.encode(clip).latent_dist.mode()
                output = model.decode(latent).sample
        except (AttributeError, RuntimeError, ValueError, IndexError) as error:
            problem = f"{type(error).__name__}: {one_line(error)}"
            continue
        if latent.ndim == 5 and latent.shape[2] == 1 + count and output.shape == clip.shape:
            return OpenedBaseline(model, PROBE // latent.shape[3], latent.shape[1], count * ratio)
        problem = f"a clip of {tuple(clip.shape)} becomes {tuple(latent.shape)} and {tuple(output.shape)}"
    name = type(model.model).__name__
    raise ValueError(f"{name}: 1 + {ratio}*N frames to 1 + N latent frames and back are needed; {problem}")


def _stated_ratio(model: Any) -> int | None:
    """Return the temporal ratio by whichever key of its configuration a model of diffusers states it; None without one."""
    config = model.config
    stated = config.get("scale_factor_temporal") or config.get("temporal_compression_ratio")
    stated = stated or vars(model).get("temporal_compression_ratio")
    return stated or (2 ** sum(config["temperal_downsample"]) if config.get("temperal_downsample") else None)


def _class(name: str) -> Any:
    autoencoder = getattr(diffusers, name, None) if name.startswith("AutoencoderKL") else None
    if autoencoder is None:
        raise ValueError(f"autoencoder {name!r}: diffusers {diffusers.__version__} has no autoencoder of that name")
    return autoencoder
