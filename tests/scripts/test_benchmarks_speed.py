"""`promag benchmark speed` on presets that are as small as possible."""

import functools
import json

import diffusers
import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from promag import AutoencoderKLProMAG
from promag.data.clip_index import save_clips
from promag.data.clips import prepare
from promag.data.listing import list_videos
from promag.diffusion.flops import training_flops
from promag.evaluation.speed import ceilings, data
from promag.evaluation.speed.data import WatchedEncoder, write_file
from promag.evaluation.speed.subjects import PEERS, peer_subject
from promag.scripts.benchmarks import speed
from promag.scripts.benchmarks.speed import main
from promag.tokenizer.tiny_decoder import TinyDecoder
from promag.training import compilation, graphs
from promag.training.config import UserError
from tests.conftest import make_tokenizer
from tests.existing_models import SMALL
from tests.scripts.conftest import LOOP, TINY_MODEL, preset
from tests.stand_in_recorder import StandInRecorder
from tests.tiny_pipeline import make_pipeline

SIZE = (17, 32, 48)


@pytest.fixture(autouse=True)
def small_limits(monkeypatch):
    """Measure limits, and reading, on small sizes: their values do not matter here."""
    monkeypatch.setitem(data.FILES, "256p", (64, 112))
    monkeypatch.setattr(ceilings, "ON_CPU", ((2, 16, 4, 8, 8),))
    monkeypatch.setattr(ceilings, "COPIED", {"cpu": 2**20})
    monkeypatch.setattr(ceilings, "matmul_tflops", lambda device, bf16: 0.25)


@pytest.fixture
def tokenizer_preset(tmp_path):
    values = preset("tokenizer/tiny")
    values["model"] |= TINY_MODEL
    for i, stage in enumerate(values["stages"]):
        stage |= {"frames": 1 + 4 * 2**i, "latent_pretrain_steps": 500 if i else 0}
        stage["optimization"] = {**stage.get("optimization", {}), **LOOP}
    values["data"] = {"size": 32}
    return write(tmp_path / "tokenizer" / "smallest.yaml", values)


@pytest.fixture
def diffusion_preset(tmp_path):
    values = preset("diffusion/tiny")
    values["model"] |= {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
    values["data"] |= {"size": 32}
    values["optimization"] |= LOOP
    return write(tmp_path / "diffusion" / "smallest.yaml", values)


@pytest.fixture
def small_wan(monkeypatch):
    monkeypatch.setattr(diffusers, "AutoencoderKLWan", functools.partial(diffusers.AutoencoderKLWan, **SMALL["Wan 2.1"][1]))


def write(path, values):
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(values))
    return str(path)


def run(out, *arguments, status=0, rounds=1):
    words = [*map(str, arguments), "--quick", "--precision", "fp32", "--rounds", str(rounds), "--record", str(out)]
    assert main(words) == status
    return [json.loads(line) for line in out.read_text().splitlines()]


def settings(lines, *keys):
    return [tuple(line["settings"].get(key) for key in keys) for line in lines]


def counted(call, *arguments):
    """Return the GFLOP of a call on the CPU, with attention by plain products, because only these are counted there."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        output = call(*arguments)
    return counter.get_total_flops() / 1e9, output


def test_each_level_and_a_peer_are_coded(tokenizer_preset, small_wan, tmp_path, capsys):
    clips = ["--clip-sizes", "17x32x48"]
    peers = ["--peers", "AutoencoderKLWan"]
    lines = run(tmp_path / "speed.jsonl", "tokenizer", "--presets", tokenizer_preset, *peers, *clips)
    ours = [(part, "smallest", ratio) for ratio in (4, 8, 16) for part in ("encode", "decode")]
    assert settings(lines, "part", "model", "ratio") == [*ours, ("encode", "Wan 2.1", 4), ("decode", "Wan 2.1", 4)]
    models = [*[make_tokenizer()] * 6, *[peer_subject("AutoencoderKLWan").make()] * 2]
    for model, line in zip(models, lines, strict=True):
        case = line["settings"]
        gflop, posterior = counted(model.encode, torch.zeros(1, 3, *SIZE), case["ratio"])
        z = posterior.latent_dist.mode()
        assert line["latent_shape"] == list(z.shape)
        assert case["shape"] == [1, 3, 17, 32, 48]
        assert line["gflop"] == pytest.approx(gflop if case["part"] == "encode" else counted(model.decode, z, case["ratio"])[0])
        assert line["tflops"] == pytest.approx(line["gflop"] / line["seconds"] / 1000)
        assert line["share_of_limit"] == pytest.approx(line["tflops"] / line["ceilings"]["convolution_tflops"]["fp32"])
        assert line["count"] == 17
        assert line["peak_mib"] * 2**20 >= (z if case["part"] == "encode" else torch.zeros(3, *SIZE)).nbytes
        assert line["quartiles"][0] <= line["seconds"] <= line["quartiles"][1]
        assert sum(line["operator_shares"].values()) == pytest.approx(1, abs=1e-3)
        assert line["operator_shares"]["convolutions"] > 0
        assert line["operator_seconds"] > 0
    for i in range(3):
        assert lines[2 * i]["parameters"] == sum(p.numel() for p in make_tokenizer(levels=1 + i).parameters())
    assert "baseline" not in lines[0]
    assert (lines[5]["baseline"], lines[5]["speedup"]) == (
        {"ratio": 4},
        pytest.approx(lines[1]["seconds"] / lines[5]["seconds"]),
    )
    assert all(line["ceilings"]["product_tflops"] == {"fp32": 0.25} for line in lines)
    assert "tokenizer: part encode, model smallest, ratio 4, shape 1x3x17x32x48, " in capsys.readouterr().out


def test_weights_and_pixels_have_the_requested_type(tokenizer_preset, tmp_path, monkeypatch):
    seen, encode = set(), AutoencoderKLProMAG.encode

    def watched(self, x, *more):
        seen.update({x.dtype, self.dtype} if not x.is_meta else ())
        return encode(self, x, *more)

    monkeypatch.setattr(AutoencoderKLProMAG, "encode", watched)
    words = ["tokenizer", "--presets", tokenizer_preset, "--ratios", "4", "--clip-sizes", "5x16x16"]
    assert main([*words, "--rounds", "1", "--precision", "bf16", "--quick"]) == 0
    assert seen == {torch.bfloat16}


def test_whole_training_steps_of_every_level_and_budget(tokenizer_preset, diffusion_preset, tmp_path):
    presets = ["--presets", tokenizer_preset, diffusion_preset]
    lines = run(tmp_path / "speed.jsonl", "train", *presets, "--train-batch-size", 2)
    transformers, tokenizers = lines[:3], lines[3:]
    assert settings(transformers, "model", "ratio", "shape") == [("smallest", r, [2, 3, 17, 32, 32]) for r in (4, 8, 16)]
    values = preset("diffusion/tiny")
    for line, tokens in zip(transformers, (20, 12, 8), strict=True):
        assert line["tokens"] == 2 * tokens
        config = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "local_convolution": True}
        config |= {"in_channels": 8, "patch_size": (1, 2, 2), "base_ahead": 0.0}
        config |= {"text_dim": values["text"]["width"], "pooled_dim": values["text"]["width"]}
        assert line["gflop"] == pytest.approx(2 * training_flops(config, tokens, 24) / 1e9)
        assert 0 < line["muon_gflop"] < 0.1
        assert line["speedup" if line is not transformers[0] else "seconds"] > 0
    frames = [(4, 5), (8, 9), (16, 17)]
    assert settings(tokenizers, "model", "ratio", "shape") == [
        ("tokenizer smallest", ratio, [2, 3, count, 32, 32]) for ratio, count in frames
    ]
    for i, line in enumerate(tokenizers):
        model = make_tokenizer(levels=1 + i)
        assert line["parameters"] == sum(p.numel() for p in model.train_only(line["settings"]["ratio"]))
    with FlopCounterMode(display=False) as counter:
        make_tokenizer(levels=1)(torch.zeros(2, 3, 5, 32, 32), 4).sample.sum().backward()
    assert tokenizers[0]["gflop"] == pytest.approx(counter.get_total_flops() / 1e9)


def test_gradients_and_denoising_are_measured_by_ratio(diffusion_preset, tmp_path):
    lines = run(tmp_path / "speed.jsonl", "transformer", "--presets", diffusion_preset, "--batch-size", 2)
    parts = [("gradients", r) for r in (4, 8, 16)] + [("denoising", r) for r in (4, 8, 16)]
    assert settings(lines, "part", "ratio") == parts
    for training, denoising in zip(lines[:3], lines[3:], strict=True):  # four steps of two videos, each predicted twice
        assert denoising["gflop"] == pytest.approx(16 * training["gflop"] / 3)
        assert (training["count"], denoising["count"]) == (1, 8)


def test_the_transformer_is_measured_again_as_graphs(diffusion_preset, tmp_path, monkeypatch):
    recorders = []

    def record():
        recorders.append(StandInRecorder())
        return recorders[-1]

    monkeypatch.setattr(graphs, "CudaRecorder", record)
    monkeypatch.setattr(speed, "check_graphs", lambda device: None)
    lines = run(tmp_path / "speed.jsonl", "train", "transformer", "--presets", diffusion_preset, "--ratios", 16, "--graphs")
    parts = ["train step", "train step", "gradients", "denoising", "gradients", "denoising"]
    replayed = [True, None, True, True, None, None]  # the faster way first
    assert settings(lines, "part", "graphs") == list(zip(parts, replayed, strict=True))
    assert ["peak_mib" in line for line in lines] == [way is None for way in replayed]
    # Of a step both passes, then both parts of the update; of gradients both passes; of denoising the forward pass.
    assert [(recorder.recorded, recorder.steps) for recorder in recorders] == [(2, 0), (0, 2), (2, 0), (1, 0)]


def test_a_pipeline_samples_in_few_and_more_steps_by_both_decoders(tmp_path):
    pipe = make_pipeline(guidance_scale=1.0)
    pipe.save_pretrained(tmp_path / "pipe")
    TinyDecoder(pipe.vae.temporal_ratios, (4, 4, 4), width=8, layers=1).save_pretrained(tmp_path / "decoder")
    words = ["--pipeline", tmp_path / "pipe", "--tiny-decoder", tmp_path / "decoder", "--steps", 2, 1]
    lines = run(tmp_path / "speed.jsonl", "sampling", *words)
    cases = [(decoder, ratio) for decoder in ("tokenizer", "tiny") for ratio in (4, 16)]
    assert settings(lines, "steps", "decoder", "ratio") == [(steps, *case) for steps in (1, 2) for case in cases]
    assert settings(lines, "guidance") == [(1.0,)] * 8  # the pipeline's own
    assert lines[4]["denoising_gflop"] == pytest.approx(2 * lines[0]["denoising_gflop"])
    assert lines[3]["baseline"] == {"ratio": 4, "decoder": "tokenizer"}
    assert str(tmp_path.parent) not in (tmp_path / "speed.jsonl").read_text()
    with pytest.raises(UserError, match="--tiny-decoder: enable_tiny_decoder: this pipeline was made without one"):
        main(["sampling", "--pipeline", str(tmp_path / "pipe"), "--tiny-decoder", "--precision", "fp32"])


def test_batches_in_a_row_are_sampled_with_and_without_overlap(tmp_path):
    make_pipeline(guidance_scale=1.0).save_pretrained(tmp_path / "pipe")
    words = ["--pipeline", tmp_path / "pipe", "--steps", 1, "--batch-size", 2, "--overlap"]
    alone, *row = run(tmp_path / "speed.jsonl", "sampling", *words, "--ratios", 16)
    assert "overlap" not in alone["settings"]
    assert settings(row, "ratio", "decoder", "overlap") == [(16, "tokenizer", False), (16, "tokenizer", True)]
    assert [line["count"] for line in row] == [12, 12]
    assert row[1]["baseline"] == {"overlap": False}
    assert row[1]["speedup"] == pytest.approx(row[0]["seconds"] / row[1]["seconds"])


def test_reading_loading_and_caching_stand_beside_the_decoder_alone(tmp_path):
    make_tokenizer(2).save_pretrained(tmp_path / "tokenizer")
    few = ["--frames", 9, "--ratios", 4, 8, "--tokenizer", tmp_path / "tokenizer"]
    lines = run(tmp_path / "speed.jsonl", "data", *few)
    by_part = {}
    for line in lines:
        by_part.setdefault(line["settings"]["part"], []).append(line)
    assert list(by_part) == ["loading", "caching", "reading", "memory"]
    assert settings(by_part["loading"], "reader", "workers") == [
        ("the decoder alone", None), *(("loader", workers) for workers in (0, 1, 2))
    ]  # fmt: skip
    for part in ("loading", "reading"):
        alone, *others = by_part[part]
        for line in others:
            rates = [each["count"] / each["seconds"] for each in (line, alone)]
            assert line["speedup"] == pytest.approx(rates[0] / rates[1])
    assert settings(by_part["caching"], "workers", "step") == [
        (workers, step) for workers in (0, 1, 2) for step in ("decode", "encode", "cache")
    ]
    assert settings(by_part["memory"], "step") == [("reader",), ("training stream",), ("caching",)]
    held = [line["resident_mib_after_each_round"] for line in by_part["memory"]]
    for first, *_, last in held:
        assert 0.9 * first < last < 1.1 * first
    assert min(held[1][0], held[2][0]) > 1.5 * held[0][0]  # two workers are counted
    for line in by_part["caching"]:
        idle = line.get("encoder_idle_in_each_round", [])
        assert len(idle) == (line["settings"]["step"] == "cache") * (1 + line["rounds"])
        assert all(0 <= share < 1 for share in idle)
    assert str(tmp_path.parent) not in (tmp_path / "speed.jsonl").read_text()


def test_the_clips_of_an_index_are_loaded_in_place_of_generated_files(tmp_path, monkeypatch):
    monkeypatch.setitem(speed.SUITES, "data", lambda options: data.groups(options)[:4])  # reading and memory take no clips
    make_tokenizer(2).save_pretrained(tmp_path / "tokenizer")
    for name, frames in (("long", 40), ("longer", 60), ("short", 9)):
        write_file(tmp_path / f"{name}.mp4", "64p", frames, 12)
    save_clips(tmp_path / "mine.jsonl", prepare(list_videos(tmp_path), progress=False).clips)
    few = ["--frames", 17, "--ratios", 4, "--tokenizer", tmp_path / "tokenizer", "--videos", tmp_path / "mine.jsonl"]
    lines = run(tmp_path / "speed.jsonl", "data", *few)
    assert settings(lines, "part", "file") == [("loading", "mine")] * 4 + [("caching", "mine")] * 9
    assert lines[0]["count"] == 100  # all frames of the clips that are long enough
    assert [line["count"] for line in lines[1:4]] == [8 * 17] * 3
    assert str(tmp_path.parent) not in (tmp_path / "speed.jsonl").read_text()


def test_an_idle_encoder_is_seen():
    watched = WatchedEncoder(lambda x, ratios: [x], torch.device("cpu"))
    watched.batches += [(1.0, 2.0), (3.0, 4.0), (4.0, 6.0)]
    assert watched.idle() == pytest.approx(0.2)
    assert watched(torch.ones(1), (16,)) == [torch.ones(1)]
    assert len(watched.batches) == 1
    assert watched.idle() == 0


def test_cases_that_fail_are_recorded_and_the_run_continues(tokenizer_preset, small_wan, tmp_path, monkeypatch):
    decode = AutoencoderKLProMAG.decode

    def refusing(self, z, ratio):
        if ratio == 8 and not z.is_meta:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        if ratio == 16 and not z.is_meta:
            raise RuntimeError("canUse32BitIndexMath(input)\nof a kernel")
        return decode(self, z, ratio)

    monkeypatch.setattr(AutoencoderKLProMAG, "decode", refusing)
    words = ["tokenizer", "--presets", tokenizer_preset, "--peers", "AutoencoderKLWan"]
    lines = run(tmp_path / "speed.jsonl", *words, status=1)
    errors = {(line["settings"]["model"], line["settings"]["ratio"]): line["error"] for line in lines if "error" in line}
    assert errors == {
        ("smallest", 8): "OutOfMemoryError: CUDA out of memory",
        ("smallest", 16): "RuntimeError: canUse32BitIndexMath(input) of a kernel",
    }
    assert sum("seconds" in line for line in lines) == 6


def test_a_record_is_continued_and_again_repeats_it(tokenizer_preset, tmp_path, capsys):
    out, words = tmp_path / "speed.jsonl", ["tokenizer", "--presets", tokenizer_preset, "--ratios", 4, "--commit", "abc"]
    assert len(run(out, *words)) == 2
    assert len(run(out, *words)) == 2
    assert "has 1 of 1 groups at this commit; --again repeats them" in capsys.readouterr().out
    assert len(run(out, *words, "--again")) == 4
    assert len(run(out, *words[:-1], "abd")) == 6  # another commit
    assert len(run(out, *words[:-1], "abd+changes")) == 8
    assert len(run(out, *words[:-1], "abd+changes")) == 10  # nobody knows which changes
    capsys.readouterr()
    assert len(run(out, *words, "--clip-sizes", "17x16x16", "--minutes", 0, status=1)) == 10
    assert "2 cases were left out after 0 minutes; the same command continues" in capsys.readouterr().out
    words = [*map(str, words), "--clip-sizes", "17x16x16", "--quick", "--precision", "fp32", "--minutes", "0"]
    assert main(words) == 1
    assert "after 0 minutes; with --record the same command would continue" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tokeniser"], "suites tokeniser: use one of train, tokenizer, transformer, sampling, data"),
        (
            ["tokenizer", "--peers", "AutoencoderKL"],
            "--peers AutoencoderKL: use one of AutoencoderKLWan, ",
        ),
        (["tokenizer", "--clip-sizes", "17x32"], "--clip-sizes 17x32: FRAMESxHEIGHTxWIDTH is needed"),
        (["tokenizer", "--clip-sizes", "25x32x32"], "smallest: 25 frames: 16x needs 1 \\+ 16k; use 17 or 33"),
        (["tokenizer", "--clip-sizes", "17x30x32"], "smallest: height 30: needs a multiple of 8; use 24 or 32"),
        (
            ["tokenizer", "--peers", "AutoencoderKLCogVideoX", "--clip-sizes", "13x32x32", "--ratios", "4"],
            "13 frames: 8x needs",
        ),
        (["train", "--rounds", "0"], "--rounds 0: at least 1 is needed"),
        (["train", "--train-batch-size", "0"], "--train-batch-size 0: at least 1 is needed"),
        (["tokenizer", "--presets", "configs/tokenizer/tiny-adversarial.yaml"], "a configuration with a model of its own"),
        (["train", "--presets", "configs/diffusion/wan.yaml"], "model null: a configuration with a transformer of its own"),
        (["transformer", "--presets", "diffusion/tiny", "--frames", "18"], "preset tiny: 18 frames: 4x needs"),
        (["sampling", "--pipeline", "missing"], "pipeline missing: no model_index.json there"),
    ],
)
def test_mistakes_are_named_before_anything_is_measured(arguments, message, tokenizer_preset, capsys):
    presets = [] if "--presets" in arguments else ["--presets", tokenizer_preset]
    with pytest.raises(UserError, match=message):
        main([*arguments, *presets, "--precision", "fp32"])
    assert capsys.readouterr().out == ""


def test_compiled_blocks_are_measured_beside_eager_ones(tokenizer_preset, tmp_path, monkeypatch):
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    lines = run(tmp_path / "speed.jsonl", "tokenizer", "--presets", tokenizer_preset, "--ratios", 4, "--compile")
    assert settings(lines, "compiled", "part") == [(c, part) for c in (False, True) for part in ("encode", "decode")]


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
    subject = peer_subject(name)
    with torch.device("meta"):
        count = sum(p.numel() for p in subject.make().parameters())
    assert [round(count / 1e6), subject.step, subject.spatial, subject.name] == [millions, step, spatial, PEERS[name]]
