"""Which frame is shown when: times are seconds after a video's first frame."""

from collections.abc import Sequence

import numpy as np

# Times closer than this part of a frame interval to the middle of two frames count as the middle, where the earlier
# frame is taken. Above the rounding of decord's float32 times (0.25 ms after one hour), far below a frame.
TIE = 0.01

MAX_RATE = 60.0  # frames a second at which videos without a constant rate are shown, at most


def pick_by_time(timestamps: np.ndarray, times: np.ndarray | Sequence[float]) -> np.ndarray:
    """Return, for each of `times`, the index of the frame nearest in time; in the middle of two the earlier one.

    `timestamps` (seconds) increase. Raises ValueError if a time lies outside the video by more than half a frame.
    """
    stamps, times = np.asarray(timestamps, np.float64), np.asarray(times, np.float64)
    gaps = np.diff(stamps) if len(stamps) > 1 else np.array([0.0])
    first, end = stamps[0] - (0.5 + TIE) * gaps[0], stamps[-1] + (0.5 + TIE) * gaps[-1]
    outside = times[(times < first) | (times > end)]
    if outside.size:
        raise ValueError(
            f"time {outside[0]:.4f} s: the video has frames from {stamps[0]:.4f} to {stamps[-1]:.4f} s; "
            "ask for times at most half a frame outside"
        )
    if len(stamps) == 1:
        return np.zeros(times.shape, np.int64)
    after = np.clip(np.searchsorted(stamps, times), 1, len(stamps) - 1)
    past = times - stamps[after - 1]
    return np.where(past <= (0.5 + TIE) * gaps[after - 1], after - 1, after)


def at_constant_rate(timestamps: np.ndarray, fps: float, max_rate: float = MAX_RATE) -> tuple[float, np.ndarray]:
    """Return a constant rate that shows every frame for its time, and the number of the frame shown at each tick.

    `timestamps` (seconds) increase and have the average rate `fps`. Where each frame lies within half an interval of its place
    at that rate, the rate is kept and each frame shown once. Else the rate is that of the shortest interval, at most
    `max_rate`, and a frame is held until the next one.
    """
    count = len(timestamps)
    if count < 2 or np.abs(timestamps * fps - np.arange(count)).max() < 0.5:
        return fps, np.arange(count)
    rate = min(max_rate, 1 / float(np.diff(timestamps).min()))
    ticks = np.arange(round(timestamps[-1] * rate) + 1) / rate
    return rate, np.searchsorted(timestamps, ticks + TIE / rate, side="right") - 1
