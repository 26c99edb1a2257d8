"""Decode captioned videos once, strictly, and write the clip index that training reads.

promag prepare-clips videos/ --out clips.jsonl
promag prepare-clips manifest.csv --split train --out clips-train.jsonl --fps 24 --frames 65
promag prepare-clips table.tsv --columns file=clip,caption=long_text --out clips.jsonl
"""

import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from promag.data.clip_index import path_text, save_clips
from promag.data.clips import TooManyUnreadable, prepare
from promag.data.listing import list_licences, list_videos
from promag.data.tables import parse_columns
from promag.data.video import REENCODE
from promag.training.command_line import Parser, run_main
from promag.training.config import UserError
from promag.training.files import write_atomically


def main(argv: Sequence[str]) -> int:
    """Run the command; raises UserError for mistakes and for too many unreadable videos."""
    parser = Parser(__doc__)
    parser.add_argument("videos", metavar="VIDEOS", help="a folder, a table (CSV, TSV, JSONL, JSON), a list or a video")
    parser.add_argument("--out", metavar="FILE.jsonl", required=True, help="the index to write")
    parser.add_argument("--fps", type=float, help="rate of the clips; default: that of each video")
    parser.add_argument("--frames", type=int, help="cut windows of so many frames; default: one clip a video")
    parser.add_argument("--split", help="only the rows whose column split says so, such as train or eval")
    parser.add_argument(
        "--columns", metavar="KEY=NAME,...", help="a table's columns: file, caption, split, licence; else known names"
    )
    parser.add_argument("--images", action="store_true", help="take a folder's images too, as clips of one frame")
    parser.add_argument("--max-bad", type=float, default=0.01, help="part of the videos that may be unreadable")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode")
    arguments = parser.parse_args(argv)

    started = time.perf_counter()
    columns = parse_columns(arguments.columns) if arguments.columns else None
    videos = list_videos(arguments.videos, arguments.split, arguments.images, columns)
    print(f"found {len(videos)} videos in {arguments.videos}" + (f", split {arguments.split}" if arguments.split else ""))
    licences, quarantine = list_licences(arguments.videos, columns), Path(f"{arguments.out}.quarantine.jsonl")
    try:
        prepared = prepare(videos, arguments.fps, arguments.frames, arguments.max_bad, arguments.workers, licences=licences)
    except TooManyUnreadable as error:
        _report_quarantine(quarantine, error.quarantined)
        more = "" if len(error.quarantined) == len(videos) else "; or allow more by --max-bad"
        raise UserError(f"{error}{more}") from None
    save_clips(arguments.out, prepared.clips)
    _report_quarantine(quarantine, prepared.quarantined)
    if prepared.changed:
        _list("changed to what players show", (f"{path}: {notes}" for path, notes in prepared.changed))
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
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps({"path": path_text(video), "reason": reason}, ensure_ascii=False) for video, reason in quarantined)
        write_atomically(path, "".join(f"{line}\n" for line in lines))
        print(f"  named in {path}; odd ones become readable by: {REENCODE}")


def _list(what: str, lines: Iterable[str]) -> None:
    lines = list(lines)
    print("\n  ".join([f"{what}: {len(lines)}", *lines]))


if __name__ == "__main__":
    raise SystemExit(run_main(main))
