"""Crops hold the frames that they name, and digests depend on the content of clips."""

import dataclasses
import hashlib
import inspect
import json
import logging
import tracemalloc

import numpy as np
import pytest
import torch

from promag.data import synthetic
from promag.data.clip_index import load_clips, row_of, save_clips
from promag.data.clips import prepare
from promag.data.datasets import ClipDataset, SyntheticDataset, is_index, open_dataset, open_evaluation
from promag.data.stream import TrainingStream
from promag.data.video import UnreadableVideo, write_video
from promag.training.config import UserError
from tests.data.conftest import numbers


def blueness(item) -> torch.Tensor:
    """Return how much bluer than red each column of an item's first frame is, in grey levels."""
    return ((item["video"][2, 0] - item["video"][0, 0]) * 127.5).mean(dim=0)


# -- sampling --------------------------------------------------------------------------------------------------------


def test_items_hold_the_frames_of_their_crop(clips):
    dataset = ClipDataset(clips[:2], 5, 16, temporal_strides=(1, 2, 6))
    seen = set()
    for seed in range(60):
        item = dataset.item(seed % 2, np.random.default_rng(seed))
        assert item["video"].shape == (3, 5, 16, 16)
        assert item["clip"] == seed % 2
        assert item["video"].dtype == torch.float32
        assert item["caption"] == clips[item["clip"]].caption
        assert item["fps"] == clips[item["clip"]].fps / item["stride"]
        assert numbers(item) == [item["start"] + k * item["stride"] for k in range(5)]
        seen.add((item["clip"], item["stride"]))
    assert seen == {(0, 1), (0, 2), (0, 6), (1, 1), (1, 2)}  # 25 frames do not fit into the 21 of clip 1


def test_starts_reach_both_ends(clips):
    dataset = ClipDataset(clips[2:], 3, 32)
    assert {dataset.item(0, np.random.default_rng(seed))["start"] for seed in range(30)} == {0, 1, 2}


def test_a_fixed_crop_is_the_first_frames_and_the_centre(clips):
    item = ClipDataset(clips, 4, 16, temporal_strides=(1, 2)).fixed(0)
    assert numbers(item) == [0, 1, 2, 3]
    assert (item["start"], item["stride"], item["clip"]) == (0, 1, 0)
    assert (blueness(item) > 20).tolist() == [False] * 8 + [True] * 8


@pytest.mark.parametrize(
    ("size", "height", "width"), [(16, 16, 16), ((16, 24), 16, 24), ((48, 40), 48, 40), ((32, 64), 32, 64)]
)
def test_sizes(clips, size, height, width):
    item = ClipDataset(clips, 2, size).fixed(0)
    video = item["video"]
    assert video.shape == (3, 2, height, width)
    assert video.is_contiguous()
    assert -1 <= video.min() <= video.max() <= 1
    # The picture covers the crop: the step between the halves stays in the middle.
    assert blueness(item).diff().argmax().item() == width // 2 - 1


def test_reduction_does_not_alias(tmp_path):
    stripes = np.zeros((2, 128, 128, 3), np.uint8)
    stripes[:, :, ::2] = 255
    write_video(tmp_path / "stripes.mp4", stripes, 10, crf=1)
    clips = prepare([(str(tmp_path / "stripes.mp4"), "")], progress=False).clips
    video = ClipDataset(clips, 2, 32).fixed(0)["video"]
    assert video.abs().max() < 0.1  # mid grey; taking every fourth column would give black or white


def test_short_clips_are_left_out_and_named(clips, caplog):
    with caplog.at_level(logging.WARNING):
        dataset = ClipDataset(clips, 9, 16)
    assert (len(dataset), dataset.skipped) == (2, 1)
    assert "1 of 3 clips are shorter than 9 frames" in caplog.text
    assert "short.mp4 (5)" in caplog.text
    assert len(ClipDataset(clips, 9, 16, temporal_strides=(3,))) == 1  # 25 frames
    with pytest.raises(UserError, match=r"no clip has 31 frames: the longest of 3, .*wall_01\.mp4, has 30"):
        ClipDataset(clips, 31, 16)


def test_enlarging_is_named(clips, caplog):
    ClipDataset(clips, 2, 33)
    assert "3 of 3 clips are smaller than 33x33" in caplog.text


@pytest.mark.parametrize(
    ("frames", "size", "strides"), [(0, 16, (1,)), (4, 0, (1,)), (4, (16, -1), (1,)), (4, 16, ()), (4, 16, (0,))]
)
def test_invalid_crops_are_refused(clips, frames, size, strides):
    with pytest.raises(UserError, match="from 1 up"):
        ClipDataset(clips, frames, size, strides)


# -- generated clips and opening -------------------------------------------------------------------------------------


def test_generated_clips_have_the_interface_of_clips():
    dataset = SyntheticDataset("train", 4, frames=3, size=32)
    assert (len(dataset), dataset.skipped) == (4, 0)
    items = [dataset.item(index, np.random.default_rng(0)) for index in range(4)]
    assert [item["clip"] for item in items] == [0, 1, 2, 3]
    pixels, scene = synthetic.clip(items[0]["clip"], "train", frames=3, size=32)
    assert torch.equal(items[0]["video"], torch.from_numpy(pixels).permute(3, 0, 1, 2) / 127.5 - 1)
    expected = {"caption": scene.caption(), "start": 0, "stride": 1, "fps": synthetic.FPS}
    assert {key: items[0][key] for key in expected} == expected
    again = dataset.fixed(items[0]["clip"])
    assert again.keys() == items[0].keys()
    assert torch.equal(again["video"], items[0]["video"])
    assert not torch.equal(dataset.fixed(2)["video"], SyntheticDataset("eval", 4, frames=3, size=32).fixed(2)["video"])
    assert TrainingStream(dataset, 0, 2, 0, 1).batch(0)["video"].shape == (2, 3, 3, 32, 32)
    with pytest.raises(IndexError, match="legal are 0 to 3"):
        dataset.fixed(4)


def test_opening_an_index(clips, tmp_path):
    save_clips(tmp_path / "clips.jsonl", clips)
    dataset = open_dataset(tmp_path / "clips.jsonl", "train", frames=6, size=16, count=1, temporal_strides=(1, 2))
    assert isinstance(dataset, ClipDataset)
    assert (len(dataset), dataset.crop.strides) == (2, (1, 2))
    for source, message in (("videos", "give synthetic, or a .jsonl"), (tmp_path / "gone.jsonl", "cannot be read")):
        with pytest.raises(UserError, match=message):
            open_dataset(source, "train", frames=5, size=32, count=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "test"}, "split 'test'"),
        ({"count": 0}, "count 0"),
        ({"size": 8}, "8x8"),
        ({"temporal_strides": (1, 2)}, r"temporal_strides \[1, 2\]"),
    ],
)
def test_opening_generated_clips(change, message):
    options = {"split": "eval", "frames": 5, "size": (32, 48), "count": 3}
    dataset = open_dataset("synthetic", **options)
    assert (len(dataset), dataset.fixed(0)["video"].shape) == (3, (3, 5, 32, 48))
    with pytest.raises(UserError, match=message):
        open_dataset("synthetic", **{**options, **change})


def test_digests_depend_on_content_not_on_paths(clips, tmp_path):
    moved = dataclasses.replace(clips[0], path=str(tmp_path / "a.mp4"))
    renamed = dataclasses.replace(clips[0], caption="another")
    digests = [ClipDataset([clip, clips[1]], 3, 16).digests(1) for clip in (clips[0], moved, renamed)]
    assert digests[0] == digests[1] != digests[2]
    assert digests[0].videos == digests[2].videos  # another caption
    shorter = dataclasses.replace(clips[0], frames=clips[0].frames - 1)
    assert ClipDataset([shorter, clips[1]], 3, 16).digests(1).videos != digests[0].videos
    assert ClipDataset(clips, 3, 16).digests(1) == digests[0] != ClipDataset(clips, 3, 16).digests(2)


def test_a_digest_keeps_one_row_at_a_time_in_memory(clips, tmp_path):
    """The digest equals that of the list of all rows, for any number of rows, without making the list."""
    rows = [dataclasses.replace(clips[0], caption=f"{k} " + "words " * 100) for k in range(1000)]
    save_clips(tmp_path / "clips.jsonl", rows)
    dataset = ClipDataset(load_clips(tmp_path / "clips.jsonl"), 3, 16)
    listed = [row_of(dataclasses.replace(clip, path="", decord=False)) for clip in dataset.clips]
    tracemalloc.start()
    digest = dataset.digests(1000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert digest.clips == hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()
    assert peak < 200_000  # the list and its text are megabytes


def test_the_digest_of_generated_clips_depends_on_the_generator(monkeypatch):
    dataset = SyntheticDataset("train", 4, frames=3, size=32)
    digest = dataset.digests(4)
    assert digest == SyntheticDataset("train", 4, frames=3, size=32).digests(4)
    assert len({digest, dataset.digests(3), SyntheticDataset("eval", 4, frames=3, size=32).digests(4)}) == 3
    source = inspect.getsource(synthetic)
    with monkeypatch.context() as context:  # for example a colour that clip 0 does not show
        context.setattr(inspect, "getsource", lambda module: source.replace('"cyan": (0.12', '"cyan": (0.13'))
        assert dataset.digests(4) != digest
    with monkeypatch.context() as context:  # as another release of NumPy may draw
        context.setattr(synthetic, "sample_scene", lambda rng, unseen: synthetic.Scene("disc", "red", "grows"))
        assert dataset.digests(4) != digest


def test_a_scene_is_that_of_its_clip():
    for split in synthetic.SPLITS:
        assert synthetic.scene(5, split) == synthetic.clip(5, split, frames=2, size=32)[1]


def test_a_video_shorter_than_its_clip_is_named(clips):
    longer = dataclasses.replace(clips[2], frames=40)
    with pytest.raises(UnreadableVideo, match=r"short\.mp4: it is not as long as the index states .*prepare the clips again"):
        ClipDataset([longer], 9, 16).fixed(0)


def test_evaluation_opens_tables_of_common_columns_and_lists(folder, clips, tmp_path):
    path = str(folder / "short.mp4")
    (tmp_path / "t.JSONL").write_text(json.dumps({"video": path, "prompt": "Bär"}, ensure_ascii=False), encoding="utf-16")
    (tmp_path / "videos.txt").write_text(f"{path}\n")
    (tmp_path / "prompts.txt").write_text("Bär\n", encoding="utf-8")
    for source in ("t.JSONL", "videos.txt"):
        assert [clip.caption for clip in open_evaluation(str(tmp_path / source), None, 5, 32, 1).clips] == ["Bär"]
    assert not is_index(tmp_path / "t.JSONL")
    save_clips(tmp_path / "clips.JSONL", clips)
    assert is_index(tmp_path / "clips.JSONL")
    assert len(open_evaluation(str(tmp_path / "clips.JSONL"), None, 5, 32, 1)) == 3


def test_evaluation_takes_a_stretch_with_several_captions_once(folder, clips, tmp_path, caplog):
    rows = [(str(folder / "short.mp4"), "S"), (str(folder / "more" / "b.mp4"), "B"), (str(folder / "short.mp4"), "T")]
    (tmp_path / "table.jsonl").write_text("".join(json.dumps({"file": path, "caption": text}) + "\n" for path, text in rows))
    again = dataclasses.replace(clips[2], caption="T")
    save_clips(tmp_path / "clips.jsonl", [clips[2], clips[1], again, dataclasses.replace(again, start=1 / 30, frames=4)])
    for source, frames in (("table.jsonl", [5, 21]), ("clips.jsonl", [5, 21, 4])):
        opened = open_evaluation(str(tmp_path / source), None, 4, 32, 1).clips
        assert [clip.frames for clip in opened] == frames
        assert f"1 of {len(frames) + 1} clips show the same frames as another" in caplog.text


def test_evaluation_refuses_a_split_of_what_is_taken_whole(clips, tmp_path):
    save_clips(tmp_path / "clips.jsonl", clips)
    for source in ("synthetic", str(tmp_path / "clips.jsonl"), "shards/shard-{000..041}.tar"):
        with pytest.raises(UserError) as error:
            open_evaluation(source, "train", 5, 32, 1)
        assert str(error.value).startswith(f"{source}: split 'train' needs a table with a column split; generated clips,")
