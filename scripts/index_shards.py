"""Decode the samples of tar shards once, strictly, and write the index that training reads.

index_shards.py "shards/{000000..000099}.tar" --out shards/shards.jsonl

For shards that write_shards.py wrote this is not needed. A sample is a video or an image (.mp4, .webm, .jpg, ...) and its
caption (.json with the key caption, or .txt), under one name.
"""

import argparse
import time
from collections.abc import Sequence

from promag.data.tar_writer import index_shards
from promag.training.config import run_main


def main(argv: Sequence[str]) -> None:
    """Run the command; raises UserError for mistakes, truncated shards and too many bad samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", metavar="PATTERN", help="paths, URLs or pipe: commands, with braces; wildcards in paths")
    parser.add_argument("--out", metavar="shards.jsonl", required=True, help="the index to write, to lie beside the shards")
    parser.add_argument("--max-bad", type=float, default=0.01, help="part of the samples that may be bad (0.01)")
    parser.add_argument("--workers", type=int, default=2, help="shards that are decoded side by side (2)")
    arguments = parser.parse_args(argv)

    started = time.perf_counter()
    samples, bad = index_shards(arguments.shards, arguments.out, arguments.max_bad, arguments.workers)
    print("\n  ".join([f"bad samples, which are never drawn: {len(bad)}", *bad]))
    print(f"wrote {samples} samples to {arguments.out} in {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    raise SystemExit(run_main(main))
