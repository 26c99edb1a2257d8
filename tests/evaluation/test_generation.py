import pytest
import torch

from promag.data.datasets import open_dataset
from promag.evaluation.generation import generation_figures
from promag.evaluation.prompt_accuracy import accuracies, scenes_to_score
from promag.tokenizer.metrics import from_uint8
from promag.tokenizer.perceptual import frechet_distance
from tests.tiny_pipeline import make_pipeline


def features(clips):
    return torch.stack([clips.mean((1, 2, 3, 4)), clips.std((1, 2, 3, 4))], 1).double()


def test_figures_come_from_every_video_and_its_prompt():
    pipe, pairs = make_pipeline(height=32, width=40), []

    def similarity(video, prompt):
        pairs.append((video, prompt))
        return 0.1 * len(pairs)

    figures = generation_figures(pipe, 16, prompts=4, steps=1, guidance=2.0, similarity=similarity, features=features)
    scenes = scenes_to_score(4, seed=0)
    assert [prompt for _, prompt in pairs] == [scene.caption() for scene in scenes]
    assert figures["clip_similarity"] == pytest.approx(0.25)
    videos = [video for video, _ in pairs]
    assert figures["accuracy"] == accuracies(videos, scenes)
    assert figures["sampling_seconds"] > 0
    clips = open_dataset("synthetic", "eval", len(videos[0]), videos[0].shape[1:3], 4)
    true = torch.cat([features(clips.fixed(i)["video"][None]) for i in range(4)])
    sampled = torch.cat([features(from_uint8(torch.from_numpy(video[None]))) for video in videos])
    assert figures["fvd"] == pytest.approx(frechet_distance(true, sampled))
    assert figures["fvd"] > 0


def test_the_first_call_at_a_ratio_is_not_timed(monkeypatch):
    pipe, now, calls = make_pipeline(height=32, width=32), [0.0], []

    def cold_start(*_):
        now[0] += 1 if calls else 1000
        calls.append(now[0])

    monkeypatch.setattr("promag.pipelines.sampling.time.perf_counter", lambda: now[0])
    pipe.transformer.register_forward_pre_hook(cold_start)
    figures = generation_figures(pipe, 16, prompts=1, steps=3, guidance=1.0, precision="fp32")
    assert len(calls) == 1 + 3
    assert figures["sampling_seconds"] == 3


def test_a_pipeline_is_sampled_as_it_states_and_the_figures_say_so():
    videos = []

    def keep(video, prompt):
        videos.append(video)
        return 0.0

    pipe = make_pipeline(num_inference_steps=3, guidance_scale=1.0)
    own = generation_figures(pipe, 16, prompts=1, similarity=keep, precision="fp32")
    assert (own["steps"], own["guidance"]) == (3, 1.0)
    assert generation_figures(pipe, 16, 1, 3, 1.0, keep, precision="fp32")["steps"] == 3
    assert generation_figures(pipe, 16, 1, 2, 4.0, keep, precision="fp32")["guidance"] == 4.0
    assert (videos[0] == videos[1]).all()
    assert (videos[0] != videos[2]).any()


def test_figures_that_need_models_are_none_without_them():
    figures = generation_figures(make_pipeline(), 16, prompts=1, steps=1, guidance=1.0, features=features)
    assert figures["clip_similarity"] is None
    assert figures["fvd"] is None  # one video has no covariance
