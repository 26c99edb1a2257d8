import math

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from promag.evaluation.bitrate import RateMeter


def posterior(mean, variance):
    return DiagonalGaussianDistribution(torch.cat([mean, torch.full_like(mean, math.log(variance))], 1))


def bits(*posteriors):
    meter = RateMeter()
    for one in posteriors:
        meter.add(one)
    return meter.bits()


def test_the_bitrate_of_gaussian_latents_is_the_textbook_value():
    torch.manual_seed(0)
    mean = torch.randn(1, 4, 5, 40, 40)
    # Signal of variance 1, noise of variance 1/4: half the logarithm of 1 + 4 for each value.
    assert bits(posterior(mean, 0.25)) == pytest.approx(mean.numel() * 0.5 * math.log2(5), rel=0.01)


def test_the_bitrate_is_independent_of_scale_offset_and_batching():
    torch.manual_seed(0)
    mean = torch.randn(2, 4, 5, 8, 8)
    whole = bits(posterior(mean, 0.25))
    scale = torch.tensor([1.0, 2.0, 0.1, 30.0]).view(1, 4, 1, 1, 1)
    moments = torch.cat([mean * scale + 7, (0.25 * scale.square()).log().expand_as(mean)], 1)
    assert bits(DiagonalGaussianDistribution(moments)) == pytest.approx(whole)
    assert bits(posterior(mean[:1], 0.25), posterior(mean[1:], 0.25)) == pytest.approx(whole)


def test_a_model_without_variance_has_no_bitrate():
    plain = type("Identity", (), {"mode": lambda self: torch.zeros(1)})()
    assert bits(plain) is None
    assert bits(DiagonalGaussianDistribution(torch.zeros(1, 4, 1, 2, 2), deterministic=True)) is None
