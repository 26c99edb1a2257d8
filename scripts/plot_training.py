"""Draw curves of trainings from their metrics.jsonl files, as one SVG."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from promag.reports.plots import plot_file
from promag.training.config import UserError, run_main
from promag.training.run import read_curve, write_atomically


def main(argv: Sequence[str]) -> int:
    """Write the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "stages", nargs="+", metavar="NAME=FOLDER", help="what to call it; folder of a stage, runs/x/4x for example"
    )
    parser.add_argument("--keys", nargs="+", required=True, help="which figures: psnr, loss, generator, ...")
    parser.add_argument("--out", type=Path, required=True, help="SVG to write")
    parser.add_argument("--mean-over", type=int, default=1, help="log lines that one point averages")
    arguments = parser.parse_args(argv)
    if arguments.mean_over < 1:
        raise UserError(f"--mean-over {arguments.mean_over}: at least 1 is needed")
    lines: dict[str, list[tuple[float, float]]] = {}
    for text in arguments.stages:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise UserError(f"{text}: NAME=FOLDER is needed, for example ours=runs/tokenizer-tiny/4x")
        for key in arguments.keys:
            label = name if len(arguments.keys) == 1 else f"{name} {key}"
            lines[label] = _averaged(read_curve(Path(folder), key), arguments.mean_over)
    write_atomically(arguments.out, plot_file(lines, "steps", ", ".join(arguments.keys)))
    print(arguments.out)
    return 0


def _averaged(points: list[tuple[float, float]], count: int) -> list[tuple[float, float]]:
    groups = [points[i : i + count] for i in range(0, len(points), count)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


if __name__ == "__main__":
    raise SystemExit(run_main(main))
