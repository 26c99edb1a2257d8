"""Counted figures of published models against sums made by hand."""

import json

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch._subclasses.fake_tensor import FakeTensorMode

from promag.diffusion.flops import wan_forward_flops
from promag.evaluation.memory import peak_live_bytes
from promag.evaluation.published import AUTOENCODERS, TRANSFORMERS, Published
from promag.evaluation.speed.timing import peak_bytes
from promag.scripts.benchmarks import existing as benchmark
from promag.tokenizer.existing import describe

SMALL = {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 48, "num_layers": 3, "text_dim": 24, "freq_dim": 32}


def level_parameters(width: int, channels: int) -> int:
    """Return the weights of a level on a level of the same width, for a latent of so many channels."""
    w, c = width, channels
    norm, kernel = 2 * w, 27 * w * w + w
    block = 2 * (norm + kernel)
    mixing = 2 * norm + 4 * (w * w + w) + 3 * 4  # queries, keys, values, output; a bias for each of 3 frames and 4 heads
    guided = 2 * kernel + 4 * (w * w + w)
    encoder = block + kernel + mixing + guided + norm + 28 * w * 2 * c + 2 * 2 * c
    decoder = 27 * c * w + w + 2 * block + 27 * w * 2 * w + 2 * w + norm + 28 * w * c + 2 * c
    return encoder + decoder


@pytest.mark.parametrize(("name", "millions"), [("Wan 2.1 1.3B", 1419.0), ("Wan 2.1 14B", 14288.5)])
def test_published_transformers_have_their_published_sizes(name, millions):
    config = {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40, **TRANSFORMERS[name].config}
    d, ffn, text, freq = 128 * config["num_attention_heads"], config["ffn_dim"], 4096, 256
    attention = 4 * (d * d + d) + 2 * d  # four projections, norms of queries and keys
    block = 2 * attention + 2 * d * ffn + ffn + d + 2 * d + 6 * d  # two attentions, feed-forward, one norm, modulation
    embeddings = (text * d + d) + (d * d + d) + (freq * d + d) + (d * d + d) + (d * 6 * d + 6 * d)
    ends = (16 * 4 * d + d) + (d * 16 * 4 + 16 * 4) + 2 * d
    with torch.device("meta"):
        counted = sum(p.numel() for p in TRANSFORMERS[name].build().parameters())
    assert counted == config["num_layers"] * block + embeddings + ends
    assert counted / 1e6 == pytest.approx(millions, abs=0.05)


def test_rows_of_a_transformer_count_tokens_flops_and_memory(monkeypatch):
    monkeypatch.setattr(benchmark, "SIZES", {"small": (48, 64)})
    monkeypatch.setattr(benchmark, "RATIOS", (4, 16))
    rows = benchmark.transformer_rows(Published("small", "WanTransformer3DModel", "", SMALL), trained=True)
    assert [row["tokens"] for row in rows] == [21 * 12, 6 * 12]
    assert [row["latent_bytes"] for row in rows] == [2 * 16 * t * 6 * 8 for t in (21, 6)]
    for row in rows:
        config = {**SMALL, "in_channels": 16, "out_channels": 16, "patch_size": (1, 2, 2)}
        assert row["gflops"]["total"] == pytest.approx(wan_forward_flops(config, row["tokens"], 512) / 1e9)
        n, d = row["tokens"], 32
        assert row["gflops"]["attention"] == pytest.approx(3 * 4 * d * (n * n + n * 512) / 1e9)
        assert row["training"]["parameters"] == row["parameters"]
        assert row["lora"]["parameters"] == 3 * 8 * 2 * 32 * d
        for kind in ("training", "lora"):  # weights, gradients, two moments, averages; AdamW also counts steps
            assert row[kind]["static"]["total"] == pytest.approx(4 * 5 * row[kind]["parameters"], rel=0.01)
            assert row[kind]["pass"] > row[kind]["pass_checkpointed"] > 0
    assert rows[0]["inference"] > rows[1]["inference"] > 0
    assert rows[0]["training"]["pass"] > rows[0]["lora"]["pass"] > rows[0]["inference"]


def test_480p_and_720p_have_the_tokens_of_the_published_sizes(monkeypatch):
    per_frame = {"480p": 30 * 52, "720p": 45 * 80}
    monkeypatch.setattr(benchmark, "RATIOS", (16,))
    tiny = Published("tiny", "WanTransformer3DModel", "", {**SMALL, "num_layers": 1})
    rows = benchmark.transformer_rows(tiny, trained=False)
    assert {row["size"]: row["tokens"] for row in rows} == {size: 6 * count for size, count in per_frame.items()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_of_tensors_without_data_is_that_of_real_ones(checkpointing):
    torch.manual_seed(0)
    with torch.device("meta"):
        meta = WanTransformer3DModel(**SMALL).train()
    if checkpointing:
        meta.enable_gradient_checkpointing()
    real = WanTransformer3DModel(**SMALL).train()
    if checkpointing:
        real.enable_gradient_checkpointing()
    shape = (16, 5, 16, 16)

    def step(model):
        benchmark._velocity(model, shape).square().mean().backward()

    step(real)  # a warm-up
    real.zero_grad()
    measured = peak_bytes(lambda: step(real))
    mode = FakeTensorMode()
    fake = benchmark.as_fake(meta, mode)
    with mode:
        counted = peak_live_bytes(lambda: step(fake))
    assert counted == pytest.approx(measured, rel=0.1)


def test_a_line_of_an_autoencoder_has_its_levels_by_width(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "CODED", (65, 64, 64))
    monkeypatch.setattr(benchmark, "ON_LATENTS", ((65, 64, 64), (81, 64, 64)))
    monkeypatch.setattr(benchmark, "ON_PIXELS", (33, 32, 32))
    record = tmp_path / "existing.jsonl"
    arguments = ["--autoencoders", "LTX 0.9.0", "--transformers", "--widths", "16", "192", "--record", str(record)]
    assert benchmark.main(arguments) == 0
    (line,) = map(json.loads, record.read_text().splitlines())
    assert (line["temporal_ratio"], line["spatial_ratio"], line["latent_channels"]) == (8, 32, 128)
    assert line["parameters"] == pytest.approx(419.2e6, rel=1e-3)
    narrow, default = line["growth"]
    assert "training" not in narrow
    for row in (narrow, default):
        assert row["bytes"]["bf16"] == 2 * sum(row["parameters"].values())
        assert row["parameters"]["32"] == level_parameters(row["width"], 128)
        assert row["parameters"]["16"] == level_parameters(row["width"], 128) + 129 * row["width"]  # maps the base's latents
    legal = {(row["on"], row["frames"], row["ratio"]): row["pass"] for row in default["training"]}
    assert legal["latents", 81, 32] is None
    assert legal["latents", 65, 32] > 0
    assert default["training"][0]["static"]["total"] > 4 * 4 * default["parameters"]["16"]
    assert "LTX 0.9.0: 419.2 M parameters" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "channels", "spatial"), [("Wan 2.2", 48, 16), ("HunyuanVideo 1.5", 32, 16)])
def test_published_autoencoders_have_the_published_latents(name, channels, spatial):
    with torch.device("meta"):
        existing = describe(AUTOENCODERS[name].build())
    assert (existing.temporal_ratio, existing.spatial_ratio, existing.latent_channels) == (4, spatial, channels)
