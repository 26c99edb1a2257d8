"""A 3D patch discriminator and the adversarial losses of video tokenizers.

Shapes: B C T H W in [-1, 1]. Sources: patch discriminator and adaptive weight, VQGAN (arXiv 2012.09841, sec. 3.1 and
eq. 7); in 3D with blurred down-sampling and LeCam, MAGVIT (arXiv 2212.05199, sec. 3.1 and app. B); LeCam regularisation
(arXiv 2104.03310, eq. 5); R1 gradient penalty (arXiv 1801.04406, eq. 9).
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from promag.training.config import required, setting

LECAM_DECAY = 0.99


@dataclass(frozen=True, kw_only=True)
class Adversarial:
    """The adversarial loss and its discriminator."""

    weight: float = setting(0.1, "weight of the generator's loss, times the adaptive weight")
    start: int = required("first step of the stage with a discriminator")
    learning_rate: float = setting(1e-4, "the discriminator's, at the peak of the stage's schedule")
    kind: Literal["hinge", "non_saturating"] = setting("non_saturating", "loss of both sides")
    width: int = setting(64, "channels of the discriminator's first layer")
    layers: int = setting(4, "down-samplings of the discriminator")
    lecam_weight: float = setting(0.001, "weight of LeCam regularisation; 0 for none")
    penalty_weight: float = setting(1.0, "weight of the R1 gradient penalty on real clips; 0 for none")
    penalty_every: int = setting(16, "steps between two gradient penalties, each weighted by their number")

    def __post_init__(self) -> None:
        """Raise ValueError for settings that cannot be meant."""
        for name in ("weight", "start", "lecam_weight", "penalty_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"adversarial {name} {getattr(self, name)}: must not be negative")
        if self.learning_rate <= 0:
            raise ValueError(f"adversarial learning_rate {self.learning_rate}: must be above 0")
        for name in ("width", "layers", "penalty_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"adversarial {name} {getattr(self, name)}: at least 1 is needed")


class PatchDiscriminator3d(nn.Module):
    """Clips to logits, one for each patch of space and time: residual blocks, each halving height, width and time."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        widths = [min(width * 2**i, 8 * width) for i in range(layers + 1)]
        self.first = nn.Conv3d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(_DownBlock(a, b) for a, b in pairwise(widths))
        self.last = nn.Conv3d(widths[-1], 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """B C T H W -> B 1 t h w."""
        h = F.leaky_relu(self.first(x), 0.2)
        for block in self.blocks:
            h = block(h)
        return self.last(h)


class _DownBlock(nn.Module):
    """Two convolutions, the second after a blurring average, beside a linear path of the same."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.conv1 = nn.Conv3d(channels_in, channels_in, 3, padding=1)
        self.conv2 = nn.Conv3d(channels_in, channels_out, 3, padding=1)
        self.skip = nn.Conv3d(channels_in, channels_out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """B C T H W -> B C' T/2 H/2 W/2, sizes rounded up; a single frame stays one."""
        h = _halve(F.leaky_relu(self.conv1(x), 0.2))
        return (F.leaky_relu(self.conv2(h), 0.2) + self.skip(_halve(x))) * 0.5**0.5


def _halve(x: Tensor) -> Tensor:
    kernel = [3 if size >= 3 else 1 for size in x.shape[2:]]  # what is too short to blur is left as it is
    return F.avg_pool3d(x, kernel, 2, [k // 2 for k in kernel], count_include_pad=False)


def generator_loss(fake: Tensor, kind: Literal["hinge", "non_saturating"]) -> Tensor:
    """Return the autoencoder's loss from the logits of its clips."""
    return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()


def discriminator_loss(real: Tensor, fake: Tensor, kind: Literal["hinge", "non_saturating"]) -> Tensor:
    """Return the discriminator's loss from the logits of real and of reconstructed clips."""
    if kind == "hinge":
        return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
    return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2


def gradient_penalty(logits: Tensor, real: Tensor) -> Tensor:
    """Return half the squared gradient of a clip's summed logits, averaged over clips; `real` requires gradients."""
    (gradient,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
    return gradient.float().square().sum((1, 2, 3, 4)).mean() / 2


def adaptive_weight(reconstruction_loss: Tensor, adversarial_loss: Tensor, output: Tensor) -> Tensor:
    """Return the factor that gives the adversarial loss as large a gradient as the reconstruction loss has.

    VQGAN takes both gradients at the decoder's last layer; here they are taken at the reconstruction, so that it works
    with a frozen decoder too. At most 10,000, as there.
    """
    one, two = (torch.autograd.grad(loss, output, retain_graph=True)[0] for loss in (reconstruction_loss, adversarial_loss))
    return (one.float().norm() / (two.float().norm() + 1e-6)).clamp(max=1e4).detach()


class AdversarialLoss(nn.Module):
    """The discriminator with its losses, in one module: both sides are trained by one backward pass.

    The generator's term sees the discriminator's weights as constants, the discriminator's term sees the clips as constants.
    """

    def __init__(self, settings: Adversarial):
        super().__init__()
        self.settings = settings
        self.discriminator = PatchDiscriminator3d(settings.width, settings.layers)
        # Moving averages of the logits of real and of reconstructed clips, for LeCam.
        self.register_buffer("averages", torch.zeros(2))

    def forward(self, output: Tensor, target: Tensor, reconstruction: Tensor, step: int) -> dict[str, Tensor]:
        """Return `generator` (weighted), `discriminator` (with its regularisers) and what to watch.

        `reconstruction` is the loss whose gradient at `output` the generator's term is balanced with.
        """
        settings = self.settings
        frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        adversarial = generator_loss(functional_call(self.discriminator, frozen, (output,)), settings.kind)
        weight = adaptive_weight(reconstruction, adversarial, output)

        penalised = settings.penalty_weight > 0 and step % settings.penalty_every == 0
        real_logits, fake_logits = self.discriminator(target.detach()), self.discriminator(output.detach())
        total = discriminator_loss(real_logits, fake_logits, settings.kind)
        if settings.lecam_weight:
            total = total + settings.lecam_weight * self.lecam(real_logits, fake_logits)
        if penalised:
            with torch.autocast(target.device.type, enabled=False):  # second derivatives need float32
                real = target.detach().float().requires_grad_()
                penalty = gradient_penalty(self.discriminator(real), real)
            total = total + settings.penalty_weight * settings.penalty_every * penalty
        return {
            "generator": settings.weight * weight * adversarial,
            "discriminator": total,
            "adaptive_weight": weight,
            "real_logits": real_logits.mean().detach(),
            "fake_logits": fake_logits.mean().detach(),
        }

    def lecam(self, real: Tensor, fake: Tensor) -> Tensor:
        """Pull the logits of each kind towards the other kind's moving average, which is updated first."""
        averages: Tensor = self.averages  # pyright: ignore[reportAssignmentType]
        if self.training:
            now = torch.stack([real.mean(), fake.mean()]).detach().float()
            averages.copy_(now if not averages.any() else averages.lerp(now, 1 - LECAM_DECAY))
        return (real - averages[1]).square().mean() + (fake - averages[0]).square().mean()
