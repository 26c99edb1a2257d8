"""Generated captioned clips: textured shapes that move, turn, bounce and hide each other over a panning background.

Without a dataset the system trains and tests on these; shapes_scorer.py reads shape, colour and motion back out of a
video, so that prompt accuracy is a number. Pixels are uint8 (T, H, W, 3); a clip spans its whole motion at any length.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

FPS = 16.0
SHAPES = ("disc", "square", "triangle", "plus")
# Hues 60 degrees apart; backgrounds stay below a saturation of 0.15, objects above 0.6.
COLOURS = {
    "red": (0.92, 0.16, 0.14),
    "yellow": (0.93, 0.88, 0.12),
    "green": (0.14, 0.78, 0.16),
    "cyan": (0.12, 0.85, 0.88),
    "blue": (0.16, 0.24, 0.95),
    "magenta": (0.90, 0.16, 0.86),
}
MOTIONS = (
    "moves left",
    "moves right",
    "moves up",
    "moves down",
    "turns clockwise",
    "turns counterclockwise",
    "bounces from side to side",
    "bounces up and down",
    "grows",
    "shrinks",
    "crosses",
)
SPLITS = {"train": 0, "eval": 1, "held_out": 2}


@dataclass(frozen=True)
class Scene:
    """What a clip shows: one moving object, or two of different colours whose paths cross."""

    shape: str
    colour: str
    motion: str
    other: tuple[str, str] | None = None  # (shape, colour) of the second object of a crossing

    def __post_init__(self) -> None:
        """Raise ValueError, naming what is legal, for a scene that cannot be rendered."""
        objects = [(self.shape, self.colour), *([self.other] if self.other else [])]
        for shape, colour in objects:
            for name, value, legal in (("shape", shape, SHAPES), ("colour", colour, tuple(COLOURS))):
                if value not in legal:
                    raise ValueError(f"{name} {value!r}: use one of {', '.join(legal)}")
        if self.motion not in MOTIONS:
            raise ValueError(f"motion {self.motion!r}: use one of {', '.join(MOTIONS)}")
        if (self.motion == "crosses") != (self.other is not None):
            raise ValueError(f"motion {self.motion!r} with other {self.other}: two objects cross, one does all else")
        if self.other and self.other[1] == self.colour:
            raise ValueError(f"two {self.colour} objects: crossing objects need different colours")
        if self.motion.startswith("turns") and self.shape == "disc":
            raise ValueError("a disc that turns: its turning cannot be seen; use another shape")

    def caption(self) -> str:
        """Return the scene in words."""
        if self.other:
            return f"a {self.colour} {self.shape} and a {self.other[1]} {self.other[0]} cross"
        return f"a {self.colour} {self.shape} {self.motion}"


def parse_caption(text: str) -> Scene:
    """Invert `Scene.caption`; raises ValueError naming what is legal."""
    two = re.fullmatch(r"a (\w+) (\w+) and a (\w+) (\w+) cross", text)
    if two:
        return Scene(two[2], two[1], "crosses", (two[4], two[3]))
    one = re.fullmatch(r"a (\w+) (\w+) (.+)", text)
    if not one or one[3] == "crosses":
        raise ValueError(f"caption {text!r}: 'a COLOUR SHAPE MOTION' or 'a COLOUR SHAPE and a COLOUR SHAPE cross'")
    return Scene(one[2], one[1], one[3])


def legal_scenes() -> Iterator[Scene]:
    """Yield every scene of one object."""
    for shape in SHAPES:
        for colour in COLOURS:
            for motion in MOTIONS[:-1]:
                if not (shape == "disc" and motion.startswith("turns")):
                    yield Scene(shape, colour, motion)


def is_held_out(scene: Scene) -> bool:
    """Tell whether a combination of shape, colour and motion is never trained on: about one in ten.

    A crossing is held out if either of its objects is, with that motion.
    """
    objects = [(scene.shape, scene.colour), *([scene.other] if scene.other else [])]
    keys = (f"{shape} {colour} {scene.motion}".encode() for shape, colour in objects)
    return any(hashlib.sha256(key).digest()[0] % 10 == 3 for key in keys)


def sample_scene(rng: np.random.Generator, held_out: bool | None = False) -> Scene:
    """Draw a scene, motions equally often; `held_out` True or False keeps to that part, None draws from all."""
    while True:
        motion = MOTIONS[rng.integers(len(MOTIONS))]
        shape, second = (SHAPES[i] for i in rng.integers(len(SHAPES), size=2))
        first_colour, second_colour = (tuple(COLOURS)[i] for i in rng.choice(len(COLOURS), 2, replace=False))
        if motion.startswith("turns") and shape == "disc":
            continue
        scene = Scene(shape, first_colour, motion, (second, second_colour) if motion == "crosses" else None)
        if held_out is None or is_held_out(scene) == held_out:
            return scene


def clip(seed: int, split: str, frames: int = 65, size: int | tuple[int, int] = 64) -> tuple[np.ndarray, Scene]:
    """Return clip `seed` of a split: pixels and scene, decided by the arguments alone.

    Splits draw from different streams; only "held_out" shows held-out combinations, and nothing else.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: use one of {', '.join(SPLITS)}")
    rng = np.random.default_rng((SPLITS[split], seed))
    scene = sample_scene(rng, held_out=split == "held_out")
    return render(scene, rng, frames, size), scene


# -- rendering -------------------------------------------------------------------------------------------------------


def render(
    scene: Scene, rng: np.random.Generator | int, frames: int = 65, size: int | tuple[int, int] = 64
) -> np.ndarray:
    """Render a scene: uint8 (T, H, W, 3).

    Places, sizes, speeds and textures come from `rng`. Raises ValueError for fewer than 2 frames or sides below 32.
    """
    rng = np.random.default_rng(rng)
    height, width = (size, size) if isinstance(size, int) else size
    if frames < 2 or min(height, width) < 32:
        raise ValueError(f"{frames} frames of {height}x{width}: at least 2 frames and 32 pixels a side are needed")
    side = min(height, width)
    time = np.linspace(0, 1, frames)
    y, x = np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij")
    x, y = (x / side).astype(np.float32), (y / side).astype(np.float32)  # the short side is 1
    span = np.array([width / side, height / side])

    video = _background(rng, x, y, time)
    objects = [(scene.shape, scene.colour), *([scene.other] if scene.other else [])]
    paths = _cross(rng, time) if scene.other else [_path(rng, scene.motion, time)]
    for (shape, colour), (place, radius, angle) in zip(objects, paths, strict=True):
        _paint(video, rng, shape, colour, place * span, radius, angle, x, y, side)
    return (video * 255 + 0.5).clip(0, 255).astype(np.uint8)


def _background(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, time: np.ndarray) -> np.ndarray:
    """Slowly panning smooth noise of low saturation: (T, H, W, 3)."""
    base = rng.uniform(0.3, 0.6)
    tint = 1 + rng.uniform(-0.04, 0.04, 3)
    pan = rng.uniform(-0.12, 0.12, 2)
    texture = np.zeros((len(time), *x.shape), np.float32)
    for _ in range(4):
        fx, fy = rng.uniform(-2.5, 2.5, 2) * 2 * np.pi
        drift = (fx * pan[0] + fy * pan[1]) * time + rng.uniform(0, 2 * np.pi)
        texture += np.sin(fx * x + fy * y + drift[:, None, None].astype(np.float32))
    grey = base * (1 + 0.11 * texture)
    return grey[..., None] * tint.astype(np.float32)


def _path(rng: np.random.Generator, motion: str, time: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centre (T, 2) in parts of the picture, radius (T,) in parts of its short side, and angle (T,) of one object."""
    still = np.ones_like(time)
    radius, angle = rng.uniform(0.15, 0.185) * still, rng.uniform(-0.15, 0.15) * still
    place = np.stack([rng.uniform(0.38, 0.62) * still, rng.uniform(0.38, 0.62) * still], 1)
    start, end = rng.uniform(0.21, 0.28), rng.uniform(0.72, 0.79)
    along = start + (end - start) * time
    if motion in ("moves left", "moves right"):
        place[:, 0] = along if motion == "moves right" else 1 - along
    elif motion in ("moves up", "moves down"):
        place[:, 1] = along if motion == "moves down" else 1 - along
    elif motion.startswith("turns"):
        turned = np.deg2rad(rng.uniform(150, 220)) * time
        angle = angle + (turned if motion == "turns clockwise" else -turned)  # y points down
    elif motion.startswith("bounces"):
        there_and_back = start + (end - start) * (1 - np.abs(2 * time - 1))
        if rng.integers(2):
            there_and_back = 1 - there_and_back
        place[:, 0 if motion == "bounces from side to side" else 1] = there_and_back
    else:  # grows, shrinks
        grown = rng.uniform(0.09, 0.105) + rng.uniform(0.12, 0.14) * time
        radius = grown if motion == "grows" else grown[::-1]
    return place, radius, angle


def _cross(rng: np.random.Generator, time: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Paths of two objects that swap sides and meet in the middle; the second one passes in front."""
    axis = rng.integers(2)
    paths = []
    for direction in (1, -1) if rng.integers(2) else (-1, 1):
        place = np.empty((len(time), 2))
        start, end = rng.uniform(0.2, 0.25), rng.uniform(0.75, 0.8)
        along = start + (end - start) * time
        place[:, axis] = along if direction > 0 else 1 - along
        place[:, 1 - axis] = rng.uniform(0.42, 0.58)
        still = np.ones_like(time)
        paths.append((place, rng.uniform(0.14, 0.17) * still, rng.uniform(-0.15, 0.15) * still))
    return paths


def _paint(video, rng, shape, colour, place, radius, angle, x, y, side) -> None:
    """Blend one object into `video` with a one-pixel soft edge; its stripes move and turn with it."""
    dx = x - place[:, 0, None, None].astype(np.float32)
    dy = y - place[:, 1, None, None].astype(np.float32)
    cos, sin = np.cos(angle).astype(np.float32)[:, None, None], np.sin(angle).astype(np.float32)[:, None, None]
    scale = radius.astype(np.float32)[:, None, None]
    u, v = (cos * dx + sin * dy) / scale, (cos * dy - sin * dx) / scale  # the object's own axes
    cover = np.clip(0.5 - distance(shape, u, v) * scale * side, 0, 1)[..., None]
    heading, phase = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi)
    stripes = 1 + 0.16 * np.sin(4.5 * (np.cos(heading) * u + np.sin(heading) * v) + phase)
    painted = stripes[..., None].astype(np.float32) * np.array(COLOURS[colour], np.float32)
    video += cover * (np.minimum(painted, 1) - video)


def distance(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return a signed distance (negative inside) to a shape of radius about 1 around the origin, v pointing down."""
    if shape == "disc":
        return np.hypot(u, v) - 0.95
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.82
    if shape == "triangle":
        sides = (np.deg2rad(a) for a in (90, 210, 330))
        return np.maximum.reduce([np.cos(a) * u + np.sin(a) * v for a in sides]) - 0.56
    wide = np.maximum(np.abs(u) - 1.05, np.abs(v) - 0.36)
    tall = np.maximum(np.abs(u) - 0.36, np.abs(v) - 1.05)
    return np.minimum(wide, tall)
