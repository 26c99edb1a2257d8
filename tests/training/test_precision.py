"""The precision that `auto` chooses, that a run keeps it, and the legal values."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from accelerate.state import AcceleratorState

from promag.demo.config import DemoConfig
from promag.diffusion.config import DiffusionConfig
from promag.scripts import sample, train_tokenizer
from promag.tokenizer.config import TokenizerConfig
from promag.tokenizer.train import train_tokenizer as train
from promag.training import precision as module
from promag.training.command_line import parse_config
from promag.training.config import UserError, build, load_yaml
from promag.training.precision import Choice, Timings, autocast, choose_for_run, choose_precision, decide, time_kernels
from tests.tokenizer.test_train import make_config

FLAGS = torch.backends.cpu.get_cpu_capability() == "AVX512" and hasattr(torch.cpu, "_is_avx512_bf16_supported")
HAS_BF16 = bool(FLAGS and torch.cpu._is_avx512_bf16_supported())
PRESET = ["--config", "configs/tokenizer/tiny.yaml"]


@pytest.fixture
def measured(monkeypatch):
    """Set the precision that `auto` chooses, and let its line be printed again."""

    def set_choice(precision, reason="this CPU was measured"):
        monkeypatch.setattr(module, "_measured", lambda device: Choice(precision, reason))
        module._print_once.cache_clear()

    return set_choice


@pytest.mark.parametrize(
    ("fp32", "bf16", "precision"),
    [
        ((1.0, 1.0), (0.5, 0.5), "bf16"),
        ((1.0, 1.0), (3.4, 3.0), "fp32"),  # emulated
        ((1.0, 1.0), (1.0, 0.98), "fp32"),  # too little gain for the lost precision
        ((1.0, 1.0), (2.0, 0.4), "bf16"),  # the mean of both counts: 1.12
        ((1.0, 1.0), (2.0, 0.5), "fp32"),
        ((8.0, 0.1), (4.0, 0.12), "bf16"),  # whatever the sizes of the two
    ],
)
def test_a_cpu_takes_the_faster_precision(fp32, bf16, precision):
    choice = decide(Timings(*fp32), Timings(*bf16))
    assert choice.precision == precision
    speeds = [f"{one / two:.2g}x" for one, two in zip(fp32, bf16, strict=True)]
    assert choice.reason == (
        f"this CPU runs bf16 convolutions at {speeds[0]} and matrix products at {speeds[1]} the speed of fp32"
    )


@pytest.mark.parametrize(("supported", "precision"), [(True, "bf16"), (False, "fp32")])
def test_a_gpu_with_bf16_takes_it(monkeypatch, supported, precision):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported or including_emulation)
    module._measured.cache_clear()
    assert choose_precision("auto", "cuda:1") == precision
    module._measured.cache_clear()


def test_measuring_takes_under_a_second_and_keeps_random_states():
    torch.manual_seed(0)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    seconds = time_kernels(torch.float32)[0]
    assert 1e-5 < seconds.convolution < 0.1  # 0.25 GFLOP
    assert 1e-5 < seconds.product < 0.1  # 0.11 GFLOP
    assert torch.equal(state, torch.get_rng_state())
    assert torch.get_num_threads() == threads


def test_the_choice_is_printed_once(measured, capsys):
    measured("fp32")
    assert [choose_precision(asked, "cpu") for asked in ("auto", "auto", "bf16")] == ["fp32", "fp32", "bf16"]
    assert capsys.readouterr() == ("", "precision: fp32 (auto: this CPU was measured)\n")


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)])
def test_autocast_computes_in_the_chosen_precision(precision, dtype):
    x = torch.ones(2, 2)
    with autocast("cpu", precision):
        assert (x @ x).dtype == dtype
    with autocast("cpu", precision, torch.bfloat16):
        assert (x @ x).dtype == torch.float32


@pytest.fixture
def any_precision():
    """Allow another precision than that of earlier tests: accelerate allows only one in a process."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def test_a_run_records_its_precision_and_keeps_it_on_another_machine(measured, any_precision, tmp_path, capsys):
    measured("bf16")
    config = make_config(tmp_path, precision="auto", stages=make_config(tmp_path).stages[:1])
    half = dataclasses.replace(config, run=dataclasses.replace(config.run, stop_after=2))
    assert train(half) is None
    assert load_yaml(tmp_path / "config.yaml")["precision"] == "bf16"
    assert "precision: bf16 (auto: this CPU was measured)\n" in capsys.readouterr().err

    measured("fp32", "this CPU emulates bf16")
    assert train(half) is not None
    assert load_yaml(tmp_path / "config.yaml")["precision"] == "bf16"
    line = "precision: bf16 (auto: the run was started with it; this machine alone would take fp32: this CPU emulates bf16)\n"
    assert line in capsys.readouterr().err
    AcceleratorState._reset_state()
    with pytest.raises(UserError, match="precision is 'bf16' there, 'fp32' now"):
        train(make_config(tmp_path, precision="fp32", stages=config.stages))


def test_the_first_recorded_precision_is_kept(measured, tmp_path):
    measured("bf16")
    for name, text in (("old", "precision: 'no'\n"), ("new", "precision: fp32\n"), ("newer", "precision: bf16\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(text)
    runs = [tmp_path / name for name in ("none", "old", "new", "newer")]
    assert choose_for_run("auto", "cpu", *runs) == "fp32"
    assert choose_for_run("auto", "cpu", *runs[:2]) == "bf16"
    assert choose_for_run("bf16", "cpu", *runs) == "bf16"  # opening the run refuses it


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"run:\n\tworkers: 0\n", "not YAML: "),
        ("precision: bf16\n".encode("utf-16"), "is not UTF-8"),
        (b"- 1\n", "contains a list"),
    ],
)
def test_a_record_that_cannot_be_read_is_named(tmp_path, content, message):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=rf"config\.yaml: {message}"):
        choose_for_run("auto", "cpu", tmp_path)


@pytest.mark.parametrize("word", ["no", "False", "half", "bfloat16", "32"])
def test_other_precisions_are_refused_with_the_legal_ones(word, capsys):
    with pytest.raises(UserError, match=r"precision: input should be 'auto', 'bf16', 'fp16' or 'fp32' \(got "):
        train_tokenizer.main([*PRESET, "--precision", word])
    with pytest.raises(SystemExit):
        sample.main(["checkpoints/tiny-video", "--prompt", "a", "--out", "a.mp4", "--precision", word])
    legal = capsys.readouterr().err.replace("'", "")
    assert f"argument --precision: invalid choice: {word} (choose from auto, bf16, fp16, fp32)" in legal


@pytest.mark.parametrize("word", ["auto", "bf16", "fp32"])
@pytest.mark.parametrize(
    ("cls", "preset"), [(TokenizerConfig, "tokenizer/tiny"), (DiffusionConfig, "diffusion/tiny"), (DemoConfig, "demo")]
)
def test_legal_precisions_are_returned_unchanged(cls, preset, word):
    argv = ["--config", f"configs/{preset}.yaml"]
    assert parse_config(cls, [*argv, "--precision", word], "").precision == word
    assert parse_config(cls, argv, "").precision == "auto"
    with pytest.raises(UserError, match="precision fp16: trainings take auto, bf16 or fp32"):
        parse_config(cls, [*argv, "--precision", "fp16"], "")


def test_a_preset_may_set_the_precision():
    values = load_yaml("configs/tokenizer/tiny.yaml")
    assert build(TokenizerConfig, {**values, "precision": "bf16"}, "preset").precision == "bf16"
    with pytest.raises(UserError, match=r"got False"):
        build(TokenizerConfig, {**values, "precision": False}, "preset")


@pytest.mark.skipif(not HAS_BF16, reason="this CPU has no bf16 that could be hidden from it")
@pytest.mark.parametrize(("isa", "precision"), [("AVX512_CORE", "fp32"), ("AVX2", "fp32"), ("DEFAULT", "bf16")])
def test_auto_is_measured_with_and_without_bf16_kernels(isa, precision):
    code = "from promag.training.precision import choose_precision; print(choose_precision('auto', 'cpu'))"
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == precision
    assert done.stderr.startswith(f"precision: {precision} (auto: this CPU runs bf16 convolutions at ")
