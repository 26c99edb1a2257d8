"""An index is checked on reading as strictly as on writing, and opened without reading its rows."""

import dataclasses
import json
import logging
import os
import pickle
import shutil

import numpy as np
import pytest

from promag.data import clip_index
from promag.data.clip_index import column, load_clips, save_clips, take
from promag.data.clips import prepare
from promag.data.listing import list_videos
from promag.training.config import UserError


def test_an_index_is_read_as_written_and_moves_with_its_videos(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "here" / "videos")
    clips = prepare(list_videos(tmp_path / "here" / "videos"), progress=False).clips
    clips.append(dataclasses.replace(clips[0], path=str(folder / "short.mp4"), caption="schön"))
    save_clips(tmp_path / "here" / "clips.jsonl", clips)
    assert list(load_clips(tmp_path / "here" / "clips.jsonl")) == clips
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
        ({"licence": 4}, "line 2: licence: "),
        ({"path": "gone.mp4"}, "line 2: .*gone.mp4 is not there"),
    ],
)
def test_an_index_is_checked_strictly(clips, tmp_path, change, message):
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


# -- columns ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def long_index(clips, tmp_path, monkeypatch):
    """Twelve rows of three clips, with saved columns like a long index."""
    monkeypatch.setattr(clip_index, "SAVE_COLUMNS_FROM", 12)
    rows = [dataclasses.replace(clips[k % 3], caption=f"clip {k}", frames=5 + k) for k in range(12)]
    save_clips(tmp_path / "clips.jsonl", rows)
    return tmp_path / "clips.jsonl", rows


def test_an_open_index_is_a_sequence_of_clips(long_index):
    path, rows = long_index
    index = load_clips(path)
    assert (len(index), list(index), index[-1]) == (12, rows, rows[-1])
    assert list(index[2:9:3]) == rows[2:9:3]
    assert list(take(index, np.array([7, 0]))) == [rows[7], rows[0]] == take(rows, np.array([7, 0]))
    for name in ("frames", "height", "width", "fps"):
        assert column(index, name).tolist() == [getattr(row, name) for row in rows] == column(rows, name).tolist()
    assert list(pickle.loads(pickle.dumps(index))) == rows
    with pytest.raises(IndexError):
        index[12]


def test_saved_columns_are_used_only_for_their_own_file(long_index, monkeypatch):
    path, rows = long_index
    load_clips(path)
    assert sorted(p.name for p in path.parent.iterdir()) == ["clips.jsonl", "clips.jsonl.columns"]
    with monkeypatch.context() as patch:
        patch.setattr(clip_index, "_read_columns", None)  # the file is not read again
        assert list(load_clips(path)) == rows
    save_clips(path, rows[1:] + rows[:1])  # as long as before
    assert list(load_clips(path)) == rows[1:] + rows[:1]
    (path.parent / "clips.jsonl.columns").write_bytes(b"something else")
    assert len(load_clips(path)) == 12
    shutil.move(path.parent, path.parent.with_name("moved"))
    assert load_clips(path.parent.with_name("moved") / "clips.jsonl")[3].caption == "clip 4"


def test_a_short_index_saves_no_columns_and_checks_its_videos_each_time(clips, tmp_path):
    shutil.copy(clips[0].path, tmp_path / "a.mp4")
    save_clips(tmp_path / "clips.jsonl", [dataclasses.replace(clips[0], path=str(tmp_path / "a.mp4"))])
    load_clips(tmp_path / "clips.jsonl")
    (tmp_path / "a.mp4").unlink()
    assert [p.name for p in tmp_path.iterdir()] == ["clips.jsonl"]
    with pytest.raises(UserError, match="is not there"):
        load_clips(tmp_path / "clips.jsonl")


def test_a_folder_that_cannot_be_written_is_named(long_index, monkeypatch, caplog):
    def refuse(*_, **__):
        raise PermissionError("read-only")

    monkeypatch.setattr(clip_index, "save_file", refuse)
    with caplog.at_level(logging.WARNING):
        assert len(load_clips(long_index[0])) == 12
    assert "clips.jsonl.columns: cannot be written, so every start reads the whole index: read-only" in caplog.text


def test_an_index_that_changes_under_a_reader_is_an_error(long_index):
    path, rows = long_index
    index = load_clips(path)
    assert index[3] == rows[3]
    os.truncate(path, 40)
    with pytest.raises(UserError, match="has changed or gone since it was opened"):
        index[3]


def test_a_licence_is_kept_with_its_clip_and_may_be_absent(clips, tmp_path):
    save_clips(tmp_path / "clips.jsonl", [dataclasses.replace(clips[0], licence="CC-BY-4.0"), clips[1]])
    rows = [json.loads(line) for line in (tmp_path / "clips.jsonl").read_text().splitlines()]
    assert rows[0]["licence"] == "CC-BY-4.0"
    assert "licence" not in rows[1]
    assert [clip.licence for clip in load_clips(tmp_path / "clips.jsonl")] == ["CC-BY-4.0", None]


def test_rows_hold_counts_that_fit_their_columns(clips):
    with pytest.raises(ValueError, match="less than 2147483648"):
        clip_index._adapter().validate_python(dataclasses.asdict(clips[0]) | {"frames": 2**31})


@pytest.mark.parametrize("name", ["no\udcff utf8%.mp4", "file:a%20b.mp4", "12:30 🐕\n.mp4"])
def test_an_index_takes_any_file_name(clips, tmp_path, name):
    folder = tmp_path / "d\udcfe"
    folder.mkdir()
    shutil.copy(clips[2].path, folder / name)
    rows = [dataclasses.replace(clips[2], path=str(folder / name)), clips[1]]
    for place in (folder, tmp_path):  # below the index, and of a folder beside
        save_clips(place / "clips.jsonl", rows)
        (place / "clips.jsonl").read_text(encoding="utf-8")
        assert list(load_clips(place / "clips.jsonl")) == rows
