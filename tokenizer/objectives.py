"""What the stages of a tokenizer's training minimise.

Shapes: B C T H W pixels in [-1, 1], b c t h w latents.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from promag.training.loop import Metrics, Objective
from promag.training.precision import Precision

from .autoencoder import AutoencoderKLProMAG
from .base import fit_linear_paths
from .config import StageConfig
from .discriminator import AdversarialLoss
from .distillation import CrossedAutoencoder
from .losses import (
    change_loss,
    frame_weights,
    kl_loss,
    latent_loss,
    posterior_loss,
    reconstruction_loss,
    reparametrise,
    squared_loss,
)
from .metrics import evaluate, evaluate_latents
from .perceptual import LPIPS

LATENTS = "latents "  # begins the keys of a batch without pixels; the frame rate follows


class StageObjective(Objective):
    """L1, squared error and KL, LPIPS and a discriminator where the stage has them.

    In the first `latent_pretrain_steps` of a grown level the loss is the error of the latent of the highest level that was
    there before: those steps run no decoder to pixels, which makes them several times cheaper, and from cached latents of an
    existing autoencoder no encoder either. `added` are the ratios of the levels that the stage adds; None for the stage's
    alone.
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
        """Return the model's `hidden_kernels`, none of the discriminator's."""
        return self.model.hidden_kernels()

    def forward(self, batch: dict[str, Any], generators: list[torch.Generator], step: int) -> dict[str, Tensor]:
        """B C T H W in batch["video"], or the base's latents of every r-th frame in batch["latents r"] -> loss, its parts."""
        stage = self.stage
        latents = {int(key.split()[1]): value for key, value in batch.items() if key.startswith(LATENTS)}
        if latents and self.below is not None:
            posterior, target = self.model.encode_base_latents(latents, (stage.ratio, self.below))
            fit = latent_loss(self.model.lift(posterior.mode(), stage.ratio, self.below), target.mode())
            return {"loss": fit, "latent": fit}
        x = batch["video"]
        if self.below is not None and step < stage.latent_pretrain_steps:
            posterior, target = self.model.encode_levels(x, (stage.ratio, self.below))
            z = reparametrise(posterior, generators)
            fit = latent_loss(self.model.lift(z, stage.ratio, self.below), target.mode())
            kl = kl_loss(posterior)
            return {"loss": fit + stage.kl_weight * kl, "latent": fit, "kl": kl}
        ratio = stage.turns[step % len(stage.turns)]
        posterior = self.model.encode(x, ratio).latent_dist  # pyright: ignore
        output = self.model.decode(reparametrise(posterior, generators), ratio).sample  # pyright: ignore
        loss, parts = self.pixel_losses(output, x, generators, step, ratio)
        if stage.consistency_weight:
            again = self.model.encode(output, ratio).latent_dist  # pyright: ignore
            parts["consistency"] = latent_loss(again.mean, posterior.mean)
            loss = loss + stage.consistency_weight * parts["consistency"]
        parts["kl"] = kl_loss(posterior)
        return {"loss": loss + stage.kl_weight * parts["kl"], **parts}

    def pixel_losses(
        self, output: Tensor, target: Tensor, generators: list[torch.Generator], step: int, ratio: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """B C T H W and the same, coded at a ratio -> the weighted sum of what compares pixels, and its parts."""
        stage = self.stage
        weights = frame_weights(target.shape[2], ratio, stage.between_weight)
        parts = {"l1": reconstruction_loss(output, target, weights), "squared": squared_loss(output, target, weights)}
        loss = parts["l1"] + stage.mse_weight * parts["squared"]
        if stage.change_weight:
            parts["change"] = change_loss(output, target)
            loss = loss + stage.change_weight * parts["change"]
        if self.lpips and stage.perceptual:
            orders = (torch.randperm(target.shape[2], generator=g, device=target.device) for g in generators)
            picked = torch.stack(list(orders))[:, : stage.perceptual.frames]
            rows = torch.arange(len(target))[:, None]
            frames = (video[rows, :, picked].transpose(1, 2) for video in (output, target))
            parts["lpips"] = self.lpips(*frames).mean()
            loss = loss + stage.perceptual.weight * parts["lpips"]
        if self.adversary and stage.adversarial and step >= stage.adversarial.start:
            adversarial = self.adversary(output, target, loss, step)
            loss = loss + adversarial["generator"] + adversarial["discriminator"]
            parts |= adversarial
        return loss, parts

    @property
    def reconstructor(self) -> Any:
        """What validation reconstructs clips with: `reconstructor(clip, ratio).sample`."""
        return self.model

    def evaluate(self, clips: Sequence[Tensor], precision: Precision) -> Metrics:
        """Reconstruct clips, each 1 C T H W, and return metrics; of other ratios that are trained by turns the PSNR."""
        others = sorted({*self.stage.turns} - {self.stage.ratio})
        more = {f"psnr_{ratio}x": evaluate(self.reconstructor, clips, ratio, precision)["psnr"] for ratio in others}
        return {**evaluate(self.reconstructor, clips, self.stage.ratio, precision), **more}


class DistillationObjective(StageObjective):
    """A student learns its teacher's latents: its decoder to decode them, its encoder to make them.

    The decoder's losses compare pixels, as in StageObjective; the encoder's compares posteriors and takes the place of KL.
    Neither depends on the other. Validation decodes the teacher's latents, too.
    """

    def __init__(
        self,
        model: AutoencoderKLProMAG,
        stage: StageConfig,
        teacher: AutoencoderKLProMAG,
        target: Literal["clips", "teacher"] = "clips",
        added: Sequence[int] | None = None,
    ):
        super().__init__(model, stage, added)
        self.target = target
        self.teacher = (teacher,)  # a tuple: it is no part of what is trained, wrapped and saved

    def separately_clipped(self) -> list[nn.Module]:
        """Return what encodes, too: its large first gradients must not shrink the decoder's."""
        encoders = (self.model.encoder, self.model.encoder_growth, self.model.own_encoders)
        trained = [part for part in encoders if any(p.requires_grad for p in part.parameters())]
        return [*super().separately_clipped(), *trained]

    def forward(self, batch: dict[str, Any], generators: list[torch.Generator], step: int) -> dict[str, Tensor]:
        """B C T H W in batch["video"] -> loss, its parts."""
        x, ratio = batch["video"], self.stage.ratio
        (teacher,) = self.teacher
        with torch.no_grad():
            goal = teacher.encode(x, ratio).latent_dist  # pyright: ignore
            z = reparametrise(goal, generators)
            target = x if self.target == "clips" else teacher.decode(z, ratio).sample  # pyright: ignore
        output = self.model.decode(z, ratio).sample  # pyright: ignore
        loss, parts = self.pixel_losses(output, target, generators, step, ratio)
        parts["latent"] = posterior_loss(self.model.encode(x, ratio).latent_dist, goal)  # pyright: ignore
        return {"loss": loss + parts["latent"], **parts}

    @torch.no_grad()
    def fit_linear_paths(self, x: Tensor) -> None:
        """Start an untrained student as the linear maps that fit the teacher's latents of clips B C T H W best."""
        (teacher,) = self.teacher
        z = teacher.encode(x.to(teacher.device), self.stage.ratio).latent_dist.mode()  # pyright: ignore
        base: Any = self.model
        fit_linear_paths(base.encoder, base.decoder, x.to(base.device), z.to(base.device))

    @property
    def reconstructor(self) -> Any:
        """The teacher's encoder before the student's decoder."""
        return CrossedAutoencoder(*self.teacher, self.model)

    def evaluate(self, clips: Sequence[Tensor], precision: Precision) -> Metrics:
        """Add to the metrics latent_error, the error of the student's latents in units of the true ones' variance."""
        error = evaluate_latents(self.model, *self.teacher, clips, self.stage.ratio, precision)
        return {**super().evaluate(clips, precision), "latent_error": error}
