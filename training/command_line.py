"""Command lines: one parser class for all commands, with an option for every key of a configuration.

`-` and `_` are the same in an option's name. --help shows every option with its type and default.
"""

import argparse
import io
import json
import os
import re
import sys
import threading
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from .config import NULLS, UserError, build, complete, dataclass_in, dump_yaml, load_yaml, plain, read_yaml, type_hints
from .files import DISK_ERRORS

Config = TypeVar("Config")
Main = Callable[[Sequence[str]], int]
INTERRUPTED = 130  # exit status of a command that SIGINT ended, as shells report it


def continues(main: Main) -> Main:
    """Mark the main function of a command that, called again, continues what an earlier call left unfinished."""
    main.continues = True  # pyright: ignore[reportFunctionMemberAccess]
    return main


def run_main(main: Main) -> int:
    """Run `main(argv)` and return its exit status; a UserError becomes one line on stderr and status 2.

    So does, with status 1, an error of a disk, such as a full one; Ctrl-C ends a command with status 130. argparse's own errors
    already exit with status 2.
    A distributed process leaves its process group unless `main` raised. Names that the terminal's encoding lacks (those of
    files may be no UTF-8) are printed with escapes.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    threading.excepthook = _leave_disk_errors_to_the_main_thread
    try:
        status = main(sys.argv[1:])
        distributed = sys.modules.get("torch.distributed")
        if distributed and distributed.is_initialized():
            from .fsdp import leave_process_group

            leave_process_group()
        return status
    except UserError as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of the output (head, less) closed the pipe: not an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in DISK_ERRORS or error.filename is None:
            raise
        more = "; the same command continues once this is mended" if getattr(main, "continues", False) else ""
        print(f"error: {error.filename}: {error.strerror}{more}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _one_line(error: UserError) -> str:
    """Return an error's message; of one that a loader's process raised, which holds its traceback, the last line."""
    message = str(error)
    return message.rstrip().splitlines()[-1].partition(": ")[2] if "\nOriginal Traceback" in message else message


def _leave_disk_errors_to_the_main_thread(thread: Any) -> None:
    if not (isinstance(thread.exc_value, OSError) and thread.exc_value.errno in DISK_ERRORS):  # a tracker raises it again
        threading.__excepthook__(thread)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that treats `-` and `_` alike, never abbreviates options, and shows types and defaults.

    Args:
        description: shown by --help.
        options: other options of argparse.ArgumentParser.
    """

    def __init__(self, description: str | None = None, **options: Any):
        super().__init__(description=description, formatter_class=_Formatter, allow_abbrev=False, **options)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # pyright: ignore
        """Parse the options that the parser defines and return the rest unchanged."""
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._with_dashes(word) for word in words], namespace)

    def _with_dashes(self, word: str) -> str:
        name, equals, value = word.partition("=")
        dashed = name.replace("_", "-")
        return dashed + equals + value if dashed in self._option_string_actions else word

    def parse_with_config(
        self, cls: type[Config], argv: Sequence[str], preset: str | None = None
    ) -> tuple[argparse.Namespace, Config]:
        """Parse the parser's own options, `--config PRESET` and an option for every key of the dataclass `cls`.

        `preset` is the default of --config; with None, --config is required. Nested keys are dotted (`--data.size 64`), list
        elements are indexed (`--stages.0.optimization.steps 10`), and lists are given as words (`--ratios 4 8`) or as YAML
        (`--ratios "[4, 8]"`). The key's type decides how a word is parsed: text is kept as is, all other types are YAML 1.2.
        --print-config prints the resolved configuration and exits.
        Raises UserError for a missing file, unknown or missing keys and wrong types.
        """
        section = self.add_argument_group("configuration", "A preset, and options that override its keys.")
        help = "a YAML file, or a preset such as tokenizer/tiny"
        section.add_argument("--config", metavar="PRESET", required=preset is None, default=preset, help=help)
        section.add_argument("--print-config", action="store_true", help="print the resolved configuration as YAML and exit")
        if {"-h", "--help"} & set(argv):
            self.usage = f"{self.format_usage().removeprefix('usage: ').rstrip()} [--KEY VALUE ...]".replace("%", "%%")
            for name, kind, text in _describe(cls):
                if name not in self._option_string_actions:  # the command's own option takes precedence
                    section.add_argument(name, metavar=kind, default=argparse.SUPPRESS, help=text.replace("%", "%%"))
        arguments, rest = self.parse_known_args(argv)
        values = complete(cls, load_yaml(arguments.config))
        for name, words in _pair_options(rest):
            _override(cls, values, name, words)
            values = complete(cls, values)
        config = build(cls, values, arguments.config)
        if arguments.print_config:
            print(dump_yaml(config), end="")
            raise SystemExit(0)
        return arguments, config


def parse_config(cls: type[Config], argv: Sequence[str], description: str) -> Config:
    """Parse a command line that has only configuration options; see Parser.parse_with_config."""
    return Parser(description).parse_with_config(cls, argv)[1]


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = action.option_strings and action.default not in (None, "", False, argparse.SUPPRESS, [])
        return f"{action.help} (default: %(default)s)" if shown else action.help

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        kinds = {int: "INT", float: "FLOAT", Path: "PATH"}
        return kinds.get(action.type, "TEXT")  # pyright: ignore[reportArgumentType]


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
    """Set one dotted key in place; unknown last keys are left to `build`, which names the legal ones."""
    node: Any = values
    parts = name.split(".")
    hint = cls
    for depth, part in enumerate(parts):
        key: Any = part
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise UserError(f"option --{name}: {part!r} is not an index of a list of {len(node)}")
            key, hint = int(part), _element(hint)
        elif isinstance(node, dict):
            inner = dataclass_in(hint)
            hint = type_hints(inner).get(part) if inner else None
        else:
            raise UserError(f"option --{name}: {'.'.join(parts[:depth])} is a value and has no keys")
        if depth < len(parts) - 1:
            if isinstance(node, dict) and node.get(key) is None:
                node[key] = {}  # a section that is missing or null in the preset is set key by key
            node = node[key]
        else:
            node[key] = _read_words(hint, name, words)


def _read_words(hint: Any, name: str, words: list[str]) -> Any:
    """Parse an option's words by its type."""
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
        return read_yaml(word)
    except yaml.YAMLError:
        return word


def _alternatives(hint: Any) -> list[Any]:
    """Return the types that a hint allows; a Literal counts as the types of its values."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return [type(value) for value in arguments]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [kind for argument in arguments for kind in _alternatives(argument)]
    return [hint]


def _element(hint: Any) -> Any:
    """Return the type of a tuple's elements; None if the hint is not a tuple."""
    return next((typing.get_args(kind)[0] for kind in _alternatives(hint) if typing.get_origin(kind) is tuple), None)


def _describe(cls: Any, prefix: str = "", default: Any = None) -> list[tuple[str, str, str]]:
    """Return option, type and help of every leaf of a dataclass."""
    lines, hints = [], type_hints(cls)
    for field in fields(cls):
        hint = hints[field.name]
        own = getattr(default, field.name) if isinstance(default, cls) else field.default
        if inner := dataclass_in(hint):
            several = "" if _element(hint) is None else ".N"
            lines += _describe(inner, f"{prefix}{field.name}{several}.", own)
        else:
            value = "required" if own is MISSING else f"default: {json.dumps(plain(own))}"
            lines.append((f"--{prefix}{field.name}".replace("_", "-"), _kind(hint), f"{field.metadata['help']} ({value})"))
    return lines


def _kind(hint: Any) -> str:
    """Return a type as --help shows it: INT, TEXT|null, {a,b}, [INT ...]."""
    if typing.get_origin(hint) is Literal:
        return "{" + ",".join(map(str, typing.get_args(hint))) + "}"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return "|".join(map(_kind, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        inner = [_kind(argument) for argument in typing.get_args(hint)]
        return f"[{inner[0]} ...]" if inner[1:] == ["Ellipsis"] else f"[{' '.join(inner)}]"
    names = {int: "INT", float: "FLOAT", str: "TEXT", bool: "BOOL", type(None): "null", ...: "Ellipsis"}
    return names.get(hint, "YAML")
