import dataclasses
import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promag.data.synthetic import (
    COLOURS,
    MOTIONS,
    SHAPES,
    Scene,
    clip,
    is_unseen,
    legal_scenes,
    parse_caption,
    render,
    sample_scene,
)
from promag.evaluation.synthetic_scorer import Reading, chance, compare, read_scene, score, wilson_interval

ALL = list(legal_scenes())
SINGLE = [scene for scene in ALL if not scene.other]


@given(st.sampled_from(ALL))
def test_captions_can_be_parsed_back(scene):
    assert parse_caption(scene.caption()) == scene


def test_every_scene_is_listed_once_and_has_a_caption_of_its_own():
    assert (len(SHAPES), len(COLOURS), len(MOTIONS)) == (4, 6, 12)
    assert len(SINGLE) == 4 * 6 * 11 - 6 * 2  # discs cannot be seen turning
    assert len(ALL) == len(SINGLE) + 24 * 20  # crossings, in both orders
    assert len({scene.caption() for scene in ALL}) == len(set(ALL)) == len(ALL)


def test_arguments_determine_a_clip():
    digests = {}
    for split in ("train", "eval", "unseen"):
        for seed in range(4):
            (a, scene), (b, again) = clip(seed, split, 9, 32), clip(seed, split, 9, 32)
            assert scene == again
            assert np.array_equal(a, b)
            digests[hashlib.sha256(a.tobytes()).hexdigest()] = (split, seed)
    assert len(digests) == 12


def test_unseen_combinations_are_spread_and_each_pair_of_their_parts_is_trained():
    held, trained = ([s for s in SINGLE if is_unseen(s) == out] for out in (True, False))
    assert 0.09 < len(held) / len(SINGLE) < 0.11
    for part, legal in (("shape", SHAPES), ("colour", COLOURS), ("motion", MOTIONS[:-1])):
        counts = [sum(getattr(s, part) == value for s in held) for value in legal]
        assert min(counts) > 0
        assert max(counts) - min(counts) <= 2
    for a, b in itertools.combinations(("shape", "colour", "motion"), 2):
        assert {(getattr(s, a), getattr(s, b)) for s in held} <= {(getattr(s, a), getattr(s, b)) for s in trained}


def test_splits_contain_only_their_combinations():
    rng = np.random.default_rng(0)
    assert not any(is_unseen(sample_scene(rng, unseen=False)) for _ in range(300))
    assert {is_unseen(sample_scene(rng, unseen=None)) for _ in range(100)} == {True, False}
    for split in ("train", "eval", "unseen"):
        assert {is_unseen(clip(i, split, 2, 32)[1]) for i in range(30)} == {split == "unseen"}


@given(st.sampled_from([scene for scene in ALL if scene.other]))
def test_a_crossing_is_unseen_if_either_object_is(scene):
    swapped = Scene(scene.other[0], scene.other[1], "crosses", (scene.shape, scene.colour))
    assert is_unseen(scene) == is_unseen(swapped)


def silhouette(frame):
    """Return rows and columns of saturated pixels, as fractions of the frame's height and width."""
    pixels = frame.astype(float)
    row, column = np.nonzero(np.ptp(pixels, axis=-1) > 0.5 * pixels.max(-1))
    return row / frame.shape[0], column / frame.shape[1]


@pytest.mark.parametrize("frames", [9, 65, 129])
@pytest.mark.parametrize("size", [32, (64, 96)])
@pytest.mark.parametrize(("motion", "down", "right"), [("up", -1, 0), ("down", 1, 0), ("left", 0, -1), ("right", 0, 1)])
def test_a_clip_moves_as_captioned_and_shows_the_whole_path(motion, down, right, size, frames):
    video = render(Scene("square", "blue", f"moves {motion}"), 5, frames, size)
    (y0, x0), (y1, x1) = ([part.mean() for part in silhouette(video[i])] for i in (0, -1))
    for shift, sign in ((y1 - y0, down), (x1 - x0, right)):
        assert 0.4 < shift * sign < 0.58 if sign else abs(shift) < 0.01


@pytest.mark.parametrize(("motion", "sign"), [("turns clockwise", 1), ("turns counterclockwise", -1)])
@pytest.mark.parametrize("seed", range(3))
def test_a_triangle_turns_in_the_captioned_direction(motion, sign, seed):
    video = render(Scene("triangle", "green", motion), seed, 9, 128)
    tips = []
    for frame in video[:2]:
        row, column = silhouette(frame)
        tips.append(column[row.argmin()])
    assert 0.02 < (tips[1] - tips[0]) * sign < 0.15


def test_growing_objects_grow_and_crossing_objects_hide_each_other():
    grows = render(Scene("disc", "red", "grows"), 0, 9)
    shares = [len(silhouette(frame)[0]) / 64**2 for frame in grows]
    assert shares == sorted(shares)
    assert shares[-1] > 3 * shares[0]
    for seed in range(10):
        video = render(Scene("square", "red", "crosses", ("disc", "cyan")), seed, 65)
        red = (video[..., 0] > 2.0 * video[..., 1]).sum((1, 2))
        assert red.min() < 0.4 * red[0]


@pytest.mark.parametrize(("frames", "count"), [(65, 40), (17, 120)])
def test_the_scorer_reads_true_clips(frames, count):
    right = [score(*clip(i, "eval", frames)).all for i in range(count)]
    assert np.mean(right) > 0.98


def test_the_scorer_reads_clips_degraded_by_a_weak_autoencoder():
    rng = np.random.default_rng(0)
    right = []
    for i in range(50):
        video, scene = clip(i, "eval", 17)
        right.append(score(degrade(video, rng), scene).all)
    assert np.mean(right) > 0.98


def degrade(video, rng):
    """Blur with a sigma of 1 pixel, remove 15 % of the saturation, add noise with a sigma of 4 / 255."""
    kernel = np.exp(-(np.arange(-3, 4) ** 2) / 2)
    pixels = video.astype(np.float32)
    for axis in (1, 2):
        pixels = np.float32(sum(k * np.roll(pixels, i - 3, axis) for i, k in enumerate(kernel / kernel.sum())))
    grey = pixels.mean(-1, keepdims=True)
    return (grey + 0.85 * (pixels - grey) + rng.normal(0, 4, pixels.shape)).clip(0, 255).astype(np.uint8)


@given(st.sampled_from(SINGLE), st.integers(0, 10**6))
@settings(max_examples=25, derandomize=True)
def test_any_single_mistake_is_detected(scene, seed):
    video = render(scene, seed, 17)
    assert score(video, scene).all
    reading = read_scene(video)
    for part, legal in (("shape", SHAPES), ("colour", COLOURS), ("motion", MOTIONS[:-1])):
        for value in legal:
            if value == getattr(scene, part) or (value == "disc" and scene.motion.startswith("turns")):
                continue
            if value.startswith("turns") and scene.shape == "disc":
                continue
            wrong = compare(reading, dataclasses.replace(scene, **{part: value}))
            assert not getattr(wrong, part)
            assert not wrong.all


REVERSED = {
    "moves left": "moves right",
    "moves up": "moves down",
    "turns clockwise": "turns counterclockwise",
    "grows": "shrinks",
}
REVERSED |= {b: a for a, b in REVERSED.items()}


@given(st.sampled_from(ALL), st.integers(0, 10**6))
@settings(max_examples=40, derandomize=True)
def test_time_reversed_and_frozen_clips(scene, seed):
    video = render(scene, seed, 17)
    assert read_scene(video[::-1]).motion == REVERSED.get(scene.motion, scene.motion)
    assert read_scene(np.repeat(video[:1], 17, 0)).motion is None


def test_motion_is_read_from_the_whole_path_not_its_ends():
    rng = np.random.default_rng(0)
    for i in range(60):
        video, _ = clip(i, "eval", 17)
        assert read_scene(video[rng.permutation(17)]).motion is None


@given(st.integers(0, 10**6))
@settings(max_examples=20, derandomize=True)
def test_a_missing_or_miscoloured_second_object_is_detected(seed):
    scene = Scene("disc", "red", "crosses", ("square", "blue"))
    video = render(scene, seed, 17)
    assert score(video, scene).all
    reading = read_scene(video)
    assert not compare(reading, dataclasses.replace(scene, other=("square", "green"))).colour
    assert not compare(reading, dataclasses.replace(scene, other=("plus", "blue"))).shape
    assert not compare(reading, Scene("square", "red", "crosses", ("disc", "blue"))).shape
    alone = score(render(Scene("disc", "red", "moves left"), seed, 17), scene)
    assert not alone.colour
    assert not alone.motion


def test_an_empty_clip_gives_no_reading():
    rng = np.random.default_rng(0)
    shape = (17, 64, 64, 3)
    beside = render(Scene("disc", "red", "moves up"), 0, 17, (64, 256))[:, :, :64]  # background without the object
    for video in (
        np.zeros(shape, np.uint8),
        np.full(shape, (230, 30, 30), np.uint8),
        rng.integers(0, 256, shape, np.uint8),
        np.repeat(rng.integers(0, 256, (1, *shape[1:]), np.uint8), 17, 0),
        rng.normal(128, 40, shape).clip(0, 255).astype(np.uint8),
        beside,
        degrade(beside, rng),
    ):
        assert read_scene(video) == Reading()


@given(st.integers(0, 50), st.integers(1, 50))
def test_wilson_intervals_hold_the_share_and_shrink(successes, more):
    n = successes + more
    low, high = wilson_interval(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    low4, high4 = wilson_interval(4 * successes, 4 * n)
    assert high4 - low4 < high - low


def test_wilson_interval_known_value():
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_chance_is_a_uniform_guess():
    assert chance() == pytest.approx({"shape": 1 / 4, "colour": 1 / 6, "motion": 1 / 11, "all": 1 / 252})


@pytest.mark.parametrize("size", [32, (64, 96), (96, 48)])
def test_other_sizes_render_and_read(size):
    video = render(Scene("square", "green", "moves up"), 3, 17, size)
    assert video.shape == (17, *((size, size) if isinstance(size, int) else size), 3)
    assert score(video, Scene("square", "green", "moves up")).all


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Scene("cube", "red", "grows"), "shape 'cube': use one of disc"),
        (lambda: Scene("disc", "pink", "grows"), "colour 'pink': use one of red"),
        (lambda: Scene("disc", "red", "jumps"), "motion 'jumps': use one of moves left"),
        (lambda: Scene("disc", "red", "turns clockwise"), "cannot be seen"),
        (lambda: Scene("disc", "red", "crosses"), "two objects cross"),
        (lambda: Scene("disc", "red", "crosses", ("disc", "red")), "different colours"),
        (lambda: parse_caption("red disc"), "caption 'red disc'"),
        (lambda: clip(0, "test"), "split 'test': use one of train, eval, unseen"),
        (lambda: clip(-1, "eval"), "seed -1: use 0 or more"),
        (lambda: render(Scene("disc", "red", "grows"), 0, 1), "1 frames of 64x64"),
        (lambda: read_scene(np.zeros((3, 8, 8), np.uint8)), "video of shape"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
