"""Conditioning on first frames: the first latent frames may be clean, and the model generates the rest.

The model gets a time for each frame: 0 for conditioning frames, which replace the first frames of the noisy latent, and the
usual time for all others. With a causal tokenizer this covers image-to-video and continuation, because an image is a clip of
one frame. A cond_mask, b t, is True at conditioning frames.

Sources: a noise level for each frame, Diffusion Forcing (arXiv 2407.01392, sec. 3); conditioning by the times of the first
frame's tokens, LTX-Video (arXiv 2501.00103, on image-to-video) and Wan 2.2's 5B model. Wan 2.1's image-to-video instead adds
a mask and clean latents as input channels, which needs new weights. Here a model trained without conditioning frames can be
trained further with them, and a model trained with them still does text-to-video.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from promag.training.config import setting


@dataclass(frozen=True)
class Condition:
    """Fraction of the training clips that are conditioned on their first latent frames, and the number of these frames."""

    probability: float = setting(0.0, "fraction of clips with conditioning frames; 0 trains only text-to-video")
    frames: int = setting(1, "maximum number of conditioning latent frames; each number from 1 up is equally likely")

    def __post_init__(self) -> None:
        """Raise ValueError for invalid settings."""
        if not 0 <= self.probability <= 1 or self.frames < 1:
            raise ValueError(
                f"condition probability {self.probability}, frames {self.frames}: a probability in [0, 1], 1 frame or more"
            )

    @property
    def max_frames(self) -> int:
        """Maximum number of conditioning frames in this training; 0 without conditioning."""
        return self.frames if self.probability else 0


def draw_cond_mask(condition: Condition, frames: int, generators: list[torch.Generator]) -> Tensor | None:
    """Draw the cond_mask, b t, of clips with `frames` latent frames; each clip has its own generator.

    At least one frame remains to be generated. If that leaves no frame for conditioning, return None and draw nothing.
    """
    limit = min(condition.max_frames, frames - 1)
    if limit < 1:
        return None
    draws = torch.stack([torch.rand(2, generator=g, device=g.device) for g in generators])
    counts = 1 + (draws[:, 1] * limit).long()
    counts = torch.where(draws[:, 0] < condition.probability, counts, 0)
    return torch.arange(frames, device=counts.device) < counts[:, None]


def times_of_frames(times: Tensor, cond_mask: Tensor) -> Tensor:
    """Return the time of each frame, b t: 0 at conditioning frames, elsewhere the time of its clip from `times`, (b,)."""
    return times[:, None].masked_fill(cond_mask, 0)


def pin_frames(latents: Tensor, conditioning: Tensor | None) -> Tensor:
    """Replace the first n frames of b c t h w with clean conditioning frames b c n h w; None changes nothing."""
    return latents if conditioning is None else torch.cat([conditioning, latents[:, :, conditioning.shape[2] :]], 2)


def mean_over_generated(errors: Tensor, cond_mask: Tensor) -> Tensor:
    """Return each clip's mean over its generated frames: b c t h w and b t -> (b,)."""
    generated = (~cond_mask).to(errors.dtype)
    return (errors.mean((1, 3, 4)) * generated).sum(1) / generated.sum(1)
