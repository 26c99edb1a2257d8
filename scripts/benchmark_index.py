"""Measure what opening a long clip index costs: seconds and resident memory, in processes of their own.

benchmark_index.py --rows 1000000 --record docs/results/training.jsonl
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from promag.training.clip_index import Clip, load_clips, row_of
from promag.training.config import run_main
from promag.training.run import append_result


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="clips in the index (1000000)")
    parser.add_argument("--read", type=int, default=10_000, help="rows that are then read at random (10000)")
    parser.add_argument("--record", type=Path, help="append a JSON line with commit and machine to this results file")
    parser.add_argument("--note", default="", help="what the recorded line says about the code that was measured")
    arguments = parser.parse_args(argv)

    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder, "clips.jsonl")
        write_index(index, arguments.rows)
        figures = {"rows": arguments.rows, "index_bytes": index.stat().st_size}
        for name in ("first", "again"):
            figures[name] = found = opened_apart(index, arguments.read)
            print(f"opened {name}: {found['seconds']:.2f} s, {found['resident_bytes'] / 2**20:.0f} MiB more resident memory")
    if arguments.record:
        append_result(arguments.record, {"what": "clip index", **figures, "note": arguments.note})
    else:
        print(json.dumps(figures))


def write_index(path: Path, rows: int) -> None:
    """Write an index of clips of many lengths and captions of 15 words; all of them are of one file, which is there."""
    (path.parent / "video.mp4").touch()
    rng = np.random.default_rng(0)
    words = ["red", "disc", "moves", "slowly", "over", "a", "textured", "meadow", "while", "clouds", "pass"]
    with open(path, "w") as file:
        for row in range(rows):
            caption = " ".join(words[k] for k in rng.integers(len(words), size=15))
            height, frames = (int(rng.choice(v)) for v in ((256, 360, 720), (65, 150, 300)))
            clip = Clip("video.mp4", 0.0, frames, 30.0, height * 16 // 9, height, caption, f"{row:064x}")
            file.write(json.dumps(row_of(clip)) + "\n")


def opened_apart(index: Path, read: int) -> dict[str, float]:
    """Open the index in a new process: seconds, resident bytes that it adds, seconds to read rows at random."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_open, (str(index), read))


def _open(index: str, read: int) -> dict[str, float]:
    before, started = _resident(), time.perf_counter()
    clips = load_clips(index)
    seconds, after = time.perf_counter() - started, _resident()
    places = np.random.default_rng(1).integers(len(clips), size=read)
    started = time.perf_counter()
    for place in places:
        _ = clips[int(place)].caption
    per_row = (time.perf_counter() - started) / max(1, read)
    return {"seconds": seconds, "resident_bytes": after - before, "seconds_per_row": per_row}


def _resident() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    raise SystemExit(run_main(main))
