"""Count the memory and FLOPs of training each text-to-video preset.

Nothing is trained, and large models are counted on tensors without data. Activations of the small text model, temporary tensors
of the backward pass, and what allocators and libraries take beside tensors are left out.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, astuple
from typing import Any

import torch

from promag.data.buckets import sides
from promag.diffusion.families import hidden_matrices
from promag.diffusion.flops import training_flops
from promag.evaluation.memory import activation_bytes, sharded_memory, small_text, static_memory, text_shape, transformer_alone
from promag.evaluation.speed.subjects import diffusion_preset, preset_name
from promag.scripts._options import check_writable, share
from promag.tokenizer.geometry import tokens
from promag.training.command_line import Parser, run_main
from promag.training.config import UserError
from promag.training.optimizers import muon_flops
from promag.training.run import append_result

RATIOS = (4, 16)
GIB, MIB = 2**30, 2**20


def main(argv: Sequence[str]) -> int:
    """Print a table for each preset; with --record append all as a JSON line."""
    parser = Parser(__doc__)
    parser.add_argument("presets", nargs="+", help="presets of text-to-video trainings: diffusion/tiny ...")
    parser.add_argument("--sizes", type=int, nargs="*", default=[], help="heights and widths beside the preset's own")
    parser.add_argument("--text-width", type=int, default=4096, help="width of frozen text encoders; 4096 is T5-XXL's")
    parser.add_argument(
        "--real", nargs="*", default=[], help="those of the presets that are measured on the CPU, at their own size"
    )
    parser.add_argument(
        "--processes", type=int, nargs="*", default=[], help="numbers of processes that FSDP2 shards weights over"
    )
    parser.add_argument("--no-clips", action="store_true", help="leave out activations, which take the most time to count")
    share(parser, "--record")
    arguments = parser.parse_args(argv)
    check_writable("--record", arguments.record, appended=True)
    names = [preset_name(preset) for preset in arguments.presets]
    if unknown := [preset for preset in arguments.real if preset_name(preset) not in names]:
        raise UserError(f"--real {', '.join(unknown)}: use one of the presets {', '.join(arguments.presets)}")
    rows = [_row(preset, arguments) for preset in arguments.presets]
    if arguments.record:
        protocol = (
            "float32 weights, gradients, moments, averages: from parameter counts; activations under bf16 autocast with "
            "attention that saves no scores: tensors that the graph saves, each storage once, batches of 3 minus 2; "
            "checkpointed: with one recomputed block's; on the CPU where measured is true, else on tensors without data; "
            "fsdp2: on the process with most rows; gathered: float32 outside of blocks, two blocks in bf16, "
            "gradients of one in both"
        )
        append_result(arguments.record, {"what": "training memory and arithmetic", "protocol": protocol, "rows": rows})
    return 0


def _row(preset: str, arguments: argparse.Namespace) -> dict[str, Any]:
    config, name, width = diffusion_preset(preset), preset_name(preset), arguments.text_width
    real = name in map(preset_name, arguments.real)
    widths, pooled, lengths = text_shape(config, width)
    with torch.device("meta"):
        transformer = transformer_alone(config.own_model, widths, pooled)
    text = small_text(config.text)
    trained = [*transformer.parameters(), *text]
    matrices = [] if config.optimization.muon_learning_rate is None else hidden_matrices(transformer)
    static = static_memory(trained, matrices)
    print(f"{name}: {sum(p.numel() for p in trained) / 1e6:.1f} M weights, {static.total / GIB:.2f} GiB: {static}")
    print(f"  Muon: {sum(muon_flops(p.shape) for p in matrices) / 1e9:.4g} GFLOP a step")
    row: dict[str, Any] = {
        "preset": name,
        "transformer_parameters": sum(p.numel() for p in transformer.parameters()),
        "text_parameters": sum(p.numel() for p in text),
        "muon_parameters": sum(p.numel() for p in matrices),
        "muon_flops_per_step": sum(muon_flops(p.shape) for p in matrices),
        "bytes": {**asdict(static), "total": static.total},
        "clips": [],
    }
    for world in arguments.processes:
        sharded = sharded_memory(transformer, text, matrices, world)
        row["fsdp2"] = {**row.get("fsdp2", {}), world: {**asdict(sharded), "total": sharded.total}}
        local, gathered = sharded.local / MIB, sharded.gathered / MIB
        print(f"  FSDP2 on {world} processes: {local:.0f} MiB on each, and up to {gathered:.0f} gathered")
    if arguments.no_clips:
        return row
    for size in sorted({config.data.size, *arguments.sizes}, key=sides):
        for ratio in RATIOS:
            measured = real and size == config.data.size
            activations = activation_bytes(config, width, ratio, size, fake=not measured)
            count = tokens(config.data.frames, *sides(size), ratio, config.own_model.patch_size)
            clip = {"frames": config.data.frames, "size": size, "ratio": ratio, "tokens": count, "measured": measured}
            clip |= {**asdict(activations), "training_flops": training_flops(transformer.config, count, lengths)}
            row["clips"].append(clip)
            shape = "x".join(map(str, sides(size)))
            per_clip, checkpointed, per_step = (value / MIB for value in astuple(activations))
            print(
                f"  {clip['frames']} frames of {shape} at {ratio}x, {count} tokens: {per_clip:.0f} MiB a clip, "
                f"{checkpointed:.0f} with checkpointing, and {per_step:.0f} a step; "
                f"{clip['training_flops'] / 1e9:.4g} GFLOP a clip"
            )
    return row


if __name__ == "__main__":
    raise SystemExit(run_main(main))
