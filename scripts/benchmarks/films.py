"""Measure what cutting a long film costs, and reading clips out of it.

promag benchmark films --minutes 20 --record docs/results/training.jsonl

The film consists of shots of 200 frames, so its cuts are known. `prepare-clips` runs as a command, with --scenes alone and with
--cut; its memory is that of all its processes. All other figures are seconds of CPU time.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from promag.data.clip_index import load_clips
from promag.data.scenes import check_scenes, scan
from promag.data.video import frame_times, pick_by_time, read_frames, write_video
from promag.data.video.container import open_container
from promag.evaluation.speed.timing import resident
from promag.scripts._memory import in_new_process, run_command
from promag.scripts._options import check_writable, share
from promag.training.command_line import Parser, run_main
from promag.training.run import append_result

FPS, SHOT, CLIP = 24, 200, 17  # frames a second, of a shot, of a clip that is read


def main(argv: Sequence[str]) -> int:
    """Print the figures; with --record append them as a JSON line."""
    parser = Parser(__doc__)
    parser.add_argument("--minutes", type=float, default=20, help="length of the film")
    parser.add_argument("--height", type=int, default=360, help="of its picture, 16:9")
    parser.add_argument("--repeats", type=int, default=20, help="clips that are read for each median")
    share(parser, "--record", "--note")
    arguments = parser.parse_args(argv)
    check_writable("--record", arguments.record, appended=True)
    check_scenes()
    with tempfile.TemporaryDirectory() as folder:
        film = Path(folder, "film.mp4")
        count = round(arguments.minutes * 60 * FPS)
        write_video(film, shots(count, arguments.height), FPS, crf=23)
        figures: dict[str, Any] = {"frames": count, "height": arguments.height, "bytes": film.stat().st_size}
        figures["shots"] = -(-count // SHOT)
        index, cut_index = Path(folder, "clips.jsonl"), Path(folder, "cut.jsonl")
        figures["scenes"] = run_command(*SCENES, film, "--out", index)
        clips = load_clips(index)
        right = sum(round(clip.start * FPS) % SHOT == 0 and clip.frames == SHOT for clip in clips)
        figures["scenes"] |= {"clips": len(clips), "of_one_whole_shot": right}
        figures["cut"] = run_command(*SCENES, film, "--out", cut_index, "--cut", Path(folder, "cut"))
        cut = load_clips(cut_index)
        figures["cut"]["clips"] = len(cut)
        figures["scan"] = {name: in_new_process(_scan, film, *given) for name, given in SCANS.items()}
        figures["table_seconds"] = cpu_seconds(_packets, film)[1]
        rng = np.random.default_rng(0)
        whole = [clip.path for clip in cut if clip.frames == SHOT]
        inside = rng.integers(SHOT - CLIP, size=arguments.repeats)
        from_film = [(film, rng.integers(count // SHOT) * SHOT + first) for first in inside]
        from_cut = [(rng.choice(whole), first) for first in inside]
        for name, reads in (("read_from_film", from_film), ("read_from_cut", from_cut)):
            _read(*reads[0])  # the table of the film is kept
            figures[name] = statistics.median(cpu_seconds(_read, *read)[1] for read in reads)
    print(json.dumps(figures, indent=1))
    if arguments.record:
        append_result(arguments.record, {"what": "films", **figures, "note": arguments.note})
    return 0


SCENES = ("prepare-clips", "--scenes", "--min-seconds", "1")
SCANS = {"decoding": (False, False), "motion": (False, True), "scenes": (True, True)}


def shots(frames: int, height: int) -> Iterator[np.ndarray]:
    """Yield shots of SHOT frames: a picture of random colours that drifts, and grain."""
    rng = np.random.default_rng(0)
    width = height * 16 // 9 // 2 * 2
    grain = rng.integers(-6, 7, (8, height, width, 3), np.int16)
    for frame in range(frames):
        if frame % SHOT == 0:
            colours = Image.fromarray(rng.integers(40, 216, (12, 24, 3), dtype=np.uint8))
            picture = np.asarray(colours.resize((width + 2 * SHOT, height), Image.Resampling.BICUBIC)).astype(np.int16)
        left = frame % SHOT * 2
        yield np.clip(picture[None, :, left : left + width] + grain[frame % 8], 0, 255).astype(np.uint8)


def cpu_seconds(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """Return `function(*arguments)` and the CPU time of this process that it took."""
    began = time.process_time()
    result = function(*arguments)
    return result, time.process_time() - began


def _scan(film: Path, cuts: bool, motion: bool) -> dict[str, float]:
    scanned, seconds = cpu_seconds(scan, film, cuts, motion)
    return {"milliseconds_a_frame": 1000 * seconds / scanned.facts.frames, "peak_mib": resident("VmHWM") >> 20}


def _packets(film: Path) -> None:
    with open_container(film) as video:
        video.packets()


def _read(file: Path, first: int) -> np.ndarray:
    return read_frames(file, pick_by_time(frame_times(file), (first + np.arange(CLIP)) / FPS))


if __name__ == "__main__":
    raise SystemExit(run_main(main))
