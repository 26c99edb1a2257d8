"""First-frame conditioning: some first latent frames are given clean, and the model makes the rest.

The given frames stand in the latent itself, at time 0 of their own, while all others are as noisy as ever: the model is told
the time of each frame. A causal tokenizer makes that enough for image-to-video and for continuation, since an image is its
one-frame clip. Sources: a noise level for each frame, Diffusion Forcing (arXiv 2407.01392, sec. 3); conditioning by the times
of the first frame's tokens, LTX-Video (arXiv 2501.00103, on image-to-video), likewise Wan 2.2's 5B model. A mask and clean
latents as further input channels (Wan 2.1's image-to-video) would need new weights: this way a model trained without
given frames can be trained further with them, and one that was trained with them makes text-to-video as before.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from promag.training.config import setting


@dataclass(frozen=True)
class Condition:
    """How often, and how many, first latent frames are given."""

    probability: float = setting(0.0, "part of the clips that are given frames; 0 trains text-to-video alone")
    frames: int = setting(1, "most first latent frames given; each number from 1 up is drawn as often")

    def __post_init__(self) -> None:
        """Raise ValueError for settings that cannot be meant."""
        if not 0 <= self.probability <= 1 or self.frames < 1:
            raise ValueError(
                f"condition probability {self.probability}, frames {self.frames}: a probability in [0, 1], 1 frame or more"
            )

    @property
    def given(self) -> int:
        """Most frames that a model trained this way was ever given."""
        return self.frames if self.probability else 0


def draw_given(condition: Condition, frames: int, generators: list[torch.Generator]) -> Tensor | None:
    """Draw which of `frames` latent frames are given, one clip from each generator: b t, True where given.

    One frame at least is left to make. None, and nothing is drawn, where no frame can be given.
    """
    most = min(condition.given, frames - 1)
    if most < 1:
        return None
    draws = torch.stack([torch.rand(2, generator=g, device=g.device) for g in generators])
    counts = 1 + (draws[:, 1] * most).long()
    counts = torch.where(draws[:, 0] < condition.probability, counts, 0)
    return torch.arange(frames, device=counts.device) < counts[:, None]


def frame_times(times: Tensor, given: Tensor) -> Tensor:
    """Return the time of each frame, b t: that of its clip, (b,), and 0 where it is given."""
    return times[:, None].masked_fill(given, 0)


def pin_frames(latents: Tensor, conditioning: Tensor | None) -> Tensor:
    """Put clean conditioning frames, b c n h w, in the place of the first frames of b c t h w; None changes nothing."""
    return latents if conditioning is None else torch.cat([conditioning, latents[:, :, conditioning.shape[2] :]], 2)


def mean_over_made(errors: Tensor, given: Tensor) -> Tensor:
    """Return the mean over all that is not given, of each clip: b c t h w and b t -> (b,)."""
    made = (~given).to(errors.dtype)
    return (errors.mean((1, 3, 4)) * made).sum(1) / made.sum(1)
