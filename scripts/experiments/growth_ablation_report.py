"""Write table and curves of the growth ablation from its recorded lines."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from promag.evaluation.growth_ablation import OURS, RATIO, WIDE, curves, gains, read, table
from promag.reports.plots import plot_file
from promag.training.config import run_main
from promag.training.run import write_atomically


def main(argv: Sequence[str]) -> int:
    """Print the table, what growth gains on the other ways to 16x, and draw PSNR by steps and by compute."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("results", type=Path, help="results file with the lines that claim.py recorded")
    parser.add_argument("--out", type=Path, help="folder for the plots; without it none are drawn")
    arguments = parser.parse_args(argv)
    rows = read(arguments.results)
    print(table(rows))
    for ours in (OURS, OURS + WIDE):
        if any(row["arm"] == ours for row in rows):
            print("\n" + gains(rows, ours))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        for name, (lines, x_label) in curves(rows).items():
            path = arguments.out / f"claim-{name}.svg"
            write_atomically(path, plot_file(lines, x_label, f"PSNR at {RATIO}x, dB"))
            print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_main(main))
