"""The cost of encoding and decoding, for a small tokenizer of ours and a small baseline."""

import functools
import json
import re

import diffusers
import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from promag import AutoencoderKLProMAG
from promag.scripts.benchmarks.autoencoders import _baseline, _existing, main
from promag.training import compilation
from promag.training.config import UserError
from tests.conftest import make_tokenizer
from tests.existing_models import SMALL
from tests.scripts.conftest import LOOP, TINY_MODEL, preset

SIZE = (17, 32, 48)


@pytest.fixture
def smallest(tmp_path):
    values = preset("tokenizer/tiny")
    values["model"] |= TINY_MODEL
    for i, stage in enumerate(values["stages"]):
        stage |= {
            "frames": 1 + 4 * 2**i,
            "latent_pretrain_steps": 500 if i else 0,
            "optimization": {**stage.get("optimization", {}), **LOOP},
        }
    path = tmp_path / "tokenizer" / "smallest.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(values))
    return str(path)


@pytest.fixture
def small_wan(monkeypatch):
    monkeypatch.setattr(diffusers, "AutoencoderKLWan", functools.partial(diffusers.AutoencoderKLWan, **SMALL["Wan 2.1"][1]))


def run(*arguments, status=0):
    assert main([*map(str, arguments), "--clip-sizes", "17x32x48"]) == status


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def counted(call, *arguments):
    """Return the GFLOPs of a call on the CPU, with attention by plain products, because only these are counted there."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        output = call(*arguments)
    return counter.get_total_flops() / 1e9, output


def test_each_level_and_a_baseline_are_measured(smallest, small_wan, tmp_path, capsys):
    out = tmp_path / "speed.jsonl"
    run(smallest, "--baselines", "AutoencoderKLWan", "--rounds", 2, "--precision", "fp32", "--record", out)
    ours, baseline = lines(out)
    assert [row["ratio"] for row in ours["rows"]] == [4, 8, 16]
    assert [row["latent_shape"] for row in ours["rows"]] == [[1, 4, t, 4, 6] for t in (5, 3, 2)]
    assert [row["latent_values"] for row in ours["rows"]] == [480, 288, 192]
    wan = _existing("AutoencoderKLWan")
    models = [(make_tokenizer(), ours["rows"]), (wan.eval(), baseline["rows"])]
    for model, row in ((model, row) for model, rows in models for row in rows):
        gflops, posterior = counted(model.encode, torch.zeros(1, 3, *SIZE), row["ratio"])
        z = posterior.latent_dist.mode()
        assert row["encode_gflops"] == pytest.approx(gflops)
        assert row["decode_gflops"] == pytest.approx(counted(model.decode, z, row["ratio"])[0])
        assert row["latent_shape"] == list(z.shape)
        for name in ("encode", "decode"):
            assert row[f"{name}_frames_per_second"] * row[f"{name}_seconds"] == pytest.approx(17)
            assert row[f"{name}_peak_mib"] * 2**20 >= (z if name == "encode" else torch.zeros(3, *SIZE)).nbytes
    for i, row in enumerate(ours["rows"]):
        assert row["parameters"] == sum(p.numel() for p in make_tokenizer(levels=1 + i).parameters())
    assert baseline["rows"][0]["parameters"] == sum(p.numel() for p in wan.parameters())
    assert (ours["architecture"], baseline["architecture"]) == ("ProMAG", "Wan 2.1")
    assert {line["what"] for line in (ours, baseline)} == {"tokenizer speed"}
    printed = capsys.readouterr().out.splitlines()
    starts = ["smallest 4x", "smallest 8x", "smallest 16x", "AutoencoderKLWan 4x"]
    assert [line.split(",")[0] for line in printed] == starts
    assert "latent 1x4x2x4x6 = 192 values" in printed[2]


def test_weights_and_pixels_have_the_requested_type(smallest, tmp_path, monkeypatch):
    seen, encode = set(), AutoencoderKLProMAG.encode

    def watched(self, x, *more):
        seen.update({x.dtype, self.dtype} if not x.is_meta else ())
        return encode(self, x, *more)

    monkeypatch.setattr(AutoencoderKLProMAG, "encode", watched)
    run(smallest, "--rounds", 1)
    assert seen == {torch.bfloat16}


def test_training_steps_are_measured_at_each_stages_own_length(smallest, tmp_path, capsys):
    out = tmp_path / "speed.jsonl"
    run(smallest, "--rounds", 1, "--precision", "fp32", "--train-batch-size", 2, "--record", out)
    _, line = lines(out)
    assert line["what"] == "tokenizer training speed"
    assert [(row["ratio"], row["frames"]) for row in line["rows"]] == [(4, 5), (8, 9), (16, 17)]
    for i, row in enumerate(line["rows"]):
        model = make_tokenizer(levels=1 + i)
        assert row["trained_parameters"] == sum(p.numel() for p in model.train_only(row["ratio"]))
        assert row["clips_per_second"] * row["step_seconds"] == pytest.approx(2)
        assert row["tflops"] * row["step_seconds"] * 1000 == pytest.approx(row["step_gflops"])
        assert row["mfu"] == pytest.approx(row["tflops"] / line["matmul_tflops"])
    whole = make_tokenizer(levels=1)
    x = torch.zeros(2, 3, 5, 32, 48)
    with FlopCounterMode(display=False) as counter:
        whole(x, 4).sample.sum().backward()
    assert line["rows"][0]["step_gflops"] == pytest.approx(counter.get_total_flops() / 1e9)
    assert "smallest 16x, 17x32x48 training: step of 2 " in capsys.readouterr().out


def test_cases_that_do_not_fit_are_recorded_and_the_run_continues(smallest, small_wan, tmp_path, monkeypatch, capsys):
    out, decode = tmp_path / "speed.jsonl", AutoencoderKLProMAG.decode

    def refusing(self, z, ratio):
        if ratio == 8 and not z.is_meta:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        if ratio == 16 and not z.is_meta:
            raise RuntimeError("canUse32BitIndexMath(input)\nof a kernel")
        return decode(self, z, ratio)

    monkeypatch.setattr(AutoencoderKLProMAG, "decode", refusing)
    run(smallest, "--baselines", "AutoencoderKLWan", "--rounds", 1, "--record", out, status=1)
    ours, baseline = lines(out)
    assert [row["out_of_memory"] for row in ours["rows"] + baseline["rows"]] == [False, True, False, False]
    assert [row.get("error") for row in ours["rows"]] == [None, None, "RuntimeError: canUse32BitIndexMath(input) of a kernel"]
    for row in ours["rows"]:
        assert row["encode_seconds"] > 0
        assert row["decode_gflops"] > 0
        assert ("decode_seconds" in row) == (row["ratio"] == 4)
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].endswith("; out of memory")
    assert "decode" not in printed[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to measure: give presets"),
        (["--baselines", "AutoencoderKL"], "--baselines AutoencoderKL: use one of AutoencoderKLWan, AutoencoderKLLTXVideo, "),
        (["PRESET", "--clip-sizes", "17x32"], "--clip-sizes 17x32: FRAMESxHEIGHTxWIDTH is needed"),
        (["PRESET", "--clip-sizes", "25x32x32"], "smallest: 25 frames: 16x needs 1 \\+ 16k; use 17 or 33"),
        (["PRESET", "--clip-sizes", "17x30x32"], "smallest: height 30: needs a multiple of 8; use 24 or 32"),
        (["--baselines", "AutoencoderKLCogVideoX", "--clip-sizes", "13x32x32"], "13 frames: 8x needs 1 \\+ 8k; use 9 or 17"),
        (["PRESET", "--rounds", "0"], "--rounds 0: at least 1 is needed"),
        (["PRESET", "--train-batch-size", "0"], "--train-batch-size 0: at least 1 is needed"),
        (["configs/tokenizer/tiny-adversarial.yaml"], "a configuration with a model of its own"),
    ],
)
def test_mistakes_are_named_before_anything_is_measured(arguments, message, smallest, monkeypatch, capsys):
    small = functools.partial(diffusers.AutoencoderKLCogVideoX, **SMALL["CogVideoX"][1])
    monkeypatch.setattr(diffusers, "AutoencoderKLCogVideoX", small)
    with pytest.raises(UserError, match=message):
        main([smallest if word == "PRESET" else word for word in arguments])
    assert capsys.readouterr().out == ""


def test_compiled_blocks_are_measured_beside_eager_ones(smallest, monkeypatch, capsys):
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    run(smallest, "--compile")
    assert re.findall(r" (eager|compiled): encode", capsys.readouterr().out) == ["eager"] * 3 + ["compiled"] * 3


@pytest.mark.parametrize(
    ("name", "millions", "step", "spatial"),
    [
        ("AutoencoderKLWan", 127, 4, 8),
        ("AutoencoderKLLTXVideo", 419, 8, 32),
        ("AutoencoderKLCogVideoX", 216, 8, 8),
        ("AutoencoderKLHunyuanVideo", 246, 4, 8),
    ],
)
def test_diffusers_defaults_are_the_published_architectures(name, millions, step, spatial):
    subject = _baseline(name)
    with torch.device("meta"):
        count = sum(p.numel() for p in subject.make().parameters())
    assert [round(count / 1e6), subject.step, subject.spatial] == [millions, step, spatial]
