"""Growth by interpolated frames (hand_over frames): its start, its laws, its training, and what it refuses."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from promag import AutoencoderKLProMAG
from promag.tokenizer.checkpoint import load_tokenizer
from promag.tokenizer.growth import Growth, halfway
from promag.tokenizer.layers import START
from promag.tokenizer.objectives import StageObjective
from promag.tokenizer.train import train_tokenizer
from tests.conftest import make_tokenizer
from tests.existing_models import SMALL
from tests.tokenizer.test_autoencoder import check_chunks_equal_the_whole, moments
from tests.tokenizer.test_existing import clip_for, grown, settle_levels
from tests.tokenizer.test_train import RUN, make_config, short, stage

FRAMES = {"hand_over": "frames"}
KINDS = [FRAMES, {**FRAMES, "sum_at": "features"}, {**FRAMES, "decoder": "finetune"}]


def on_trained_base(levels=3, **growth):
    """Return a tokenizer whose base was moved at random, with untrained levels on it."""
    model = make_tokenizer(levels=1, settle=0.05)
    for _ in range(levels - 1):
        model.grow(Growth(**growth))
    return model


@pytest.mark.parametrize("growth", KINDS)
@torch.no_grad()
def test_birth_law_frames_are_interpolated_between_those_of_the_level_below(clip, growth):
    model = on_trained_base(levels=1)
    for ratio in (8, 16):
        model.grow(Growth(**growth))
        lower = model(clip[:, :, ::2], ratio // 2).sample
        video = model(clip, ratio).sample
        assert torch.equal(video[:, :, ::2], lower)
        assert torch.equal(video[:, :, 1::2], (lower[:, :, 1:] + lower[:, :, :-1]) / 2)
        settle_levels(model, 0.05)


@torch.no_grad()
def test_a_refused_growth_leaves_the_model_as_it_was_and_a_head_of_another_width_starts_with_little_noise(clip):
    model = on_trained_base(levels=1)
    before = list(model.state_dict())
    with pytest.raises(ValueError, match="growth heads 5: must divide"):
        model.grow(Growth(encoder="finetune", decoder="finetune", heads=5))
    assert list(model.state_dict()) == before
    assert (model.temporal_ratios, model.level_channels, model.level_widths) == ((4,), [4], [16])
    model.grow(Growth(mixing="none", width=32))
    assert model.encode(clip, 8).latent_dist.logvar.unique().tolist() == [-6.0]
    assert model.encoding_path(1) == [model.encoder, model.encoder_growth[0]]


def test_frames_stand_halfway_in_a_clip_and_in_its_chunks():
    x = torch.arange(5.0).view(1, 1, 5, 1, 1) ** 2
    assert halfway(x).flatten().tolist() == [0, 0.5, 1, 2.5, 4, 6.5, 9, 12.5, 16]
    assert torch.equal(torch.cat([halfway(x[:, :, :2]), halfway(x[:, :, 2:], x[:, :, 1:2])], 2), halfway(x))
    assert torch.equal(halfway(x[:, :, :1]), x[:, :, :1])


@pytest.mark.parametrize("growth", KINDS)
@pytest.mark.parametrize("plan", [(1, 16, 16), (17, 16), (1, 32)])
@torch.no_grad()
def test_chunks_equal_the_whole(growth, plan):
    check_chunks_equal_the_whole(make_tokenizer(settle=0.05, **growth), plan)


@torch.no_grad()
def test_frames_see_no_later_latent_and_differ_from_interpolation():
    model = make_tokenizer(settle=0.05, **FRAMES)
    z = torch.randn(1, 4, 4, 2, 2)
    later = z.clone()
    later[:, :, 3] += 1
    before, after = (model.decode(part, 16).sample for part in (z, later))
    assert torch.equal(before[:, :, :33], after[:, :, :33])
    assert not torch.equal(before[:, :, 33:], after[:, :, 33:])
    assert not torch.allclose(before, halfway(halfway(model.decode(z, 4).sample)), atol=0.01)


@torch.no_grad()
def test_the_lower_levels_decode_as_before():
    model = on_trained_base(levels=2, **FRAMES)
    settle_levels(model, 0.05)
    z = torch.randn(1, 4, 3, 2, 2)
    before = [model.decode(z, ratio).sample for ratio in (4, 8)]
    model.grow(Growth(**FRAMES))
    settle_levels(model, 0.05)
    assert torch.equal(model.decode(z, 4).sample, before[0])
    assert not torch.equal(model.decode(z, 8).sample, before[1])  # settle_levels moved 8x too


@torch.no_grad()
def test_a_level_with_latents_may_stand_on_one_with_frames():
    model = on_trained_base(levels=2, **FRAMES)
    model.grow(Growth())
    settle_levels(model, 0.05)
    z = torch.randn(1, 4, 3, 2, 2)
    assert [model.lifts(ratio) for ratio in (4, 8, 16)] == [(), (), (8,)]
    assert torch.equal(model.decode(z, 16).sample, model.decode(model.lift(z, 16, 8), 8).sample)
    with pytest.raises(ValueError, match="lift from 16x to 4x: these levels hand over no latent"):
        model.lift(z, 16, 4)


@torch.no_grad()
def test_large_pictures_are_decoded_in_tiles_and_streams():
    model = make_tokenizer(settle=0.02, **FRAMES)
    z = torch.randn(1, 4, 3, 12, 12)
    whole = model.decode(z, 16).sample
    model.enable_tiling(80, 80, 48, 48)
    tiled = model.decode(z, 16).sample
    assert tiled.shape == whole.shape
    assert (tiled - whole).abs().mean() < 0.1 * whole.std()
    state, chunks = START, []
    for part in z.split(1, 2):
        chunk, state = model.decode_chunk(part, state, 16)
        chunks.append(chunk)
    assert torch.allclose(torch.cat(chunks, 2), tiled, atol=1e-5)


def test_the_tiny_preset_decodes_16x_with_half_of_the_arithmetic():
    flops = {}
    for hand_over in ("latent", "frames"):
        model = AutoencoderKLProMAG(patch_size=4, block_out_channels=(48, 96, 96), strides=((2, 2), (2, 1)), framewise=1)
        for _ in range(2):
            model.grow(Growth(hand_over=hand_over))
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.decode(torch.zeros(1, 8, 5, 8, 8), 16)
        flops[hand_over] = counter.get_total_flops()
    assert 0.5 < flops["frames"] / flops["latent"] < 0.53


@pytest.mark.parametrize("name", [name for name in SMALL if name != "HunyuanVideo"])
@torch.no_grad()
def test_existing_autoencoders_grow_by_frames(name, tmp_path):
    base, model = grown(name, levels=0)
    for rate in (2, 4):
        model.grow(Growth(width=16, **FRAMES))
        ratio = rate * model.base_ratio
        x = clip_for(model, ratio)
        key = base.decode(base.encode(x[:, :, ::rate]).latent_dist.mode()).sample
        video = model(x, ratio).sample
        assert video.shape == x.shape
        assert torch.allclose(video[:, :, ::rate], key, atol=1e-6)
    settle_levels(model, 0.05)
    assert not torch.allclose(model(x, ratio).sample[:, :, ::rate], key, atol=0.01)
    model.save_growth(tmp_path)
    again = AutoencoderKLProMAG.load_growth(tmp_path, base)
    assert torch.equal(again(x, ratio).sample, model(x, ratio).sample)


@torch.no_grad()
def test_it_is_saved_and_its_latents_have_a_fingerprint_of_the_encoder_alone(clip, tmp_path):
    model = make_tokenizer(settle=0.05, **FRAMES)
    model.save_pretrained(tmp_path)
    loaded = AutoencoderKLProMAG.from_pretrained(tmp_path)
    assert torch.equal(loaded(clip, 16).sample, model(clip, 16).sample)
    plain = make_tokenizer(settle=0.05)
    plain.encoder.load_state_dict(model.encoder.state_dict())
    plain.encoder_growth.load_state_dict(model.encoder_growth.state_dict())
    assert torch.equal(moments(plain, clip, 16), moments(model, clip, 16))
    assert plain.encoding_fingerprint(16) == model.encoding_fingerprint(16)


def test_training_beats_interpolation_on_one_clip_and_touches_the_new_level_alone(clip):
    clip = clip[:, :, :17]
    model = on_trained_base(levels=3, **FRAMES)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = model.train_only(16)
    objective, optimizer, losses = StageObjective(model, stage(16, 17)), torch.optim.Adam(trained, 5e-3), []
    for step in range(30):
        loss = objective({"video": clip}, [torch.Generator().manual_seed(0)], step)["loss"]
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            assert all(p.grad is not None for p in trained)
        optimizer.step()
    assert losses[-1] < losses[0] / 1.3
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith(("encoder_growth.1.", "decoder_growth.1.")) for name in changed)


def test_stages_train_it_and_an_interrupted_training_continues_to_the_same_weights(tmp_path):
    together = dataclasses.replace(stage(16, 17, trainable="all"), by_turns=(16, 8, 4))
    growing = (stage(4, 5), stage(8, 9, Growth(**FRAMES)), stage(16, 17, Growth(**FRAMES)))
    stages = (*map(short, growing), short(together, steps=3))
    whole = train_tokenizer(make_config(tmp_path / "whole", stages=stages))
    interrupted = make_config(tmp_path / "resumed", stages=stages, run=dataclasses.replace(RUN, stop_after=1))
    for _ in range(6):
        resumed = train_tokenizer(interrupted)
    one, other = (load_tokenizer(folder).state_dict() for folder in (whole, resumed))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert any(one[f"decoder_growth.{i}.unfold.skip.weight"].abs().max() > 0 for i in range(2))


@pytest.mark.parametrize(
    ("change", "got"),
    [
        ({"mixing": "none"}, "mixing 'none', birth True, latent 'mixed'"),
        ({"birth": False}, "mixing 'attention', birth False, latent 'mixed'"),
        ({"latent": "dual"}, "mixing 'attention', birth True, latent 'dual'"),
    ],
)
def test_levels_whose_latent_does_not_start_as_the_key_frames_are_refused(change, got):
    with pytest.raises(ValueError, match=f"growth hand_over 'frames' with {got}: needs a mixed latent that starts as the key"):
        Growth(**FRAMES, **change)


def test_what_needs_a_latent_is_refused():
    for kind in ("wide", "both"):
        with pytest.raises(ValueError, match=f"growth hand_over '{kind}' on a level with 'frames', which needs a latent"):
            on_trained_base(levels=2, **FRAMES).grow(Growth(hand_over=kind))
    with pytest.raises(ValueError, match="latent_pretrain_steps 2 with growth hand_over 'frames'"):
        stage(8, 9, Growth(**FRAMES), 2)
