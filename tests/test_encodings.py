"""Text files are read and written as UTF-8 on every system: no call leaves the encoding to the locale."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = [path for init in ROOT.glob("*/__init__.py") if init.parent.name != "tests" for path in init.parent.rglob("*.py")]


def calls_without_encoding(code: str) -> Iterator[int]:
    """Yield the lines of calls of open, read_text and write_text that handle text and name no encoding."""
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Call) or "encoding" in {keyword.arg for keyword in node.keywords}:
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = getattr(node.func, "value", None)
        if name in ("read_text", "write_text", "NamedTemporaryFile", "fdopen"):
            pass
        elif name != "open" or (isinstance(owner, ast.Name) and owner.id not in ("io", "gzip")):
            continue  # os.open, av.open, Image.open
        # The mode of open() is its second argument, that of path.open() its first.
        modes = [keyword.value for keyword in node.keywords if keyword.arg == "mode"] + node.args[
            isinstance(node.func, ast.Name) :
        ]
        if not any(isinstance(mode, ast.Constant) and "b" in str(mode.value) for mode in modes):
            yield node.lineno


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        ("open(path)", [1]),
        ("open(path, 'a')", [1]),
        ("open(path, 'rb')", []),
        ("open(path, encoding='utf-8')", []),
        ("Path(p).read_text()", [1]),
        ("p.write_text(text, encoding='utf-8')", []),
        ("(folder / 'x').open('w')", [1]),
        ("Image.open(path)", []),
    ],
)
def test_the_search_finds_calls_without_encoding(code, lines):
    assert list(calls_without_encoding(code)) == lines


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_text_file_is_opened_as_utf8(path):
    assert not list(calls_without_encoding(path.read_text(encoding="utf-8")))
