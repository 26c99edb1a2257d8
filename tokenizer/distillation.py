"""Distillation: a small, fast autoencoder that knows the latents of a large one.

Shapes: B C T H W pixels in [-1, 1], b c t h w latents. The idea is TAEHV's (github.com/madebyollin/taehv): a small decoder
that takes the large one's latents, and a small encoder that makes them. So the student serves every diffusion model of its
teacher.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor

from promag.training.config import UserError, required, setting

from .checkpoint import load_tokenizer
from .geometry import check_ratio


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Which autoencoder is distilled, and what its student learns to decode."""

    teacher: str = required("folder of the autoencoder whose latents are learned; each stage learns those of its ratio")
    target: Literal["clips", "teacher"] = setting(
        "clips", "what decoded latents must equal: the clips, or the teacher's reconstructions, whose decoder then runs too"
    )


class CrossedAutoencoder:
    """Encodes with one autoencoder and decodes with another one that knows the same latents: no module, it holds no weights."""

    def __init__(self, encoder: Any, decoder: Any):
        self.encoder, self.decoder = encoder, decoder

    @property
    def device(self) -> torch.device:
        """The device of the decoding autoencoder."""
        return self.decoder.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the decoding autoencoder's weights."""
        return self.decoder.dtype

    def __call__(self, x: Tensor, temporal_ratio: int) -> DecoderOutput:
        """B C 1+r*N H W -> the same, through the mean of the posterior."""
        z = self.encoder.encode(x, temporal_ratio).latent_dist.mode()
        return self.decoder.decode(z, temporal_ratio)


def load_teacher(folder: str, student: Any, temporal_ratio: int) -> Any:
    """Load a frozen autoencoder whose latents of a ratio the student is to learn.

    Raises UserError where its ratios, its latents' channels or its pixels per latent position do not fit the student.
    """
    teacher: Any = load_tokenizer(folder)
    try:
        check_ratio(temporal_ratio, teacher.temporal_ratios)
    except ValueError as error:
        raise UserError(f"distill.teacher {folder}: {error}") from None
    for key, value, other in (
        ("latent_channels", *(model.level_channels[model.level_of(temporal_ratio)] for model in (teacher, student))),
        ("pixels per latent position", *(model.spatial_compression_ratio for model in (teacher, student))),
    ):
        if value != other:
            raise UserError(
                f"distill.teacher {folder}: its {temporal_ratio}x latents have {key} {value}, the model's {other}; "
                "choose `model` so that they are equal"
            )
    return teacher.requires_grad_(False)


def move_teacher(teacher: Any, temporal_ratios: Sequence[int], decodes: bool, device: torch.device) -> Any:
    """Move to a device what runs of a teacher, and return it: what encodes at some ratios, or all if it `decodes` too."""
    for ratio in temporal_ratios:
        # `teacher.device` is that of its encoder, also where a level has its own copy of it.
        for module in [teacher] if decodes else [teacher.encoder, *teacher.encoding_path(teacher.level_of(ratio))]:
            module.to(device)
    return teacher


def take_entries(student: Any, teacher: Any) -> None:
    """Give a student's configuration what the pipelines of its teacher's family read, beside settings of its own.

    `block_out_channels` is both: the pipelines of CogVideoX count the teacher's to know the pixels per latent position.
    """
    own, both = student.own_config, teacher.family_entries().keys() & {"block_out_channels"}
    read = both | {key for key in teacher.config if key not in own and not key.startswith("_")}
    if read:
        student.register_to_config(entries={key: value for key, value in teacher.config.items() if key in read})
