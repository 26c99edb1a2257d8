"""The commands make shards from a folder of videos, and an index of foreign shards."""

import pytest

from promag.data.shards.index import open_shards
from tests.processes import run_promag


@pytest.fixture(scope="module")
def clips(video_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("index") / "clips.jsonl"
    assert run_promag("prepare-clips", video_folder, "--out", out, "--frames", 10).returncode == 0
    return out


def test_shards_are_written_and_indexed(clips, tmp_path):
    done = run_promag("shards", "write", clips, "--out", tmp_path, "--per-shard", 3, "--buckets", "[[9, 64, 64], [5, 32, 64]]")
    assert done.returncode == 0, done.stderr
    assert "4 clips are cut from a video that another one holds too" in done.stdout
    assert "wrote 8 clips, 0.00 GB, in 3 shards to" in done.stdout
    opened = open_shards(tmp_path / "9x64x64-*.tar")
    assert opened.samples.tolist() == [3, 3, 2]
    assert opened.column("frames").tolist() == [10] * 8
    done = run_promag("shards", "index", f"{tmp_path}/*.tar", "--out", tmp_path / "other.jsonl")
    assert done.returncode == 0, done.stderr
    assert f"bad samples, which are never drawn: 0\nwrote 8 samples to {tmp_path}/other.jsonl" in done.stdout


def test_mistakes_are_one_line_and_status_2(clips, tmp_path):
    for arguments, message in (
        (("shards", "write", clips, "--out", tmp_path, "--buckets", "[9, 64]"), "[[frames, height, width], ...] is needed"),
        (("shards", "index", f"{tmp_path}/*.tar", "--out", tmp_path / "x"), "no file matches"),
    ):
        done = run_promag(*arguments)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert message in done.stderr
