"""Clips in memory give the same items as clips in files, in every process, without reading the files again."""

import dataclasses
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from promag.data.buckets import Bucket
from promag.data.clip_index import save_clips
from promag.data.clips import prepare
from promag.data.crops import CHUNK, ClipCrop
from promag.data.datasets import ClipDataset
from promag.data.listing import list_videos
from promag.data.shards.stream import Sharding
from promag.data.shards.writer import write_shards
from promag.data.sources import Source, open_sources, open_training
from promag.data.stream import TrainingStream
from promag.data.video import UnreadableVideo, write_video
from promag.training.config import UserError

REST = {"count": 8, "batch_size": 2, "batches_per_step": 1, "temporal_strides": (1,), "sharding": Sharding(1, 1)}


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """Two videos and an image without two equal frames or places, and a part of the first video at another rate."""
    folder = tmp_path_factory.mktemp("noisy")
    rng = np.random.default_rng(0)
    for name, frames, height, width in (("wide", 30, 50, 70), ("tall", 13, 64, 34)):
        write_video(folder / f"{name}.mp4", rng.integers(0, 256, (frames, height, width, 3), np.uint8), 25)
    Image.fromarray(rng.integers(0, 256, (41, 57, 3), np.uint8)).save(folder / "still.png")
    clips = prepare(list_videos(folder, images=True), progress=False).clips
    wide = next(clip for clip in clips if clip.path.endswith("wide.mp4"))
    return [*clips, dataclasses.replace(wide, start=0.13, fps=17.0, frames=17, caption="resampled")]


@pytest.fixture
def copied(noisy, tmp_path):
    """The same clips from copies of the files, which a test may damage."""
    for path in {clip.path for clip in noisy}:
        shutil.copy(path, tmp_path)
    return [dataclasses.replace(clip, path=str(tmp_path / Path(clip.path).name)) for clip in noisy]


def same(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key], key


@pytest.mark.parametrize("size", [16, (32, 20), (50, 70), (96, 80)])
@pytest.mark.parametrize(("frames", "strides"), [(1, (1,)), (5, (1,)), (5, (2,)), (6, (1, 2, 3))])
def test_items_equal_those_read_from_files(noisy, frames, strides, size):
    plain = ClipDataset(noisy, frames, size, strides)
    held = ClipDataset(noisy, frames, size, strides, in_memory=True)
    for index in range(len(plain)):
        same(held.fixed(index), plain.fixed(index))
    drawn = set()
    for seed in range(24):
        one, other = (dataset.item(seed % len(plain), np.random.default_rng(seed)) for dataset in (held, plain))
        same(one, other)
        drawn.add((one["caption"], one["stride"], one["start"]))
    assert len(drawn) > len(plain)


def test_all_frames_are_the_crops_in_order(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (2 * CHUNK + 20, 34, 50, 3), np.uint8)
    write_video(tmp_path / "long.mp4", frames, 25)
    (clip,) = prepare([(str(tmp_path / "long.mp4"), "")], progress=False).clips
    crop = ClipCrop(76, (32, 20))
    pixels = crop.all_frames(clip.path, clip)
    assert pixels.shape == (2 * CHUNK + 20, 3, 32, 47)
    for seed in range(12):
        same(*(crop.random(video, clip, np.random.default_rng(seed)) for video in (clip.path, pixels)))
    last = dataclasses.replace(clip, start=(2 * CHUNK - 56) / 25, frames=76)
    same(crop.first(last.path, last), crop.first(pixels[-76:], last))


def test_memory_needed_is_that_of_the_scaled_frames_and_logged(noisy, caplog):
    with caplog.at_level(logging.INFO):
        memory = ClipDataset(noisy, 5, 20, in_memory=True).memory
    # The image is too short; 20 x 28 pixels cover the wide video's picture, 38 x 20 the tall one's.
    assert memory.bytes == 3 * ((30 + 17) * 20 * 28 + 13 * 38 * 20)
    assert memory.cached == 0
    assert "0.00 GiB of shared memory are reserved for 3 clips" in caplog.text


def test_a_file_is_read_once(copied):
    dataset = ClipDataset(copied, 5, 20, (1, 2), in_memory=True)
    plain = ClipDataset(copied, 5, 20, (1, 2))
    expected = [plain.item(seed % 3, np.random.default_rng(seed)) for seed in range(12)]
    for index in range(len(dataset)):
        dataset.fixed(index)
        assert dataset.memory.cached == index + 1
    for path in {clip.path for clip in copied}:
        Path(path).unlink()
    for seed, item in enumerate(expected):
        same(dataset.item(seed % 3, np.random.default_rng(seed)), item)


def test_clips_read_by_one_loader_process_are_shared(copied):
    plain = TrainingStream(ClipDataset(copied, 5, 20, (1, 2)), 7, 2, 0, 1)
    held = ClipDataset(copied, 5, 20, (1, 2), in_memory=True)
    expected = [plain.batch(step) for step in range(16)]

    def batches(first):
        loader = iter(DataLoader(TrainingStream(held, 7, 2, 0, 1, first), batch_size=None, num_workers=2))
        items = [next(loader) for _ in range(first, first + 8)]
        loader._shutdown_workers()
        return items

    for one, other in zip(batches(0), expected[:8], strict=True):
        same(one, other)
    assert held.memory.cached == len(held) == 3
    for path in {clip.path for clip in copied}:
        Path(path).unlink()
    for one, other in zip(batches(8), expected[8:], strict=True):
        same(one, other)
    same(TrainingStream(held, 7, 2, 0, 1).batch(3), expected[3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 100}, r"wide\.mp4: its picture .* states, 100x50 \(28x20 after scaling, 40x20 expected\)"),
        ({"frames": 40}, r"wide\.mp4: it is not as long as the index states \(time 1\.2000 s"),
    ],
)
def test_a_video_that_differs_from_its_index_is_named(noisy, change, message):
    wide = dataclasses.replace(next(clip for clip in noisy if clip.path.endswith("wide.mp4")), **change)
    dataset = ClipDataset([wide], 5, 20, in_memory=True)
    for _ in range(2):  # failed clips are not kept
        with pytest.raises(UnreadableVideo, match=message):
            dataset.fixed(0)
    assert dataset.memory.cached == 0


def test_an_unreadable_video_is_not_kept_in_memory(copied):
    wide = next(clip for clip in copied if clip.path.endswith("wide.mp4"))
    dataset = ClipDataset([wide], 5, 20, in_memory=True)
    Path(wide.path).write_bytes(Path(wide.path).read_bytes()[:900])
    with pytest.raises(UnreadableVideo, match=r"wide\.mp4"):
        dataset.fixed(0)
    assert dataset.memory.cached == 0


def test_clips_that_exceed_the_memory_are_refused(noisy):
    long = [dataclasses.replace(clip, frames=2**31 - 1, height=50, width=100) for clip in noisy]
    with pytest.raises(UserError, match=r"in_memory true: 4 clips need 12582911\.99 GiB .* in_memory: false reads them"):
        ClipDataset(long, 5, 512, in_memory=True)


def test_sources_keep_clips_of_an_index_in_memory(noisy, tmp_path):
    save_clips(tmp_path / "clips.jsonl", noisy)
    buckets = [Bucket(5, 32, 32), Bucket(5, 48, 32, 4)]
    index, shapes = str(tmp_path / "clips.jsonl"), Source("synthetic", 0.3, (1,))
    held, plan = open_sources(index, [shapes], buckets, **REST, in_memory=True)
    plain, plan_of_files = open_sources(index, [shapes], buckets, **REST)
    assert plan == plan_of_files
    for step in range(24):
        same(*(TrainingStream(clips, 3, 2, 0, 1).batch(step) for clips in (held, plain)))
    assert [dataset.memory.cached for dataset in held.datasets[:2]] == [2, 1]
    assert [dataset.memory for dataset in plain.datasets[:2]] == [None, None]


def test_shards_are_refused(noisy, tmp_path):
    save_clips(tmp_path / "clips.jsonl", noisy[:3])
    write_shards(tmp_path / "clips.jsonl", tmp_path, 2, progress=False)
    shards = str(tmp_path / "*.tar")
    with pytest.raises(UserError, match=r"in_memory true with shards .*\*\.tar: only the clips of an index"):
        open_training(shards, [Bucket(1, 32, 32)], **REST, in_memory=True)
