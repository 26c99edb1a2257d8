"""Videos that were replaced after their index was made are named, whatever their length and size."""

import dataclasses
import json
import os
import shutil

import pytest
from torch.utils.data import DataLoader

from promag.data import unchanged
from promag.data.clip_index import load_clips, save_clips
from promag.data.clips import prepare
from promag.data.datasets import ClipDataset
from promag.data.listing import list_videos
from promag.data.stream import TrainingStream
from promag.data.video import UnreadableVideo
from tests.data.conftest import counting, numbers

CHANGED = r"a\.mp4: is not the file that was prepared; prepare the clips again"


@pytest.fixture
def index(tmp_path):
    counting(tmp_path / "a.mp4", 12)
    save_clips(tmp_path / "clips.jsonl", prepare(list_videos(tmp_path / "a.mp4"), progress=False).clips)
    return tmp_path / "clips.jsonl"


@pytest.fixture
def hashed(monkeypatch):
    """Return the files that were hashed."""
    files, digest = [], unchanged.digest_file
    monkeypatch.setattr(unchanged, "digest_file", lambda path: files.append(os.path.basename(path)) or digest(path))
    return files


def replace(index, frames, width=64, size=None):
    """Replace the video by another, of `size` bytes where it is given."""
    video = counting(index.with_name("a.mp4"), frames, width=width)
    if size:
        os.truncate(video, size)  # bytes after the last box of an mp4 are ignored


@pytest.mark.parametrize(("frames", "width"), [(12, 66), (5, 64), (30, 64)])
@pytest.mark.parametrize("in_memory", [False, True])
def test_a_video_that_was_replaced_is_named(index, frames, width, in_memory):
    dataset = ClipDataset(load_clips(index), 4, 16, in_memory=in_memory)
    replace(index, frames, width)
    with pytest.raises(UnreadableVideo, match=CHANGED):
        dataset.fixed(0)


def test_one_of_the_same_length_and_size_is_named_too(index):
    size = os.stat(index.with_name("a.mp4")).st_size
    replace(index, 5, size=size)
    assert os.stat(index.with_name("a.mp4")).st_size == size
    with pytest.raises(UnreadableVideo, match=CHANGED):
        ClipDataset(load_clips(index), 4, 16).fixed(0)


def test_a_video_replaced_between_two_reads_is_named(index):
    dataset = ClipDataset(load_clips(index), 4, 16)
    assert numbers(dataset.fixed(0)) == [0, 1, 2, 3]
    replace(index, 12, 66)
    loader = iter(DataLoader(TrainingStream(dataset, 0, 1, 0, 1), batch_size=None, num_workers=1))
    with pytest.raises(UnreadableVideo, match=CHANGED):
        next(loader)


def test_an_older_file_moved_in_its_place_is_named(index):
    size, other = os.stat(index.with_name("a.mp4")).st_size, counting(index.with_name("b.mp4"), 5)
    os.truncate(other, size)
    os.utime(other, (1e9, 1e9))
    shutil.move(other, index.with_name("a.mp4"))
    with pytest.raises(UnreadableVideo, match=CHANGED):
        ClipDataset(load_clips(index), 4, 16).fixed(0)


def test_an_unchanged_file_is_not_hashed_and_a_copy_once(index, tmp_path, hashed):
    dataset = ClipDataset(load_clips(index), 4, 16)
    dataset.fixed(0)
    assert hashed == []
    (tmp_path / "copy").mkdir()
    for name in ("a.mp4", "clips.jsonl"):
        shutil.copyfile(tmp_path / name, tmp_path / "copy" / name)
    copied = ClipDataset(load_clips(tmp_path / "copy" / "clips.jsonl"), 4, 16)
    for _ in range(2):
        assert numbers(copied.fixed(0)) == [0, 1, 2, 3]
    assert hashed == ["a.mp4"]
    assert copied.digests(1) == dataset.digests(1)


def test_an_index_without_sizes_and_times_is_checked_by_its_hashes(index, hashed):
    """As those of earlier versions."""
    row = json.loads(index.read_text())
    index.write_text(json.dumps({key: value for key, value in row.items() if key not in ("bytes", "modified")}) + "\n")
    dataset = ClipDataset(load_clips(index), 4, 16)
    assert numbers(dataset.fixed(0)) == numbers(dataset.fixed(0)) == [0, 1, 2, 3]
    assert hashed == ["a.mp4"]
    replace(index, 12, 66)
    with pytest.raises(UnreadableVideo, match=CHANGED):
        dataset.fixed(0)


def test_clips_in_memory_need_their_file_no_more(index):
    dataset = ClipDataset(load_clips(index), 4, 16, in_memory=True)
    first = dataset.fixed(0)
    index.with_name("a.mp4").unlink()
    assert numbers(dataset.fixed(0)) == numbers(first)
    gone = ClipDataset(dataset.clips, 4, 16)
    with pytest.raises(UnreadableVideo, match=r"a\.mp4: No such file or directory"):
        gone.fixed(0)


def test_a_file_that_changes_while_it_is_prepared_is_not_taken_for_unchanged(index):
    (clip,) = load_clips(index)
    assert (clip.bytes, clip.modified) == unchanged.stamp(clip.path)
    os.utime(clip.path)
    assert (clip.bytes, clip.modified) != unchanged.stamp(clip.path)
    assert clip == dataclasses.replace(clip, modified=None)
