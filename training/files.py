"""Files that other processes see whole or not at all, and JSON lines that survive a kill or a full disk."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor


def write_atomically(path: str | os.PathLike, text: str) -> None:
    """Write a text file aside, flush it to disk and rename it into place."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    move_into_place(aside, path)


def save_tensors_atomically(path: str | os.PathLike, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file aside, flush it to disk and rename it into place."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({k: v.detach().contiguous() for k, v in tensors.items()}, aside)
    move_into_place(aside, path)


def move_into_place(aside: Path, path: Path) -> None:
    """Rename a finished file or folder; after a power cut `path` holds what it held before or all of the new content."""
    for file in [aside, *aside.rglob("*")]:
        flush(file)
    os.replace(aside, path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Wait until the disk holds a file's content, or a folder's list of names."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def append_json(path: str | os.PathLike, *records: Mapping[str, Any]) -> None:
    """Append a JSON line for each record; half a line at the end, of a write that failed, is dropped and named on stderr."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        _end_last_line(file, path)
        file.write("".join(json.dumps(record) + "\n" for record in records).encode())


def read_json_lines(path: str | os.PathLike) -> list[Any]:
    """Return the records of a file of JSON lines; a line that is none is left out and named on stderr."""
    records = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        try:
            records += [json.loads(line)] if line.strip() else []
        except ValueError:  # half a line, or bytes that are no text
            print(f"{path}: line {number} is damaged, left out", file=sys.stderr)
    return records


def _end_last_line(file: Any, path: Path) -> None:
    """Bring a file to the end of a line: cut off half a line, end a whole one that lacks its end."""
    file.seek(0)
    last = file.read().rpartition(b"\n")[2]
    if not last:
        return
    try:
        json.loads(last)
        file.write(b"\n")
    except ValueError:
        print(f"{path}: half a line at its end is dropped", file=sys.stderr)
        file.truncate(file.seek(0, os.SEEK_END) - len(last))
