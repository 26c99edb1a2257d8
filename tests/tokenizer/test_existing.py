import json

import diffusers
import pytest
import torch

from promag import AutoencoderKLProMAG, load_tokenizer
from promag.tokenizer.growth import Growth
from promag.tokenizer.layers import START
from promag.tokenizer.streaming import reconstruct
from promag.training.config import UserError
from tests.existing_models import SMALL, small_existing

ARITHMETIC = {  # temporal ratio, spatial ratio, latent channels, latent frames between legal lengths
    "Wan 2.1": (4, 8, 4, 1),
    "Wan 2.2": (4, 16, 4, 1),
    "HunyuanVideo": (4, 8, 4, 1),
    "HunyuanVideo 1.5": (4, 16, 4, 1),
    "CogVideoX": (4, 8, 4, 2),
    "LTX": (8, 32, 8, 1),
}
STREAMING = ("Wan 2.1", "Wan 2.2", "CogVideoX")
NORMALISED_OVER_TIME = ("HunyuanVideo", "CogVideoX")


def grown(name, features="latents", levels=2, settle=0.05, **growth):
    """Return a base and our model on it, its new levels moved at random, as training would."""
    base = small_existing(name)
    model = AutoencoderKLProMAG.from_base(base, features)
    for _ in range(levels):
        model.grow(Growth(width=16, **growth))
    if settle:
        settle_levels(model, settle)
    return base, model


@torch.no_grad()
def settle_levels(model, by):
    for parameter in (*model.encoder_growth.parameters(), *model.decoder_growth.parameters()):
        parameter.add_(torch.randn_like(parameter) * by)


def clip_for(model, ratio, stretches=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    side = 2 * model.spatial_ratio
    return torch.rand(1, 3, 1 + ratio * model.latent_step * stretches, side, side, generator=generator) * 2 - 1


def moments(model, x, ratio):
    return model.encode(x, ratio).latent_dist.parameters


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_the_base_keeps_its_latents_and_videos_to_the_bit(name):
    base, model = grown(name)
    ratio, spatial, _, step = ARITHMETIC[name]
    assert (model.base_ratio, model.spatial_compression_ratio, model.latent_channels, model.latent_step) == ARITHMETIC[name]
    assert model.temporal_ratios == (ratio, 2 * ratio, 4 * ratio)
    for frames in (1, 1 + 2 * ratio * step):
        x = clip_for(model, ratio, 2)[:, :, :frames]
        latent = base.encode(x).latent_dist
        assert torch.equal(moments(model, x, ratio), latent.parameters)
        assert torch.equal(model.decode(latent.mode(), ratio).sample, base.decode(latent.mode()).sample)
    same = model.base_model()
    assert type(same) is type(base)
    assert torch.equal(same.decode(latent.mode()).sample, base.decode(latent.mode()).sample)
    with pytest.raises(ValueError, match=f"{ratio}x needs 1 \\+ {ratio * step}k"):
        model.encode(clip_for(model, ratio)[:, :, :3], ratio)
    with pytest.raises(ValueError, match=f"needs a multiple of {spatial}"):
        model.encode(torch.zeros(1, 3, 1, 64, 60), ratio)


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_birth_law_a_grown_latent_is_the_bases_latent_of_every_second_frame(name):
    base, model = grown(name, levels=0)
    for rate in (2, 4):
        model.grow(Growth(width=16))
        ratio = rate * model.base_ratio
        x = clip_for(model, ratio)
        assert torch.equal(moments(model, x, ratio), base.encode(x[:, :, ::rate]).latent_dist.parameters)
        z = base.encode(x[:, :, ::rate]).latent_dist.mode()
        twice = z.repeat_interleave(rate, 2)[:, :, rate - 1 :]
        assert torch.equal(model.decode(z, ratio).sample, base.decode(twice).sample)


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_later_frames_do_not_change_earlier_latents(name):
    base, model = grown(name)
    ratio = 4 * model.base_ratio
    x = clip_for(model, ratio, 2)
    y = x.clone()
    y[:, :, -ratio * model.latent_step :] = -y[:, :, -ratio * model.latent_step :]
    before = 1 + (model.latent_step if name == "CogVideoX" else 0)
    same = torch.equal(moments(model, x, ratio)[:, :, :before], moments(model, y, ratio)[:, :, :before])
    assert same == (name != "HunyuanVideo")
    # Two classes normalise over the frames of a stretch: within one, a later frame does change an earlier latent.
    short, other = x[:, :, :9], x[:, :, :9].clone()
    other[:, :, -1] = -1
    causal = torch.equal(base.encode(short).latent_dist.mode()[:, :, 0], base.encode(other).latent_dist.mode()[:, :, 0])
    assert causal == (name not in NORMALISED_OVER_TIME)


@pytest.mark.parametrize("name", STREAMING)
@torch.no_grad()
def test_chunks_equal_the_whole(name):
    _, model = grown(name)
    for ratio in model.temporal_ratios:
        x = clip_for(model, ratio, 3)
        whole, parts, state = model.encode(x, ratio).latent_dist.parameters, [], START
        for chunk in x.split([1 + ratio * model.latent_step, 2 * ratio * model.latent_step], 2):
            posterior, state = model.encode_chunk(chunk, state, ratio)
            parts.append(posterior.parameters)
        assert torch.allclose(torch.cat(parts, 2), whole, atol=1e-5)
        z = model.encode(x, ratio).latent_dist.mode()
        first, state = model.decode_chunk(z[:, :, : 1 + model.latent_step], START, ratio)
        rest, _ = model.decode_chunk(z[:, :, 1 + model.latent_step :], state, ratio)
        assert torch.allclose(torch.cat([first, rest], 2), model.decode(z, ratio).sample, atol=1e-5)


@torch.no_grad()
def test_frames_that_a_chunk_of_cogvideox_cannot_have_are_named():
    model = AutoencoderKLProMAG.from_base(small_existing("CogVideoX"))
    with pytest.raises(ValueError, match=r"2 frames in a first chunk: AutoencoderKLCogVideoX needs 1 \+ 2k"):
        model.decode_chunk(torch.zeros(1, 4, 2, 2, 2))
    _, state = model.decode_chunk(torch.zeros(1, 4, 3, 2, 2))
    with pytest.raises(ValueError, match="3 frames in a later chunk: AutoencoderKLCogVideoX needs 2k"):
        model.decode_chunk(torch.zeros(1, 4, 3, 2, 2), state)
    with pytest.raises(ValueError, match=r"4 latent frames: AutoencoderKLCogVideoX decodes 1 \+ 2k; use 3 or 5"):
        model.decode(torch.zeros(1, 4, 4, 2, 2))
    assert model.decode(torch.zeros(1, 4, 5, 2, 2)).sample.shape[2] == 17


@torch.no_grad()
def test_each_half_has_the_scale_of_latents_in_its_own_type():
    model = AutoencoderKLProMAG.from_base(small_existing("Wan 2.1"))
    model.grow(Growth(width=16))
    encoder, decoder = model.encoder_growth[0].scale, model.decoder_growth[0].scale_in
    exact = encoder.std.clone()
    model.set_dtypes(encode=torch.float32, decode=torch.bfloat16)
    assert torch.equal(encoder.std, exact)
    assert decoder.std.dtype == torch.bfloat16


@pytest.mark.parametrize("name", sorted(SMALL.keys() - set(STREAMING)))
def test_a_base_that_cannot_stream_says_so(name):
    _, model = grown(name, levels=1)
    with pytest.raises(ValueError, match=f"{SMALL[name][0]}: codes whole clips only"):
        model.encode_chunk(clip_for(model, 2 * model.base_ratio))
    clip = clip_for(model, 2 * model.base_ratio * model.latent_step)
    with pytest.raises(ValueError, match=f"{SMALL[name][0]}: codes whole clips only"):
        reconstruct(model, clip, model.base_ratio, chunk=model.base_ratio * model.latent_step)


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_cached_latents_stand_for_pixels(name):
    base, model = grown(name)
    ratio = 4 * model.base_ratio
    x = clip_for(model, ratio)
    cached = {rate: base.encode(x[:, :, ::rate]).latent_dist.mode() for rate in (1, 2, 4)}
    ratios = model.temporal_ratios
    for got, wanted in zip(model.encode_base_latents(cached, ratios), model.encode_levels(x, ratios), strict=True):
        assert torch.allclose(got.mean, wanted.mean, atol=1e-5)
    with pytest.raises(ValueError, match="latents of every 4th frame: they are needed"):
        model.encode_base_latents({rate: cached[rate] for rate in (1, 2)}, ratios)


def test_cached_latents_cannot_stand_for_pixels_that_a_copy_of_the_base_encodes():
    _, model = grown("Wan 2.1", levels=1, settle=0.0, encoder="finetune")
    model.grow(Growth(width=16))
    for ratio in (8, 16):
        with pytest.raises(ValueError, match=f": {ratio}x encodes with the copy of the base that 8x has "):
            model.encode_base_latents({}, (4, ratio))


@pytest.mark.parametrize("name", [name for name in SMALL if name != "HunyuanVideo"])
@torch.no_grad()
def test_growth_can_see_the_encoders_features(name):
    base, model = grown(name, "encoder", levels=1)
    x = clip_for(model, 2 * model.base_ratio)
    seen = []
    handle = base.encoder.conv_out.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    base.encode(x)
    handle.remove()
    features, _ = model.encoder.features(x)
    assert torch.equal(features[:, 2 * model.latent_channels :], torch.cat(seen, 2))
    assert model.encoder_growth[0].project.conv.in_channels == model.latent_channels + seen[0].shape[1]
    with pytest.raises(ValueError, match="the levels see more of the base than its latents"):
        model.encode_base_latents({1: base.encode(x).latent_dist.mode()}, (model.base_ratio,))


def test_features_that_overlap_in_time_are_refused():
    with pytest.raises(ValueError, match="AutoencoderKLHunyuanVideo blends overlapping stretches of frames; use latents"):
        AutoencoderKLProMAG.from_base(small_existing("HunyuanVideo"), "encoder")


def test_only_what_was_grown_is_trained_and_latents_keep_their_scale():
    base, model = grown("Wan 2.1", levels=1, settle=0.0)
    trained = model.train_only(8)
    assert {id(p) for p in trained}.isdisjoint(id(p) for p in base.parameters())
    assert all(not p.requires_grad for p in base.parameters())
    scale = model.encoder_growth[0].scale
    assert scale.std.flatten().tolist() == pytest.approx([1.0, 2.0, 0.5, 1.5])
    with torch.no_grad():  # a residual of 1 is one deviation of each channel
        head = model.encoder_growth[0].head
        head.skip.bias[:4] = 1
        x = clip_for(model, 8)
        added = model.encode(x, 8).latent_dist.mode() - base.encode(x[:, :, ::2]).latent_dist.mode()
    assert torch.allclose(added.mean((0, 2, 3, 4)), torch.tensor([1.0, 2.0, 0.5, 1.5]), atol=1e-5)


@pytest.mark.parametrize("name", ["Wan 2.2", "CogVideoX"])
@torch.no_grad()
def test_merged_and_small_folders_load_alike(name, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    small_existing(name).save_pretrained(here / "base")
    model = load_tokenizer(here / "base")
    model.grow(Growth(width=16))
    model.grow(Growth(width=24, latent="dual"))
    settle_levels(model, 0.05)
    model.save_growth(here / "growth")
    model.save_pretrained(here / "merged")
    here.rename(there)
    assert json.loads((there / "growth" / "growth.json").read_text())["path"] == "../base"
    x = clip_for(model, model.temporal_ratios[-1])
    for folder in ("growth", "merged"):
        again = load_tokenizer(there / folder)
        assert torch.equal(moments(again, x, None), moments(model, x, None))
        assert again.encoding_fingerprint(16) == model.encoding_fingerprint(16)
    small = load_tokenizer(there / "growth").save_growth(there / "half", torch.bfloat16)
    assert small is None
    halved, full = ((there / name / "growth.safetensors").stat().st_size for name in ("half", "growth"))
    assert 0.45 < halved / full < 0.6


@pytest.mark.parametrize("name", ["Wan 2.1", "LTX"])
def test_caches_stay_valid_whoever_saved_the_base_and_whatever_growth_sees_of_it(name, tmp_path):
    base = small_existing(name)
    base.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "_diffusers_version": "0.1.0"}))
    model, saved_by_another = (AutoencoderKLProMAG.from_base(each) for each in (base, tmp_path))
    assert saved_by_another.existing.config != model.existing.config
    ratio = model.base_ratio
    assert saved_by_another.encoding_fingerprint(ratio) == model.encoding_fingerprint(ratio)
    seen = AutoencoderKLProMAG.from_base(base, "encoder")
    assert seen.encoding_fingerprint(ratio) == model.encoding_fingerprint(ratio)
    other = small_existing(name)
    next(parameter for parameter in other.encoder.parameters()).data += 1e-3
    assert AutoencoderKLProMAG.from_base(other).encoding_fingerprint(ratio) != model.encoding_fingerprint(ratio)


@pytest.mark.parametrize("features", ["latents", "encoder"])
@pytest.mark.parametrize("name", STREAMING)
@torch.no_grad()
def test_tiling_and_slicing_of_the_base_become_those_of_the_grown_autoencoder(name, features):
    base, plain = grown(name, features, 1)
    base.enable_tiling()
    base.enable_slicing()
    model = AutoencoderKLProMAG.from_base(base, features)
    model.grow(Growth(**plain.config["growth"][0]))
    model.load_state_dict(plain.state_dict())
    assert (base.use_tiling, base.use_slicing, model.use_tiling, model.use_slicing) == (True,) * 4
    tile, stride = (
        {f"tile_sample_{part}_{side}": n for side in ("height", "width")} for part, n in (("min", 48), ("stride", 32))
    )
    for each in (plain, model):
        each.enable_tiling(**tile, **stride)
    plain.enable_slicing()
    ratio = plain.temporal_ratios[-1]
    x = torch.rand(2, 3, 1 + ratio * plain.latent_step, 64, 64) * 2 - 1
    z = moments(plain, x, ratio)
    assert torch.equal(moments(model, x, ratio), z)
    mean = z[:, : plain.latent_channels]
    assert torch.equal(model.decode(mean, ratio).sample, plain.decode(mean, ratio).sample)


def test_what_is_no_causal_video_autoencoder_is_refused_in_one_line(tmp_path):
    image = {"block_out_channels": (8, 8), "latent_channels": 4, "norm_num_groups": 2}
    image |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    diffusers.AutoencoderKL(**image).save_pretrained(tmp_path / "image")
    allegro = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 2}
    torch.manual_seed(0)
    diffusers.AutoencoderKLAllegro(**allegro).save_pretrained(tmp_path / "acausal")
    small_existing("Wan 2.1").save_pretrained(tmp_path / "pickle", safe_serialization=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    refused = {
        "image": "AutoencoderKL: its temporal ratio is not in its configuration; a causal video autoencoder is needed",
        "acausal": "AutoencoderKLAllegro: 1 \\+ 4\\*N frames to 1 \\+ N latent frames and back are needed",
        "pickle": "may be pickles",
        "other": "autoencoder 'UNet2DModel': diffusers .* has no autoencoder of that name",
    }
    for folder, message in refused.items():
        with pytest.raises(UserError, match=message) as error:
            load_tokenizer(tmp_path / folder)
        assert str(tmp_path / folder) in str(error.value)
        assert "\n" not in str(error.value)


@torch.no_grad()
def test_tiles_and_lengths_of_any_base():
    _, model = grown("Wan 2.2")
    model.enable_tiling(32, 32, 16, 16)
    x = torch.rand(1, 3, 20, 48, 48) * 2 - 1
    result = reconstruct(model, x, 16, chunk=16)
    assert result.sample.shape == x.shape
    assert (result.padding.frames, result.padding.rows, result.padding.columns) == (13, 0, 0)
    with pytest.raises(ValueError, match="height 72: needs a multiple of 16"):
        model.enable_tiling(72, 64)


@torch.no_grad()
def test_a_class_that_states_its_ratio_by_another_key_is_grown():
    base = diffusers.AutoencoderKLKVAEVideo(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1, z_channels=4).eval()
    model = AutoencoderKLProMAG.from_base(base)
    model.grow(Growth())
    assert model.eval().temporal_ratios == (4, 8)
    x = torch.rand(1, 3, 9, 32, 32)
    assert torch.equal(model.encode(x, 4).latent_dist.mode(), base.encode(x).latent_dist.mode())
    assert torch.equal(model.encode(x, 8).latent_dist.mode(), base.encode(x[:, :, ::2]).latent_dist.mode())


def test_hidden_kernels_of_a_base_exclude_those_at_pixels_and_latents():
    base = small_existing("Wan 2.1")
    hidden = {id(p) for p in AutoencoderKLProMAG.from_base(base).hidden_kernels()}
    ends = [f"{side}.conv_{end}" for side in ("encoder", "decoder") for end in ("in", "out")]
    ends += ["quant_conv", "post_quant_conv"]
    at_ends = {name for name, p in base.named_parameters() if name.endswith("weight") and id(p) not in hidden}
    assert at_ends == {f"{end}.weight" for end in ends}


def test_every_weight_of_a_base_can_be_trained():
    base = small_existing("Wan 2.2")
    model = AutoencoderKLProMAG.from_base(base)
    assert len(model.train_only(4)) == len(list(base.parameters()))
    model(torch.rand(1, 3, 9, 32, 32) * 0.1, 4).sample.square().mean().backward()
    assert [name for name, p in base.named_parameters() if p.grad is None] == []


@torch.no_grad()
def test_a_decoder_with_a_time_input_gets_time_zero():
    torch.manual_seed(0)
    base = diffusers.AutoencoderKLLTXVideo(**SMALL["LTX"][1], timestep_conditioning=True).eval()
    z = torch.randn(1, 8, 2, 2, 2)
    assert torch.equal(AutoencoderKLProMAG.from_base(base).decode(z).sample, base.decode(z, temb=torch.zeros(1)).sample)


def test_a_class_without_a_name_of_its_own_here_is_taken_by_its_latents():
    torch.manual_seed(0)
    model = AutoencoderKLProMAG.from_base(diffusers.AutoencoderKLQwenImage(**SMALL["Wan 2.1"][1]).eval())
    assert (model.base_ratio, model.spatial_ratio, model.latent_channels) == (4, 8, 4)
    model.grow(Growth(width=16))
    x = clip_for(model, 8)
    with torch.no_grad():
        assert torch.equal(moments(model, x, 8), moments(model, x[:, :, ::2], 4))
    other = {**SMALL["Wan 2.1"][1], "latents_mean": [0.0] * 3}
    with pytest.raises(ValueError, match="latents_mean of 3 and latents_std of 4 values, 4 latent channels"):
        AutoencoderKLProMAG.from_base(diffusers.AutoencoderKLWan(**other)).grow(Growth())


@pytest.mark.parametrize("name", [name for name in SMALL if name != "HunyuanVideo"])
@torch.no_grad()
def test_wide_features_go_behind_the_first_convolution_of_the_base(name):
    _, plain = grown(name, levels=2, settle=0)
    _, model = grown(name, levels=2, settle=0, hand_over="both")
    ratio = 4 * model.base_ratio
    z = torch.randn(1, model.latent_channels, 1 + 2 * model.latent_step, 2, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.decode(z, ratio).sample, plain.decode(z, ratio).sample)  # at birth
    settle_levels(model, 0.05)
    (estimate, wide), _ = model.decoder_growth[0]((model.lift(z, ratio, ratio // 2), None))
    assert wide is not None
    constant = torch.linspace(-1, 1, wide.shape[1])
    added = model.decoder((estimate, constant.view(-1, 1, 1, 1).expand_as(wide)))[0][0]
    conv_in = model.decoder.model.decoder.conv_in
    getattr(conv_in, "conv", conv_in).bias.add_(constant)  # a constant behind it is a bias
    assert torch.allclose(added, model.decoder((estimate, None))[0][0], atol=1e-4)
    if model.can_stream:
        first, state = model.decode_chunk(z[:, :, : 1 + model.latent_step], START, ratio)
        rest, _ = model.decode_chunk(z[:, :, 1 + model.latent_step :], state, ratio)
        assert torch.allclose(torch.cat([first, rest], 2), model.decode(z, ratio).sample, atol=1e-5)


def test_wide_features_and_sums_that_a_base_has_no_place_for_are_named():
    with pytest.raises(ValueError, match="AutoencoderKLHunyuanVideo blends overlapping stretches of frames; use latent"):
        grown("HunyuanVideo", hand_over="both")
    for settings in ({"hand_over": "wide"}, {"sum_at": "features"}):
        with pytest.raises(ValueError, match="needs our own base"):
            grown("Wan 2.1", **settings)


@torch.no_grad()
def test_a_level_that_takes_no_key_frames_starts_with_little_noise():
    _, model = grown("Wan 2.2", "encoder", levels=1, settle=0.0, mixing="none", birth=False)
    logvar = model.encode(clip_for(model, 8), 8).latent_dist.logvar
    assert torch.allclose(logvar, torch.full_like(logvar, -6.0), atol=1e-4)
