"""Strict configuration: a YAML file and dotted options become one nested, frozen dataclass.

Defaults stand in the dataclasses; a preset states only what differs from them. Unknown keys, missing keys and wrong types are
the user's mistakes and end the program with one line and exit status 2.
"""

import argparse
import dataclasses
import difflib
import functools
import importlib.resources
import json
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

Config = TypeVar("Config")


class UserError(ValueError):
    """A mistake in what the user gave: shown as one line, without a traceback."""


def run_main(main: Callable[[Sequence[str]], int]) -> int:
    """Run `main(argv)` and return its exit status; a UserError becomes one line on stderr and status 2.

    argparse's own errors already have that status. A process of several leaves their group, unless `main` raised.
    """
    try:
        status = main(sys.argv[1:])
        distributed = sys.modules.get("torch.distributed")
        if distributed and distributed.is_initialized():
            from .fsdp import leave_process_group

            leave_process_group()
        return status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of our output (head, less) went away: not an error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def parse_config(cls: type[Config], argv: Sequence[str], description: str) -> Config:
    """Read `--config PRESET` and `--dotted.key value` options from `argv` into `cls`.

    Every leaf of the dataclass is an option, in which `-` and `_` are the same; --help shows its type, default and meaning.
    An element of a list is named by its index (`--stages.0.steps 10`); a list is given as words (`--ratios 4 8`) or as YAML
    (`--ratios "[4, 8]"`). The field's type decides how a word is read: text stays as it is, all else is YAML 1.2.
    --print-config prints the resolved configuration and exits.
    Raises UserError for a missing file, unknown or missing keys and wrong types.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="options of the configuration, each also `--name value`:\n" + "\n".join(_describe(cls)),
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="PRESET", required=True, help="a YAML file, or a preset such as tokenizer/tiny")
    parser.add_argument(
        "--print-config", "--print_config", action="store_true", help="print the resolved configuration as YAML and exit"
    )
    arguments, rest = parser.parse_known_args(argv)
    values = _complete(cls, load_yaml(arguments.config))
    for name, words in _pair_options(rest):
        _override(cls, values, name, words)
        values = _complete(cls, values)
    config = build(cls, values, arguments.config)
    if arguments.print_config:
        print(dump_yaml(config), end="")
        raise SystemExit(0)
    return config


def load_yaml(path: str | os.PathLike) -> dict[str, Any]:
    """Return the mapping in a YAML file, given by its path or as a preset's name; raises UserError where there is none."""
    try:
        values = yaml.load(find_preset(path).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"config {path}: {error.strerror or error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"config {path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        content = "is empty" if values is None else f"holds {type(values).__name__}"
        raise UserError(f"config {path}: {content}, a mapping of keys is needed")
    return values


def find_preset(name: str | os.PathLike) -> Path:
    """Return the file `name`, or the preset that is called so (`tokenizer/tiny`); raises UserError for an unknown name."""
    if Path(name).is_file() or Path(name).suffix:
        return Path(name)
    folder = Path(str(importlib.resources.files("promag.configs")))
    presets = {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}
    if preset := presets.get(str(name)):
        return preset
    close = difflib.get_close_matches(str(name), presets, 1)
    nearest = f"did you mean {close[0]}? " if close else ""
    raise UserError(f"config {name}: neither a file nor a preset; {nearest}presets: {', '.join(presets)}")


def build(cls: type[Config], values: dict[str, Any], source: str) -> Config:
    """Turn plain values into the dataclass `cls`, strictly, defaults filled in; `source` is named in the UserError."""
    try:
        return _adapter(cls).validate_python(_complete(cls, values))
    except ValidationError as error:
        raise UserError(f"config {source}: " + "; ".join(_explain(cls, e) for e in error.errors()[:3])) from None


def to_plain(config: Any) -> dict[str, Any]:
    """Return a dataclass as plain YAML- and JSON-ready values."""
    return _plain(config)


def dump_yaml(config: Any) -> str:
    """Return the resolved configuration as YAML, keys in the dataclass's order."""
    return yaml.dump(to_plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def save_yaml(path: str | os.PathLike, config: Any) -> None:
    """Write the resolved configuration as YAML, keys in the dataclass's order; other processes see all of it or nothing."""
    aside = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
    aside.write_text(dump_yaml(config), encoding="utf-8")
    os.replace(aside, path)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value


@functools.cache
def _adapter(cls: type) -> TypeAdapter:
    _forbid_extra(cls)
    return TypeAdapter(cls)


def _forbid_extra(cls: Any) -> None:
    """Make pydantic refuse unknown keys in `cls` and in every dataclass its fields mention."""
    if dataclasses.is_dataclass(cls):
        cls.__pydantic_config__ = {"extra": "forbid"}  # pyright: ignore[reportAttributeAccessIssue]
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            _forbid_extra(hints[field.name])
    for argument in typing.get_args(cls):
        _forbid_extra(argument)


def _explain(cls: type, error: Any) -> str:
    path = [str(part) for part in error["loc"]]
    name = ".".join(path)
    if error["type"] == "unexpected_keyword_argument":
        legal = sorted(_legal_keys(cls, path[:-1]))
        close = difflib.get_close_matches(path[-1], legal, 1)
        return f"unknown key {name}; legal: {', '.join(legal)}" + (f"; did you mean {close[0]}?" if close else "")
    if error["type"] in ("missing", "missing_argument"):
        return f"key {name} is missing (it has no default)"
    message = error["msg"].removeprefix("Value error, ")
    got = "" if error["type"] == "value_error" else f" (got {error['input']!r})"
    return (f"{name}: " if name else "") + message[:1].lower() + message[1:] + got


def _legal_keys(cls: Any, path: Sequence[str]) -> set[str]:
    found: set[str] = set()
    if dataclasses.is_dataclass(cls):
        hints = typing.get_type_hints(cls)
        if not path:
            return {f.name for f in dataclasses.fields(cls)}
        if path[0] in hints:
            return _legal_keys(hints[path[0]], path[1:])
    for argument in typing.get_args(cls):
        # A step into a list is an index, a step into a union names the class: neither changes the keys.
        rest = path[1:] if path and (path[0].isdigit() or not _has_key(argument, path[0])) else path
        found |= _legal_keys(argument, rest)
    return found


def _has_key(cls: Any, key: str) -> bool:
    return dataclasses.is_dataclass(cls) and key in {f.name for f in dataclasses.fields(cls)}


def _complete(hint: Any, values: Any, default: Any = None) -> Any:
    """Return plain values with all that they leave out, at every depth, filled in from the defaults.

    A field whose default is a dataclass gives what a mapping for that field leaves out. Unknown keys stay, for `build` to name.
    """
    cls = _dataclass_in(hint)
    if isinstance(values, list):
        return [_complete(cls, value) for value in values]
    if cls is None or not isinstance(values, dict):
        return _plain(values)
    hints, complete = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        own = getattr(default, field.name) if isinstance(default, cls) else field.default
        if field.name in values:
            complete[field.name] = _complete(hints[field.name], values[field.name], own)
        elif own is not dataclasses.MISSING:
            complete[field.name] = _plain(own)
    return complete | {key: value for key, value in values.items() if key not in complete}


def _dataclass_in(hint: Any) -> Any:
    """Return the dataclass that a type is, or holds as an element or beside None; None where there is none."""
    if dataclasses.is_dataclass(hint):
        return hint
    return next((inner for argument in typing.get_args(hint) if (inner := _dataclass_in(argument))), None)


def _pair_options(rest: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return each option's name, with underscores, and the words that follow it."""
    pairs: list[tuple[str, list[str]]] = []
    for word in rest:
        if re.match("--[a-zA-Z_]", word):
            name, equals, value = word[2:].partition("=")
            pairs.append((name.replace("-", "_"), [value] if equals else []))
        elif not pairs:
            raise UserError(f"argument {word!r}: options are --name value or --name=value")
        else:
            pairs[-1][1].append(word)
    return pairs


def _override(cls: Any, values: dict[str, Any], name: str, words: list[str]) -> None:
    """Set one dotted key in place; unknown last keys are left to the strict build, which names the legal ones."""
    place: Any = values
    parts = name.split(".")
    hint = cls
    for depth, part in enumerate(parts):
        key: Any = part
        if isinstance(place, list):
            if not part.isdigit() or int(part) >= len(place):
                raise UserError(f"option --{name}: {part!r} is not an index of a list of {len(place)}")
            key, hint = int(part), _element(hint)
        elif isinstance(place, dict):
            inner = _dataclass_in(hint)
            hint = typing.get_type_hints(inner).get(part) if inner else None
        else:
            raise UserError(f"option --{name}: {'.'.join(parts[:depth])} holds a value, not keys")
        if depth < len(parts) - 1:
            if isinstance(place, dict) and place.get(key) is None:
                place[key] = {}  # what the preset left out, or null, is given key by key
            place = place[key]
        else:
            place[key] = _read_words(hint, name, words)


def _read_words(hint: Any, name: str, words: list[str]) -> Any:
    """Read an option's words as its type demands."""
    element = _element(hint)
    if element and not (len(words) == 1 and (words[0][:1] == "[" or words[0] in NULLS)):
        return [_read_word(element, word) for word in words]
    if len(words) != 1:
        raise UserError(f"option --{name} has no value" if not words else f"argument {words[1]!r}: --{name} takes one value")
    return _read_word(hint, words[0])


def _read_word(hint: Any, word: str) -> Any:
    kinds = set(_alternatives(hint))
    if str in kinds and not (type(None) in kinds and word in NULLS):
        return word
    try:
        return yaml.load(word, _Loader)
    except yaml.YAMLError:
        return word


def _alternatives(hint: Any) -> list[Any]:
    """Return the types that a hint allows; a choice of words counts as text."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return [type(value) for value in arguments]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [kind for argument in arguments for kind in _alternatives(argument)]
    return [hint]


def _element(hint: Any) -> Any:
    """Return the type of a tuple's elements; None for what is no tuple."""
    return next((typing.get_args(kind)[0] for kind in _alternatives(hint) if typing.get_origin(kind) is tuple), None)


def _describe(cls: Any, prefix: str = "", default: Any = None) -> list[str]:
    lines, hints = [], typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        own = getattr(default, field.name) if isinstance(default, cls) else field.default
        if inner := _dataclass_in(hint):
            several = "" if _element(hint) is None else ".N"
            lines += _describe(inner, f"{prefix}{field.name}{several}.", own)
        else:
            kind = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")
            value = "required" if own is dataclasses.MISSING else f"default {json.dumps(_plain(own))}"
            lines.append(f"  --{prefix}{field.name}  ({kind}, {value})  {field.metadata['help']}")
    return lines


def required(help: str) -> Any:
    """Return a dataclass field without a default, with its help text."""
    return dataclasses.field(metadata={"help": help})


def setting(default: Any, help: str) -> Any:
    """Return a dataclass field with its default and its help text."""
    return dataclasses.field(default=default, metadata={"help": help})


# -- YAML 1.2 ----------------------------------------------------------------------------------------------------------

NULLS = ("null", "~")
_SCALARS = {  # the core schema of YAML 1.2: yes, no, on and off are text, 1e-3 is a number, 010 is ten
    "null": ("~nN\0", r"~|null|Null|NULL|"),
    "bool": ("tTfF", r"true|True|TRUE|false|False|FALSE"),
    "int": ("-+0123456789", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
    "float": ("-+.0123456789", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
    "merge": ("<", r"<<"),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: typing.ClassVar[dict[str, Any]] = {}


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: typing.ClassVar[dict[str, Any]] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _kind, (_first, _pattern) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), list(_first))


def _read_int(loader: yaml.SafeLoader, node: Any) -> int:
    text = loader.construct_scalar(node)
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


_Loader.add_constructor("tag:yaml.org,2002:int", _read_int)
