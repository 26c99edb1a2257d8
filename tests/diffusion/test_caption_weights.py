import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from promag.data.buckets import Bucket
from promag.data.stream import TrainingStream
from promag.data.synthetic import sample_scene
from promag.diffusion.caption_weights import CaptionWeight, clip_weights
from promag.diffusion.latent_cache import LatentDataset, LatentFingerprint, weight_by_caption, write_latents
from promag.diffusion.train import mixed
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
def test_invalid_caption_weights_are_refused(words, factor):
    with pytest.raises(ValueError, match=re.escape(repr(words))):
        CaptionWeight(words, factor)


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=2))
def test_the_factors_of_all_words_in_a_caption_multiply(factors):
    weights, counts = clip_weights(CAPTIONS, [CaptionWeight("turns", factors[0]), CaptionWeight("red", factors[1])])
    assert weights.tolist() == pytest.approx([factors[1], factors[0] * factors[1], factors[0], 1.0])
    assert counts.tolist() == [2, 2]


@pytest.fixture
def by_bucket(tmp_path):
    """Two buckets, one with captions 0 to 2 and one with all captions, each at two ratios."""
    datasets = []
    for bucket, count in (("a", 3), ("b", 7)):
        caches = {
            tmp_path / f"{bucket}{ratio}": LatentFingerprint("tokenizer", "clips", ratio, 17, 8, 8, "float32", 3)
            for ratio in (16, 8)
        }
        datasets.append([LatentDataset(folder) for folder in write_latents(caches, count, Clips(), encode)])
    return datasets


def clips(latents, count):
    return [clip for k in range(count) for clip in TrainingStream(latents, 0, 1, 0, 1).batch(k)["clip"].tolist()]


def test_clips_are_drawn_by_the_weights_of_their_captions(by_bucket):
    weight_by_caption(by_bucket, ())
    assert Counter(clips(by_bucket[1][0], 14)) == dict.fromkeys(range(7), 2)
    weight_by_caption(by_bucket, [CaptionWeight("6", 4), CaptionWeight("a", 0.5)])  # clips 6 and 0; the first bucket has no 6
    for latents in by_bucket[1]:
        assert Counter(clips(latents, 38)) == {0: 2, **dict.fromkeys(range(1, 6), 4), 6: 16}
    assert clips(by_bucket[1][0], 30) == clips(by_bucket[1][1], 30)
    assert Counter(clips(by_bucket[0][0], 5)) == {0: 1, 1: 2, 2: 2}


def test_steps_of_a_bucket_are_proportional_to_its_clips_weights(by_bucket):
    weight_by_caption(by_bucket, [CaptionWeight("6", 12)])
    config = SimpleNamespace(seed=0, optimization=SimpleNamespace(batch_size=1), budgets=[SimpleNamespace(share=1.0)] * 2)
    buckets = [Bucket(17, 8, 8, None), Bucket(33, 8, 8, None)]
    mixture, plan = mixed(config, buckets, by_bucket)  # pyright: ignore[reportArgumentType]
    assert mixture.shares == pytest.approx([3 / 42, 3 / 42, 18 / 42, 18 / 42])
    assert [line.split()[1::2] for line in plan.splitlines()[1:]] == [["3", "14.3%"], ["7", "85.7%"]]
    stream = TrainingStream(mixture, 0, 1, 0, 1)
    drawn = Counter(caption for k in range(210) for caption in stream.batch(k)["caption"])
    assert drawn["6"] == pytest.approx(120, abs=2)  # 12 times as often as a clip of either bucket without a weight
    assert drawn["5"] == pytest.approx(10, abs=1)


def test_words_that_no_bucket_holds_are_named(by_bucket):
    with pytest.raises(UserError, match="caption_weights on 'walrus': none of the 10 captions holds these words"):
        weight_by_caption(by_bucket, [CaptionWeight("6", 2.0), CaptionWeight("walrus", 2.0)])


def test_the_caption_word_turns_matches_all_turning_clips():
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(200)]
    turns = CaptionWeight("turns", 2.0)
    assert [turns.holds(scene.caption()) for scene in scenes] == [scene.motion.startswith("turns") for scene in scenes]
