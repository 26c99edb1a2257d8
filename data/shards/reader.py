"""Read a tar shard from front to back, from a file, a URL or a pipe.

Files that share a name up to the first dot are a sample: a video or an image, and its caption, which is the key `caption`
of its .json, else its .txt (webdataset's conventions).
"""

import contextlib
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from promag.training.config import UserError

from ..captions import path_of_url
from ..listing import VIDEO_EXTENSIONS
from ..tables import decode_text
from ..video import IMAGE_EXTENSIONS, VideoBytes

MEDIA = tuple(ending[1:] for ending in VIDEO_EXTENSIONS + IMAGE_EXTENSIONS)
ALLOW_PIPES = "PROMAG_ALLOW_PIPES"  # a variable of the environment, which no configuration file can set
_WHOLE = "has no more samples"
_tarfile: Any = tarfile  # its kinds of HeaderError are not in the type stubs
_DAMAGED = (tarfile.TarError, OSError, EOFError, zlib.error)


class BadSample(UserError):  # noqa: N818
    """A sample that cannot be used; the message names its shard and key, and says why."""

    # The rest may be absent: a DataLoader rebuilds a worker's exception from its message alone.
    def __init__(self, shard: str, key: str = "", reason: str = ""):
        super().__init__(f"shard {shard}, sample {key}: {reason}" if key else shard)


class _StrictMember(tarfile.TarInfo):
    """A member of a tar that must end with zeros: tarfile takes a damaged header, a cut and a hole for the end too."""

    @classmethod
    def fromtarfile(cls, archive: Any) -> Any:
        try:
            return super().fromtarfile(archive)
        except _tarfile.EOFHeaderError:
            while data := archive.fileobj.read(2**20):
                if data.strip(b"\0"):
                    break
            else:
                raise
            problem = "more data behind the zeros that end it"
        except (_tarfile.InvalidHeaderError, _tarfile.TruncatedHeaderError):
            problem = "a damaged header"
        except _tarfile.EmptyHeaderError:
            problem = "the end of the file, but no zeros, which end a tar"
        raise tarfile.ReadError(f"{problem} at byte {archive.offset}; copy the shard again, or write it as one whole tar")


@dataclass(frozen=True, eq=False)
class Sample:
    """One sample of a shard."""

    key: str
    video: VideoBytes
    caption: str


def is_local(url: str) -> bool:
    """Return whether `url` is a path, not a URL or a pipe."""
    return not re.match(r"[a-z0-9+]+:", url, re.IGNORECASE) or url.startswith("file:")


@contextlib.contextmanager
def opened(url: str) -> Iterator[Any]:
    """Open a path, URL or pipe to read; raises OSError where a command that feeds it has failed."""
    file = _open(url)
    try:
        yield file
        if hasattr(file, "wait_for_child"):
            file.stream.close()
            file.wait_for_child()  # raises OSError for an exit status that says failure
    finally:
        _abandon(file)


def _open(url: str) -> Any:
    if is_local(url):
        return open(path_of_url(url) if url.startswith("file:") else url, "rb")
    if url.lower().startswith("pipe:") and os.environ.get(ALLOW_PIPES) != "1":
        raise UserError(
            f"shards {url}: a pipe runs a shell command, so a configuration from someone else could run anything; if you trust "
            f"this one, set {ALLOW_PIPES}=1 in the environment"
        )
    from webdataset.gopen import gopen

    return gopen(url)


def _abandon(file: Any) -> None:
    """Close a stream that may have more to read."""
    if hasattr(file, "proc"):
        file.proc.kill()  # it may wait for a network
        file.proc.wait()
        file.stream.close()
    else:
        file.close()


class ShardReader:
    """Reads samples of one shard by their number, forwards; a step back opens it again.

    A local file is skipped through by seeking, a URL or pipe by reading on. A URL or pipe that breaks off after it lay idle
    between two reads, as servers close slow connections, is opened once more.

    Args:
        url: path, URL or pipe.
        samples: how many the index says there are; None where there is no index yet.
    """

    def __init__(self, url: str, samples: int | None):
        self.url, self.samples = url, samples
        self._file: Any = None
        self._forget()

    def _forget(self) -> None:
        self._archive: Any = None  # tarfile.TarFile
        self._next: tarfile.TarInfo | None = None  # read as a header, not yet as a file
        self._number, self._key = -1, ""  # number and key of the sample that was last begun
        self._broken = ""  # why nothing more can be read

    def read(self, numbers: Sequence[int]) -> dict[int, Sample | BadSample]:
        """Return the samples with these increasing numbers, a BadSample in place of one that cannot be read."""
        begun = self._number - (self._next is not None)  # the next one's first header may have been read already
        fresh = numbers[0] <= begun or self._archive is None
        if fresh:
            self._start()
        samples = self._read_on(numbers)
        if self._broken not in ("", _WHOLE) and not fresh and not is_local(self.url):
            self._start()
            samples = self._read_on(numbers)
        return samples

    def _read_on(self, numbers: Sequence[int]) -> dict[int, Sample | BadSample]:
        files: dict[int, dict[str, bytes]] = {}
        keys: dict[int, str] = {}
        wrong: dict[int, str] = {}
        wanted = set(numbers)
        try:
            while not self._broken:
                member = self._next or self._advance()
                self._next = None
                name = self._begin(member)
                if name is None:
                    continue
                if self._number > numbers[-1]:
                    self._next = member
                    if self.samples is not None and self._number >= self.samples:
                        wrong[numbers[-1]] = f"the shard has more than the {self.samples} samples that its index says"
                    break
                if self._number in wanted:
                    keys[self._number] = self._key
                    endings = files.setdefault(self._number, {})
                    if name in endings:
                        wrong[self._number] = f"holds two files .{name}"
                    endings[name] = self._read(member)
        except _DAMAGED as error:
            self._broken = f"cannot be read on: {error or type(error).__name__}"
            wrong[self._number] = f"the shard {self._broken}"
        return {number: self._sample(number, keys.get(number), files.get(number), wrong.get(number)) for number in numbers}

    def ended(self, number: int) -> bool:
        """Return whether the shard was read to its end and has no sample `number`."""
        return self._broken == _WHOLE and number > self._number

    def stuck(self, number: int) -> bool:
        """Return whether the shard is damaged at or before sample `number`, so that neither it nor a later one can be read."""
        return self._broken not in ("", _WHOLE) and number >= self._number

    def close(self) -> None:
        """Close the shard."""
        if self._file is not None:
            _abandon(self._file)
        self._file = None
        self._forget()

    def _read(self, member: tarfile.TarInfo) -> bytes:
        with self._archive.extractfile(member) as file:
            return file.read()

    def _start(self) -> None:
        self.close()
        try:
            self._file = _open(self.url)
            mode: Any = "r:*" if is_local(self.url) else "r|*"
            # Without an index nothing else shows that samples are missing.
            kind = _StrictMember if self.samples is None else tarfile.TarInfo
            self._archive = tarfile.open(fileobj=self._file, mode=mode, tarinfo=kind)  # noqa: SIM115
        except _DAMAGED as error:
            status = getattr(getattr(self._file, "proc", None), "poll", lambda: None)()
            self._broken = f"cannot be opened: {error}" + (f" (exit status {status})" if status else "")

    def _advance(self) -> tarfile.TarInfo:
        """Return the next header; at the archive's end return a directory's, and note whether samples are missing."""
        member = self._archive.next()
        self._archive.members = []  # tarfile would keep them all
        if member is None:
            count = self._number + 1
            short = self.samples is not None and count < self.samples
            ends = f"ends after {count} of {self.samples} samples: truncated, or its index is of another file"
            self._broken = ends if short else _WHOLE
            member = tarfile.TarInfo()
            member.type = tarfile.DIRTYPE
        return member

    def _begin(self, member: tarfile.TarInfo) -> str | None:
        """Return the extension of a sample's file, None for other members; count a sample where a new one begins."""
        folder, slash, name = member.name.rpartition("/")
        stem, dot, ending = name.partition(".")
        if not member.isreg() or not stem or not dot or re.match(r"__[^/]*__($|/)", member.name):
            return None
        key = f"{folder}{slash}{stem}"
        if key != self._key:
            self._number, self._key = self._number + 1, key
        return ending.lower()

    def _sample(self, number: int, key: str | None, files: dict[str, bytes] | None, wrong: str | None) -> Sample | BadSample:
        if files is None or key is None:
            return BadSample(self.url, f"number {number}", wrong or f"the shard {self._broken}")
        try:
            return Sample(key, *_unpack(self.url, key, files)) if wrong is None else BadSample(self.url, key, wrong)
        except ValueError as error:
            return BadSample(self.url, key, str(error))


def _unpack(url: str, key: str, files: dict[str, bytes]) -> tuple[VideoBytes, str]:
    """Return a sample's video and caption; raises ValueError where one is missing."""
    media = [ending for ending in files if ending in MEDIA]
    if len(media) != 1:
        names = ", ".join(f".{ending}" for ending in files)
        raise ValueError(f"{len(media) or 'no'} videos or images among its files {names}; one is needed")
    return VideoBytes(f"{url}: {key}.{media[0]}", files[media[0]]), _caption(url, files)


def _caption(url: str, files: dict[str, bytes]) -> str:
    row = json.loads(files["json"]) if "json" in files else {}
    if isinstance(row, dict) and isinstance(row.get("caption"), str):
        return row["caption"]
    if "txt" in files:
        return decode_text(files["txt"], f"captions of {url}").strip()
    raise ValueError("no caption: neither the key caption of a .json nor a .txt")
