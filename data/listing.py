"""Find the videos that a user names, each with its caption: a folder, a table, a list or one video.

list_videos -> (path, caption) of each video
"""

import itertools
import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from promag.training.config import UserError

from .captions import TEXT_EXTENSIONS, Listed, caption_from_name, find_listed, read_caption, read_listed, text_of, texts_beside
from .tables import TABLE_EXTENSIONS, Row
from .video import IMAGE_EXTENSIONS

# What libavformat's demuxers of videos claim, and names in use for the same containers. Left out: still pictures, sound,
# raw pixels without a header, playlists, and endings that mostly mean something else (.dat, .mod, .bin, .str, .v).
VIDEO_EXTENSIONS = (
    *(".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".f4v", ".mj2", ".ismv"),  # MP4 and QuickTime
    *(".mkv", ".mk3d", ".webm", ".avi", ".divx", ".xvid", ".amv", ".wmv", ".asf", ".wtv", ".flv", ".kux", ".nut"),
    *(".ogv", ".ogm", ".rm", ".rmvb", ".ivr", ".gif", ".apng"),
    *(".mpg", ".mpeg", ".mpe", ".m1v", ".m2v", ".mpv", ".vob", ".evo"),  # MPEG program and elementary streams
    *(".ts", ".m2t", ".m2ts", ".mts", ".tp", ".trp", ".tod"),  # MPEG transport streams
    *(".mxf", ".gxf", ".dv", ".dif", ".dav", ".cine"),  # cameras and studios
    *(".y4m", ".ivf", ".obu", ".mjpeg", ".mjpg", ".dnxhd", ".dnxhr", ".vc1", ".vc2", ".drc"),  # streams without a container
    *(".h261", ".h263", ".h264", ".264", ".avc", ".h265", ".265", ".hevc", ".h266", ".266", ".vvc"),
)
SOUND_EXTENSIONS = (".mp3", ".wav", ".flac", ".m4a", ".m4b", ".aac", ".ac3", ".ogg", ".oga", ".opus", ".wma", ".aif", ".aiff")

logger = logging.getLogger(__name__)


class _Folder(NamedTuple):
    path: str
    names: list[str]  # names of its files, without hidden ones


class _Video(NamedTuple):
    path: str
    text: str | None  # path of the text file beside it


def list_videos(
    source: str | os.PathLike, split: str | None = None, images: bool = False, columns: Mapping[str, str] | None = None
) -> list[tuple[str, str]]:
    """Return (absolute path, caption) of each video in `source`.

    A folder's video has as its caption the first of: its row in a table (that of its own folder before those of the folders
    above), or its line in lists (prompts.txt beside videos.txt); the text file beside it; its name. Linked folders are entered,
    hidden files are left out. The log states where captions come from and which files are skipped.

    Args:
        source: a folder, searched recursively; a table (.csv, .tsv, .jsonl, .json) or list (videos.txt), whose paths are
            relative to it; one video.
        split: keep the rows whose split column has this value.
        images: take a folder's images too, which are clips of one frame; else they may be its videos' covers. Images that a
            table lists are taken always.
        columns: names of tables' columns by what they hold; see `find_columns`.

    Raises UserError for what is missing, empty, listed but absent, ambiguous, or not to be understood.
    """
    source = Path(os.path.abspath(source))
    if not os.path.exists(source):
        raise UserError(f"{source}: no such file or folder")
    if os.path.isdir(source):
        return _list_folder(source, split, images, columns)
    listed = read_listed(source, columns)
    if listed is not None:
        return _select([listed], listed.rows, split)
    if split is not None:
        raise UserError(f"{source}: split {split!r} needs a table with a column split")
    text = text_of(str(source), texts_beside(source.parent, os.listdir(source.parent)))
    return [(str(source), read_caption(text) if text else caption_from_name(source))]


def list_licences(source: str | os.PathLike, columns: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the licence of each video, by absolute path, where a table that `list_videos` reads has such a column."""
    source = Path(os.path.abspath(source))
    if os.path.isdir(source):
        tables = [find_listed(*folder, columns) for folder in _walk(source)[0]]
    else:
        tables = [read_listed(source, columns)]
    return {row.file: row.licence for table in tables if table for row in table.rows if row.licence}


def first_few(names: Iterable[str], limit: int = 3, count: int | None = None) -> str:
    """Return the first `limit` names and the number of the rest; with `count` given, only `limit` names are consumed."""
    names = list(names if count is None else itertools.islice(names, limit))
    count = count or len(names)
    return ", ".join(names[:limit]) + (f" and {count - limit} more" if count > limit else "")


def _select(tables: Sequence[Listed], rows: Sequence[Row], split: str | None) -> list[tuple[str, str]]:
    """Return the videos of the tables' rows, or of those of one split."""
    names = first_few(str(table.path) for table in tables)
    if split is not None:
        splits = sorted({str(row.split) for row in rows})
        rows = [row for row in rows if row.split == split]
        if not rows:
            raise UserError(f"{names}: no row has split {split!r}; splits there: {', '.join(splits)}")
    missing = [row.file for row in rows if not os.path.isfile(row.file)]
    if missing:
        raise UserError(f"{names}: lists {len(missing)} files that are not there: {first_few(missing)}")
    return [(row.file, row.caption) for row in rows]


# -- folders ---------------------------------------------------------------------------------------------------------


def _list_folder(source: Path, split: str | None, images: bool, columns: Mapping[str, str] | None) -> list[tuple[str, str]]:
    folders, unreadable = _walk(source)
    by_folder = {folder.path: table for folder in folders if (table := find_listed(*folder, columns))}
    tables = list(by_folder.values())
    if not tables and (columns or split is not None):
        wanted = f"the columns {', '.join(columns.values())}" if columns else f"a column split, which split {split!r} needs"
        raise UserError(f"{source}: no table there has captions and {wanted}")
    real: dict[str, str] = {}
    listed: dict[str, list[Row]] = {}
    for table in tables:  # those of inner folders come later and replace rows
        rows: dict[str, list[Row]] = {}
        for row in table.rows:
            rows.setdefault(_identity(row.file, real), []).append(row)
        listed |= rows
    videos = _select(tables, [row for rows in listed.values() for row in rows], split)
    if split is not None:
        return sorted(videos)
    endings = VIDEO_EXTENSIONS + (IMAGE_EXTENSIONS if images else ())
    unlisted, differing, skipped = [], [], Counter()
    for folder, names in folders:
        texts = texts_beside(folder, names)
        table = by_folder.get(folder)
        left = set(names).difference((table.path.name, *table.names) if table else ())
        for name in names:
            path, ending = os.path.join(folder, name), os.path.splitext(name)[1].lower()
            rows_of_file = listed.get(_identity(path, real))
            if rows_of_file is None and ending not in endings:
                continue
            text = text_of(path, texts)
            left -= {name, os.path.basename(text or "")}
            if rows_of_file is None:
                unlisted.append(_Video(path, text))
            elif text and any(row.caption != read_caption(text) for row in rows_of_file):
                differing.append(path)
        skipped.update(os.path.splitext(name)[1].lower() for name in left)
    videos += [(path, read_caption(text) if text else caption_from_name(path)) for path, text in unlisted]
    left_out = _describe_skipped(skipped, unreadable)
    if not videos:
        raise UserError(f"{source}: holds no video ({left_out or 'no files'}); videos end in {' '.join(sorted(endings))}")
    _log_captions(source, tables, videos, unlisted, differing)
    if left_out:
        logger.warning("%s: skipped %s", source, left_out)
    return sorted(videos)


def _walk(source: Path) -> tuple[list[_Folder], list[str]]:
    """Return the folder and those below it, each once and before those inside it, and what cannot be read.

    Linked folders come last, so that a folder is known by its own path where it has one below `source`.
    """
    folders, unreadable, seen = [], [], set()
    pending, linked = [str(source)], []
    while pending or linked:
        path = pending.pop() if pending else linked.pop(0)
        try:
            state = os.stat(path)
            if (state.st_dev, state.st_ino) in seen:
                continue  # a link back, or a second one
            seen.add((state.st_dev, state.st_ino))
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError as error:
            unreadable.append(f"{path} ({error.strerror})")
            continue
        names = []
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                is_link, is_folder, is_file = entry.is_symlink(), entry.is_dir(), entry.is_file()
            except OSError as error:  # a link to itself, or into a folder that may not be searched
                unreadable.append(f"{entry.path} ({error.strerror})")
                continue
            if is_folder:
                (linked if is_link else pending).append(entry.path)
            elif is_file or is_link:
                # A broken link counts as a file, which is then named as missing; pipes and devices are none.
                names.append(entry.name)
        folders.append(_Folder(path, names))
    return folders, unreadable


def _identity(path: str, real: dict[str, str]) -> str:
    """Return the path by which a file is known whatever links lead to its folder; `real` remembers folders."""
    folder, name = os.path.split(path)
    if folder not in real:
        real[folder] = os.path.realpath(folder)
    return os.path.join(real[folder], name)


# -- the log ---------------------------------------------------------------------------------------------------------


def _log_captions(
    source: Path,
    tables: Sequence[Listed],
    videos: Sequence[tuple[str, str]],
    unlisted: Sequence[_Video],
    differing: Sequence[str],
) -> None:
    """State where captions come from: as a warning if from several places or from names."""
    named = sorted(video.path for video in unlisted if video.text is None)
    counts = {
        f"from {first_few(os.path.relpath(table.path, source) for table in tables)}": len(videos) - len(unlisted),
        "from text files beside the videos": len(unlisted) - len(named),
        f"from file names ({first_few(named)})": len(named),
    }
    places = [f"{count} {place}" for place, count in counts.items() if count]
    level = logging.WARNING if named or len(places) > 1 else logging.INFO
    logger.log(level, "%s: %d captions: %s", source, len(videos), ", ".join(places))
    if differing:
        text = "%s: the table's caption was taken for %d videos that have another one in a text file beside them: %s"
        logger.warning(text, source, len(differing), first_few(sorted(differing)))
    empty = [path for path, caption in videos if not caption]
    if empty:
        logger.warning("%s: %d of %d captions are empty: %s", source, len(empty), len(videos), first_few(empty))


def _describe_skipped(skipped: Counter[str], unreadable: Sequence[str]) -> str:
    """Return the number of skipped files by what they are and by ending; empty where nothing was skipped."""
    kinds = {
        "images, which prepare-clips takes with --images": IMAGE_EXTENSIONS,
        "sound": SOUND_EXTENSIONS,
        "tables without captions": TABLE_EXTENSIONS,
        "texts that are no video's": TEXT_EXTENSIONS,
    }
    kind_of = {ending: kind for kind, endings in kinds.items() for ending in endings}
    groups: dict[str, Counter[str]] = {}
    for ending, count in skipped.items():
        groups.setdefault(kind_of.get(ending, "others"), Counter())[ending or "no ending"] += count
    parts = [
        f"{kind} ({', '.join(f'{ending} {count}' for ending, count in sorted(group.items()))})"
        for kind, group in sorted(groups.items())
    ]
    if parts:
        parts[0] = f"{skipped.total()} files: {parts[0]}"
    if unreadable:
        parts.append(f"{len(unreadable)} folders or links that cannot be read: {first_few(unreadable)}")
    return "; ".join(parts)
