"""Fine-tuning a trained transformer: all its weights, or only low-rank adapters.

Source: LoRA (arXiv 2106.09685, sec. 4.1), by peft.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from promag.training.config import UserError, setting

from .families import LatentStatistics, family_of
from .latent_cache import LatentDataset
from .text_cache import CaptionEncoder


def adapt_to_latents(
    transformer: Any,
    latents: Sequence[LatentDataset],
    text: CaptionEncoder,
    condition_frames: int,
    frozen: bool,
    statistics: LatentStatistics | None = None,
    base_ahead: float = 0.0,
) -> None:
    """Reconcile a pretrained transformer with this training's caches, and their normalisation with it.

    Our transformer keeps the statistics of the ratios that it was trained at, so that its inputs keep their distribution.
    Those of new ratios and further conditioning frames are added to its configuration, unless it is `frozen`, under adapters or
    as a teacher.
    Transformers of diffusers get latents normalised by the autoencoder's own `statistics`.

    Raises UserError for mismatched channels or text widths, latents that its patches do not divide, missing statistics, and
    with `frozen` for new ratios or more conditioning frames, and for a `base_ahead` that it cannot be trained further with.
    """
    config, family = transformer.config, family_of(transformer)
    widths, pooled = family.text_widths(transformer)
    for name, has, wants in (
        ("latent channels", config["in_channels"], latents[0].index["shape"][0]),
        ("text widths", widths, list(text.widths)),
        ("pooled text width", pooled, text.pooled_width),
    ):
        if has is not None and has != wants:
            raise UserError(f"init: its transformer was trained with {name} {has}, this training has {wants}")
    for shape in {tuple(part.index["shape"][1:]) for part in latents}:
        if any(side % patch for side, patch in zip(shape, config["patch_size"], strict=True)):
            raise UserError(
                f"latents of {'x'.join(map(str, shape))} (frames x height x width): not divisible by the patches of init, "
                f"{'x'.join(map(str, config['patch_size']))}"
            )
    trained = config.get("base_ahead", 0.0)
    if base_ahead != trained and (trained or frozen):
        raise UserError(
            f"base_ahead {base_ahead:g}: the transformer of init was trained with {trained:g}; give that"
            + ("" if trained else ", or train all weights for a lead")
        )
    if base_ahead != trained:
        transformer.set_base_ahead(base_ahead)
    family.normalise(transformer, latents, condition_frames, frozen, statistics)


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters: which layers they adapt, and how strongly."""

    rank: int = setting(16, "rank of the adapters' matrices")
    alpha: float = setting(16.0, "adapters are scaled by alpha / rank")
    targets: tuple[str, ...] = setting(
        ("to_q", "to_k", "to_v", "to_out.0"),
        "name suffixes of the adapted linear layers: to_q, to_k, to_v, to_out.0, ff.net.0.proj, ff.net.2 (Wan: ffn.net.2), ...",
    )

    def __post_init__(self) -> None:
        """Raise ValueError for invalid settings."""
        if self.rank < 1 or self.alpha <= 0 or not self.targets:
            raise ValueError(
                f"lora rank {self.rank}, alpha {self.alpha}, targets {list(self.targets)}: "
                "a rank of 1 or more, an alpha above 0 and at least one target are needed"
            )


def add_lora(transformer: Any, lora: Lora) -> None:
    """Freeze a transformer and add trainable adapters; they leave its output unchanged at first.

    Raises UserError for a target that matches no linear layer.
    """
    layers = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    blocks = f"{family_of(transformer).blocks_name}."
    for target in lora.targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            ends = sorted({name.split(".", 2)[2] if name.startswith(blocks) else name for name in layers})
            raise UserError(f"lora target {target!r}: no linear layer ends so; the layers are {', '.join(ends)}")
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets)))  # pyright: ignore


@contextlib.contextmanager
def without_adapters(transformer: Any) -> Iterator[None]:
    """Switch a transformer's trainable adapters off for a while: it is then what it was before they were added."""
    layers = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def narrow_frozen(transformer: Any) -> None:
    """Keep the frozen matrices of a transformer's blocks in bfloat16, to which autocast would round them at each use.

    The transformer must run under autocast; its output stays the same, to the bit.
    """
    for module in family_of(transformer).blocks(transformer).modules():
        for parameter in module.parameters(recurse=False) if isinstance(module, nn.Linear) else ():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
