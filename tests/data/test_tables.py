"""Tables are read in common encodings, with common separators and column names; other files are refused by name."""

import csv
import io
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from promag.data.tables import Row, find_columns, load_text, parse_columns, read_lines, read_table, rows_of
from promag.training.config import UserError

CAPTION = "Ein Hündchen \u2013 „schön“"
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"]


def table_of(folder, name, content, encoding="utf-8"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return path


# -- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_encodings_are_read_and_any_but_utf8_is_named_once(tmp_path, caplog, encoding):
    path = table_of(tmp_path, "a.csv", f"file,caption\r\na.mp4,{CAPTION}\r\n", encoding)
    for _ in range(2):
        assert rows_of(read_table(path)) == [Row("a.mp4", CAPTION)]
    named = [record.getMessage() for record in caplog.records]
    stated = {"utf-16": "UTF-16", "utf-32": "UTF-32"}.get(encoding, encoding.upper())
    expected = (
        []
        if encoding.startswith("utf-8")
        else [f"{path}: is read as {stated}; if its letters come out wrong, save it as UTF-8"]
    )
    assert named == expected


@pytest.mark.parametrize(
    "content",
    [
        b"file,caption\na.mp4,\x81\n",  # no character of cp1252
        b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
        b"file,caption\na.mp4,a\x00b\n",
        b"\xff\xfea",  # half a character of UTF-16
        b"\xef\xbb\xbf\xff",
        b"caf\xe9\x07",
    ],
)
def test_files_that_are_not_text_are_refused(tmp_path, content):
    path = table_of(tmp_path, "a.csv", content)
    with pytest.raises(UserError, match=r"a\.csv: is no text in UTF-8, UTF-16 or Windows-1252 \(cp1252\); save it as UTF-8"):
        load_text(path)


def test_lines_end_only_at_line_breaks_of_editors(tmp_path):
    path = table_of(tmp_path, "a.txt", " one\r\n\r\nthree\u2028still three\rfour \n\n\n")
    assert read_lines(path) == ["one", "", "three\u2028still three", "four"]
    assert read_lines(table_of(tmp_path, "b.txt", "\ufeff\n \n")) == []
    with pytest.raises(UserError, match=r"nowhere\.txt: cannot be read: No such file"):
        read_lines(tmp_path / "nowhere.txt")


# -- tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_separators_quotes_and_blank_lines(tmp_path, kind, separator):
    rows = [
        ["Datei", "file", "caption", ""],
        ["1", "a.mp4", 'Says "no, no; never".\nTwice.', ""],
        ["", "", "", ""],
        ["2", "b.mp4", "B", ""],
    ]
    text = io.StringIO()
    csv.writer(text, delimiter=separator).writerows(rows)
    path = table_of(tmp_path, f"a.{kind}", text.getvalue() + "\r\n\r\n")
    assert rows_of(read_table(path)) == [Row("a.mp4", 'Says "no, no; never".\nTwice.'), Row("b.mp4", "B")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            "file,caption\na.mp4,A dog, running\n",
            r"a\.csv, line 2: has 3 fields, the header 2 \(file, caption\); a caption",
        ),
        ("a.csv", 'file,caption\na.mp4,"A dog\nb.mp4,B\n', r"a\.csv: cannot be read as CSV: line 3: unexpected end of data"),
        ("a.csv", 'file,caption\na.mp4,"A" dog\n', r"cannot be read as CSV: line 2: .*expected after"),
        ("a.jsonl", '{"file": "a"}\n[1]\n', r"a\.jsonl, line 2: \[1\] is no row with named columns"),
        ("a.jsonl", '{"file": "a"}\nnot json\n', r"a\.jsonl, line 2: is no JSON: Expecting value"),
        ("a.jsonl", "[" * 100_000, r"a\.jsonl, line 1: is no JSON: "),
        ("a.json", '{"file": "a"}', r"a\.json: holds .*, not a list of rows"),
        ("a.json", "[", r"a\.json: is no JSON: "),
        ("a.json", "[3]", r"a\.json, row 1: 3 is no row with named columns"),
    ],
)
def test_files_that_are_not_tables_are_refused_with_the_line(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        read_table(table_of(tmp_path, name, content))


def test_json_lines_and_lists(tmp_path):
    rows = [
        {"file_name": "a.mp4", "text": "A\u2028line", "split": "train"},
        {"file_name": "b.mp4", "text": "", "license": "CC0-1.0"},
    ]
    lines = "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    expected = [Row("a.mp4", "A\u2028line", "train"), Row("b.mp4", "", None, "CC0-1.0")]
    assert rows_of(read_table(table_of(tmp_path, "a.jsonl", f"\ufeff{lines}\n\n"))) == expected
    assert rows_of(read_table(table_of(tmp_path, "a.json", json.dumps(rows, indent=1)))) == expected


# -- columns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["file", "file_name", "path", "video", "File_Name"])
@pytest.mark.parametrize("caption", ["caption", "text", "prompt", " Caption"])
def test_common_column_names_need_no_option(tmp_path, file, caption):
    table = read_table(table_of(tmp_path, "a.csv", f"id,{caption},{file}\n1,A,a.mp4\n"))
    assert rows_of(table) == [Row("a.mp4", "A")]


def test_named_columns(tmp_path):
    table = read_table(table_of(tmp_path, "a.csv", "clip;long;text;Lizenz\na.mp4;A long one;A;CC0-1.0\n"), {"file": "clip"})
    columns = parse_columns("file=clip, caption=long,licence=Lizenz")
    assert columns == {"file": "clip", "caption": "long", "licence": "Lizenz"}
    assert rows_of(table, columns) == [Row("a.mp4", "A long one", None, "CC0-1.0")]
    assert rows_of(table, {"file": "clip"}) == [Row("a.mp4", "A")]  # the caption's column has a common name


@pytest.mark.parametrize("text", ["", "file", "file=", "video=file", "file=a,file=b", "file=a,,"])
def test_columns_that_cannot_be_parsed(text):
    with pytest.raises(UserError, match=r"is not KEY=NAME with a key of file, caption, split, licence, each given once"):
        parse_columns(text)


@pytest.mark.parametrize(
    ("header", "columns", "message"),
    [
        (
            "name,words",
            {},
            r"1 rows with the columns name, words; wanted are rows with file or file_name .*, and caption or text or prompt;",
        ),
        ("video,text", {"caption": "long"}, r"1 rows with the columns video, text; wanted are rows with file or .*, and long;"),
        ("file,caption", {"split": "part"}, r"wanted are rows with file or .*, and part;"),
        ("file,video", {}, r"1 rows with the columns file, video; wanted"),
        (
            "file,caption,prompt",
            {},
            r"the columns caption, prompt could all be the caption; name one \(prepare-clips --columns caption=caption\)",
        ),
        ("file,path,text", {}, r"the columns file, path could all be the file; name one"),
        ("file,caption,caption", {}, r"the columns caption, caption could all be the caption"),
        ("file,text,text", {"caption": "text"}, r"the columns text, text could all be the caption"),
        ("path,caption,start,frames,sha256", {}, r"is a clip index, whose videos are prepared already"),
    ],
)
def test_messages_name_the_existing_and_the_wanted_columns(tmp_path, header, columns, message):
    row = ",".join("abcde"[: header.count(",") + 1])
    with pytest.raises(UserError, match=message):
        rows_of(read_table(table_of(tmp_path, "t.csv", f"{header}\n{row}\n"), columns), columns)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "file,caption\n,x\na.mp4,A\n"),
        ("a.csv", "caption,file\nx\na,a.mp4\n"),
        ("a.jsonl", '{"file": "a.mp4", "caption": 3}'),
        ("a.jsonl", '{"file": ["a.mp4"], "caption": "A"}'),
        ("a.jsonl", '{"file": "a.mp4", "caption": null}'),
        ("a.jsonl", '{"file": "a.mp4", "caption": "\\udc80"}'),  # half a surrogate pair
        ("a.jsonl", '{"file": "a\\u0000.mp4", "caption": "A"}'),
        ("a.jsonl", '{"file": "a.mp4"}\n{"file": "b.mp4", "caption": "B"}'),
    ],
)
def test_rows_without_a_file_or_a_caption_are_counted(tmp_path, name, content):
    with pytest.raises(UserError, match=r"1 rows lack a file or a caption, the first is "):
        rows_of(read_table(table_of(tmp_path, name, content)))


# -- any table and any bytes -----------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=12)
LATIN = st.text("abcdefghij ,;\t\"'äöüß\u2013„“€", max_size=12)


def writable(text: str, encoding: str) -> bool:
    try:
        data = text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return encoding != "cp1252" or text.isascii() or not is_utf8(data)


def is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


@settings(max_examples=60)
@given(
    captions=st.lists(st.one_of(TEXTS, LATIN), min_size=1, max_size=4),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252"]),
    separator=st.sampled_from(",;\t"),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    end=st.sampled_from(["\n", "\r\n"]),
    order=st.permutations(["file", "caption", "size"]),
)
def test_a_table_in_any_dialect_and_encoding_reads_back(tmp_path_factory, captions, encoding, separator, quoting, end, order):
    captions = [caption for caption in captions if writable(caption, encoding)]  # some bytes of cp1252 are UTF-8, too
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, order, delimiter=separator, quoting=quoting, lineterminator=end)
    writer.writeheader()
    writer.writerows({"file": f"{i}, {i}.mp4", "caption": caption, "size": i} for i, caption in enumerate(captions, 1))
    path = tmp_path_factory.mktemp("tables") / "a.csv"
    path.write_bytes((text.getvalue() + end).encode(encoding))
    if captions:
        assert rows_of(read_table(path)) == [Row(f"{i}, {i}.mp4", caption.strip()) for i, caption in enumerate(captions, 1)]


@settings(max_examples=150)
@given(
    kind=st.sampled_from(["csv", "tsv", "jsonl", "json"]),
    content=st.one_of(
        st.binary(max_size=200),
        st.tuples(
            st.sampled_from([b"file,caption\n", b"\xef\xbb\xbffile;text\n", b'{"file": "a.mp4", "caption": ']),
            st.binary(max_size=60),
        ).map(b"".join),
    ),
)
@example("csv", b"file,caption\n\r\r")
@example("jsonl", b'{"file": "a.mp4", "caption": "A"}\x85')
@example("json", b"[" * 5000)
@example("json", b"1" * 5000)  # more digits than Python converts
def test_any_bytes_are_rows_or_a_user_error(tmp_path_factory, kind, content):
    path = tmp_path_factory.mktemp("fuzz") / f"a.{kind}"
    path.write_bytes(content)
    message = str(path)
    try:
        table = read_table(path)
        find_columns(table)
        rows = rows_of(table)
    except UserError as refused:
        rows, message = [Row("a", "")], str(refused)
    assert str(path) in message
    assert all(isinstance(row.file, str) and row.file.strip() and isinstance(row.caption, str) for row in rows)
    assert rows
