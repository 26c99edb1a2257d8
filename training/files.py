"""Files and folders that are replaced whole, and JSON lines that survive a kill or a full disk.

Whatever is replaced is written aside, under a hidden name, flushed to disk and renamed. So after a kill at any moment the old
content is there or the new one, and the next write of the same file or folder removes what the killed one left.
"""

import contextlib
import errno
import glob
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

if TYPE_CHECKING:
    from torch import Tensor  # reading videos imports this module, and needs no torch

TAIL = 2**16  # bytes at the end of a file of lines that are read to see whether its last line is whole
# Errors of a disk, its permissions or a path: `run_main` shows them as one line.
DISK_ERRORS = frozenset(
    getattr(errno, name)
    for name in (
        *("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EIO", "EACCES", "EPERM", "ESTALE"),
        *("ENOENT", "ENOTDIR", "EISDIR", "EEXIST", "ENAMETOOLONG"),
    )
    if hasattr(errno, name)
)


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Name `path` in errors of the operating system that name no file: writing to a full disk raises such ones."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    except SafetensorError as error:
        if not (number := re.search(r"os error (\d+)", str(error))):
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), os.fspath(path)) from error


@contextlib.contextmanager
def replaced_file(path: str | os.PathLike) -> Iterator[Path]:
    """Give a hidden path beside `path` to write to; it takes the place of `path` unless the block raises.

    A missing folder is made. Raises OSError naming a path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    with naming(path):
        remove_leftovers(path.parent, f".{glob.escape(path.name)}.*.part")
        try:
            yield aside
            _move_into_place(aside, path)
        finally:
            aside.unlink(missing_ok=True)


def remove_leftovers(folder: Path, pattern: str) -> list[int]:
    """Remove what killed processes left aside of the files that they wrote.

    Returns the numbers of other processes of this machine that are still writing; what these write stays.
    """
    writing = []
    for leftover in folder.glob(pattern):
        number = re.search(r"\.(\d+)\.part$", leftover.name)
        if number and int(number[1]) != os.getpid() and _lives(int(number[1])):
            writing.append(int(number[1]))
        else:
            leftover.unlink(missing_ok=True)
    return writing


def _lives(process: int) -> bool:
    """Tell whether a process of that number is there; False on Windows, where the question would end it."""
    if os.name == "nt":
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # another user's
    return True


@contextlib.contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Give an empty hidden folder beside `folder`; it takes the place of `folder` unless the block raises.

    After a kill, `finish_replacing` leaves the old folder or the new one. Raises OSError naming a path.
    """
    finish_replacing(folder)
    new, old = _asides(folder)
    with naming(folder):
        try:
            new.mkdir(parents=True)
            yield new
            flush_all(new)
            if folder.exists():
                os.replace(folder, old)
            os.replace(new, folder)
            flush(folder.parent)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            finish_replacing(folder)
            raise
    shutil.rmtree(old, ignore_errors=True)


def finish_replacing(folder: Path) -> None:
    """Finish a `replaced_folder` that was killed between its two renames, and remove what a killed one left."""
    new, old = _asides(folder)
    if old.exists() and not folder.exists():
        os.replace(new if new.exists() else old, folder)
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)


def _asides(folder: Path) -> tuple[Path, Path]:
    return folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")


def write_atomically(path: str | os.PathLike, content: str | bytes) -> None:
    """Replace a file by bytes, or text in UTF-8; raises OSError naming a path."""
    with replaced_file(path) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)


def save_tensors_atomically(path: str | os.PathLike, tensors: Mapping[str, "Tensor"]) -> None:
    """Replace a safetensors file; raises OSError naming a path."""
    from safetensors.torch import save_file

    with replaced_file(path) as aside:
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, aside)


def _move_into_place(aside: Path, path: Path) -> None:
    """Rename a finished file; after a power cut `path` has either its old content or all of the new."""
    flush(aside)
    os.replace(aside, path)
    flush(path.parent)


def flush_all(folder: Path) -> None:
    """Flush a folder and all that is in it to disk."""
    for file in [folder, *folder.rglob("*")]:
        flush(file)


def flush(path: Path) -> None:
    """Flush a file's content, or a folder's list of names, to disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def append_json(path: str | os.PathLike, *records: Mapping[str, Any]) -> None:
    """Append one JSON line per record; a partial last line of a failed write is dropped with a warning on stderr.

    Raises OSError naming a path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), open(path, "a+b") as file:
        _end_last_line(file, path)
        file.write("".join(json.dumps(record) + "\n" for record in records).encode())


def read_json_lines(path: str | os.PathLike) -> list[Any]:
    """Return the records of a JSON lines file; damaged lines are skipped with a warning on stderr."""
    records = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        try:
            records += [json.loads(line)] if line.strip() else []
        except ValueError:  # a partial line, or bytes that are not text
            print(f"{path}: line {number} is damaged and skipped", file=sys.stderr)
    return records


def _end_last_line(file: Any, path: Path) -> None:
    """Cut off a partial last line, or add the missing newline to a complete one."""
    size, last = file.seek(0, os.SEEK_END), b""
    for start in (max(0, size - TAIL), 0):  # the whole file only where its last line is longer
        file.seek(start)
        _, newline, last = file.read().rpartition(b"\n")
        if newline:
            break
    if not last:
        return
    try:
        json.loads(last)
        file.write(b"\n")
    except ValueError:
        print(f"{path}: its partial last line is dropped", file=sys.stderr)
        file.truncate(file.seek(0, os.SEEK_END) - len(last))
