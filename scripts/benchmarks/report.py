"""Make the tables of docs/performance.md from recorded lines.

promag benchmark report docs/results/*.jsonl --out docs/performance.md
"""

from collections.abc import Sequence
from pathlib import Path

from promag.reports.performance import fill
from promag.training.command_line import Parser, run_main
from promag.training.config import UserError
from promag.training.files import read_json_lines, write_atomically


def main(argv: Sequence[str]) -> int:
    """Fill the tables between a page's markers in place; the prose around them stays."""
    parser = Parser(__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="results files; older lines first")
    parser.add_argument("--out", type=Path, required=True, help="page whose tables are made anew")
    arguments = parser.parse_args(argv)
    for path in (*arguments.results, arguments.out):
        if not path.is_file():
            raise UserError(f"{path}: is no file")
    lines = [line for path in arguments.results for line in read_json_lines(path)]
    write_atomically(arguments.out, fill(arguments.out.read_text(encoding="utf-8"), lines))
    print(arguments.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_main(main))
