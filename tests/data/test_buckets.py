"""Each clip is in the bucket that fits its length and size."""

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from promag.data.buckets import NONE, Bucket, Buckets, bucket_plan
from promag.training.config import UserError

SIDES = (64, 128, 192)
shape = st.tuples(st.sampled_from([1, 17, 33]), st.sampled_from(SIDES), st.sampled_from(SIDES))
clip = st.tuples(st.integers(1, 80), st.integers(16, 400), st.integers(16, 400))


def buckets_of(*shapes, stride=1):
    return Buckets([Bucket(*s) for s in shapes], stride)


def assign(buckets, *clips):
    return buckets.assign(*np.array(clips).T).tolist()


@pytest.mark.parametrize(
    ("clip", "chosen"),
    [
        ((60, 720, 1280), (17, 144, 256)),  # the longest one, the same aspect ratio, the largest
        ((60, 140, 250), (17, 72, 128)),  # the larger one would enlarge it
        ((60, 40, 64), (17, 72, 128)),  # both would: the smaller
        ((60, 300, 310), (17, 128, 128)),
        ((60, 800, 600), (17, 128, 128)),
        ((16, 720, 1280), (1, 144, 256)),  # too short for 17 frames
        ((1, 500, 400), (1, 144, 256)),
    ],
)
def test_the_bucket_of_a_clip(clip, chosen):
    shapes = [(1, 144, 256), (17, 72, 128), (17, 128, 128), (17, 144, 256)]
    assert shapes[assign(buckets_of(*shapes), clip)[0]] == chosen


def test_a_clip_must_have_the_frames_that_the_smallest_stride_needs():
    shapes = [(17, 64, 64), (5, 64, 64)]
    clips = [(33, 64, 64), (32, 64, 64), (9, 64, 64), (8, 64, 64)]
    assert assign(buckets_of(*shapes, stride=2), *clips) == [0, 1, 1, NONE]
    assert assign(buckets_of(*shapes), *clips) == [0, 0, 1, 1]


def test_bad_samples_of_shards_are_in_no_bucket():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert assign(buckets_of((1, 64, 64), (17, 64, 64)), (0, 0, 0), (20, 64, 64)) == [NONE, 1]


@given(st.lists(shape, min_size=1, max_size=6, unique=True), st.lists(clip, min_size=1, max_size=30))
def test_a_clip_is_in_the_best_bucket_in_any_order(shapes, clips):
    assigned = assign(buckets_of(*shapes), *clips)
    backwards = assign(buckets_of(*reversed(shapes)), *clips)
    for (frames, height, width), place, other in zip(clips, assigned, backwards, strict=True):
        fitting = [s for s in shapes if s[0] <= frames]
        if not fitting:
            assert place == other == NONE
            continue
        chosen = shapes[place]
        longest = [s for s in fitting if s[0] == max(t for t, _, _ in fitting)]
        unlike = [abs(np.log(s[2] / s[1]) - np.log(width / height)) for s in longest]
        nearest = [s for s, d in zip(longest, unlike, strict=True) if d == min(unlike)]
        fine = [s for s in nearest if s[1] <= height and s[2] <= width]
        area = max(h * w for _, h, w in fine) if fine else min(h * w for _, h, w in nearest)
        assert chosen in (fine or nearest)
        assert chosen[1] * chosen[2] == area
        if sum(s[1] * s[2] == area for s in fine or nearest) == 1:
            assert list(reversed(shapes))[other] == chosen


def test_counts_and_long_lists():
    buckets = buckets_of((1, 64, 64), (17, 64, 64), (33, 64, 64))
    frames = np.tile([1, 20, 3, 17], 50_000)
    assigned = buckets.assign(frames, np.full(200_000, 64), np.full(200_000, 64))
    assert np.bincount(assigned, minlength=3).tolist() == [100_000, 100_000, 0]
    assert Buckets([Bucket(1, 8, 8), Bucket(5, 8, 8, 3)]).batch_sizes(7) == [7, 3]


def test_the_plan_is_described():
    buckets = [Bucket(1, 256, 256, 32), Bucket(17, 128, 224)]
    assert bucket_plan(buckets, [640, 8000], [32, 8], [20, 1000]).splitlines() == [
        "bucket      clips  batch  steps",
        "1x256x256     640     32   2.0%",
        "17x128x224   8000      8  98.0%",
    ]


@pytest.mark.parametrize("values", [(0, 8, 8, None), (1, 0, 8, None), (1, 8, -8, None), (1, 8, 8, 0)])
def test_invalid_buckets_are_refused(values):
    with pytest.raises(ValueError, match="from 1 up"):
        Bucket(*values)


@pytest.mark.parametrize("shapes", [[], [(1, 8, 8), (1, 8, 8)]])
def test_buckets_differ(shapes):
    with pytest.raises(UserError, match="each shape once"):
        buckets_of(*shapes)
