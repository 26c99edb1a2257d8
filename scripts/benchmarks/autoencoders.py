"""Measure speed and memory of video autoencoders, ours at every level and published ones.

Weights are untrained: cost does not depend on them. Published architectures (--baselines) have the defaults of their classes in
diffusers. A measurement that runs out of memory is recorded as such, and the run goes on.
"""

import argparse
import dataclasses
import gc
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from promag import AutoencoderKLProMAG
from promag.evaluation.speed.timing import measure_in_turns, peak_bytes
from promag.scripts._options import share
from promag.tokenizer.config import StageConfig, TokenizerConfig
from promag.tokenizer.existing import existing_class
from promag.tokenizer.geometry import SPATIAL_RATIO, check_frames, check_size
from promag.tokenizer.levels import parameter_count
from promag.tokenizer.objectives import StageObjective
from promag.tokenizer.train import train_only
from promag.training.command_line import Parser, run_main
from promag.training.compilation import compile_blocks
from promag.training.config import UserError, build, load_yaml
from promag.training.device import best_device
from promag.training.loop import seeded
from promag.training.optimizers import make_optimizers
from promag.training.precision import DTYPES, autocast, choose_precision
from promag.training.run import append_result
from promag.training.throughput import matmul_tflops

# Classes whose defaults are a published architecture (diffusers 0.42.1), and its name.
BASELINES = {
    "AutoencoderKLWan": "Wan 2.1",
    "AutoencoderKLLTXVideo": "LTX-Video 0.9.0",
    "AutoencoderKLCogVideoX": "CogVideoX",
    "AutoencoderKLHunyuanVideo": "HunyuanVideo",
}
MIB = 2**20
Size = tuple[int, int, int]  # frames, height, width in pixels


@dataclass(frozen=True)
class Subject:
    """A measured autoencoder."""

    name: str
    architecture: str
    make: Callable[[], Any]  # builds an untrained one on torch's default device
    ratios: tuple[int, ...]  # at which it is measured
    step: int  # it takes 1 + step*k frames
    spatial: int  # and sides that are multiples of this
    config: TokenizerConfig | None  # None for published architectures


def main(argv: Sequence[str]) -> int:
    """Print a line for each measurement; with --record append a JSON line for each model and size. 1: some had errors."""
    arguments = _parser().parse_args(argv)
    subjects = [_preset(path) for path in arguments.presets] + [_baseline(name) for name in arguments.baselines]
    sizes = [_size(text) for text in arguments.clip_sizes]
    _check(subjects, sizes, arguments)
    device = best_device()
    arguments.precision = choose_precision(arguments.precision, device)
    bad = 0
    for subject in subjects:
        bad += _measure(subject, sizes, device, arguments)
        if subject.config and arguments.train_batch_size:
            bad += _measure_training(subject, subject.config, sizes, device, arguments)
    return int(bad > 0)


def _parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("presets", nargs="*", default=[], help="presets of tokenizers: all levels that their stages grow")
    parser.add_argument(
        "--baselines", nargs="+", default=[], metavar="CLASS", help=f"classes of diffusers: {', '.join(BASELINES)}"
    )
    parser.add_argument("--clip-sizes", nargs="+", default=["17x128x128", "65x256x256"], help="FRAMESxHEIGHTxWIDTH")
    share(parser, "--rounds", "--record")
    share(parser, "--precision", help="type of weights and pixels; trainings use autocast")
    parser.add_argument("--compile", action="store_true", help="measure ours again with its repeated blocks compiled")
    share(parser, "--train-batch-size", default=None, help="measure training steps of ours too, with so many clips")
    return parser


# -- what is measured ------------------------------------------------------------------------------------------------


def _preset(path: str) -> Subject:
    config = build(TokenizerConfig, load_yaml(path), path)
    stem, parent = Path(path).stem, Path(path).parent.name
    name = stem if parent in ("tokenizer", "") else f"{parent}-{stem}"
    if config.model is None or config.stages[0].growth is not None:
        raise UserError(f"preset {path}: a configuration with a model of its own, and a first stage without growth, is needed")
    ratios = tuple(dict.fromkeys(stage.ratio for stage in config.stages))  # a last stage by turns adds none
    with torch.device("meta"):
        levels = _grow(config, config.stages[-1])[0].temporal_ratios
    if levels[0] != ratios[0]:
        raise UserError(f"preset {path}: stage {ratios[0]}x without growth: the base's strides make it {levels[0]}x")
    return Subject(name, "ProMAG", lambda: _grow(config, config.stages[-1])[0], ratios, ratios[-1], SPATIAL_RATIO, config)


def _grow(config: TokenizerConfig, last: StageConfig) -> tuple[Any, Sequence[int]]:
    """Return an untrained tokenizer with the levels up to a stage, and the ratios that this stage adds."""
    model: Any = AutoencoderKLProMAG(**asdict(config.model))  # pyright: ignore[reportArgumentType]
    added = model.temporal_ratios
    for stage in config.stages[1 : config.stages.index(last) + 1]:
        have = len(model.temporal_ratios)
        while model.temporal_ratios[-1] < stage.ratio:
            model.grow(stage.growth)
        added = model.temporal_ratios[have:] or (stage.ratio,)  # one by turns grows none
    return model, added


def _baseline(name: str) -> Subject:
    if name not in BASELINES:
        raise UserError(f"--baselines {name}: use one of {', '.join(BASELINES)}")
    with torch.device("meta"):
        model = _existing(name)
    step = model.base_ratio * model.latent_step
    return Subject(name, BASELINES[name], lambda: _existing(name), model.temporal_ratios, step, model.spatial_ratio, None)


def _existing(name: str) -> AutoencoderKLProMAG:
    """Return an autoencoder of diffusers in its published configuration, with random weights."""
    return AutoencoderKLProMAG.from_base(existing_class(name)().eval())


def _size(text: str) -> Size:
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    if not match:
        raise UserError(f"--clip-sizes {text}: FRAMESxHEIGHTxWIDTH is needed, for example 17x128x128")
    frames, height, width = map(int, match.groups())
    return frames, height, width


def _check(subjects: Sequence[Subject], sizes: Sequence[Size], arguments: argparse.Namespace) -> None:
    """Raise UserError for arguments that cannot be measured."""
    if not subjects:
        raise UserError("nothing to measure: give presets (tokenizer/small) or --baselines")
    for name in ("rounds", "train_batch_size"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: at least 1 is needed")
    for subject, (frames, height, width) in itertools.product(subjects, sizes):
        try:
            check_frames(frames, subject.step)
            check_size(height, width, subject.spatial)
        except ValueError as error:
            raise UserError(f"--clip-sizes {frames}x{height}x{width}, {subject.name}: {error}") from None


# -- encoding and decoding -------------------------------------------------------------------------------------------


def _measure(subject: Subject, sizes: Sequence[Size], device: torch.device, arguments: argparse.Namespace) -> int:
    """Measure one autoencoder at every size and ratio; return how many rows had errors."""
    counted = {(size, ratio): _count(subject, size, ratio) for size in sizes for ratio in subject.ratios}
    torch.manual_seed(0)
    with torch.device(device):
        model = subject.make().to(DTYPES[arguments.precision]).eval()
    bad = 0
    for compiled in (False, True) if arguments.compile and subject.config else (False,):
        if compiled:
            compile_blocks(model)
        for size in sizes:
            rows = []
            for ratio in subject.ratios:
                row = {"model": subject.name, "ratio": ratio, **_facts(size), "compiled": compiled}
                row |= {"parameters": _parameters(model, ratio), **counted[size, ratio]}
                row |= _row(model, size, ratio, row["latent_shape"], arguments.rounds)
                _print_row(row, "compiled" if compiled else "eager")
                rows.append(row)
            bad += sum("error" in row for row in rows)
            if arguments.record:
                described = {"model": subject.name, "architecture": subject.architecture, **_facts(size)}
                described |= {"dtype": arguments.precision, "compiled": compiled, "rounds": arguments.rounds}
                protocol = _protocol(arguments, subject)
                append_result(arguments.record, {"what": "tokenizer speed", **described, "protocol": protocol, "rows": rows})
    del model
    torch.compiler.reset()
    _free()
    return bad


def _count(subject: Subject, size: Size, ratio: int) -> dict[str, Any]:
    """Return the latent's shape and the arithmetic of encoding and decoding one clip, counted on tensors without data."""
    with torch.device("meta"), torch.no_grad():
        model = subject.make().eval()
        with FlopCounterMode(display=False) as encoding:
            z = model.encode(torch.empty(1, 3, *size), ratio).latent_dist.mode()
        with FlopCounterMode(display=False) as decoding:
            model.decode(z, ratio)
    return {
        "latent_shape": list(z.shape),
        "latent_values": prod(z.shape),
        "encode_gflops": encoding.get_total_flops() / 1e9,
        "decode_gflops": decoding.get_total_flops() / 1e9,
    }


def _parameters(model: Any, ratio: int) -> int:
    """Return the number of parameters that coding at a ratio uses, levels above it left out."""
    level = model.level_of(ratio)
    return parameter_count([*model.encoding_path(level), *model.decoding_path(level)])


def _row(model: Any, size: Size, ratio: int, latent: Sequence[int], rounds: int) -> dict[str, Any]:
    """Return seconds, frames a second and peak memory of encoding and of decoding, as far as they fit into memory."""
    x = torch.rand(1, 3, *size, device=model.device, dtype=model.dtype) * 2 - 1
    z = torch.randn(*latent, device=model.device, dtype=model.dtype)
    calls: dict[str, Callable[[], Any]] = {
        "encode": lambda: model.encode(x, ratio).latent_dist.mode(),
        "decode": lambda: model.decode(z, ratio).sample,
    }
    row: dict[str, Any] = {"out_of_memory": False}
    for name, call in calls.items():
        measured = _guarded(torch.no_grad()(lambda call=call: _seconds_and_peak(call, rounds)))
        if isinstance(measured, dict):
            row |= measured
        else:
            seconds, peak = measured
            row |= {f"{name}_seconds": seconds, f"{name}_frames_per_second": size[0] / seconds}
            row[f"{name}_peak_mib"] = peak / MIB
    return row


def _seconds_and_peak(call: Callable[[], Any], rounds: int) -> tuple[float, int]:
    return measure_in_turns({"call": call}, rounds)["call"], peak_bytes(call)


def _guarded(measure: Callable[[], Any]) -> Any:
    """Return the result of `measure`, or its failure as keys of a row."""
    try:
        return measure()
    except torch.cuda.OutOfMemoryError:
        failed: dict[str, Any] = {"out_of_memory": True}
    except RuntimeError as error:  # a kernel that refuses so large a tensor must not end an unattended run
        failed = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    _free()  # here, where no traceback holds tensors any more
    return failed


# -- training --------------------------------------------------------------------------------------------------------


def _measure_training(
    subject: Subject, config: TokenizerConfig, sizes: Sequence[Size], device: torch.device, arguments: argparse.Namespace
) -> int:
    """Measure a training step of every stage at every height and width; return how many rows had errors."""
    precision = choose_precision(config.precision, device)
    peak, bad = matmul_tflops(device, bf16=precision == "bf16"), 0
    for height, width in dict.fromkeys(size[1:] for size in sizes):
        rows = []
        for stage, ratio in [(part, ratio) for part in config.stages for ratio in sorted({*part.turns})]:
            size = (stage.frames, height, width)
            row = {"model": subject.name, "stage": stage.name, "ratio": ratio, **_facts(size)}
            row |= {"batch": arguments.train_batch_size}
            row |= {"gradient_checkpointing": config.gradient_checkpointing, "out_of_memory": False}
            row |= _training_row(config, stage, ratio, size, device, arguments, peak)
            _free()
            _print_row(row, "training")
            rows.append(row)
        bad += sum("error" in row for row in rows)
        if arguments.record:
            protocol = (
                f"a step of {arguments.train_batch_size} random clips with float32 weights in {precision}: forward, backward "
                "of the stage's pixel losses and KL (without LPIPS, discriminator and latent regression), clipping, the "
                f"optimisers of the stage's loop, which train what the stage trains; median of {arguments.rounds} rounds; "
                "FLOPs of forward and backward, recomputation and optimisers left out; MFU against matmul_tflops; peak "
                "beyond weights and moments, gradients included"
            )
            described = {"model": subject.name, "architecture": subject.architecture, "height": height, "width": width}
            described |= {"batch": arguments.train_batch_size, "rounds": arguments.rounds, "matmul_tflops": peak}
            append_result(
                arguments.record, {"what": "tokenizer training speed", **described, "protocol": protocol, "rows": rows}
            )
    return bad


def _training_row(
    config: TokenizerConfig,
    stage: StageConfig,
    ratio: int,
    size: Size,
    device: torch.device,
    arguments: argparse.Namespace,
    peak: float,
) -> dict[str, Any]:
    batch = arguments.train_batch_size
    pixels = dataclasses.replace(stage, latent_pretrain_steps=0, perceptual=None, adversarial=None)
    if stage.by_turns:
        pixels = dataclasses.replace(pixels, ratio=ratio, by_turns=None)  # a batch of that ratio
    with torch.device("meta"):
        objective = _objective(config, stage, pixels)
        with FlopCounterMode(display=False) as counter:
            objective({"video": torch.empty(batch, 3, *size)}, [seeded(i) for i in range(batch)], 0)["loss"].backward()
    flops = counter.get_total_flops()
    trained = [p for p in objective.parameters() if p.requires_grad]
    row: dict[str, Any] = {"trained_parameters": sum(p.numel() for p in trained), "step_gflops": flops / 1e9}

    def measure() -> dict[str, float]:
        step = _training_step(config, stage, pixels, size, batch, device)
        seconds, taken = _seconds_and_peak(step, arguments.rounds)
        tflops = flops / seconds / 1e12
        speed = {"step_seconds": seconds, "clips_per_second": batch / seconds, "tflops": tflops, "mfu": tflops / peak}
        return {**speed, "step_peak_mib": taken / MIB}

    return {**row, **_guarded(measure)}


def _objective(config: TokenizerConfig, stage: StageConfig, pixels: StageConfig) -> StageObjective:
    """Return what a stage trains, on a new model, with the losses of `pixels`; as train_stage prepares it."""
    model, added = _grow(config, stage)
    for module in model.modules():
        if isinstance(module, nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)  # pyright: ignore[reportCallIssue]
    train_only(model, stage, added)
    return StageObjective(model, pixels, added)


def _training_step(
    config: TokenizerConfig, stage: StageConfig, pixels: StageConfig, size: Size, batch: int, device: torch.device
) -> Callable[[], None]:
    torch.manual_seed(0)
    with torch.device(device):
        objective = _objective(config, stage, pixels).train()
        x = torch.rand(batch, 3, *size) * 2 - 1
    if config.gradient_checkpointing:
        objective.model.enable_gradient_checkpointing()
    optimizers = make_optimizers(objective, stage.optimization, choose_precision(config.precision, device))
    trained = [p for p in objective.parameters() if p.requires_grad]
    generators = [seeded(i, device=device) for i in range(batch)]

    def step() -> None:
        with autocast(device, config.precision):
            loss = objective({"video": x}, generators, 0)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(trained, stage.optimization.clip_norm)
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()

    return step


# -- output ----------------------------------------------------------------------------------------------------------


def _facts(size: Size) -> dict[str, int]:
    return dict(zip(("frames", "height", "width"), size, strict=True))


def _protocol(arguments: argparse.Namespace, subject: Subject) -> str:
    text = (
        f"untrained {arguments.precision} weights, random pixels and latents, batch 1, no_grad, no autocast; median of "
        f"{arguments.rounds} rounds after a warm-up; peaks are of tensors beyond weights and input; FLOPs: 2 for a "
        "multiply-add in convolutions, products and attention, counted on tensors without data"
    )
    if arguments.precision == "fp32":
        text += "; convolutions in TF32 where torch's default has it"
    if subject.config:
        return f"{text}; whole clips without tiles or chunks; parameters: those that the ratio uses"
    return f"{text}; defaults of diffusers, its framewise coding and temporal tiles, where they are on, included"


def _print_row(row: dict[str, Any], kind: str) -> None:
    parts = []
    for name in ("encode", "decode"):
        if f"{name}_seconds" in row:
            parts.append(
                f"{name} {row[f'{name}_seconds']:.4g} s, {row[f'{name}_frames_per_second']:.4g} frames/s, "
                f"{row[f'{name}_peak_mib']:.0f} MiB, {row[f'{name}_gflops']:.4g} GFLOP"
            )
    if "step_seconds" in row:
        parts.append(
            f"step of {row['batch']} {row['step_seconds']:.4g} s, {row['clips_per_second']:.4g} clips/s, "
            f"{row['step_peak_mib']:.0f} MiB, {row['tflops']:.4g} TFLOP/s, MFU {row['mfu']:.3f}"
        )
    if "latent_shape" in row:
        latent = f"latent {'x'.join(map(str, row['latent_shape']))}"
        parts.append(f"{row['parameters'] / 1e6:.4g} M parameters, {latent} = {row['latent_values']} values")
    if row["out_of_memory"]:
        parts.append("out of memory")
    if "error" in row:
        parts.append(row["error"])
    size = f"{row['frames']}x{row['height']}x{row['width']}"
    print(f"{row['model']} {row['ratio']}x, {size} {kind}: {'; '.join(parts)}", flush=True)


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    raise SystemExit(run_main(main))
