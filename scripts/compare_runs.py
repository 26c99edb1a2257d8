"""Compare the curves of two trainings that should be alike, step by step.

Both are the stage folders of finished runs, of the same global batch: runs/x/16x.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from promag.training.config import UserError, load_yaml, run_main
from promag.training.run import append_result, read_curve


def main(argv: Sequence[str]) -> int:
    """Print for each key how far the curves are apart, and record both with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("stages", nargs=2, metavar="NAME=FOLDER", help="what to call it; folder of a stage")
    parser.add_argument("--keys", nargs="+", default=["loss", "gradient_norm"], help="which figures")
    parser.add_argument("--record", type=Path, help="append a JSON line with curves, commit and machine to this results file")
    arguments = parser.parse_args(argv)
    stages = dict(text.split("=", 1) for text in arguments.stages if "=" in text)
    if len(stages) < 2:
        raise UserError(f"{' '.join(arguments.stages)}: two different NAME=FOLDER are needed")
    curves = {key: {name: read_curve(Path(folder), key) for name, folder in stages.items()} for key in arguments.keys}
    apart = {key: largest_difference(*found.values()) for key, found in curves.items()}
    for key, value in apart.items():
        steps = len(next(iter(curves[key].values())))
        print(f"{key}: at most {value:.2g} apart, relatively, over {steps} logged steps")
    if arguments.record:
        first = next(iter(stages.values()))
        config = load_yaml(Path(first).parent / "config.yaml")
        record = {"what": "runs compared", "relative_difference": apart, "curves": curves, "config": config}
        append_result(arguments.record, json.loads(json.dumps(record)))
    return 0


def largest_difference(one: Sequence[tuple[float, float]], two: Sequence[tuple[float, float]]) -> float:
    """Return the largest relative difference of two curves; raises UserError where their steps differ."""
    if [step for step, _ in one] != [step for step, _ in two]:
        raise UserError(f"curves of {len(one)} and {len(two)} points: both must be logged at the same steps")
    return max(abs(a - b) / max(abs(a), abs(b), 1e-12) for (_, a), (_, b) in zip(one, two, strict=True))


if __name__ == "__main__":
    raise SystemExit(run_main(main))
