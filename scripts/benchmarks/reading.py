"""Measure how fast frames are read, with PyAV and decord, against the decoder alone.

promag benchmark reading --record docs/results/reading.jsonl
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from promag.data.video import write_video
from promag.data.video.container import open_container
from promag.data.video.decord_reader import read_with_decord
from promag.data.video.reader import has_decord, read_with_pyav
from promag.scripts._options import share
from promag.training.command_line import Parser, run_main
from promag.training.run import append_result

CLIP = 17  # frames
FRAMES = 500
FILES = {"256p": (256, 456), "720p": (720, 1280)}
KEY_EVERY = (12, 250)


def main(argv: Sequence[str]) -> int:
    """Print the figures; with --record append them as a JSON line."""
    parser = Parser(__doc__)
    parser.add_argument("--repeats", type=int, default=20, help="clips that are read for each median")
    share(parser, "--record", "--note")
    arguments = parser.parse_args(argv)

    readers: dict[str, Callable[[Path, list[int]], np.ndarray]] = {"pyav": read_with_pyav}
    if has_decord():
        readers["decord"] = read_with_decord
    files: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (height, width) in FILES.items():
            for key_every in KEY_EVERY:
                path = Path(folder, f"{name}-{key_every}.mp4")
                write_video(path, moving(FRAMES, height, width), 25, crf=23, key_every=key_every)
                label = f"{name}, a key frame every {key_every}"
                files[label] = {"decoder": decoder_limit(path)}
                print(f"{label}: the decoder alone {files[label]['decoder']:.0f} frames/s")
                for reader, read in readers.items():
                    files[label][reader] = speed(read, path, arguments.repeats)
                    print(
                        f"  {reader}: "
                        + ", ".join(f"{kind} {value:.0f} frames/s" for kind, value in files[label][reader].items())
                    )
    if arguments.record:
        append_result(arguments.record, {"what": "reading", "clip": CLIP, "threads": 1, "files": files, "note": arguments.note})
    else:
        print(json.dumps(files))
    return 0


def moving(frames: int, height: int, width: int) -> Any:
    """Yield a textured picture that moves and fades, in chunks: uint8 (T, H, W, 3)."""
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 255, (height // 8 + 64, width // 8 + 64, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    for frame in range(frames):
        top, left = frame % 256, 2 * frame % 256
        yield texture[None, top : top + height, left : left + width]


def decoder_limit(path: Path) -> float:
    """Return the frames a second of decoding a whole file without making pictures of the frames."""
    started = time.perf_counter()
    with open_container(path) as video:
        count = sum(1 for _ in video.frames())
    return count / (time.perf_counter() - started)


def speed(read: Callable[[Path, list[int]], np.ndarray], path: Path, repeats: int) -> dict[str, float]:
    """Return frames a second of reading clips one after another, at random places, and of scattered frames."""
    rng = np.random.default_rng(0)
    starts = rng.integers(FRAMES - CLIP, size=repeats)
    kinds = {
        "in order": [list(range(k * CLIP, (k + 1) * CLIP)) for k in range(min(repeats, FRAMES // CLIP))],
        "random clips": [list(range(start, start + CLIP)) for start in starts.tolist()],
        "scattered": [sorted(rng.choice(FRAMES, CLIP, replace=False).tolist()) for _ in range(max(3, repeats // 4))],
    }
    read(path, [0])  # tables are kept
    found = {}
    for kind, wanted in kinds.items():
        seconds = []
        for indices in wanted:
            started = time.perf_counter()
            read(path, indices)
            seconds.append(time.perf_counter() - started)
        found[kind] = CLIP / statistics.median(seconds)
    return found


if __name__ == "__main__":
    raise SystemExit(run_main(main))
