"""A batch depends only on its address; each clip comes once an epoch; ranks may replace accumulation."""

import dataclasses
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from promag.data.buckets import Bucket
from promag.data.clip_index import save_clips
from promag.data.datasets import ClipDataset, SyntheticDataset
from promag.data.epochs import ClipOrder
from promag.data.shards.stream import Sharding
from promag.data.shards.writer import write_shards
from promag.data.sources import Source, open_sources
from promag.data.stream import Mixture, TrainingStream
from promag.data.video import UnreadableVideo
from tests.processes import context


def taken(stream, steps, workers=0):
    loader = iter(DataLoader(stream, batch_size=None, num_workers=workers))
    try:
        return [next(loader) for _ in range(steps)]
    finally:
        if workers:  # else they are waited for when the traceback of an expected error is freed
            loader._shutdown_workers()


def same(one, other):
    assert one.keys() == other.keys()
    assert all(
        torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key] for key, value in one.items()
    )


@pytest.fixture(scope="module")
def dataset(clips):
    return ClipDataset(clips, 3, 16, temporal_strides=(1, 2))


def test_batches_do_not_depend_on_the_workers(dataset):
    stream = TrainingStream(dataset, seed=7, batch_size=2, rank=0, world_size=1)
    alone, helped = taken(stream, 5), taken(stream, 5, workers=2)
    assert [batch["step"] for batch in alone] == [0, 1, 2, 3, 4]
    for one, other in zip(alone, helped, strict=True):
        same(one, other)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_continues_at_any_step(dataset, workers):
    whole = taken(TrainingStream(dataset, 7, 2, 0, 1), 5)
    rest = taken(TrainingStream(dataset, 7, 2, 0, 1, first_batch=2), 3, workers)
    for one, other in zip(whole[2:], rest, strict=True):
        same(one, other)


def test_a_batch_is_its_addressed_items(dataset):
    batch = TrainingStream(dataset, 3, 4, rank=1, world_size=2).batch(9)
    order = ClipOrder(len(dataset), seed=3)
    numbers = range((9 * 2 + 1) * 4, (9 * 2 + 2) * 4)
    items = [dataset.item(order.clip(n), np.random.default_rng((3, n))) for n in numbers]
    assert batch["video"].shape == (4, 3, 3, 16, 16)
    assert torch.equal(batch["video"], torch.stack([item["video"] for item in items]))
    assert batch["caption"] == [item["caption"] for item in items]
    for key in ("clip", "start", "stride", "fps"):
        assert batch[key].tolist() == [item[key] for item in items]


def test_ranks_steps_and_seeds_differ(dataset):
    batches = [
        TrainingStream(dataset, seed, 8, rank, 2).batch(step)
        for seed, rank, step in [(0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0)]
    ]
    drawn = {tuple(zip(b["clip"].tolist(), b["start"].tolist(), b["stride"].tolist(), strict=True)) for b in batches}
    assert len(drawn) == 4


@pytest.mark.parametrize(
    ("rank", "world", "size", "first", "accumulate"),
    [(1, 1, 2, 0, 1), (-1, 1, 2, 0, 1), (0, 1, 0, 0, 1), (0, 1, 2, -1, 1), (0, 1, 2, 0, 0)],
)
def test_invalid_streams_are_refused(dataset, rank, world, size, first, accumulate):
    with pytest.raises(ValueError, match="are legal"):
        TrainingStream(dataset, 0, size, rank, world, first, accumulate)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_video_ends_training_and_is_named(clips, tmp_path, workers):
    path = tmp_path / "fades.mp4"
    shutil.copy(clips[0].path, path)
    dataset = ClipDataset([dataclasses.replace(clips[0], path=str(path))], 3, 16)
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(UnreadableVideo, match=r"fades\.mp4"):
        taken(TrainingStream(dataset, 0, 2, 0, 1), 1, workers)


# -- epochs ----------------------------------------------------------------------------------------------------------


class Named:
    """A dataset whose elements name their dataset and clip."""

    def __init__(self, name, clips=1000, weights=None):
        self.name, self.clips, self.weights = name, clips, weights

    def __len__(self):
        return self.clips

    def item(self, index, rng):
        return {"name": self.name, "clip": index, "number": int(rng.integers(1000))}


def clips_of(stream, batches):
    return [(name, clip) for b in map(stream.batch, batches) for name, clip in zip(b["name"], b["clip"].tolist(), strict=True)]


@pytest.mark.parametrize(("world", "size", "accumulate"), [(1, 1, 1), (1, 7, 3), (2, 5, 1), (3, 4, 2)])
def test_after_an_epoch_every_clip_was_seen_once(world, size, accumulate):
    """With random draws with replacement, 37 of 100 clips would not have been seen."""
    seen = Counter()
    streams = [TrainingStream(Named("a", 100), 0, size, rank, world, 0, accumulate) for rank in range(world)]
    samples, number = [], 0
    while len(samples) < 200:
        for part in range(accumulate):
            batches = [stream.batch(number + part) for stream in streams]
            samples += [pair for b in batches for pair in zip(b["sample"].tolist(), b["clip"].tolist(), strict=True)]
        number += accumulate
    assert [sample for sample, _ in samples] == list(range(len(samples)))
    for epoch in range(2):
        seen = Counter(clip for _, clip in samples[100 * epoch : 100 * (epoch + 1)])
        assert seen == dict.fromkeys(range(100), 1)


def test_generated_clips_and_those_of_an_index_come_once_an_epoch(dataset):
    for source in (dataset, SyntheticDataset("train", 5, frames=2, size=32)):
        stream = TrainingStream(source, 0, len(source), 0, 1)
        for epoch in range(3):
            assert sorted(stream.batch(epoch)["clip"].tolist()) == list(range(len(source)))


def test_a_mixture_takes_each_step_from_one_dataset_by_its_share():
    mixture = Mixture([Named("a"), Named("b", 30)], [3, 1])
    streams = [TrainingStream(mixture, 7, 2, rank, 2) for rank in (0, 1)]
    batches = [[stream.batch(step) for step in range(400)] for stream in streams]
    names = [[batch["name"] for batch in rank] for rank in batches]
    assert names[0] == names[1]  # ranks do equal work
    assert all(len(set(batch)) == 1 for batch in names[0])
    assert abs(sum(batch[0] == "a" for batch in names[0]) - 300) <= 2
    assert not torch.equal(batches[0][0]["number"], batches[1][0]["number"])
    resumed = iter(TrainingStream(mixture, 7, 2, 0, 2, first_batch=5))
    assert next(resumed)["name"] == names[0][5]
    taken_of_b = [clip for step in range(400) for s in streams for name, clip in clips_of(s, [step]) if name == "b"]
    assert all(sorted(taken_of_b[k : k + 30]) == list(range(30)) for k in range(0, len(taken_of_b) - 30, 30))


def test_datasets_with_one_order_share_its_epochs():
    mixture = Mixture([Named("16x", 40), Named("8x", 40), Named("c")], [2, 1, 1], [None, None, 3], orders=[0, 0, 1])
    drawn = [pair for pair in clips_of(TrainingStream(mixture, 1, 4, 0, 1), range(150)) if pair[0] != "c"]
    for epoch in range(len(drawn) // 40):
        assert sorted(clip for _, clip in drawn[40 * epoch : 40 * (epoch + 1)]) == list(range(40))
    assert sum(name == "16x" for name, _ in drawn) == pytest.approx(len(drawn) * 2 / 3, abs=12)
    assert {pair for pair in drawn if pair[0] != "c"} == {(name, clip) for name in ("16x", "8x") for clip in range(40)}


def test_weighted_clips_are_drawn_by_weight():
    stream = TrainingStream(Named("a", 4, np.array([1.0, 3.0, 1.0, 0.5])), 0, 11, 0, 1)
    assert Counter(clip for _, clip in clips_of(stream, range(20))) == {0: 40, 1: 120, 2: 40, 3: 20}


@pytest.mark.parametrize("shares", [[1.0], [1.0, 0.0], [1.0, -1.0]])
def test_illegal_shares_are_named(shares):
    with pytest.raises(ValueError, match=r"2 datasets with shares .*: one share above 0 for each"):
        Mixture([Named("a"), Named("b")], shares)


@pytest.mark.parametrize(("clips", "sizes"), [((3, 4), None), ((3, 3), (1, 2))])
def test_datasets_that_cannot_share_an_order_are_named(clips, sizes):
    with pytest.raises(ValueError, match="datasets of one order"):
        Mixture([Named("a", clips[0]), Named("b", clips[1])], [1, 1], sizes, orders=[0, 0])


# -- changing the number of processes --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources(clips, tmp_path_factory):
    """A dataset, a mixture of an index in two buckets with generated clips, and shards in two buckets."""
    folder = tmp_path_factory.mktemp("sources")
    save_clips(folder / "clips.jsonl", [*clips, *clips[:2], *clips[:2]])
    write_shards(folder / "clips.jsonl", folder, 2, progress=False)
    buckets, sharding = [Bucket(5, 32, 32, None), Bucket(21, 32, 32, None)], Sharding(2, 2, "stop")
    options = {"count": 9, "batch_size": 1, "batches_per_step": 2, "temporal_strides": (1,), "sharding": sharding}
    return {
        "dataset": ClipDataset(clips, 3, 16, temporal_strides=(1, 2)),
        "mixture": open_sources(f"{folder}/clips.jsonl", [Source("synthetic", 0.4, (1,))], buckets, **options)[0],
        "shards": open_sources(f"{folder}/*.tar", [], buckets[:1], **options)[0],
    }


def step_of(source, step, size, world, accumulate):
    """Return the elements of a whole step, by the number of their sample, and the frames of the first one."""
    streams = [TrainingStream(source, 3, size, rank, world, 0, accumulate) for rank in range(world)]
    batches = [stream.batch(step * accumulate + part) for part in range(accumulate) for stream in streams]
    keys = ("sample", "caption", "clip", "start", "stride", "fps")
    values = [b[key].tolist() if isinstance(b[key], torch.Tensor) else b[key] for b in batches for key in keys]
    rows = [row for k in range(0, len(values), len(keys)) for row in zip(*values[k : k + len(keys)], strict=True)]
    return rows, torch.cat([batch["video"] for batch in batches])


@pytest.mark.parametrize("kind", ["dataset", "mixture", "shards"])
def test_processes_and_accumulation_may_be_traded(sources, kind):
    shapes = set()
    for step in range(6):
        whole, video = step_of(sources[kind], step, 2, 2, 1)
        assert [row[0] for row in whole] == list(range(4 * step, 4 * step + 4))
        shapes.add(tuple(video.shape[2:]))
        for world, accumulate in ((1, 2), (2, 1)):
            rows, pixels = step_of(sources[kind], step, 2, world, accumulate)
            assert rows == whole
            assert torch.equal(pixels, video)
        if kind != "shards":  # whose runs are those of batches
            for size, world, accumulate in ((4, 1, 1), (1, 2, 2), (1, 1, 4), (1, 4, 1)):
                rows, pixels = step_of(sources[kind], step, size, world, accumulate)
                assert rows == whole
                assert torch.equal(pixels, video)
    assert len(shapes) == (2 if kind == "mixture" else 1)


def test_batch_sizes_of_buckets_may_be_traded_like_the_others():
    def rows(size, own, world, accumulate):
        mixture = Mixture([Named("a"), Named("b")], [1, 1], [None, own])
        streams = [TrainingStream(mixture, 3, size, rank, world, 0, accumulate) for rank in range(world)]
        batches = [s.batch(k * accumulate + part) for k in range(9) for part in range(accumulate) for s in streams]
        return [row for b in batches for row in zip(b["sample"].tolist(), b["name"], b["clip"].tolist(), strict=True)]

    assert rows(4, 8, 1, 1) == rows(2, 4, 2, 1) == rows(2, 4, 1, 2) == rows(1, 2, 2, 2)


@pytest.mark.parametrize("kind", ["mixture", "shards"])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_accumulating_stream_continues_at_any_batch(sources, kind, workers):
    whole = taken(TrainingStream(sources[kind], 7, 1, 0, 1, 0, 2), 10)
    assert [batch["step"] for batch in whole] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    rest = taken(TrainingStream(sources[kind], 7, 1, 0, 1, 4, 2), 6, workers)
    for one, other in zip(whole[4:], rest, strict=True):
        same(one, other)


class First(IterableDataset):
    """The first batch of each of several streams."""

    def __init__(self, streams):
        self.streams = streams

    def __iter__(self):
        return (stream.batch(0) for stream in self.streams)


def test_streams_that_were_read_can_be_sent_to_a_spawned_process(sources, clips):
    every = [*sources.values(), ClipDataset(clips, 3, 16, in_memory=True)]
    streams = First([TrainingStream(source, 3, 2, 0, 1, 0, 2) for source in every])
    expected = list(streams)  # opens files, which cannot be sent
    loader = iter(DataLoader(streams, batch_size=None, num_workers=1, multiprocessing_context=context))
    for batch in expected:
        same(next(loader), batch)
    loader._shutdown_workers()
