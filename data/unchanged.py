"""Whether the video of a clip is still the file that was prepared.

An index holds the hash of every video, with the size and time that the file had when it was hashed. A file of that size and
time is taken for unchanged, which costs one `stat` a read. One of another time, as after copying, is hashed once by each
process that reads it. One of another size, or hash, has changed.
"""

import functools
import hashlib
import os

from .clip_index import Clip
from .video import UnreadableVideo

HASHED = 65536  # files of another time than the index's whose hashes a process keeps


def stamp(path: str | os.PathLike) -> tuple[int, int]:
    """Return the size of a file in bytes and the time of its last change in nanoseconds."""
    state = os.stat(path)
    return state.st_size, state.st_mtime_ns


def digest_file(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_unchanged(clip: Clip) -> None:
    """Raise UnreadableVideo where a clip's video is not there, or not the file that was prepared."""
    try:
        size, modified = stamp(clip.path)
        if (size, modified) == (clip.bytes, clip.modified):
            return
        changed = size != (clip.bytes or size) or _digest(clip.path, size, modified) != clip.sha256
    except OSError as error:
        raise UnreadableVideo(clip.path, error.strerror or str(error)) from error
    if changed:
        raise UnreadableVideo(clip.path, "is not the file that was prepared; prepare the clips again")


@functools.lru_cache(maxsize=HASHED)
def _digest(path: str, size: int, modified: int) -> str:
    """Return the hash of a file, which is read again when its size or time changes."""
    return digest_file(path)
