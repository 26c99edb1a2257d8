"""The index is strict, windows hold the frames they name, and the data of a step depends on nothing but its address."""

import dataclasses
import hashlib
import json
import logging
import shutil

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from promag.training import shapes
from promag.training.clips import Clip, caption_from_name, list_videos, load_clips, prepare, save_clips
from promag.training.config import UserError
from promag.training.datasets import ClipDataset, ShapesDataset, TrainingStream, open_dataset
from promag.training.video import UnreadableVideo, write_video

STEP = 6  # grey levels from one frame of a counting video to the next


def counting(path, frames: int, fps: float = 30, height: int = 32, width: int = 64):
    """Write a video whose frame k is grey, of level 20 + STEP * k, and bluer by 40 in its right half."""
    levels = 20 + STEP * np.arange(frames)
    pixels = np.broadcast_to(levels[:, None, None, None], (frames, height, width, 3)).astype(np.uint8).copy()
    pixels[:, :, width // 2 :, 2] += 40
    write_video(path, pixels, fps, crf=1)
    return str(path)


def numbers(item) -> list[int]:
    """Read the frame numbers back out of an item's red."""
    levels = (item["video"][0].mean(dim=(1, 2)) + 1) * 127.5
    return ((levels - 20) / STEP).round().int().tolist()


def blueness(item) -> torch.Tensor:
    """Return how much bluer than red each column of an item's first frame is, in grey levels."""
    return ((item["video"][2, 0] - item["video"][0, 0]) * 127.5).mean(dim=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two good videos (30 frames at 30 fps, 21 at 15), a short one of 5 frames, and captions for some."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "more").mkdir()
    counting(folder / "a_grey-wall_01.mp4", 30)
    counting(folder / "more" / "b.mp4", 21, fps=15)
    counting(folder / "short.mp4", 5)
    return folder


@pytest.fixture(scope="module")
def clips(folder):
    return prepare(list_videos(folder), progress=False).clips


# -- finding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "caption"),
    [("a_red-kite_03.mp4", "a red kite"), ("4_dogs__run-2_17.mov", "4 dogs run"), ("0001.mp4", ""), ("x2y.mp4", "x2y")],
)
def test_caption_from_name(name, caption):
    assert caption_from_name(name) == caption


def test_a_folder_is_searched_and_captioned_from_names(folder):
    names = ["a_grey-wall_01.mp4", "more/b.mp4", "short.mp4"]
    assert list_videos(folder) == list(zip([str(folder / n) for n in names], ["a grey wall", "b", "short"], strict=True))
    assert list_videos(folder / "more" / "b.mp4") == [(str(folder / "more" / "b.mp4"), "b")]


def test_a_folder_with_captions(folder, tmp_path, caplog):
    shutil.copytree(folder, tmp_path / "v")
    (tmp_path / "v" / ".b.mp4").write_text("a hidden file")
    (tmp_path / "v" / "sizes.csv").write_text("file,size\nshort.mp4,3\n")
    (tmp_path / "v" / "text.csv").write_text('split,file,caption\ntrain,more/b.mp4,"Grey, then white."\neval,short.mp4,S\n')
    found = {path.rsplit("/", 1)[1]: caption for path, caption in list_videos(tmp_path / "v")}
    assert found == {"a_grey-wall_01.mp4": "a grey wall", "b.mp4": "Grey, then white.", "short.mp4": "S"}
    assert "1 videos have no row in" in caplog.text
    assert "a_grey-wall_01.mp4" in caplog.text
    assert [caption for _, caption in list_videos(tmp_path / "v", "eval")] == ["S"]
    (tmp_path / "v" / "other.csv").write_text("file,caption\nshort.mp4,T\n")
    with pytest.raises(UserError, match=r"other\.csv, text\.csv all hold captions"):
        list_videos(tmp_path / "v")
    (tmp_path / "v" / "captions.csv").write_text("\ufefffile,caption\nshort.mp4,first\n", encoding="utf-8")
    assert dict(list_videos(tmp_path / "v"))[str(tmp_path / "v" / "short.mp4")] == "first"


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_tables_list_videos_relative_to_themselves(folder, tmp_path, kind):
    shutil.copytree(folder, tmp_path / "v")
    rows = [
        {"file": "v/short.mp4", "caption": " ein kurzer Schwenk über Grau ", "split": "train", "size": 3},
        {"file": str(folder / "more" / "b.mp4"), "caption": "b", "split": "eval", "size": 4},
    ]
    table = tmp_path / f"list.{kind}"
    lines = [json.dumps(row) for row in rows]
    if kind == "csv":
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    table.write_text("\n".join(lines))
    first, second = (str(tmp_path / "v" / "short.mp4"), "ein kurzer Schwenk über Grau"), (rows[1]["file"], "b")
    assert list_videos(table) == [first, second]
    assert list_videos(table, "eval") == [second]
    with pytest.raises(UserError, match="no row has split 'test'; splits there: eval, train"):
        list_videos(table, "test")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent", None, "no such file or folder"),
        ("empty", "folder", "holds no video"),
        ("a.csv", "path,text\na.mp4,x\n", "columns file and caption"),
        ("b.csv", "file,caption\n", "columns file and caption"),
        ("c.csv", "file,caption\ngone.mp4,x\nlost.mp4,y\n", "2 files that are not there: .*gone.mp4, .*lost.mp4"),
        ("d.csv", "file,caption\n,x\n", "1 rows lack a file or a caption"),
        ("e.jsonl", '{"file": "a.mp4", "caption": 3}', "1 rows lack a file or a caption"),
        ("f.jsonl", "not json", "cannot be read as JSONL"),
    ],
)
def test_what_cannot_be_listed(tmp_path, name, content, message):
    if content == "folder":
        (tmp_path / name).mkdir()
    elif content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        list_videos(tmp_path / name)


def test_a_split_needs_a_table(folder):
    with pytest.raises(UserError, match="needs a CSV or JSONL file"):
        list_videos(folder, "train")


# -- preparing -------------------------------------------------------------------------------------------------------


def test_one_clip_a_video_at_its_own_rate(folder, clips):
    first = folder / "a_grey-wall_01.mp4"
    digest = hashlib.sha256(first.read_bytes()).hexdigest()
    assert clips[0] == Clip(str(first), 0.0, 30, 30.0, 64, 32, "a grey wall", digest)
    assert [(clip.frames, clip.fps) for clip in clips] == [(30, 30.0), (21, 15.0), (5, 30.0)]


def test_windows_do_not_overlap_and_remainders_are_counted(folder):
    prepared = prepare(list_videos(folder), frames=8, progress=False)
    assert [(clip.path.rsplit("/", 1)[1], clip.start) for clip in prepared.clips] == [
        *(("a_grey-wall_01.mp4", pytest.approx(k * 8 / 30)) for k in range(3)),
        *(("b.mp4", pytest.approx(k * 8 / 15)) for k in range(2)),
    ]
    assert prepared.too_short == [(str(folder / "short.mp4"), 5)]
    assert prepared.dropped_frames == 6 + 5
    found = [numbers(ClipDataset(prepared.clips, 8, 32).fixed(index)) for index in range(5)]
    assert found == [list(range(k, k + 8)) for k in (0, 8, 16, 0, 8)]


@pytest.mark.parametrize(
    ("fps", "expected"),
    [
        (15, list(range(0, 30, 2))),
        (10, list(range(0, 30, 3))),
        (20, [k for k in range(30) if k % 3 != 2]),
        (30, list(range(30))),
    ],
)
def test_another_rate_takes_the_nearest_frames(folder, fps, expected):
    prepared = prepare([(str(folder / "a_grey-wall_01.mp4"), "")], fps=fps, progress=False)
    assert [clip.frames for clip in prepared.clips] == [len(expected)]
    assert numbers(ClipDataset(prepared.clips, len(expected), 32).fixed(0)) == expected
    assert prepared.slower == []


def test_a_rate_above_the_videos_own_is_named(folder):
    prepared = prepare([(str(folder / "more" / "b.mp4"), "")], fps=30, progress=False)
    assert prepared.slower == [(str(folder / "more" / "b.mp4"), 15.0)]
    assert numbers(ClipDataset(prepared.clips, 6, 32).fixed(0)) == [0, 0, 1, 1, 2, 2]


def test_nothing_long_enough(folder):
    with pytest.raises(UserError, match=r"no video has 65 frames: the longest, .*a_grey-wall_01\.mp4, has 30"):
        prepare(list_videos(folder), frames=65, progress=False)


def test_quarantine_and_its_limit(folder, tmp_path):
    broken = [tmp_path / "x.mp4", tmp_path / "y.mp4"]
    data = (folder / "a_grey-wall_01.mp4").read_bytes()
    broken[0].write_bytes(data[:-30])
    broken[1].write_text("text")
    videos = [*list_videos(folder), *((str(path), "") for path in broken)]
    prepared = prepare(videos, max_bad=0.4, progress=False)
    assert [path for path, _ in prepared.quarantined] == [str(path) for path in broken]
    assert len(prepared.clips) == 3
    with pytest.raises(UserError, match="2 of 2 videos are unreadable"):
        prepare(videos[3:], max_bad=1, progress=False)
    with pytest.raises(UserError, match=r"2 of 5 videos .* 39\.0%.*x\.mp4: corrupt.*y\.mp4: cannot be opened"):
        prepare(videos, max_bad=0.39, progress=False)


@pytest.mark.parametrize("options", [{"fps": 0}, {"frames": 0}, {"max_bad": 1.5}, {"workers": 0}])
def test_settings_that_cannot_be_meant(folder, options):
    with pytest.raises(UserError, match=f"{next(iter(options))} {next(iter(options.values()))}"):
        prepare(list_videos(folder), **options, progress=False)


# -- the index -------------------------------------------------------------------------------------------------------


def test_an_index_is_read_as_written_and_moves_with_its_videos(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "here" / "videos")
    clips = prepare(list_videos(tmp_path / "here" / "videos"), progress=False).clips
    clips.append(dataclasses.replace(clips[0], path=str(folder / "short.mp4"), caption="schön"))
    save_clips(tmp_path / "here" / "clips.jsonl", clips)
    assert load_clips(tmp_path / "here" / "clips.jsonl") == clips
    (tmp_path / "here").rename(tmp_path / "there")
    moved = load_clips(tmp_path / "there" / "clips.jsonl")
    assert [clip.path for clip in moved[:3]] == [clip.path.replace("/here/", "/there/") for clip in clips[:3]]
    assert moved[3] == clips[3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": "red"}, "line 2: colour: "),
        ({"frames": None}, "line 2: frames: "),
        ({"frames": "12"}, "line 2: frames: "),
        ({"frames": 0}, "line 2: frames: "),
        ({"fps": -1.0}, "line 2: fps: "),
        ({"sha256": "abc"}, "line 2: sha256: "),
        ({"path": "gone.mp4"}, "line 2: .*gone.mp4 is not there"),
    ],
)
def test_a_strict_index(clips, tmp_path, change, message):
    good = dataclasses.asdict(clips[0])
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(good | change)}\n")
    with pytest.raises(UserError, match=rf"a\.jsonl, {message}"):
        load_clips(tmp_path / "a.jsonl")


def test_missing_keys_broken_lines_and_empty_files(clips, tmp_path):
    path, good = tmp_path / "a.jsonl", dataclasses.asdict(clips[0])
    del good["caption"]
    for text, message in ((json.dumps(good), "line 1: caption"), ('{"path"', "line 1: "), ("", "holds no clips")):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            load_clips(path)
    with pytest.raises(UserError, match="cannot be read"):
        load_clips(tmp_path / "absent.jsonl")


# -- sampling --------------------------------------------------------------------------------------------------------


def test_items_hold_the_frames_they_name(clips):
    dataset = ClipDataset(clips[:2], 5, 16, temporal_strides=(1, 2, 6))
    seen = set()
    for seed in range(60):
        item = dataset.item(np.random.default_rng(seed))
        assert item["video"].shape == (3, 5, 16, 16)
        assert item["video"].dtype == torch.float32
        assert item["caption"] == clips[item["clip"]].caption
        assert item["fps"] == clips[item["clip"]].fps / item["stride"]
        assert numbers(item) == [item["start"] + k * item["stride"] for k in range(5)]
        seen.add((item["clip"], item["stride"]))
    assert seen == {(0, 1), (0, 2), (0, 6), (1, 1), (1, 2)}  # 25 frames do not fit into the 21 of clip 1


def test_starts_reach_both_ends(clips):
    dataset = ClipDataset(clips[2:], 3, 32)
    assert {dataset.item(np.random.default_rng(seed))["start"] for seed in range(30)} == {0, 1, 2}


def test_fixed_is_the_beginning_in_the_centre(clips):
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


def test_flip_only_when_asked(clips):
    rngs = [np.random.default_rng(seed) for seed in range(12)]
    plain = [blueness(ClipDataset(clips[:1], 2, (32, 64)).item(rng)) for rng in rngs]
    assert {bool(blue[-1] > blue[0]) for blue in plain} == {True}
    mirrored = [blueness(ClipDataset(clips[:1], 2, (32, 64), flip=True).item(rng)) for rng in rngs]
    assert {bool(blue[-1] > blue[0]) for blue in mirrored} == {True, False}


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
def test_windows_that_cannot_be_meant(clips, frames, size, strides):
    with pytest.raises(UserError, match="from 1 up"):
        ClipDataset(clips, frames, size, strides)


# -- streams ---------------------------------------------------------------------------------------------------------


def taken(stream, steps, workers=0):
    loader = iter(DataLoader(stream, batch_size=None, num_workers=workers))
    return [next(loader) for _ in range(steps)]


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
    rest = taken(TrainingStream(dataset, 7, 2, 0, 1, first_step=2), 3, workers)
    for one, other in zip(whole[2:], rest, strict=True):
        same(one, other)


def test_a_batch_is_its_addressed_items(dataset):
    batch = TrainingStream(dataset, 3, 4, rank=1, world_size=2).batch(9)
    items = [dataset.item(np.random.default_rng((3, 9, 1, element))) for element in range(4)]
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


@pytest.mark.parametrize(("rank", "world", "size", "first"), [(1, 1, 2, 0), (-1, 1, 2, 0), (0, 1, 0, 0), (0, 1, 2, -1)])
def test_streams_that_cannot_be_meant(dataset, rank, world, size, first):
    with pytest.raises(ValueError, match="are legal"):
        TrainingStream(dataset, 0, size, rank, world, first)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_video_ends_training_and_is_named(clips, tmp_path, workers):
    path = tmp_path / "fades.mp4"
    shutil.copy(clips[0].path, path)
    dataset = ClipDataset([dataclasses.replace(clips[0], path=str(path))], 3, 16)
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(UnreadableVideo, match=r"fades\.mp4"):
        taken(TrainingStream(dataset, 0, 2, 0, 1), 1, workers)


# -- generated clips and opening -------------------------------------------------------------------------------------


def test_shapes_have_the_interface_of_clips():
    dataset = ShapesDataset("train", 4, frames=3, size=32)
    assert (len(dataset), dataset.skipped) == (4, 0)
    items = [dataset.item(np.random.default_rng(seed)) for seed in range(20)]
    assert {item["clip"] for item in items} == {0, 1, 2, 3}
    pixels, scene = shapes.clip(items[0]["clip"], "train", frames=3, size=32)
    assert torch.equal(items[0]["video"], torch.from_numpy(pixels).permute(3, 0, 1, 2) / 127.5 - 1)
    expected = {"caption": scene.caption(), "start": 0, "stride": 1, "fps": shapes.FPS}
    assert {key: items[0][key] for key in expected} == expected
    again = dataset.fixed(items[0]["clip"])
    assert again.keys() == items[0].keys()
    assert torch.equal(again["video"], items[0]["video"])
    assert not torch.equal(dataset.fixed(2)["video"], ShapesDataset("eval", 4, frames=3, size=32).fixed(2)["video"])
    assert TrainingStream(dataset, 0, 2, 0, 1).batch(0)["video"].shape == (2, 3, 3, 32, 32)
    with pytest.raises(IndexError, match="legal are 0 to 3"):
        dataset.fixed(4)


def test_opening_an_index(clips, tmp_path):
    save_clips(tmp_path / "clips.jsonl", clips)
    found = open_dataset(tmp_path / "clips.jsonl", "train", frames=6, size=16, count=1, temporal_strides=(1, 2))
    assert isinstance(found, ClipDataset)
    assert (len(found), found.strides) == (2, (1, 2))
    for source, message in (("videos", "give shapes, or a .jsonl"), (tmp_path / "gone.jsonl", "cannot be read")):
        with pytest.raises(UserError, match=message):
            open_dataset(source, "train", frames=5, size=32, count=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "test"}, "split 'test'"),
        ({"count": 0}, "count 0"),
        ({"size": 8}, "8x8"),
        ({"temporal_strides": (1, 2)}, r"temporal_strides \[1, 2\]"),
        ({"flip": True}, "flip True"),
    ],
)
def test_opening_shapes(change, message):
    options = {"split": "eval", "frames": 5, "size": (32, 48), "count": 3}
    found = open_dataset("shapes", **options)
    assert (len(found), found.fixed(0)["video"].shape) == (3, (3, 5, 32, 48))
    with pytest.raises(UserError, match=message):
        open_dataset("shapes", **{**options, **change})


def test_digests_follow_the_content_and_not_the_place(clips, tmp_path):
    moved = dataclasses.replace(clips[0], path=str(tmp_path / "a.mp4"))
    renamed = dataclasses.replace(clips[0], caption="another")
    digests = [ClipDataset([clip, clips[1]], 3, 16).digest(1) for clip in (clips[0], moved, renamed)]
    assert digests[0] == digests[1] != digests[2]
    assert ClipDataset(clips, 3, 16).digest(1) == digests[0] != ClipDataset(clips, 3, 16).digest(2)
