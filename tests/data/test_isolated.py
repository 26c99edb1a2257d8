"""What takes a process down is one unreadable file: crashes, memory, time; the next file is read."""

import gc
import os
import pickle
import signal
import sys
import threading
from concurrent.futures import CancelledError

import numpy as np
import psutil
import pytest

from promag.data import clips
from promag.data.clips import prepare
from promag.data.video import IsolatedReader, UnreadableVideo, decode_strictly, read_frames, stream_frames, write_video
from tests.data.child_functions import count, crash, folder, own_process, refuse, take, wait
from tests.data.test_video import drifting

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="limits on memory are kept on Linux")


@pytest.fixture(scope="module")
def reader():
    return IsolatedReader(memory=2**30)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("isolated") / "v.mp4"
    write_video(path, drifting(12), 25)
    return path


def test_functions_of_the_reader_give_the_same_in_a_child(reader, video):
    facts = reader.call(decode_strictly, video)
    expected = decode_strictly(video)
    assert (facts.frames, facts.height, facts.width, facts.fps) == (12, 32, 64, expected.fps)
    assert np.array_equal(facts.timestamps, expected.timestamps)
    assert np.array_equal(np.stack(list(reader.stream(stream_frames, video, [2, 2, 9]))), read_frames(video, [2, 2, 9]))


def test_a_child_serves_one_call_after_the_other_and_ends_with_its_reader(video):
    reader = IsolatedReader()
    process = reader.call(own_process, video)
    assert process != os.getpid()
    assert {reader.call(own_process, video) for _ in range(3)} == {process}
    with pytest.raises(UnreadableVideo):
        reader.call(refuse, video)
    assert reader.call(own_process, video) == process
    del reader
    gc.collect()
    assert not psutil.pid_exists(process)


def test_a_crash_is_one_unreadable_file(reader):
    process = reader.call(own_process, "a.mp4")
    with pytest.raises(UnreadableVideo) as error:
        reader.call(crash, "a.mp4", signal.SIGSEGV)
    assert str(error.value) == "a.mp4: its decoder crashed (signal 11)"
    assert reader.call(own_process, "b.mp4") != process


def test_a_child_that_ended_while_it_had_no_work_is_replaced(reader):
    process = reader.call(own_process, "a.mp4")
    psutil.Process(process).kill()
    assert reader.call(own_process, "a.mp4") != process


@on_linux
def test_too_much_memory_is_one_unreadable_file(reader):
    assert reader.call(take, "a.mp4", 2**28) == 2**28
    with pytest.raises(UnreadableVideo, match=r"^a\.mp4: takes more than 1 GB to decode$"):
        reader.call(take, "a.mp4", 2**30)
    assert reader.call(take, "b.mp4", 2**28) == 2**28


def test_silence_and_length_are_limited(video):
    reader = IsolatedReader(silence=1.0)
    with pytest.raises(UnreadableVideo, match="no answer within 1 s: the decoder hangs"):
        reader.call(wait, video, 30)
    assert reader.call(wait, video, 0.3, 3) == "done"
    with pytest.raises(UnreadableVideo, match=r"takes longer than 0\.3 s to decode"):
        IsolatedReader(total=0.3).call(wait, video, 0.2, 20)


def test_errors_keep_their_kind_and_words(reader, video):
    with pytest.raises(UnreadableVideo) as error:
        reader.call(refuse, video)
    assert (error.value.path, error.value.reason) == (str(video), "holds no frames")
    with pytest.raises(ValueError, match=r"frame 12; legal: 0 to 11"):
        reader.call(read_frames, video, [12])
    with pytest.raises((AttributeError, pickle.PicklingError)):
        reader.call(lambda source: 1, video)
    assert reader.call(own_process, video) > 0


def test_a_stream_ends_with_its_error_or_where_it_is_left(reader):
    for then, message in (("crash", r"crashed \(signal 11\)"), ("refuse", "holds no frames")):
        received = []
        with pytest.raises(UnreadableVideo, match=message):
            received.extend(reader.stream(count, "a.mp4", 3, then))
        assert received == [0, 1, 2]
    process = reader.call(own_process, "a.mp4")
    numbers = reader.stream(count, "a.mp4", 10**9)
    assert [next(numbers), next(numbers)] == [0, 1]
    numbers.close()
    assert reader.call(own_process, "a.mp4") != process


def test_calls_of_a_pool_end_where_its_block_raises(reader):
    begun, calls = threading.Event(), []

    def follow():
        try:
            for _ in reader.stream(count, "a.mp4", 10**12):
                begun.set()
        except CancelledError:
            return reader.call(own_process, "a.mp4")  # others do not begin

    def interrupt():
        with reader.pool(2) as pool:  # closing it would wait for all numbers
            calls.extend(pool.submit(follow) for _ in range(2))
            assert begun.wait(60)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert [call.cancelled() or type(call.exception()) is CancelledError for call in calls] == [True, True]
    with reader.pool(1) as pool:
        assert pool.submit(reader.call, own_process, "a.mp4").result() > 0


def test_relative_names_mean_the_folder_of_the_call(reader, tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        assert reader.call(folder, "v.mp4") == str(tmp_path / name / "v.mp4")


@on_linux
def test_a_video_that_takes_all_memory_is_quarantined_and_the_rest_is_prepared(tmp_path, video, monkeypatch):
    write_video(tmp_path / "huge.mp4", np.broadcast_to(np.uint8(90), (2, 4096, 4096, 3)), 8)
    monkeypatch.setattr(clips, "READER", IsolatedReader(memory=2**28))
    prepared = prepare([(str(tmp_path / "huge.mp4"), "huge"), (str(video), "small")], max_bad=0.5, progress=False)
    assert prepared.quarantined == [(str(tmp_path / "huge.mp4"), "takes more than 0.25 GB to decode")]
    assert [clip.caption for clip in prepared.clips] == ["small"]
