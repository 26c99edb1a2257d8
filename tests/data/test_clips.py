"""Videos are found, captioned and prepared strictly, and the index is read as strictly as it was written."""

import hashlib
import json
import shutil

import pytest

from promag.data.clip_index import Clip
from promag.data.clips import caption_from_name, list_licences, list_videos, prepare
from promag.data.datasets import ClipDataset
from promag.training.config import UserError
from tests.data.conftest import numbers

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
        ("a.csv", "path,text\na.mp4,x\n", "columns file and caption, and one has path, text"),
        ("a.jsonl", "[1, 2]\n", r"columns file and caption, and one has \[1, 2\]"),
        ("b.csv", "file,caption\n", "columns file and caption, and has no rows"),
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


def test_licences_go_along_from_a_table(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "v")
    (tmp_path / "v" / "captions.csv").write_text("file,caption,licence\nshort.mp4,S,CC0-1.0\nmore/b.mp4,B,\n")
    path = str(tmp_path / "v" / "short.mp4")
    for source in (tmp_path / "v", tmp_path / "v" / "captions.csv"):
        assert list_licences(source) == {path: "CC0-1.0"}
    assert list_licences(path) == list_licences(folder) == {}
    prepared = prepare(list_videos(tmp_path / "v" / "captions.csv"), progress=False, licences={path: "CC0-1.0"})
    assert {clip.caption: clip.licence for clip in prepared.clips} == {"S": "CC0-1.0", "B": None}


def test_empty_lines_of_a_jsonl_are_no_rows(folder, tmp_path):
    rows = [json.dumps({"file": str(folder / name), "caption": name}) for name in ("short.mp4", "a_grey-wall_01.mp4")]
    (tmp_path / "videos.jsonl").write_text("\ufeff" + "\n\n".join(rows) + "\n\n", encoding="utf-8")
    assert [caption for _, caption in list_videos(tmp_path / "videos.jsonl")] == ["short.mp4", "a_grey-wall_01.mp4"]
