"""Strict configuration: a YAML file and dotted options become one nested, frozen dataclass.

Defaults are in the dataclasses; a preset has only the keys that differ from them. Unknown keys, missing keys and wrong types
are user errors: the program prints one line and exits with status 2.
"""

import dataclasses
import difflib
import functools
import importlib.resources
import os
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from .files import write_atomically

Config = TypeVar("Config")


class UserError(ValueError):
    """An error in the user's input, shown as one line without a traceback."""


def check_seed(seed: int) -> None:
    """Raise ValueError for a seed below 0, which no generator takes."""
    if seed < 0:
        raise ValueError(f"seed {seed}: 0 or above is needed")


def one_line(error: BaseException) -> str:
    """Return an error's message without line breaks, or its kind if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its kind if it has none: other packages add their stacks below."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def load_yaml(path: str | os.PathLike) -> dict[str, Any]:
    """Return the mapping in a YAML file, given as a path or a preset's name; raises UserError if there is none."""
    try:
        values = read_yaml(find_preset(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"config {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"config {path}: is not UTF-8; save it in that encoding") from None
    except yaml.YAMLError as error:
        raise UserError(f"config {path}: not YAML: {one_line(error)}") from None
    if not isinstance(values, dict):
        content = "is empty" if values is None else f"contains a {type(values).__name__}"
        raise UserError(f"config {path}: {content}; a mapping of keys is needed")
    return values


def find_preset(name: str | os.PathLike) -> Path:
    """Return the file `name`, or the preset of that name (`tokenizer/tiny`); raises UserError for an unknown name."""
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
    """Validate plain values strictly as the dataclass `cls`, with defaults filled in; UserErrors name `source`."""
    try:
        return _adapter(cls).validate_python(complete(cls, values))
    except ValidationError as error:
        raise UserError(f"config {source}: " + "; ".join(_explain(cls, e) for e in error.errors()[:3])) from None


def dump_yaml(config: Any) -> str:
    """Return the resolved configuration as YAML, keys in the dataclass's order."""
    return yaml.dump(plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def save_yaml(path: str | os.PathLike, config: Any) -> None:
    """Write the resolved configuration atomically as YAML, keys in the dataclass's order."""
    write_atomically(path, dump_yaml(config))


def plain(value: Any) -> Any:
    """Return dataclasses, tuples and mappings as dicts and lists, which YAML and JSON can store."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    return value


@functools.cache
def _adapter(cls: type) -> TypeAdapter:
    _forbid_extra(cls)
    return TypeAdapter(cls)


def _forbid_extra(cls: Any) -> None:
    """Make pydantic reject unknown keys in `cls` and in every dataclass among its fields' types."""
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
    keys: set[str] = set()
    if dataclasses.is_dataclass(cls):
        hints = type_hints(cls)
        if not path:
            return {f.name for f in dataclasses.fields(cls)}
        if path[0] in hints:
            return _legal_keys(hints[path[0]], path[1:])
    for argument in typing.get_args(cls):
        # A path element that is a list index or names a class of a union does not change the legal keys.
        rest = path[1:] if path and (path[0].isdigit() or not _has_key(argument, path[0])) else path
        keys |= _legal_keys(argument, rest)
    return keys


def _has_key(cls: Any, key: str) -> bool:
    return dataclasses.is_dataclass(cls) and key in {f.name for f in dataclasses.fields(cls)}


def complete(hint: Any, values: Any, default: Any = None) -> Any:
    """Fill in missing keys of plain values from the defaults, at every depth.

    If a field's default is a dataclass, its values complete a partial mapping for that field. Unknown keys are kept, so that
    `build` can name them.
    """
    cls = dataclass_in(hint)
    if isinstance(values, list):
        return [complete(cls, value) for value in values]
    if cls is None or not isinstance(values, dict):
        return plain(values)
    hints, filled = type_hints(cls), {}
    for field in dataclasses.fields(cls):
        own = getattr(default, field.name) if isinstance(default, cls) else field.default
        if field.name in values:
            filled[field.name] = complete(hints[field.name], values[field.name], own)
        elif own is not dataclasses.MISSING:
            filled[field.name] = plain(own)
    return filled | {key: value for key, value in values.items() if key not in filled}


@functools.cache
def type_hints(cls: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields; evaluating them takes as long as all else that an option needs."""
    return typing.get_type_hints(cls)


def dataclass_in(hint: Any) -> Any:
    """Return the dataclass that a type is, or contains as a tuple element or in a union; None if there is none."""
    if dataclasses.is_dataclass(hint):
        return hint
    return next((inner for argument in typing.get_args(hint) if (inner := dataclass_in(argument))), None)


def required(help: str) -> Any:
    """Return a dataclass field without a default, with its help text."""
    return dataclasses.field(metadata={"help": help})


def setting(default: Any, help: str) -> Any:
    """Return a dataclass field with its default and its help text."""
    return dataclasses.field(default=default, metadata={"help": help})


# -- YAML 1.2 ----------------------------------------------------------------------------------------------------------

NULLS = ("null", "~")
_SCALARS = {  # the core schema of YAML 1.2: yes, no, on and off are text, 1e-3 is a number, 010 is ten
    "null": (("~", "n", "N", ""), r"~|null|Null|NULL|"),  # PyYAML looks an empty scalar up under ""
    "bool": ("tTfF", r"true|True|TRUE|false|False|FALSE"),
    "int": ("-+0123456789", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
    "float": ("-+.0123456789", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
    "merge": ("<", r"<<"),
}


_SafeLoader: Any = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader  # libyaml is ten times faster


class _Loader(_SafeLoader):
    yaml_implicit_resolvers: typing.ClassVar[dict[str, Any]] = {}


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: typing.ClassVar[dict[str, Any]] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _kind, (_first, _pattern) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), list(_first))


def read_yaml(text: str) -> Any:
    """Parse a YAML 1.2 text; raises yaml.YAMLError if it is not YAML."""
    return yaml.load(text, _Loader)


def _read_int(loader: yaml.SafeLoader, node: Any) -> int:
    text = loader.construct_scalar(node)
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


_Loader.add_constructor("tag:yaml.org,2002:int", _read_int)
