"""Measure the seconds and memory of opening a long clip index and an index of shards.

promag benchmark clip-index --rows 1000000 --record docs/results/training.jsonl
"""

import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from promag.data.buckets import Bucket
from promag.data.clip_index import Clip, load_clips, row_of
from promag.data.epochs import EpochPlan
from promag.data.shards.index import ShardRow, open_shards
from promag.data.shards.reader import ALLOW_PIPES
from promag.data.shards.stream import ShardedClips, Sharding
from promag.evaluation.speed.timing import resident
from promag.scripts._memory import in_new_process
from promag.scripts._options import check_writable, share
from promag.training.command_line import Parser, run_main
from promag.training.run import append_result


def main(argv: Sequence[str]) -> int:
    """Print the figures; with --record append them as a JSON line."""
    parser = Parser(__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="clips in the index")
    parser.add_argument("--read", type=int, default=10_000, help="rows to read at random afterwards")
    share(parser, "--record", "--note")
    arguments = parser.parse_args(argv)
    check_writable("--record", arguments.record, appended=True)

    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder, "clips.jsonl")
        write_index(index, arguments.rows)
        figures: dict[str, Any] = {"rows": arguments.rows, "index_bytes": index.stat().st_size}
        for name in ("first", "again"):
            figures[name] = in_new_process(_open, str(index), arguments.read)
            print_figures(f"opened {name}", figures[name])
        write_shard_index(Path(folder, "shards.jsonl"), arguments.rows)
        figures["shards"] = in_new_process(_open_shards, folder, arguments.rows)
        print_figures("index of shards, with the order of an epoch", figures["shards"])
    if arguments.record:
        append_result(arguments.record, {"what": "clip index", **figures, "note": arguments.note})
    else:
        print(json.dumps(figures))
    return 0


def write_index(path: Path, rows: int) -> None:
    """Write an index of clips of many lengths and captions of 15 words, all in one existing file."""
    (path.parent / "video.mp4").touch()
    rng = np.random.default_rng(0)
    words = ["red", "disc", "moves", "slowly", "over", "a", "textured", "meadow", "while", "clouds", "pass"]
    with open(path, "w", encoding="utf-8") as file:
        for row in range(rows):
            caption = " ".join(words[k] for k in rng.integers(len(words), size=15))
            height, frames = (int(rng.choice(v)) for v in ((256, 360, 720), (65, 150, 300)))
            clip = Clip("video.mp4", 0.0, frames, 30.0, height * 16 // 9, height, caption, f"{row:064x}")
            file.write(json.dumps(row_of(clip)) + "\n")


def write_shard_index(path: Path, rows: int) -> None:
    """Write the index of shards of 1000 samples each."""
    rng = np.random.default_rng(0)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(-(-rows // 1000)):
            frames, height = (rng.choice(v, 1000).tolist() for v in ((65, 150, 300), (256, 360, 720)))
            width, fixed = [h * 16 // 9 for h in height], {"start": [0.0] * 1000, "fps": [30.0] * 1000}
            columns = {"frames": frames, "height": height, "width": width, **fixed}
            row = ShardRow(f"shard-{number:06d}.tar", 1000, 10**9, f"{number:064x}", **columns)
            file.write(json.dumps(asdict(row)) + "\n")


def print_figures(what: str, figures: dict[str, float]) -> None:
    """Print figures as one line."""
    print(f"{what}: {figures['seconds']:.2f} s, {figures['resident_bytes'] / 2**20:.0f} MiB more resident memory")


def _open_shards(folder: str, rows: int) -> dict[str, float]:
    os.environ[ALLOW_PIPES] = "1"
    before, started = resident(), time.perf_counter()
    shards = open_shards(f"pipe:cat {folder}/shard-{{000000..{-(-rows // 1000) - 1:06d}}}.tar")  # a pipe is not looked for
    buckets = [Bucket(frames, *size, batch_size=8) for frames in (1, 17, 65) for size in ((256, 448), (720, 1280))]
    plan = ShardedClips(shards, buckets, (1,), Sharding(concurrent_shards=4, shuffle=64))
    step = EpochPlan([len(numbers) for numbers in plan.numbers], [8] * len(buckets), 8, 4, 0)
    step.batch(100, 0)
    return {"seconds": time.perf_counter() - started, "resident_bytes": resident() - before}


def _open(index: str, read: int) -> dict[str, float]:
    before, started = resident(), time.perf_counter()
    clips = load_clips(index)
    seconds, after = time.perf_counter() - started, resident()
    places = np.random.default_rng(1).integers(len(clips), size=read)
    started = time.perf_counter()
    for place in places:
        _ = clips[int(place)].caption
    per_row = (time.perf_counter() - started) / max(1, read)
    return {"seconds": seconds, "resident_bytes": after - before, "seconds_per_row": per_row}


if __name__ == "__main__":
    raise SystemExit(run_main(main))
