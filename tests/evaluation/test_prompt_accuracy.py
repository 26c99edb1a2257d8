import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DecoderOutput

from promag.data.datasets import SyntheticDataset
from promag.data.synthetic import is_unseen, parse_caption, render
from promag.evaluation.prompt_accuracy import accuracies, accuracies_of_reconstructions, accuracy_figures, scenes_to_score


def test_true_clips_are_right_and_each_wrong_part_is_counted():
    scenes = scenes_to_score(12, seed=3)
    videos = [render(scene, i, frames=17) for i, scene in enumerate(scenes)]
    assert all(accuracies(videos, scenes)[part][0] == 1 for part in ("shape", "colour", "motion", "all"))
    still = [np.repeat(video[:1], 17, 0) for video in videos]
    assert accuracies(still, scenes)["motion"][0] == 0
    share, low, high = accuracies(videos[:6] + still[6:], scenes)["all"]
    assert share == pytest.approx(0.5)
    assert 0 < low < 0.5 < high < 1


def test_right_videos_are_counted_by_the_motion_asked_for():
    scenes = [parse_caption(f"a red {words}") for words in ("plus grows", "disc grows", "plus turns clockwise", "disc circles")]
    videos = [render(scene, i, frames=17) for i, scene in enumerate(scenes)]
    videos[2] = videos[2][:1].repeat(17, 0)
    videos[0] = render(parse_caption("a blue plus grows"), 0, frames=17)
    figures = accuracy_figures(videos, scenes)
    assert figures["right_by_motion"] == {"turns clockwise": (0, 1), "circles": (1, 1), "grows": (1, 2)}
    assert figures["accuracy"] == accuracies(videos, scenes)


def test_seed_and_split_determine_the_scenes():
    assert scenes_to_score(5, 0) == scenes_to_score(8, 0)[:5]
    assert scenes_to_score(8, 0) != scenes_to_score(8, 1)
    assert not any(is_unseen(scene) for scene in scenes_to_score(50, 0))
    assert all(is_unseen(scene) for scene in scenes_to_score(50, 0, unseen=True))


def test_the_upper_limit_is_the_accuracy_of_reconstructions():
    items = [SyntheticDataset("eval", 12, frames=17, size=64).fixed(i) for i in range(12)]

    class Exact(torch.nn.Module):  # a tokenizer without loss, except that 16x and above lose the motion
        device = torch.device("cpu")

        def forward(self, x, temporal_ratio):
            return DecoderOutput(sample=x if temporal_ratio < 16 else x[:, :, :1].expand_as(x))

    assert accuracies_of_reconstructions(Exact(), items, 4)["all"][0] == 1
    frozen = accuracies_of_reconstructions(Exact(), items, 16)
    assert frozen["motion"][0] == 0
    assert frozen["colour"][0] == 1
