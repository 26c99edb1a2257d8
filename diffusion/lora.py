"""Low-rank adapters on a trained transformer (LoRA, arXiv 2106.09685, sec. 4.1), by peft."""

from dataclasses import dataclass

from peft import LoraConfig
from torch import nn

from promag.training.config import UserError, setting

from .transformer import ProMAGTransformer3DModel


@dataclass(frozen=True)
class Lora:
    """What is adapted, and by how much."""

    rank: int = setting("of the adapters' matrices")
    alpha: float = setting("adapters are scaled by alpha / rank")
    targets: tuple[str, ...] = setting(
        "ends of the names of adapted linear layers: to_q, to_k, to_v, to_out.0, ff.net.0.proj, ff.net.2, ..."
    )

    def __post_init__(self) -> None:
        """Raise ValueError for settings that cannot be meant."""
        if self.rank < 1 or self.alpha <= 0 or not self.targets:
            raise ValueError(
                f"lora rank {self.rank}, alpha {self.alpha}, targets {list(self.targets)}: "
                "a rank of 1 or more, an alpha above 0 and at least one target are needed"
            )


def add_lora(transformer: ProMAGTransformer3DModel, lora: Lora) -> None:
    """Freeze a transformer and add adapters that are trained; its output stays the same until they are.

    Raises UserError for a target that is no linear layer.
    """
    layers = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    for target in lora.targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            ends = sorted({name.split(".", 2)[2] if name.startswith("transformer_blocks.") else name for name in layers})
            raise UserError(f"lora target {target!r}: no linear layer ends so; the layers are {', '.join(ends)}")
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets)))  # pyright: ignore
