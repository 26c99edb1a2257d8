"""The command writes an index, names omitted videos, and ends with status 2 and one line after a user's mistake."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from promag.data.clip_index import load_clips
from promag.data.video import REENCODE, write_video
from promag.training.config import UserError
from tests.data.test_scenes import black, moving, still

SCRIPT = Path(__file__).parents[2] / "scripts" / "prepare_clips.py"


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("prepare_clips", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def table(tmp_path):
    """Three videos of 12, 20 and 3 frames, a damaged one, and a CSV with the last one in another split."""
    rows = ["file,caption,split"]
    for name, frames, split in (("a", 12, "train"), ("b", 20, "train"), ("c", 3, "eval")):
        write_video(tmp_path / f"{name}.mp4", np.full((frames, 32, 64, 3), 99, np.uint8), 10)
        rows.append(f"{name}.mp4,grey {name},{split}")
    (tmp_path / "d.mp4").write_text("no video")
    rows.append("d.mp4,broken,eval")
    (tmp_path / "list.csv").write_text("\n".join(rows))
    return tmp_path / "list.csv"


def test_an_index_of_one_split(main, table, tmp_path, capsys):
    out = tmp_path / "out" / "clips.jsonl"
    assert not main([str(table), "--out", str(out), "--split", "train", "--frames", "5", "--workers", "1"])
    clips = load_clips(out)
    assert [(clip.caption, clip.start, clip.frames) for clip in clips] == [
        *(("grey a", start, 5) for start in (0.0, 0.5)),
        *(("grey b", start, 5) for start in (0.0, 0.5, 1.0, 1.5)),
    ]
    output = capsys.readouterr().out
    assert f"found 2 videos in {table}, split train" in output
    assert "quarantined: 0" in output
    assert "dropped 2 frames" in output
    assert f"wrote 6 clips of 2 videos, 0.05 minutes, 30 frames, 2 different captions to {out} in " in output
    assert sorted(path.name for path in out.parent.iterdir()) == ["clips.jsonl"]


def test_omitted_videos_are_named(main, table, tmp_path, capsys):
    out, quarantine = tmp_path / "clips.jsonl", tmp_path / "clips.jsonl.quarantine.jsonl"
    main([str(table), "--out", str(out), "--fps", "20", "--frames", "20", "--max-bad", "0.25"])
    assert [(clip.caption, clip.frames, clip.fps) for clip in load_clips(out)] == [
        ("grey a", 20, 20),
        ("grey b", 20, 20),
    ]
    output = capsys.readouterr().out
    assert f"quarantined: 1\n  {tmp_path / 'd.mp4'}: cannot be opened" in output
    assert REENCODE in output
    skipped = tmp_path / "clips.jsonl.skipped.jsonl"
    assert f"too short: 1, 0.30 s: {tmp_path / 'c.mp4'} from 0.00 s\n  named in {skipped}\n" in output
    assert json.loads(skipped.read_text()) == {
        **{"path": str(tmp_path / "c.mp4"), "start": 0.0, "seconds": pytest.approx(0.3)},
        **{"frames": 5, "reason": "too short"},
    }
    assert f"slower than 20 fps, frames repeat: 2\n  {tmp_path / 'a.mp4'}: 10\n" in output
    record = json.loads(quarantine.read_text())
    assert record["path"] == str(tmp_path / "d.mp4")
    assert "cannot be opened" in record["reason"]
    main([str(table), "--out", str(out), "--split", "train"])
    assert not quarantine.exists()
    assert not skipped.exists()


def test_shots_of_a_film(main, tmp_path, capsys):
    pytest.importorskip("scenedetect", reason="the extra scenes is not installed")
    film, out = tmp_path / "film.mp4", tmp_path / "clips.jsonl"
    parts = (moving(50, 1), black(10), moving(30, 2), still(42, 3), moving(60, 4))
    write_video(film, np.concatenate(parts), 20)
    main([str(film), "--scenes", "--out", str(out)])
    assert [(round(clip.start * 20), clip.frames) for clip in load_clips(out)] == [(0, 50), (132, 60)]
    output = capsys.readouterr().out
    assert f"black: 1, 0.50 s: {film} from 2.50 s\n" in output
    assert f"too short: 1, 1.50 s: {film} from 3.00 s\n" in output
    assert f"still: 1, 2.10 s: {film} from 4.50 s\n  named in {out}.skipped.jsonl\n" in output
    main([str(film), "--scenes", "--max-seconds", "2.5", "--min-seconds", "1", "--out", str(out)])
    assert [(round(clip.start * 20), clip.frames) for clip in load_clips(out)] == [(0, 50), (60, 30), (132, 50)]
    assert "dropped 10 frames behind" in capsys.readouterr().out
    main([str(film), "--scenes", "--frames", "25", "--out", str(out)])
    assert [round(clip.start * 20) for clip in load_clips(out)] == [0, 25, 60, 132, 157]
    main([str(film), "--scenes", "--frames", "25", "--cut", str(tmp_path / "cut"), "--out", str(out)])
    assert [(Path(clip.path).parent, clip.start, clip.frames) for clip in load_clips(out)] == [(tmp_path / "cut", 0.0, 25)] * 5


def test_too_many_unreadable_videos_leave_no_index_but_advice(main, table, tmp_path):
    out = tmp_path / "new" / "clips.jsonl"
    with pytest.raises(UserError, match=r"1 of 4 videos .* 1\.0%.*d\.mp4: cannot be opened") as error:
        main([str(table), "--out", str(out)])
    assert str(error.value).endswith(f"re-encode what is odd but whole by: {REENCODE}; or allow more by --max-bad")
    assert [path.name for path in out.parent.iterdir()] == ["clips.jsonl.quarantine.jsonl"]
    (record,) = map(json.loads, Path(f"{out}.quarantine.jsonl").read_text().splitlines())
    assert record["path"] == str(tmp_path / "d.mp4")
    with pytest.raises(UserError, match="1 of 1 videos") as error:
        main([str(tmp_path / "d.mp4"), "--out", str(out)])
    assert "--max-bad" not in str(error.value)  # none is left whatever it allows


def test_columns_are_named_and_captions_kept(main, table, tmp_path):
    tsv = tmp_path / "clips.tsv"
    tsv.write_text("clip\ttext\tlang\nb.mp4\tEin Bär\tde\n\n", encoding="utf-16")
    with pytest.raises(
        UserError, match=r"1 rows with the columns clip, text, lang; wanted are rows with file or .*, and caption or"
    ):
        main([str(tsv), "--out", str(tmp_path / "clips.jsonl")])
    main([str(tsv), "--columns", "file=clip", "--out", str(tmp_path / "clips.jsonl")])
    assert [(Path(clip.path).name, clip.caption) for clip in load_clips(tmp_path / "clips.jsonl")] == [("b.mp4", "Ein Bär")]
    with pytest.raises(UserError, match="columns 'clip': 'clip' is not KEY=NAME"):
        main([str(tsv), "--columns", "clip", "--out", str(tmp_path / "clips.jsonl")])


def test_a_name_that_is_no_utf8_is_printed_and_written(table, tmp_path):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "no\udcff.mp4").write_text("no video")
    shutil.copy(tmp_path / "a.mp4", tmp_path / "odd" / "a.mp4")
    command = [sys.executable, SCRIPT, tmp_path / "odd", "--out", tmp_path / "clips.jsonl", "--max-bad", "0.5"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONUTF8": "1"})
    assert (done.returncode, "quarantined: 1\n" in done.stdout) == (0, True), done.stderr
    assert r"no\udcff.mp4: " in done.stdout
    (record,) = map(json.loads, (tmp_path / "clips.jsonl.quarantine.jsonl").read_text(encoding="utf-8").splitlines())
    assert record["path"] == f"file:{tmp_path}/odd/no%FF.mp4"


def test_a_mistake_is_one_line_and_status_2(tmp_path):
    command = [sys.executable, SCRIPT, tmp_path / "absent", "--out", tmp_path / "clips.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path / 'absent'}: no such file or folder\n"
