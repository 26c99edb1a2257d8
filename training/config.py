"""Strict configuration: a YAML file and dotted overrides become one nested, frozen dataclass.

A preset is complete: every key stands in the file, none is inherited. Unknown keys, missing keys and wrong types are the
user's mistakes and end the program with one line and exit status 2.
"""

import argparse
import dataclasses
import difflib
import functools
import importlib.resources
import os
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

Config = TypeVar("Config")


class UserError(ValueError):
    """A mistake in what the user gave: shown as one line, without a traceback."""


def run_main(main: Callable[[Sequence[str]], int | None]) -> int:
    """Run `main(argv)` and return its exit status; a UserError becomes one line on stderr and status 2.

    argparse's own errors already have that status. A process of several leaves their group, unless `main` raised.
    """
    try:
        status = main(sys.argv[1:]) or 0
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
    """Read `--config FILE.yaml` and `--dotted.key value` overrides from `argv` into `cls`.

    Every leaf of the dataclass is an option of its own, shown by --help with its type and comment. A value is read as YAML
    (`--model.latent_channels 16`, `--data.size "[64, 96]"`). An element of a list is named by its index
    (`--stages.0.steps 10`).
    Raises UserError for a missing file, unknown or missing keys and wrong types.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="options of the configuration, each also `--name value`:\n" + "\n".join(_describe(cls)),
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="PRESET", required=True, help="a YAML file, or a preset such as tokenizer/tiny")
    arguments, rest = parser.parse_known_args(argv)
    values = _plain(load_yaml(arguments.config))  # what YAML shares by an anchor becomes each place's own
    for name, value in _pair_options(rest):
        _override(values, name, value)
    return build(cls, values, arguments.config)


def load_yaml(path: str | os.PathLike) -> dict[str, Any]:
    """Return the mapping in a YAML file, given by its path or as a preset's name; raises UserError where there is none."""
    try:
        values = yaml.safe_load(find_preset(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"config {path}: {error.strerror or error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"config {path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"config {path}: holds {type(values).__name__}, a mapping of keys is needed")
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
    """Turn plain values into the dataclass `cls`, strictly; `source` is named in the UserError."""
    try:
        return _adapter(cls).validate_python(values)
    except ValidationError as error:
        raise UserError(f"config {source}: " + "; ".join(_explain(cls, e) for e in error.errors()[:3])) from None


def to_plain(config: Any) -> dict[str, Any]:
    """Return a dataclass as plain YAML- and JSON-ready values."""
    return typing.cast(dict[str, Any], _plain(dataclasses.asdict(config)))


def save_yaml(path: str | os.PathLike, config: Any) -> None:
    """Write the resolved configuration as YAML, keys in the dataclass's order; other processes see all of it or nothing."""
    aside = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
    aside.write_text(yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True), encoding="utf-8")
    os.replace(aside, path)


def _plain(value: Any) -> Any:
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
        return f"key {name} is missing (a preset states every key)"
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


def _pair_options(rest: Sequence[str]) -> list[tuple[str, str]]:
    pairs, words = [], list(rest)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise UserError(f"argument {word!r}: options are --name value or --name=value")
        name, equals, value = word[2:].partition("=")
        if not equals:
            if not words:
                raise UserError(f"option --{name} has no value")
            value = words.pop(0)
        pairs.append((name, value))
    return pairs


def _override(values: dict[str, Any], name: str, text: str) -> None:
    """Set one dotted key in place; unknown last keys are left to the strict build, which names the legal ones."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    place: Any = values
    parts = name.split(".")
    for depth, part in enumerate(parts):
        key: Any = part
        if isinstance(place, list):
            if not part.isdigit() or int(part) >= len(place):
                raise UserError(f"option --{name}: {part!r} is not an index of a list of {len(place)}")
            key = int(part)
        elif not isinstance(place, dict):
            raise UserError(f"option --{name}: {'.'.join(parts[:depth])} holds a value, not keys")
        if depth == len(parts) - 1:
            place[key] = value
        else:
            if isinstance(place, dict) and place.get(key) is None:
                place[key] = {}  # what the preset left out, or null, is given key by key
            place = place[key]


def _describe(cls: Any, prefix: str = "") -> list[str]:
    lines, hints = [], typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        inner = [t for t in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(t)]
        if inner:
            index = "" if inner[0] is hint or type(None) in typing.get_args(hint) else ".N"
            lines += _describe(inner[0], f"{prefix}{field.name}{index}.")
        else:
            kind = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")
            lines.append(f"  --{prefix}{field.name}  ({kind})  {field.metadata.get('help', '')}".rstrip())
    return lines


def setting(help: str, **kwargs: Any) -> Any:
    """Return a dataclass field that carries its own help text."""
    return dataclasses.field(metadata={"help": help}, **kwargs)
