"""Captions where people keep them: a table, a list of videos beside one of captions, a text file beside a video, its name."""

import functools
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote_to_bytes

from promag.training.config import UserError

from .tables import Row, find_columns, is_table, read_lines, read_table, rows_of, warn_once

TEXT_EXTENSIONS = (".txt", ".caption")  # a text file beside its video, as kohya's and finetrainers' trainers read them
FIRST_TABLES = ("captions", "manifest", "metadata")  # names, without endings, that are taken before a folder's other tables
VIDEO_LISTS = ("videos.txt", "video.txt")  # a path a line, and in one of the next a caption a line: finetrainers, CogVideoX
CAPTION_LISTS = ("prompts.txt", "prompt.txt", "captions.txt", "caption.txt")


@dataclass(frozen=True)
class Listed:
    """The videos that a table or a pair of lists names, each with an absolute path."""

    path: Path  # the table, or the list of videos
    rows: list[Row]
    names: Sequence[str] = ()  # the files beside it that hold captions too, read or not


# -- tables and lists ------------------------------------------------------------------------------------------------


def find_listed(folder: str, names: Sequence[str], columns: Mapping[str, str] | None = None) -> Listed | None:
    """Return the videos of a folder's table, else of its lists, else None; the log names tables and lists that are not read.

    `names` are those of the folder's files. Raises UserError for a table that cannot be read, and where several hold captions
    and none is called captions, manifest or metadata.
    """
    found = {}
    for name in sorted(filter(_may_hold_captions, names), key=lambda name: (_priority(name), name)):
        table = read_table(Path(folder, name), columns)
        if find_columns(table, columns) and table.rows:
            found[name] = table
    pair = _find_lists(folder, names)
    if not found:
        return _read_lists(*pair) if pair else None
    first, *others = found
    if others and _priority(first) == len(FIRST_TABLES):
        raise UserError(f"{folder}: {', '.join(found)} all hold captions; name one of them in place of the folder")
    if others := [*others, *(path.name for path in pair or ())]:
        warn_once(f"{found[first].path}: is taken for captions; {', '.join(others)} beside it are not read")
    return Listed(found[first].path, _located(found[first].path, rows_of(found[first], columns)), others)


def read_listed(path: Path, columns: Mapping[str, str] | None = None) -> Listed | None:
    """Return the videos of a table or of one of two lists; None for a file of another name. Raises UserError as they do."""
    if is_table(path):
        return Listed(path, _located(path, rows_of(read_table(path, columns), columns)))
    if path.suffix.lower() not in TEXT_EXTENSIONS:
        return None
    pair = _find_lists(str(path.parent), os.listdir(path.parent))
    if pair is None or path not in pair:
        raise UserError(
            f"{path}: is no list of videos: that is {' or '.join(VIDEO_LISTS)} beside {' or '.join(CAPTION_LISTS)}, a video "
            "and its caption a line"
        )
    return _read_lists(*pair)


def _may_hold_captions(name: str) -> bool:
    # A folder's JSON files mostly hold something else.
    return is_table(name) and (not name.lower().endswith(".json") or _priority(name) < len(FIRST_TABLES))


def _priority(name: str) -> int:
    stem = os.path.splitext(name)[0].lower()
    return FIRST_TABLES.index(stem) if stem in FIRST_TABLES else len(FIRST_TABLES)


def _find_lists(folder: str, names: Sequence[str]) -> tuple[Path, Path] | None:
    videos, captions = ([name for name in kinds if name in names] for kinds in (VIDEO_LISTS, CAPTION_LISTS))
    if not videos or not captions:
        return None
    if len(videos) + len(captions) > 2:
        raise UserError(f"{folder}: {', '.join([*videos, *captions])}: one list of videos and one of captions are needed")
    return Path(folder, videos[0]), Path(folder, captions[0])


def _read_lists(videos: Path, captions: Path) -> Listed:
    paths, texts = read_lines(videos), read_lines(captions)
    if len(paths) != len(texts) or not all(paths):
        raise UserError(
            f"{videos} has {len(paths)} lines, {sum(not path for path in paths)} of them empty, and {captions} has "
            f"{len(texts)}; a line of each belongs to one video"
        )
    return Listed(videos, _located(videos, list(map(Row, paths, texts))), [captions.name])


# -- paths in tables -------------------------------------------------------------------------------------------------


def _located(table: Path, rows: Sequence[Row]) -> list[Row]:
    return [row._replace(file=locate(table.parent, row.file)) for row in rows]


def locate(folder: str | os.PathLike, name: str) -> str:
    """Return the absolute path of a file that a table in `folder` names; its file need not be there.

    The name is a path or a `file:` URL, relative or not. Where no file has it, one is taken whose name differs in the
    composition of its accented letters alone (Unicode's NFC and NFD). Raises UserError where two files do.
    """
    names = [name, name.strip()]
    if names[1].startswith("file:") and "%00" not in names[1]:
        names.append(path_of_url(names[1]))
    paths = [os.path.normpath(os.path.join(os.path.abspath(folder), name)) for name in dict.fromkeys(names)]
    return next((path for path in paths if os.path.isfile(path)), None) or next(filter(None, map(_composed, paths)), paths[-1])


def path_of_url(url: str) -> str:
    """Return the path of a `file:` URL (file:///videos/a.mp4, file:a.mp4), whose %XX are the bytes of the name."""
    path = url.removeprefix("file:")
    if path.startswith("//"):
        path = "/" + path[2:].partition("/")[2]
    return os.fsdecode(unquote_to_bytes(path))


def _composed(path: str) -> str | None:
    """Return the path of what is there under a name that is the same once its letters are composed."""
    if os.path.lexists(path):
        return path
    folder, name = os.path.split(path)
    parent = None if path.isascii() or not name else _composed(folder)
    if parent is None or not os.path.isdir(parent):
        return None
    same = _names_by_form(parent, os.stat(parent).st_mtime_ns).get(unicodedata.normalize("NFC", name), ())
    if len(same) > 1:
        raise UserError(
            f"{path}: is not there, and {len(same)} files there look like it: {', '.join(map(ascii, same))}; rename one"
        )
    return os.path.join(parent, same[0]) if same else None


@functools.lru_cache(64)
def _names_by_form(folder: str, modified: int) -> Mapping[str, Sequence[str]]:
    """Return the names in a folder by their composed form."""
    names: dict[str, list[str]] = {}
    for name in os.listdir(folder):
        names.setdefault(unicodedata.normalize("NFC", name), []).append(name)
    return names


# -- texts beside videos, and names ----------------------------------------------------------------------------------


def texts_beside(folder: str | os.PathLike, names: Sequence[str]) -> dict[str, str]:
    """Return the paths of a folder's text files by the name, without ending, of the video that each belongs to.

    `names` are those of the folder's files. Composed forms of names (NFC) are there too.
    """
    parts = ((os.path.splitext(name), name) for name in names)
    texts = [
        (TEXT_EXTENSIONS.index(ending.lower()), stem, name)
        for (stem, ending), name in parts
        if ending.lower() in TEXT_EXTENSIONS
    ]
    exact = {stem: os.path.join(folder, name) for _, stem, name in sorted(texts, reverse=True)}
    return {unicodedata.normalize("NFC", stem): path for stem, path in exact.items()} | exact


def text_of(video: str, texts: Mapping[str, str]) -> str | None:
    """Return the path of a video's text file among those of its folder (`texts_beside`)."""
    stem = os.path.splitext(os.path.basename(video))[0]
    return texts.get(stem) or texts.get(unicodedata.normalize("NFC", stem))


def read_caption(path: str) -> str:
    """Return the caption in a text file: its lines, one behind the other; raises UserError as `load_text` does."""
    return " ".join(line for line in read_lines(path) if line)


def caption_from_name(path: str | os.PathLike) -> str:
    """Return a caption from a file name: `a_red-kite_03.mp4` -> `a red kite`; empty for a name of numbers only.

    Accented letters are composed (NFC); bytes that are no UTF-8 are left out.
    """
    name = unicodedata.normalize("NFC", Path(path).stem)
    return re.sub(r"[\d .:()\[\]]+$", "", re.sub(r"[_\-\s\ud800-\udfff]+", " ", name)).strip()
