"""The program `promag`: its list of commands, their names, and unknown names."""

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys

import pytest

from promag.cli import GROUPS, list_commands
from tests.processes import run_promag
from tests.scripts.test_scripts import tokenizer_arguments

PACKAGES = ["promag.scripts", *(package for package, _ in GROUPS.values())]


def promag(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "promag", *arguments], capture_output=True, text=True)


def test_help_lists_every_command_without_importing_any():
    done = promag("--help")
    listed = dict(line[2:].split(maxsplit=1) for line in done.stdout.splitlines() if line.startswith("  "))
    assert set(listed) == {*list_commands("promag.scripts"), *GROUPS}
    assert listed["prepare-clips"].startswith("Decode captioned videos")
    code = "import sys; sys.argv = ['promag', '--help']; from promag.cli import main; main(); print('torch' in sys.modules)"
    before = os.times()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = os.times()
    assert done.stdout.splitlines()[-1] == "False"
    assert after.children_user + after.children_system - before.children_user - before.children_system < 0.5


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_is_a_command_with_a_summary_in_one_line(package):
    for name, path in list_commands(package).items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        summary = (ast.get_docstring(tree) or "").partition("\n")[0]
        assert re.fullmatch(r"[A-Z].{,87}[.?]", summary), f"{name}: {summary!r} is no sentence of at most 89 characters"
        (main,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
        assert ast.unparse(main.returns or ast.Constant(None)) == "int", path


def test_a_command_name_may_have_underscores_for_dashes():
    done = run_promag("prepare_clips", "--help")
    assert (done.returncode, done.stdout.split()[:3]) == (0, ["usage:", "promag", "prepare-clips"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["smaple"], "error: no command 'smaple'; did you mean sample? `promag --help` lists all\n"),
        (["benchmrk"], "error: no command 'benchmrk'; did you mean benchmark? `promag --help` lists all\n"),
        (["xyz"], "error: no command 'xyz'; `promag --help` lists all\n"),
        (["benchmark", "memroy"], "error: no command 'memroy'; did you mean memory? `promag benchmark --help` lists all\n"),
    ],
)
def test_an_unknown_command_names_the_nearest(arguments, message):
    done = promag(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


def test_benchmarks_and_experiments_are_groups_of_commands():
    assert "  speed " in promag("benchmark").stdout
    assert promag("experiment", "--help").stdout.startswith("usage: promag experiment COMMAND")
    assert promag("--version").stdout == "promag 0.1.0\n"


def test_no_script_hides_a_library():
    """`python scripts/NAME.py` puts the script's folder before all libraries: tokenizers.py there would hide tokenizers."""
    libraries = {*sys.stdlib_module_names, *importlib.metadata.packages_distributions()}
    assert not [path for package in PACKAGES for path in list_commands(package).values() if path.stem in libraries]


def test_torchrun_starts_a_command_on_two_processes(tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "promag"]
    command += ["train-tokenizer", *tokenizer_arguments(folder), "--only_stage", "4"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "ACCELERATE_USE_CPU": "true"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(f"tokenizer: {folder / 'tokenizer'}") == 2
    (state,) = (folder / "4x").glob("step-*/state.json")
    assert json.loads(state.read_text(encoding="utf-8"))["global_batch"] == 2
