import dataclasses
import tempfile
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset

from promag.data.video import UnreadableVideo
from promag.tokenizer.config import TokenizerConfig
from promag.training.command_line import parse_config, run_main
from promag.training.config import UserError, build, dataclass_in, load_yaml, plain, required, save_yaml, setting

PRESETS = sorted(Path("configs").rglob("*.yaml"))


@dataclass(frozen=True)
class Inner:
    rate: float = required("how fast")
    kind: str = setting("plain", "which")


@dataclass(frozen=True)
class Outer:
    name: str = required("what it is called")
    sizes: tuple[int, ...] = required("how large")
    inner: Inner = setting(Inner(0.1, "usual"), "the rest")
    stages: tuple[Inner, ...] = setting((Inner(1.0),), "several")
    only: int | None = setting(None, "or none")
    more: Inner | None = setting(None, "or none")
    mode: Literal["auto", "no"] = setting("auto", "one of two words")
    record: str | None = setting(None, "a path or none")
    fast: bool = setting(False, "or slow")
    words: tuple[str, ...] = setting((), "any")
    pairs: tuple[tuple[int, int], ...] = setting(((1, 2),), "any")


TEXT = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")))
VALUES = {"name": "a", "sizes": [1, 2]}


@pytest.fixture
def preset(tmp_path):
    path = tmp_path / "preset.yaml"
    save_yaml(path, build(Outer, VALUES, "test"))
    return path


def parse(preset, *argv: str) -> Outer:
    return parse_config(Outer, ["--config", str(preset), *argv], "")


def test_yaml_and_back_is_the_same(preset):
    assert build(Outer, load_yaml(preset), "test") == Outer("a", (1, 2))


@given(TEXT, st.lists(TEXT), st.floats(allow_nan=False), st.integers())
def test_any_value_survives_the_resolved_file(name, words, rate, size):
    config = Outer(name, (size,), Inner(rate, name), words=tuple(words))
    with tempfile.TemporaryDirectory() as folder:
        save_yaml(Path(folder) / "config.yaml", config)
        assert build(Outer, load_yaml(Path(folder) / "config.yaml"), "test") == config


def test_a_value_left_blank_is_null_and_an_empty_text_stays_one(tmp_path):
    path = tmp_path / "blank.yaml"
    path.write_text("name: ''\nsizes: [1]\nonly:\nrecord:\n")
    blank = build(Outer, load_yaml(path), "test")
    assert (blank.name, blank.only, blank.record) == ("", None, None)
    for config, line in ((blank, "record: null\n"), (dataclasses.replace(blank, record=""), "record: ''\n")):
        save_yaml(path, config)
        assert line in path.read_text()
        assert build(Outer, load_yaml(path), "test") == config


def test_missing_keys_of_a_mapping_get_the_fields_default():
    config = build(Outer, {**VALUES, "inner": {"kind": "x"}, "stages": [{"rate": 2}], "more": {"rate": 3}}, "test")
    assert (config.inner, config.stages, config.more) == (Inner(0.1, "x"), (Inner(2.0),), Inner(3.0))
    with pytest.raises(UserError, match=r"key stages\.0\.rate is missing \(it has no default\)"):
        build(Outer, {**VALUES, "stages": [{"kind": "x"}]}, "test")


def test_dotted_options_reach_every_key(preset):
    config = parse(preset, "--inner.rate=0.25", "--stages.0.kind", "y", "--sizes", "[3]", "--only", "7")
    assert config == Outer("a", (3,), Inner(0.25, "usual"), (Inner(1.0, "y"),), 7)


def test_a_null_section_can_be_set_key_by_key(preset):
    assert parse(preset, "--more.rate", "2", "--more.kind", "z").more == Inner(2.0, "z")
    with pytest.raises(UserError, match=r"key more\.rate is missing"):
        parse(preset, "--more.kind", "z")


@given(st.floats(-1e6, 1e6), st.integers(-(10**6), 10**6))
def test_any_number_survives_the_command_line(rate, only):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "preset.yaml"
        save_yaml(path, build(Outer, VALUES, "test"))
        config = parse(path, f"--inner.rate={rate!r}", f"--only={only}")
    assert (config.inner.rate, config.only) == (rate, only)


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        ("--mode no", "mode", "no"),
        ("--name no", "name", "no"),
        ("--name 08", "name", "08"),
        ("--name 1e-3", "name", "1e-3"),
        ("--name null", "name", "null"),
        ("--name 2026-11-26", "name", "2026-11-26"),
        ("--name {a", "name", "{a"),
        ("--record yes", "record", "yes"),
        ("--record null", "record", None),
        ("--record ~/results.jsonl", "record", "~/results.jsonl"),
        ("--only 08", "only", 8),
        ("--only 1e3", "only", 1000),
        ("--only -5", "only", -5),
        ("--only null", "only", None),
        ("--fast yes", "fast", True),
        ("--fast off", "fast", False),
        ("--fast true", "fast", True),
        ("--sizes 4 8 16", "sizes", (4, 8, 16)),
        ("--sizes 010", "sizes", (10,)),
        ("--sizes [4,8]", "sizes", (4, 8)),
        ("--words no", "words", ("no",)),
        ("--words 1 on null", "words", ("1", "on", "null")),
        ("--words", "words", ()),
        ("--words=off", "words", ("off",)),
        ("--pairs [3,4] [5,6]", "pairs", ((3, 4), (5, 6))),
        ("--pairs [[3,4]]", "pairs", ((3, 4),)),
    ],
)
def test_words_are_read_as_typed_in_a_shell(preset, words, key, value):
    assert getattr(parse(preset, *words.split()), key) == value


def test_numbers_in_presets_follow_yaml_1_2(tmp_path):
    path = tmp_path / "preset.yaml"
    path.write_text("{name: no, sizes: [010, 0o10, 0x10, 1e1], inner: {rate: 1e-3, kind: on}, mode: no, words: [yes, y, 1:30]}")
    config = build(Outer, load_yaml(path), "test")
    assert config.sizes == (10, 8, 16, 10)
    assert (config.name, config.inner, config.mode) == ("no", Inner(1e-3, "on"), "no")
    assert config.words == ("yes", "y", "1:30")


def test_dashes_and_underscores_are_the_same(tmp_path):
    path = tmp_path / "preset.yaml"
    path.write_text("{output_dir: a, stages: []}")
    for name in ("--output-dir", "--output-dir"):
        with pytest.raises(UserError, match="stages: at least one is needed"):
            parse_config(TokenizerConfig, ["--config", str(path), name, "b"], "")
    options = ["--data.synthetic-clips", "3", "--stages.0.kl-weight=0.5", "--run.log_every", "7"]
    config = parse_config(TokenizerConfig, ["--config", "tokenizer/tiny", *options], "")
    assert (config.data.synthetic_clips, config.stages[0].kl_weight, config.run.log_every) == (3, 0.5, 7)


@pytest.mark.parametrize("option", ["--print-config", "--print_config"])
def test_the_resolved_configuration_is_printed(preset, tmp_path, capsys, option):
    with pytest.raises(SystemExit) as stop:
        parse(preset, option, "--mode", "no", "--inner.kind", "08")
    assert stop.value.code == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    printed = load_yaml(tmp_path / "printed.yaml")
    assert set(printed) == {field.name for field in dataclasses.fields(Outer)}
    assert build(Outer, printed, "test") == Outer("a", (1, 2), Inner(0.1, "08"), mode="no")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--inner.rat", "1"], r"unknown key inner.rat; legal: kind, rate; did you mean rate\?"),
        (
            ["--colour", "red"],
            "unknown key colour; legal: fast, inner, mode, more, name, only, pairs, record, sizes, stages, words",
        ),
        (["--stages.0.rat", "1"], "unknown key stages.0.rat; legal: kind, rate"),
        (["--stages.3.rate", "1"], "'3' is not an index of a list of 1"),
        (["--inner.rate", "fast"], r"inner.rate: .* \(got 'fast'\)"),
        (["--inner.rate"], "option --inner.rate has no value"),
        (["stray"], "argument 'stray'"),
        (["--only", "3", "4"], "argument '4': --only takes one value"),
        (["--mode", "on"], r"mode: input should be 'auto' or 'no' \(got 'on'\)"),
        (["--sizes", "4", "big"], r"sizes\.1: .* \(got 'big'\)"),
        (["--name.first", "x"], "option --name.first: name is a value and has no keys"),
    ],
)
def test_mistakes_are_named(preset, argv, message):
    with pytest.raises(UserError, match=message):
        parse_config(Outer, ["--config", str(preset), *argv], "")


def test_missing_keys_and_files_are_named(tmp_path):
    incomplete = {k: v for k, v in VALUES.items() if k != "sizes"}
    with pytest.raises(UserError, match="key sizes is missing"):
        build(Outer, incomplete, "test")
    with pytest.raises(UserError, match=r"none\.yaml: No such file"):
        parse_config(Outer, ["--config", str(tmp_path / "none.yaml")], "")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(UserError, match="contains a list"):
        load_yaml(tmp_path / "list.yaml")
    (tmp_path / "empty.yaml").write_text("# nothing but a comment\n")
    with pytest.raises(UserError, match=r"empty\.yaml: is empty; a mapping of keys is needed"):
        load_yaml(tmp_path / "empty.yaml")
    (tmp_path / "windows.yaml").write_text("name: a", encoding="utf-16")
    with pytest.raises(UserError, match=r"windows\.yaml: is not UTF-8; save it in that encoding"):
        load_yaml(tmp_path / "windows.yaml")


def test_help_lists_every_leaf(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config(Outer, ["--help"], "What it does.")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "What it does." in text
    for leaf in (
        "--print-config print the resolved configuration as YAML and exit",
        "--name TEXT what it is called (required)",
        "--inner.rate FLOAT how fast (default: 0.1)",
        "--stages.N.rate FLOAT how fast (required)",
        '--stages.N.kind TEXT which (default: "plain")',
        "--only INT|null or none (default: null)",
        '--mode {auto,no} one of two words (default: "auto")',
        "--pairs [[INT INT] ...] any (default: [[1, 2]])",
    ):
        assert leaf in text


@pytest.mark.parametrize("path", PRESETS, ids=str)
def test_presets_are_legal_and_state_only_differences_from_the_defaults(path):
    values = load_yaml(path)
    build(_class_of(path), values, str(path))
    stated = list(_stated_defaults(_class_of(path), values))
    assert not stated, f"{path} states defaults: {', '.join(stated)}"


def _class_of(path: Path):
    from promag.demo.config import DemoConfig
    from promag.diffusion.config import DiffusionConfig
    from promag.scripts.experiments.generation import GenerationConfig
    from promag.scripts.experiments.growth_ablation import AblationConfig
    from promag.tokenizer.tiny_training import TinyDecoderConfig

    alone = {"demo": DemoConfig, "tiny-decoder": TinyDecoderConfig}
    if path.stem in alone:
        return alone[path.stem]
    kind = path.stem if path.parent.name == "paper" else path.parent.name
    experiments = {"growth_ablation": AblationConfig, "generation": GenerationConfig}
    return {"tokenizer": TokenizerConfig, "diffusion": DiffusionConfig, **experiments}[kind]


def _stated_defaults(cls, values, default=None, place=""):
    """Yield the keys of a preset whose value equals the default."""
    for field in dataclasses.fields(cls):
        if field.name not in values:
            continue
        own = getattr(default, field.name) if isinstance(default, cls) else field.default
        value, name = values[field.name], f"{place}{field.name}"
        inner = dataclass_in(typing.get_type_hints(cls)[field.name])
        if inner and isinstance(value, dict):
            yield from _stated_defaults(inner, value, own, f"{name}.")
        elif inner and isinstance(value, list):
            for number, element in enumerate(value):
                yield from _stated_defaults(inner, element, None, f"{name}.{number}.")
        elif own is not dataclasses.MISSING and value == plain(own):
            yield name


def test_run_main_returns_the_exit_status_and_shows_a_mistake_in_one_line(capsys):
    def fails(argv):
        raise UserError("no such clip")

    assert [run_main(main) for main in (lambda argv: 0, lambda argv: 3, fails)] == [0, 3, 2]
    assert capsys.readouterr().err == "error: no such clip\n"


def test_ctrl_c_is_one_line_and_the_status_of_shells(capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    assert run_main(interrupted) == 130
    assert capsys.readouterr().err == "interrupted\n"


class Unreadable(IterableDataset):
    def __iter__(self):
        raise UnreadableVideo("a.mp4", "holds no frames")


def test_a_mistake_in_a_loader_process_is_one_line_too(capsys):
    assert run_main(lambda argv: list(DataLoader(Unreadable(), num_workers=1))) == 2
    assert capsys.readouterr().err == "error: a.mp4: holds no frames\n"


def test_a_preset_is_found_by_its_name_from_any_folder(tmp_path, monkeypatch):
    presets = {str(path.relative_to("configs").with_suffix("")): load_yaml(path) for path in PRESETS}
    monkeypatch.chdir(tmp_path)
    assert {name: load_yaml(name) for name in presets} == presets
    (tmp_path / "tokenizer").mkdir()  # a folder of the same name does not count
    assert load_yaml("tokenizer/tiny") == presets["tokenizer/tiny"]
    (tmp_path / "demo").write_text("seed: 7")  # a file comes before a preset
    assert load_yaml("demo") == {"seed": 7}


def test_an_unknown_preset_names_the_nearest_and_all():
    with pytest.raises(UserError, match=r"config tokenizer/tyni: neither .* did you mean tokenizer/tiny\? presets: demo, diff"):
        load_yaml("tokenizer/tyni")
