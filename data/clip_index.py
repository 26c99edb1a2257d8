"""The clip index: a JSONL file with one clip a line, opened without holding its rows.

A clip is a stretch of a video at a stated rate: its frame k is the video's frame nearest to start + k / fps.

An open index is a few numbers for each clip (where its line stands, frames, height, width, fps: 32 bytes); a row is read
and parsed when it is asked for. Of a long index these columns are kept beside it, in FILE.columns, so that it is read
whole, and its videos looked for, once and not at every start of every process.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import os
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple, overload
from urllib.parse import quote

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from promag.training.config import UserError
from promag.training.files import replaced_file, write_atomically

from .captions import path_of_url

SAVE_COLUMNS_FROM = 10_000  # rows; shorter indices open in a tenth of a second without columns beside them

_COLUMNS = {
    "offset": np.int64,
    "length": np.int32,
    "frames": np.int32,
    "height": np.int32,
    "width": np.int32,
    "fps": np.float64,
}

_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=1, lt=2**31)]
_Bytes = Annotated[int, Field(ge=0)]

_OF_THE_FILE = ("bytes", "modified")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Clip:
    """One line of a clip index."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    path: Annotated[str, Field(min_length=1)]  # path of the video or image
    start: Annotated[float, Field(ge=0, allow_inf_nan=False)]  # seconds after the video's first frame
    frames: _Count  # at `fps`
    fps: _Positive
    width: _Count  # the video's width in pixels
    height: _Count
    caption: str
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]  # hash of the video file
    licence: str | None = None
    decord: bool = False  # decord reads the video exactly as PyAV does
    # Size and time (nanoseconds) of the file that was hashed; see unchanged.py. Indices of earlier versions have none.
    bytes: _Bytes | None = field(default=None, compare=False)
    modified: int | None = field(default=None, compare=False)


class ClipIndex(Sequence[Clip]):
    """The clips of an index file, or some of them, in order; a row is parsed when it is asked for.

    Other processes receive the columns and the file's name. `load_clips` opens an index.
    """

    def __init__(self, path: Path, columns: Mapping[str, np.ndarray]):
        self.path, self._columns = path, dict(columns)
        self._file: int | None = None

    def column(self, name: str) -> np.ndarray:
        """Return frames, height, width or fps of every clip."""
        return self._columns[name]

    def take(self, which: np.ndarray) -> "ClipIndex":
        """Return the clips at these places, as an index of their own."""
        return ClipIndex(self.path, {name: values[which] for name, values in self._columns.items()})

    def __len__(self) -> int:
        """Count the clips."""
        return len(self._columns["offset"])

    @overload
    def __getitem__(self, place: int) -> Clip: ...
    @overload
    def __getitem__(self, place: slice) -> "ClipIndex": ...
    def __getitem__(self, place: int | slice) -> "Clip | ClipIndex":
        """Read one row, with the absolute path of its video; raises UserError where the file has changed."""
        if isinstance(place, slice):
            return self.take(np.arange(len(self))[place])
        offset, length = int(self._columns["offset"][place]), int(self._columns["length"][place])
        try:
            # pread has no position that forked workers would share.
            return _located(_adapter().validate_json(os.pread(self._opened(), length, offset), strict=True), self.path)
        except (OSError, ValidationError):
            raise UserError(f"{self.path}: has changed or gone since it was opened; start again") from None

    def _opened(self) -> int:
        if self._file is None:
            self._file = os.open(self.path, os.O_RDONLY)
        return self._file

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}

    def __del__(self) -> None:
        if self._file is not None:
            os.close(self._file)


def column(clips: Sequence[Clip], name: str) -> np.ndarray:
    """Return frames, height, width or fps of every clip of an index or a list."""
    return clips.column(name) if isinstance(clips, ClipIndex) else np.array([getattr(clip, name) for clip in clips])


def take(clips: Sequence[Clip], which: np.ndarray) -> Sequence[Clip]:
    """Return the clips at these places of an index or a list."""
    return clips.take(which) if isinstance(clips, ClipIndex) else [clips[place] for place in which]


def path_text(path: str) -> str:
    """Return a path as an index holds it: as it is, or as a `file:` URL where its name is no UTF-8 (or looks like a URL)."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return f"file:{quote(os.fsencode(path))}"
    return f"file:{quote(path)}" if path.startswith("file:") else path


def row_of(clip: Clip) -> dict[str, Any]:
    """Return the keys and values of a clip, without None, False, and those that a copy of its video may change."""
    values = dataclasses.asdict(clip).items()
    return {key: value for key, value in values if value is not None and value is not False and key not in _OF_THE_FILE}


def save_clips(path: str | os.PathLike, clips: Sequence[Clip]) -> None:
    """Write the index atomically; paths of videos below its folder are relative to it."""
    folder = Path(os.path.abspath(path)).parent
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for clip in clips:
        video = Path(os.path.abspath(clip.path))
        name = video.relative_to(folder).as_posix() if video.is_relative_to(folder) else str(video)
        of_the_file = {key: getattr(clip, key) for key in _OF_THE_FILE if getattr(clip, key) is not None}
        lines.append(json.dumps(row_of(clip) | of_the_file | {"path": path_text(name)}, ensure_ascii=False) + "\n")
    write_atomically(path, "".join(lines))


class Digests(NamedTuple):
    """Hashes of a list of clips, whose paths do not matter."""

    clips: str
    videos: str  # hash of their videos and stretches alone, which decide their pixels


def digest_clips(clips: Sequence[Clip], count: int) -> Digests:
    """Hash the first `count` clips, a row at a time.

    It does not matter whether decord, which is not there on every machine, may read them.
    """
    digests = [hashlib.sha256(b"["), hashlib.sha256(b"[")]
    for place in range(count):
        row = row_of(dataclasses.replace(clips[place], path="", decord=False))
        pixels = {key: value for key, value in row.items() if key not in ("caption", "licence")}
        for digest, part in zip(digests, (row, pixels), strict=True):
            digest.update(((", " if place else "") + json.dumps(part, sort_keys=True)).encode())
    for digest in digests:
        digest.update(b"]")
    return Digests(*(digest.hexdigest() for digest in digests))


def load_clips(path: str | os.PathLike) -> ClipIndex:
    """Open an index that `save_clips` wrote; its paths are absolute.

    Raises UserError, with the line's number, for unknown or missing keys, wrong types and videos that are not there. Where
    the columns of this very file are kept beside it, they were checked when they were written.
    """
    path = Path(os.path.abspath(path))
    try:
        state = os.stat(path)
        identity = {"size": str(state.st_size), "modified": str(state.st_mtime_ns), "folder": path_text(str(path.parent))}
        columns = _saved_columns(path, identity)
        if columns is None:
            columns = _read_columns(path)
            if len(columns["offset"]) >= SAVE_COLUMNS_FROM:
                _save_columns(path, identity, columns)
    except OSError as error:
        raise UserError(f"{path}: cannot be read as a clip index: {error}") from None
    if not len(columns["offset"]):
        raise UserError(f"{path}: holds no clips")
    return ClipIndex(path, columns)


@functools.cache
def _adapter() -> TypeAdapter[Clip]:
    return TypeAdapter(Clip)


def _located(clip: Clip, index: Path) -> Clip:
    path = path_of_url(clip.path) if clip.path.startswith("file:") else clip.path
    return dataclasses.replace(clip, path=os.path.normpath(index.parent / path))


def _read_columns(path: Path) -> dict[str, np.ndarray]:
    """Read and check every row once; keep none of them."""
    adapter, offset = _adapter(), 0
    values = {name: array({"i": "l", "f": "d"}[np.dtype(kind).kind]) for name, kind in _COLUMNS.items()}
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                clip = _located(adapter.validate_json(line, strict=True), path)
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(map(str, first["loc"]))
                raise UserError(f"{path}, line {number}: {where + ': ' if where else ''}{first['msg']}") from None
            if not os.path.isfile(clip.path):
                raise UserError(f"{path}, line {number}: {clip.path} is not there; prepare the clips again")
            row = (offset, len(line), clip.frames, clip.height, clip.width, clip.fps)
            for column_values, value in zip(values.values(), row, strict=True):
                column_values.append(value)
            offset += len(line)
    return {name: np.array(values[name], kind) for name, kind in _COLUMNS.items()}


def _columns_file(path: Path) -> Path:
    return path.with_name(path.name + ".columns")


def _saved_columns(path: Path, identity: Mapping[str, str]) -> dict[str, np.ndarray] | None:
    """Return the columns saved beside an index, if they are of this very file."""
    try:
        with safe_open(_columns_file(path), "np") as file:
            if file.metadata() == identity and set(file.keys()) == set(_COLUMNS):
                return {name: file.get_tensor(name) for name in _COLUMNS}
    except (OSError, SafetensorError):
        pass  # none there, or another program's
    return None


def _save_columns(path: Path, identity: Mapping[str, str], columns: Mapping[str, np.ndarray]) -> None:
    place = _columns_file(path)
    try:
        with replaced_file(place) as aside:
            save_file(dict(columns), aside, metadata=dict(identity))
    except FileNotFoundError:
        pass  # removed as a leftover by a process that writes the same columns
    except (OSError, SafetensorError) as error:
        logger.warning("%s: cannot be written, so every start reads the whole index: %s", place, error)
