"""Plot the curves that trainings logged, or measure how far two of them differ.

promag curves plot ours=runs/tokenizer-tiny/16x theirs=runs/direct/16x --keys psnr --out curves.svg
promag curves diff one=runs/one-process/16x two=runs/two-processes/16x
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from promag.reports.plots import plot_file
from promag.scripts._options import check_at_least_one, check_writable, share
from promag.training.command_line import Parser, run_main
from promag.training.config import UserError, load_yaml
from promag.training.files import write_atomically
from promag.training.run import append_result, read_curve

Curve = list[tuple[float, float]]  # (step, value)


def main(argv: Sequence[str]) -> int:
    """Plot or compare curves; raises UserError for folders and figures that are not there."""
    parser = Parser(__doc__)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    stage = "a name, and the folder of a stage of a training: runs/x/4x for example"

    summary = "draw the curves as an SVG"
    plot = actions.add_parser("plot", help=summary, description=summary)
    plot.set_defaults(run=_plot)
    plot.add_argument("stages", nargs="+", metavar="NAME=FOLDER", help=stage)
    plot.add_argument("--keys", nargs="+", required=True, help="figures: psnr, loss, generator, ...")
    plot.add_argument("--out", type=Path, required=True, help="SVG to write")
    plot.add_argument("--mean-over", type=int, default=1, help="log lines that one point averages")

    summary = "print the largest relative difference, step by step, of two trainings with the same global batch"
    diff = actions.add_parser("diff", help=summary, description=summary)
    diff.set_defaults(run=_diff)
    diff.add_argument("stages", nargs=2, metavar="NAME=FOLDER", help=stage)
    diff.add_argument("--keys", nargs="+", default=["loss", "gradient_norm"], help="figures")
    share(diff, "--record")

    arguments = parser.parse_args(argv)
    arguments.run(arguments)
    return 0


def read_curves(stages: Sequence[str], keys: Sequence[str]) -> dict[str, dict[str, Curve]]:
    """Return the curve of each stage, given as NAME=FOLDER, by key and name; raises UserError for mistakes."""
    folders: dict[str, Path] = {}
    for text in stages:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise UserError(f"{text}: NAME=FOLDER is needed, for example ours=runs/tokenizer-tiny/4x")
        if name in folders:
            raise UserError(f"{text}: there are two stages named {name}")
        folders[name] = Path(folder)
    return {key: {name: read_curve(folder, key) for name, folder in folders.items()} for key in keys}


def largest_difference(a: Curve, b: Curve) -> float:
    """Return the largest relative difference of two curves; raises UserError where their steps differ."""
    if [step for step, _ in a] != [step for step, _ in b]:
        raise UserError(f"curves of {len(a)} and {len(b)} points: both must be logged at the same steps")
    return max(abs(x - y) / max(abs(x), abs(y), 1e-12) for (_, x), (_, y) in zip(a, b, strict=True))


def _plot(arguments: argparse.Namespace) -> None:
    check_at_least_one(arguments, "mean_over")
    check_writable("--out", arguments.out)
    lines: dict[str, Curve] = {}
    for key, curves in read_curves(arguments.stages, arguments.keys).items():
        for name, points in curves.items():
            label = name if len(arguments.keys) == 1 else f"{name} {key}"
            lines[label] = _averaged(points, arguments.mean_over)
    write_atomically(arguments.out, plot_file(lines, "steps", ", ".join(arguments.keys)))
    print(arguments.out)


def _diff(arguments: argparse.Namespace) -> None:
    check_writable("--record", arguments.record, appended=True)
    curves = read_curves(arguments.stages, arguments.keys)
    differences = {key: largest_difference(*pair.values()) for key, pair in curves.items()}
    for key, value in differences.items():
        steps = len(next(iter(curves[key].values())))
        print(f"{key}: at most {value:.2g} apart, relatively, over {steps} logged steps")
    if arguments.record:
        config = load_yaml(Path(arguments.stages[0].partition("=")[2]).parent / "config.yaml")
        record = {"what": "runs compared", "relative_difference": differences, "curves": curves, "config": config}
        append_result(arguments.record, json.loads(json.dumps(record)))


def _averaged(points: Curve, count: int) -> Curve:
    groups = [points[i : i + count] for i in range(0, len(points), count)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


if __name__ == "__main__":
    raise SystemExit(run_main(main))
