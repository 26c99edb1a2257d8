import dataclasses
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from promag import AutoencoderKLProMAG
from promag.tokenizer.growth import PAPER_GROWTH, Growth
from promag.tokenizer.layers import START
from promag.tokenizer.levels import parameter_count
from tests.conftest import TINY, make_tokenizer

RATIOS = (4, 8, 16)


def moments(model, x, ratio):
    return model.encode(x, ratio).latent_dist.parameters


@torch.no_grad()
def test_wide_features_beside_the_latent_start_at_zero_and_reach_the_decoder_below(clip):
    model, plain = make_tokenizer(levels=1, settle=0.05), make_tokenizer(levels=1, settle=0.05)
    torch.manual_seed(3)
    plain.grow(Growth())
    torch.manual_seed(3)
    model.grow(Growth(hand_over="both"))
    z = torch.randn(1, 4, 3, 2, 2)
    assert torch.equal(model.decode(z, 8).sample, plain.decode(z, 8).sample)
    assert torch.equal(model.lift(z, 8, 4), plain.lift(z, 8, 4))
    growth, features = model.decoder_growth[0], torch.randn(1, 16, 5, 2, 2)
    growth.wide.skip.bias.copy_(torch.arange(16) / 16)
    estimate = model.lift(z, 8, 4)
    given = torch.arange(16).view(1, 16, 1, 1, 1).expand_as(features) / 16
    assert torch.equal(model.decode(z, 8).sample, model.decoder((estimate, given))[0][0])
    assert model.lifts(8) == (4,)


@torch.no_grad()
def test_features_alone_go_behind_the_first_convolution_and_cannot_be_lifted():
    model = make_tokenizer(levels=1, settle=0.05)
    for _ in range(2):
        model.grow(PAPER_GROWTH)
    z = torch.randn(1, 4, 3, 2, 2)
    behind = model.decoder.body[0](z)[0][:, :, [0, 1, 1, 1, 1, 2, 2, 2, 2]]  # at birth it repeats features instead of latents
    assert torch.allclose(model.decode(z, 16).sample, model.decoder((None, behind))[0][0], atol=1e-6)
    assert model.lifts(16) == model.lifts(8) == ()
    with pytest.raises(ValueError, match="lift from 16x to 8x: these levels hand over no latent"):
        model.lift(z, 16, 8)
    assert torch.equal(model.lift(z, 16, 16), z)


def test_sums_and_features_that_do_not_fit_the_level_below_are_named():
    model = make_tokenizer(levels=2)
    with pytest.raises(ValueError, match="sum_at 'features' on a level with sum_at 'moments'"):
        model.grow(Growth(sum_at="features"))
    with pytest.raises(ValueError, match="hand_over 'wide' on a level with 'latent', which needs a latent; use both"):
        model.grow(Growth(hand_over="wide"))
    for kind in ({"sum_at": "features"}, {"hand_over": "wide"}):
        with pytest.raises(ValueError, match="with width 32: needs our own base and its width"):
            make_tokenizer(levels=1).grow(Growth(**kind, width=32))
    with pytest.raises(ValueError, match="sum_at 'features' with mixing 'none', birth True: needs key frames"):
        Growth(mixing="none", sum_at="features")
    model.grow(Growth(hand_over="both"))
    assert model.lifts(16) == (4, 8)


@pytest.mark.parametrize(
    ("patch", "widths", "strides"), [(4, (16, 16, 16), ((2, 2), (2, 1))), (1, (16, 16, 32, 32), ((1, 2), (2, 2), (2, 2)))]
)
@torch.no_grad()
def test_a_base_can_start_from_block_means(patch, widths, strides):
    torch.manual_seed(0)
    shape = {"patch_size": patch, "block_out_channels": widths, "strides": strides}
    model = AutoencoderKLProMAG(**{**TINY, **shape})
    model.init_from_block_means()
    flat = torch.tensor([0.5, -0.25, 0.75]).view(1, 3, 1, 1, 1).expand(1, 3, 5, 16, 24)
    latent = model.encode(flat).latent_dist.mode()
    assert torch.allclose(latent[:, :3], flat[:, :, :2, :2, :3], atol=1e-5)
    assert torch.allclose(model.decode(latent).sample, flat, atol=1e-5)


@torch.no_grad()
def test_a_dual_latent_keeps_the_key_frames_latent_unchanged(clip):
    model = make_tokenizer(levels=1, settle=0.05)
    for _ in range(2):
        model.grow(Growth(latent="dual"))
    z = torch.randn(1, 8, 3, 2, 2)
    assert torch.equal(model.lift(z, 16, 4), z[:, :4, [0, 1, 1, 1, 1, 2, 2, 2, 2]])  # at birth
    for parameter in (*model.encoder_growth.parameters(), *model.decoder_growth.parameters()):
        parameter.add_(torch.randn_like(parameter) * 0.05)
    for ratio in (8, 16):
        mean, logvar = moments(model, clip, ratio).chunk(2, 1)
        assert mean.shape[1] == logvar.shape[1] == 8
        base_mean, base_logvar = moments(model, clip[:, :, :: ratio // 4], 4).chunk(2, 1)
        assert torch.equal(mean[:, :4], base_mean)
        assert torch.equal(logvar[:, :4], base_logvar)
        assert mean[:, 4:].abs().max() > 0.01
        assert model(clip, ratio).sample.shape == clip.shape
    assert model.level_channels == [4, 8, 8]
    with pytest.raises(ValueError, match="B 8 t h w is needed"):
        model.decode(torch.zeros(1, 4, 3, 2, 2), 8)
    with pytest.raises(ValueError, match="'mixed' on a dual level"):
        model.grow(Growth())


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_growing_and_training_a_level_leaves_the_lower_levels_bit_equal(clip, part):
    model = make_tokenizer(levels=2, settle=0.05)
    before = {r: (moments(model, clip, r), model(clip, r).sample) for r in (4, 8)}
    model.grow(Growth(**{part: "finetune"}))
    parameters = model.train_only(16)
    optimizer = torch.optim.SGD(parameters, 0.1)
    old = model(clip, 16).sample
    (old - clip).square().mean().backward()
    used = [p for p in parameters if p.grad is not None]
    assert {id(p) for p in model.level_modules(16)[-1].parameters()} & {id(p) for p in used}
    optimizer.step()
    assert not torch.equal(model(clip, 16).sample, old)
    for ratio, (latent, output) in before.items():
        assert torch.equal(moments(model, clip, ratio), latent)
        assert torch.equal(model(clip, ratio).sample, output)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_finetuned_copy_starts_as_the_levels_below(clip, part):
    frozen, own = make_tokenizer(levels=1, settle=0.05), make_tokenizer(levels=1, settle=0.05)
    for model, lower in ((frozen, "frozen"), (own, "finetune")):
        torch.manual_seed(3)
        model.grow(Growth(**{part: lower}))
    assert torch.equal(frozen(clip, 8).sample, own(clip, 8).sample)
    assert torch.equal(moments(own, clip, 8), moments(own, clip[:, :, ::2], 4))  # the law at birth
    copied = getattr(frozen, part)
    assert len(own.train_only(8)) == len(frozen.train_only(8)) + len(list(copied.parameters()))


@torch.no_grad()
def test_a_level_encodes_through_the_nearest_copy_above_and_chunks_equal_the_whole():
    """The base is shared; 8x has a copy, 16x uses the 8x level's copy, and 32x has its own copy of all three."""
    model = AutoencoderKLProMAG(**TINY)
    for encoder in ("finetune", "frozen", "finetune"):
        model.grow(Growth(encoder=encoder))
    first, last = model.own_encoders["1"], model.own_encoders["3"]
    assert model.encoding_path(0) == [model.encoder]
    assert model.encoding_path(2) == [first[0], *model.encoder_growth[:2]]
    assert model.encoding_path(3) == [*last, model.encoder_growth[2]]
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    x = torch.rand(1, 3, 65, 16, 16) * 2 - 1
    for ratio in model.temporal_ratios:
        state, parts = START, []
        for chunk in (x[:, :, :33], x[:, :, 33:]):
            posterior, state = model.encode_chunk(chunk, state, ratio)
            parts.append(posterior.mode())
        assert (torch.cat(parts, 2) - moments(model, x, ratio).chunk(2, 1)[0]).abs().max() < 1e-4
    together = [d.parameters for d in model.encode_levels(x, model.temporal_ratios)]  # no level gets the features of another
    for ratio, z in zip(model.temporal_ratios, together, strict=True):
        assert torch.equal(z, moments(model, x, ratio))


@pytest.mark.parametrize("ratio", RATIOS)
def test_causality_later_frames_do_not_change_earlier_latents_or_pixels(tokenizer, clip, ratio):
    changed = clip.clone()
    changed[:, :, -1] += 1
    a, b = moments(tokenizer, clip, ratio), moments(tokenizer, changed, ratio)
    assert torch.equal(a[:, :, :-1], b[:, :, :-1])
    assert not torch.equal(a[:, :, -1], b[:, :, -1])
    z = a[:, :4]
    later = z.clone()
    later[:, :, -1] += 1
    x, y = tokenizer.decode(z, ratio).sample, tokenizer.decode(later, ratio).sample
    assert torch.equal(x[:, :, :-ratio], y[:, :, :-ratio])
    assert not torch.equal(x[:, :, -1], y[:, :, -1])


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("plan", [(1, 2), (1, 1, 1), (2, 1), (3,)])
@torch.no_grad()
def test_chunks_equal_the_whole(tokenizer, ratio, plan):
    torch.manual_seed(2)
    x = torch.rand(1, 3, 1 + 2 * ratio, 16, 16) * 2 - 1
    whole = moments(tokenizer, x, ratio)
    state, parts, first = START, [], 0
    for count in plan:
        frames = ratio * count if first else 1 + ratio * (count - 1)
        posterior, state = tokenizer.encode_chunk(x[:, :, first : first + frames], state, ratio)
        parts.append(posterior.parameters)
        first += frames
    assert torch.allclose(torch.cat(parts, 2), whole, atol=1e-5)

    z = whole[:, :4]
    state, parts, first = START, [], 0
    for count in plan:
        part, state = tokenizer.decode_chunk(z[:, :, first : first + count], state, ratio)
        parts.append(part)
        first += count
    assert torch.allclose(torch.cat(parts, 2), tokenizer.decode(z, ratio).sample, atol=1e-5)


@given(st.sampled_from(RATIOS), st.integers(0, 3), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=12)
def test_every_legal_shape_is_reconstructed(tokenizer, ratio, more, h, w):
    x = torch.zeros(1, 3, 1 + ratio * more, 8 * h, 8 * w)
    with torch.no_grad():
        z = tokenizer.encode(x, ratio).latent_dist.mode()
        assert z.shape == (1, 4, 1 + more, h, w)
        assert tokenizer.decode(z, ratio).sample.shape == x.shape


@torch.no_grad()
def test_slicing_and_several_levels_at_once_change_nothing(tokenizer, clip):
    x = torch.cat([clip, -clip])
    whole = [moments(tokenizer, x, r) for r in RATIOS]
    for got, expected in zip(tokenizer.encode_levels(x, RATIOS), whole, strict=True):
        assert torch.equal(got.parameters, expected)
    tokenizer.enable_slicing()
    sliced = moments(tokenizer, x, 16)
    tokenizer.disable_slicing()
    assert torch.allclose(sliced, whole[-1], atol=1e-5)


def test_frozen_features_are_computed_once_for_each_frame_rate(tokenizer, clip):
    seen = []
    original = tokenizer.encoder.features
    tokenizer.encoder.features = lambda x, state=None: seen.append(x.shape[2]) or original(x, state)
    try:
        tokenizer.encode(clip, 16)
    finally:
        del tokenizer.encoder.features
    assert sorted(seen) == [9, 17, 33]


def test_saved_and_loaded_gives_the_same_at_every_level(tokenizer, clip, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoencoderKLProMAG.from_pretrained(tmp_path)
    assert loaded.temporal_ratios == RATIOS
    for ratio in RATIOS:
        assert torch.equal(loaded(clip, ratio).sample, tokenizer(clip, ratio).sample)


def test_default_ratio_is_the_highest(tokenizer, clip):
    assert torch.equal(tokenizer(clip).sample, tokenizer(clip, 16).sample)


def test_sampling_a_posterior_follows_its_generator(tokenizer, clip):
    a, b = (tokenizer(clip, 8, sample_posterior=True, generator=torch.Generator().manual_seed(s)).sample for s in (1, 1))
    c = tokenizer(clip, 8, sample_posterior=True, generator=torch.Generator().manual_seed(2)).sample
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize(
    ("shape", "ratio", "message"),
    [
        ((1, 3, 34, 16, 16), 16, "34 frames: 16x needs"),
        ((1, 3, 17, 20, 16), 16, "height 20: needs a multiple of 8; use 16 or 24"),
        ((1, 4, 17, 16, 16), 16, "B 3 T H W is needed"),
        ((3, 17, 16, 16), 16, "B 3 T H W is needed"),
        ((1, 3, 17, 16, 16), 32, "temporal ratio 32: this tokenizer has 4x, 8x, 16x"),
    ],
)
def test_illegal_input_is_named(tokenizer, shape, ratio, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(torch.zeros(shape), ratio)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strides": ((2, 2),)}, "1 strides: 3 widths"),
        ({"patch_size": 2}, "patch_size times spatial strides is 4"),
        ({"block_out_channels": (16, 24, 16)}, "no multiple"),
        ({"framewise": 3}, "framewise 3 with strides .*from 0 to 2"),
        ({"framewise": 2}, "framewise 2 with strides .*without a stride of time between them"),
        ({"framewise": -1}, "framewise -1"),
        ({"framewise": 1.0}, "framewise"),
    ],
)
def test_illegal_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderKLProMAG(**{**TINY, **change})


def test_illegal_growth_is_named():
    with pytest.raises(ValueError, match="mixing 'sum': use one of attention, adanorm, adanorm_late, concat, none"):
        Growth(mixing="sum")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="latent 'dual' with mixing 'none', birth True: needs a key-frame latent"):
        Growth(mixing="none", latent="dual")
    with pytest.raises(ValueError, match="heads 5: must divide"):
        make_tokenizer(levels=2, heads=5)


def test_hidden_kernels_exclude_those_at_pixels_and_latents():
    model = AutoencoderKLProMAG(**TINY)
    model.grow()
    model.grow(Growth(decoder="finetune"))
    hidden = {id(p) for p in model.hidden_kernels()}
    at_ends = {n for n, p in model.named_parameters() if n.endswith("weight") and p.ndim == 5 and id(p) not in hidden}
    skips = [f"{part}.{kind}.weight" for part in ("encoder.head", "decoder.head") for kind in ("conv", "skip")]
    grown = [f"encoder_growth.{i}.head.{kind}.weight" for i in (0, 1) for kind in ("conv", "skip")]
    lifts = [f"decoder_growth.{i}.{name}.weight" for i in (0, 1) for name in ("conv_in", "head.conv", "head.skip")]
    own = [f"own_decoders.2.0.{name}.weight" for name in ("conv_in", "head.conv", "head.skip")]
    own += [f"own_decoders.2.1.{name}.weight" for name in ("body.0", "head.conv", "head.skip")]
    assert at_ends == {*skips, *grown, *lifts, *own, "encoder.body.0.weight", "decoder.body.0.weight"}


def test_the_paper_preset_has_the_stated_parameters_at_every_level():
    from pathlib import Path

    from promag.tokenizer.config import TokenizerConfig
    from promag.training.config import build, load_yaml

    path = "configs/paper/tokenizer.yaml"
    config = build(TokenizerConfig, load_yaml(path), path)
    stated = [float(n) for n in re.findall(r"([\d.]+) M", Path(path).read_text().splitlines()[0])]
    with torch.device("meta"):
        model, sizes = AutoencoderKLProMAG(**vars(config.model)), []
        for stage in config.stages:
            if stage.growth:
                model.grow(stage.growth)
            sizes.append(parameter_count([model]) / 1e6)
    assert sizes == pytest.approx(stated, abs=0.05)
    assert model.temporal_ratios == (4, 8, 16)
    assert [(stage.ratio, stage.frames) for stage in config.stages] == [(4, 17), (8, 33), (16, 65)]


def test_preset_sizes():
    """The sizes are those stated in the presets."""
    from pathlib import Path

    from promag.tokenizer.config import TokenizerConfig
    from promag.training.config import build, load_yaml

    sizes = {}
    for name in ("tiny", "small", "base"):
        path = f"configs/tokenizer/{name}.yaml"
        config = build(TokenizerConfig, load_yaml(path), path)
        with torch.device("meta"):
            sizes[name] = parameter_count([AutoencoderKLProMAG(**vars(config.model))]) / 1e6
        assert [stage.ratio for stage in config.stages] == [4, 8, 16]
        (stated,) = re.findall(r"([\d.]+) M parameters at 4x", Path(path).read_text(encoding="utf-8"))
        assert sizes[name] == pytest.approx(float(stated), abs=0.5)


def check_chunks_equal_the_whole(model, plan):
    torch.manual_seed(2)
    x = torch.rand(1, 3, 33, 16, 16) * 2 - 1
    for ratio in RATIOS:
        encoding, decoding, latents, pixels = START, START, [], []
        for chunk in x.split(plan, 2):
            posterior, encoding = model.encode_chunk(chunk, encoding, ratio)
            latents.append(posterior.parameters)
            output, decoding = model.decode_chunk(posterior.mode(), decoding, ratio)
            pixels.append(output)
        assert torch.allclose(torch.cat(latents, 2), moments(model, x, ratio), atol=1e-5)
        assert torch.allclose(torch.cat(pixels, 2), model(x, ratio).sample, atol=1e-5)


KINDS = (
    {"mixing": "concat"},
    {"mixing": "none"},
    {"mixing": "adanorm_late", "hand_over": "both"},
    dataclasses.asdict(PAPER_GROWTH),
    {"latent": "dual"},
    {"latent": "dual", "sum_at": "features", "hand_over": "wide"},
    {"window": 1},
    {"window": 5},
)


@pytest.mark.parametrize("growth", KINDS)
@pytest.mark.parametrize("plan", [(1, 16, 16), (17, 16), (1, 32)])
@torch.no_grad()
def test_chunks_equal_the_whole_for_every_kind_of_growth(growth, plan):
    check_chunks_equal_the_whole(make_tokenizer(settle=0.05, **growth), plan)


def test_a_fingerprint_covers_the_weights_that_encode_a_ratio():
    def prints(**growth):
        model = make_tokenizer(levels=1, settle=0.05)
        for _ in range(2):
            torch.manual_seed(1)
            model.grow(Growth(**growth))
        return model, [model.encoding_fingerprint(ratio) for ratio in RATIOS]

    model, plain = prints()
    assert len(set(plain)) == 3
    assert prints(heads=2)[1][0] == plain[0]  # from 8x on the same weights give another function
    assert prints(heads=2)[1][1] != plain[1]
    model.grow(Growth())
    with torch.no_grad():
        model.decoder.head.conv.weight.add_(1)
        model.decoder_growth[0].head.conv.weight.add_(1)
    assert [model.encoding_fingerprint(ratio) for ratio in RATIOS] == plain
    copied, same = prints(encoder="finetune", decoder="finetune")
    assert same == plain  # copies that are still equal
    with torch.no_grad():
        copied.own_encoders["2"][0].head.conv.weight.add_(1)
    assert [copied.encoding_fingerprint(r) == p for r, p in zip(RATIOS, plain, strict=True)] == [True, True, False]


def test_a_fingerprint_survives_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoencoderKLProMAG.from_pretrained(tmp_path)
    assert all(loaded.encoding_fingerprint(ratio) == tokenizer.encoding_fingerprint(ratio) for ratio in RATIOS)


def test_idle_heads_are_those_without_gradient(clip):
    for growth in ({}, {"mixing": "none"}, {"birth": False}, {"latent": "dual"}, {"sum_at": "features"}):
        model = make_tokenizer(settle=0.05, **growth)
        for ratio in RATIOS:
            model.zero_grad()
            moments(model, clip, ratio).square().mean().backward()
            heads = [encoder.head for encoder in model.encoding_path(model.level_of(ratio))]
            idle = [head for head in heads if all(p.grad is None for p in head.parameters())]
            assert model.idle_heads(ratio) == idle


def test_compiled_and_checkpointed_blocks_are_the_same():
    blocks = {"ResBlock", "Downsample", "Upsample", "Head", "CrossLevelAttention", "Unfold"}
    assert set(AutoencoderKLProMAG._repeated_blocks) == blocks
    model = make_tokenizer(hand_over="frames")
    model.enable_gradient_checkpointing()
    on = {type(module).__name__ for module in model.modules() if getattr(module, "gradient_checkpointing", False)}
    assert on - {"AutoencoderKLProMAG"} == blocks
