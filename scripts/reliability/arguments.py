"""Try odd arguments and damaged parts of pipelines and caches, and count the answers and the clear refusals.

A small random pipeline is sampled with every odd argument, and copies of what it saves are damaged and loaded. An outcome is
clear if it is a finite result, or a ValueError or OSError of one line that names the argument or the file. No pickle may be
loaded.
"""

import logging
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from promag.scripts._options import check_writable, share
from promag.training.command_line import Parser, run_main
from promag.training.run import append_result

from .damaged_parts import damaged_parts
from .odd_arguments import make_pipeline, odd_arguments
from .outcomes import ANSWERED, REFUSED, outcome


def main(argv: Sequence[str]) -> int:
    """Print each wrong outcome and the counts, append them with --record; return 1 if an outcome was wrong."""
    parser = Parser(__doc__)
    parser.add_argument("--seconds", type=float, default=600, help="stop after so many seconds")
    share(parser, "--record")
    arguments = parser.parse_args(argv)
    check_writable("--record", arguments.record, appended=True)
    logging.disable(logging.CRITICAL)
    diffusers.utils.logging.disable_progress_bar()
    transformers.logging.disable_progress_bar()  # pyright: ignore[reportAttributeAccessIssue]
    torch.set_num_threads(1)
    pipe, started = make_pipeline(), time.monotonic()
    counts: dict[str, Counter] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for kind, cases in (("arguments", odd_arguments(pipe)), ("parts", damaged_parts(pipe, Path(scratch)))):
            count = counts[kind] = Counter()
            for case in cases:
                if time.monotonic() - started > arguments.seconds:
                    print(f"stopped after {arguments.seconds:g} s: not all {kind} were tried")
                    break
                result = outcome(case)
                known = result in (ANSWERED, REFUSED)
                count["tried"] += 1
                count[result if known else "wrong"] += 1
                if not known:
                    print(f"{case.what}: {result}", flush=True)
    record: dict[str, Any] = {"tried": sum(count["tried"] for count in counts.values())}
    record["clear"] = sum(count[ANSWERED] + count[REFUSED] for count in counts.values())
    record["wrong"] = record["tried"] - record["clear"]
    for kind, count in counts.items():
        record[kind] = {name: count[name] for name in ("tried", ANSWERED, REFUSED)}
    record["seconds"] = round(time.monotonic() - started, 1)
    print("  ".join(f"{key} {value}" for key, value in record.items()))
    if arguments.record:
        append_result(arguments.record, {"what": "damaged parts and odd arguments", **record})
    return int(record["wrong"] > 0)


if __name__ == "__main__":
    raise SystemExit(run_main(main))
