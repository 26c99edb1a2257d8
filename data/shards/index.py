"""Tar shards of clips, named by a pattern and described by an index beside them.

    shards/shard-000000.tar     samples: 000000017.mp4, 000000017.json, ...
    shards/shards.jsonl         one line a shard: its name, samples, bytes, sha256, and start, frames, fps, height and width
                                of each sample in the shard's order

The index alone says how many samples a shard holds and of which length and size they are, so that every position is known
before a shard is opened.
"""

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from promag.training.config import UserError

from ..captions import path_of_url
from ..clip_index import Clip
from ..listing import first_few
from .reader import Sample, is_local, opened

INDEX_NAME = "shards.jsonl"
COLUMNS = {"start": np.float64, "frames": np.int32, "fps": np.float64, "height": np.int32, "width": np.int32}

_NAME = re.compile(r"[^/\s?]+\.tar(?:\.gz)?(?=[\s?]|$)")  # name of a shard, in a URL or a command
_ENDINGS = (".tar", ".tar.gz")  # endings of a shard's path, whose name may have spaces


@dataclass(frozen=True)
class ShardRow:
    """One line of a shards' index."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    shard: Annotated[str, Field(min_length=1)]  # name of the file beside the index
    samples: Annotated[int, Field(ge=0)]
    bytes: Annotated[int, Field(ge=0)]  # size of the file
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]  # hash of the file
    start: list[Annotated[float, Field(ge=0, allow_inf_nan=False)]]  # seconds, of each sample, as in Clip
    frames: list[Annotated[int, Field(ge=0, lt=2**31)]]  # 0 where the sample cannot be used
    fps: list[Annotated[float, Field(ge=0, allow_inf_nan=False)]]
    height: list[Annotated[int, Field(ge=0)]]
    width: list[Annotated[int, Field(ge=0)]]

    def __post_init__(self) -> None:
        """Raise ValueError where a sample's facts are missing."""
        lengths = {name: len(getattr(self, name)) for name in COLUMNS}
        if set(lengths.values()) != {self.samples}:
            raise ValueError(f"{self.samples} samples, but as many values as {lengths}")


class ShardIndex:
    """Shards in their order, and what is known of their samples without opening them: 28 bytes for each.

    `samples`, `bytes` and `sha256` are those of each shard; `offsets` (shards + 1,) is the place of its first sample among
    all.
    """

    def __init__(self, urls: Sequence[str], shards: Sequence["_Shard"]):
        self.urls = list(urls)
        self.samples = np.array([shard.samples for shard in shards], np.int64)
        self.bytes = [shard.bytes for shard in shards]
        self.sha256 = [shard.sha256 for shard in shards]
        self.offsets = np.concatenate([[0], self.samples.cumsum()])
        self._columns = {name: np.concatenate([shard.columns[name] for shard in shards]) for name in COLUMNS}

    def __len__(self) -> int:
        """Count the samples."""
        return int(self.offsets[-1])

    def column(self, name: str) -> np.ndarray:
        """Return start, frames, fps, height or width of every sample."""
        return self._columns[name]

    def clip(self, place: int, sample: Sample) -> Clip:
        """Return a sample as a clip."""
        facts: dict[str, Any] = {name: values[place].item() for name, values in self._columns.items()}
        return Clip(path=sample.video.name, caption=sample.caption, sha256="", **facts)

    def damaged(self) -> dict[int, str]:
        """Return the local shards whose length differs from the index, by number, each with the reason."""
        reasons = {}
        for number, (url, size) in enumerate(zip(self.urls, self.bytes, strict=True)):
            if is_local(url):
                size_now = os.path.getsize(url) if os.path.isfile(url) else None
                if size_now is None:
                    reasons[number] = f"{url} is not there"
                elif size_now != size:
                    reasons[number] = f"{url} has {size_now} bytes, {INDEX_NAME} says {size}"
        return reasons


# -- finding ---------------------------------------------------------------------------------------------------------


def is_shards(source: str | os.PathLike) -> bool:
    """Return whether `source` is a pattern of shards and not another source of clips."""
    return os.fspath(source).endswith(_ENDINGS) or bool(_NAME.search(os.fspath(source)))


def find_shards(pattern: str | os.PathLike) -> list[str]:
    """Return the shards that a pattern names: braces (`{000..041}`, `{a,b}`) anywhere, wildcards in paths and `file:` URLs.

    A `file:` URL becomes its path. Wildcards in the name of a file or folder that exists stand for themselves.

    Raises UserError for a pattern that names none, or one twice.
    """
    from braceexpand import braceexpand

    try:
        named = list(braceexpand(os.fspath(pattern)))
    except ValueError as error:
        raise UserError(f"shards {pattern}: {error}") from None
    shards = []
    for name in named:
        path = path_of_url(name) if name.startswith("file:") else name
        # In a URL, %XX stand for bytes of a name, not for wildcards.
        wild = is_local(name) and glob.has_magic(name) and not os.path.lexists(path)
        shards += _matching(path) if wild else [os.path.abspath(path) if is_local(name) else name]
    if not shards:
        raise UserError(f"shards {pattern}: no file matches")
    if len(set(shards)) < len(shards):
        raise UserError(f"shards {pattern}: names {len(shards) - len(set(shards))} shards more than once")
    return shards


def _matching(path: str) -> list[str]:
    """Return the files that a path with wildcards names; leading folders that exist have none."""
    folder = os.path.dirname(path)
    while folder and not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    return sorted(glob.glob(glob.escape(folder) + path[len(folder) :]))


def shard_name(url: str) -> str:
    """Return the name of a shard's file."""
    name = os.path.basename(url)
    names = [name] if is_local(url) and name.endswith(_ENDINGS) else _NAME.findall(url)
    if not names:
        raise UserError(f"shard {url}: its name does not end in .tar, so its index cannot be found")
    return names[-1]


def index_url(shard: str) -> str:
    """Return where the index of a shard's folder is: the same path, URL or command with the shard's name replaced."""
    before, _, after = shard.rpartition(shard_name(shard))
    return before + INDEX_NAME + after


def open_shards(pattern: str | os.PathLike) -> ShardIndex:
    """Find shards and read the index beside them.

    Raises UserError where an index is missing, malformed, or does not know a shard.
    """
    urls = find_shards(pattern)
    beside: dict[str, list[str]] = {}
    for url in urls:
        beside.setdefault(index_url(url), []).append(url)
    shards = {url: shard for place, wanted in beside.items() for url, shard in _read_index(place, wanted).items()}
    unknown = [url for url in urls if url not in shards]
    if unknown:
        raise UserError(f"{len(unknown)} shards have no line in the {INDEX_NAME} beside them: {first_few(unknown)}")
    return ShardIndex(urls, [shards[url] for url in urls])


@dataclass(frozen=True, eq=False)
class _Shard:
    """A row with arrays in place of its lists, which take several times the memory."""

    samples: int
    bytes: int
    sha256: str
    columns: dict[str, np.ndarray]


def _read_index(place: str, wanted: Sequence[str]) -> dict[str, _Shard]:
    adapter, by_name = TypeAdapter(ShardRow), {shard_name(url): url for url in wanted}
    shards: dict[str, _Shard] = {}
    number = 0
    try:
        with opened(place) as file:
            for line in _lines(file):
                number += 1
                row = adapter.validate_json(line, strict=True)
                if row.shard in by_name:
                    columns = {name: np.array(getattr(row, name), kind) for name, kind in COLUMNS.items()}
                    shards[by_name[row.shard]] = _Shard(row.samples, row.bytes, row.sha256, columns)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{place}: {reason}; `promag shards write` or `promag shards index` makes it") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{place}, line {number}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return shards


def _lines(file: Any) -> Iterator[bytes]:
    """Yield the lines of a stream that has only `read`; raises OSError where a pipe fails."""
    rest = b""
    while part := file.read(2**20):
        *lines, rest = (rest + part).split(b"\n")
        yield from filter(None, lines)
    yield from filter(None, [rest])
