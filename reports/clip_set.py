"""What a set of clips consists of: a table for the terminal, and a page with thumbnails."""
# ruff: noqa: RUF001 (the page is set with × and –)

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from promag.data.clip_index import Clip
from promag.data.clips import PreparedClips, Skipped
from promag.data.video import frame_times, pick_by_time, read_frames
from promag.training.files import write_atomically
from promag.training.progress import ProgressBar

from .page import jpeg_uri, render_page
from .tables import align

# Lines of the table, each from a value on.
LENGTHS = {"below 2 s": 0, "2 to 5 s": 2, "5 to 10 s": 5, "10 to 20 s": 10, "20 s and more": 20}
WORDS = {"none": 0, "1 to 5": 1, "6 to 20": 6, "21 to 60": 21, "61 and more": 61}
MOTION = {"below 0.5": 0, "0.5 to 2": 0.5, "2 to 5": 2, "5 to 10": 5, "10 and more": 10}
MOST_LINES = 8  # lines of a group; what is rarer is added up
SHOWN, EXTREMES = 96, 8  # clips with thumbnails: evenly over the set, and those of least and most motion
HEIGHT, GAP, WIDEST = 72, 2, 192  # pixels of a thumbnail


class Row(NamedTuple):
    """A line of the table: clips, or stretches that were left out, and their length in seconds."""

    label: str
    count: int
    seconds: float


@dataclass(frozen=True, eq=False)
class Thumbnail:
    """Three frames of a stretch in one picture, and what is written beside them."""

    title: str
    place: str
    details: str
    image: str  # data URI


@dataclass(frozen=True, eq=False)
class ClipSet:
    """A prepared set of clips, of so many videos."""

    prepared: PreparedClips
    videos: int

    @property
    def unit(self) -> tuple[str, int]:
        """The unit in which lengths are written, and its seconds."""
        return ("hours", 3600) if sum(self._seconds()) >= 3600 else ("minutes", 60)

    @property
    def summary(self) -> str:
        """Number, length and captions in words."""
        clips, (unit, size) = self.prepared.clips, self.unit
        frames, captions = sum(clip.frames for clip in clips), len({clip.caption for clip in clips})
        parts = [f"{_count(len(clips), 'clip')} of {_count(self.videos, 'video')}", f"{sum(self._seconds()) / size:.2f} {unit}"]
        return ", ".join([*parts, _count(frames, "frame"), _count(captions, "different caption")])

    def groups(self) -> dict[str, list[Row]]:
        """Return the lines of the table by what they are about."""
        clips, seconds = self.prepared.clips, self._seconds()
        groups = {
            "size": _common([f"{clip.width}x{clip.height}" for clip in clips], seconds),
            "frames a second": _common([f"{clip.fps:.4g}" for clip in clips], seconds),
            "length": _ranges(seconds, LENGTHS, seconds),
            "words of the caption": _ranges([len(clip.caption.split()) for clip in clips], WORDS, seconds),
        }
        if self.prepared.motion:
            groups["motion, grey levels a frame"] = _ranges(self.prepared.motion, MOTION, seconds)
        return groups

    def left_out(self) -> list[Row]:
        """Return what became no clip, by reason."""
        skipped = self.prepared.skipped
        counts = Counter(stretch.reason for stretch in skipped).most_common()
        return [Row(why, count, sum(one.seconds for one in skipped if one.reason == why)) for why, count in counts]

    def rows(self) -> list[tuple[str, list[tuple[Row, float | None]]]]:
        """Return the whole table by groups: each line with its share of all clips' length, None for what was left out."""
        whole = sum(self._seconds())
        groups: list[tuple[str, list[tuple[Row, float | None]]]] = []
        for name, rows in self.groups().items():
            groups.append((name, [(row, row.seconds / whole) for row in rows]))
        if left_out := self.left_out():
            groups.append(("left out", [(row, None) for row in left_out]))
        return groups

    def text(self) -> str:
        """Return the table as lines of text."""
        unit, size = self.unit
        lines = [["", "clips", unit, "share"]]
        for name, rows in self.rows():
            lines.append([name, "", "", ""])
            for row, share in rows:
                length, part = f"{row.seconds / size:.2f}", "" if share is None else f"{share:.1%}"
                lines.append([f"  {row.label}", f"{row.count:,}", length, part])
        return align(lines)

    def _seconds(self) -> list[float]:
        return [clip.frames / clip.fps for clip in self.prepared.clips]


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"


def _common(labels: Sequence[str], seconds: Sequence[float]) -> list[Row]:
    """Return the most common labels, and the others as one line."""
    counts, totals = Counter(labels), dict.fromkeys(labels, 0.0)
    for label, length in zip(labels, seconds, strict=True):
        totals[label] += length
    shown = counts.most_common(MOST_LINES if len(counts) > MOST_LINES + 1 else None)
    rows = [Row(label, count, totals[label]) for label, count in shown]
    if rest := len(counts) - len(rows):
        count, length = len(labels) - sum(row.count for row in rows), sum(seconds) - sum(row.seconds for row in rows)
        rows.append(Row(f"{rest} others", count, length))
    return rows


def _ranges(values: Sequence[float], begins: Mapping[str, float], seconds: Sequence[float]) -> list[Row]:
    """Return the lines that have values; those that are not a number, of single frames, are in none."""
    places = np.searchsorted(list(begins.values()), values, side="right") - 1
    inside = [(places == i) & ~np.isnan(values) for i in range(len(begins))]
    rows = zip(begins, inside, strict=True)
    return [Row(name, int(here.sum()), float(np.array(seconds)[here].sum())) for name, here in rows if here.any()]


# -- the page ----------------------------------------------------------------------------------------------------------


def write_clip_page(path: Path, title: str, clips: ClipSet, workers: int = 2, progress: bool = True) -> None:
    """Write a page with the table and thumbnails of some clips and of stretches that were left out.

    Raises UnreadableVideo for a video that cannot be read any more.
    """
    prepared = clips.prepared
    chosen = {name: _choose(prepared, places) for name, places in _places(prepared).items()}
    left_out = _evenly([stretch for stretch in prepared.skipped if stretch.reason != "black"], SHOWN // 4)
    makers: list[Callable[[], Thumbnail]] = [maker for group in chosen.values() for maker in group]
    makers += [partial(_thumbnail_of_skipped, stretch) for stretch in left_out]
    with ThreadPoolExecutor(workers) as pool:
        made = pool.map(lambda maker: maker(), makers)
        bar = ProgressBar(made, total=len(makers), desc="thumbnails", unit="picture", disable=not progress)
        thumbnails = list(bar)
    groups: dict[str, list[Thumbnail]] = {}
    for name, group in chosen.items():
        groups[name], thumbnails = thumbnails[: len(group)], thumbnails[len(group) :]
    groups["Left out"] = thumbnails
    page = {"title": title, "facts": _facts(clips, groups), "summary": clips.summary}
    write_atomically(path, render_page("clips.html", report=page, groups=clips.rows(), unit=clips.unit, thumbnails=groups))


def _facts(clips: ClipSet, groups: Mapping[str, Sequence[Thumbnail]]) -> dict[str, str]:
    facts = {
        "Clips shown": f"{len(groups['Clips'])} of {len(clips.prepared.clips):,}, evenly over the set, by three frames each"
    }
    if clips.prepared.motion:
        how = "mean difference of a frame from the one before, in grey levels of 255, at a shorter side of 144 pixels"
        facts["Motion"] = how
    facts["Frames left over"] = f"{clips.prepared.dropped_frames:,} behind the last clips of videos or shots"
    facts["Unreadable videos"] = f"{len(clips.prepared.quarantined):,}"
    return facts


def _places(prepared: PreparedClips) -> dict[str, list[int]]:
    """Return which clips are shown in each part of the page."""
    places = {"Clips": _evenly(range(len(prepared.clips)), SHOWN)}
    moving = [place for place, value in enumerate(prepared.motion) if not np.isnan(value)]
    if len(moving) > 2 * EXTREMES:
        order = sorted(moving, key=lambda place: prepared.motion[place])
        places |= {"Least motion": order[:EXTREMES], "Most motion": order[: -EXTREMES - 1 : -1]}
    return places


def _evenly(items: Sequence, count: int) -> list:
    return [items[i * len(items) // count] for i in range(count)] if len(items) > count else list(items)


def _choose(prepared: PreparedClips, places: Sequence[int]) -> list[Callable[[], Thumbnail]]:
    motion = prepared.motion or [float("nan")] * len(prepared.clips)
    return [partial(_thumbnail, prepared.clips[place], motion[place]) for place in places]


def _thumbnail(clip: Clip, motion: float) -> Thumbnail:
    details = f"{clip.frames / clip.fps:.1f} s, {clip.width} × {clip.height}, {clip.fps:.4g} fps"
    details += "" if np.isnan(motion) else f", motion {motion:.1f}"
    image = _strip(clip.path, clip.start, (clip.frames - 1) / clip.fps, clip.decord)
    return Thumbnail(clip.caption or "no caption", f"{Path(clip.path).name}, {_clock(clip.start)}", details, image)


def _thumbnail_of_skipped(stretch: Skipped) -> Thumbnail:
    image = _strip(stretch.path, stretch.start, stretch.seconds * (1 - 1 / max(1, stretch.frames)), False)
    place = f"{Path(stretch.path).name}, {_clock(stretch.start)}"
    return Thumbnail(stretch.reason, place, f"{stretch.seconds:.1f} s, {stretch.frames} frames", image)


def _strip(path: str, start: float, seconds: float, decord: bool) -> str:
    """Return the first, the middle and the last frame of a stretch side by side."""
    times = frame_times(path)
    places = pick_by_time(times, np.minimum(start + seconds * np.array([0, 0.5, 1]), times[-1]))
    pictures = read_frames(path, places if seconds else places[:1], decord=decord)
    size = (max(1, min(WIDEST, round(HEIGHT * pictures.shape[2] / pictures.shape[1]))), HEIGHT)
    strip = Image.new("RGB", (len(pictures) * (size[0] + GAP) - GAP, HEIGHT), (128, 128, 128))
    for i, picture in enumerate(pictures):
        strip.paste(Image.fromarray(np.ascontiguousarray(picture)).resize(size), (i * (size[0] + GAP), 0))
    return jpeg_uri(strip)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(seconds, 60)
    return f"{int(minutes) // 60}:{int(minutes) % 60:02d}:{seconds:04.1f}"
