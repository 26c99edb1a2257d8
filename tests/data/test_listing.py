"""Videos and captions are found where people keep them, and the log states which were used and which were not."""

import json
import logging
import os
import unicodedata

import av.format
import pytest

from promag.data.captions import caption_from_name, locate, path_of_url
from promag.data.listing import SOUND_EXTENSIONS, VIDEO_EXTENSIONS, list_licences, list_videos
from promag.data.video import IMAGE_EXTENSIONS
from promag.training.config import UserError

NFC, NFD = (unicodedata.normalize(form, "Bärenhöhle") for form in ("NFC", "NFD"))


def tree(folder, files):
    """Write files of the given names and contents; a video needs no content to be listed."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def listed(folder, **options):
    """Return the captions by path relative to the folder."""
    return {os.path.relpath(path, folder): caption for path, caption in list_videos(folder, **options)}


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("a_red-kite_03.mp4", "a red kite"),
        ("4_dogs__run-2_17.mov", "4 dogs run"),
        ("0001.mp4", ""),
        ("12:30.5.mp4", ""),
        ("kite (2).mp4", "kite"),
        ("x2y.mp4", "x2y"),
        (f"{NFD}_1.mp4", NFC),
        ("a\ndog 🐕.mp4", "a dog 🐕"),
        ("caf\udce9_au_lait.mp4", "caf au lait"),
    ],
)
def test_caption_from_name(name, caption):
    assert caption_from_name(name) == caption


ODD = [
    "12:30.mp4",
    "two\nlines.mp4",
    "🐕.webm",
    " spaces .mp4",
    "per%20cent.mp4",
    "file:x.mp4",
    "q?a#b.mkv",
    "no\udcff.mp4",
    f"{NFD}.mp4",
]


def test_odd_names_in_a_folder_and_in_tables(tmp_path, monkeypatch):
    folder = tree(tmp_path / "v", dict.fromkeys(ODD, b""))
    assert sorted(listed(folder)) == sorted(ODD)
    monkeypatch.chdir(folder)
    for name in ODD:
        assert [path for path, _ in list_videos(name)] == [str(folder / name)]
    rows = [{"file": name, "caption": str(number)} for number, name in enumerate(ODD)]
    tree(folder, {"list.jsonl": "\n".join(map(json.dumps, rows))})
    assert listed(folder) == {name: str(number) for number, name in enumerate(ODD)}
    assert [path for path, _ in list_videos(folder / "list.jsonl")] == [str(folder / name) for name in ODD]


@pytest.mark.parametrize(
    "url", ["file://{0}/no%FF%20x.mp4", "file:{0}/no%FF%20x.mp4", "file://localhost{0}/no%FF%20x.mp4", " file:no%FF%20x.mp4"]
)
def test_file_urls_in_tables(tmp_path, url):
    tree(tmp_path, {"no\udcff x.mp4": b""})
    assert path_of_url("file:a%2Fb%C3%A4%FF") == "a/bä\udcff"
    tree(tmp_path, {"t.tsv": f"path\ttext\n{url.format(tmp_path)}\tA\n"})
    assert listed(tmp_path) == {"no\udcff x.mp4": "A"}


def test_composed_and_decomposed_unicode_names_match(tmp_path, caplog):
    tree(
        tmp_path,
        {
            f"{NFD}/{NFC}.mp4": b"",
            f"{NFD}/{NFD} 2.mp4": b"",
            "t.csv": f"file,caption\n{NFC}/{NFD}.mp4,A\n{NFC}/{NFC} 2.mp4,B\n",
        },
    )
    with caplog.at_level(logging.WARNING):
        assert listed(tmp_path) == {f"{NFD}/{NFC}.mp4": "A", f"{NFD}/{NFD} 2.mp4": "B"}
    assert not caplog.records
    tree(tmp_path, {f"{NFD}/{NFD}.mp4": b"", f"{NFC}/x.mp4": b""})  # now each exact name is there
    assert locate(tmp_path, f"{NFD}/{NFD}.mp4") == str(tmp_path / NFD / f"{NFD}.mp4")
    assert locate(tmp_path, f"{NFC}/x.mp4") == str(tmp_path / NFC / "x.mp4")
    tree(tmp_path, {"\u212b.mp4": b"", "A\u030a.mp4": b""})  # both are Å
    with pytest.raises(
        UserError, match=r"Å\.mp4: is not there, and 2 files there look like it: 'A\\u030a\.mp4', '\\u212b\.mp4'; rename one"
    ):
        locate(tmp_path, "\u00c5.mp4")
    assert locate(tmp_path, "\u212b.mp4") == str(tmp_path / "\u212b.mp4")
    assert locate(tmp_path, "gone/ä.mp4") == str(tmp_path / "gone/ä.mp4")


# -- folders ---------------------------------------------------------------------------------------------------------


def test_every_file_extension_of_a_video_demuxer(tmp_path):
    claimed = set()
    for name in av.format.formats_available:
        container = av.format.ContainerFormat(name)
        claimed |= {f".{ending}" for ending in container.extensions} if container.is_input else set()
    others = {".qt", ".divx", ".xvid", ".amv", ".rmvb", ".ogv", ".ogm", ".mpe", ".m1v", ".m2v", ".mpv", ".vob", ".evo"}
    others |= {".tp", ".trp", ".tod", ".cine"}  # in use for containers that are claimed under another name
    assert set(VIDEO_EXTENSIONS) - claimed == others
    assert not set(VIDEO_EXTENSIONS) & {*IMAGE_EXTENSIONS, *SOUND_EXTENSIONS, ".txt"}
    assert len(set(VIDEO_EXTENSIONS)) == len(VIDEO_EXTENSIONS)
    tree(tmp_path, {f"a{ending.upper()}": b"" for ending in VIDEO_EXTENSIONS})
    assert len(list_videos(tmp_path)) == len(VIDEO_EXTENSIONS)


def test_a_folder_is_searched_and_captioned_from_names(folder, caplog):
    names = ["a_grey-wall_01.mp4", "more/b.mp4", "short.mp4"]
    assert list_videos(folder) == list(zip([str(folder / n) for n in names], ["a grey wall", "b", "short"], strict=True))
    assert list_videos(folder / "more" / "b.mp4") == [(str(folder / "more" / "b.mp4"), "b")]
    (record,) = caplog.records
    assert record.getMessage() == f"{folder}: 3 captions: 3 from file names ({', '.join(f'{folder}/{n}' for n in names)})"


def test_skipped_files_are_counted_and_named_once(tmp_path, caplog):
    skipped = ["b.png", "c.png", "d.JPG", "e.wav", "readme.txt", "f.zip", "Makefile", "sizes.csv"]
    tree(tmp_path, {"a.mp4": b"", ".hidden.mp4": b"", ".git/x.mp4": b"", "a.txt": "A", **dict.fromkeys(skipped, "a,b\n1,2\n")})
    assert listed(tmp_path) == {"a.mp4": "A"}
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{tmp_path}: skipped 8 files: images, which prepare-clips takes with --images (.jpg 1, .png 2); "
        "others (.zip 1, no ending 1); sound (.wav 1); tables without captions (.csv 1); texts that are no video's (.txt 1)"
    )
    assert listed(tmp_path, images=True) == {"a.mp4": "A", "b.png": "b", "c.png": "c", "d.JPG": "d"}
    (tmp_path / "a.mp4").unlink()
    with pytest.raises(
        UserError, match=r"holds no video \(9 files: images, which .*; texts that .* \(\.txt 2\)\); videos end in \.264 \.265 "
    ):
        list_videos(tmp_path)


def test_linked_folders_are_entered_once_and_loops_end(tmp_path):
    tree(
        tmp_path, {"data/z/a.mp4": b"", "elsewhere/b.mp4": b"", "elsewhere/.c.mp4": b"", "elsewhere/c.txt": "", "one.mp4": b""}
    )
    folder = tmp_path / "data"
    (folder / "a link").symlink_to(tmp_path / "elsewhere")
    (folder / "another").symlink_to(tmp_path / "elsewhere")
    (folder / "0").symlink_to("z")
    (folder / "z" / "up").symlink_to(folder)
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "elsewhere")
    (folder / "one.mp4").symlink_to(tmp_path / "one.mp4")
    assert sorted(listed(folder)) == ["a link/b.mp4", "one.mp4", "z/a.mp4"]
    tree(folder, {"captions.csv": "file,caption\n0/a.mp4,A\nanother/b.mp4,B\n"})  # by other links to the same folders
    assert listed(folder) == {"0/a.mp4": "A", "another/b.mp4": "B", "one.mp4": "one"}
    (tmp_path / "root").symlink_to(folder)
    assert sorted(listed(tmp_path / "root")) == ["0/a.mp4", "another/b.mp4", "one.mp4"]


def test_a_folder_that_cannot_be_read_is_named(tmp_path, caplog, monkeypatch):
    tree(tmp_path, {"a.mp4": b"", "closed/b.mp4": b""})
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert list(listed(tmp_path)) == ["a.mp4"]
    assert f"skipped 1 folders or links that cannot be read: {tmp_path}/closed (Permission denied)" in caplog.text


def test_a_link_to_itself_is_named(tmp_path, caplog):
    tree(tmp_path, {"a.mp4": b"", "more/b.mp4": b""})
    for name in ("loop", "more/loop.mp4"):
        (tmp_path / name).symlink_to(tmp_path / name)
    assert sorted(listed(tmp_path)) == ["a.mp4", "more/b.mp4"]
    assert f"skipped 2 folders or links that cannot be read: {tmp_path}/loop (Too many levels of" in caplog.text


def test_pipes_and_links_to_nothing(tmp_path):
    tree(tmp_path, {"a.mp4": b""})
    os.mkfifo(tmp_path / "b.mp4")
    (tmp_path / "c.mp4").symlink_to("nowhere.mp4")
    assert sorted(listed(tmp_path)) == ["a.mp4", "c.mp4"]


# -- captions --------------------------------------------------------------------------------------------------------


def test_text_files_beside_videos(tmp_path, caplog):
    texts = {
        "a.txt": "\ufeffA dog\r\nruns. \n",
        "b.caption": "B",
        "c.txt": "C",
        "c.caption": "not read",
        "d.e.TXT": "D",
        f"{NFC}.txt": "E",
    }
    tree(tmp_path / "v", {**texts, **dict.fromkeys(["a.mp4", "b.mov", "c.webm", "d.e.mkv", f"{NFD}.avi"], b"")})
    expected = {"a.mp4": "A dog runs.", "b.mov": "B", "c.webm": "C", "d.e.mkv": "D", f"{NFD}.avi": "E"}
    with caplog.at_level(logging.WARNING):
        assert listed(tmp_path / "v") == expected
        assert [record.getMessage() for record in caplog.records] == [
            f"{tmp_path}/v: skipped 1 files: texts that are no video's (.caption 1)"
        ]
    assert list_videos(tmp_path / "v" / "a.mp4") == [(str(tmp_path / "v" / "a.mp4"), "A dog runs.")]


@pytest.mark.parametrize("videos", ["videos.txt", "video.txt"])
@pytest.mark.parametrize("captions", ["prompts.txt", "prompt.txt", "captions.txt", "caption.txt"])
def test_lists_of_videos_and_captions(tmp_path, videos, captions, caplog):
    tree(
        tmp_path,
        {
            "videos/1.mp4": b"",
            "videos/2.mp4": b"",
            videos: "videos/2.mp4\r\nvideos/1.mp4\r\n\r\n",
            captions: "\ufeffTwo, too\nOne\n\n",
        },
    )
    with caplog.at_level(logging.WARNING):
        assert listed(tmp_path) == {"videos/1.mp4": "One", "videos/2.mp4": "Two, too"}
        assert not caplog.records
    for name in (videos, captions):
        assert [caption for _, caption in list_videos(tmp_path / name)] == ["Two, too", "One"]


@pytest.mark.parametrize(
    ("files", "source", "message"),
    [
        (
            {"videos.txt": "a.mp4\nb.mp4\n", "prompts.txt": "A\n"},
            "",
            r"videos\.txt has 2 lines, 0 of them empty, and .*prompts\.txt has 1;",
        ),
        (
            {"videos.txt": "a.mp4\n\nb.mp4", "prompts.txt": "A\n\nB"},
            "",
            r"videos\.txt has 3 lines, 1 of them empty, and .*prompts\.txt has 3;",
        ),
        ({"videos.txt": "a.mp4\nc.mp4", "prompts.txt": "A\nB"}, "", r"videos\.txt: lists 1 files that are not there: .*c\.mp4"),
        (
            {"videos.txt": "a.mp4", "prompts.txt": "A", "prompt.txt": "B"},
            "",
            r"videos\.txt, prompts\.txt, prompt\.txt: one list of videos and",
        ),
        (
            {"videos.txt": "a.mp4"},
            "videos.txt",
            r"videos\.txt: is no list of videos: that is videos\.txt or video\.txt beside prompts\.txt",
        ),
        ({"a.txt": "A"}, "a.txt", r"a\.txt: is no list of videos"),
    ],
)
def test_lists_of_different_lengths_are_refused(tmp_path, files, source, message):
    tree(tmp_path, {"a.mp4": b"", "b.mp4": b"", **files})
    with pytest.raises(UserError, match=message):
        list_videos(tmp_path / source)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", "file_name,text\ntrain/a.mp4,A\n"),
        ("metadata.jsonl", '{"file_name": "train/a.mp4", "caption": "A", "size": 3}\n'),
        ("metadata.json", '[{"file_name": "train/a.mp4", "text": "A"}]'),
        ("train/metadata.csv", "file_name;prompt\na.mp4;A\n"),
        ("any.tsv", "video\tprompt\ntrain/a.mp4\tA\n"),
    ],
)
def test_tables_of_folders(tmp_path, name, content, caplog):
    tree(tmp_path, {"train/a.mp4": b"", name: content, "info.json": '{"videos": 1}', "other.json": "no json"})
    with caplog.at_level(logging.INFO):
        assert listed(tmp_path) == {"train/a.mp4": "A"}
    assert caplog.records[0].getMessage() == f"{tmp_path}: 1 captions: 1 from {name}"
    assert caplog.records[0].levelno == logging.INFO


def test_captions_come_from_one_source_by_priority_and_the_log_names_it(tmp_path, caplog):
    """Tables come before lists, lists before text files, these before file names; the nearest folder's table comes first."""
    videos = dict.fromkeys(["a.mp4", "b.mp4", "c.mp4", "in/d.mp4", "in/e.mp4"], b"")
    tree(
        tmp_path,
        videos
        | {
            "captions.csv": "file,caption\na.mp4,A\nin/d.mp4,not taken\nin/e.mp4,E\n",
            "a.txt": "another",
            "b.txt": "B",
            "in/e.txt": "E",
        },
    )
    tree(
        tmp_path,
        {
            "in/metadata.csv": "file_name,text\nd.mp4,D\n",
            "metadata.csv": "file,text\na.mp4,X\n",
            "videos.txt": "b.mp4",
            "prompts.txt": "X",
        },
    )
    assert listed(tmp_path) == {"a.mp4": "A", "b.mp4": "B", "c.mp4": "c", "in/d.mp4": "D", "in/e.mp4": "E"}
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}/captions.csv: is taken for captions; metadata.csv, videos.txt, prompts.txt beside it are not read",
        f"{tmp_path}: 5 captions: 3 from captions.csv, in/metadata.csv, 1 from text files beside the videos, "
        f"1 from file names ({tmp_path}/c.mp4)",
        f"{tmp_path}: the table's caption was taken for 1 videos that have another one in a text file beside them: "
        f"{tmp_path}/a.mp4",
    ]


def test_empty_captions_are_named(tmp_path, caplog):
    tree(tmp_path, {"001.mp4": b"", "002.mp4": b"", "002.txt": "\n"})
    assert listed(tmp_path) == {"001.mp4": "", "002.mp4": ""}
    assert f"{tmp_path}: 2 of 2 captions are empty: {tmp_path}/001.mp4, {tmp_path}/002.mp4" in caplog.text


def test_several_tables_without_a_priority_are_refused(tmp_path):
    tree(
        tmp_path,
        {
            "a.mp4": b"",
            "x.csv": "file,caption\na.mp4,X\n",
            "y.jsonl": '{"file": "a.mp4", "caption": "Y"}',
            "sizes.csv": "file,size\na.mp4,3\n",
        },
    )
    with pytest.raises(UserError, match=r"x\.csv, y\.jsonl all hold captions; name one of them in place of the folder"):
        list_videos(tmp_path)
    assert list_videos(tmp_path / "y.jsonl") == [(str(tmp_path / "a.mp4"), "Y")]
    tree(tmp_path, {"manifest.csv": "\ufefffile,caption\na.mp4,first\n"})
    assert listed(tmp_path) == {"a.mp4": "first"}


def test_the_index_in_a_folder_is_no_table(tmp_path):
    row = {
        "path": "a.mp4",
        "start": 0.0,
        "frames": 5,
        "fps": 30.0,
        "width": 8,
        "height": 8,
        "caption": "old",
        "sha256": "0" * 64,
    }
    tree(tmp_path, {"a.mp4": b"", "clips.jsonl": json.dumps(row)})
    assert listed(tmp_path) == {"a.mp4": "a"}
    with pytest.raises(UserError, match="is a clip index, whose videos are prepared already"):
        list_videos(tmp_path / "clips.jsonl")


# -- columns, splits, licences ---------------------------------------------------------------------------------------

TABLE = "clip;text;long;set;license\na.mp4;A;A long;train;CC0-1.0\nb.mp4;B;B long;eval;\n"


@pytest.mark.parametrize("source", ["", "table.csv"])
def test_named_columns_of_a_table_or_a_folders(tmp_path, source):
    tree(tmp_path, {"a.mp4": b"", "b.mp4": b"", "table.csv": TABLE})
    columns = {"file": "clip", "caption": "long", "split": "set"}
    assert list_videos(tmp_path / source, columns=columns) == [
        (str(tmp_path / "a.mp4"), "A long"),
        (str(tmp_path / "b.mp4"), "B long"),
    ]
    assert list_videos(tmp_path / source, "eval", columns=columns) == [(str(tmp_path / "b.mp4"), "B long")]
    assert list_licences(tmp_path / source, columns) == {str(tmp_path / "a.mp4"): "CC0-1.0"}
    with pytest.raises(UserError, match="no row has split 'test'; splits there: eval, train"):
        list_videos(tmp_path / source, "test", columns=columns)
    with pytest.raises(UserError, match="clip.*gone" if source else r"no table there has captions and the columns clip, gone"):
        list_videos(tmp_path / source, columns={"file": "clip", "caption": "gone"})


def test_a_split_needs_a_table(folder):
    with pytest.raises(UserError, match=r"no table there has captions and a column split, which split 'train' needs"):
        list_videos(folder, "train")
    with pytest.raises(UserError, match="split 'train' needs a table with a column split"):
        list_videos(folder / "short.mp4", "train")
    assert list_licences(folder) == list_licences(folder / "short.mp4") == {}


def test_a_table_keeps_its_order_and_paths_are_relative_to_it(folder, tmp_path):
    rows = [
        ("v/short.mp4", " ein kurzer Schwenk über Grau ", "train"),
        (str(folder / "more" / "b.mp4"), "b", "eval"),
        ("v/short.mp4", "again", "train"),
    ]
    tree(tmp_path, {"v/short.mp4": b"", "list.csv": "file,caption,split\n" + "\n".join(map(",".join, rows))})
    short = str(tmp_path / "v" / "short.mp4")
    assert list_videos(tmp_path / "list.csv") == [(short, "ein kurzer Schwenk über Grau"), (rows[1][0], "b"), (short, "again")]
    assert list_videos(tmp_path / "list.csv", "eval") == [(rows[1][0], "b")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent", None, "no such file or folder"),
        ("c.csv", "file,caption\ngone.mp4,x\nlost.mp4,y\n", "2 files that are not there: .*gone.mp4, .*lost.mp4"),
        ("u.csv", "file,caption\nfile:%00.mp4,x\n", "1 files that are not there: .*file:%00.mp4"),
        ("b.csv", "file,caption\n", "0 rows with the columns file, caption; wanted"),
        ("g.csv", "", r"0 rows with the columns \(none\); wanted"),
    ],
)
def test_paths_that_cannot_be_listed_are_refused(tmp_path, name, content, message):
    tree(tmp_path, {} if content is None else {name: content})
    with pytest.raises(UserError, match=message):
        list_videos(tmp_path / name)
