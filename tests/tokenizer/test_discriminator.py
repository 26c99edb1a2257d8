import dataclasses
import math

import pytest
import torch
from torch import nn

from promag.tokenizer.discriminator import (
    Adversarial,
    AdversarialLoss,
    PatchDiscriminator3d,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
)

SETTINGS = Adversarial(
    weight=0.5,
    start=0,
    learning_rate=1e-3,
    kind="hinge",
    width=4,
    layers=2,
    lecam_weight=0.1,
    penalty_weight=1.0,
    penalty_every=2,
)


def test_losses_by_hand():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 0.5])
    assert discriminator_loss(real, fake, "hinge").item() == pytest.approx((0.5 + 0.75) / 2)
    assert generator_loss(fake, "hinge").item() == pytest.approx(1.25)
    zero = torch.zeros(3)
    assert discriminator_loss(zero, zero, "non_saturating").item() == pytest.approx(math.log(2))
    assert generator_loss(zero, "non_saturating").item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("kind", ["hinge", "non_saturating"])
def test_each_loss_is_lower_for_the_desired_logits(kind):
    low, high = torch.full((4,), -0.5), torch.full((4,), 0.5)
    assert discriminator_loss(high, low, kind) < discriminator_loss(low, high, kind)
    assert generator_loss(high, kind) < generator_loss(low, kind)


def test_gradient_penalty_of_a_linear_function_is_half_its_squared_slope():
    x = torch.randn(3, 2, 1, 2, 2, requires_grad=True)
    slope = torch.tensor(2.0, requires_grad=True)
    penalty = gradient_penalty((slope * x).sum((1, 2, 3, 4)), x)
    assert penalty.item() == pytest.approx(8 * 4 / 2)  # 8 values a clip, slope 2
    penalty.backward()
    assert slope.grad.item() == pytest.approx(8 * 2)


def test_adaptive_weight_makes_both_gradients_as_large():
    output = torch.randn(1, 3, 2, 4, 4, requires_grad=True)
    small, large = 0.01 * output.abs().mean(), 5 * output.square().mean()
    weight = adaptive_weight(small, large, output)
    one = torch.autograd.grad(small, output)[0].norm()
    two = torch.autograd.grad(weight * large, output)[0].norm()
    assert two.item() == pytest.approx(one.item(), rel=1e-3)
    assert not weight.requires_grad


def test_logits_are_patches_of_space_and_time():
    model = PatchDiscriminator3d(width=4, layers=2)
    assert model(torch.zeros(2, 3, 9, 32, 24)).shape == (2, 1, 3, 8, 6)
    assert model(torch.zeros(1, 3, 1, 16, 16)).shape == (1, 1, 1, 4, 4)  # an image


def test_each_side_trains_its_own_weights_alone():
    torch.manual_seed(0)
    loss = AdversarialLoss(SETTINGS)
    decoder = nn.Conv3d(3, 3, 1)
    target = torch.randn(2, 3, 5, 16, 16)

    def gradients(part):
        output = decoder(target)
        results = loss(output, target, (output - target).abs().mean(), step=0)
        decoder.zero_grad(), loss.zero_grad()
        results[part].backward()
        return [any(p.grad is not None and p.grad.abs().max() > 0 for p in m.parameters()) for m in (decoder, loss)]

    assert gradients("generator") == [True, False]
    assert gradients("discriminator") == [False, True]


def test_the_penalty_is_applied_at_its_steps_with_its_weight():
    torch.manual_seed(0)
    x, y = torch.randn(2, 1, 3, 5, 16, 16)
    output = y.clone().requires_grad_()
    plain = AdversarialLoss(dataclasses.replace(SETTINGS, penalty_weight=0.0, lecam_weight=0.0))
    loss = AdversarialLoss(dataclasses.replace(SETTINGS, lecam_weight=0.0))
    loss.load_state_dict(plain.state_dict())
    losses = [{n: m(output, x, output.abs().mean(), n)["discriminator"] for n in (0, 1)} for m in (plain, loss)]
    real = x.clone().requires_grad_()
    penalty = gradient_penalty(loss.discriminator(real), real)
    assert losses[1][0].item() == pytest.approx((losses[0][0] + 2 * penalty).item(), rel=1e-4)
    assert losses[1][1].item() == pytest.approx(losses[0][1].item(), rel=1e-5)


def test_lecam_by_hand_and_its_averages():
    loss = AdversarialLoss(SETTINGS)
    real, fake = torch.tensor([1.0, 3.0]), torch.tensor([-1.0, -1.0])
    assert loss.lecam(real, fake).item() == pytest.approx((2**2 + 4**2) / 2 + 3**2)
    assert loss.averages.tolist() == pytest.approx([2, -1])
    loss.lecam(torch.tensor([4.0]), torch.tensor([-1.0]))
    assert loss.averages.tolist() == pytest.approx([2.02, -1])
    loss.eval()
    loss.lecam(torch.tensor([9.0]), torch.tensor([9.0]))
    assert loss.averages.tolist() == pytest.approx([2.02, -1])


def test_a_discriminator_learns_to_detect_blurred_clips():
    torch.manual_seed(0)
    loss = AdversarialLoss(SETTINGS)
    optimizer = torch.optim.AdamW(loss.parameters(), 3e-3)
    for step in range(60):
        x = torch.randn(4, 3, 5, 16, 16)
        blurred = torch.nn.functional.avg_pool3d(x, 3, 1, 1).requires_grad_()
        results = loss(blurred, x, blurred.abs().mean(), step)
        optimizer.zero_grad()
        results["discriminator"].backward()
        optimizer.step()
    assert results["real_logits"] > results["fake_logits"] + 0.5


def test_illegal_settings_are_named():
    with pytest.raises(ValueError, match="adversarial lecam_weight -1: must not be negative"):
        dataclasses.replace(SETTINGS, lecam_weight=-1)
    with pytest.raises(ValueError, match="adversarial layers 0: at least 1"):
        dataclasses.replace(SETTINGS, layers=0)
