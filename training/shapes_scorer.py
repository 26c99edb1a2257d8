"""Reads shape, colour and motion back out of a video of generated clips, from its pixels alone.

Objects are what is saturated; hue names their colour, the angular moments of the silhouette their shape, and the tracks
of place, area and angle their motion. Nothing is fitted to data: prototypes come from the shapes' own formulas.
"""

import functools
from dataclasses import dataclass
from math import sqrt

import numpy as np

from .shapes import COLOURS, MOTIONS, SHAPES, Scene, distance

SATURATED = 0.38  # of the brightest channel; backgrounds lie below 0.15, painted objects above 0.6
SMALLEST = 0.012  # part of the picture an object covers at least


@dataclass(frozen=True)
class Reading:
    """What a video shows; None where it cannot be read."""

    shape: str | None = None
    colour: str | None = None
    motion: str | None = None
    other: tuple[str | None, str] | None = None  # (shape, colour) of a second object


@dataclass(frozen=True)
class Score:
    """Whether a video shows what a scene says."""

    shape: bool
    colour: bool
    motion: bool

    @property
    def all(self) -> bool:
        """Tell whether everything is right."""
        return self.shape and self.colour and self.motion


@dataclass(frozen=True)
class Track:
    """One object over time; arrays over the frames in which it is seen."""

    colour: str
    seen: np.ndarray  # frame numbers
    place: np.ndarray  # (n, 2) centroid as x, y in parts of the short side
    area: np.ndarray  # part of the short side squared
    moment3: np.ndarray  # complex angular moments of the silhouette, magnitude 0 to 1
    moment4: np.ndarray
    spread: np.ndarray  # second radial moment over squared area, 1 / 2 pi for a disc


def read_scene(video: np.ndarray) -> Reading:
    """Read a video, uint8 (T, H, W, 3); raises ValueError for another layout."""
    tracks = _tracks(video)
    if not tracks:
        return Reading()
    frames = len(video)
    first = tracks[0]
    if len(tracks) > 1:
        second = tracks[1]
        # Silhouettes are whole only while the objects are apart.
        apart = [np.isin(t.seen, np.r_[: frames // 4 + 1, frames - frames // 4 - 1 : frames]) for t in (first, second)]
        motion = "crosses" if _crosses(first, second, frames) else None
        return Reading(_shape(first, apart[0]), first.colour, motion, (_shape(second, apart[1]), second.colour))
    shape = _shape(first, np.ones(len(first.seen), bool))
    return Reading(shape, first.colour, _motion(first, shape, frames))


def score(video: np.ndarray, scene: Scene) -> Score:
    """Compare what a video shows with what it should; both objects of a crossing count, in any order."""
    reading = read_scene(video)
    asked = {scene.colour: scene.shape, **({scene.other[1]: scene.other[0]} if scene.other else {})}
    found = {} if reading.colour is None else {reading.colour: reading.shape}
    if reading.other:
        found[reading.other[1]] = reading.other[0]
    same_colours = asked.keys() == found.keys()
    # Shapes are judged without their colours, so that a wrong colour is one mistake, not two.
    shapes = sorted(str(s) for s in asked.values()) == sorted(str(s) for s in found.values())
    return Score(shapes and (not same_colours or asked == found), same_colours, reading.motion == scene.motion)


def chance() -> dict[str, float]:
    """Return how often a uniform guess is right about a scene of one object: part by part, and all of it."""
    single = {"shape": 1 / len(SHAPES), "colour": 1 / len(COLOURS), "motion": 1 / len(MOTIONS)}
    return {**single, "all": single["shape"] * single["colour"] * single["motion"]}


def wilson_interval(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's score interval for a proportion (Wilson 1927); raises ValueError unless 0 <= successes <= n."""
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"{successes} successes of {n}: 0 <= successes <= n and n >= 1 are needed")
    p = successes / n
    centre, half = p + z * z / (2 * n), z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


# -- from pixels to tracks -------------------------------------------------------------------------------------------


def _tracks(video: np.ndarray) -> list[Track]:
    """Return the tracks of the one or two colours that cover most, if they are seen in most frames."""
    if video.ndim != 4 or video.shape[3] != 3 or video.dtype != np.uint8:
        raise ValueError(f"video of shape {video.shape} and type {video.dtype}: uint8 (T, H, W, 3) is needed")
    pixels = video.astype(np.float32) / 255
    high, low = pixels.max(3), pixels.min(3)
    chroma = high - low
    solid = (chroma > SATURATED * high) & (high > 0.25)
    names = list(COLOURS)
    hues = np.array([_hue(np.array(COLOURS[name])) for name in names])
    nearest = np.abs(np.angle(np.exp(1j * (_hue(pixels)[..., None] - hues)))).argmin(-1)
    frames, height, width = solid.shape
    side = min(height, width)
    y, x = np.meshgrid((np.arange(height) + 0.5) / side, (np.arange(width) + 0.5) / side, indexing="ij")
    found = []
    for i, name in enumerate(names):
        # Squared chroma keeps the greyish rim, where a blurred edge meets the background, from widening the silhouette.
        weight = np.where(solid & (nearest == i), np.minimum(chroma / 0.45, 1) ** 2, 0)
        area = weight.sum((1, 2)) / side**2
        seen = np.flatnonzero(area > SMALLEST)
        if len(seen) < 0.6 * frames:
            continue
        found.append(_track(name, seen, weight[seen], area[seen], x, y))
    found.sort(key=lambda track: -track.area.mean())
    return [t for t in found[:2] if t.area.mean() > 0.25 * found[0].area.mean()]


def _track(name: str, seen: np.ndarray, weight: np.ndarray, area: np.ndarray, x: np.ndarray, y: np.ndarray) -> Track:
    total = weight.sum((1, 2))
    place = np.stack([(weight * x).sum((1, 2)), (weight * y).sum((1, 2))], 1) / total[:, None]
    z = (x - place[:, 0, None, None]) + 1j * (y - place[:, 1, None, None])
    third, fourth, spread = _moments(weight, z)
    return Track(name, seen, place, area, third, fourth, spread)


def _moments(weight: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Angular moments of order 3 and 4, each over its radial moment, and the second moment over squared area."""
    r2 = np.abs(z) ** 2
    third = (weight * z**3).sum((1, 2)) / (weight * r2**1.5).sum((1, 2))
    fourth = (weight * z**4).sum((1, 2)) / (weight * r2**2).sum((1, 2))
    cell = 1.0 if z.shape[2] < 2 else np.abs(z[0, 0, 1] - z[0, 0, 0]) ** 2
    spread = (weight * r2).sum((1, 2)) / (weight.sum((1, 2)) ** 2 * cell)
    return third, fourth, spread


def _hue(rgb: np.ndarray) -> np.ndarray:
    """Angle of a colour around the grey axis, in radians."""
    r, g, b = np.moveaxis(rgb, -1, 0)
    return np.arctan2(sqrt(3) * (g - b), 2 * r - g - b)


# -- from tracks to words --------------------------------------------------------------------------------------------


@functools.cache
def _prototypes() -> dict[str, np.ndarray]:
    """Return each shape's (|third|, |fourth|, spread) from its formula, on a fine grid."""
    axis = np.linspace(-1.4, 1.4, 281)
    u, v = np.meshgrid(axis, axis)
    found = {}
    for shape in SHAPES:
        weight = (distance(shape, u, v) < 0).astype(np.float64)[None]
        place = (weight[0] * u).sum() / weight.sum(), (weight[0] * v).sum() / weight.sum()
        third, fourth, spread = _moments(weight, ((u - place[0]) + 1j * (v - place[1]))[None])
        found[shape] = _features(np.abs(third), np.abs(fourth), spread)
    return found


def _features(third: np.ndarray, fourth: np.ndarray, spread: np.ndarray) -> np.ndarray:
    # The spread of real silhouettes differs by a few hundredths, the moments by a few tenths: the factor levels them.
    return np.array([np.median(third), np.median(fourth), 8 * (np.median(spread) - 1 / (2 * np.pi))])


def _shape(track: Track, use: np.ndarray) -> str | None:
    """Return the nearest prototype's name, None without frames or far from all."""
    if not use.any():
        return None
    features = _features(np.abs(track.moment3[use]), np.abs(track.moment4[use]), track.spread[use])
    far = {shape: float(np.linalg.norm(features - proto)) for shape, proto in _prototypes().items()}
    best = min(far, key=lambda shape: far[shape])
    return best if far[best] < 0.35 else None


def _ends(values: np.ndarray, seen: np.ndarray, frames: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Return means over what was seen in the first and in the last eighth, None if either is missing."""
    early, late = seen < max(1, frames / 8), seen >= frames - max(1, frames / 8)
    return (values[early].mean(0), values[late].mean(0)) if early.any() and late.any() else None


def _motion(track: Track, shape: str | None, frames: int) -> str | None:
    places, areas = _ends(track.place, track.seen, frames), _ends(track.area, track.seen, frames)
    if places is None or areas is None:
        return None
    shift, reach = places[1] - places[0], np.ptp(track.place, axis=0)
    axis = int(reach.argmax())
    ratio = areas[1] / areas[0]
    if reach[axis] > 0.22:  # it travels
        if reach[1 - axis] > 0.6 * reach[axis]:
            return None
        if abs(shift[axis]) > 0.7 * reach[axis]:
            return (("moves left", "moves right"), ("moves up", "moves down"))[axis][int(shift[axis] > 0)]
        middle = np.abs(track.seen - (frames - 1) / 2) < frames / 8
        if abs(shift[axis]) < 0.4 * reach[axis] and middle.any():
            out = track.place[middle, axis].mean() - (places[0][axis] + places[1][axis]) / 2
            if abs(out) > 0.5 * reach[axis]:
                return ("bounces from side to side", "bounces up and down")[axis]
        return None
    if ratio > 1.8:
        return "grows"
    if ratio < 1 / 1.8:
        return "shrinks"
    order = {"triangle": 3, "square": 4, "plus": 4}.get(shape or "")
    if order and len(track.seen) == track.seen[-1] - track.seen[0] + 1:
        phase = np.unwrap(np.angle(track.moment3 if order == 3 else track.moment4)) / order
        turned = np.rad2deg(phase[-1] - phase[0])
        if abs(turned) > 70:
            return "turns clockwise" if turned > 0 else "turns counterclockwise"  # y points down
    return None


def _crosses(first: Track, second: Track, frames: int) -> bool:
    ends = [_ends(track.place, track.seen, frames) for track in (first, second)]
    if ends[0] is None or ends[1] is None:
        return False
    a, b = (end[1] - end[0] for end in ends)
    axis = int(np.abs(a).argmax())
    return bool(a[axis] * b[axis] < 0 and min(abs(a[axis]), abs(b[axis])) > 0.25)
