"""From a decoded frame to the picture that a player shows: matrix, range, high dynamic range, alpha, pixel shape, turns.

Pictures are uint8 RGB (H, W, 3).
"""

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from .source import UnreadableVideo, VideoSource
from .tone_mapping import HLG, PQ, to_sdr

MAX_STRETCH = 8  # pixels wider or higher than this many times their other side are a lie of the header

# Numbers of ITU-T H.273, tables 3 and 4.
_RGB, _BT709, _UNSPECIFIED, _BT601, _BT2020 = 0, 1, 2, 6, 9
_MATRICES = {_BT709, 4, 5, _BT601, 7, _BT2020}  # FCC and BT.470BG, SMPTE 240M among them: those that PyAV converts
_LIMITED, _FULL = 1, 2


@dataclass
class Display:
    """Shows the frames of one stream; `notes` collects in words what was done beyond the usual.

    Args:
        source: the file, for errors.
        pixel_aspect: width of a pixel by its height, or None.
    """

    source: VideoSource
    pixel_aspect: Fraction | None
    notes: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Raise UnreadableVideo for a pixel shape that no camera makes."""
        aspect = self.pixel_aspect or Fraction(1)
        self._aspect = aspect if aspect > 0 else Fraction(1)
        if not 1 / MAX_STRETCH <= self._aspect <= MAX_STRETCH:
            raise UnreadableVideo(self.source, f"its header states pixels of {aspect.numerator}:{aspect.denominator}")

    def size(self, frame: Any) -> tuple[int, int]:
        """Return (height, width) of the picture of a frame."""
        width = max(1, round(frame.width * self._aspect))
        return (width, frame.height) if self._turn(frame)[0] else (frame.height, width)

    def turned(self, frame: Any) -> str:
        """Return in words how the picture of a frame is turned."""
        turns = zip(("transposed", "rows reversed", "columns reversed"), self._turn(frame), strict=True)
        return ", ".join(name for name, done in turns if done) or "upright"

    def picture(self, frame: Any, side: int | None = None) -> np.ndarray:
        """Return what is shown of a frame; with `side`, scaled down until its shorter side has that many pixels.

        Raises UnreadableVideo for what cannot be shown faithfully.
        """
        width = max(1, round(frame.width * self._aspect))
        if width != frame.width:
            self.notes.add("scaled to square pixels")
        transposed, flip_rows, flip_columns = self._turn(frame)
        scale = min(1.0, (side or math.inf) / min(width, frame.height))
        pixels = self._rgb(frame, max(1, round(width * scale)), max(1, round(frame.height * scale)))
        if transposed:
            pixels = pixels.transpose(1, 0, 2)
        return pixels[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]

    def _rgb(self, frame: Any, width: int, height: int) -> np.ndarray:
        # One thread: a scaler with threads of its own hangs in a process that was forked after it was made.
        options = {"width": width, "height": height, "threads": 1}
        options |= {"src_colorspace": self._matrix(frame), "src_color_range": _range(frame)}
        options |= {"interpolation": "AREA" if height < frame.height else "BICUBIC"}
        if frame.color_trc in (PQ, HLG):
            self.notes.add(f"{'PQ' if frame.color_trc == PQ else 'HLG'} tone-mapped to SDR")
            return to_sdr(frame.reformat(format="rgb48le", **options).to_ndarray(), frame.color_trc)
        if not any(part.is_alpha for part in frame.format.components) and not frame.format.has_palette:
            return frame.reformat(format="rgb24", **options).to_ndarray()
        pixels = frame.reformat(format="rgba", **options).to_ndarray()
        alpha = pixels[..., 3:].astype(np.uint16)
        if alpha.min(initial=255) == 255:
            return pixels[..., :3]
        self.notes.add("transparent over white")
        return ((pixels[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)

    def _matrix(self, frame: Any) -> int | None:
        """Return the matrix to convert with, by its number; that of untagged frames follows from their size, as in players."""
        if frame.format.is_rgb or frame.format.has_palette or frame.colorspace == _RGB:
            return None
        if frame.color_trc in (PQ, HLG) and frame.colorspace == _UNSPECIFIED:
            return _BT2020
        if frame.colorspace == _UNSPECIFIED:
            return _BT709 if frame.width >= 1280 or frame.height > 576 else _BT601
        if frame.colorspace not in _MATRICES:
            raise UnreadableVideo(self.source, f"its colours have matrix {int(frame.colorspace)} of H.273; re-encode it")
        return int(frame.colorspace)

    def _turn(self, frame: Any) -> tuple[bool, bool, bool]:
        """Return whether rows become columns, then rows are reversed, then columns, by the frame's display matrix."""
        from av.sidedata.sidedata import SideDataContainer

        # Not `frame.side_data`: it and the frame refer to each other, and frames stay in memory until garbage is collected.
        data = SideDataContainer(frame).get("DISPLAYMATRIX")  # pyright: ignore[reportCallIssue]
        if data is None:
            return False, False, False
        matrix = np.frombuffer(bytes(data), np.int32, 9).reshape(3, 3)[:2, :2].astype(float)
        matrix /= max(1.0, np.abs(matrix).max())
        turn = matrix.round()
        if np.abs(matrix - turn).max() > 0.01 or abs(np.linalg.det(turn)) != 1:
            angle = np.degrees(np.arctan2(matrix[0, 1], matrix[0, 0]))
            raise UnreadableVideo(self.source, f"turned by {abs(angle):.0f} degrees, not a multiple of 90; re-encode it")
        (a, b), (c, d) = turn  # x' = a x + c y, y' = b x + d y, with y downwards
        return (True, b < 0, c < 0) if a == 0 else (False, d < 0, a < 0)


def _range(frame: Any) -> int:
    if frame.color_range in (_LIMITED, _FULL):
        return int(frame.color_range)
    full = frame.format.is_rgb or frame.format.has_palette or frame.format.name.startswith("yuvj")
    return _FULL if full or frame.colorspace == _RGB or frame.format.name.startswith(("gray", "ya")) else _LIMITED
