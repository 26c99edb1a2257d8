"""A stream over shards obeys the laws of streams, shows each clip once an epoch, and names bad samples."""

import dataclasses
import hashlib
import json
import logging
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from promag.data.buckets import Bucket
from promag.data.clip_index import Clip, load_clips, save_clips
from promag.data.datasets import ClipDataset, open_by_bucket, open_dataset
from promag.data.shards.index import open_shards
from promag.data.shards.reader import BadSample
from promag.data.shards.stream import ShardedClips, Sharding
from promag.data.shards.writer import write_shards
from promag.data.sources import open_training
from promag.data.stream import Mixture, TrainingStream
from promag.data.video import UnreadableVideo
from promag.training.config import UserError
from tests.data.conftest import counting
from tests.data.test_stream import same, taken

VIDEO, IMAGE = Bucket(3, 32, 64), Bucket(1, 16, 16)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Twenty different videos of 6 to 15 frames and six different images."""
    folder = tmp_path_factory.mktemp("clips")
    rows = []
    for k in range(26):
        path = folder / (f"{k:02d}.mp4" if k < 20 else f"{k:02d}.png")
        frames, height, width = (6 + k % 10, 32, 64) if k < 20 else (1, 16, 16)
        if k < 20:
            counting(path, frames)
        else:
            Image.new("RGB", (width, height), (k, k, k)).save(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        rows.append(Clip(str(path), 0.0, frames, 30.0, width, height, f"clip {k}", digest))
    save_clips(folder / "clips.jsonl", rows)
    return folder / "clips.jsonl"


@pytest.fixture(scope="module")
def folder(index, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_shards(index, folder, 7, progress=False)
    return folder


def clips_of(folder, buckets=(VIDEO, IMAGE), concurrent_shards=2, shuffle=3, bad="stop", strides=(1, 2)):
    return ShardedClips(open_shards(folder / "*.tar"), buckets, strides, Sharding(concurrent_shards, shuffle, bad))


# -- laws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "first"), [(0, 0), (0, 5), (1, 3), (2, 0), (2, 3), (3, 4)])
def test_any_step_and_any_number_of_workers_give_the_same_batches(folder, workers, first):
    whole = [TrainingStream(clips_of(folder), 7, 2, 0, 1).batch(step) for step in range(12)]
    part = taken(TrainingStream(clips_of(folder), 7, 2, 0, 1, first), 12 - first, workers)
    for one, other in zip(whole[first:], part, strict=True):
        same(one, other)


@pytest.mark.parametrize(("world", "size"), [(1, 2), (2, 3), (3, 1)])
def test_an_epoch_shows_every_clip_once_over_all_ranks(folder, world, size):
    clips = clips_of(folder)
    streams = [TrainingStream(clips, 3, size, rank, world) for rank in range(world)]
    steps = sum(count // (size * world) for count in (20, 6))
    for epoch in range(2):
        seen, shapes = [], []
        for step in range(epoch * steps, (epoch + 1) * steps):
            batches = [stream.batch(step) for stream in streams]
            assert len({batch["video"].shape for batch in batches}) == 1  # the same bucket on every rank
            shapes.append(tuple(batches[0]["video"].shape[2:]))
            seen += [clip for batch in batches for clip in batch["caption"]]
        assert len(seen) == len(set(seen)) == sum(count - count % (size * world) for count in (20, 6))
        assert {(3, 32, 64), (1, 16, 16)} == set(shapes)


def test_clips_of_one_shard_that_an_epoch_leaves_out_come_in_others(index, tmp_path):
    write_shards(index, tmp_path, 26, progress=False)
    videos = dataclasses.replace(VIDEO, batch_size=21)  # one more than there are: they fill no step
    stream = TrainingStream(clips_of(tmp_path, [videos, IMAGE], concurrent_shards=1, shuffle=1), 0, 4, 0, 1)
    epochs = [set(stream.batch(epoch)["caption"]) for epoch in range(12)]  # of one step each
    assert {len(epoch) for epoch in epochs} == {4}
    assert set.union(*epochs) == {f"clip {k}" for k in range(20, 26)}


def test_an_elements_address_determines_its_crop(index, folder):
    clips, rows = clips_of(folder), {clip.caption: clip for clip in load_clips(index)}
    stream = TrainingStream(clips, 3, 2, 1, 2)
    batch = stream.batch(2)
    first = (2 * 2 + 1) * 2  # step 2, rank 1 of 2, batches of 2
    assert batch["sample"].tolist() == [first, first + 1]
    for element in range(2):
        row = rows[batch["caption"][element]]
        crop = clips.crops[0 if row.frames > 1 else 1]
        expected = crop.random(row.path, row, np.random.default_rng((3, batch["sample"][element].item())))
        assert torch.equal(batch["video"][element], expected["video"])
        assert batch["start"][element] == expected["start"]
        assert batch["fps"][element] == expected["fps"]


def test_shards_by_pipe_are_opened_once_an_epoch(folder, tmp_path):
    command = f"pipe:echo {{000000..000003}} >> {tmp_path}/opened; cat {folder}/shard-{{000000..000003}}.tar"
    pattern = "{" + ",".join(command.replace("{000000..000003}", f"{k:06d}") for k in range(4)) + "}"
    shards = open_shards(pattern)
    (tmp_path / "opened").unlink()  # reading the index runs the same command
    piped = ShardedClips(shards, [VIDEO], (1, 2), Sharding(concurrent_shards=1, shuffle=3))
    result = taken(TrainingStream(piped, 7, 2, 0, 1), 10)
    opened = (tmp_path / "opened").read_text().split()
    assert sorted(opened) == ["000000", "000001", "000002", "000003"]
    for one, other in zip(result, taken(TrainingStream(clips_of(folder, [VIDEO], 1), 7, 2, 0, 1), 10), strict=True):
        same(one, other)


def test_fewer_concurrent_shards_than_workers_are_named(folder, monkeypatch, caplog):
    from promag.data.shards import stream as sharded_clips

    for workers, named in ((2, False), (3, True)):
        monkeypatch.setattr(sharded_clips, "get_worker_info", lambda n=workers: SimpleNamespace(id=0, num_workers=n))
        clips_of(folder, concurrent_shards=2).items(0, 0, 0, 1, 2)
        assert ("2 concurrent_shards for 3 loader processes" in caplog.text) == named


def test_a_stream_can_be_sent_to_another_process(folder):
    clips = clips_of(folder)
    clips.items(0, 0, 0, 1, 2)
    copy = pickle.loads(pickle.dumps(clips))
    for one, other in zip(clips.items(5, 3, 0, 1, 2), copy.items(5, 3, 0, 1, 2), strict=True):
        same(one, other)


# -- numbered clips, plans and opening -------------------------------------------------------------------------------


def test_clips_by_their_number(index, folder):
    rows = {clip.caption: clip for clip in load_clips(index)}
    clips = open_dataset(folder / "*.tar", "eval", 3, (32, 64), 0)
    assert (len(clips), clips.skipped) == (20, 6)
    order = [clips.fixed(k) for k in range(20)]
    assert len({item["caption"] for item in order}) == 20
    for item in (order[4], clips.fixed(4)):
        row = rows[item["caption"]]
        assert torch.equal(item["video"], ClipDataset([row], 3, (32, 64)).fixed(0)["video"])
        assert item["caption"] == order[4]["caption"]
    with pytest.raises(IndexError, match="legal are 0 to 19"):
        clips.fixed(20)
    assert clips.digests(5) == open_dataset(folder / "*.tar", "eval", 2, (8, 8), 0).digests(5) != clips.digests(6)


def test_plans(index, folder, caplog):
    sharding = Sharding(2, 4)
    buckets = [VIDEO, Bucket(1, 16, 16, 4), Bucket(40, 16, 16)]
    result, plan = open_training(folder / "*.tar", buckets, 0, 2, 2, (1,), sharding)
    assert isinstance(result, ShardedClips)
    assert plan.splitlines()[1:] == [
        "3x32x64      20      2  100.0%",
        "1x16x16       6      4    0.0%",
        "40x16x16      0      2    0.0%",
        "5 steps an epoch; each leaves out 6 of 26 clips, others each time",
    ]
    assert "buckets that never fill a step of 2 batches never come: 1x16x16 (6 clips)" in caplog.text
    with caplog.at_level(logging.WARNING):
        result, plan = open_training(index, buckets, 0, 2, 2, (1,), sharding)
    assert isinstance(result, Mixture)
    assert plan.splitlines()[1:] == ["3x32x64     20      2  87.0%", "1x16x16      6      4  13.0%"]
    assert "no clip is for the buckets 40x16x16" in caplog.text
    batches = [TrainingStream(result, 0, 2, 0, 1).batch(step)["video"].shape for step in range(40)]
    assert set(batches) == {(2, 3, 3, 32, 64), (4, 3, 1, 16, 16)}
    result, plan = open_training("synthetic", [VIDEO, Bucket(5, 32, 32, 4)], 8, 2, 1, (1,), sharding)
    assert {TrainingStream(result, 0, 2, 0, 1).batch(step)["video"].shape[2] for step in range(9)} == {3, 5}
    assert plan.splitlines()[1:] == ["3x32x64      8      2  66.7%", "5x32x32      8      4  33.3%"]


def test_one_bucket_of_an_index_draws_the_clips_of_a_dataset(index):
    result, _ = open_training(index, [VIDEO], 0, 2, 1, (1, 2), Sharding(1, 1))
    alone = ClipDataset(load_clips(index), 3, (32, 64), (1, 2))
    same(TrainingStream(result, 1, 3, 0, 1).batch(4), TrainingStream(alone, 1, 3, 0, 1).batch(4))


@pytest.mark.parametrize("kind", ["index", "shards"])
def test_clips_too_short_are_named(index, folder, kind, caplog):
    source = index if kind == "index" else folder / "*.tar"
    with caplog.at_level(logging.WARNING):
        open_training(source, [VIDEO], 0, 2, 1, (1,), Sharding(1, 1))
    assert "6 of 26 clips are too short for every bucket" in caplog.text
    assert ("20.png (1)" if kind == "index" else "(1 frames)") in caplog.text
    with pytest.raises(UserError, match="no clip of 26 is long enough for 99x8x8"):
        open_training(source, [Bucket(99, 8, 8)], 0, 2, 1, (1,), Sharding(1, 1))


def test_no_step_can_be_filled(folder):
    with pytest.raises(UserError, match=r"\[20\] samples in batches of \[2\], 11 batches a step"):
        open_training(folder / "*.tar", [VIDEO], 0, 2, 11, (1,), Sharding(1, 1))


@pytest.mark.parametrize("values", [(0, 1), (1, 0)])
def test_invalid_sharding_is_refused(values):
    with pytest.raises(ValueError, match="at least 1 is needed"):
        Sharding(*values)


# -- bad samples -----------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(index, tmp_path):
    """Shards of 7 with twenty videos, one of which is not a video although the index says so, and the key of that sample."""
    rows = [dataclasses.replace(clip) for clip in load_clips(index)[:20]]
    (tmp_path / "05.mp4").write_bytes(b"no video, but as the index knows it")
    digest = hashlib.sha256((tmp_path / "05.mp4").read_bytes()).hexdigest()
    rows[5] = dataclasses.replace(rows[5], path=str(tmp_path / "05.mp4"), sha256=digest)
    save_clips(tmp_path / "clips.jsonl", rows)
    write_shards(tmp_path / "clips.jsonl", tmp_path / "s", 7, progress=False)
    return tmp_path / "s"


def stream_of(folder, bad):
    return TrainingStream(clips_of(folder, [VIDEO], bad=bad), 0, 2, 0, 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_ends_training_and_is_named(damaged, workers):
    with pytest.raises(UnreadableVideo, match=r"shard-00000\d\.tar: 000000005\.mp4"):
        taken(stream_of(damaged, "stop"), 10, workers)


def test_a_bad_sample_may_be_skipped_and_is_counted_and_named_once(damaged, caplog):
    with caplog.at_level(logging.WARNING):
        batches = taken(stream_of(damaged, "skip"), 20)  # two epochs
    names = [clip for batch in batches for clip in batch["caption"]]
    assert {len(batch["caption"]) for batch in batches} == {2}
    assert set(names) == {f"clip {k}" for k in range(20)} - {"clip 5"}
    assert caplog.text.count("skipped, another sample near it in its place (1 in this process)") == 1
    assert "000000005.mp4" in caplog.text
    for one, other in zip(
        batches[7:], taken(TrainingStream(stream_of(damaged, "skip").dataset, 0, 2, 0, 1, 7), 13), strict=True
    ):
        same(one, other)


def test_a_truncated_local_shard_is_found_before_training(folder, tmp_path, caplog):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[: 9000 if path.name == "shard-000001.tar" else None])
    with pytest.raises(UserError, match=r"1 of 4 shards are damaged: .*shard-000001\.tar has 9000 bytes"):
        clips_of(tmp_path)
    with caplog.at_level(logging.WARNING):
        clips = clips_of(tmp_path, bad="skip")
    assert len(clips) == 19
    assert "1 of 4 shards are damaged and left out: " in caplog.text
    assert "shard-000001.tar has 9000 bytes" in caplog.text
    taken(TrainingStream(clips, 0, 1, 0, 1), 19)


def test_clips_of_a_truncated_streamed_shard_may_be_replaced_and_are_named(folder, tmp_path, caplog):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[: 9000 if path.name == "shard-000001.tar" else None])
    shards = open_shards(f"pipe:cat {tmp_path}/shard-{{000000..000003}}.tar")
    with pytest.raises(BadSample, match=r"shard pipe:.*shard-000001\.tar, sample .*: the shard "):
        taken(TrainingStream(ShardedClips(shards, [VIDEO], (1,), Sharding(1, 2)), 0, 2, 0, 1), 10)
    clips = ShardedClips(shards, [VIDEO], (1,), Sharding(1, 2, "skip"))
    with caplog.at_level(logging.WARNING):
        batches = taken(TrainingStream(clips, 0, 2, 0, 1), 10)
    assert {len(batch["caption"]) for batch in batches} == {2}
    lost = int(caplog.text.count("skipped, another sample near it in its place"))
    assert lost >= 2
    assert f"({lost} in this process)" in caplog.text


def test_a_video_shorter_than_its_index_says_is_named(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    rows = [json.loads(line) for line in (folder / "shards.jsonl").read_text().splitlines()]
    for row in rows:
        row["frames"] = [90 if n > 1 else 1 for n in row["frames"]]
    (tmp_path / "shards.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UnreadableVideo, match=r"\.tar: 0000000\d\d\.mp4: it is not as long as the index states"):
        taken(TrainingStream(clips_of(tmp_path, [VIDEO], strides=(20,)), 0, 2, 0, 1), 4)


def test_loaders_keep_the_order_of_a_stream(folder):
    """The loader is built as in the training loop."""
    clips, _ = open_training(folder / "*.tar", [VIDEO, IMAGE], 0, 2, 1, (1,), Sharding(2, 4))
    loader = DataLoader(TrainingStream(clips, 0, 2, 0, 1), batch_size=None, num_workers=2)
    batches = [batch for batch, _ in zip(loader, range(13), strict=False)]
    assert [batch["step"] for batch in batches] == list(range(13))
    assert len({name for batch in batches for name in batch["caption"]}) == 26


@pytest.mark.parametrize("source", ["index", "folder"])
def test_clips_of_several_buckets_are_numbered_apart(index, folder, source):
    """Each clip is in its training bucket, and its item equals that of the bucket alone."""
    place = index if source == "index" else f"{folder}/*.tar"
    parts = open_by_bucket(place, "train", [VIDEO, IMAGE], 0)
    assert [(bucket, len(clips)) for bucket, clips in parts] == [(VIDEO, 20), (IMAGE, 6)]
    captions = [[clips.fixed(i)["caption"] for i in range(len(clips))] for _, clips in parts]
    assert sorted(captions[0] + captions[1]) == sorted(f"clip {k}" for k in range(26))
    assert {int(caption.split()[1]) for caption in captions[1]} == set(range(20, 26))
    alone = open_dataset(place, "train", 3, (32, 64), 0)  # images are too short for it
    for i in range(20):
        assert torch.equal(parts[0][1].fixed(i)["video"], alone.fixed(i)["video"])
    assert parts[0][1].digests(20) == alone.digests(20)


def test_a_process_made_by_fork_opens_files_of_its_own(folder, monkeypatch):
    clips = clips_of(folder, [VIDEO])
    before = clips._reader(0, 0, 0, 3)
    assert clips._reader(0, 0, 0, 3) is before
    monkeypatch.setattr("os.getpid", lambda: -1)  # two processes that share a file share the place up to which it is read
    assert clips._reader(0, 0, 0, 3) is not before
