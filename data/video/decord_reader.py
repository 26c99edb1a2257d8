"""Reading with decord, which returns wrong pixels from damaged files without a word: only for files shown to be read right."""

import contextlib
import io
import os
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from .reader import check_indices
from .source import UnreadableVideo, VideoBytes, VideoSource


def read_with_decord(source: VideoSource, indices: list[int]) -> np.ndarray:
    """Read frames as `read_frames` does, through decord and without a time limit."""
    with _opened(source) as reader:
        check_indices(source, indices, len(reader))
        return reader.get_batch(indices).asnumpy()


def agrees(source: VideoSource, timestamps: np.ndarray, samples: dict[int, np.ndarray]) -> bool:
    """Return whether decord sees the frames at these times (seconds), and exactly these pixels in the sampled ones."""
    try:
        with _opened(source) as reader:
            if len(reader) != len(timestamps):
                return False
            times = reader.get_frame_timestamp(range(len(reader)))[:, 0].astype(np.float64)
            if not np.allclose(times - times[0], timestamps, rtol=1e-6, atol=1e-3):
                return False
            read = reader.get_batch(list(samples)).asnumpy()
    except UnreadableVideo:
        return False
    return all(np.array_equal(one, other) for one, other in zip(samples.values(), read, strict=True))


@contextlib.contextmanager
def _opened(source: VideoSource) -> Iterator[Any]:
    import decord
    from decord._ffi.base import DECORDError, DECORDLimitReachedError

    decord.logging.set_level(decord.logging.QUIET)
    if not isinstance(source, VideoBytes) and not os.path.exists(source):
        raise UnreadableVideo(source, "no such file")
    try:
        # One thread, opened where it is used: a reader with threads of its own dies with a fork. A fault tolerance
        # above zero makes decord raise where it would hand out the neighbour of a frame it failed to decode.
        place = io.BytesIO(source.data) if isinstance(source, VideoBytes) else os.path.abspath(source)
        yield decord.VideoReader(place, ctx=decord.cpu(0), num_threads=1, fault_tol=1e-6)  # pyright: ignore
    except (DECORDError, DECORDLimitReachedError, RuntimeError, UnicodeError) as error:
        # Time, source line and the path stand in front of decord's own words.
        text = re.sub(r"^(\[[^]]*\] \S+: )+", "", str(error).strip().splitlines()[0]).replace(f"[{source}]", "").strip()
        raise UnreadableVideo(source, f"decord: {text}") from error
