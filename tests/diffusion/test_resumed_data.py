"""A run records its training data, and a resumed run refuses other data by name."""

import dataclasses
import json

import pytest
import torch

from promag.data.buckets import Bucket
from promag.diffusion import train
from promag.diffusion.latent_cache import LatentFingerprint, write_latents
from promag.diffusion.text import learn_vocabulary, tokenize
from promag.training.config import UserError
from promag.training.run import checkpoints
from tests.diffusion.test_buckets import VIDEO, configuration, encode, read

CAPTIONS = ["a red disc moves left", "a blue square grows"]
PRINT = LatentFingerprint("tokenizer", "clips", 16, 17, 16, 16, "float32", 3)


def write(place, fingerprint=PRINT, captions=CAPTIONS):
    def fixed(index):
        return {**read(VIDEO, index), "caption": captions[index]}

    clips = type("Clips", (), {"fixed": staticmethod(fixed)})()
    return [train.BucketCache(VIDEO, write_latents({place: fingerprint}, len(captions), clips, encode), {})]


def settings(folder, stop_after=None):
    run = {"log_every": 1, "validate_every": 4, "save_every": 4, "keep_last": 1, "keep_every": None, "workers": 0}
    run |= {"trackers": [], "stop_after": stop_after, "distributed": "ddp", "peak_tflops": None}
    data = {"frames": 17, "size": 16, "buckets": [dataclasses.asdict(VIDEO)]}
    config = configuration(folder, run=run, budgets=[{"ratio": 16, "share": 1.0}])
    return dataclasses.replace(config, data=dataclasses.replace(config.data, buckets=(Bucket(**data["buckets"][0]),)))


@pytest.fixture
def started(tmp_path):
    cached = write(tmp_path / "cache")
    train.train_diffusion(settings(tmp_path / "run", 2), cached, cached)
    return tmp_path / "run", cached


@pytest.mark.parametrize(
    ("change", "named"),
    [({"tokenizer": "another"}, "train 17x16x16 16x tokenizer"), ({"clips": "more"}, "train 17x16x16 16x clips")],
)
def test_a_resumed_run_refuses_latents_of_another_tokenizer_or_of_other_clips(started, tmp_path, change, named):
    run, cached = started
    other = write(tmp_path / "other", dataclasses.replace(PRINT, **change))
    with pytest.raises(UserError, match=f"run .* was trained on other data: {named} differs.*use another --output-dir"):
        train.train_diffusion(settings(run), other, cached)
    with pytest.raises(UserError, match=named.replace("train", "eval")):
        train.train_diffusion(settings(run), cached, other)
    assert train.train_diffusion(settings(run), cached, cached).outcome.step == 8


def test_the_same_latents_in_another_folder_or_other_shards_resume(started, tmp_path):
    run, cached = started
    moved = write(tmp_path / "moved", dataclasses.replace(PRINT, shard_size=1))
    assert train.train_diffusion(settings(run), moved, cached).outcome.step == 8


def test_a_resumed_run_keeps_its_vocabulary(started, monkeypatch):
    run, cached = started
    monkeypatch.setattr(train, "learn_vocabulary", None)
    tokenizer, _ = train.train_diffusion(settings(run), cached, cached).small_text
    expected = learn_vocabulary(CAPTIONS, 1024, tokenizer.model_max_length)
    for key, ids in tokenize(expected, [*CAPTIONS, "an unseen word", ""]).items():
        assert torch.equal(ids, tokenize(tokenizer, [*CAPTIONS, "an unseen word", ""])[key])
    assert (tokenizer.pad_token, tokenizer.padding_side) == (expected.pad_token, expected.padding_side)


def test_another_vocabulary_is_refused(started):
    """Another release of tokenizers may learn another vocabulary, which the trained embeddings do not fit."""
    run, cached = started
    rules = json.loads((run / "vocabulary.json").read_text())
    rules["model"]["merges"] = rules["model"]["merges"][:-1]
    (run / "vocabulary.json").write_text(json.dumps(rules))
    with pytest.raises(UserError, match="was trained on other data: vocabulary differs"):
        train.train_diffusion(settings(run), cached, cached)
    assert checkpoints(run / "16x")[-1].name == "step-00000002"


def test_cut_captions_are_named_once_in_a_run(tmp_path, capsys):
    cached = write(tmp_path / "cache", captions=["a", "a red disc " * 40])
    for _ in range(2):
        train.train_diffusion(settings(tmp_path / "run", 1), cached, cached)
    out = capsys.readouterr().out
    assert out.count("captions: 1 of 2 texts have more than") == 1
