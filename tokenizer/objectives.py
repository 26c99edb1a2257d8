"""What the stages of a tokenizer's training minimise.

Shapes: B C T H W pixels in [-1, 1], b c t h w latents.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from promag.training.loop import Objective

from .autoencoder import AutoencoderKLProMAG
from .config import StageConfig
from .discriminator import AdversarialLoss
from .losses import kl_loss, latent_loss, reconstruction_loss, reparametrise, squared_loss
from .perceptual import LPIPS


class StageObjective(Objective):
    """L1, squared error and KL, LPIPS and a discriminator where the stage has them.

    In the first `latent_pretrain_steps` of a grown level the loss is the error of the latent of the highest level that was
    there before: those steps run no decoder to pixels, which makes them several times cheaper. `added` are the ratios of the
    levels that the stage adds; None for the stage's alone.
    """

    def __init__(self, model: AutoencoderKLProMAG, stage: StageConfig, added: Sequence[int] | None = None):
        super().__init__()
        self.model, self.stage = model, stage
        added = (stage.ratio,) if added is None else added
        self.inherited = tuple(model.inherited_modules(added))  # a tuple: they are registered in the model
        trained_before = [ratio for ratio in model.temporal_ratios if ratio < stage.ratio and ratio not in added]
        self.below = trained_before[-1] if stage.growth else None
        self.lpips = LPIPS.load(stage.perceptual.path) if stage.perceptual else None
        self.adversary = AdversarialLoss(stage.adversarial) if stage.adversarial else None

    def separately_clipped(self) -> list[nn.Module]:
        """Return the discriminator, whose gradients must not shrink the autoencoder's."""
        return [self.adversary] if self.adversary else []

    def learning_rate_scales(self) -> list[tuple[nn.Module, float]]:
        """Give what was trained before, and the discriminator, learning rates of their own."""
        factors = [(module, self.stage.inherited_lr_scale) for module in self.inherited]
        if self.adversary and (settings := self.stage.adversarial):
            factors.append((self.adversary, settings.learning_rate / self.stage.optimization.learning_rate))
        return factors

    def matrices(self) -> list[nn.Parameter]:
        """Return the kernels between hidden features: neither those at pixels and latents nor the discriminator's."""
        return self.model.hidden_kernels()

    def forward(self, batch: dict[str, Any], generators: list[torch.Generator], step: int) -> dict[str, Tensor]:
        """B C T H W in batch["video"] -> loss, its parts."""
        x, stage = batch["video"], self.stage
        if self.below is not None and step < stage.latent_pretrain_steps:
            posterior, target = self.model.encode_levels(x, (stage.ratio, self.below))
            z = reparametrise(posterior, generators)
            fit = latent_loss(self.model.lift(z, stage.ratio, self.below), target.mode())
            kl = kl_loss(posterior)
            return {"loss": fit + stage.kl_weight * kl, "latent": fit, "kl": kl}
        posterior = self.model.encode(x, stage.ratio).latent_dist  # pyright: ignore
        output = self.model.decode(reparametrise(posterior, generators), stage.ratio).sample  # pyright: ignore
        parts = {"l1": reconstruction_loss(output, x), "squared": squared_loss(output, x)}
        loss = parts["l1"] + stage.mse_weight * parts["squared"]
        if self.lpips and stage.perceptual:
            orders = (torch.randperm(x.shape[2], generator=g, device=x.device) for g in generators)
            picked = torch.stack(list(orders))[:, : stage.perceptual.frames]
            frames = (video[torch.arange(len(x))[:, None], :, picked].transpose(1, 2) for video in (output, x))
            parts["lpips"] = self.lpips(*frames).mean()
            loss = loss + stage.perceptual.weight * parts["lpips"]
        if self.adversary and stage.adversarial and step >= stage.adversarial.start:
            adversarial = self.adversary(output, x, loss, step)
            loss = loss + adversarial["generator"] + adversarial["discriminator"]
            parts |= adversarial
        parts["kl"] = kl_loss(posterior)
        return {"loss": loss + stage.kl_weight * parts["kl"], **parts}
