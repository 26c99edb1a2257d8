import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promag.training.config import UserError, build, load_yaml, parse_config, run_main, save_yaml, setting

PRESETS = sorted(Path("configs").rglob("*.yaml"))


@dataclass(frozen=True)
class Inner:
    rate: float = setting("how fast")
    kind: str = setting("which", default="plain")


@dataclass(frozen=True)
class Outer:
    name: str = setting("what it is called")
    sizes: tuple[int, ...] = setting("how large")
    inner: Inner = setting("the rest")
    stages: tuple[Inner, ...] = setting("several")
    only: int | None = setting("or none")
    more: Inner | None = setting("or none", default=None)


VALUES = {"name": "a", "sizes": [1, 2], "inner": {"rate": 0.5, "kind": "x"}, "stages": [{"rate": 1.0}], "only": None}


@pytest.fixture
def preset(tmp_path):
    path = tmp_path / "preset.yaml"
    save_yaml(path, build(Outer, VALUES, "test"))
    return path


def test_yaml_and_back_is_the_same(preset):
    config = build(Outer, load_yaml(preset), "test")
    assert config == Outer("a", (1, 2), Inner(0.5, "x"), (Inner(1.0),), None)


def test_dotted_overrides_reach_every_place(preset):
    argv = ["--config", str(preset), "--inner.rate=0.25", "--stages.0.kind", "y", "--sizes", "[3]", "--only", "7"]
    config = parse_config(Outer, argv, "")
    assert config == Outer("a", (3,), Inner(0.25, "x"), (Inner(1.0, "y"),), 7)


def test_what_is_null_can_be_given_key_by_key(preset):
    config = parse_config(Outer, ["--config", str(preset), "--more.rate", "2", "--more.kind", "z"], "")
    assert config.more == Inner(2.0, "z")
    with pytest.raises(UserError, match=r"key more\.rate is missing"):
        parse_config(Outer, ["--config", str(preset), "--more.kind", "z"], "")


@given(st.floats(-1e6, 1e6), st.integers(-(10**6), 10**6))
def test_any_number_survives_the_command_line(rate, only):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "preset.yaml"
        save_yaml(path, build(Outer, VALUES, "test"))
        config = parse_config(Outer, ["--config", str(path), f"--inner.rate={rate!r}", f"--only={only}"], "")
    assert (config.inner.rate, config.only) == (rate, only)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--inner.rat", "1"], r"unknown key inner.rat; legal: kind, rate; did you mean rate\?"),
        (["--colour", "red"], "unknown key colour; legal: inner, more, name, only, sizes, stages"),
        (["--stages.0.rat", "1"], "unknown key stages.0.rat; legal: kind, rate"),
        (["--stages.3.rate", "1"], "'3' is not an index of a list of 1"),
        (["--inner.rate", "fast"], r"inner.rate: .* \(got 'fast'\)"),
        (["--inner.rate"], "option --inner.rate has no value"),
        (["stray"], "argument 'stray'"),
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
    with pytest.raises(UserError, match="holds list"):
        load_yaml(tmp_path / "list.yaml")


def test_help_lists_every_leaf(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config(Outer, ["--help"], "What it does.")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "What it does." in text
    for leaf in (
        "--name  (str)  what it is called",
        "--inner.rate  (float)  how fast",
        "--stages.N.kind",
        "--only  (int | None)",
    ):
        assert leaf in text


@pytest.mark.parametrize("path", PRESETS, ids=str)
def test_presets_are_complete_and_legal(path):
    """Every preset builds its config and states every key without a default, so that a reader sees all of it in one file."""
    config = build(_class_of(path), load_yaml(path), str(path))
    _assert_complete(config, load_yaml(path), str(path))


def _class_of(path: Path):
    from promag.diffusion.config import DiffusionConfig
    from promag.scripts.demo import DemoConfig
    from promag.scripts.experiments.growth_ablation import AblationConfig
    from promag.tokenizer.config import TokenizerConfig

    if path.stem == "demo":
        return DemoConfig
    kind = path.stem if path.parent.name == "paper" else path.parent.name
    return {"tokenizer": TokenizerConfig, "diffusion": DiffusionConfig, "growth_ablation": AblationConfig}[kind]


def _assert_complete(config, values, place):
    for field in dataclasses.fields(config):
        if field.default is not dataclasses.MISSING and field.name not in values:
            continue
        assert field.name in values, f"{place} does not state {field.name}"
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            _assert_complete(value, values[field.name], f"{place}:{field.name}")
        elif isinstance(value, tuple):
            for inner, given_values in zip(value, values[field.name], strict=True):
                if dataclasses.is_dataclass(inner):
                    _assert_complete(inner, given_values, f"{place}:{field.name}")


def test_run_main_returns_the_exit_status_and_shows_a_mistake_in_one_line(capsys):
    def fails(argv):
        raise UserError("no such clip")

    assert [run_main(main) for main in (lambda argv: None, lambda argv: 3, fails)] == [0, 3, 2]
    assert capsys.readouterr().err == "error: no such clip\n"


def test_a_preset_is_found_by_its_name_from_any_folder(tmp_path, monkeypatch):
    presets = {str(path.relative_to("configs").with_suffix("")): load_yaml(path) for path in PRESETS}
    monkeypatch.chdir(tmp_path)
    assert {name: load_yaml(name) for name in presets} == presets
    (tmp_path / "tokenizer").mkdir()  # a folder of the same name is no file
    assert load_yaml("tokenizer/tiny") == presets["tokenizer/tiny"]
    (tmp_path / "demo").write_text("seed: 7")  # a file goes before a preset
    assert load_yaml("demo") == {"seed": 7}


def test_an_unknown_preset_names_the_nearest_and_all():
    with pytest.raises(UserError, match=r"config tokenizer/tyni: neither .* did you mean tokenizer/tiny\? presets: demo, diff"):
        load_yaml("tokenizer/tyni")
