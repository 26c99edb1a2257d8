"""Losses of the tokenizer.

Shapes: B C T H W pixels in [-1, 1], b c t h w latents. L1 and a small KL as in latent diffusion autoencoders
(arXiv 2112.10752, sec. 3.1); the KL weight is our choice, the paper's is not known to us.
"""

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


def reconstruction_loss(reconstruction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the mean absolute error over all pixel values; `weights` of frames, T, have the mean 1."""
    return _mean((reconstruction.float() - target.float()).abs(), weights)


def squared_loss(reconstruction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the mean squared error over all pixel values; `weights` of frames, T, have the mean 1.

    Beside L1 it makes large errors count: L1 alone is content to paint a small, strongly coloured object in the colour of
    what surrounds it.
    """
    return _mean((reconstruction.float() - target.float()).square(), weights)


def change_loss(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Return the mean absolute error of the changes from frame to frame; 0 for one frame."""
    if target.shape[2] == 1:
        return reconstruction.new_zeros(())
    return reconstruction_loss(reconstruction.float().diff(dim=2), target.float().diff(dim=2))


def frame_weights(frames: int, temporal_ratio: int, between: float) -> Tensor | None:
    """Return the weight of each frame, with the mean 1: those between key frames over key frames as `between` to 1."""
    if between == 1 or frames == 1:
        return None
    weights = torch.where(torch.arange(frames) % temporal_ratio == 0, 1.0, between)
    return weights / weights.mean()


def _mean(error: Tensor, weights: Tensor | None) -> Tensor:
    return error.mean() if weights is None else (error * weights.to(error.device).view(-1, 1, 1)).mean()


def kl_loss(posterior: DiagonalGaussianDistribution) -> Tensor:
    """Return the KL divergence from a standard normal, in nats, averaged over latent values."""
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def latent_loss(estimate: Tensor, target: Tensor) -> Tensor:
    """Return the squared error of an estimated latent in units of the target's variance per channel."""
    target = target.detach().float()
    return ((estimate.float() - target).square() / _variance(target)).mean()


def posterior_loss(estimate: DiagonalGaussianDistribution, target: DiagonalGaussianDistribution) -> Tensor:
    """Return the squared 2-Wasserstein distance of two posteriors in units of the target mean's variance per channel.

    For diagonal Gaussians it is the squared distance of the means plus that of the standard deviations.
    """
    mean, std = target.mean.detach().float(), target.std.detach().float()
    distance = (estimate.mean.float() - mean).square() + (estimate.std.float() - std).square()
    return (distance / _variance(mean)).mean()


def _variance(latent: Tensor) -> Tensor:
    return latent.var(dim=(0, 2, 3, 4), keepdim=True).clamp_min(1e-6)


def reparametrise(posterior: DiagonalGaussianDistribution, generators: list[torch.Generator]) -> Tensor:
    """Draw a latent from a posterior, each clip's noise from its own generator, on the posterior's device."""
    mean = posterior.mean
    noise = randn_tensor(mean.shape, generators, mean.device, torch.float32)
    return mean + posterior.std * noise.to(mean.dtype)
