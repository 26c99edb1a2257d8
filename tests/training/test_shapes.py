import dataclasses
import hashlib

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from promag.training.shapes import (
    COLOURS,
    MOTIONS,
    SHAPES,
    Scene,
    clip,
    is_held_out,
    legal_scenes,
    parse_caption,
    render,
    sample_scene,
)
from promag.training.shapes_scorer import Reading, chance, read_scene, score, wilson_interval

single_scenes = st.sampled_from(list(legal_scenes()))
objects = st.tuples(st.sampled_from(SHAPES), st.sampled_from(list(COLOURS)))


@st.composite
def scenes(draw):
    if draw(st.booleans()):
        return draw(single_scenes)
    (shape, colour), other = draw(objects), draw(objects)
    assume(colour != other[1])
    return Scene(shape, colour, "crosses", other)


@given(scenes())
def test_captions_can_be_parsed_back(scene):
    assert parse_caption(scene.caption()) == scene


def test_there_is_enough_to_tell_apart():
    assert (len(SHAPES), len(COLOURS), len(MOTIONS)) == (4, 6, 11)
    assert any(m.startswith("turns") for m in MOTIONS)
    assert any(m.startswith("bounces") for m in MOTIONS)
    assert "crosses" in MOTIONS


def test_clips_are_decided_by_their_arguments():
    digests = {}
    for split in ("train", "eval", "held_out"):
        for seed in range(4):
            (a, scene), (b, again) = clip(seed, split, 9, 32), clip(seed, split, 9, 32)
            assert scene == again
            assert np.array_equal(a, b)
            digests[hashlib.sha256(a.tobytes()).hexdigest()] = (split, seed)
    assert len(digests) == 12


def test_held_out_combinations_are_spread_and_never_trained_on():
    every = list(legal_scenes())
    held = [s for s in every if is_held_out(s)]
    assert 0.05 < len(held) / len(every) < 0.2
    trained = [s for s in every if not is_held_out(s)]
    for part, legal in (("shape", SHAPES), ("colour", COLOURS), ("motion", MOTIONS[:-1])):
        assert {getattr(s, part) for s in trained} == set(legal)
    rng = np.random.default_rng(0)
    assert not any(is_held_out(sample_scene(rng, held_out=False)) for _ in range(300))
    assert all(is_held_out(sample_scene(rng, held_out=True)) for _ in range(50))
    assert all(is_held_out(clip(i, "held_out", 2, 32)[1]) for i in range(10))


def test_a_crossing_is_held_out_with_either_object():
    out = next(
        Scene(s, c, "crosses", (s, "red" if c != "red" else "blue"))
        for s in SHAPES
        for c in COLOURS
        if is_held_out(Scene(s, c, "crosses", (s, "red" if c != "red" else "blue")))
    )
    swapped = Scene(out.other[0], out.other[1], "crosses", (out.shape, out.colour))
    assert is_held_out(swapped)


@pytest.mark.parametrize(("frames", "count"), [(65, 60), (17, 120)])
def test_the_scorer_reads_true_clips(frames, count):
    right = [score(*clip(i, "eval", frames)).all for i in range(count)]
    assert np.mean(right) > 0.99


def test_the_scorer_reads_what_a_weak_autoencoder_leaves():
    rng = np.random.default_rng(0)
    right = []
    for i in range(80):
        video, scene = clip(i, "eval", 17)
        right.append(score(degrade(video, rng), scene).all)
    assert np.mean(right) > 0.97


def degrade(video, rng):
    """Blur by one pixel, a sixth less colour, noise."""
    kernel = np.exp(-(np.arange(-3, 4) ** 2) / 2)
    pixels = video.astype(np.float32)
    for axis in (1, 2):
        pixels = sum(k * np.roll(pixels, i - 3, axis) for i, k in enumerate(kernel / kernel.sum()))
    grey = pixels.mean(-1, keepdims=True)
    return (grey + 0.85 * (pixels - grey) + rng.normal(0, 4, pixels.shape)).clip(0, 255).astype(np.uint8)


@given(single_scenes, st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_any_one_mistake_is_told(scene, seed):
    video = render(scene, seed, 17)
    assert score(video, scene).all
    for part, legal in (("shape", SHAPES), ("colour", COLOURS), ("motion", MOTIONS[:-1])):
        for value in legal:
            if value == getattr(scene, part) or (value == "disc" and scene.motion.startswith("turns")):
                continue
            if value.startswith("turns") and scene.shape == "disc":
                continue
            wrong = score(video, dataclasses.replace(scene, **{part: value}))
            assert not getattr(wrong, part)
            assert not wrong.all


REVERSED = {
    "moves left": "moves right",
    "moves up": "moves down",
    "turns clockwise": "turns counterclockwise",
    "grows": "shrinks",
}
REVERSED |= {b: a for a, b in REVERSED.items()}


@given(scenes(), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_time_reversed_and_frozen_clips(scene, seed):
    video = render(scene, seed, 17)
    assert read_scene(video[::-1]).motion == REVERSED.get(scene.motion, scene.motion)
    assert read_scene(np.repeat(video[:1], 17, 0)).motion is None


@given(st.integers(0, 10**6))
@settings(max_examples=10, deadline=None)
def test_a_missing_or_miscoloured_second_object_is_told(seed):
    scene = Scene("disc", "red", "crosses", ("square", "blue"))
    video = render(scene, seed, 17)
    assert score(video, scene).all
    assert not score(video, dataclasses.replace(scene, other=("square", "green"))).colour
    assert not score(video, dataclasses.replace(scene, other=("plus", "blue"))).shape
    assert not score(video, Scene("square", "red", "crosses", ("disc", "blue"))).shape
    alone = render(Scene("disc", "red", "moves left"), seed, 17)
    assert not score(alone, scene).colour
    assert not score(alone, scene).motion


def test_nothing_is_read_where_nothing_is():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (17, 64, 64, 3), dtype=np.uint8)
    assert read_scene(np.zeros((17, 64, 64, 3), np.uint8)) == Reading()
    assert read_scene(np.full((17, 64, 64, 3), 127, np.uint8)) == Reading()
    reading = read_scene(noise)
    assert (reading.shape is None, reading.motion) in ((True, None), (False, None))


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
    assert chance() == pytest.approx({"shape": 1 / 4, "colour": 1 / 6, "motion": 1 / 11, "all": 1 / 264})


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
        (lambda: clip(0, "test"), "split 'test': use one of train, eval, held_out"),
        (lambda: render(Scene("disc", "red", "grows"), 0, 1), "1 frames of 64x64"),
        (lambda: read_scene(np.zeros((3, 8, 8), np.uint8)), "video of shape"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
