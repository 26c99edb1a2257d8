"""Rectified flow: straight paths from clean latents to noise, and the times at which they are learned.

Times t lie in (0, 1); 0 is the clean latent, 1 is noise. Sources: rectified flow (arXiv 2209.03003, eq. 1), logit-normal
times and the resolution-dependent shift (Stable Diffusion 3, arXiv 2403.03206, sec. 3.1 and eq. 23).
"""

import math

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

BASE_TOKENS = 256  # at which a model's time shift is stated


def interpolate(latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """Return (1 - t) * latents + t * noise; latents b c t h w, times (b,) or, one for each frame, b t."""
    t = times[:, None, :, None, None] if times.ndim == 2 else times.view(-1, *(1,) * (latents.ndim - 1))
    return (1 - t) * latents + t * noise


def velocity(latents: Tensor, noise: Tensor) -> Tensor:
    """Return the velocity d/dt of the path: noise - latents."""
    return noise - latents


def denoised(noisy: Tensor, velocity: Tensor, times: Tensor) -> Tensor:
    """Return the clean latents that a noisy one and its velocity point to."""
    return noisy - times.view(-1, *(1,) * (noisy.ndim - 1)) * velocity


def token_shift(tokens: int, shift: float) -> float:
    """Return mu, the logarithm of the time shift for a clip of so many tokens; `shift` is the factor at 256 tokens.

    More tokens repeat the same content more often, so the same noise hides less of it and times move towards 1: the
    factor grows with the square root of the tokens (Stable Diffusion 3, eq. 23, counts pixels where this counts tokens).
    """
    return math.log(shift) + 0.5 * math.log(tokens / BASE_TOKENS)


def shift_times(times: Tensor, mu: float) -> Tensor:
    """Move times towards 1 by a factor e^mu in t / (1 - t)."""
    factor = math.exp(mu)
    return factor * times / (1 + (factor - 1) * times)


def sample_times(mu: float, generators: list[torch.Generator], device: torch.device | str = "cpu") -> Tensor:
    """Draw a logit-normal time (mean 0, deviation 1), shifted by mu, from each generator: shape (b,)."""
    normal = randn_tensor((len(generators),), generators, torch.device(device))
    return shift_times(normal.sigmoid(), mu)


def guide(with_text: Tensor, without: Tensor, scale: float) -> Tensor:
    """Return the classifier-free-guided prediction (arXiv 2207.12598, eq. 6); scale 1 is the one with text."""
    return without + scale * (with_text - without)
