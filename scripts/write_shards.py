"""Write the clips of an index as shuffled tar shards, with the index that training reads.

write_shards.py clips.jsonl --out shards/ --per-shard 1000
write_shards.py clips.jsonl --out shards/ --buckets "[[1, 256, 256], [17, 128, 224], [17, 128, 128]]"
"""

import argparse
import time
from collections.abc import Sequence

import yaml

from promag.data.buckets import Bucket
from promag.data.tar_writer import write_shards
from promag.training.config import UserError, run_main


def main(argv: Sequence[str]) -> None:
    """Run the command; raises UserError for mistakes, and for videos that changed since they were prepared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", metavar="CLIPS.jsonl", help="an index made by prepare_clips.py")
    parser.add_argument("--out", metavar="FOLDER", required=True, help="the shards' folder; an interrupted call continues")
    parser.add_argument("--per-shard", type=int, default=1000, help="clips in a shard (1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the clips (0)")
    parser.add_argument("--buckets", help="[[frames, height, width], ...]: shards that hold clips of one bucket each")
    arguments = parser.parse_args(argv)

    started = time.perf_counter()
    buckets = parse_buckets(arguments.buckets) if arguments.buckets else ()
    written = write_shards(arguments.clips, arguments.out, arguments.per_shard, arguments.seed, buckets)
    if written.repeated:
        print(f"{written.repeated} clips are cut from a video that another one holds too: each holds all of it")
    seconds = time.perf_counter() - started
    print(
        f"wrote {written.samples} clips, {written.bytes / 1e9:.2f} GB, in {written.shards} shards to {arguments.out} in "
        f"{seconds:.1f} s; {written.left_out} clips left out"
    )


def parse_buckets(text: str) -> list[Bucket]:
    """Read a list of [frames, height, width]; raises UserError for anything else."""
    try:
        values = yaml.safe_load(text)
        return [Bucket(frames, height, width, batch_size=None) for frames, height, width in values]
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise UserError(f"buckets {text!r}: [[frames, height, width], ...] is needed: {' '.join(str(error).split())}") from None


if __name__ == "__main__":
    raise SystemExit(run_main(main))
