"""Videos are decoded strictly and cut into clips; omitted videos are counted and named."""

import hashlib
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from promag.data.clip_index import Clip
from promag.data.clips import Lengths, Skipped, TooManyUnreadable, frames_at, prepare
from promag.data.datasets import ClipDataset
from promag.data.listing import list_videos
from promag.data.video import REENCODE, write_video
from promag.data.video.reader import has_decord
from promag.training.config import UserError
from tests.data.conftest import STEP, numbers


def test_one_clip_a_video_at_its_own_rate(folder, clips):
    first = folder / "a_grey-wall_01.mp4"
    digest = hashlib.sha256(first.read_bytes()).hexdigest()
    assert clips[0] == Clip(str(first), 0.0, 30, 30.0, 64, 32, "a grey wall", digest, decord=has_decord())
    assert [(clip.frames, clip.fps) for clip in clips] == [(30, 30.0), (21, 15.0), (5, 30.0)]


def test_clips_do_not_overlap_and_remainders_are_counted(folder):
    prepared = prepare(list_videos(folder), lengths=Lengths(frames=8), progress=False)
    assert [(clip.path.rsplit("/", 1)[1], clip.start) for clip in prepared.clips] == [
        *(("a_grey-wall_01.mp4", pytest.approx(k * 8 / 30)) for k in range(3)),
        *(("b.mp4", pytest.approx(k * 8 / 15)) for k in range(2)),
    ]
    assert prepared.skipped == [Skipped(str(folder / "short.mp4"), 0.0, pytest.approx(5 / 30), 5, "too short")]
    assert prepared.dropped_frames == 6 + 5
    result = [numbers(ClipDataset(prepared.clips, 8, 32).fixed(index)) for index in range(5)]
    assert result == [list(range(k, k + 8)) for k in (0, 8, 16, 0, 8)]


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


def test_clips_at_a_hundredth_of_a_videos_rate_end_with_the_video(tmp_path):
    write_video(tmp_path / "fast.mp4", np.full((200, 32, 64, 3), 99, np.uint8), 100)
    prepared = prepare([(str(tmp_path / "fast.mp4"), "")], fps=1.002, motion=True, progress=False)
    assert [clip.frames for clip in prepared.clips] == [2]  # a third would be shown at 1.996 s, the last frame is at 1.99 s
    assert ClipDataset(prepared.clips, 2, 32).fixed(0)["video"].shape == (3, 2, 32, 32)


@pytest.mark.parametrize("fps", [60, 30000 / 1001, 29.97])
def test_whole_milliseconds_lose_no_frame_at_a_videos_own_rate(fps):
    for count in range(2, 201):
        for first in (0, 7, 19):  # a shot may begin anywhere
            times = np.round((first + np.arange(count)) / fps, 3)
            assert frames_at(times, fps) == count


@pytest.mark.parametrize(("rate", "expected"), [(25, 26), (12.5, 13), (24, 25), (10, 11), (24.9, 25)])
def test_frames_of_a_second_at_a_rate(rate, expected):
    assert frames_at(np.arange(26) / 25, rate) == expected
    assert frames_at(np.zeros(1), rate) == 1


def test_a_rate_above_the_videos_own_is_named(folder):
    prepared = prepare([(str(folder / "more" / "b.mp4"), "")], fps=30, progress=False)
    assert prepared.slower == [(str(folder / "more" / "b.mp4"), 15.0)]
    assert numbers(ClipDataset(prepared.clips, 6, 32).fixed(0)) == [0, 0, 1, 1, 2, 2]


def test_nothing_long_enough(folder):
    with pytest.raises(UserError, match=r"no video has 65 frames: the longest, .*a_grey-wall_01\.mp4, has 30; ask for less"):
        prepare(list_videos(folder), lengths=Lengths(frames=65), progress=False)
    with pytest.raises(UserError, match=r"no video has 22 frames at 15 fps: the longest, .*b\.mp4, has 21; ask for less"):
        prepare(
            [(str(folder / "more" / "b.mp4"), ""), (str(folder / "short.mp4"), "")],
            fps=15,
            lengths=Lengths(frames=22),
            progress=False,
        )


def test_unreadable_videos_are_quarantined_up_to_a_limit(folder, tmp_path):
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


def test_too_many_unreadable_videos_end_with_counts_reasons_and_advice(tmp_path):
    videos = [(str(tmp_path / f"{i}.mp4"), "") for i in range(5)]
    for path, _ in videos:
        Path(path).write_text("text")
    with pytest.raises(TooManyUnreadable) as error:
        prepare(videos, progress=False)
    message = str(error.value)
    assert message.startswith(f"5 of 5 videos are unreadable, at most 1.0% may be: {videos[0][0]}: ")
    assert message.endswith(f" and 2 more; remove them, or re-encode what is odd but whole by: {REENCODE}")
    assert "3.mp4" not in message
    assert "max" not in message.replace("max(", "")
    assert [path for path, _ in error.value.quarantined] == [path for path, _ in videos]


@pytest.mark.parametrize("options", [{"fps": 0}, {"fps": math.nan}, {"fps": math.inf}, {"max_bad": 1.5}, {"workers": 0}])
def test_invalid_settings_are_refused(folder, options):
    with pytest.raises(UserError, match=f"{next(iter(options))} {next(iter(options.values()))}"):
        prepare(list_videos(folder), **options, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 0}, "frames 0, min_seconds 0, max_seconds inf: legal are frames from 1"),
        ({"min_seconds": 3, "max_seconds": 2}, "min_seconds 3, max_seconds 2: legal"),
        ({"max_seconds": 0}, "max_seconds 0: legal"),
        ({"min_seconds": math.nan}, "min_seconds nan, max_seconds inf: legal"),
        ({"max_seconds": math.nan}, "min_seconds 0, max_seconds nan: legal"),
        ({"min_seconds": math.inf}, "min_seconds inf, max_seconds inf: legal"),
        ({"frames": 9, "max_seconds": 2}, "frames 9, .* max_seconds 2: clips have a number of frames, or are from"),
    ],
)
def test_invalid_lengths_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Lengths(**options)


@pytest.mark.parametrize(
    ("lengths", "windows"),
    [
        (Lengths(), [(0, 100)]),
        (Lengths(frames=30), [(0, 30), (30, 30), (60, 30)]),
        (Lengths(max_seconds=4), [(0, 40), (40, 40), (80, 20)]),
        (Lengths(min_seconds=2, max_seconds=4), [(0, 40), (40, 40), (80, 20)]),
        (Lengths(min_seconds=2.1, max_seconds=4), [(0, 40), (40, 40)]),
        (Lengths(min_seconds=10), [(0, 100)]),
        (Lengths(min_seconds=10.1), []),
        (Lengths(max_seconds=0.01), [(k, 1) for k in range(100)]),
    ],
)
def test_ten_seconds_are_cut_into_windows(lengths, windows):
    assert lengths.windows(100, 10.0) == windows


def test_lengths_without_a_whole_number_of_frames_between_are_rounded_up():
    lengths = Lengths(min_seconds=2, max_seconds=2)
    assert lengths.windows(150, 24000 / 1001) == [(0, 48), (48, 48), (96, 48)]  # of 2.002 s; 47 would be too short


@given(
    available=st.integers(1, 500),
    fps=st.floats(1, 120),
    least=st.floats(0, 5),
    more=st.floats(0, 5),
)
def test_no_window_is_shorter_than_the_least_or_a_frame_longer_than_the_most(available, fps, least, more):
    lengths = Lengths(min_seconds=least, max_seconds=least + more + 1e-3)
    for first, frames in lengths.windows(available, fps):
        assert first + frames <= available
        assert frames / fps >= least - 0.01
        assert frames == 1 or frames / fps < lengths.max_seconds + 1 / fps


def test_videos_are_cut_by_seconds(folder):
    prepared = prepare(list_videos(folder), lengths=Lengths(min_seconds=0.3, max_seconds=0.4), progress=False)
    clips = [(Path(clip.path).name, clip.start, clip.frames) for clip in prepared.clips]
    assert clips == [
        *(("a_grey-wall_01.mp4", pytest.approx(k * 12 / 30), 12) for k in range(2)),
        *(("b.mp4", pytest.approx(k * 6 / 15), 6) for k in range(3)),
    ]
    assert [(stretch.frames, stretch.reason) for stretch in prepared.skipped] == [(5, "too short")]
    assert prepared.dropped_frames == 6 + 3
    assert prepared.motion == []
    with pytest.raises(UserError, match=r"no video has 1\.5 s: the longest, .*b\.mp4, has 1\.40 s; ask for less"):
        prepare(list_videos(folder), lengths=Lengths(min_seconds=1.5), progress=False)


def test_motion_is_measured_in_grey_levels(folder):
    prepared = prepare(list_videos(folder), lengths=Lengths(frames=5), motion=True, progress=False)
    assert prepared.motion == pytest.approx([STEP] * len(prepared.clips), abs=0.2)


def test_licences_are_copied(folder):
    path = str(folder / "short.mp4")
    prepared = prepare([(path, "S"), (str(folder / "more" / "b.mp4"), "B")], progress=False, licences={path: "CC0-1.0"})
    assert {clip.caption: clip.licence for clip in prepared.clips} == {"S": "CC0-1.0", "B": None}


def test_a_file_that_cannot_be_opened_is_left_out(folder, tmp_path):
    odd = os.fsencode(tmp_path) + b"/b\xff.mp4"
    shutil.copy(folder / "short.mp4", odd)
    gone, good = str(tmp_path / "gone.mp4"), str(folder / "short.mp4")
    prepared = prepare([(good, ""), (os.fsdecode(odd), ""), (gone, "")], max_bad=0.7, progress=False)
    assert prepared.clips[0].path == good
    reasons = dict(prepared.quarantined)
    assert "o such file" in reasons.pop(gone)
    # Decoders that cannot open such a name must not end the run.
    assert set(reasons) <= {os.fsdecode(odd)}
    assert all("rename" in reason for reason in reasons.values())


def test_a_video_with_several_captions_is_examined_once_and_has_clips_for_each(folder, tmp_path):
    video, short, broken = str(folder / "a_grey-wall_01.mp4"), str(folder / "short.mp4"), str(tmp_path / "x.mp4")
    Path(broken).write_text("text")
    videos = [(video, "A"), (short, "S"), (video, "B"), (short, "T"), (broken, "X"), (broken, "Y")]
    prepared = prepare(videos, lengths=Lengths(frames=12), max_bad=0.4, motion=True, progress=False)
    assert [(clip.caption, round(clip.start * 30)) for clip in prepared.clips] == [("A", 0), ("A", 12), ("B", 0), ("B", 12)]
    assert prepared.motion == pytest.approx([STEP] * 4, abs=0.2)
    assert ([stretch.path for stretch in prepared.skipped], prepared.dropped_frames) == ([short], 6)
    assert [path for path, _ in prepared.quarantined] == [broken]
    with pytest.raises(TooManyUnreadable, match=r"^1 of 3 videos are unreadable"):
        prepare(videos, max_bad=0.3, progress=False)
