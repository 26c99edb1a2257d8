"""Tables of videos and captions (CSV, TSV, JSONL, JSON), in the encodings and with the columns that people have.

read_table -> find_columns -> rows_of
"""

import codecs
import csv
import functools
import io
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from promag.training.config import UserError

TABLE_EXTENSIONS = (".csv", ".tsv", ".jsonl", ".json")

# Columns by the names that common tools and data sets give them; capitals do not matter.
COLUMN_NAMES = {
    "file": ("file", "file_name", "filename", "file_path", "path", "video", "video_path", "video_file"),
    "caption": ("caption", "text", "prompt"),
    "split": ("split",),
    "licence": ("licence", "license"),
}
NEEDED = ("file", "caption")

_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f]")  # no text file holds these
_INDEX_KEYS = {"path", "start", "frames", "sha256"}  # keys of a clip index

logger = logging.getLogger(__name__)


class Row(NamedTuple):
    """A video as a table lists it; `file` is relative to the table."""

    file: str
    caption: str
    split: str | None = None
    licence: str | None = None


@dataclass(frozen=True)
class Table:
    """The rows of a file, each a value by column, and the names of all columns in their order."""

    path: Path
    columns: tuple[str, ...]
    rows: list[dict[str, Any]]


# -- text ------------------------------------------------------------------------------------------------------------


def load_text(path: str | os.PathLike) -> str:
    """Return the content of a text file as `decode_text` does; raises UserError for one that cannot be read, too."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return decode_text(data, str(path))


def decode_text(data: bytes, name: str) -> str:
    """Return the text of a file of this name, without a byte order mark.

    UTF-8 is read, and what a byte order mark states; else UTF-16 or Windows-1252 is assumed. The log names any encoding but
    UTF-8, once for a file. Raises UserError for what is no such text.
    """
    for encoding in _encodings(data):
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" in text or (not encoding.startswith("utf-8") and _CONTROL.search(text)):
            continue
        if not encoding.startswith("utf-8"):
            warn_once(f"{name}: is read as {encoding.upper()}; if its letters come out wrong, save it as UTF-8")
        return text
    raise UserError(f"{name}: is no text in UTF-8, UTF-16 or Windows-1252 (cp1252); save it as UTF-8")


def read_lines(path: str | os.PathLike) -> list[str]:
    """Return the lines of a text file as `load_text` reads it, stripped, without empty ones at the end."""
    text = load_text(path).rstrip()
    # Not str.splitlines, which also breaks lines at characters that may stand in a caption, such as U+2028.
    return [line.strip() for line in re.split(r"\r\n|\n|\r", text)] if text else []


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning, once in a process."""
    logger.warning("%s", message)


def _encodings(data: bytes) -> Sequence[str]:
    for mark, encoding in _BYTE_ORDER_MARKS:
        if data.startswith(mark):
            return (encoding,)
    if b"\0" not in data:
        return ("utf-8", "cp1252")
    # UTF-16 without a mark: letters and spaces of European languages have one byte that is zero.
    zeros = {"utf-16-le": data[1::2].count(0), "utf-16-be": data[::2].count(0)}
    likely = max(zeros, key=lambda encoding: zeros[encoding])
    return (likely,) if 16 * zeros[likely] > len(data) else ()


# -- tables ----------------------------------------------------------------------------------------------------------


def is_table(path: str | os.PathLike) -> bool:
    """Return whether a file name is a table's."""
    return Path(path).suffix.lower() in TABLE_EXTENSIONS


def read_table(path: Path, columns: Mapping[str, str] | None = None) -> Table:
    """Read a table; blank lines are no rows.

    The separator of a CSV file is the comma, semicolon or tab that yields the columns that `find_columns` looks for, else
    the most columns. Raises UserError, with the line's number, for what is no table.
    """
    kind, text = path.suffix.lower(), load_text(path)
    if kind in (".csv", ".tsv"):
        try:
            return Table(path, *_read_csv(path, text, _known(columns or {})))
        except csv.Error as error:
            raise UserError(f"{path}: cannot be read as CSV: {error}") from None
    if kind == ".jsonl":
        # Lines end at \n alone: JSON may hold other characters that end lines elsewhere.
        lines = [(f"line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        content = [(place, _read_json(f"{path}, {place}", line)) for place, line in lines]
    else:
        whole = _read_json(str(path), text)
        if not isinstance(whole, list):
            raise UserError(f"{path}: holds {_shortened(whole)}, not a list of rows")
        content = [(f"row {number}", row) for number, row in enumerate(whole, 1)]
    for place, row in content:
        if not isinstance(row, dict):
            raise UserError(f"{path}, {place}: {_shortened(row)} is no row with named columns")
    rows = [row for _, row in content]
    return Table(path, tuple(dict.fromkeys(name for row in rows for name in row)), rows)


def _read_json(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: is no JSON: {error}") from None


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _known(columns: Mapping[str, str]) -> set[str]:
    """Return all names, in small letters, that a column of interest may have."""
    return {name.casefold() for names in COLUMN_NAMES.values() for name in names} | {
        name.casefold() for name in columns.values()
    }


def _read_csv(path: Path, text: str, known: set[str]) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
    names: tuple[str, ...] | None = None
    rows = []
    cells_by_line = _cells(text, max(",;\t", key=lambda separator: _known_and_all(text, separator, known)))
    for line, cells in cells_by_line:
        if names is None:
            names = tuple(cell.strip() for cell in cells)
            continue
        if any(cell.strip() for cell in cells[len(names) :]):
            raise UserError(
                f"{path}, line {line}: has {len(cells)} fields, the header {len(names)} ({', '.join(names)}); a caption that "
                "holds the separator is written in double quotes"
            )
        rows.append(dict(zip(names, cells, strict=False)))
    return names or (), rows


def _cells(text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of each line that is not blank, and its cells."""
    # Strict: else a quote that is never closed makes one caption of all rows behind it.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield reader.line_num, cells
    except csv.Error as error:
        raise csv.Error(f"line {reader.line_num}: {error}") from None


def _known_and_all(text: str, separator: str, known: set[str]) -> tuple[int, int]:
    """Count the known names, and all names, in the header as a separator divides it."""
    try:
        _, cells = next(_cells(text, separator), (0, []))
    except csv.Error:
        return 0, 0
    return sum(cell.strip().casefold() in known for cell in cells), len(cells)


# -- columns ---------------------------------------------------------------------------------------------------------


def parse_columns(text: str) -> dict[str, str]:
    """Parse `file=video,caption=text`: names of columns by what they hold; raises UserError for another form."""
    columns = {}
    for part in text.split(","):
        key, equals, name = (word.strip() for word in part.partition("="))
        if key not in COLUMN_NAMES or not equals or not name or key in columns:
            raise UserError(
                f"columns {text!r}: {part!r} is not KEY=NAME with a key of {', '.join(COLUMN_NAMES)}, each given once; "
                "for example file=video,caption=text"
            )
        columns[key] = name
    return columns


def find_columns(table: Table, columns: Mapping[str, str] | None = None) -> dict[str, str] | None:
    """Return the names of the columns that hold file, caption, split and licence.

    None where file or caption is missing, and for a clip index, whose videos are prepared already. `columns` names some of
    them, as `parse_columns` returns it; the others have one of COLUMN_NAMES. Raises UserError where several columns could be
    meant.
    """
    if _is_index(table):
        return None
    candidates = {}
    for key, names in COLUMN_NAMES.items():
        wanted = (columns or {}).get(key)
        if wanted is not None:
            candidates[key] = [name for name in table.columns if name == wanted]
        else:
            candidates[key] = [name for name in table.columns if name.strip().casefold() in names]
    if not all(candidates[key] for key in (*NEEDED, *(columns or {}))):
        return None
    for key, found in candidates.items():
        if len(found) > 1:
            raise UserError(
                f"{table.path}: the columns {', '.join(found)} could all be the {key}; name one (prepare-clips --columns "
                f"{key}={found[0]}) or rename the others"
            )
    return {key: found[0] for key, found in candidates.items() if found}


def rows_of(table: Table, columns: Mapping[str, str] | None = None) -> list[Row]:
    """Return a table's videos; see `find_columns` for `columns`.

    Raises UserError for a table without the columns, without rows, and with rows that lack a file or a caption.
    """
    if _is_index(table):
        raise UserError(f"{table.path}: is a clip index, whose videos are prepared already; train on it as it is")
    found = find_columns(table, columns)
    if found is None or not table.rows:
        wanted = [(columns or {}).get(key, " or ".join(COLUMN_NAMES[key])) for key in (*NEEDED, *(columns or {}))]
        raise UserError(
            f"{table.path}: {len(table.rows)} rows with the columns {', '.join(table.columns) or '(none)'}; wanted are rows "
            f"with {', and '.join(dict.fromkeys(wanted))}; other names are given to prepare-clips as "
            "--columns file=NAME,caption=NAME"
        )
    bad = [row for row in table.rows if not (_is_name(row.get(found["file"])) and _is_text(row.get(found["caption"])))]
    if bad:
        raise UserError(f"{table.path}: {len(bad)} rows lack a file or a caption, the first is {_shortened(bad[0])}")
    names = tuple(found.get(key) for key in ("split", "licence"))
    return [
        Row(row[found["file"]], row[found["caption"]].strip(), *(_optional(row.get(name)) if name else None for name in names))
        for row in table.rows
    ]


def _is_index(table: Table) -> bool:
    return set(table.columns) >= _INDEX_KEYS


def _optional(value: Any) -> str | None:
    return None if value in (None, "") else str(value)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and "\0" not in value


def _is_text(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, escaped in JSON: no tokenizer takes it
        return False
    return True
