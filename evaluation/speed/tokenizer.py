"""Suite `tokenizer`: encoding and decoding one clip at every level, ours and published architectures.

Untrained weights in the precision itself (no autocast), random pixels and latents, batch 1, no_grad. Ours code whole clips
without tiles or chunks, published architectures have the defaults of diffusers, such as framewise coding.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from promag.training.compilation import compile_blocks
from promag.training.precision import DTYPES, Chosen

from .cases import Group, Job, Options
from .subjects import Size, Subject, check_clip, count_coding, find_presets, parse_size, peer_subject, tokenizer_subject

SIZES = {"cpu": ("17x128x128",), "cuda": ("65x256x256",)}
RANKS = {"small": 0, "base": 2}  # base takes minutes on a CPU


def groups(options: Options) -> list[Group]:
    """Return a group for each model, clip size, precision and way to run; raises UserError for clips that do not fit."""
    subjects = []
    for subject in map(tokenizer_subject, find_presets(options.presets, "tokenizer")):
        if ratios := tuple(ratio for ratio in subject.ratios if ratio in options.ratios):
            subjects.append(replace(subject, ratios=ratios, step=max(ratios)))
    subjects += [peer_subject(name) for name in options.peers]
    sizes = [parse_size(text) for text in options.clip_sizes or SIZES[options.device.type]]
    for subject in subjects:
        for size in sizes:
            check_clip(subject, size)
    return [
        _group(subject, size, precision, compiled, options)
        for size in sizes
        for precision in options.precisions
        for subject in subjects
        for compiled in (options.compiled if subject.config else (False,))
    ]


def _group(subject: Subject, size: Size, precision: Chosen, compiled: bool, options: Options) -> Group:
    settings = [
        {"part": part, "model": subject.name, "ratio": ratio, "shape": [1, 3, *size], "precision": precision}
        | {"compiled": compiled}
        for ratio in subject.ratios
        for part in ("encode", "decode")
    ]

    def build() -> Sequence[Job]:
        torch.manual_seed(0)
        with torch.device(options.device):
            model = subject.make().to(DTYPES[precision]).eval()
        if compiled:
            compile_blocks(model)
        return [job for ratio in subject.ratios for job in _coding(model, subject, size, ratio)]

    return Group("tokenizer", settings, build, "convolution", RANKS.get(subject.name, 1))


def _coding(model: Any, subject: Subject, size: Size, ratio: int) -> list[Job]:
    """Return the jobs of encoding and of decoding one clip."""
    counted = count_coding(subject, size, ratio)
    own: dict[str, Any] = {"device": model.device, "dtype": model.dtype}
    x = torch.rand(1, 3, *size, **own) * 2 - 1
    z = torch.randn(*counted["latent_shape"], **own)
    facts = {key: counted[key] for key in ("latent_shape", "latent_values", "parameters")}
    return [
        Job(torch.no_grad()(lambda: model.encode(x, ratio).latent_dist.mode()), size[0], counted["encode_gflop"], facts),
        Job(torch.no_grad()(lambda: model.decode(z, ratio).sample), size[0], counted["decode_gflop"], facts),
    ]
