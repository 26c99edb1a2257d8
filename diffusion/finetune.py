"""Fine-tuning a trained transformer: all its weights, or only low-rank adapters.

Source: LoRA (arXiv 2106.09685, sec. 4.1), by peft.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from torch import nn

from promag.training.config import UserError, one_line, setting

from .latent_cache import LatentDataset
from .text_cache import CaptionEncoder
from .transformer import ProMAGTransformer3DModel


def load_transformer(init: str) -> ProMAGTransformer3DModel:
    """Load the transformer from a pipeline's folder or from its own folder; raises UserError if none can be loaded."""
    folder = Path(init) / "transformer"
    folder = folder if folder.is_dir() else Path(init)
    try:
        model = ProMAGTransformer3DModel.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"init {init}: no transformer can be loaded there: {one_line(error)}") from None
    assert isinstance(model, ProMAGTransformer3DModel)
    return model.train()


def adapt_to_latents(
    transformer: ProMAGTransformer3DModel,
    latents: Sequence[LatentDataset],
    text: CaptionEncoder,
    condition_frames: int,
    frozen: bool,
) -> None:
    """Reconcile a pretrained transformer's latent statistics with this training's caches.

    At ratios that the transformer was trained at, the latents are normalised with its own statistics, so that its inputs keep
    their distribution. Statistics of new ratios and further conditioning frames are added to its configuration, unless it is
    `frozen` under adapters.

    Raises UserError for mismatched channels or text widths, and with `frozen` for new ratios or more conditioning frames.
    """
    config = transformer.config
    for name, has, wants in (
        ("latent channels", config["in_channels"], latents[0].index["shape"][0]),
        ("text widths", transformer.text_dims, list(text.widths)),
        ("pooled text width", config["pooled_dim"], text.pooled_width),
    ):
        if has != wants:
            raise UserError(f"init: its transformer was trained with {name} {has}, this training has {wants}")
    mean, std = (dict(config[key] or {}) for key in ("latents_mean", "latents_std"))
    for part in latents:
        key = str(part.ratio)
        if key in mean:
            part.mean, part.std = (torch.tensor(values[key]).view(-1, 1, 1, 1) for values in (mean, std))
        elif frozen:
            trained = ", ".join(f"{ratio}x" for ratio in mean)
            raise UserError(f"budget {key}x with lora: the transformer was trained at {trained}; train all weights for another")
        else:
            mean[key], std[key] = part.mean.flatten().tolist(), part.std.flatten().tolist()
    if frozen and condition_frames > config["condition_frames"]:
        raise UserError(
            f"condition frames {condition_frames} with lora: the transformer was trained to be given "
            f"{config['condition_frames']}; train all weights for more"
        )
    transformer.register_to_config(
        latents_mean=mean,
        latents_std=std,
        temporal_ratios=sorted(map(int, mean)),
        condition_frames=max(condition_frames, config["condition_frames"]),
    )


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters: which layers they adapt, and how strongly."""

    rank: int = setting(16, "rank of the adapters' matrices")
    alpha: float = setting(16.0, "adapters are scaled by alpha / rank")
    targets: tuple[str, ...] = setting(
        ("to_q", "to_k", "to_v", "to_out.0"),
        "name suffixes of the adapted linear layers: to_q, to_k, to_v, to_out.0, ff.net.0.proj, ff.net.2, ...",
    )

    def __post_init__(self) -> None:
        """Raise ValueError for invalid settings."""
        if self.rank < 1 or self.alpha <= 0 or not self.targets:
            raise ValueError(
                f"lora rank {self.rank}, alpha {self.alpha}, targets {list(self.targets)}: "
                "a rank of 1 or more, an alpha above 0 and at least one target are needed"
            )


def add_lora(transformer: ProMAGTransformer3DModel, lora: Lora) -> None:
    """Freeze a transformer and add trainable adapters; they leave its output unchanged at first.

    Raises UserError for a target that matches no linear layer.
    """
    layers = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    for target in lora.targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            ends = sorted({name.split(".", 2)[2] if name.startswith("transformer_blocks.") else name for name in layers})
            raise UserError(f"lora target {target!r}: no linear layer ends so; the layers are {', '.join(ends)}")
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets)))  # pyright: ignore
