"""Text-to-video on clips of several buckets: one normalisation, one bucket a batch, exact resume, a loss for each bucket."""

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from promag.data.buckets import Bucket
from promag.data.stream import TrainingStream
from promag.diffusion.config import DiffusionConfig
from promag.diffusion.flow import token_shift
from promag.diffusion.latent_cache import LatentDataset, LatentFingerprint, normalise_alike, write_latents
from promag.diffusion.objective import FlowObjective
from promag.diffusion.train import BucketCache, mixed, train_diffusion
from promag.training.command_line import parse_config
from promag.training.config import UserError, build, load_yaml
from promag.training.run import checkpoints, load_checkpoint

VIDEO, WIDE, IMAGE = Bucket(17, 16, 16), Bucket(17, 16, 32, 1), Bucket(1, 16, 16, 4)
CLIPS = {VIDEO: 6, WIDE: 3, IMAGE: 8}


def read(bucket, index):
    generator = torch.Generator().manual_seed(bucket.frames * 10000 + bucket.width * 100 + index)
    scale = 1 + bucket.width / 16  # so that buckets have statistics of their own
    video = torch.randn(3, bucket.frames, bucket.height, bucket.width, generator=generator) * scale + bucket.frames / 10
    return {"video": video, "caption": f"clip {index} of {bucket}", "fps": 8.0}


def encode(x, ratios):
    return [torch.cat([x, x[:, :1] * 2], 1)[:, :, ::ratio, ::8, ::8] for ratio in ratios]


def write(folder, bucket, ratio, count):
    clips = type("Clips", (), {"fixed": staticmethod(lambda index: read(bucket, index))})
    shape = (bucket.frames, bucket.height, bucket.width)
    place = folder / f"{ratio}x-{bucket}"
    fingerprint = LatentFingerprint("tokenizer", str(bucket), ratio, *shape, "float32", 3)
    return write_latents({place: fingerprint}, count, clips(), encode)[0]


@pytest.fixture(scope="module")
def cached(tmp_path_factory) -> list[BucketCache]:
    folder = tmp_path_factory.mktemp("cache")
    return [BucketCache(b, [write(folder, b, ratio, n) for ratio in (16, 8)], {}) for b, n in CLIPS.items()]


def configuration(folder: Path, **change) -> DiffusionConfig:
    values = load_yaml("configs/diffusion/tiny.yaml")
    values["data"] |= {"frames": 17, "size": 16, "buckets": [dataclasses.asdict(b) for b in CLIPS]}
    values["model"] |= {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": [1, 1, 1]}
    values["text"] |= {"width": 16, "layers": 1, "heads": 2}
    values["optimization"] |= {"steps": 8, "batch_size": 2, "warmup": 1}
    values["run"] |= {"log_every": 1, "validate_every": 8, "save_every": 4, "workers": 0, "trackers": []}
    values |= {"output_dir": str(folder), "precision": "fp32", "samples": None}
    values |= {"budgets": [{"ratio": 16, "share": 3.0}, {"ratio": 8, "share": 1.0}]}
    values |= {"condition": {"probability": 0.5, "frames": 1}, **change}
    return build(DiffusionConfig, values, "test")


def test_all_buckets_of_a_ratio_share_their_latent_statistics(cached):
    for scale in ("channel", "global"):
        parts = [LatentDataset(part.latents[0], scale=scale) for part in cached]
        raw = [part.fixed(i)["latents"] * part.std + part.mean for part in parts for i in range(len(part))]
        every = torch.cat([x.flatten(1) for x in raw], 1).double()
        normalise_alike(parts, scale)
        std = every.std(1, correction=0)
        std = std if scale == "channel" else std.square().mean().sqrt().expand(4)
        for part in parts:
            assert torch.allclose(part.mean.flatten().double(), every.mean(1), atol=1e-5)
            assert torch.allclose(part.std.flatten().double(), std, rtol=1e-5)


def test_a_batch_has_one_bucket_and_ratio_on_all_ranks(cached, tmp_path):
    """Each clip is shown equally often: a bucket's share of the steps is its share of the batches."""
    latents = [[LatentDataset(folder) for folder in part.latents] for part in cached]
    source, plan = mixed(configuration(tmp_path), list(CLIPS), latents)
    assert [line.split() for line in plan.splitlines()[1:]] == [
        ["17x16x16", "6", "2", "37.5%"],
        ["17x16x32", "3", "1", "37.5%"],
        ["1x16x16", "8", "4", "25.0%"],
    ]
    streams = [TrainingStream(source, 5, 2, rank, 2) for rank in (0, 1)]
    seen, numbers, steps = Counter(), [], 200
    for step in range(steps):
        one, other = (stream.batch(step) for stream in streams)
        assert one["latents"].shape == other["latents"].shape
        assert set(one["ratio"].tolist()) == set(other["ratio"].tolist())
        numbers += [*one["sample"].tolist(), *other["sample"].tolist()]
        seen[tuple(one["latents"].shape), int(one["ratio"][0])] += 1
    assert len(numbers) == len(set(numbers))
    expected = {
        ((2, 4, 2, 2, 2), 16): 0.375 * 0.75,
        ((2, 4, 3, 2, 2), 8): 0.375 * 0.25,
        ((1, 4, 2, 2, 4), 16): 0.375 * 0.75,
        ((1, 4, 3, 2, 4), 8): 0.375 * 0.25,
        ((4, 4, 1, 2, 2), 16): 0.25 * 0.75,
        ((4, 4, 1, 2, 2), 8): 0.25 * 0.25,
    }
    assert seen.keys() == expected.keys()
    for key, share in expected.items():
        assert seen[key] / steps == pytest.approx(share, abs=4 / steps)


def test_processes_may_replace_accumulation_and_each_clip_comes_once_an_epoch(cached, tmp_path):
    latents = [[LatentDataset(folder) for folder in part.latents] for part in cached]
    source, _ = mixed(configuration(tmp_path), list(CLIPS), latents)

    def rows(world, accumulate):
        streams = [TrainingStream(source, 5, 2, rank, world, 0, accumulate) for rank in range(world)]
        batches = [s.batch(k * accumulate + part) for k in range(40) for part in range(accumulate) for s in streams]
        keys = ("sample", "ratio", "clip")
        return [row for b in batches for row in zip(b["caption"], *(b[key].tolist() for key in keys), strict=True)]

    whole = rows(1, 2)
    assert whole == rows(2, 1)
    for bucket, count in CLIPS.items():
        drawn = [row[0] for row in whole if row[0].endswith(f"of {bucket}")]
        epochs = [drawn[k : k + count] for k in range(0, len(drawn) - count + 1, count)]
        assert len(epochs) > 3
        assert all(len(set(epoch)) == count for epoch in epochs)


def test_the_time_shift_follows_the_tokens_of_each_bucket():
    transformer = type("Shape", (torch.nn.Module,), {"config": {"patch_size": (1, 2, 2)}})()
    values = type("Values", (), {})()
    values.learning_rate = 1.0
    for name in ("text", "optimization"):
        setattr(values, name, values)
    values.caption_dropout, values.shift, values.base_ahead, values.condition = 0.0, 3.0, 0.0, None
    objective = FlowObjective(transformer, torch.nn.Module(), values)  # pyright: ignore[reportArgumentType]
    for shape, tokens in (((1, 4, 2, 8, 8), 32), ((3, 4, 5, 8, 16), 160), ((1, 4, 1, 8, 8), 16)):
        assert objective.mu(torch.zeros(shape)) == token_shift(tokens, 3.0)
    assert objective.mu(torch.zeros(1, 4, 4, 8, 8)) - objective.mu(torch.zeros(1, 4, 1, 8, 8)) == pytest.approx(math.log(2))


def test_training_on_several_buckets_resumes_bit_for_bit_and_logs_the_loss_of_each(cached, tmp_path):
    half = {"log_every": 1, "validate_every": 8, "save_every": 4, "workers": 1, "trackers": [], "stop_after": 4}
    whole = configuration(tmp_path / "whole")
    train_diffusion(whole, cached, cached)
    parts = configuration(tmp_path / "parts", run={**load_yaml("configs/diffusion/tiny.yaml")["run"], **half})
    for _ in range(2):
        train_diffusion(parts, cached, cached)
    ends = [load_checkpoint(checkpoints(tmp_path / name / "16x-8x")[-1])[0] for name in ("whole", "parts")]
    for group, tensors in ends[0].items():
        assert all(torch.equal(value, ends[1][group][name]) for name, value in tensors.items()), group
    lines = [json.loads(line) for line in (tmp_path / "whole" / "16x-8x" / "metrics.jsonl").read_text().splitlines()]
    (losses,) = (
        {k: v for k, v in line.items() if k.startswith("validation_loss")} for line in lines if "validation_loss" in line
    )
    shapes = {f"validation_loss_{bucket}": count for bucket, count in CLIPS.items()}
    ratios = [losses[f"validation_loss_{ratio}x"] for ratio in (16, 8)]
    assert losses.keys() == {
        "validation_loss",
        "validation_loss_16x",
        "validation_loss_8x",
        "validation_loss_first_given",
        *shapes,
    }
    assert losses["validation_loss"] == pytest.approx(np.mean(ratios))
    by_clip = sum(losses[name] * count for name, count in shapes.items()) / sum(shapes.values())
    assert losses["validation_loss"] == pytest.approx(by_clip)


def test_budgets_of_latents_with_other_channels_are_refused(tmp_path):
    def wider(x, ratios):
        return [torch.cat([latents, latents], 1) for latents in encode(x, ratios)]

    fingerprint = LatentFingerprint("tokenizer", "wide", 8, 17, 16, 16, "float32", 3)
    clips = type("Clips", (), {"fixed": staticmethod(lambda index: read(VIDEO, index))})
    dual = write_latents({tmp_path / "wide": fingerprint}, 4, clips(), wider)[0]
    caches = [BucketCache(VIDEO, [write(tmp_path, VIDEO, 16, 4), dual], {})]
    config = configuration(tmp_path / "run")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, buckets=None))
    with pytest.raises(UserError, match=r"their latents have \[4, 8\] channels; one model needs one number"):
        train_diffusion(config, caches, caches)


@pytest.mark.parametrize("name", ["synthetic_clips", "validation_clips", "shard_size"])
def test_no_clips_at_all_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"data.{name} 0: at least 1 clip is needed"):
        dataclasses.replace(configuration(tmp_path).data, **{name: 0})


@pytest.mark.parametrize(
    ("buckets", "message"),
    [
        ([(17, 16, 32, None)], "buckets 17x16x32: each once, 17x16x16"),
        ([(17, 16, 16, None), (17, 16, 16, 2)], "each once"),
        ([(17, 16, 16, None), (12, 16, 16, None)], "12 frames: 16x needs"),
        ([(17, 16, 16, None), (33, 16, 20, None)], "20"),
    ],
)
def test_illegal_buckets_are_named(tmp_path, buckets, message):
    config = configuration(tmp_path)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, data=dataclasses.replace(config.data, buckets=tuple(Bucket(*b) for b in buckets)))


def test_the_only_bucket_need_not_be_square(tmp_path):
    data = dataclasses.replace(configuration(tmp_path).data, size=(16, 32), buckets=(WIDE,))
    assert data.default_bucket == WIDE
    assert dataclasses.replace(data, buckets=None).training_buckets == (Bucket(17, 16, 32),)


SIDES = st.integers(1, 64).map(lambda number: 16 * number)


@settings(max_examples=20, deadline=None)
@given(height=SIDES, width=SIDES)
def test_a_size_is_one_number_or_two_words_or_a_list(height, width):
    for words, shape in (
        ([str(height)], (height, height)),
        ([f"[{height}]"], (height, height)),
        ([str(height), str(width)], (height, width)),
        ([f"[{height}, {width}]"], (height, width)),
    ):
        config = parse_config(DiffusionConfig, ["--config", "diffusion/tiny", "--data.size", *words], "")
        bucket = config.data.default_bucket
        assert (bucket.height, bucket.width) == shape


@pytest.mark.parametrize("size", ["[16, 16, 16]", "[]", "16.5", "true", "null", "wide"])
def test_what_is_no_size_is_refused(size):
    with pytest.raises(UserError, match=r"data\.size: .*one number of pixels for height and width, or \[height, width\]"):
        parse_config(DiffusionConfig, ["--config", "diffusion/tiny", "--data.size", size], "")
