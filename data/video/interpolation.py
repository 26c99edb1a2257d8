"""Frames between frames, estimated by motion compensation: minterpolate of FFmpeg's libavfilter.

Its settings: blocks that follow the motion estimated from both sides (mi_mode=mci, me_mode=bidir), overlapped and of variable
size (mc_mode=aobmc, vsbmc=1), without a guess of scene changes (scd=none), at which it would repeat frames.
"""

from fractions import Fraction

import av
import numpy as np
from av.filter import Graph

SETTINGS = "mi_mode=mci:mc_mode=aobmc:me_mode=bidir:vsbmc=1:scd=none"
AHEAD = 3  # frames after the last one, without which the filter keeps the last intervals back
SMALLEST = 32  # pixels of a side: the filter compares blocks of 16 and their surroundings


def interpolate_motion(frames: np.ndarray, factor: int) -> np.ndarray:
    """Return a video with `factor` - 1 estimated frames between each two given ones, which stay as they are.

    Args:
        frames: uint8 RGB, (T, H, W, 3).
        factor: 1 or more; the result has 1 + factor*(T - 1) frames.

    Raises ValueError for sides below 32 pixels and for a factor below 1.
    """
    count, height, width, _ = frames.shape
    if factor < 1 or min(height, width) < SMALLEST:
        raise ValueError(
            f"interpolate_motion of {height}x{width} by {factor}: needs sides of {SMALLEST} or more and a factor from 1 up"
        )
    if factor == 1 or count == 1:
        return frames.copy()
    graph, base = Graph(), Fraction(1, factor)
    source = graph.add_buffer(width=width, height=height, format=av.VideoFormat("yuv444p"), time_base=base)
    filtered, sink = graph.add("minterpolate", f"fps={factor}:{SETTINGS}"), graph.add("buffersink")
    source.link_to(filtered)
    filtered.link_to(sink)
    graph.configure()
    result = np.empty((1 + factor * (count - 1), height, width, 3), np.uint8)
    estimated = 0
    for i in range(count + AHEAD):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frames[min(i, count - 1)]), format="rgb24")
        frame = frame.reformat(format="yuv444p")
        frame.pts, frame.time_base = i * factor, base
        graph.push(frame)
        estimated += _collect(graph, result, factor)
    graph.push(None)
    estimated += _collect(graph, result, factor)
    if estimated != len(result):
        raise RuntimeError(f"interpolate_motion: the filter gave {estimated} of {len(result)} frames")
    result[::factor] = frames
    return result


def _collect(graph: Graph, result: np.ndarray, factor: int) -> int:
    """Put the frames that the filter has ready at their places, and return how many were put."""
    count = 0
    while True:
        try:
            frame = graph.pull()
        except (BlockingIOError, EOFError):  # PyAV's own are kinds of these
            return count
        assert isinstance(frame, av.VideoFrame)
        place = round((frame.time or 0.0) * factor)
        if place < len(result):
            result[place] = frame.to_ndarray(format="rgb24")
            count += 1
