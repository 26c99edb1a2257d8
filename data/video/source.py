"""A video's file or bytes, and the error that names it."""

import concurrent.futures
import contextlib
import io
import math
import os
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, TypeVar

from promag.training.config import UserError

# decord has been seen to hang in get_batch for ever (dmlc/decord#269), and so may a network disk. A read takes
# milliseconds to a few seconds; after a minute it will not end.
READ_TIMEOUT = 60.0  # seconds
SLOW_DISK = 10e6  # bytes a second
WAIT = 0.5  # seconds: longest single wait for a decoder

# Makes an odd but whole video readable; shown beside a list of refused videos.
REENCODE = (
    "ffmpeg -i IN -map 0:v:0 -vf 'scale=iw*sar:ih,setsar=1,scale=trunc(iw/2)*2:trunc(ih/2)*2,format=yuv420p' "
    "-c:v libx264 -crf 16 OUT.mp4"
)

Result = TypeVar("Result")


class UnreadableVideo(UserError):  # noqa: N818
    """A video that cannot be decoded faithfully; `path` and `reason` say which and why."""

    # The reason may be absent: a DataLoader rebuilds a worker's exception from its message alone.
    def __init__(self, path: str | os.PathLike, reason: str = ""):
        self.path, self.reason = os.fspath(path), reason
        super().__init__(self.path, reason)

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}" if self.reason else self.path


@dataclass(frozen=True, eq=False)
class VideoBytes:
    """A video or image file held in memory; it is read like a file, and errors call it by its name."""

    name: str  # its ending tells an image from a video
    data: bytes

    def __fspath__(self) -> str:
        return self.name

    def __str__(self) -> str:
        return self.name


VideoSource = str | os.PathLike | VideoBytes


@contextlib.contextmanager
def openable(source: VideoSource) -> Iterator[str | BinaryIO]:
    """Give what a decoder opens: a name that it cannot take for a protocol (`12:30.mp4`), or an open file.

    Names that are no UTF-8 are opened here. Raises UnreadableVideo for what is no file.
    """
    if isinstance(source, VideoBytes):
        yield io.BytesIO(source.data)
        return
    path = os.path.abspath(source)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UnreadableVideo(source, "is a folder, a pipe or a device, not a file")
        path.encode()
    except UnicodeEncodeError:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise UnreadableVideo(source, error.strerror or str(error)) from None
    else:
        yield f"file:{path}"


def seconds_to_read(source: VideoSource) -> float:
    """Return how long reading all of a file may take; 0 where there is none."""
    try:
        return (len(source.data) if isinstance(source, VideoBytes) else os.stat(source).st_size) / SLOW_DISK
    except OSError:
        return 0.0


def within(timeout: float, source: VideoSource, action: Callable[[], Result], reason: str | None = None) -> Result:
    """Return `action()`, or raise UnreadableVideo after `timeout` seconds; the thread that hangs is left behind.

    `reason` is the error's; left out, it names the time.
    """
    future: concurrent.futures.Future[Result] = concurrent.futures.Future()

    def work() -> None:
        try:
            future.set_result(action())
        except Exception as error:
            future.set_exception(error)

    # A daemon: a decoder that never returns must not keep the process from ending.
    threading.Thread(target=work, daemon=True).start()
    # Counted in short waits: the time that this process is stopped or asleep is not the decoder's.
    slices = max(1, math.ceil(timeout / WAIT))
    if not any(concurrent.futures.wait([future], timeout / slices).done for _ in range(slices)):
        raise UnreadableVideo(source, reason or f"no answer within {timeout:g} s: the decoder hangs or the disk is too slow")
    return future.result()
