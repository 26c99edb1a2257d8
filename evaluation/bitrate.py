"""Rate of a tokenizer's latents in bits: an estimate that does not depend on their scale.

Each channel c is coded with a Gaussian of its own mean m_c and variance s_c^2 over all latents seen (bits-back coding of a
diagonal-Gaussian posterior q = N(mu, sigma^2), arXiv 1901.04866). Averaged over these latents,
    KL(q || N(m_c, s_c^2)) = (log s_c^2 - E[log sigma^2]) / 2,  with s_c^2 = E[sigma^2 + mu^2] - m_c^2.
"""

from typing import Any

import torch
from torch import Tensor


class RateMeter:
    """Sums over the posteriors of one tokenizer, channel by channel, in double precision."""

    def __init__(self):
        self.values = 0  # values of each channel
        self.sums: Tensor | None = None  # 3 c: mean, mean^2 + variance, log variance

    def add(self, posterior: Any) -> None:
        """Take in a posterior over b c t h w; one without a variance leaves no rate to estimate."""
        if not isinstance(getattr(posterior, "logvar", None), Tensor) or getattr(posterior, "deterministic", False):
            return
        mean, log_variance = (x.detach().double().transpose(0, 1).flatten(1) for x in (posterior.mean, posterior.logvar))
        sums = torch.stack([mean.sum(1), (mean.square() + log_variance.exp()).sum(1), log_variance.sum(1)])
        self.sums = sums if self.sums is None else self.sums + sums
        self.values += mean.shape[1]

    def bits(self) -> float | None:
        """Return the bits of all latents seen; None where no posterior had a variance."""
        if self.sums is None:
            return None
        mean, square, log_variance = self.sums / self.values
        nats = ((square - mean.square()).log() - log_variance) / 2
        return float(nats.sum() * self.values / torch.tensor(2.0).log())
