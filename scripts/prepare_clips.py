"""Decode captioned videos once, strictly, and write the clip index that training reads.

promag prepare-clips videos/ --out clips.jsonl
promag prepare-clips manifest.csv --split train --out clips-train.jsonl --fps 24 --frames 65
"""

import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from promag.data.clip_index import save_clips
from promag.data.clips import list_licences, list_videos, prepare
from promag.data.video import REENCODE
from promag.training.command_line import Parser, run_main
from promag.training.files import write_atomically


def main(argv: Sequence[str]) -> int:
    """Run the command; raises UserError for mistakes and for too many unreadable videos."""
    parser = Parser(__doc__)
    parser.add_argument("videos", metavar="VIDEOS", help="a folder, a video, or a CSV or JSONL file with file and caption")
    parser.add_argument("--out", metavar="FILE.jsonl", required=True, help="the index to write")
    parser.add_argument("--fps", type=float, help="rate of the clips; default: that of each video")
    parser.add_argument("--frames", type=int, help="cut windows of so many frames; default: one clip a video")
    parser.add_argument("--split", help="only the rows whose column split says so, such as train or eval")
    parser.add_argument("--images", action="store_true", help="take a folder's images too, as clips of one frame")
    parser.add_argument("--max-bad", type=float, default=0.01, help="part of the videos that may be unreadable")
    parser.add_argument("--workers", type=int, default=2, help="threads that decode")
    arguments = parser.parse_args(argv)

    started = time.perf_counter()
    videos = list_videos(arguments.videos, arguments.split, arguments.images)
    print(f"found {len(videos)} videos in {arguments.videos}" + (f", split {arguments.split}" if arguments.split else ""))
    licences = list_licences(arguments.videos)
    prepared = prepare(videos, arguments.fps, arguments.frames, arguments.max_bad, arguments.workers, licences=licences)
    save_clips(arguments.out, prepared.clips)
    _report_quarantine(Path(f"{arguments.out}.quarantine.jsonl"), prepared.quarantined)
    if arguments.frames:
        _list(f"too short for {arguments.frames} frames", (f"{path}: {frames}" for path, frames in prepared.too_short))
        print(f"dropped {prepared.dropped_frames} frames behind the last whole clips")
    if arguments.fps:
        _list(f"slower than {arguments.fps:g} fps, frames repeat", (f"{path}: {fps:g}" for path, fps in prepared.slower))
    frames = sum(clip.frames for clip in prepared.clips)
    seconds = time.perf_counter() - started
    print(f"wrote {len(prepared.clips)} clips, {frames} frames, to {arguments.out} in {seconds:.1f} s")
    return 0


def _report_quarantine(path: Path, quarantined: Sequence[tuple[str, str]]) -> None:
    path.unlink(missing_ok=True)  # of an earlier call
    _list("quarantined", (f"{video}: {reason}" for video, reason in quarantined))
    if quarantined:
        lines = (json.dumps({"path": video, "reason": reason}, ensure_ascii=False) for video, reason in quarantined)
        write_atomically(path, "".join(f"{line}\n" for line in lines))
        print(f"  named in {path}; odd ones become readable by: {REENCODE}")


def _list(what: str, lines: Iterable[str]) -> None:
    lines = list(lines)
    print("\n  ".join([f"{what}: {len(lines)}", *lines]))


if __name__ == "__main__":
    raise SystemExit(run_main(main))
