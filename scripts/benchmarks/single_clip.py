"""Measure encoding and decoding one clip on a CPU, with and without oneDNN's convolution.

ONEDNN_MAX_CPU_ISA=AVX512_CORE or AVX2 in the environment shows what processors without newer instructions take.
"""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from promag.evaluation.speed.timing import measure_in_turns
from promag.scripts._options import share
from promag.tokenizer import convolution
from promag.tokenizer.checkpoint import load_tokenizer
from promag.tokenizer.geometry import check_frames, check_size
from promag.training.command_line import Parser, run_main
from promag.training.config import UserError
from promag.training.run import append_result

PROTOCOL = (
    "batch 1, float32, no_grad, one thread and its processor time: median of {rounds} rounds in turns after a warm-up; before: "
    "the convolution that PyTorch chooses"
)


def main(argv: Sequence[str]) -> int:
    """Print seconds before and after, and their ratio, for each clip and temporal ratio; --record appends a JSON line."""
    parser = Parser(__doc__)
    share(parser, "checkpoint", "--rounds", "--record")
    parser.add_argument("--clip-sizes", nargs="+", default=["65x64x64", "17x128x128"], help="FRAMESxHEIGHTxWIDTH")
    arguments = parser.parse_args(argv)
    if not convolution.AVAILABLE:
        raise UserError("this PyTorch has no oneDNN: there is nothing to compare")
    model: Any = load_tokenizer(arguments.checkpoint).float()
    sizes = {clip: _size(clip, model.temporal_ratios[-1]) for clip in arguments.clip_sizes}
    torch.set_num_threads(1)
    rows = []
    for clip, size in sizes.items():
        x = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
        for ratio in model.temporal_ratios:
            row = {"clip": clip, "ratio": ratio, **_row(model, x, ratio, arguments.rounds)}
            print(
                "  ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
            )
            rows.append(row)
    if arguments.record:
        instructions = os.environ.get("ONEDNN_MAX_CPU_ISA", "all that the processor has")
        facts = {"tokenizer": "/".join(Path(arguments.checkpoint).parts[-2:]), "instructions": instructions}
        protocol = PROTOCOL.format(rounds=arguments.rounds)
        append_result(arguments.record, {"what": "one clip on a CPU", **facts, "protocol": protocol, "rows": rows})
    return 0


def _size(clip: str, ratio: int) -> tuple[int, int, int]:
    try:
        frames, height, width = map(int, clip.split("x"))
    except ValueError:
        raise UserError(f"--clip-sizes {clip}: give FRAMESxHEIGHTxWIDTH, such as 17x128x128") from None
    try:
        check_frames(frames, ratio)
        check_size(height, width)
    except ValueError as error:
        raise UserError(f"--clip-sizes {clip}: {error}") from None
    return frames, height, width


@torch.no_grad()
def _row(model: Any, x: torch.Tensor, ratio: int, rounds: int) -> dict[str, float]:
    z = model.encode(x, ratio).latent_dist.mode()

    def with_kernel(call: Callable[[], Any], available: bool) -> Callable[[], None]:
        def timed() -> None:
            convolution.AVAILABLE = available
            call()

        return timed

    parts = {"encode": lambda: model.encode(x, ratio), "decode": lambda: model.decode(z, ratio)}
    calls = {
        f"{part}_seconds_{when}": with_kernel(call, available)
        for when, available in (("before", False), ("after", True))
        for part, call in parts.items()
    }
    seconds = measure_in_turns(calls, rounds, time.thread_time)
    before, after = (sum(seconds[f"{part}_seconds_{when}"] for part in parts) for when in ("before", "after"))
    return {**seconds, "speedup": before / after}


if __name__ == "__main__":
    raise SystemExit(run_main(main))
