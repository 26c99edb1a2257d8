import numpy as np
import pytest

from promag.pipelines.prompt_accuracy import accuracies, scenes_to_score
from promag.training.shapes import is_held_out, render


def test_true_clips_are_right_and_each_wrong_part_is_counted():
    scenes = scenes_to_score(12, seed=3)
    videos = [render(scene, i, frames=17) for i, scene in enumerate(scenes)]
    assert all(accuracies(videos, scenes)[part][0] == 1 for part in ("shape", "colour", "motion", "all"))
    still = [np.repeat(video[:1], 17, 0) for video in videos]
    assert accuracies(still, scenes)["motion"][0] == 0
    share, low, high = accuracies(videos[:6] + still[6:], scenes)["all"]
    assert share == pytest.approx(0.5)
    assert 0 < low < 0.5 < high < 1


def test_scenes_are_decided_by_the_seed_and_the_split():
    assert scenes_to_score(5, 0) == scenes_to_score(8, 0)[:5]
    assert scenes_to_score(8, 0) != scenes_to_score(8, 1)
    assert not any(is_held_out(scene) for scene in scenes_to_score(50, 0))
    assert all(is_held_out(scene) for scene in scenes_to_score(50, 0, held_out=True))
