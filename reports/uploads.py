"""What is refused of files that strangers hand in, in the order of what a check costs: kind, bytes, length, damage, size."""

from dataclasses import dataclass
from pathlib import Path

from promag.data.video import UnreadableVideo, VideoFacts, decode_strictly, frame_times
from promag.training.config import UserError

MEGABYTE = 2**20  # bytes, as the page's framework counts
KINDS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi")


@dataclass(frozen=True)
class UploadLimits:
    """What a video may have at most."""

    megabytes: float = 32.0  # of MEGABYTE
    seconds: float = 10.0
    frames: int = 321
    side: int = 2048  # pixels

    def __str__(self) -> str:
        kinds = ", ".join(kind[1:] for kind in KINDS)
        return f"{kinds}; at most {self.megabytes:g} MB, {self.seconds:g} s, {self.frames} frames, {self.side} pixels a side"


def check_upload(path: str | Path, limits: UploadLimits) -> VideoFacts:
    """Return the facts of a video within the limits; raises UserError that says what is legal."""
    path = Path(path)
    name, megabytes = path.name, path.stat().st_size / MEGABYTE
    if path.suffix.lower() not in KINDS:
        raise UserError(f"{name}: not a kind of video that is taken; {limits}")
    if megabytes > limits.megabytes:
        raise UserError(f"{name}: {megabytes:.1f} MB; at most {limits.megabytes:g} MB are taken")
    try:
        times = frame_times(path)
        seconds = float(times[-1])
        if seconds > limits.seconds or len(times) > limits.frames:
            found = f"{seconds:.1f} s and {len(times)} frames"
            raise UserError(f"{name}: {found}; at most {limits.seconds:g} s and {limits.frames} frames are taken")
        facts = decode_strictly(path)
    except UnreadableVideo as error:
        raise UserError(f"{name}: cannot be read as a video: {error.reason.replace(str(path), name)}") from None
    if max(facts.width, facts.height) > limits.side:
        raise UserError(f"{name}: {facts.width}x{facts.height} pixels; at most {limits.side} a side are taken")
    return facts
