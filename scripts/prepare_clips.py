"""Decode captioned videos once, strictly, and write the clip index that training reads.

promag prepare-clips videos/ --out clips.jsonl
promag prepare-clips manifest.csv --split train --out clips-train.jsonl --fps 24 --frames 65
promag prepare-clips table.tsv --columns file=clip,caption=long_text --out clips.jsonl
promag prepare-clips films/ --scenes --min-seconds 2 --max-seconds 20 --out clips.jsonl
"""

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from promag.data.clip_index import path_text, save_clips
from promag.data.clips import Lengths, Skipped, TooManyUnreadable, prepare
from promag.data.cutting import check_outside, cut_out
from promag.data.listing import first_few, list_licences, list_videos
from promag.data.tables import parse_columns
from promag.data.video import REENCODE
from promag.reports.clip_set import ClipSet, write_clip_page
from promag.scripts._options import check_writable, name_of
from promag.training.command_line import Parser, run_main
from promag.training.config import UserError
from promag.training.files import write_atomically


def main(argv: Sequence[str]) -> int:
    """Run the command; raises UserError for mistakes and for too many unreadable videos."""
    parser = Parser(__doc__)
    parser.add_argument("videos", metavar="VIDEOS", help="a folder, a table (CSV, TSV, JSONL, JSON), a list or a video")
    parser.add_argument("--out", metavar="FILE.jsonl", required=True, help="the index to write")
    parser.add_argument("--fps", type=float, help="rate of the clips; default: that of each video")
    parser.add_argument("--frames", type=int, help="cut windows of so many frames; default: one clip a video or shot")
    parser.add_argument("--scenes", action="store_true", help="cut at shot boundaries, leave out black and still stretches")
    parser.add_argument("--min-seconds", type=float, help="leave out what is shorter; default: 0, with --scenes 2")
    parser.add_argument("--max-seconds", type=float, help="cut what is longer; default: no limit")
    parser.add_argument("--cut", metavar="FOLDER", help="write each clip as an mp4 of its own there: quick to read, for shards")
    parser.add_argument("--report", metavar="PAGE.html", type=Path, help="write a page about the clips, with thumbnails")
    parser.add_argument("--split", help="only the rows whose column split says so, such as train or eval")
    parser.add_argument(
        "--columns", metavar="KEY=NAME,...", help="a table's columns: file, caption, split, licence; else known names"
    )
    parser.add_argument("--images", action="store_true", help="take a folder's images too, as clips of one frame")
    parser.add_argument("--max-bad", type=float, default=0.01, help="part of the videos that may be unreadable")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode")
    arguments = parser.parse_args(argv)
    _check_files(arguments)

    started = time.perf_counter()
    lengths = _lengths(arguments)
    columns = parse_columns(arguments.columns) if arguments.columns else None
    videos = list_videos(arguments.videos, arguments.split, arguments.images, columns)
    count = len({path for path, _ in videos})
    print(f"found {count} videos in {arguments.videos}" + (f", split {arguments.split}" if arguments.split else ""))
    quarantine = Path(f"{arguments.out}.quarantine.jsonl")
    options = {
        "licences": list_licences(arguments.videos, columns),
        "scenes": arguments.scenes,
        "motion": bool(arguments.report),
    }
    try:
        prepared = prepare(videos, arguments.fps, lengths, arguments.max_bad, arguments.workers, **options)
    except TooManyUnreadable as error:
        _report_quarantine(quarantine, error.quarantined)
        more = "" if len(error.quarantined) == count else "; or allow more by --max-bad"
        raise UserError(f"{error}{more}") from None
    clips = ClipSet(prepared, len({clip.path for clip in prepared.clips}))
    if arguments.cut:
        prepared.clips = cut_out(prepared.clips, arguments.cut, arguments.workers)
    save_clips(arguments.out, prepared.clips)
    _report_quarantine(quarantine, prepared.quarantined)
    if prepared.changed:
        _list("changed to what players show", (f"{path}: {notes}" for path, notes in prepared.changed))
    _report_skipped(Path(f"{arguments.out}.skipped.jsonl"), prepared.skipped)
    if lengths.frames or not math.isinf(lengths.max_seconds):
        print(f"dropped {prepared.dropped_frames} frames behind the last clips of videos or shots")
    if arguments.fps:
        _list(f"slower than {arguments.fps:g} fps, frames repeat", (f"{path}: {fps:g}" for path, fps in prepared.slower))
    print(clips.text())
    if arguments.report:
        write_clip_page(arguments.report, f"Clips of {name_of(arguments.videos)}", clips, arguments.workers)
        print(f"wrote {arguments.report}")
    seconds = time.perf_counter() - started
    print(f"wrote {clips.summary} to {arguments.out} in {seconds:.1f} s")
    return 0


def _check_files(arguments: argparse.Namespace) -> None:
    """Refuse files that cannot be written or would overwrite an input, before anything is decoded."""
    if Path(arguments.out).suffix.lower() != ".jsonl":
        raise UserError(f"--out {arguments.out}: a file that ends in .jsonl is needed, which training reads")
    check_writable("--out", arguments.out, [arguments.videos])
    for kind in ("quarantine", "skipped"):
        check_writable("--out", f"{arguments.out}.{kind}.jsonl", [arguments.videos])
    check_writable("--report", arguments.report, [arguments.videos, arguments.out])
    if arguments.cut:
        check_writable("--cut", Path(arguments.cut, "clip"))
        check_outside(arguments.cut, arguments.videos)


def _lengths(arguments: argparse.Namespace) -> Lengths:
    least, most = arguments.min_seconds, arguments.max_seconds
    if least is None:
        least = 2.0 if arguments.scenes and not arguments.frames else 0.0
    return Lengths(arguments.frames, least, math.inf if most is None else most)


def _report_quarantine(path: Path, quarantined: Sequence[tuple[str, str]]) -> None:
    _list("quarantined", (f"{video}: {reason}" for video, reason in quarantined))
    _write_lines(path, [{"path": path_text(video), "reason": reason} for video, reason in quarantined])
    if quarantined:
        print(f"  named in {path}; odd ones become readable by: {REENCODE}")


def _report_skipped(path: Path, skipped: Sequence[Skipped]) -> None:
    _write_lines(path, [dataclasses.asdict(stretch) | {"path": path_text(stretch.path)} for stretch in skipped])
    for reason in dict.fromkeys(stretch.reason for stretch in skipped):
        stretches = [stretch for stretch in skipped if stretch.reason == reason]
        names = first_few(f"{stretch.path} from {stretch.start:.2f} s" for stretch in stretches)
        print(f"{reason}: {len(stretches)}, {sum(stretch.seconds for stretch in stretches):.2f} s: {names}")
    if skipped:
        print(f"  named in {path}")


def _write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines; without rows remove the file, which is of an earlier call."""
    path.unlink(missing_ok=True)
    if rows:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))


def _list(what: str, lines: Iterable[str]) -> None:
    lines = list(lines)
    print("\n  ".join([f"{what}: {len(lines)}", *lines]))


if __name__ == "__main__":
    raise SystemExit(run_main(main))
