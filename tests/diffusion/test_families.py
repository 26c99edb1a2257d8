"""Training WanTransformer3DModel: its call, its normalisation and its text are those of the stock WanPipeline."""

import dataclasses
import json
import types
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanTransformer3DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from promag.diffusion.attention import choose_attention
from promag.diffusion.families import WAN, LatentStatistics, adopt, family_of, family_of_init, hidden_matrices, load_transformer
from promag.diffusion.finetune import Lora, adapt_to_latents, add_lora, narrow_frozen
from promag.diffusion.flops import wan_forward_flops
from promag.diffusion.flow import sample_times
from promag.diffusion.latent_cache import LatentDataset, LatentFingerprint, write_latents
from promag.diffusion.objective import FlowObjective
from promag.diffusion.text import draw_dropped
from promag.diffusion.text_cache import CaptionEncoder, EmbeddingCache, TextFingerprint, write_embeddings
from promag.diffusion.train import BucketCache, train_diffusion
from promag.training.config import UserError, load_yaml, save_yaml
from promag.training.loop import seeded
from promag.training.run import checkpoints, load_checkpoint
from tests.diffusion.test_buckets import VIDEO, configuration, encode, write
from tests.wan import MEAN, STD, make_stock, make_text, make_transformer

TOKENS = 16
STATISTICS = LatentStatistics(MEAN, STD)


@pytest.fixture(scope="module")
def cached(tmp_path_factory) -> BucketCache:
    folder = tmp_path_factory.mktemp("cache")
    latents = [write(folder, VIDEO, ratio, 4) for ratio in (16, 8)]
    fingerprint = TextFingerprint("umt5", str(VIDEO), TOKENS, "float32", 3)
    tokenizer, encoder = make_text()
    tokenizer.model_max_length = TOKENS
    texts = {1: write_embeddings(folder / "text", fingerprint, latents[0], lambda: (tokenizer, encoder), WAN.clean)}
    return BucketCache(VIDEO, latents, texts)


@pytest.fixture
def init(tmp_path):
    make_transformer().save_pretrained(tmp_path / "init" / "transformer")
    return tmp_path / "init"


def settings(folder: Path, init: Path, **change):
    values = {"init": str(init), "model": None, "condition": {"probability": 0.0}}
    values["data"] = {"frames": 17, "size": 16, "cache": str(folder / "cache"), "train": "synthetic", "validation": "synthetic"}
    values["text"] = {"encoders": [{"model": "umt5", "max_length": TOKENS}]}
    loop = {"steps": 4, "batch_size": 2, "warmup": 1, "learning_rate": 1e-3, "muon_learning_rate": 0.02}
    values["optimization"] = loop
    run = {"log_every": 1, "validate_every": 2, "save_every": 2, "workers": 0, "trackers": []}
    return configuration(folder, **{**values, "run": run, **change})


def batch_of(cached: BucketCache):
    texts = [EmbeddingCache(folder, number) for number, folder in cached.texts.items()]
    clips = LatentDataset(cached.latents[0], texts=texts)
    rows = [clips.fixed(i) for i in range(3)]
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0] if key.startswith(("latents", "text_"))}
    batch |= {"fps": torch.tensor([row["fps"] for row in rows]), "ratio": torch.tensor([row["ratio"] for row in rows])}
    return {**batch, "caption": [row["caption"] for row in rows]}, CaptionEncoder(texts)


def test_a_training_step_equals_one_written_by_hand(cached, init, tmp_path):
    batch, text = batch_of(cached)
    objective = FlowObjective(make_transformer(), text, settings(tmp_path, init, shift=3.0, caption_dropout=0.5))
    loss = objective(batch, [seeded(7, i) for i in range(3)], 0)["loss"]
    generators = [seeded(7, i) for i in range(3)]
    dropped = draw_dropped(0.5, generators)
    assert sorted({*dropped}) == [False, True]
    t = sample_times(torch.tensor(3.0).log().item(), generators)  # the same at every size, as the scheduler's flow_shift
    noise = torch.stack([torch.randn(batch["latents"][0].shape, generator=g) for g in generators])
    tokens = batch["text_1_tokens"].clone()
    null = text.nulls[0]
    for i, drop in enumerate(dropped):
        if drop:
            tokens[i] = null.tokens[0][0]
        mask = null.masks[0][0] if drop else batch["text_1_mask"][i]
        assert not tokens[i, ~mask].any()
    x, s = batch["latents"], t.view(-1, 1, 1, 1, 1)
    predicted = objective.transformer((1 - s) * x + s * noise, t * 1000, tokens).sample
    assert torch.equal(loss, (predicted - (noise - x)).square().mean())


def test_one_batch_is_learned(cached, init, tmp_path):
    batch, text = batch_of(cached)
    objective = FlowObjective(make_transformer(), text, settings(tmp_path, init))
    optimizer = torch.optim.Adam(objective.transformer.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = objective(batch, [seeded(7, i) for i in range(3)], 0)["loss"]
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.1 * losses[0]


def exact(data):
    """Return a transformer that knows the data and gives the exact velocity, (x_t - data) / t."""

    class Exact(WanTransformer3DModel):
        def forward(self, hidden_states, timestep, encoder_hidden_states, **kwargs):
            return ((hidden_states - data) / (timestep / 1000).view(-1, 1, 1, 1, 1),)

    transformer = make_transformer()
    transformer.__class__ = Exact
    return transformer


def test_the_velocity_is_that_which_the_stock_pipeline_integrates(cached, init, tmp_path):
    batch, text = batch_of(cached)
    objective = FlowObjective(exact(batch["latents"]), text, settings(tmp_path, init))
    assert objective(batch, [seeded(7, i) for i in range(3)], 0)["loss"] < 1e-8
    data = torch.randn(1, 4, 3, 4, 4, generator=seeded(1))
    pipe = make_stock(transformer=exact(data), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    call = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 4, "output_type": "latent"}
    latents = pipe("a red disc", generator=seeded(2), max_sequence_length=8, guidance_scale=1.0, **call).frames
    assert torch.allclose(latents, data, atol=1e-5)


def test_captions_are_cleaned_and_padded_as_the_stock_pipeline_does(tmp_path):
    tokenizer, encoder = make_text()
    tokenizer.model_max_length = TOKENS
    caption = "a  red &amp;lt;\n disc "
    assert WAN.clean(caption) == "a red < disc"
    clip = {"video": torch.ones(3, 17, 16, 16), "caption": caption, "fps": 8.0}
    clips = type("Clips", (), {"fixed": staticmethod(lambda index: clip)})
    source = {tmp_path / "latents": LatentFingerprint("t", "c", 16, 17, 16, 16, "float32", 3)}
    (latents,) = write_latents(source, 1, clips(), encode)
    fingerprint = TextFingerprint("umt5", "c", TOKENS, "float32", 3)
    folder = write_embeddings(tmp_path / "text", fingerprint, latents, lambda: (tokenizer, encoder), WAN.clean)
    row = EmbeddingCache(folder, 1).row(0)
    stock, null = make_stock().encode_prompt(caption, max_sequence_length=TOKENS)
    assert torch.allclose(row["text_1_tokens"], stock[0], atol=1e-6)
    assert not stock[0, int(row["text_1_mask"].sum()) :].any()
    assert torch.allclose(EmbeddingCache(folder, 1).null().tokens[0], null, atol=1e-6)


def test_latents_are_normalised_by_the_autoencoders_statistics(cached, init, tmp_path, monkeypatch):
    seen = []

    def forward(self, batch, generators, step):
        seen.append(batch)
        return inner(self, batch, generators, step)

    inner = FlowObjective.forward
    monkeypatch.setattr(FlowObjective, "forward", forward)
    budgets = [{"ratio": 16, "share": 1.0}, {"ratio": 8, "share": 1.0}]
    train_diffusion(settings(tmp_path, init, budgets=budgets), [cached], [cached], statistics=STATISTICS)
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (MEAN, STD))
    assert {int(batch["ratio"][0]) for batch in seen} == {16, 8}
    for batch in seen:
        raw = LatentDataset(cached.latents[0 if batch["ratio"][0] == 16 else 1])
        for x, clip in zip(batch["latents"], batch["clip"].tolist(), strict=True):
            latents = raw.fixed(clip)["latents"] * raw.std + raw.mean
            assert torch.allclose(x, (latents - mean) / std, atol=1e-5)


@pytest.mark.parametrize("lora", [None, {"rank": 2, "targets": ["to_q", "ffn.net.2"]}])
def test_training_resumes_bit_for_bit(cached, init, tmp_path, lora):
    muon = {"steps": 4, "batch_size": 2, "warmup": 1, "learning_rate": 1e-3, "muon_learning_rate": None if lora else 0.02}

    def run(name, stop_after):
        config = settings(tmp_path / name, init, lora=lora, optimization=muon, budgets=[{"ratio": 16, "share": 1.0}])
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, stop_after=stop_after))
        one = [BucketCache(cached.bucket, cached.latents[:1], cached.texts)]
        return train_diffusion(config, one, one, statistics=STATISTICS)

    whole = run("whole", None)
    assert not run("parts", 2).outcome.finished
    parts = run("parts", 2)
    assert whole.outcome.metrics == parts.outcome.metrics
    saved = [load_checkpoint(checkpoints(tmp_path / name / "16x")[-1])[0] for name in ("whole", "parts")]
    for group in ("weights", "ema", "optimizer"):
        assert saved[0][group].keys() == saved[1][group].keys()
        assert all(torch.equal(value, saved[1][group][name]) for name, value in saved[0][group].items())
    assert all(("lora" in name) == bool(lora) for name in saved[0]["weights"])
    before, after = make_transformer().state_dict(), whole.transformer.state_dict()
    moved = [name for name, value in before.items() if name in after and not torch.equal(value, after[name])]
    assert bool(moved) == (lora is None)


def test_adapters_are_trained_without_muon(cached, init, tmp_path, capsys):
    one = [BucketCache(cached.bucket, cached.latents[:1], cached.texts)]

    def moments(name):
        """Train on for two steps at the preset's rates, and return the kinds of moments that the checkpoint holds."""
        config = settings(tmp_path / name, init, lora={"rank": 2}, budgets=[{"ratio": 16, "share": 1.0}])
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, stop_after=2))
        train_diffusion(config, one, one, statistics=STATISTICS)
        groups, meta = load_checkpoint(checkpoints(tmp_path / name / "16x")[-1])
        return meta["step"], {key.rpartition("/")[2] for key in groups["optimizer"]}

    save_yaml(tmp_path / "new" / "config.yaml", settings(tmp_path / "new", init))  # of a run that trained nothing
    assert moments("new") == (2, {"step", "exp_avg", "exp_avg_sq"})
    assert "AdamW trains the adapters, at learning_rate 0.001; muon_learning_rate 0.02 is not used" in capsys.readouterr().out
    assert load_yaml(tmp_path / "new" / "config.yaml")["optimization"]["muon_learning_rate"] is None
    assert moments("new") == (4, {"step", "exp_avg", "exp_avg_sq"})


def test_the_formula_agrees_with_the_flops_that_torch_counts():
    model = make_transformer()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.randn(3, 4, 5, 8, 4), torch.full((3,), 500.0), torch.randn(3, 7, 12))
    assert counter.get_total_flops() == wan_forward_flops(model.config, 5 * 4 * 2, 7, batch=3)


def test_the_matrices_of_the_blocks_are_muons_and_adapters_are_named_by_them():
    model = make_transformer()
    assert family_of(model) is WAN
    # Of each block: two attentions of four matrices, and two of the feed-forward.
    assert len(hidden_matrices(model)) == 2 * (2 * 4 + 2)
    with pytest.raises(UserError, match=r"lora target 'to_x': no linear layer ends so; the layers are attn1.to_k, .*ffn.net.2"):
        add_lora(model, Lora(targets=("to_x",)))
    add_lora(model, Lora(rank=2))
    assert sum(p.requires_grad for p in model.parameters()) == 2 * 2 * 2 * 4


def test_frozen_matrices_in_bfloat16_change_no_bit_under_autocast(cached, init, tmp_path):
    batch, text = batch_of(cached)
    losses, gradients, sizes = [], [], []
    for narrow in (False, True):
        model = make_transformer()
        add_lora(model, Lora(rank=2))
        if narrow:
            narrow_frozen(model)
        sizes.append(sum(p.numel() * p.element_size() for p in model.blocks.parameters() if not p.requires_grad))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.01)
        objective = FlowObjective(model, text, settings(tmp_path, init))
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(objective(batch, [seeded(7, i) for i in range(3)], 0)["loss"])
        losses[-1].backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert torch.equal(*losses)
    assert all(map(torch.equal, *gradients))
    assert sizes[1] < 0.6 * sizes[0]


def test_attention_backends_are_set_for_every_attention():
    model, device = make_transformer(), torch.device("cpu")
    assert choose_attention(model, "auto", device, torch.float32) == "native"
    assert choose_attention(model, "_native_flash", device, torch.float32) == "_native_flash"
    attentions = [a for block in model.blocks for a in (block.attn1, block.attn2)]
    assert {a.processor._attention_backend.value for a in attentions} == {"_native_flash"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_channels": 36}, "an image-to-video transformer .in_channels 36, out_channels 4"),
        ({"image_dim": 8, "added_kv_proj_dim": 24}, "image-to-video transformer .* image_dim 8"),
        ({"text_dim": 16}, "trained with text widths .16., this training has .12."),
        ({"in_channels": 8, "out_channels": 8}, "trained with latent channels 8, this training has 4"),
        ({"patch_size": (1, 4, 2)}, "latents of 2x2x2 .* not divisible by the patches of init, 1x4x2"),
    ],
)
def test_transformers_that_do_not_fit_are_refused(cached, tmp_path, change, message):
    make_transformer(**change).save_pretrained(tmp_path / "init")
    with pytest.raises(UserError, match=message):
        train_diffusion(
            settings(tmp_path, tmp_path / "init", budgets=[{"ratio": 16}]),
            [cached_at_16(cached)],
            [cached_at_16(cached)],
            statistics=STATISTICS,
        )


def test_a_text_encoders_pooled_vector_is_left_aside(cached):
    parts = [LatentDataset(cached.latents[0], texts=[EmbeddingCache(cached.texts[1], 1)])]
    text = types.SimpleNamespace(widths=(12,), pooled_width=7)
    adapt_to_latents(make_transformer(), parts, text, 0, False, STATISTICS)
    assert parts[0].mean.flatten().tolist() == pytest.approx(MEAN)
    text.widths = (13,)
    with pytest.raises(UserError, match=r"trained with text widths \[12\], this training has \[13\]"):
        adapt_to_latents(make_transformer(), parts, text, 0, False, STATISTICS)


def cached_at_16(cached: BucketCache) -> BucketCache:
    return BucketCache(cached.bucket, cached.latents[:1], cached.texts)


def test_missing_statistics_are_named(cached, init, tmp_path):
    one = [cached_at_16(cached)]
    with pytest.raises(UserError, match=r"latents of 4 channels, normalised by latents_mean .* the tokenizer's states none"):
        train_diffusion(settings(tmp_path, init, budgets=[{"ratio": 16}]), one, one)


def test_settings_that_the_family_does_not_know_are_refused(init, tmp_path):
    with pytest.raises(UserError, match="condition: WanTransformer3DModel was made for text alone"):
        adopt(settings(tmp_path, init, condition={"probability": 0.5}))
    with pytest.raises(UserError, match="base_ahead: WanTransformer3DModel takes one time for all channels"):
        adopt(settings(tmp_path, init, base_ahead=0.15))
    with pytest.raises(UserError, match="few_steps: WanPipeline samples at times of its scheduler's own"):
        adopt(settings(tmp_path, init, few_steps={}))
    for encoders in ([{"max_length": 8}], [{"model": "a"}, {"model": "b"}]):
        with pytest.raises(UserError, match=r"text encoders .*: WanTransformer3DModel takes one frozen T5 or UMT5"):
            adopt(settings(tmp_path, init, text={"encoders": encoders}))
    stock = make_stock(transformer_2=make_transformer(), boundary_ratio=0.9)
    stock.save_pretrained(tmp_path / "two")
    with pytest.raises(UserError, match="its two transformers share the times"):
        adopt(settings(tmp_path, tmp_path / "two"))
    for expert in ("transformer", "transformer_2"):
        with pytest.raises(UserError, match=rf"init .*{expert}: one of two transformers that share the times"):
            adopt(settings(tmp_path, tmp_path / "two" / expert))
    (init / "transformer" / "config.json").write_text('{"_class_name": "LTXVideoTransformer3DModel"}')
    with pytest.raises(UserError, match="a 'LTXVideoTransformer3DModel'; legal are ProMAGTransformer3DModel and Wan"):
        load_transformer(str(init))


def test_a_pipeline_brings_its_text_encoder(tmp_path):
    make_stock().save_pretrained(tmp_path / "stock")
    assert family_of_init(str(tmp_path / "stock")) is WAN
    config = settings(tmp_path, tmp_path / "stock", text={"encoders": [{}]}, shift=3.0)
    (encoder,) = adopt(config).text.encoders
    assert (encoder.model, encoder.max_length) == (str(tmp_path / "stock"), 512)
    given = settings(tmp_path, tmp_path / "stock", shift=3.0)
    assert adopt(given) == given


def test_a_text_length_that_is_not_given_is_that_of_the_family(init, tmp_path):
    def length(config):
        (encoder,) = adopt(config).text.encoders
        return encoder.max_length

    assert length(settings(tmp_path, init, text={"encoders": [{"model": "umt5"}]})) == 512
    assert length(settings(tmp_path, init, text={"encoders": [{"model": "umt5", "max_length": 77}]})) == 77
    assert length(configuration(tmp_path, text={"encoders": [{}]})) == 77


def test_another_shift_than_that_of_the_pipeline_that_samples_is_refused(tmp_path):
    make_stock().save_pretrained(tmp_path / "stock")
    config = settings(tmp_path, tmp_path / "stock", shift=5.0)
    problem = r"shift 5\.0: its pipeline samples with 3 \(.*scheduler_config\.json\); use shift 3, or state 5 there"
    with pytest.raises(UserError, match=f"init: {problem}"):
        adopt(config)
    scheduler = tmp_path / "stock" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace('"flow_shift": 3.0', '"flow_shift": 5.0'))
    assert adopt(config).shift == 5.0
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    other = UniPCMultistepScheduler.from_config(euler.config, use_flow_sigmas=True, flow_shift=5.0)
    other.save_pretrained(scheduler.parent)  # the file holds Euler's `shift` too, which UniPC does not read
    assert json.loads(scheduler.read_text())["shift"] == 3.0
    assert adopt(config).shift == 5.0
    FlowMatchEulerDiscreteScheduler.from_config(other.config, shift=5.0).save_pretrained(scheduler.parent)
    assert adopt(config).shift == 5.0
    (tmp_path / "own" / "scheduler").mkdir(parents=True)
    (tmp_path / "own" / "scheduler" / "scheduler_config.json").write_text('{"shift": 3.0}')
    whole = configuration(tmp_path, init=str(tmp_path / "own"), model=None, shift=5.0)
    assert adopt(whole).shift == 5.0  # its pipeline gets a scheduler of this shift
    adapters = dataclasses.replace(whole, lora=Lora())
    with pytest.raises(UserError, match=problem):
        adopt(adapters)
