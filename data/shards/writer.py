"""Write tar shards from a clip index, and the index of shards that others wrote."""

import dataclasses
import hashlib
import itertools
import json
import logging
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from promag.training.config import UserError
from promag.training.files import append_json, replaced_file, write_atomically
from promag.training.progress import ProgressBar

from ..buckets import NONE, Bucket, Buckets
from ..clip_index import Clip, ClipIndex, load_clips, path_text, row_of
from ..listing import first_few
from ..video import READER, UnreadableVideo, VideoFacts, decode_strictly
from .index import COLUMNS, INDEX_NAME, ShardRow, find_shards, shard_name
from .reader import MEDIA, BadSample, ShardReader, opened

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Written:
    """The counts that `write_shards` returns."""

    shards: int
    samples: int
    bytes: int
    repeated: int  # samples whose video stands in the shards once more: clips cut from one file
    left_out: int  # clips too short for every bucket


def write_shards(
    index: str | os.PathLike,
    folder: str | os.PathLike,
    per_shard: int,
    seed: int = 0,
    buckets: Sequence[Bucket] = (),
    progress: bool = True,
) -> Written:
    """Write the clips of an index as tar shards, and the shards' index, which comes last.

    Clips are shuffled first, so that a shard is a random part of the whole. With buckets a shard holds clips of one bucket,
    whose name it begins with: a reader of mixed shards would skip the samples of other buckets. An interrupted call continues
    behind the last whole shard.

    Args:
        index: clips.jsonl.
        folder: where the shards are written.
        per_shard: samples of a shard; the last one of a bucket has fewer.
        seed: decides the order.
        buckets: the buckets of the training.
        progress: show a bar.

    Raises UserError for a video that is gone or changed since it was prepared, for one whose name has no ending of videos or
    images, and for a folder with other shards.
    """
    if per_shard < 1 or seed < 0:
        raise UserError(f"per_shard {per_shard}, seed {seed}: at least 1 and 0 are needed")
    clips, folder = load_clips(index), Path(folder)
    _check_endings(index, clips)
    plan, left_out = _plan(clips, per_shard, seed, buckets)
    part, rows = _begin(folder, index, per_shard, seed, buckets)
    digests = array("Q")
    bar = ProgressBar(total=sum(len(places) for _, places in plan), desc="writing", unit="clip", disable=not progress)
    for number, (name, places) in enumerate(plan):
        chosen = [clips[int(place)] for place in places]
        digests.extend(int(clip.sha256[:16], 16) for clip in chosen)
        if number >= len(rows):
            rows.append(_write_shard(folder / name, places, chosen))
            append_json(part, dataclasses.asdict(rows[-1]))
        bar.update(len(chosen))
    bar.close()
    _write_index(folder / INDEX_NAME, rows)
    part.unlink()
    repeated = len(digests) - len(np.unique(np.array(digests, np.uint64)))
    return Written(len(rows), len(digests), sum(row.bytes for row in rows), repeated, left_out)


def _check_endings(index: str | os.PathLike, clips: ClipIndex) -> None:
    """Raise UserError where readers of shards would not know a clip's file as a video or an image."""
    if strange := sorted({clip.path for clip in clips if _ending(clip) not in MEDIA}):
        raise UserError(
            f"{index}: {len(strange)} files have names without an ending of videos or images, by which shards know them: "
            f"{first_few(strange)}; prepare the clips again by `promag prepare-clips --cut`, which writes .mp4 files"
        )


def _ending(clip: Clip) -> str:
    return Path(clip.path).suffix[1:].lower()


def _plan(clips: ClipIndex, per_shard: int, seed: int, buckets: Sequence[Bucket]) -> tuple[list[tuple[str, np.ndarray]], int]:
    """Return name and clips of each shard, and how many clips are in none."""
    order = np.random.default_rng(seed).permutation(len(clips))
    groups = [("shard", order)]
    if buckets:
        assigned = Buckets(buckets).assign(*(clips.column(name)[order] for name in ("frames", "height", "width")))
        groups = [(str(bucket), order[assigned == number]) for number, bucket in enumerate(buckets)]
        if left := np.flatnonzero(assigned == NONE).tolist():
            names = first_few((clips[int(order[place])].path for place in left), count=len(left))
            logger.warning("%d of %d clips are too short for every bucket: %s", len(left), len(clips), names)
    shards = [
        (f"{name}-{number:06d}.tar", places[first : first + per_shard])
        for name, places in groups
        for number, first in enumerate(range(0, len(places), per_shard))
    ]
    return shards, len(clips) - sum(len(places) for _, places in shards)


def _begin(
    folder: Path, index: str | os.PathLike, per_shard: int, seed: int, buckets: Sequence[Bucket]
) -> tuple[Path, list[ShardRow]]:
    """Return the file that lists finished shards, and the shards that an interrupted call finished."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{INDEX_NAME}.part"
    with open(index, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    mark = json.dumps({"clips": digest, "per_shard": per_shard, "seed": seed, "buckets": list(map(str, buckets))})
    if (folder / INDEX_NAME).exists() and not part.exists():  # else a call was interrupted before its last change
        raise UserError(f"{folder}: holds whole shards already; name another folder")
    if not part.exists():
        write_atomically(part, mark + "\n")
        return part, []
    first, *lines = part.read_text(encoding="utf-8").splitlines(keepends=True)
    if first != mark + "\n":
        raise UserError(f"{folder}: an interrupted call with other clips or settings wrote there; name another folder")
    rows = [ShardRow(**json.loads(line)) for line in lines if line.endswith("\n")]
    write_atomically(part, "".join([first, *(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows)]))
    return part, rows


def _write_shard(path: Path, places: np.ndarray, clips: Sequence[Clip]) -> ShardRow:
    from webdataset.writer import TarWriter

    with replaced_file(path) as aside, open(aside, "wb") as file:
        hashing = _Hashing(file)
        writer = TarWriter(hashing, encoder=False, mtime=0)  # pyright: ignore[reportArgumentType]: it only writes
        for place, clip in zip(places, clips, strict=True):
            writer.write(_sample(int(place), clip))
        writer.close()
        file.flush()
        os.fsync(file.fileno())
    columns: dict[str, Any] = {name: [getattr(clip, name) for clip in clips] for name in COLUMNS}
    return ShardRow(path.name, len(clips), hashing.bytes, hashing.digest.hexdigest(), **columns)


def _sample(place: int, clip: Clip) -> dict[str, Any]:
    try:
        data = Path(clip.path).read_bytes()
    except OSError as error:
        raise UserError(f"{clip.path}: {error.strerror or error}; put it back, or prepare the clips again") from None
    if hashlib.sha256(data).hexdigest() != clip.sha256:
        raise UserError(f"{clip.path}: has changed since it was prepared; prepare the clips again")
    row = json.dumps(row_of(clip) | {"path": path_text(Path(clip.path).name)}, ensure_ascii=False).encode()
    return {"__key__": f"{place:09d}", _ending(clip): data, "json": row}


class _Hashing:
    """A file to write to that hashes and counts what passes."""

    def __init__(self, file: Any):
        self.file, self.digest, self.bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.bytes += len(data)
        return self.file.write(data)


def _write_index(path: Path, rows: Sequence[ShardRow]) -> None:
    write_atomically(path, "".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows))


# -- shards that others wrote ----------------------------------------------------------------------------------------


def index_shards(
    pattern: str, out: str | os.PathLike, max_bad: float = 0.01, workers: int = 2, progress: bool = True
) -> tuple[int, list[str]]:
    """Decode every sample of shards strictly, once, and write their index to `out`.

    A sample that cannot be used keeps its place, with 0 frames: it is never drawn. Returns the number of samples and what
    is wrong with the bad ones. Raises UserError where more than the part `max_bad` of the samples are bad, and for two
    shards of one name.
    """
    urls = find_shards(pattern)
    if not 0 <= max_bad <= 1 or workers < 1:
        raise UserError(f"max_bad {max_bad}, workers {workers}: max_bad is from 0 to 1, workers at least 1")
    if len(set(map(shard_name, urls))) < len(urls):
        raise UserError(f"shards {pattern}: an index lies beside its shards, and two of these have one name")
    with READER.pool(workers) as pool:
        bar = ProgressBar(pool.map(_examine_shard, urls), total=len(urls), desc="decoding", unit="shard", disable=not progress)
        examined = list(bar)
    samples, bad = sum(row.samples for row, _ in examined), [reason for _, reasons in examined for reason in reasons]
    if not samples or len(bad) > max_bad * samples:
        raise UserError(f"{len(bad)} of {samples} samples are bad, at most {max_bad:.1%} may be: {first_few(bad)}")
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    _write_index(Path(out), [row for row, _ in examined])
    return samples, bad


def _examine_shard(url: str) -> tuple[ShardRow, list[str]]:
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    bad = []
    for facts in _facts(url):
        if isinstance(facts, UserError):
            bad.append(str(facts))
            facts = None
        row = (0.0, facts.frames, facts.fps, facts.height, facts.width) if facts else (0.0, 0, 0.0, 0, 0)
        for values, value in zip(columns.values(), row, strict=True):
            values.append(value)
    digest, size = hashlib.sha256(), 0
    with opened(url) as file:
        while data := file.read(2**20):
            digest.update(data)
            size += len(data)
    return ShardRow(shard_name(url), len(columns["frames"]), size, digest.hexdigest(), **columns), bad


def _facts(url: str) -> Iterator[VideoFacts | UserError]:
    """Yield the facts of each sample of a shard after a strict pass, or the reason why it cannot be used."""
    reader = ShardReader(url, None)
    for number in itertools.count():
        sample = reader.read([number])[number]
        if reader.ended(number):
            break
        if isinstance(sample, BadSample) and reader.stuck(number):
            raise UserError(str(sample))
        try:
            yield sample if isinstance(sample, BadSample) else READER.call(decode_strictly, sample.video)
        except UnreadableVideo as error:
            yield error
    reader.close()
