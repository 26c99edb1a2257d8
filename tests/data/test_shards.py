"""Shards are written, listed, indexed and read; errors name the shard and its samples."""

import dataclasses
import io
import json
import re
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from promag.data import clip_index
from promag.data.buckets import Bucket
from promag.data.clip_index import load_clips, row_of, save_clips
from promag.data.shards.index import find_shards, index_url, is_shards, open_shards
from promag.data.shards.reader import BadSample, ShardReader
from promag.data.shards.writer import index_shards, write_shards
from promag.training.config import UserError


@pytest.fixture(scope="module")
def index(clips, tmp_path_factory):
    """Seven clips: three videos twice, and an image."""
    folder = tmp_path_factory.mktemp("index")
    Image.new("RGB", (48, 40), "red").save(folder / "red.png")
    import hashlib

    digest = hashlib.sha256((folder / "red.png").read_bytes()).hexdigest()
    image = dataclasses.replace(clips[0], path=str(folder / "red.png"), frames=1, width=48, height=40, sha256=digest)
    again = [dataclasses.replace(clip, caption=f"{clip.caption} again", start=0.1, frames=4) for clip in clips]
    save_clips(folder / "clips.jsonl", [*clips, *again, dataclasses.replace(image, caption="rot", licence="CC0-1.0")])
    return folder / "clips.jsonl"


@pytest.fixture(scope="module")
def shards(index, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    assert write_shards(index, folder, 3, progress=False).shards == 3
    return folder


def tar(path, *files):
    """Write a tar of (name, bytes)."""
    with tarfile.open(path, "w") as archive:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def png(colour="red"):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 32), colour).save(buffer, "PNG")
    return buffer.getvalue()


# -- writing ---------------------------------------------------------------------------------------------------------


def test_shards_hold_the_clips_of_an_index_and_their_facts(index, shards):
    clips, result = list(load_clips(index)), open_shards(shards / "*.tar")
    assert [len(clips), len(result), result.samples.tolist()] == [7, 7, [3, 3, 1]]
    seen = []
    for shard, url in enumerate(result.urls):
        count = int(result.samples[shard])
        for number, sample in ShardReader(url, count).read(range(count)).items():
            clip = clips[int(sample.key)]
            place = int(result.offsets[shard]) + number
            there = result.clip(place, sample)
            facts = ("start", "frames", "fps", "height", "width", "caption")
            assert [getattr(there, name) for name in facts] == [getattr(clip, name) for name in facts]
            assert sample.video.name == f"{url}: {sample.key}.{clip.path.rsplit('.')[-1]}"
            with open(clip.path, "rb") as file:
                assert sample.video.data == file.read()
            seen.append(int(sample.key))
    assert sorted(seen) == list(range(7)) != seen  # shuffled


def test_a_samples_row_keeps_the_facts_of_the_index(index, shards):
    rows = []
    for url in find_shards(shards / "*.tar"):
        with tarfile.open(url) as archive:
            rows += [json.load(archive.extractfile(m)) for m in archive if m.name.endswith(".json")]
    (image,) = (row for row in rows if row["path"] == "red.png")
    assert {key: image[key] for key in ("caption", "frames", "width", "height", "licence")} == {
        **{"caption": "rot", "frames": 1, "width": 48, "height": 40},
        "licence": "CC0-1.0",
    }
    assert {row["path"] for row in rows} == {"a_grey-wall_01.mp4", "b.mp4", "short.mp4", "red.png"}


def test_shards_are_reproducible_and_continue_after_an_interruption(index, shards, tmp_path, monkeypatch):
    from promag.data.shards import writer as shard_writing

    whole, count = shard_writing._write_shard, 0

    def interrupted(*arguments):
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(shard_writing, "_write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_shards(index, tmp_path / "s", 3, progress=False)
    assert not (tmp_path / "s" / "shards.jsonl").exists()
    with pytest.raises(UserError, match="an interrupted call with other clips or settings"):
        write_shards(index, tmp_path / "s", 2, progress=False)
    written = write_shards(index, tmp_path / "s", 3, progress=False)
    assert (count, written.shards, written.samples, written.repeated) == (4, 3, 7, 3)
    names = [p.name for p in sorted((tmp_path / "s").iterdir())]
    assert names == ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar", "shards.jsonl"]
    assert all((tmp_path / "s" / name).read_bytes() == (shards / name).read_bytes() for name in names)
    with pytest.raises(UserError, match="holds whole shards already"):
        write_shards(index, tmp_path / "s", 3, progress=False)


def test_shards_of_one_bucket_each(index, tmp_path, caplog):
    buckets = [Bucket(5, 32, 64), Bucket(1, 40, 40)]
    written = write_shards(index, tmp_path, 2, 0, buckets, progress=False)
    assert (written.shards, written.left_out) == (4, 0)
    result = open_shards(tmp_path / "*.tar")
    by_name = {}
    for url, first, end in zip(result.urls, result.offsets, result.offsets[1:], strict=False):
        name = url.rsplit("/", 1)[1].rpartition("-")[0]
        by_name.setdefault(name, []).extend(result.column("frames")[first:end].tolist())
    assert {name: sorted(frames) for name, frames in by_name.items()} == {"5x32x64": [5, 21, 30], "1x40x40": [1, 4, 4, 4]}
    assert write_shards(index, tmp_path / "long", 2, 0, buckets[:1], progress=False).left_out == 4
    assert "4 of 7 clips are too short for every bucket" in caplog.text


def test_a_video_that_changed_is_named(clips, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"other")
    save_clips(tmp_path / "clips.jsonl", [dataclasses.replace(clips[0], path=str(tmp_path / "a.mp4"))])
    with pytest.raises(UserError, match=r"a\.mp4: has changed since it was prepared"):
        write_shards(tmp_path / "clips.jsonl", tmp_path / "s", 1, progress=False)
    assert not list((tmp_path / "s").glob("*.tar*"))


def test_a_video_that_is_gone_is_named(clips, tmp_path, monkeypatch):
    monkeypatch.setattr(clip_index, "SAVE_COLUMNS_FROM", 1)  # with columns beside an index its videos are not looked for again
    shutil.copy(clips[2].path, tmp_path / "a.mp4")
    save_clips(tmp_path / "clips.jsonl", [dataclasses.replace(clips[2], path=str(tmp_path / "a.mp4"))])
    load_clips(tmp_path / "clips.jsonl")
    (tmp_path / "a.mp4").unlink()
    with pytest.raises(UserError, match=r"a\.mp4: No such file or directory; put it back, or prepare the clips again"):
        write_shards(tmp_path / "clips.jsonl", tmp_path / "s", 1, progress=False)
    assert not list((tmp_path / "s").glob("*.tar*"))


def test_videos_that_readers_would_not_know_are_refused(clips, tmp_path):
    for name in ("a.mp4", "b", "c.mod"):
        shutil.copy(clips[2].path, tmp_path / name)
    again = [dataclasses.replace(clips[2], path=str(tmp_path / name)) for name in ("a.mp4", "c.mod", "b", "c.mod")]
    save_clips(tmp_path / "clips.jsonl", again)
    with pytest.raises(
        UserError, match=r"2 files have names without an ending .*/b, .*/c\.mod; .*`promag prepare-clips --cut`"
    ):
        write_shards(tmp_path / "clips.jsonl", tmp_path / "s", 1, progress=False)
    assert not (tmp_path / "s").exists()


# -- opening ---------------------------------------------------------------------------------------------------------


def test_a_video_whose_name_is_no_utf8_is_packed(clips, tmp_path):
    shutil.copy(clips[2].path, tmp_path / "no\udcff.mp4")
    save_clips(tmp_path / "clips.jsonl", [dataclasses.replace(clips[2], path=str(tmp_path / "no\udcff.mp4"))])
    assert write_shards(tmp_path / "clips.jsonl", tmp_path / "shards", 3, progress=False).samples == 1
    with tarfile.open(tmp_path / "shards" / "shard-000000.tar") as archive:
        row = json.load(archive.extractfile("000000000.json"))
    assert row == {**row_of(clips[2]), "path": "file:no%FF.mp4"}


def test_patterns(shards):
    files = [str(shards / f"shard-00000{k}.tar") for k in range(3)]
    assert find_shards(shards / "*.tar") == files
    assert find_shards(f"{shards}/shard-{{000000..000002}}.tar") == files
    assert find_shards(f"file://{shards}/shard-{{000000..000002}}.tar") == find_shards(f"file://{shards}/*.tar") == files
    assert find_shards("file:/d/my%20%2A.tar") == ["/d/my *.tar"]
    assert find_shards("https://host/a/x-{08..10}.tar?v=1") == [f"https://host/a/x-{k}.tar?v=1" for k in ("08", "09", "10")]
    assert find_shards("pipe:cat /d/{a,b}.tar") == ["pipe:cat /d/a.tar", "pipe:cat /d/b.tar"]
    for pattern, message in ((f"{shards}/x*.tar", "no file matches"), (f"{shards}/{{s,sh}}*.tar", "3 shards more than once")):
        with pytest.raises(UserError, match=message):
            find_shards(pattern)
    assert [is_shards(s) for s in ("a.tar", "x/*.tar.gz", "pipe:cat a.tar | b", "clips.jsonl", "synthetic", "a.tarnish")] == [
        *(True, True, True),
        *(False, False, False),
    ]


@pytest.mark.parametrize(
    ("shard", "place"),
    [
        ("/d/shard-000000.tar", "/d/shards.jsonl"),
        ("/d/my clips-0.tar", "/d/shards.jsonl"),
        ("/d.tar x/which? .tar.gz", "/d.tar x/shards.jsonl"),
        ("https://h/d/a.tar?key=1", "https://h/d/shards.jsonl?key=1"),
        ("pipe:aws s3 cp s3://b/d/a.tar.gz -", "pipe:aws s3 cp s3://b/d/shards.jsonl -"),
    ],
)
def test_the_index_is_beside_the_shards(shard, place):
    assert index_url(shard) == place


def test_names_with_spaces_and_wildcards_are_those_of_files(shards, tmp_path):
    folder = tmp_path / "[2024] set"
    folder.mkdir()
    for path in shards.iterdir():
        lines = path.read_bytes()
        name = path.name.replace("shard-000000", "my clips [0]")
        (folder / name).write_bytes(lines.replace(b"shard-000000", b"my clips [0]") if path.suffix == ".jsonl" else lines)
    names = ["my clips [0].tar", "shard-000001.tar", "shard-000002.tar"]
    for pattern in ("*.tar", "{my clips [0],shard-000001,shard-00000[2]}.tar"):
        result = open_shards(folder / pattern)
        assert result.urls == [str(folder / name) for name in names]
        assert (result.samples.tolist(), result.damaged()) == ([3, 3, 1], {})
    assert open_shards(folder / "my clips [0].tar").urls == [str(folder / names[0])]
    assert is_shards(folder / "shard-00000?.tar")


def test_a_subset_and_piped_shards_have_the_same_facts(shards):
    whole = open_shards(shards / "*.tar")
    some = open_shards(f"{shards}/shard-{{000002,000000}}.tar")
    assert some.urls == [whole.urls[2], whole.urls[0]]
    assert some.column("frames").tolist() == [*whole.column("frames")[6:], *whole.column("frames")[:3]]
    piped = open_shards(f"pipe:cat {shards}/shard-{{000000..000002}}.tar")
    assert piped.offsets.tolist() == whole.offsets.tolist() == [0, 3, 6, 7]
    assert piped.damaged() == {}
    url = open_shards(f"file://{shards}/shard-{{000000..000002}}.tar")
    assert (url.urls, url.damaged(), len(url)) == (whole.urls, {}, 7)


def test_indices_that_do_not_fit_are_named(shards, tmp_path):
    (tmp_path / "shard-000009.tar").touch()
    with pytest.raises(UserError, match=r"shards\.jsonl: No such file.*`promag shards write` or `promag shards index`"):
        open_shards(tmp_path / "*.tar")
    lines = (shards / "shards.jsonl").read_text()
    (tmp_path / "shards.jsonl").write_text(lines)
    with pytest.raises(UserError, match=r"1 shards have no line in the shards\.jsonl beside them: .*shard-000009\.tar"):
        open_shards(tmp_path / "*.tar")
    (tmp_path / "shards.jsonl").write_text(lines.replace('"samples": 3', '"samples": 4', 1))
    with pytest.raises(UserError, match=r"shards\.jsonl, line 1: .*4 samples, but as many values as"):
        open_shards(tmp_path / "*.tar")
    with pytest.raises(UserError, match=r"shards\.jsonl.*exit 1"):
        open_shards(f"pipe:cat {tmp_path}/absent/a.tar 2>/dev/null")


def test_a_local_shard_of_another_length_is_damaged(shards, tmp_path):
    for name in ("shard-000000.tar", "shard-000001.tar", "shards.jsonl"):
        (tmp_path / name).write_bytes((shards / name).read_bytes()[: 700 if "1" in name else None])
    result = open_shards(f"{tmp_path}/shard-00000{{0..2}}.tar").damaged()
    assert set(result) == {1, 2}
    assert re.search(r"shard-000001\.tar has 700 bytes, shards\.jsonl says \d+", result[1])
    assert result[2].endswith("shard-000002.tar is not there")


# -- reading ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def numbered(tmp_path):
    """A shard of eight images, each of one grey level, with folders in their names, and of files that are not samples."""
    files = [("readme", b"no ending"), ("__meta__", b"{}"), ("__meta__/x.json", b"{}")]
    for k in range(8):
        files += [(f"p/{k:03d}.png", png((k, k, k))), (f"p/{k:03d}.json", json.dumps({"caption": f"grey {k}"}).encode())]
    return tar(tmp_path / "numbered.tar", *files)


@pytest.mark.parametrize("template", ["{}", "pipe:cat {}", "file:{}", "file://{}", "file:/%2E{}"])
def test_samples_are_read_by_number_forwards_and_backwards(numbered, template):
    reader = ShardReader(template.format(numbered), 8)
    for numbers in ([0, 1], [2], [4, 6], [7], [3, 5], [0], [0, 7]):
        result = reader.read(numbers)
        assert [(n, s.key, s.caption) for n, s in result.items()] == [(n, f"p/{n:03d}", f"grey {n}") for n in numbers]
        assert all(s.video.data == png((n, n, n)) for n, s in result.items())
    reader.close()


def test_reading_forwards_opens_a_stream_once(numbered, tmp_path):
    reader = ShardReader(f"pipe:echo x >> {tmp_path}/opened; cat {numbered}", 8)
    for numbers in ([0], [1, 2], [3, 5], [6], [7]):
        reader.read(numbers)
    assert (tmp_path / "opened").read_text() == "x\n"
    reader.read([2])
    assert (tmp_path / "opened").read_text() == "x\nx\n"
    reader.close()


def test_a_stream_broken_between_two_reads_is_reopened(numbered, tmp_path):
    with tarfile.open(numbered) as archive:
        cut = archive.getmember("p/004.png").offset_data + 10
    command = f"pipe:echo x >> {tmp_path}/opened; if [ $(wc -l < {tmp_path}/opened) = 2 ]; then cat {numbered}"
    reader = ShardReader(f"{command}; else head -c {cut} {numbered}; fi", 8)
    assert reader.read([1])[1].caption == "grey 1"
    assert [s.caption for s in reader.read([3, 4, 6]).values()] == ["grey 3", "grey 4", "grey 6"]
    assert isinstance(reader.read([2, 5])[5], BadSample)  # a third opening, which may break independently
    assert (tmp_path / "opened").read_text() == "x\n" * 3
    reader.close()


@pytest.mark.parametrize("template", ["{}", "pipe:cat {}"])
@pytest.mark.parametrize("cut", ["inside a file", "between two", "inside a header"])
def test_a_truncated_shard_is_named(numbered, tmp_path, template, cut):
    with tarfile.open(numbered) as archive:
        members = {m.name: m for m in archive}
    end = {
        "inside a file": members["p/005.png"].offset_data + 20,
        "between two": members["p/005.png"].offset,
        "inside a header": members["p/005.png"].offset + 100,
    }[cut]
    (tmp_path / "cut.tar").write_bytes(numbered.read_bytes()[:end])
    result = ShardReader(template.format(tmp_path / "cut.tar"), 8).read(range(8))
    assert [result[n].caption for n in range(4)] == [f"grey {n}" for n in range(4)]
    for number in (5, 6, 7):
        assert isinstance(result[number], BadSample)
        assert re.search(r"shard .*cut\.tar, sample .*: the shard (cannot be read on|ends after 5 of 8)", str(result[number]))


@pytest.mark.parametrize("template", ["{}", "pipe:cat {}"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("bit", "a damaged header at byte {}; copy the shard again"),
        ("hole", "more data behind the zeros that end it at byte {}"),
        ("cut", "the end of the file, but no zeros, which end a tar at byte {}"),
        ("cut in header", "a damaged header at byte {}"),
    ],
)
def test_without_an_index_a_damaged_header_is_not_the_end(numbered, tmp_path, template, damage, message):
    with tarfile.open(numbered) as archive:
        at = archive.getmember("p/005.png").offset
    data, path = bytearray(numbered.read_bytes()), tmp_path / "damaged.tar"
    if damage == "bit":
        data[at + 3] ^= 1
    elif damage == "hole":
        data[at : at + 512] = bytes(512)
    else:
        del data[at + (100 if "header" in damage else 0) :]
    path.write_bytes(data)
    reader = ShardReader(template.format(path), None)
    samples = reader.read(range(6))
    assert [samples[k].caption for k in range(4)] == [f"grey {k}" for k in range(4)]
    assert f"damaged.tar, sample p/004: the shard cannot be read on: {message.format(at)}" in str(samples[4])
    assert (reader.stuck(4), reader.ended(5)) == (True, False)
    if template == "{}":
        with pytest.raises(UserError, match=r"damaged\.tar, sample p/004: the shard cannot be read on: "):
            index_shards(str(path), tmp_path / "shards.jsonl", progress=False)


def test_without_an_index_a_whole_shard_ends(numbered):
    reader = ShardReader(str(numbered), None)
    assert [reader.read([k])[k].caption for k in range(8)] == [f"grey {k}" for k in range(8)]
    reader.read([8])
    assert (reader.ended(8), reader.stuck(8)) == (True, False)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([("a.png", png())], "sample a: no caption"),
        ([("a.png", png()), ("a.json", b"{")], "sample a: Expecting"),
        ([("a.png", png()), ("a.json", b'{"caption": 3}')], "sample a: no caption"),
        ([("a.txt", b"red")], r"sample a: no videos or images among its files \.txt"),
        ([("a.txt", b"red"), ("a.png", b""), ("a.mp4", b"")], "sample a: 2 videos or images"),
        ([("a.txt", b"red"), ("a.png", b""), ("a.PNG", b"")], r"sample a: holds two files \.png"),
        ([("a.txt", b"\x81"), ("a.png", b"")], "sample a: captions of .*: is no text in UTF-8, UTF-16 or"),
        ([("a.png", png()), ("a.txt", b"red"), ("b.txt", b"")], "sample a: the shard has more than the 1 samples"),
        ([("readme", b"")], "sample number 0: the shard ends after 0 of 1 samples"),
    ],
)
def test_bad_samples_are_named(tmp_path, files, message):
    path = tar(tmp_path / "bad.tar", *files)
    result = ShardReader(str(path), 1).read([0])[0]
    assert isinstance(result, BadSample)
    assert re.search(rf"shard {path}, {message}", str(result))


@pytest.mark.parametrize("url", ["{}/absent.tar", "pipe:cat {}/absent.tar 2>/dev/null"])
def test_a_shard_that_cannot_be_opened_is_named(tmp_path, url):
    result = ShardReader(url.format(tmp_path), 2).read([1])[1]
    assert re.search(r"shard .*absent\.tar.*, sample number 1: the shard cannot be opened: ", str(result))


def test_a_caption_may_be_a_text_file(tmp_path):
    path = tar(tmp_path / "t.tar", ("a.png", png()), ("a.json", b'{"url": 1}'), ("a.txt", b" rot \n"))
    assert ShardReader(str(path), 1).read([0])[0].caption == "rot"
    for encoding in ("utf-8-sig", "utf-16", "cp1252"):
        path = tar(tmp_path / "t.tar", ("a.png", png()), ("a.txt", "schön\r\n".encode(encoding)))
        assert ShardReader(str(path), 1).read([0])[0].caption == "schön"


# -- foreign shards --------------------------------------------------------------------------------------------------


def test_foreign_shards_are_indexed_by_decoding(clips, numbered, tmp_path):
    with open(clips[1].path, "rb") as file:
        video = file.read()
    tar(tmp_path / "other.tar", ("x.mp4", video), ("x.txt", b"b"), ("y.mp4", video[:900]), ("y.txt", b""), ("z.png", png()))
    with pytest.raises(
        UserError, match=r"2 of 11 samples are bad, at most 1\.0% may be: .*other\.tar: y\.mp4: .*sample z: no caption"
    ):
        index_shards(f"{tmp_path}/{{other,numbered}}.tar", tmp_path / "shards.jsonl", progress=False)
    samples, bad = index_shards(f"{tmp_path}/*.tar", tmp_path / "shards.jsonl", max_bad=0.5, workers=1, progress=False)
    assert (samples, len(bad)) == (11, 2)
    result = open_shards(tmp_path / "*.tar")
    assert result.column("frames").tolist() == [1] * 8 + [21, 0, 0]
    assert result.column("width").tolist() == [40] * 8 + [64, 0, 0]
    assert result.damaged() == {}
    (tmp_path / "other.tar").write_bytes((tmp_path / "other.tar").read_bytes()[:4000])
    with pytest.raises(UserError, match=r"other\.tar, sample x: the shard cannot be read on"):
        index_shards(f"{tmp_path}/other.tar", tmp_path / "shards.jsonl", progress=False)


def test_written_and_indexed_facts_agree(shards, tmp_path):
    index_shards(f"{shards}/*.tar", tmp_path / "shards.jsonl", progress=False)
    written, indexed = ([json.loads(x) for x in (f / "shards.jsonl").read_text().splitlines()] for f in (shards, tmp_path))
    for row, other in zip(written, indexed, strict=True):
        same = ("shard", "samples", "bytes", "sha256", "height", "width")
        assert {key: row[key] for key in same} == {key: other[key] for key in same}
        assert np.all(np.array(other["frames"]) >= row["frames"])  # of whole files, which contain these clips


@pytest.mark.parametrize("url", ["pipe:echo x > {}/ran; echo a.tar", "PIPE:echo x > {}/ran; cat a.tar"])
@pytest.mark.parametrize("allowed", [None, "", "0", "yes"])
def test_pipes_run_only_if_the_environment_allows_them(tmp_path, monkeypatch, url, allowed):
    monkeypatch.delenv("PROMAG_ALLOW_PIPES")
    if allowed is not None:
        monkeypatch.setenv("PROMAG_ALLOW_PIPES", allowed)
    for read in (open_shards, lambda name: ShardReader(name, 1).read([0])):
        with pytest.raises(UserError, match=r"a pipe runs a shell command.*set PROMAG_ALLOW_PIPES=1"):
            read(url.format(tmp_path))
    assert list(tmp_path.iterdir()) == []
