"""The program `promag COMMAND`: every module of promag.scripts is a command, imported only when it is run.

`promag benchmark NAME` and `promag experiment NAME` run the modules of promag.scripts.benchmarks and .experiments.
"""

import ast
import difflib
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from promag import __version__

GROUPS = {
    "benchmark": ("promag.scripts.benchmarks", "Measure speed and memory."),
    "experiment": ("promag.scripts.experiments", "Run an experiment whose results stand in docs/results."),
}


def main() -> int:
    """Run the command that the command line names and return its exit status; 2 for a mistake of the user's."""
    arguments = sys.argv[1:]
    if arguments[:1] in (["--version"], ["-V"]):
        print(f"promag {__version__}")
        return 0
    if arguments and arguments[0] in GROUPS:
        package, summary = GROUPS[arguments[0]]
        return _run(package, f"promag {arguments[0]}", arguments[1:], summary)
    return _run("promag.scripts", "promag", arguments, "Grow video tokenizers and train text-to-video models.")


def list_commands(package: str) -> dict[str, Path]:
    """Return the file of each command in a package, by its name with dashes, without importing any."""
    folder = Path(importlib.import_module(package).__path__[0])
    return {path.stem.replace("_", "-"): path for path in sorted(folder.glob("[!_]*.py"))}


def _run(package: str, program: str, arguments: Sequence[str], summary: str) -> int:
    commands = list_commands(package)
    if not arguments or arguments[0] in ("--help", "-h"):
        print(_help(package, program, commands, summary))
        return 0
    name = arguments[0].replace("_", "-")
    if name not in commands:
        close = difflib.get_close_matches(name, [*commands, *(GROUPS if program == "promag" else ())], 1)
        nearest = f"did you mean {close[0]}? " if close else ""
        print(f"error: no command {arguments[0]!r}; {nearest}`{program} --help` lists all", file=sys.stderr)
        return 2
    try:
        module = importlib.import_module(f"{package}.{commands[name].stem}")
        from promag.training.command_line import run_main
    except KeyboardInterrupt:  # `run_main` has no part in the seconds that imports take
        print("interrupted", file=sys.stderr)
        return 130

    sys.argv = [f"{program} {name}", *arguments[1:]]  # argparse takes the program's name from here
    return run_main(module.main)


def _help(package: str, program: str, commands: dict[str, Path], summary: str) -> str:
    lines = {name: _summary(path) for name, path in commands.items()}
    if package == "promag.scripts":
        lines |= {f"{group} NAME": text for group, (_, text) in GROUPS.items()}
    width = max(map(len, lines))
    return "\n".join(
        [
            f"usage: {program} COMMAND [options]\n\n{summary} `{program} COMMAND --help` shows a command's options.\n",
            *(f"  {name:<{width}}  {text}" for name, text in lines.items()),
        ]
    )


def _summary(path: Path) -> str:
    """Return the first line of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]
