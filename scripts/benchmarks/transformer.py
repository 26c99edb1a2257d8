"""Measure what a token budget costs a transformer in training and denoising.

Weights are untrained: cost does not depend on them. Budgets are measured in turns; speedups are against the first. MFU is the
model's own arithmetic over the best of a few large matrix products in the same run.
"""

from collections.abc import Sequence
from typing import Any

from promag.diffusion.config import DiffusionConfig
from promag.evaluation.budgets import Budget
from promag.evaluation.cost import BudgetCosts, Effort
from promag.scripts._options import share
from promag.tokenizer.geometry import SPATIAL_RATIO, latent_frames, tokens
from promag.training.command_line import Parser, run_main
from promag.training.config import UserError
from promag.training.run import append_result
from promag.training.throughput import matmul_tflops

CHANNELS = 8  # of the latents; they play no part but in the first and the last layer


def main(argv: Sequence[str]) -> int:
    """Print a line for each budget; with --record append them as a JSON line."""
    parser = Parser(__doc__)
    share(parser, "--ratios", default=[4, 8, 16], help="temporal ratios, the baseline first")
    share(parser, "--frames", help="pixel frames of a clip")
    share(parser, "--train-batch-size", "--batch-size", default=8)
    share(parser, "--steps", help="denoising steps, each with and without text; 0 leaves them out")
    share(parser, "--rounds", default=7)
    share(parser, "--record")
    arguments, config = parser.parse_with_config(DiffusionConfig, argv)

    size = {"frames": arguments.frames, "height": config.data.size, "width": config.data.size}
    budgets = [Budget(f"{ratio}x", None, ratio, SPATIAL_RATIO, CHANNELS, True) for ratio in dict.fromkeys(arguments.ratios)]
    try:
        costs = BudgetCosts(budgets, config, size["height"], size["width"])
        for budget in budgets:
            tokens(**size, ratio=budget.ratio, patch=costs.patch)  # refuses frames and sizes that do not fit
    except ValueError as error:
        raise UserError(str(error)) from None
    effort = Effort(arguments.train_batch_size, arguments.steps, arguments.rounds, arguments.batch_size)
    measured = costs.measure_length(arguments.frames, effort)
    peak = matmul_tflops(costs.device, bf16=costs.precision == "bf16")

    rows: list[dict[str, Any]] = []
    baseline = measured[budgets[0].name]
    for budget in budgets:
        row = measured[budget.name]
        kinds = [kind for kind in ("gradient", "train_step", "denoising") if f"{kind}_seconds" in row]
        flops = 1e9 * arguments.train_batch_size * row["training_gflops"]
        row |= {f"{kind}_speedup": baseline[f"{kind}_seconds"] / row[f"{kind}_seconds"] for kind in kinds}
        row |= {f"{kind}_mfu": flops / row[f"{kind}_seconds"] / 1e12 / peak for kind in kinds if kind != "denoising"}
        row["train_tokens_per_second"] = row["tokens"] * arguments.train_batch_size / row["train_step_seconds"]
        rows.append({"ratio": budget.ratio, "latent_frames": latent_frames(arguments.frames, budget.ratio), **row})
        print("  ".join(f"{key} {value:.4g}" for key, value in rows[-1].items()))
    if arguments.record:
        optimizers = (
            "AdamW" if config.optimization.muon_learning_rate is None else "Muon for the blocks' matrices, AdamW for the rest"
        )
        protocol = (
            f"{costs.precision}, batch {arguments.train_batch_size}: gradients (forward, backward) and train step "
            f"(with {optimizers}); {arguments.steps} denoising steps of {arguments.batch_size} videos at once with guidance, "
            f"without decoding, seconds per video; medians of {arguments.rounds} rounds in turns; peaks leave out what was "
            "allocated before; FLOPs counted, of one clip"
        )
        facts = {"compiled": config.compile, "attention": costs.attention, "matmul_tflops": peak}
        parameters = costs.parameters(budgets[0])
        record = {"what": "cost", "seed": config.seed, **size, "parameters": parameters, "protocol": protocol, **facts}
        append_result(arguments.record, {**record, "rows": rows})
    return 0


if __name__ == "__main__":
    raise SystemExit(run_main(main))
