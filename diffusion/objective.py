"""What the training of a text-to-video transformer minimises: the squared error of the velocity of rectified flow.

Shapes: b c t h w latents.
"""

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from promag.training.loop import Objective
from promag.training.throughput import Work

from . import ahead
from .conditioning import draw_cond_mask, mean_over_generated, times_of_frames
from .families import family_of, hidden_matrices
from .flow import sample_times, velocity
from .text import Embedded, draw_dropped
from .text_cache import CaptionEncoder

if TYPE_CHECKING:
    from .config import DiffusionConfig

# Times at which the validation loss is measured, whatever the time shift: the midpoints of five equal parts of (0, 1).
VALIDATION_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)


class FlowObjective(Objective):
    """Squared error of the velocity at logit-normal times, with caption dropout and first-frame conditioning."""

    host_keys = ("ratio",)

    def __init__(self, transformer: Any, text: CaptionEncoder, config: "DiffusionConfig"):
        super().__init__()
        self.transformer, self.text, self.family = transformer, text, family_of(transformer)
        self.caption_dropout, self.shift, self.condition = config.caption_dropout, config.shift, config.condition
        self.base_ahead = config.base_ahead
        self.text_rate_factor = config.text.learning_rate / config.optimization.learning_rate

    def learning_rate_scales(self) -> list[tuple[torch.nn.Module, float]]:
        """Give the text model its own learning rate: at the transformer's, all captions come out alike."""
        return [(self.text, self.text_rate_factor)]

    def matrices(self) -> list[torch.nn.Parameter]:
        """Return the weights of the blocks' linear layers."""
        return hidden_matrices(self.transformer)

    def units(self) -> list[torch.nn.Module]:
        """Return the transformer's blocks, the transformer, and the small text model."""
        text = self.text.model
        return [*self.family.blocks(self.transformer), self.transformer, *([] if text is None else [text])]

    def work(self, batch: dict[str, Any]) -> Work:
        """Return the transformer's tokens and FLOPs; those of the text model are left out."""
        x, config = batch["latents"], self.transformer.config
        count = prod(x.shape[2:]) // prod(config["patch_size"])
        return Work(len(x) * count, 3 * self.family.forward_flops(config, count, self.text.lengths, len(x)))

    def forward(self, batch: dict[str, Any], generators: list[torch.Generator], step: int) -> dict[str, Tensor]:
        """Normalised latents b c t h w of one ratio, captions and frame rates in `batch` -> loss."""
        x = batch["latents"]
        text = self.text(batch, draw_dropped(self.caption_dropout, generators))
        times = sample_times(self.mu(x), generators, x.device)
        noise = randn_tensor(x.shape, generators, x.device)
        cond_mask = draw_cond_mask(self.condition, x.shape[2], generators)
        return {"loss": self.errors(x, noise, times, text, batch["fps"], int(batch["ratio"][0]), cond_mask).mean()}

    def errors(
        self,
        x: Tensor,
        noise: Tensor,
        times: Tensor,
        text: Embedded,
        fps: Tensor,
        ratio: int,
        cond_mask: Tensor | None = None,
        half_weights: Sequence[float] | None = None,
    ) -> Tensor:
        """Return the mean squared velocity error of each clip, (b,), over the frames outside cond_mask (b t).

        With `base_ahead` a half of the channels that rests counts 0, or the halves are weighted as given.
        """
        times = times if cond_mask is None else times_of_frames(times, cond_mask)
        noisy = ahead.interpolate(x, noise, times, self.base_ahead)
        predicted = self.family.predict(self.transformer, noisy, times, text, fps, ratio)
        errors = F.mse_loss(predicted.float(), velocity(x, noise), reduction="none")
        if half_weights is None:
            errors = ahead.moving_only(errors, times, self.base_ahead)
        else:
            errors = ahead.scale_halves(errors, half_weights)
        return errors.flatten(1).mean(1) if cond_mask is None else mean_over_generated(errors, cond_mask)

    def validation_errors(
        self, x: Tensor, noise: Tensor, batch: dict[str, Any], ratio: int, cond_mask: Tensor | None = None
    ) -> Tensor:
        """Return the mean over VALIDATION_TIMES of each clip's error, (b,)."""
        text, fps = self.text(batch), batch["fps"]
        times = [torch.full((len(x),), t, device=x.device) for t in VALIDATION_TIMES]
        probes: list[tuple[Tensor, tuple[float, float] | None]] = [(t, None) for t in times]
        if self.base_ahead:  # each half of the channels at the same times of its own as without a lead
            pairs = [ahead.sampling_times(t, self.base_ahead) for t in times]
            probes = [probe for base, residual in pairs for probe in ((base, (2.0, 0.0)), (residual, (0.0, 2.0)))]
        errors = [self.errors(x, noise, t, text, fps, ratio, cond_mask, halves) for t, halves in probes]
        return torch.stack(errors).mean(0)

    def mu(self, x: Tensor) -> float:
        """Return the time shift for latents of this size."""
        pt, ph, pw = self.transformer.config["patch_size"]
        return self.family.mu(x.shape[2] // pt * (x.shape[3] // ph) * (x.shape[4] // pw), self.shift)
