"""Generated captioned clips: textured shapes that move, turn, bounce and hide each other over a panning background.

Without a dataset the system trains and tests on these; evaluation/synthetic_scorer.py reads shape, colour and motion back out
of a video, so that prompt accuracy is a number. Pixels are uint8 (T, H, W, 3); a clip spans its whole motion at any length.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

FPS = 16.0  # at which a clip is shown
SHAPES = ("disc", "square", "triangle", "plus")
# Hues about 60 degrees apart; backgrounds stay below a saturation of 0.15, objects above 0.7.
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
    "circles",
    "grows",
    "shrinks",
    "crosses",
)
SPLITS = {"train": 0, "eval": 1, "unseen": 2}


@dataclass(frozen=True)
class Scene:
    """Content of a clip: one moving object, or two of different colours whose paths cross."""

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
    crossing = re.fullmatch(r"a (\w+) (\w+) and a (\w+) (\w+) cross", text)
    if crossing:
        return Scene(crossing[2], crossing[1], "crosses", (crossing[4], crossing[3]))
    single = re.fullmatch(r"a (\w+) (\w+) (.+)", text)
    if not single or single[3] == "crosses":
        raise ValueError(f"caption {text!r}: 'a COLOUR SHAPE MOTION' or 'a COLOUR SHAPE and a COLOUR SHAPE cross'")
    return Scene(single[2], single[1], single[3])


def legal_scenes() -> Iterator[Scene]:
    """Yield every scene; a crossing in both orders, for it is the second object that passes in front."""
    objects = list(itertools.product(SHAPES, COLOURS))
    for (shape, colour), motion in itertools.product(objects, MOTIONS):
        if motion == "crosses":
            yield from (Scene(shape, colour, motion, other) for other in objects if other[1] != colour)
        elif not (shape == "disc" and motion.startswith("turns")):
            yield Scene(shape, colour, motion)


def is_unseen(scene: Scene) -> bool:
    """Tell whether a combination of shape, colour and motion is never trained on: about one in ten.

    The combinations are spread like the cells of a Latin square: what is never seen is always a triple, and each two of
    its three parts are trained on together. A crossing is unseen if either of its objects is, with that motion.
    """
    objects = [(scene.shape, scene.colour), *([scene.other] if scene.other else [])]
    motion = MOTIONS.index(scene.motion)
    return any((2 * SHAPES.index(s) + 3 * list(COLOURS).index(c) + motion) % 10 == 3 for s, c in objects)


def sample_scene(rng: np.random.Generator, unseen: bool | None = False) -> Scene:
    """Draw a scene, motions about equally often; `unseen` True or False keeps to that part, None draws from all."""
    while True:
        motion = MOTIONS[rng.integers(len(MOTIONS))]
        first, second = (SHAPES[i] for i in rng.integers(len(SHAPES), size=2))
        while motion.startswith("turns") and first == "disc":
            first = SHAPES[rng.integers(len(SHAPES))]
        colour, second_colour = (tuple(COLOURS)[i] for i in rng.choice(len(COLOURS), 2, replace=False))
        scene = Scene(first, colour, motion, (second, second_colour) if motion == "crosses" else None)
        if unseen is None or is_unseen(scene) == unseen:
            return scene


def clip(seed: int, split: str, frames: int = 65, size: int | tuple[int, int] = 64) -> tuple[np.ndarray, Scene]:
    """Return clip `seed` (0 or more) of a split: pixels, uint8 (T, H, W, 3), and scene, decided by the arguments alone.

    Splits draw from different streams; "unseen" shows the combinations that no other split has, and nothing else. Raises
    ValueError for an unknown split, a negative seed, and as `render` does.
    """
    scene, rng = _drawn(seed, split)
    return render(scene, rng, frames, size), scene


def scene(seed: int, split: str) -> Scene:
    """Return the scene of clip `seed` of a split without rendering it; raises ValueError as `clip` does."""
    return _drawn(seed, split)[0]


def _drawn(seed: int, split: str) -> tuple[Scene, np.random.Generator]:
    """Return a clip's scene, and the generator that decides the rest of it."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: use one of {', '.join(SPLITS)}")
    if seed < 0:
        raise ValueError(f"seed {seed}: use 0 or more")
    rng = np.random.default_rng((SPLITS[split], seed))
    return sample_scene(rng, unseen=split == "unseen"), rng


# -- rendering -------------------------------------------------------------------------------------------------------
# Lengths are in parts of the picture's short side, x to the right, y down; `span` is the picture's (width, height).


def render(scene: Scene, rng: np.random.Generator | int, frames: int = 65, size: int | tuple[int, int] = 64) -> np.ndarray:
    """Render a scene at `size`, a side or (height, width): uint8 (T, H, W, 3).

    Places, sizes, speeds and textures come from `rng`, a generator or a seed. The motion spans the clip, whatever its
    length. Raises ValueError for fewer than 2 frames or sides below 32.
    """
    rng = np.random.default_rng(rng)
    height, width = (size, size) if isinstance(size, int) else size
    if frames < 2 or min(height, width) < 32:
        raise ValueError(f"{frames} frames of {height}x{width}: at least 2 frames and 32 pixels a side are needed")
    side = min(height, width)
    time = np.linspace(0, 1, frames)
    x, y = ((np.arange(n) + 0.5) / side for n in (width, height))  # pixel centres
    span = np.array([width / side, height / side])

    video = _background(rng, x, y, time)
    objects = [(scene.shape, scene.colour), *([scene.other] if scene.other else [])]
    paths = _cross(rng, time, span) if scene.other else [_path(rng, scene.motion, time, span)]
    for (shape, colour), path in zip(objects, paths, strict=True):
        _paint(video, rng, shape, colour, path, x, y)
    return (video * 255 + 0.5).clip(0, 255).astype(np.uint8)


def _background(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, time: np.ndarray) -> np.ndarray:
    """Slowly panning smooth noise of low saturation: float32 (T, H, W, 3)."""
    base = rng.uniform(0.3, 0.6)
    tint = 1 + rng.uniform(-0.05, 0.05, 3)
    pan = rng.uniform(-0.12, 0.12, 2)
    waves, weights = [], []
    for _ in range(4):
        fx, fy = rng.uniform(-2, 2, 2) * 2 * np.pi
        phase = fx * x + fy * y[:, None]  # H W
        drift = (fx * pan[0] + fy * pan[1]) * time + rng.uniform(0, 2 * np.pi)  # T
        # sin(phase + drift) as a sum of products: only (T + H W) sines, not T H W
        waves += [np.sin(phase), np.cos(phase)]
        weights += [np.cos(drift), np.sin(drift)]
    texture = np.einsum("kt,khw->thw", np.array(weights, np.float32), np.array(waves, np.float32))
    return (base * (1 + 0.09 * texture))[..., None] * tint.astype(np.float32)


Path = tuple[np.ndarray, np.ndarray, np.ndarray]  # centre (T, 2), radius (T,), angle (T,) in radians, clockwise


def _path(rng: np.random.Generator, motion: str, time: np.ndarray, span: np.ndarray) -> Path:
    """Return the path of a lone object."""
    ones = np.ones_like(time)
    radius, angle = rng.uniform(0.16, 0.195) * ones, rng.uniform(-0.15, 0.15) * ones
    place = ones[:, None] * span * rng.uniform(0.36, 0.64, 2)
    start, end = rng.uniform(0.22, 0.29), rng.uniform(0.71, 0.78)
    along = start + (end - start) * time
    if motion in ("moves left", "moves right"):
        place[:, 0] = span[0] * (along if motion == "moves right" else 1 - along)
    elif motion in ("moves up", "moves down"):
        place[:, 1] = span[1] * (along if motion == "moves down" else 1 - along)
    elif motion.startswith("turns"):
        turned = np.deg2rad(rng.uniform(150, 220)) * time
        angle = angle + (turned if motion == "turns clockwise" else -turned)
    elif motion.startswith("bounces"):
        there_and_back = start + (end - start) * (1 - np.abs(2 * time - 1))
        axis = 0 if motion == "bounces from side to side" else 1
        place[:, axis] = span[axis] * (there_and_back if rng.integers(2) else 1 - there_and_back)
    elif motion == "circles":
        radius = rng.uniform(0.15, 0.175) * ones
        turn = rng.uniform(0, 2 * np.pi) + rng.choice((-2, 2)) * np.pi * time
        centre = span / 2 + rng.uniform(-0.04, 0.04, 2)
        place = centre + rng.uniform(0.19, 0.24) * np.stack([np.cos(turn), np.sin(turn)], 1)
    else:  # grows, shrinks
        grown = rng.uniform(0.09, 0.105) + rng.uniform(0.12, 0.14) * time
        radius = grown if motion == "grows" else grown[::-1]
    return place, radius, angle


def _cross(rng: np.random.Generator, time: np.ndarray, span: np.ndarray) -> list[Path]:
    """Return the paths of two objects that swap sides; the second one passes in front and hides the first."""
    axis = rng.integers(2)
    level = rng.uniform(0.4, 0.6)
    forwards = bool(rng.integers(2))
    paths = []
    for forward in (forwards, not forwards):
        start, end = rng.uniform(0.2, 0.25), rng.uniform(0.75, 0.8)
        along = start + (end - start) * time
        place = np.empty((len(time), 2))
        place[:, axis] = span[axis] * (along if forward else 1 - along)
        place[:, 1 - axis] = span[1 - axis] * level + rng.uniform(-0.04, 0.04)
        ones = np.ones_like(time)
        paths.append((place, rng.uniform(0.145, 0.175) * ones, rng.uniform(-0.15, 0.15) * ones))
    return paths


def _paint(
    video: np.ndarray, rng: np.random.Generator, shape: str, colour: str, path: Path, x: np.ndarray, y: np.ndarray
) -> None:
    """Blend one object into `video` with a one-pixel soft edge; its stripes move and turn with it."""
    place, radius, angle = path
    dx, dy = x - place[:, :1], y - place[:, 1:]  # T W, T H
    reach = 1.25 * radius[:, None] + (x[1] - x[0])  # no shape is wider, its soft edge included
    t, row, column = np.nonzero((np.abs(dy) < reach)[:, :, None] & (np.abs(dx) < reach)[:, None])  # pixels near it
    dx, dy, cos, sin, scale = dx[t, column], dy[t, row], np.cos(angle)[t], np.sin(angle)[t], radius[t]
    u, v = (cos * dx + sin * dy) / scale, (cos * dy - sin * dx) / scale  # the object's own axes
    cover = np.clip(0.5 - distance(shape, u, v) * scale / (x[1] - x[0]), 0, 1)[:, None]
    heading, phase = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi)
    stripes = 0.87 + 0.19 * np.sin(5 * (np.cos(heading) * u + np.sin(heading) * v) + phase)
    painted = np.minimum(stripes[:, None] * COLOURS[colour], 1)
    video[t, row, column] += cover * (painted - video[t, row, column])


def distance(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return a signed distance (negative inside) to a shape of radius about 1 around the origin, v pointing down."""
    if shape == "disc":
        return np.hypot(u, v) - 0.95
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.86
    if shape == "triangle":
        sides = (np.deg2rad(a) for a in (90, 210, 330))
        return np.maximum.reduce([np.cos(a) * u + np.sin(a) * v for a in sides]) - 0.58
    wide = np.maximum(np.abs(u) - 1.05, np.abs(v) - 0.36)
    tall = np.maximum(np.abs(u) - 0.36, np.abs(v) - 1.05)
    return np.minimum(wide, tall)
