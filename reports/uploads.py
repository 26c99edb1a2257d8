"""Limits of uploaded files, checked in the order of their cost: bytes, picture size and length, damage."""

from dataclasses import dataclass
from pathlib import Path

from promag.data.listing import VIDEO_EXTENSIONS
from promag.data.video import READER, IsolatedReader, UnreadableVideo, VideoFacts, decode_strictly, read_header
from promag.training.config import UserError

MEGABYTE = 2**20  # bytes, as Gradio counts
KINDS = VIDEO_EXTENSIONS  # that the page offers; what a file is, its contents decide
BORDER = 128  # pixels a side that decoders add to a picture


@dataclass(frozen=True)
class UploadLimits:
    """The largest video that is accepted."""

    megabytes: float = 32.0  # in units of MEGABYTE
    seconds: float = 10.0
    frames: int = 321
    side: int = 2048  # pixels

    def __str__(self) -> str:
        return f"at most {self.megabytes:g} MB, {self.seconds:g} s, {self.frames} frames, {self.side} pixels a side"


def check_upload(path: str | Path, limits: UploadLimits, reader: IsolatedReader = READER) -> VideoFacts:
    """Return the facts of a video within the limits, or raise UserError that names them.

    The file is read in a child process of `reader`. No frame is decoded before the file's headers are within the limits, and
    none beyond them afterwards: a small file that states, or hides, a huge picture costs no memory.
    """
    path = Path(path)
    try:
        name, megabytes = path.name, path.stat().st_size / MEGABYTE
    except OSError as error:
        raise UserError(f"{path.name}: {error.strerror}") from None
    if megabytes > limits.megabytes:
        raise UserError(f"{name}: {megabytes:.1f} MB; at most {limits.megabytes:g} MB are accepted")
    try:
        return reader.call(_examine, path, limits)
    except UnreadableVideo as error:
        raise UserError(f"{name}: {unreadable(error)}; {limits}") from None


def unreadable(error: UnreadableVideo) -> str:
    """Return why a video cannot be read, without the folder that it lies in."""
    return f"cannot be read as a video: {error.reason.replace(error.path, Path(error.path).name)}"


def _examine(path: Path, limits: UploadLimits) -> VideoFacts:
    """Measure the headers, then every frame, against the limits; runs in the child."""
    max_pixels = (limits.side + BORDER) ** 2
    header = read_header(path, max_pixels)
    _check(path.name, header.width, header.height, header.seconds, header.frames, limits)
    facts = decode_strictly(path, max_pixels)
    _check(path.name, facts.width, facts.height, float(facts.timestamps[-1]), facts.frames, limits)
    return facts


def _check(name: str, width: int, height: int, seconds: float, frames: int, limits: UploadLimits) -> None:
    if max(width, height) > limits.side:
        raise UserError(f"{name}: {width}x{height} pixels; at most {limits.side} a side are accepted")
    if seconds > limits.seconds or frames > limits.frames:
        length = f"{seconds:.1f} s and {frames} frames"
        raise UserError(f"{name}: {length}; at most {limits.seconds:g} s and {limits.frames} frames are accepted")
