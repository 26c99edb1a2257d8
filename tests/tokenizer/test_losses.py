import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from promag.tokenizer.losses import (
    change_loss,
    frame_weights,
    kl_loss,
    latent_loss,
    reconstruction_loss,
    reparametrise,
    squared_loss,
)


def test_pixel_losses_by_hand():
    a, b = torch.zeros(1, 3, 1, 2, 2), torch.zeros(1, 3, 1, 2, 2)
    a[..., 0] = 0.5  # half of the values are off by a half
    assert reconstruction_loss(a, b).item() == pytest.approx(0.25)
    assert squared_loss(a, b).item() == pytest.approx(0.125)


def test_frames_between_key_frames_weigh_more_and_changes_are_compared_by_hand():
    weights = frame_weights(5, 2, 2.0)
    assert weights is not None
    assert weights.tolist() == pytest.approx([5 / 7, 10 / 7, 5 / 7, 10 / 7, 5 / 7])
    assert frame_weights(5, 2, 1.0) is None
    assert frame_weights(1, 2, 2.0) is None
    a, b = torch.zeros(1, 3, 5, 2, 2), torch.zeros(1, 3, 5, 2, 2)
    a[:, :, 1] = 0.5
    assert reconstruction_loss(a, b, weights).item() == pytest.approx(0.5 * 2 / 7)
    assert squared_loss(a, b, weights).item() == pytest.approx(0.25 * 2 / 7)
    assert change_loss(a, b).item() == pytest.approx(2 * 0.5 / 4)  # it comes and goes: two of four changes
    assert change_loss(a + 0.3, a).item() == pytest.approx(0, abs=1e-6)
    assert change_loss(a[:, :, :1], b[:, :, :1]).item() == 0


def test_kl_is_zero_at_the_standard_normal_and_known_elsewhere():
    posterior = DiagonalGaussianDistribution(torch.zeros(1, 8, 1, 2, 2))
    assert kl_loss(posterior).item() == 0
    moments = torch.cat([torch.full((1, 4, 1, 2, 2), 2.0), torch.zeros(1, 4, 1, 2, 2)], 1)
    assert kl_loss(DiagonalGaussianDistribution(moments)).item() == pytest.approx(2.0)  # mean^2 / 2


def test_latent_loss_does_not_depend_on_the_scale_and_trains_the_estimate_alone():
    torch.manual_seed(0)
    target, error = torch.randn(2, 4, 3, 2, 2, requires_grad=True), 0.1 * torch.randn(2, 4, 3, 2, 2)
    estimate = (target.detach() + error).requires_grad_()
    loss = latent_loss(estimate, target)
    assert latent_loss(100 * estimate, 100 * target).item() == pytest.approx(loss.item(), rel=1e-4)
    loss.backward()
    assert target.grad is None
    assert estimate.grad.abs().max() > 0


def test_reparametrised_samples_have_the_posteriors_mean_and_deviation():
    moments = torch.cat([torch.full((1, 4, 50, 8, 8), 3.0), torch.full((1, 4, 50, 8, 8), 2 * -0.7)], 1)
    z = reparametrise(DiagonalGaussianDistribution(moments), torch.Generator().manual_seed(0))
    assert z.mean().item() == pytest.approx(3, abs=0.02)
    assert z.std().log().item() == pytest.approx(-0.7, abs=0.02)
