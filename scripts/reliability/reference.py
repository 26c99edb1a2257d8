"""What ffmpeg shows of a file: pixels and times to compare a reader with. Pixels are uint8 RGB (T, H, W, 3).

High dynamic range is shown by its standards in float64, written anew here, since ffmpeg's own tone mapping follows none.
"""

import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .corpus import Case

SHOWN = re.compile(rb"\[showinfo@(before|after) @ .*? pts:\s*(\S+)\s+pts_time:(\S+) .*? sar:(\d+)/(\d+) s:(\d+)x(\d+)")
SECONDS = 60  # an ffmpeg that takes longer counts as showing nothing
PEAK, WHITE, GAMMA = 1000.0, 203.0, 2.4  # cd/m2 of the source and of the display's white (BT.2408), its gamma (BT.1886)


@dataclass(frozen=True, eq=False)
class Shown:
    """What is shown of a file.

    Args:
        frames: (T, H, W, 3), or None where sizes differ.
        times: (T,) seconds after the first frame.
        aspect: width by height of the picture as shown.
    """

    frames: np.ndarray | None
    times: np.ndarray
    aspect: float


def shown_by_ffmpeg(ffmpeg: str, path: Path, case: Case, size: tuple[int, int], memory: int = 0) -> Shown | None:
    """Return what ffmpeg shows of a file, scaled to `size` (height, width); None where it shows nothing.

    With `memory`, a byte above 0, glibc fills new memory with it: where the result changes, ffmpeg shows memory, not the file.
    """
    height, width = size
    pixel_format = "gbrp16le" if case.transfer else "rgba" if case.alpha else "rgb24"
    chain = ["bwdif=mode=send_frame:deint=interlaced"] if case.deinterlace else []
    matrix = f":in_color_matrix={case.matrix}" if case.matrix else ""
    chain += ["showinfo@before", f"scale={width}:{height}{matrix}", f"format={pixel_format}", "showinfo@after"]
    command = [ffmpeg, "-nostdin", "-hide_banner", "-nostats", "-y", "-threads", "1"]
    command += ["-c:v", case.decoder] if case.decoder else []
    command += ["-i", f"file:{path}", "-an", "-sn", "-dn"]
    command += ["-map", f"0:v:{case.stream}"] if case.stream is not None else []
    command += ["-fps_mode", "passthrough", "-vf", ",".join(chain), "-f", "rawvideo", "-pix_fmt", pixel_format, "-"]
    try:
        environment = {**os.environ, "MALLOC_PERTURB_": str(memory)}
        done = subprocess.run(command, capture_output=True, timeout=SECONDS, env=environment)
    except subprocess.TimeoutExpired:
        return None
    rows = [match.groups() for match in SHOWN.finditer(done.stderr)]
    before, after = ([row for row in rows if row[0] == name] for name in (b"before", b"after"))
    if not after or not before:
        return None
    times = np.array([np.nan if row[1] == b"NOPTS" else float(row[2]) for row in after])
    aspects = {_aspect(row) for row in before}
    pixels = _pixels(done.stdout, pixel_format, len(after), height, width)
    if pixels is not None and case.transfer:
        pixels = np.stack([to_sdr(frame, case.transfer) for frame in pixels])
    return Shown(pixels if len(aspects) == 1 else None, times - times[0], min(aspects))


def _aspect(row: Sequence[bytes]) -> float:
    numerator, denominator, width, height = (int(value) for value in row[3:7])
    return width / height * (numerator / denominator if numerator and denominator else 1)


def _pixels(raw: bytes, pixel_format: str, count: int, height: int, width: int) -> np.ndarray | None:
    if pixel_format == "gbrp16le":
        planes = np.frombuffer(raw, "<u2")
        return (
            planes.reshape(count, 3, height, width)[:, [2, 0, 1]].transpose(0, 2, 3, 1)
            if planes.size == count * 3 * height * width
            else None
        )
    channels = 4 if pixel_format == "rgba" else 3
    if len(raw) != count * height * width * channels:
        return None
    pixels = np.frombuffer(raw, np.uint8).reshape(count, height, width, channels)
    if channels == 3:
        return pixels
    alpha = pixels[..., 3:] / 255
    return (pixels[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)


# -- high dynamic range ----------------------------------------------------------------------------------------------


def to_sdr(signal: np.ndarray, transfer: str) -> np.ndarray:
    """Return uint8 RGB of uint16 R'G'B' with BT.2020 primaries, as a display of 203 cd/m2 with BT.709 primaries shows it."""
    light = pq_light(signal / 65535) if transfer == "pq" else hlg_light(signal / 65535)
    y = light @ _luminance()
    light = light * (tone(y) / np.maximum(y, 1e-9))[..., None]
    linear = np.clip(light @ _between_primaries().T / WHITE, 0, 1)
    return (255 * linear ** (1 / GAMMA)).round().astype(np.uint8)


def pq_light(signal: np.ndarray) -> np.ndarray:
    """Return cd/m2 of a PQ signal (ITU-R BT.2100, table 4)."""
    m1, m2, c1, c2, c3 = 0.1593017578125, 78.84375, 0.8359375, 18.8515625, 18.6875
    root = np.asarray(signal, np.float64) ** (1 / m2)
    return 10_000 * (np.maximum(root - c1, 0) / (c2 - c3 * root)) ** (1 / m1)


def pq_signal(light: np.ndarray) -> np.ndarray:
    """Return the PQ signal of cd/m2, the inverse."""
    m1, m2, c1, c2, c3 = 0.1593017578125, 78.84375, 0.8359375, 18.8515625, 18.6875
    y = (np.asarray(light, np.float64) / 10_000) ** m1
    return ((c1 + c2 * y) / (1 + c3 * y)) ** m2


def hlg_light(signal: np.ndarray) -> np.ndarray:
    """Return cd/m2 of an HLG signal on a display of 1,000 cd/m2, whose system gamma is 1.2 (ITU-R BT.2100, table 5)."""
    a = 0.17883277
    b, c = 1 - 4 * a, 0.5 - a * np.log(4 * a)
    scene = np.where(signal <= 0.5, np.square(signal) / 3, (np.exp((signal - c) / a) + b) / 12)
    y = scene @ _luminance()
    return PEAK * np.maximum(y, 1e-12)[..., None] ** 0.2 * scene


def tone(light: np.ndarray) -> np.ndarray:
    """Return cd/m2 on the display of luminances from 0 to 1,000 cd/m2 (ITU-R BT.2390, 5.4.1: Hermite spline above a knee)."""
    top = pq_signal(np.array(PEAK))
    e = np.minimum(pq_signal(light) / top, 1)
    most = pq_signal(np.array(WHITE)) / top
    knee = 1.5 * most - 0.5
    t = (e - knee) / (1 - knee)
    spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (-2 * t**3 + 3 * t**2) * most
    return pq_light(np.where(e < knee, e, spline) * top)


BT709 = ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060))  # x, y of red, green and blue; white D65
BT2020 = ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046))


def _to_xyz(primaries: Sequence[tuple[float, float]]) -> np.ndarray:
    columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in primaries]).T
    white = np.array([0.3127 / 0.3290, 1, (1 - 0.3127 - 0.3290) / 0.3290])
    return columns * np.linalg.solve(columns, white)


def _luminance() -> np.ndarray:
    return _to_xyz(BT2020)[1]


def _between_primaries() -> np.ndarray:
    return np.linalg.solve(_to_xyz(BT709), _to_xyz(BT2020))
