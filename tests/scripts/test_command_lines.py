"""All commands: --help, and the same option for the same thing."""

import importlib
import re

import pytest

from promag.cli import GROUPS, list_commands
from promag.scripts._options import SHARED
from promag.training.command_line import Parser

COMMANDS = [
    f"{package}.{path.stem}"
    for package in ("promag.scripts", *(package for package, _ in GROUPS.values()))
    for path in list_commands(package).values()
]
ACTIONS = {
    "promag.scripts.publish": ("tokenizer", "pipeline"),
    "promag.scripts.shards": ("write", "index"),
    "promag.scripts.curves": ("plot", "diff"),
    "promag.scripts.experiments.growth_ablation": ((), "report"),
}
CALLS = [(command, action) for command in COMMANDS for action in ACTIONS.get(command, ((),))]
# Words that are not used in options, with the word to use instead.
OTHER_WORDS = {
    **{"--num-frames": "--frames", "--temporal-ratio": "--ratio", "--temporal-ratios": "--ratios", "--dtype": "--precision"},
    **{"--sampling-steps": "--steps", "--num-inference-steps": "--steps", "--guidance-scale": "--guidance"},
    **{"--batch": "--batch-size", "--train-batch": "--train-batch-size", "--output": "--out", "--json": "--out"},
    **{"--n": "--count", "--num-clips": "--count", "--model": "checkpoint", "--checkpoint": "checkpoint", "--seeds": "--seed"},
}
MEANS_ANOTHER = {  # commands in which a shared word has its own default, with the reason
    ("promag.scripts.reconstruct", "--frames"): "the whole video",
    ("promag.scripts.sample", "--frames"): "the length that the pipeline was trained on",
    ("promag.scripts.prepare_clips", "--frames"): "a clip for each video",
    ("promag.scripts.benchmarks.long_video", "--frames"): "whole pictures of the tiled video are held beside it",
    ("promag.scripts.publish", "--split"): "rows of the table of sources",
    ("promag.scripts.benchmarks.speed", "--ratios"): "presets have no checkpoint to ask",
    ("promag.scripts.benchmarks.speed", "--precision"): "several may be measured in one run",
    ("promag.scripts.benchmarks.speed", "--batch-size"): "it depends on preset and device",
    ("promag.scripts.benchmarks.speed", "--train-batch-size"): "it depends on preset and device",
    ("promag.scripts.benchmarks.speed", "--steps"): "several may be measured in one run",
    ("promag.scripts.compare_budgets", "--rounds"): "long measurements",
    ("promag.scripts.evaluate_tokenizer", "--rounds"): "it is refused where nothing is timed",
}


@pytest.fixture
def shown(monkeypatch, capsys):
    """Return the parser that printed a command's help, and the help text."""
    parsers: list[Parser] = []
    original = Parser.print_help
    monkeypatch.setattr(Parser, "print_help", lambda self, file=None: (parsers.append(self), original(self, file))[1])

    def run(command: str, *words: str) -> tuple[Parser, str]:
        with pytest.raises(SystemExit) as stop:
            importlib.import_module(command).main([*words, "--help"])
        assert stop.value.code == 0
        return parsers[-1], capsys.readouterr().out

    return run


@pytest.mark.parametrize(("command", "action"), CALLS, ids=lambda value: str(value or ""))
def test_help_shows_every_option_and_no_word_has_two_spellings(shown, command, action):
    parser, text = shown(command, *([action] if action else []))
    assert text.startswith("usage: ")
    for option in parser._actions:
        names = option.option_strings
        if not names or names[0] == "-h":
            continue
        name = names[0]
        assert re.search(rf"^ +{re.escape(name)}\b", text, re.MULTILINE), name
        assert option.help, f"{name} has no help"
        assert "_" not in name, f"{name}: dashes are shown"
        assert name not in OTHER_WORDS, f"{name}: the word is {OTHER_WORDS.get(name)}"
        if "." in name or name in ("--config", "--print-config") or name not in SHARED or option.default == "==SUPPRESS==":
            continue
        word, means_another = SHARED[name], (command, name) in MEANS_ANOTHER
        assert option.type == word.get("type"), f"{name} is read as {option.type}"
        assert means_another == (option.default != word.get("default")), f"{name} defaults to {option.default}"


def test_a_command_with_a_configuration_shows_its_keys_in_a_section(shown):
    _, text = shown("promag.scripts.compare_budgets")
    own, _, section = text.partition("\nconfiguration:\n")
    assert "--record" in own
    assert "--data." not in own
    assert "--config PRESET" in section
    assert re.search(r"--data.synthetic-clips INT\s", section)


def test_dashes_and_underscores_are_the_same():
    parser = Parser("")
    parser.add_argument("--clip-sizes", nargs="+")
    actions = parser.add_subparsers(dest="action")
    actions.add_parser("write").add_argument("--per-shard", type=int)
    assert parser.parse_args(["--clip_sizes=a_b"]).clip_sizes == ["a_b"]
    assert parser.parse_args(["--clip_sizes", "a", "b_c"]).clip_sizes == ["a", "b_c"]
    assert parser.parse_args(["write", "--per_shard", "3"]).per_shard == 3
    with pytest.raises(SystemExit):
        parser.parse_args(["--clip", "a"])  # no abbreviations
