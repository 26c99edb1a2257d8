"""Write clips as tar shards for training at scale, or index tar shards that others wrote.

promag shards write clips.jsonl --out shards/ --per-shard 1000
promag shards write clips.jsonl --out shards/ --buckets "[[1, 256, 256], [17, 128, 224], [17, 128, 128]]"
promag shards index "shards/{000000..000099}.tar" --out shards/shards.jsonl
"""

import argparse
import time
from collections.abc import Sequence

import yaml

from promag.data.buckets import Bucket
from promag.data.shards.writer import index_shards, write_shards
from promag.scripts._options import check_writable
from promag.training.command_line import Parser, run_main
from promag.training.config import UserError, read_yaml


def main(argv: Sequence[str]) -> int:
    """Run the command; raises UserError for mistakes, changed videos, truncated shards and too many bad samples."""
    parser = Parser(__doc__)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    summary = "shuffle the clips of an index into tar shards, and write the index that training reads beside them"
    write = actions.add_parser("write", help=summary, description=summary)
    write.set_defaults(run=_write)
    write.add_argument("clips", metavar="CLIPS.jsonl", help="an index made by `promag prepare-clips`")
    write.add_argument("--out", metavar="FOLDER", required=True, help="the shards' folder; an interrupted call continues")
    write.add_argument("--per-shard", type=int, default=1000, help="clips in a shard")
    write.add_argument("--seed", type=int, default=0, help="seed of the order of the clips")
    write.add_argument("--buckets", help="[[frames, height, width], ...]: shards that hold clips of one bucket each")

    summary = "decode every sample of tar shards once, strictly, and write the index that training reads beside them"
    index = actions.add_parser(
        "index",
        help=summary,
        description=f"{summary}. A sample is a video or an image (.mp4, .webm, .jpg, ...) and its caption (.json with the key "
        "caption, or .txt), under one name. Shards that `promag shards write` wrote have an index.",
    )
    index.set_defaults(run=_index)
    index.add_argument(
        "shards",
        metavar="PATTERN",
        help="paths, URLs or pipe: commands (PROMAG_ALLOW_PIPES=1), with braces",
    )
    index.add_argument("--out", metavar="shards.jsonl", required=True, help="the index to write, to lie beside the shards")
    index.add_argument("--max-bad", type=float, default=0.01, help="largest share of bad samples")
    index.add_argument("--workers", type=int, default=2, help="shards that are decoded side by side")

    arguments = parser.parse_args(argv)
    arguments.run(arguments)
    return 0


def _write(arguments: argparse.Namespace) -> None:
    started = time.perf_counter()
    buckets = parse_buckets(arguments.buckets) if arguments.buckets else ()
    written = write_shards(arguments.clips, arguments.out, arguments.per_shard, arguments.seed, buckets)
    if written.repeated:
        text = f"{written.repeated} clips are cut from a video that another one holds too: each holds all of it"
        print(f"{text}; prepare-clips --cut writes a file for each clip")
    seconds = time.perf_counter() - started
    print(
        f"wrote {written.samples} clips, {written.bytes / 1e9:.2f} GB, in {written.shards} shards to {arguments.out} in "
        f"{seconds:.1f} s; {written.left_out} clips left out"
    )


def _index(arguments: argparse.Namespace) -> None:
    check_writable("--out", arguments.out)
    started = time.perf_counter()
    samples, bad = index_shards(arguments.shards, arguments.out, arguments.max_bad, arguments.workers)
    print("\n  ".join([f"bad samples, which are never drawn: {len(bad)}", *bad]))
    print(f"wrote {samples} samples to {arguments.out} in {time.perf_counter() - started:.1f} s")


def parse_buckets(text: str) -> list[Bucket]:
    """Read a list of [frames, height, width]; raises UserError for anything else."""
    try:
        values = read_yaml(text)
        return [Bucket(frames, height, width) for frames, height, width in values]
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise UserError(f"buckets {text!r}: [[frames, height, width], ...] is needed: {' '.join(str(error).split())}") from None


if __name__ == "__main__":
    raise SystemExit(run_main(main))
