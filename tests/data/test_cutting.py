"""Clips that are written as files show the frames of their stretch, and only missing ones are written again."""

import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from promag.data import cutting
from promag.data.clip_index import load_clips, save_clips
from promag.data.clips import Lengths, prepare
from promag.data.cutting import check_outside, cut_out
from promag.data.datasets import ClipDataset
from promag.data.listing import list_videos
from promag.data.shards.writer import write_shards
from promag.data.video import UnreadableVideo, decode_strictly, read_frames, write_video
from promag.data.video.reader import has_decord
from promag.training.config import UserError
from tests.data.conftest import counting, numbers


@pytest.fixture
def prepared(tmp_path):
    """Three clips of a film of 30 frames, at half its rate, and a picture."""
    Image.new("RGB", (64, 32), (90, 90, 90)).save(tmp_path / "p.png")
    videos = [(counting(tmp_path / "film.mp4", 30), "a film"), (str(tmp_path / "p.png"), "a picture")]
    clips = prepare(videos, fps=15, lengths=Lengths(max_seconds=0.4), licences={videos[0][0]: "CC0-1.0"}, progress=False).clips
    assert [clip.frames for clip in clips] == [6, 6, 3, 1]
    return clips


def test_files_hold_the_frames_of_their_stretch(prepared, tmp_path):
    cut = cut_out(prepared, tmp_path / "cut", progress=False)
    assert [numbers(ClipDataset(cut[place : place + 1], frames, 32).fixed(0)) for place, frames in enumerate((6, 6, 3))] == [
        [0, 2, 4, 6, 8, 10],
        [12, 14, 16, 18, 20, 22],
        [24, 26, 28],
    ]
    assert cut[3] == prepared[3]
    first = cut[0]
    assert (first.start, first.frames, first.fps, first.height, first.width) == (0.0, 6, 15.0, 32, 64)
    assert (first.caption, first.licence, first.decord) == ("a film", "CC0-1.0", has_decord())
    assert len({clip.sha256 for clip in cut}) == 4
    assert sorted(os.listdir(tmp_path / "cut")) == sorted(Path(clip.path).name for clip in cut[:3])
    source = read_frames(prepared[0].path, [0, 2, 4, 6, 8, 10]).astype(int)
    assert np.abs(read_frames(first.path, range(6)) - source).mean() < 1.5


def test_only_missing_and_damaged_files_are_written_again(prepared, tmp_path):
    cut = cut_out(prepared, tmp_path / "cut", progress=False)
    kept, gone, damaged = (Path(clip.path) for clip in cut[:3])
    before = {path: path.read_bytes() for path in (kept, gone, damaged)}
    gone.unlink()
    damaged.write_bytes(before[damaged][:-40])
    modified = os.stat(kept).st_mtime_ns
    assert cut_out(prepared, tmp_path / "cut", progress=False) == cut
    assert {path: path.read_bytes() for path in before} == before
    assert os.stat(kept).st_mtime_ns == modified


def test_cut_clips_make_shards_of_their_own_bytes(prepared, tmp_path):
    save_clips(tmp_path / "films.jsonl", prepared[:3])
    whole = write_shards(tmp_path / "films.jsonl", tmp_path / "of films", per_shard=3, progress=False)
    save_clips(tmp_path / "cut.jsonl", cut_out(prepared[:3], tmp_path / "cut", progress=False))
    cut = write_shards(tmp_path / "cut.jsonl", tmp_path / "of clips", per_shard=3, progress=False)
    assert (whole.repeated, cut.repeated) == (2, 0)
    assert all(clip.path.startswith(str(tmp_path / "cut")) for clip in load_clips(tmp_path / "cut.jsonl"))


def test_odd_sizes_lose_their_last_row_and_column(tmp_path):
    pictures = [Image.new("RGB", (31, 21), (k * 40, 99, 99)) for k in range(4)]
    pictures[0].save(tmp_path / "odd.gif", save_all=True, append_images=pictures[1:], duration=100)
    clips = prepare([(str(tmp_path / "odd.gif"), "")], progress=False).clips
    assert (clips[0].width, clips[0].height) == (31, 21)
    (cut,) = cut_out(clips, tmp_path / "cut", progress=False)
    assert (cut.width, cut.height, cut.frames) == (30, 20, 4)
    assert decode_strictly(cut.path).frames == 4


def test_a_long_name_in_any_script_and_two_rates(tmp_path):
    film = tmp_path / f"{'電影' * 35}.mp4"
    write_video(film, np.full((8, 32, 64, 3), 99, np.uint8), 8)
    for fps, frames in ((8, 8), (4, 4)):
        (cut,) = cut_out(prepare([(str(film), "")], fps=fps, progress=False).clips, tmp_path / "cut", progress=False)
        assert (cut.frames, cut.fps) == (frames, fps)
        assert Path(cut.path).name.startswith("電影" * 20 + "-")
    assert len(os.listdir(tmp_path / "cut")) == 2


def test_a_video_of_two_captions_is_written_once(tmp_path):
    film = counting(tmp_path / "film.mp4", 12)
    clips = prepare([(film, "a film"), (film, "the same")], lengths=Lengths(frames=6), progress=False).clips
    cut = cut_out(clips, tmp_path / "cut", progress=False)
    assert [clip.caption for clip in cut] == ["a film", "a film", "the same", "the same"]
    assert [clip.path for clip in cut[:2]] == [clip.path for clip in cut[2:]]
    assert len(os.listdir(tmp_path / "cut")) == 2


def test_copies_of_a_video_under_one_name_are_cut_once(tmp_path, monkeypatch):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    films = [counting(tmp_path / "a" / "film.mp4", 8), str(tmp_path / "b" / "film.mp4")]
    shutil.copy(*films)
    clips = prepare([(films[0], "a film"), (films[1], "a copy")], progress=False).clips
    together, cut = [], cutting._cut
    monkeypatch.setattr(cutting, "_cut", lambda folder, clips: together.append([c.path for c in clips]) or cut(folder, clips))
    first, second = cut_out(clips, tmp_path / "cut", progress=False)
    assert together == [films]  # else two threads would write one file
    assert first == dataclasses.replace(second, caption="a film")
    assert os.listdir(tmp_path / "cut") == [Path(first.path).name]


def test_clips_of_an_earlier_call_are_not_cut_again(tmp_path):
    counting(tmp_path / "film.mp4", 8)
    first = cut_out(prepare(list_videos(tmp_path), progress=False).clips, tmp_path / "cut", progress=False)
    again = prepare(list_videos(tmp_path), progress=False).clips
    assert len(again) == 2
    with pytest.raises(UserError, match=rf"cut: holds 1 of the videos to cut.*: {first[0].path}; take a folder outside"):
        cut_out(again, tmp_path / "cut", progress=False)
    assert os.listdir(tmp_path / "cut") == [Path(first[0].path).name]
    beside = cut_out(
        [clip for clip in again if clip.path.endswith("/film.mp4")], tmp_path, progress=False
    )  # a film named alone
    assert Path(beside[0].path) == tmp_path / Path(first[0].path).name


def test_a_folder_inside_that_of_the_videos_is_refused(tmp_path):
    (tmp_path / "films").mkdir()
    film = counting(tmp_path / "films" / "film.mp4", 2)
    (tmp_path / "link").symlink_to(tmp_path / "films")
    for inside in ("films/cut", "films", "link/a/b"):
        with pytest.raises(UserError, match=rf"cut .*/{inside}: lies inside .*/films, .*; name a folder outside it"):
            check_outside(tmp_path / inside, tmp_path / "films")
    check_outside(tmp_path / "films of clips", tmp_path / "films")
    check_outside(tmp_path / "films" / "cut", film)  # alone, it is no folder that is listed again


def test_a_video_that_changed_is_named(prepared, tmp_path):
    counting(tmp_path / "film.mp4", 20)
    with pytest.raises(UnreadableVideo, match=r"film\.mp4: is not the file that was prepared; prepare the clips again"):
        cut_out(prepared, tmp_path / "cut", progress=False)
    assert not list((tmp_path / "cut").glob("*"))
