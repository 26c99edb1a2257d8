"""High dynamic range to standard: PQ and HLG pictures as a display of 203 cd/m2 with BT.709 primaries shows them.

The display's white lies at HDR reference white (ITU-R BT.2408, 203 cd/m2); what is brighter is rolled off by the curve of
ITU-R BT.2390-10, section 5.4.1, from a peak of 1,000 cd/m2, on the luminance, so that hues stay.
"""

import functools

import numpy as np

PQ, HLG = 16, 18  # transfer characteristics of ITU-T H.273, table 3
PEAK, WHITE = 1000.0, 203.0  # cd/m2: brightest light of the source; white of the display
GAMMA = 2.4  # the display's gamma (ITU-R BT.1886)

_LUMINANCE = np.array([0.2627, 0.6780, 0.0593], np.float32)  # luminance of the BT.2020 primaries
_TO_BT709 = np.array(  # ITU-R BT.2087-0, section 2, inverted
    [[1.660491, -0.587641, -0.072850], [-0.124550, 1.132900, -0.008349], [-0.018151, -0.100579, 1.118730]], np.float32
)
_M1, _M2 = 2610 / 16384, 2523 / 4096 * 128
_C1, _C2, _C3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32


def pq_to_light(signal: np.ndarray) -> np.ndarray:
    """Return cd/m2 of PQ signals in [0, 1] (SMPTE ST 2084, equation 4.1)."""
    power = signal ** (1 / _M2)
    return 10_000 * (np.maximum(power - _C1, 0) / (_C2 - _C3 * power)) ** (1 / _M1)


def light_to_pq(light: np.ndarray) -> np.ndarray:
    """Return PQ signals of cd/m2 (SMPTE ST 2084, equation 5.2)."""
    power = (np.maximum(light, 0) / 10_000) ** _M1
    return ((_C1 + _C2 * power) / (1 + _C3 * power)) ** _M2


def hlg_to_scene(signal: np.ndarray) -> np.ndarray:
    """Return scene light in [0, 1] of HLG signals in [0, 1] (ITU-R BT.2100-2, table 5)."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)


def roll_off(light: np.ndarray) -> np.ndarray:
    """Return what the display shows of luminances of the source, both in cd/m2 (BT.2390-10, section 5.4.1)."""
    peak = light_to_pq(np.array(PEAK))
    level, most = light_to_pq(np.minimum(light, PEAK)) / peak, light_to_pq(np.array(WHITE)) / peak
    knee = 1.5 * most - 0.5
    t = np.maximum(level - knee, 0) / (1 - knee)
    spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (-2 * t**3 + 3 * t**2) * most
    return pq_to_light(np.where(level < knee, level, spline) * peak)


def to_sdr(pixels: np.ndarray, transfer: int) -> np.ndarray:
    """Return uint8 RGB (H, W, 3) of uint16 RGB with BT.2020 primaries and the transfer characteristic PQ or HLG."""
    light = _light_table(transfer)[pixels]
    luminance = light @ _LUMINANCE
    if transfer == HLG:
        # The display's system gamma at 1,000 cd/m2 is 1.2, on luminance (BT.2100-2, table 5).
        light *= PEAK * np.maximum(luminance, 1e-6)[..., None] ** np.float32(0.2)
        luminance = light @ _LUMINANCE
    grid, shown = _roll_off_table()
    light *= (np.interp(luminance, grid, shown) / np.maximum(luminance, 1e-4))[..., None].astype(np.float32)
    display = np.clip(light @ _TO_BT709.T / np.float32(WHITE), 0, 1) ** np.float32(1 / GAMMA)
    return (display * 255).round().astype(np.uint8)


@functools.cache
def _light_table(transfer: int) -> np.ndarray:
    signal = np.arange(65536) / 65535
    return (pq_to_light(signal) if transfer == PQ else hlg_to_scene(signal)).astype(np.float32)


@functools.cache
def _roll_off_table() -> tuple[np.ndarray, np.ndarray]:
    grid = pq_to_light(np.linspace(0, 1, 4096))
    return grid, roll_off(grid)
