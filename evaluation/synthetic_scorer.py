"""Reads shape, colour and motion of a generated clip from its pixels alone.

Saturated pixels are objects. Hue gives an object's colour, angular moments of its silhouette the shape, and the tracks of its
position, area and angle the motion. Nothing is fitted to data: the shapes' own formulas give the prototypes.
"""

import functools
from dataclasses import dataclass
from math import log, sqrt

import numpy as np

from promag.data.synthetic import COLOURS, SHAPES, Scene, distance, legal_scenes

SATURATED = 0.38  # chroma over the brightest channel; backgrounds lie below 0.15, painted objects above 0.7
SMALLEST, LARGEST = 0.012, 0.35  # area of an object in squares of the picture's short side; painted ones reach 0.18
COMPACT = 0.5  # second radial moment over area: 0.16 for a disc, 0.2 for the widest shape, above 1 for scattered noise
STEADY = 0.9  # least correlation of a track with the path that a motion's name means


@dataclass(frozen=True)
class Reading:
    """The scene that a video shows; None for what cannot be read."""

    shape: str | None = None
    colour: str | None = None
    motion: str | None = None
    other: tuple[str | None, str] | None = None  # (shape, colour) of a second object


@dataclass(frozen=True)
class Score:
    """Whether a video shows the parts of a scene."""

    shape: bool
    colour: bool
    motion: bool

    @property
    def all(self) -> bool:
        """Whether all parts are right."""
        return self.shape and self.colour and self.motion


@dataclass(frozen=True)
class Track:
    """One object over time: arrays over the n frames that show it, lengths as fractions of the short side."""

    colour: str
    seen: np.ndarray  # frame numbers
    place: np.ndarray  # centroid as a complex number, x to the right, imaginary part down
    area: np.ndarray
    third: np.ndarray  # complex angular moments of the silhouette, magnitude 0 to 1
    fourth: np.ndarray
    spread: np.ndarray  # second radial moment over area, 1 / 2 pi for a disc


def read_scene(video: np.ndarray) -> Reading:
    """Read a video, uint8 (T, H, W, 3); raises ValueError for another layout."""
    if video.ndim != 4 or video.shape[3] != 3 or video.dtype != np.uint8:
        raise ValueError(f"video of shape {video.shape} and type {video.dtype}: uint8 (T, H, W, 3) is needed")
    tracks, last = _tracks(video), len(video) - 1
    if not tracks:
        return Reading()
    first = tracks[0]
    if len(tracks) == 1:
        shape = _shape(first, np.ones(len(first.seen), bool))
        return Reading(shape, first.colour, _motion(first, shape, last))
    second = tracks[1]
    # Silhouettes are whole only while the objects are apart.
    shapes = [_shape(track, np.abs(track.seen - last / 2) > last / 3) for track in tracks]
    motion = "crosses" if _cross(first, second, last) else None
    return Reading(shapes[0], first.colour, motion, (shapes[1], second.colour))


def score(video: np.ndarray, scene: Scene) -> Score:
    """Compare a video with the scene that it should show; both objects of a crossing count, in any order."""
    return compare(read_scene(video), scene)


def compare(reading: Reading, scene: Scene) -> Score:
    """Compare what was read of a video with the scene that it should show."""
    expected = {scene.colour: scene.shape, **({scene.other[1]: scene.other[0]} if scene.other else {})}
    shown = {} if reading.colour is None else {reading.colour: reading.shape}
    if reading.other:
        shown[reading.other[1]] = reading.other[0]
    same_colours = expected.keys() == shown.keys()
    # Shapes are judged without their colours, so that a wrong colour is one mistake, not two.
    shapes = sorted(str(s) for s in expected.values()) == sorted(str(s) for s in shown.values())
    return Score(shapes and (not same_colours or expected == shown), same_colours, reading.motion == scene.motion)


def chance() -> dict[str, float]:
    """Return the accuracy of a uniform guess about a scene of one object.

    The guess of a part is one of its values in such scenes, that of all parts one of the scenes.
    """
    scenes = [scene for scene in legal_scenes() if not scene.other]
    parts = {part: 1 / len({getattr(scene, part) for scene in scenes}) for part in ("shape", "colour", "motion")}
    return {**parts, "all": 1 / len(scenes)}


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % score interval for a proportion (Wilson 1927); raises ValueError unless 0 <= successes <= n."""
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"{successes} successes of {n}: 0 <= successes <= n and n >= 1 are needed")
    p, z = successes / n, 1.96
    centre, half = p + z * z / (2 * n), z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # In exact arithmetic low <= p <= high; comparing with p removes the rounding error at 0 and n successes.
    return max(0.0, min(p, (centre - half) / (1 + z * z / n))), min(1.0, max(p, (centre + half) / (1 + z * z / n)))


# -- from pixels to tracks -------------------------------------------------------------------------------------------


def _tracks(video: np.ndarray) -> list[Track]:
    """Return the tracks of the one or two colours with the largest areas that are compact and in most frames."""
    frames, height, width, _ = video.shape
    side = min(height, width)
    red, green, blue = np.moveaxis(video, 3, 0)
    high, low = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    chroma = high - low
    t, row, column = np.nonzero((chroma > SATURATED * high.astype(np.float32)) & (high > 64))
    z = (column + 0.5 + 1j * (row + 0.5)) / side
    chroma = chroma[t, row, column]
    hues = _hue(np.array(list(COLOURS.values())))
    difference = np.abs(_hue(video[t, row, column].astype(np.float64))[:, None] - hues)
    nearest = np.minimum(difference, 2 * np.pi - difference).argmin(1)
    tracks = []
    for i, name in enumerate(COLOURS):
        own = nearest == i
        if own.sum() < SMALLEST * side**2:
            continue
        # Weights below 1 keep the greyish rim, where a blurred edge meets the background, from widening the silhouette;
        # a dark stripe has 0.64 of a bright one's chroma.
        weight = np.minimum(chroma[own] / (0.65 * np.quantile(chroma[own], 0.9)), 1) ** 2
        track = _track(name, t[own], z[own], weight, frames, 1 / side**2)
        if len(track.seen) >= 0.6 * frames and np.median(track.spread) < COMPACT and np.median(track.area) < LARGEST:
            tracks.append(track)
    tracks.sort(key=lambda track: -track.area.mean())
    return [track for track in tracks[:2] if track.area.mean() > 0.25 * tracks[0].area.mean()]


def _track(name: str, t: np.ndarray, z: np.ndarray, weight: np.ndarray, frames: int, cell: float) -> Track:
    """Measure an object's silhouettes from the frame, place and weight of each of its pixels; `cell` is a pixel's area."""
    area = np.bincount(t, weight, frames) * cell
    seen = np.flatnonzero(area > SMALLEST)
    kept = area[t] > SMALLEST
    t, z, weight = np.searchsorted(seen, t[kept]), z[kept], weight[kept]
    total = np.bincount(t, weight, len(seen))

    def mean(values: np.ndarray) -> np.ndarray:  # over each frame's pixels
        real, imaginary = (np.bincount(t, weight * part, len(seen)) for part in (np.real(values), np.imag(values)))
        return (real + 1j * imaginary) / total

    place = mean(z)
    z = z - place[t]
    r = np.abs(z)
    third, fourth = mean(z**3) / mean(r**3), mean(z**4) / mean(r**4)
    return Track(name, seen, place, area[seen], third, fourth, np.real(mean(r**2)) / area[seen])


def _hue(rgb: np.ndarray) -> np.ndarray:
    """Return the angle of a colour around the grey axis in radians."""
    r, g, b = np.moveaxis(rgb, -1, 0)
    return np.arctan2(sqrt(3) * (g - b), 2 * r - g - b)


# -- from tracks to names --------------------------------------------------------------------------------------------


@functools.cache
def _prototypes() -> dict[str, np.ndarray]:
    """Return each shape's features from its formula, on a fine grid."""
    axis = np.linspace(-1.4, 1.4, 281)
    u, v = np.meshgrid(axis, axis)
    prototypes = {}
    for shape in SHAPES:
        z = (u + 1j * v)[distance(shape, u, v) < 0]
        prototypes[shape] = _features(_track(shape, np.zeros(len(z), int), z, np.ones(len(z)), 1, (axis[1] - axis[0]) ** 2))
    return prototypes


def _features(track: Track, use: np.ndarray | slice = slice(None)) -> np.ndarray:
    third, fourth, spread = np.abs(track.third[use]), np.abs(track.fourth[use]), track.spread[use]
    # The spreads of silhouettes differ by a few hundredths, their moments by a few tenths: the factor balances them.
    return np.array([np.median(third), np.median(fourth), 8 * (np.median(spread) - 1 / (2 * np.pi))])


def _shape(track: Track, use: np.ndarray) -> str | None:
    """Return the shape of the nearest prototype; None without frames or where every prototype is too far."""
    if not use.any():
        return None
    features = _features(track, use)
    distances = {shape: float(np.linalg.norm(features - proto)) for shape, proto in _prototypes().items()}
    best = min(distances, key=lambda shape: distances[shape])
    return best if distances[best] < 0.35 else None


def _fit(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Return slope and correlation of y as a linear function of x; zeros where one of them is constant."""
    x, y = x - x.mean(), y - y.mean()
    if x @ x == 0 or y @ y == 0:
        return 0.0, 0.0
    return float(x @ y / (x @ x)), float(x @ y / sqrt((x @ x) * (y @ y)))


def _motion(track: Track, shape: str | None, last: int) -> str | None:
    """Name a lone object's motion over the frames 0 to `last`; None for a standstill or another path."""
    if track.seen[0] > last / 8 or track.seen[-1] < last * 7 / 8:
        return None
    time, place = track.seen / max(last, 1), track.place
    reach = np.ptp(np.real(place)), np.ptp(np.imag(place))
    if max(reach) > 0.22:
        if min(reach) > 0.6 * max(reach):
            centred = place - place.mean()
            turns = [abs(np.vdot(np.exp(2j * np.pi * way * time), centred)) for way in (-1, 1)]
            return "circles" if max(turns) > STEADY * sqrt(len(time)) * np.linalg.norm(centred) else None
        axis = int(reach[1] > reach[0])
        along = np.imag(place) if axis else np.real(place)
        shift, steady = _fit(time, along)
        if abs(steady) > STEADY:
            return (("moves left", "moves right"), ("moves up", "moves down"))[axis][int(shift > 0)]
        _, steady = _fit(np.abs(2 * time - 1), along)
        return ("bounces from side to side", "bounces up and down")[axis] if abs(steady) > STEADY else None
    growth, steady = _fit(time, np.log(track.area))
    if abs(growth) > log(1.8) and abs(steady) > STEADY:
        return "grows" if growth > 0 else "shrinks"
    order = {"triangle": 3, "square": 4, "plus": 4}.get(shape or "")  # order of rotational symmetry
    if order:
        turned, steady = _fit(time, np.unwrap(np.angle(track.third if order == 3 else track.fourth)) / order)
        if abs(turned) > np.deg2rad(70) and abs(steady) > 0.95:
            return "turns clockwise" if turned > 0 else "turns counterclockwise"  # y points down
    return None


def _cross(first: Track, second: Track, last: int) -> bool:
    """Tell whether two objects move in opposite directions along one axis and meet."""
    _, i, j = np.intersect1d(first.seen, second.seen, return_indices=True)
    if len(i) < 2 or np.abs(first.place[i] - second.place[j]).min() > 0.3:
        return False
    a, b = (
        [_fit(track.seen / max(last, 1), part) for part in (np.real(track.place), np.imag(track.place))]
        for track in (first, second)
    )
    axis = int(abs(a[1][0]) > abs(a[0][0]))
    (shift, steady), (back, steady_back) = a[axis], b[axis]
    return shift * back < 0 and min(abs(shift), abs(back)) > 0.25 and min(abs(steady), abs(steady_back)) > STEADY
