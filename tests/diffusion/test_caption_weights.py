import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from promag.data.datasets import TrainingStream
from promag.data.synthetic import sample_scene
from promag.diffusion.caption_weights import CaptionWeight, CaptionWeightedSampler
from promag.diffusion.latent_cache import LatentDataset, LatentFingerprint, weight_by_caption, write_latents
from promag.training.config import UserError
from tests.diffusion.test_latent_cache import Clips, encode

CAPTIONS = ["a red disc grows", "a red plus turns clockwise", "a blue plus turns", "a disc overturns"]


@pytest.mark.parametrize(
    ("words", "caption", "held"),
    [
        ("turns", "a plus turns clockwise", True),
        ("turns", "a boat overturns", False),
        ("turns", "he returns, and TURNS.", True),
        ("turns clockwise", "it turns  clockwise", True),
        ("turns clockwise", "it turns counterclockwise", False),
        ("c++ (code)", "a slide of C++ (code), then none", True),
        ("čtyři", "Čtyři koně", True),
    ],
)
def test_words_are_whole_and_in_order(words, caption, held):
    assert CaptionWeight(words, 2.0).holds(caption) == held


@pytest.mark.parametrize(
    ("words", "factor"), [("", 2.0), (" ", 2.0), ("a", 0.0), ("a", -1.0), ("a", float("inf")), ("a", float("nan"))]
)
def test_an_emphasis_that_cannot_be_meant_is_refused(words, factor):
    with pytest.raises(ValueError, match=re.escape(repr(words))):
        CaptionWeight(words, factor)


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=2), st.integers(0, 2**32))
def test_a_clip_is_drawn_where_the_sum_of_weights_passes_the_random_number(factors, seed):
    drawn = CaptionWeightedSampler(CAPTIONS, [CaptionWeight("turns", factors[0]), CaptionWeight("red", factors[1])])
    weights = np.array([factors[1], factors[0] * factors[1], factors[0], 1.0])
    assert np.allclose(np.diff(drawn.ends, prepend=0), weights)
    assert drawn.found.tolist() == [2, 2]
    place = np.random.default_rng(seed).uniform(0, drawn.ends[-1])
    number = drawn.draw(np.random.default_rng(seed))
    assert weights[:number].sum() <= place + 1e-9
    assert place < weights[: number + 1].sum() + 1e-9


def test_clips_come_as_often_as_their_weights_say():
    drawn, rng = CaptionWeightedSampler(CAPTIONS, [CaptionWeight("turns", 3.0)]), np.random.default_rng(0)
    counts = Counter(drawn.draw(rng) for _ in range(8000))
    for number, weight in enumerate((1, 3, 3, 1)):
        assert abs(counts[number] / 8000 - weight / 8) < 5 * (weight / 8 * (1 - weight / 8) / 8000) ** 0.5


@pytest.fixture
def by_bucket(tmp_path):
    """Two buckets, of captions 0 to 2 and of all, each at two ratios."""
    found = []
    for bucket, count in (("a", 3), ("b", 7)):
        caches = {
            tmp_path / f"{bucket}{ratio}": LatentFingerprint("tokenizer", "clips", ratio, 17, 8, 8, "float32", 3)
            for ratio in (16, 8)
        }
        found.append([LatentDataset(folder) for folder in write_latents(caches, count, Clips(), encode)])
    return found


def test_every_ratio_draws_the_same_clips_and_no_emphasis_changes_nothing(by_bucket):
    plain = [[parts[0].item(np.random.default_rng(n))["clip"] for n in range(20)] for parts in by_bucket]
    weight_by_caption(by_bucket, ())
    assert plain == [[parts[0].item(np.random.default_rng(n))["clip"] for n in range(20)] for parts in by_bucket]
    weight_by_caption(by_bucket, [CaptionWeight("6", 1e6)])  # the caption of clip 6, which the first bucket has not
    a, b = ([[part.item(np.random.default_rng(n))["clip"] for n in range(20)] for part in parts] for parts in by_bucket)
    assert a[0] == a[1]
    assert set(a[0]) == {0, 1, 2}
    assert b[0] == b[1]
    assert set(b[0]) == {6}
    assert TrainingStream(by_bucket[1][0], 0, 4, 0, 1).batch(3)["caption"] == ["6"] * 4


def test_words_that_no_bucket_holds_are_named(by_bucket):
    with pytest.raises(UserError, match="caption_weights on 'walrus': none of the 10 captions holds these words"):
        weight_by_caption(by_bucket, [CaptionWeight("6", 2.0), CaptionWeight("walrus", 2.0)])


def test_turning_clips_of_the_generator_are_found_by_their_caption():
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(200)]
    turns = CaptionWeight("turns", 2.0)
    assert [turns.holds(scene.caption()) for scene in scenes] == [scene.motion.startswith("turns") for scene in scenes]
