"""Autoencoders that are measured, untrained because cost does not depend on weights: presets of ours and published ones."""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from promag.diffusion.config import DiffusionConfig
from promag.tokenizer.autoencoder import AutoencoderKLProMAG
from promag.tokenizer.config import StageConfig, TokenizerConfig
from promag.tokenizer.existing import existing_class
from promag.tokenizer.geometry import check_frames, check_size
from promag.tokenizer.levels import parameter_count
from promag.training.config import UserError, build, load_yaml

# Classes whose defaults are a published architecture (diffusers 0.42.1), and its name.
PEERS = {
    "AutoencoderKLWan": "Wan 2.1",
    "AutoencoderKLLTXVideo": "LTX-Video 0.9.0",
    "AutoencoderKLCogVideoX": "CogVideoX",
    "AutoencoderKLHunyuanVideo": "HunyuanVideo",
}
Size = tuple[int, int, int]  # frames, height, width in pixels


@dataclass(frozen=True)
class Subject:
    """A measured autoencoder."""

    name: str
    make: Callable[[], Any]  # builds an untrained one on torch's default device
    ratios: tuple[int, ...]  # at which it is measured
    step: int  # it takes 1 + step*k frames
    spatial: int  # and sides that are multiples of this
    config: TokenizerConfig | None  # None for published architectures


def tokenizer_subject(preset: str) -> Subject:
    """Return a tokenizer with all levels that a preset's stages grow; raises UserError for a preset without a model."""
    config = build(TokenizerConfig, load_yaml(preset), preset)
    if config.model is None or config.stages[0].growth is not None:
        raise UserError(
            f"preset {preset}: a configuration with a model of its own, and a first stage without growth, is needed"
        )
    ratios = tuple(dict.fromkeys(stage.ratio for stage in config.stages))  # a last stage by turns adds none

    def make() -> Any:
        return grow(config, config.stages[-1])[0]

    with torch.device("meta"):
        model = make()
    if (base := model.temporal_ratios[0]) != ratios[0]:
        raise UserError(f"preset {preset}: stage {ratios[0]}x without growth: the base's strides make it {base}x")
    return Subject(preset_name(preset), make, ratios, ratios[-1], model.spatial_ratio, config)


def peer_subject(name: str) -> Subject:
    """Return a published autoencoder by its class in diffusers; raises UserError for a class that is not in PEERS."""
    if name not in PEERS:
        raise UserError(f"--peers {name}: use one of {', '.join(PEERS)}")

    def make() -> AutoencoderKLProMAG:
        return AutoencoderKLProMAG.from_base(existing_class(name)().eval())

    with torch.device("meta"):
        model = make()
    step = model.base_ratio * model.latent_step
    return Subject(PEERS[name], make, model.temporal_ratios, step, model.spatial_ratio, None)


def find_presets(names: Sequence[str], kind: str) -> list[str]:
    """Return the presets of a kind, `tokenizer` or `diffusion`: NAME is KIND/NAME, and a path counts for what its keys are.

    Raises UserError for a preset that is not there.
    """
    chosen = []
    for name in names:
        if "/" not in name and not name.endswith(".yaml"):
            chosen.append(f"{kind}/{name}")
        elif ("stages" in load_yaml(name)) == (kind == "tokenizer"):
            chosen.append(name)
    return chosen


def diffusion_preset(preset: str) -> DiffusionConfig:
    """Return a text-to-video preset; raises UserError for one without a transformer of its own."""
    config = build(DiffusionConfig, load_yaml(preset), preset)
    if config.model is None:
        raise UserError(f"preset {preset}: model null: a configuration with a transformer of its own is needed")
    return config


def preset_name(preset: str) -> str:
    """Return a preset's name in a record: tiny of tokenizer/tiny, paper-tokenizer of paper/tokenizer."""
    stem, parent = Path(preset).stem, Path(preset).parent.name
    return stem if parent in ("tokenizer", "diffusion", "") else f"{parent}-{stem}"


def grow(config: TokenizerConfig, last: StageConfig) -> tuple[Any, Sequence[int]]:
    """Return an untrained tokenizer with the levels up to a stage, and the ratios that this stage adds."""
    model: Any = AutoencoderKLProMAG(**asdict(config.model))  # pyright: ignore[reportArgumentType]
    added = model.temporal_ratios
    for stage in config.stages[1 : config.stages.index(last) + 1]:
        have = len(model.temporal_ratios)
        while model.temporal_ratios[-1] < stage.ratio:
            model.grow(stage.growth)
        added = model.temporal_ratios[have:] or (stage.ratio,)  # one by turns grows none
    return model, added


def parse_size(text: str) -> Size:
    """Return frames, height and width of FRAMESxHEIGHTxWIDTH; raises UserError for anything else."""
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    if not match:
        raise UserError(f"--clip-sizes {text}: FRAMESxHEIGHTxWIDTH is needed, for example 17x128x128")
    frames, height, width = map(int, match.groups())
    return frames, height, width


def check_clip(subject: Subject, size: Size) -> None:
    """Raise UserError for a clip that a model does not take."""
    frames, height, width = size
    try:
        check_frames(frames, subject.step)
        check_size(height, width, subject.spatial)
    except ValueError as error:
        raise UserError(f"--clip-sizes {frames}x{height}x{width}, {subject.name}: {error}") from None


def count_coding(subject: Subject, size: Size, ratio: int) -> dict[str, Any]:
    """Return the latent's shape and the GFLOP of encoding and decoding one clip, counted on tensors without data."""
    with torch.device("meta"), torch.no_grad():
        model = subject.make().eval()
        with FlopCounterMode(display=False) as encoding:
            z = model.encode(torch.empty(1, 3, *size), ratio).latent_dist.mode()
        with FlopCounterMode(display=False) as decoding:
            model.decode(z, ratio)
    return {
        "latent_shape": list(z.shape),
        "latent_values": prod(z.shape),
        "encode_gflop": encoding.get_total_flops() / 1e9,
        "decode_gflop": decoding.get_total_flops() / 1e9,
        "parameters": _parameters(model, ratio),
    }


def _parameters(model: Any, ratio: int) -> int:
    """Return the number of parameters that coding at a ratio uses, levels above it left out."""
    level = model.level_of(ratio)
    return parameter_count([*model.encoding_path(level), *model.decoding_path(level)])
