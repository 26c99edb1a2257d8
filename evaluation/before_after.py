"""An autoencoder, or a decoder, beside the one that it was trained from, on the same clips: quality, seconds, memory, size."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from promag.tokenizer.distillation import CrossedAutoencoder
from promag.tokenizer.levels import parameter_count
from promag.tokenizer.metrics import evaluate_fully
from promag.tokenizer.packaged_metrics import PerceptualMetrics
from promag.training.precision import Precision, autocast

from .speed.timing import MIB, measure_in_turns, peak_bytes

QUALITY = ("psnr", "ssim", "ms_ssim", "high_frequency", "flicker", "cvvdp", "vmaf", "frechet_frames", "psnr_std")
COST = ("encode_seconds", "decode_seconds", "encode_peak_mib", "decode_peak_mib", "encoder_parameters", "decoder_parameters")
BEFORE, AFTER, CROSSED = "before", "after", "after on latents of before"
TOKENIZER, TINY = "tokenizer", "tiny decoder"
SECONDS = "seconds: medians in turns, of one clip; memory: beyond weights"
PROTOCOL = (
    f"'{CROSSED}': the encoder of the one before and the decoder of the one after, as a model that was trained on the former's "
    f"latents is decoded by the latter; {SECONDS}"
)


@torch.no_grad()
def compare(
    before: Any,
    after: Any,
    clips: Callable[[], Iterable[Tensor]],
    temporal_ratio: int,
    results: Mapping[str, Any],
    precision: Precision = "auto",
    rounds: int = 5,
    perceptual: PerceptualMetrics | None = None,
    fps: Sequence[float] = (),
) -> dict[str, dict[str, float]]:
    """Return figures of two autoencoders at a ratio that both have, by the names BEFORE, AFTER and CROSSED.

    Args:
        before: the autoencoder that training started from, or a teacher.
        after: what was trained.
        clips: returns the clips anew, each 1 C T H W; the first one is measured for seconds and memory.
        temporal_ratio: a ratio of both.
        results: `evaluate_fully` of `after` on these clips.
        precision: precision in which models with float32 weights run.
        rounds: measurements of seconds; the median counts.
        perceptual, fps: as `evaluate_fully` takes them.

    CROSSED, without figures of cost, is there where the two have different latents of equal shape.
    """
    pair = {BEFORE: before, AFTER: after}
    quality = {BEFORE: evaluate_fully(before, clips(), temporal_ratio, perceptual, precision, fps), AFTER: results}
    if have_other_latents(before, after, temporal_ratio):
        crossed = CrossedAutoencoder(before, after)
        quality[CROSSED] = evaluate_fully(crossed, clips(), temporal_ratio, perceptual, precision, fps)
    rows = {name: {key: values[key] for key in QUALITY if key in values} for name, values in quality.items()}
    clip = next(iter(clips()))
    calls = {
        (name, part): call
        for name, model in pair.items()
        for part, call in _calls(model, clip.to(model.device), temporal_ratio, precision).items()
    }
    seconds = measure_in_turns(calls, rounds)
    for (name, part), call in calls.items():
        rows[name] |= {f"{part}_seconds": seconds[name, part], f"{part}_peak_mib": peak_bytes(call) / MIB}
    for name, model in pair.items():
        level = model.level_of(temporal_ratio)
        rows[name]["encoder_parameters"] = parameter_count(model.encoding_path(level))
        rows[name]["decoder_parameters"] = parameter_count(model.decoding_path(level))
    return rows


@torch.no_grad()
def compare_tiny_decoder(
    tokenizer: Any,
    tiny: Any,
    clips: Callable[[], Iterable[Tensor]],
    temporal_ratio: int,
    results: Mapping[str, Any],
    precision: Precision = "auto",
    rounds: int = 5,
    perceptual: PerceptualMetrics | None = None,
    fps: Sequence[float] = (),
) -> dict[str, dict[str, float]]:
    """Return figures of decoding a tokenizer's latents by itself and by a tiny decoder, by the names TOKENIZER and TINY.

    Arguments as `compare` takes them, `results` of the tokenizer.
    """
    crossed = evaluate_fully(CrossedAutoencoder(tokenizer, tiny), clips(), temporal_ratio, perceptual, precision, fps)
    rows = {name: {key: row[key] for key in QUALITY if key in row} for name, row in ((TOKENIZER, results), (TINY, crossed))}
    clip = next(iter(clips())).to(tokenizer.device)
    with autocast(clip.device, precision, tokenizer.dtype):
        z = tokenizer.encode(clip, temporal_ratio).latent_dist.mode()
    pair = {TOKENIZER: tokenizer, TINY: tiny}
    calls = {name: _decoding(model, z, temporal_ratio, precision) for name, model in pair.items()}
    for name, seconds in measure_in_turns(calls, rounds).items():
        rows[name] |= {"decode_seconds": seconds, "decode_peak_mib": peak_bytes(calls[name]) / MIB}
    rows[TOKENIZER]["decoder_parameters"] = parameter_count(tokenizer.decoding_path(tokenizer.level_of(temporal_ratio)))
    rows[TINY]["decoder_parameters"] = parameter_count([tiny])
    return rows


def have_other_latents(before: Any, after: Any, temporal_ratio: int) -> bool:
    """Tell whether two autoencoders encode a clip to different latents of equal shape."""
    if before.encoding_fingerprint(temporal_ratio) == after.encoding_fingerprint(temporal_ratio):
        return False
    shapes = [(m.level_channels[m.level_of(temporal_ratio)], m.spatial_compression_ratio) for m in (before, after)]
    return shapes[0] == shapes[1]


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Return the figures as lines of text, an autoencoder in each column."""
    keys = [key for key in (*QUALITY, *COST) if any(key in row for row in rows.values())]
    head = "".join(f"  {name:>{max(12, len(name))}}" for name in rows)
    lines = [f"{'':<20}{head}"]
    for key in keys:
        cells = ((f"{row[key]:.4g}" if key in row else "") for row in rows.values())
        lines.append(f"{key:<20}" + "".join(f"  {cell:>{max(12, len(name))}}" for cell, name in zip(cells, rows, strict=True)))
    return "\n".join(lines)


def _calls(model: Any, clip: Tensor, temporal_ratio: int, precision: Precision) -> dict[str, Callable[[], Tensor]]:
    """Return what encodes a clip and what decodes its latent."""

    def encode() -> Tensor:
        with autocast(clip.device, precision, model.dtype):
            return model.encode(clip, temporal_ratio).latent_dist.mode()

    return {"encode": encode, "decode": _decoding(model, encode(), temporal_ratio, precision)}


def _decoding(model: Any, z: Tensor, temporal_ratio: int, precision: Precision) -> Callable[[], Tensor]:
    """Return what decodes a latent."""

    def decode() -> Tensor:
        with autocast(z.device, precision, model.dtype):
            return model.decode(z, temporal_ratio).sample

    return decode
