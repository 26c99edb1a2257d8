"""A cache on disk: numbered files of tensors, a fingerprint of their sources, and an index that marks the cache complete.

    cache/fingerprint.json         written first: what the cache was made from
    cache/shard-00000.safetensors  written atomically by any of several processes
    cache/index.json               written last: it marks a complete cache

Nothing is kept in memory per clip: a shard's data is read on access. Processes on several machines need a shared folder.
"""

import functools
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import ConfigDict, PositiveInt, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from typing_extensions import TypedDict

from promag.training.config import UserError, one_line
from promag.training.files import remove_leftovers, save_tensors_atomically, write_atomically

CACHE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AGAIN = "delete it and index.json, and write the cache again by the command that wrote it"
LATER = ("settings", "drawn_clips")  # fields of fingerprints that caches of earlier versions lack, and then may have any value
OPEN_FILES = 128  # maximum number of shards that one reader keeps mapped into memory


@dataclass(frozen=True)
class Fingerprint:
    """Identity of a cache's inputs; two caches are interchangeable only if every field agrees.

    Each kind of cache adds fields, `clips` among them: a hash of the clip list. Where `videos` agree, caches that differ in
    `clips` differ in captions alone.
    """

    hashed: ClassVar[Mapping[str, str]] = {}  # fields that are hashes: what to say where one differs

    videos: str | None = field(default=None, kw_only=True)  # hash of the list without captions; earlier versions had none

    def check(self, other: Mapping[str, Any], place: Path) -> None:
        """Raise UserError naming what differs, other than captions, between a cache found in `place` and the one asked for."""
        same_videos = self.videos is not None and other.get("videos") == self.videos
        differs = [
            self.hashed.get(key) or f"{key} {other.get(key)} instead of {value}"
            for key, value in asdict(self).items()
            if other.get(key) != value
            and key != "videos"
            and not (key == "clips" and same_videos)
            and not (key in LATER and other.get(key) is None)
        ]
        if differs:
            raise UserError(f"cache {place}: was made from {', '.join(differs)}; delete it or name another folder")


# -- writing ---------------------------------------------------------------------------------------------------------


class Unfinished(NamedTuple):
    """Numbers of the shards that a cache lacks, and of those whose captions may have been corrected since."""

    missing: list[int]
    outdated: list[int]


def open_or_resume_cache(folder: Path, fingerprint: Fingerprint, shards: int) -> Unfinished | None:
    """Open or create the cache in a folder; return what is unfinished of it, None if it is complete.

    Raises UserError naming what differs if the folder holds another cache.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mark, index = folder / "fingerprint.json", folder / "index.json"
    records = [read_record(mark, dict[str, Any])] if mark.exists() else []
    records += [read_record(index, Index)["fingerprint"]] if index.exists() else []
    for record in records:
        fingerprint.check(record, folder)
    wanted = asdict(fingerprint)
    same = all(record["clips"] == wanted["clips"] for record in records)
    if index.exists() and same:
        return None
    if writing := remove_leftovers(folder, ".shard-*"):
        print(f"{folder}: process {writing[0]} fills it too; each encodes all that was missing at its start", flush=True)
    there = [number for number in range(shards) if shard_path(folder, number).exists()]
    if not same:
        index.unlink(missing_ok=True)
        # Clips that no call asks for: until `finish`, the shards' captions may be those of one list or another.
        write_atomically(mark, json.dumps(wanted | {"clips": ""}))
        return Unfinished(_rest(there, shards), there)
    if records and records[0].get("videos") != fingerprint.videos:
        there = []  # shards of an interrupted call of an earlier version have other identities
    write_atomically(mark, json.dumps(wanted))
    return Unfinished(_rest(there, shards), [])


def _rest(there: Sequence[int], shards: int) -> list[int]:
    return sorted(set(range(shards)).difference(there))


def shard_path(folder: Path, number: int) -> Path:
    """Return the path of one shard."""
    return folder / f"shard-{number:05d}.safetensors"


def write_shard(folder: Path, number: int, fingerprint: Fingerprint, tensors: Mapping[str, Tensor]) -> None:
    """Write one shard atomically, with the identity of its number and of its cache but for captions."""
    mark = {"identity": _identity(asdict(fingerprint), number)}
    save_tensors_atomically(shard_path(folder, number), {**tensors, **mark})


def _identity(fingerprint: Mapping[str, Any], number: int) -> Tensor:
    """Return 16 bytes that identify this shard among the shards of all caches."""
    kept = {key: value for key, value in fingerprint.items() if key not in LATER}
    if fingerprint.get("videos") is not None:  # else the cache was written by an earlier version
        del kept["clips"]
    return _short_hash(json.dumps([kept, number], sort_keys=True).encode())


def _short_hash(data: bytes) -> Tensor:
    return torch.tensor(list(hashlib.sha256(data).digest()[:16]), dtype=torch.uint8)


def finish(folder: Path, fingerprint: Fingerprint, clips: int, shard_size: int, **facts: Any) -> None:
    """Write the fingerprint and the index of a cache whose shards are all complete."""
    write_atomically(folder / "fingerprint.json", json.dumps(asdict(fingerprint)))
    index = {"fingerprint": asdict(fingerprint), "clips": clips, "shard_size": shard_size, **facts}
    write_atomically(folder / "index.json", json.dumps(index, indent=1))


def clips_of(shard: int, shard_size: int, clips: int) -> range:
    """Return the indices of a shard's clips."""
    return range(shard * shard_size, min((shard + 1) * shard_size, clips))


def hash_texts(texts: Sequence[str]) -> Tensor:
    """Return 16 bytes that identify these texts in their order."""
    return _short_hash(json.dumps(list(texts)).encode())


def pack_texts(texts: Sequence[str]) -> dict[str, Tensor]:
    """Return texts as concatenated UTF-8 bytes, and the end offset of each text."""
    parts = [text.encode() for text in texts]
    joined = torch.tensor(list(b"".join(parts)), dtype=torch.uint8)
    return {"captions": joined, "caption_ends": torch.tensor([len(part) for part in parts]).cumsum(0)}


# -- reading ---------------------------------------------------------------------------------------------------------


class Index(TypedDict):
    """What the index of every cache states; more keys belong to its kind."""

    __pydantic_config__ = ConfigDict(extra="allow", strict=True)  # pyright: ignore[reportGeneralTypeIssues]

    fingerprint: dict[str, Any]
    clips: PositiveInt
    shard_size: PositiveInt


def read_record(path: Path, kind: Any) -> Any:
    """Return the JSON of a cache's file as a value of a type; raises UserError naming the file and the first wrong key."""
    try:
        return _adapter(kind).validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"cache {path}: cannot be read: {one_line(error)}") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "content"
        raise UserError(f"cache {path}: {key}: {first['msg']} (got {repr(first['input'])[:100]}); {AGAIN}") from None


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


class Shards:
    """A complete cache whose shards are mapped into memory on access.

    Args:
        folder: folder of the cache.
        kind: type of its index.
        rows: tensors of a shard that have a row for each clip, with the shape of a row.
        ragged: tensors of a shard in which the clips' parts lie one after the other, by the name of the tensor of their ends.

    Raises UserError for a folder without a complete cache, and on reading a shard that is damaged, missing or of another cache.
    """

    def __init__(
        self,
        folder: Path,
        kind: Any = Index,
        rows: Mapping[str, Sequence[int]] = MappingProxyType({"caption_ends": ()}),
        ragged: Mapping[str, str] = MappingProxyType({"caption_ends": "captions"}),
    ):
        if not (folder / "index.json").exists():
            raise UserError(f"cache {folder}: no index.json there; write it with the command that fills it, or let that finish")
        self.folder, self.rows, self.ragged = folder, dict(rows), dict(ragged)
        self.index = read_record(folder / "index.json", kind)
        self.clips, self.size = self.index["clips"], self.index["shard_size"]
        self._open: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Drop open files: each process opens its own."""
        return self.__dict__ | {"_open": {}}

    def place(self, clip: int) -> tuple[Any, int]:
        """Return the open shard of a clip, and the clip's row in it; raises IndexError for an index out of range."""
        if not 0 <= clip < self.clips:
            raise IndexError(f"clip {clip}: legal are 0 to {self.clips - 1}")
        number, row = divmod(clip, self.size)
        return self.shard(number), row

    def shard(self, number: int) -> Any:
        """Return one open shard; raises UserError if its file is damaged, missing or another shard's."""
        if number not in self._open:
            while len(self._open) >= OPEN_FILES:
                self._open.pop(next(iter(self._open)))
            self._open[number] = self._checked(number)
        return self._open[number]

    def damaged(self, clip: int, problem: str) -> UserError:
        """Return the error for a clip whose part of a shard cannot be used."""
        return UserError(f"cache shard {shard_path(self.folder, clip // self.size)}: clip {clip}: {problem}; {AGAIN}")

    def _checked(self, number: int) -> Any:
        path = shard_path(self.folder, number)
        try:
            shard: Any = safe_open(path, "pt")
            shapes = {name: shard.get_slice(name).get_shape() for name in shard.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, SafetensorError) as error:
            raise UserError(f"cache shard {path}: cannot be read: {error}; {AGAIN}") from None
        # Caches written by earlier versions have no identities.
        expected = _identity(self.index["fingerprint"], number)
        if "identity" in shapes and not torch.equal(shard.get_tensor("identity"), expected):
            raise UserError(f"cache shard {path}: is another shard, or one of another cache; {AGAIN}")
        count = len(clips_of(number, self.size, self.clips))
        for name, row in self.rows.items():
            if shapes.get(name) != [count, *row]:
                raise UserError(f"cache shard {path}: {name} of shape {shapes.get(name)}: {[count, *row]} is needed; {AGAIN}")
        for ends_name, name in self.ragged.items():
            ends = shard.get_tensor(ends_name)
            if (
                ends.is_floating_point()
                or (ends.diff() < 0).any()
                or ends[0] < 0
                or [int(ends[-1])] != shapes.get(name, [])[:1]
            ):
                raise UserError(f"cache shard {path}: {ends_name} do not fit {name} of shape {shapes.get(name)}; {AGAIN}")
        return shard

    def caption(self, clip: int) -> str:
        """Return the caption of one clip."""
        shard, row = self.place(clip)
        first, end = stretch(shard.get_slice("caption_ends"), row)
        return self._decoded(clip, bytes(shard.get_slice("captions")[first:end].tolist())) if end > first else ""

    def captions(self) -> Iterator[str]:
        """Yield the captions of all clips in order, with one shard in memory at a time."""
        for number in range(math.ceil(self.clips / self.size)):
            shard = self.shard(number)
            texts, ends = shard.get_tensor("captions").numpy().tobytes(), shard.get_tensor("caption_ends").tolist()
            for row, (first, end) in enumerate(zip([0, *ends], ends, strict=False)):
                yield self._decoded(number * self.size + row, texts[first:end])

    def _decoded(self, clip: int, text: bytes) -> str:
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise self.damaged(clip, "its caption is not UTF-8") from None


def stretch(ends: Any, row: int) -> tuple[int, int]:
    """Return the start and end offset of a row, given the end offsets of all rows (a tensor or a safetensors slice)."""
    first, end = [0, *ends[max(row - 1, 0) : row + 1].tolist()][-2:]
    return first, end
