"""Frames are picked by time, and held where a video has no constant rate."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promag.data.video import at_constant_rate, pick_by_time

RATES = st.sampled_from([10, 12.5, 23.976, 24000 / 1001, 25, 29.97, 30000 / 1001, 50, 60000 / 1001])
TICKS = st.sampled_from([1 / 1000, 1 / 90_000, 1 / 12_800])


@given(fps=RATES, frames=st.integers(1, 500), jitter=st.floats(0, 0.4), seed=st.integers(0, 99))
def test_frames_near_a_constant_rate_are_shown_once(fps, frames, jitter, seed):
    stamps = (np.arange(frames) + np.random.default_rng(seed).uniform(0, jitter, frames)) / fps
    stamps -= stamps[0]
    rate, shown = at_constant_rate(stamps, (frames - 1) / stamps[-1] if frames > 1 else fps)
    assert shown.tolist() == list(range(frames))
    assert rate == pytest.approx(fps, rel=0.5 / max(1, frames - 1))


def test_held_frames_are_held():
    stamps = np.array([0, 0.1, 0.2, 1.2, 1.3])
    rate, shown = at_constant_rate(stamps, 4 / 1.3)
    assert rate == pytest.approx(10)
    assert shown.tolist() == [0, 1, *[2] * 10, 3, 4]
    rate, shown = at_constant_rate(np.array([0, 0.001, 2]), 1.0, max_rate=5)
    assert (rate, shown.tolist()) == (5, [*[1] * 10, 2])


@given(fps=RATES, tick=TICKS, frames=st.integers(2, 2000), single=st.booleans())
def test_at_its_own_rate_every_frame_is_picked_once(fps, tick, frames, single):
    stamps = np.round(np.arange(frames) / fps / tick) * tick
    own = (frames - 1) / stamps[-1]
    if single:  # as decord gives them
        stamps = stamps.astype(np.float32).astype(np.float64)
    np.testing.assert_array_equal(pick_by_time(stamps, np.arange(frames) / own), np.arange(frames))


@given(gaps=st.lists(st.floats(0.004, 2.0), min_size=1, max_size=60))
def test_at_their_own_times_variable_frames_are_picked_once(gaps):
    stamps = np.cumsum([0.0, *gaps])
    np.testing.assert_array_equal(pick_by_time(stamps, stamps.astype(np.float32)), np.arange(len(stamps)))


@given(gaps=st.lists(st.floats(0.004, 2.0), min_size=1, max_size=30), parts=st.lists(st.floats(0, 1), min_size=1))
@settings(max_examples=50)
def test_the_picked_frame_is_the_nearest(gaps, parts):
    stamps = np.cumsum([0.0, *gaps])
    times = np.array(parts) * stamps[-1]
    away = np.abs(times - stamps[pick_by_time(stamps, times)])
    nearest = np.abs(times[:, None] - stamps).min(axis=1)
    assert np.all(away <= nearest + 0.02 * max(gaps))


@given(fps=RATES, tick=st.sampled_from([1 / 90_000, 1 / 12_800]), keep=st.integers(2, 6))
def test_a_divided_rate_takes_every_nth_frame(fps, tick, keep):
    stamps = np.round(np.arange(120) / fps / tick) * tick
    np.testing.assert_array_equal(pick_by_time(stamps, np.arange(120 // keep) * keep / fps), np.arange(120 // keep) * keep)


@given(fps=RATES, noise=st.floats(-0.005, 0.005))
def test_a_tie_between_two_frames_takes_the_earlier_one(fps, noise):
    stamps = np.arange(10) / fps
    np.testing.assert_array_equal(pick_by_time(stamps, (np.arange(9) + 0.5 + noise) / fps), np.arange(9))


@pytest.mark.parametrize("time", [-0.03, 0.43, 7.0])
def test_a_time_outside_is_refused(time):
    with pytest.raises(ValueError, match=r"frames from 0\.0000 to 0\.4000 s"):
        pick_by_time(np.arange(11) * 0.04, [0.2, time])
    assert pick_by_time(np.arange(11) * 0.04, [-0.019, 0.419]).tolist() == [0, 10]
