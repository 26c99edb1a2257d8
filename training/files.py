"""Atomic writes of files, and JSON lines that survive a kill or a full disk."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor  # reading videos imports this module, and needs no torch


def write_atomically(path: str | os.PathLike, text: str) -> None:
    """Write a text file under a temporary name, flush it to disk and rename it into place."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    move_into_place(aside, path)


def save_tensors_atomically(path: str | os.PathLike, tensors: Mapping[str, "Tensor"]) -> None:
    """Write a safetensors file under a temporary name, flush it to disk and rename it into place."""
    from safetensors.torch import save_file

    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({k: v.detach().contiguous() for k, v in tensors.items()}, aside)
    move_into_place(aside, path)


def move_into_place(aside: Path, path: Path) -> None:
    """Rename a finished file or folder; after a power cut `path` has either its old content or all of the new."""
    for file in [aside, *aside.rglob("*")]:
        flush(file)
    os.replace(aside, path)
    flush(path.parent)


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
    """Append one JSON line per record; a partial last line of a failed write is dropped with a warning on stderr."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
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
    file.seek(0)
    last = file.read().rpartition(b"\n")[2]
    if not last:
        return
    try:
        json.loads(last)
        file.write(b"\n")
    except ValueError:
        print(f"{path}: its partial last line is dropped", file=sys.stderr)
        file.truncate(file.seek(0, os.SEEK_END) - len(last))
