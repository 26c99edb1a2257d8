"""Measure what a token budget costs a transformer in training and denoising.

Weights are untrained: cost does not depend on them. Budgets are measured in turns; speedups are against the first. MFU is the
model's own arithmetic over the best of a few large matrix products in the same run.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from promag import ProMAGTransformer3DModel
from promag.diffusion.attention import choose_attention
from promag.diffusion.config import DiffusionConfig
from promag.diffusion.flops import training_flops
from promag.evaluation.cost import TEXT_TOKENS, denoising, measure_in_turns, train_step
from promag.scripts._options import share
from promag.tokenizer.geometry import latent_frames, tokens
from promag.training.command_line import Parser, run_main
from promag.training.compilation import compile_blocks
from promag.training.config import UserError
from promag.training.device import best_device
from promag.training.precision import DTYPES, choose_precision
from promag.training.run import append_result
from promag.training.throughput import matmul_tflops


def main(argv: Sequence[str]) -> int:
    """Print a table; with --record append it as a JSON line."""
    parser = Parser(__doc__)
    share(parser, "--ratios", default=[4, 8, 16], help="temporal ratios, the baseline first")
    share(parser, "--frames", help="pixel frames of a clip")
    share(parser, "--train-batch-size", "--batch-size", default=8)
    share(parser, "--steps", help="denoising steps, each with and without text; 0 leaves them out")
    share(parser, "--rounds", default=7)
    share(parser, "--record")
    arguments, config = parser.parse_with_config(DiffusionConfig, argv)

    size = {"frames": arguments.frames, "height": config.data.size, "width": config.data.size}
    device = best_device()
    precision = choose_precision(config.precision, device)
    ratios, steps = arguments.ratios, arguments.steps
    models: dict[int, Any] = {r: _transformer(config) for r in ratios}
    for model in models.values():
        attention = choose_attention(model.to(device), config.attention, device, DTYPES[precision])
        if config.compile:
            compile_blocks(model)
    gradients, trained = (
        measure_in_turns(
            {
                r: train_step(
                    models[r], **size, ratio=r, batch_size=arguments.train_batch_size, optimization=loop, precision=precision
                )
                for r in ratios
            },
            arguments.rounds,
        )
        for loop in (None, config.optimization)
    )
    calls = {
        r: denoising(models[r].eval(), **size, ratio=r, steps=steps, videos=arguments.batch_size, precision=precision)
        for r in ratios
        if steps
    }
    denoised = measure_in_turns(calls, arguments.rounds)
    peak = matmul_tflops(device, bf16=precision == "bf16")

    rows: list[dict[str, Any]] = []
    for ratio in ratios:
        count = tokens(**size, ratio=ratio, patch=tuple(models[ratio].config["patch_size"]))
        flops = training_flops(models[ratio].config, count, TEXT_TOKENS, arguments.train_batch_size)
        row = {
            "ratio": ratio,
            "latent_frames": latent_frames(arguments.frames, ratio),
            "tokens": count,
            "gradient_seconds": gradients[ratio],
            "gradient_speedup": gradients[ratios[0]] / gradients[ratio],
            "gradient_mfu": flops / gradients[ratio] / 1e12 / peak,
            "train_step_seconds": trained[ratio],
            "train_step_speedup": trained[ratios[0]] / trained[ratio],
            "train_step_mfu": flops / trained[ratio] / 1e12 / peak,
            "train_tokens_per_second": count * arguments.train_batch_size / trained[ratio],
        }
        if steps:
            row["denoise_seconds"] = denoised[ratio] / arguments.batch_size
            row["denoise_speedup"] = denoised[ratios[0]] / denoised[ratio]
        rows.append(row)
        print("  ".join(f"{key} {value:.4g}" for key, value in row.items()))
    if arguments.record:
        count = sum(p.numel() for p in models[ratios[0]].parameters())
        optimizers = (
            "AdamW" if config.optimization.muon_learning_rate is None else "Muon for the blocks' matrices, AdamW for the rest"
        )
        protocol = (
            f"{precision}, batch {arguments.train_batch_size}: gradients (forward, backward) and train step "
            f"(with {optimizers}); {arguments.steps} denoising steps of {arguments.batch_size} videos at once with "
            f"guidance, without decoding, seconds per video; medians of {arguments.rounds} rounds in turns"
        )
        how = {"compiled": config.compile, "attention": attention, "matmul_tflops": peak}
        record = {"what": "cost", "seed": config.seed, **size, "parameters": count, "protocol": protocol, **how, "rows": rows}
        append_result(arguments.record, record)
    return 0


def _transformer(config: DiffusionConfig) -> ProMAGTransformer3DModel:
    if config.model is None:
        raise UserError("model null: a configuration with a transformer of its own is needed")
    torch.manual_seed(config.seed)
    return ProMAGTransformer3DModel(
        **asdict(config.model),
        text_dim=config.text.width,
        pooled_dim=config.text.width,
    )


if __name__ == "__main__":
    raise SystemExit(run_main(main))
