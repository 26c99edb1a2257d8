"""The tiny decoder: shapes, streaming, its start, training on a frozen tokenizer, and what it refuses."""

import copy
import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from promag import TinyDecoder
from promag.data.buckets import Bucket
from promag.tokenizer.checkpoint import load_tokenizer
from promag.tokenizer.clips import first_clips, open_training_clips
from promag.tokenizer.config import ClipsConfig
from promag.tokenizer.layers import START
from promag.tokenizer.levels import parameter_count
from promag.tokenizer.tiny_training import TinyDecoderConfig, TinyDecoderObjective, tiny_decoder_for, train_tiny_decoder
from promag.training.config import UserError
from promag.training.loop import seeded
from promag.training.run import load_checkpoint
from tests.conftest import make_tokenizer, optimization_config, run_config

RATIOS = (4, 8, 16)


def settled(**settings) -> TinyDecoder:
    """Return a decoder of a four-channel tokenizer's latents in which no weight has its initial zeros."""
    torch.manual_seed(0)
    model = TinyDecoder(latent_channels=(4, 4, 4), width=8, layers=1, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.fixture(scope="module")
def decoder():
    return settled()


def config(folder, teacher, **change):
    values = {
        "output_dir": str(folder),
        "tokenizer": str(teacher),
        "precision": "fp32",
        "width": 8,
        "layers": 1,
        "frames": 17,
        "data": ClipsConfig(
            train="synthetic", validation="synthetic", synthetic_clips=8, size=32, temporal_strides=(1,), validation_clips=2
        ),
        "optimization": optimization_config(muon_learning_rate=0.01),
        "run": run_config(),
    }
    return TinyDecoderConfig(**{**values, **change})


@pytest.fixture(scope="module")
def trained(teacher, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    assert train_tiny_decoder(config(run, teacher)) == run / "tiny_decoder"
    return run


@given(level=st.integers(0, 2), latent_frames=st.integers(1, 4), height=st.integers(1, 3), width=st.integers(1, 3))
def test_latents_of_every_ratio_become_their_frames(level, latent_frames, height, width):
    z = torch.randn(2, 4, latent_frames, height, width)
    with torch.no_grad():
        video = settled().decode(z, RATIOS[level]).sample
    assert video.shape == (2, 3, 1 + RATIOS[level] * (latent_frames - 1), 8 * height, 8 * width)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("parts", [(1, 1, 1, 1, 1), (3, 2), (1, 4)])
def test_chunks_equal_the_whole(decoder, ratio, parts):
    z = torch.randn(1, 4, 5, 2, 3, generator=torch.Generator().manual_seed(1))
    state, chunks = START, []
    with torch.no_grad():
        for part in z.split(list(parts), 2):
            chunk, state = decoder.decode_chunk(part, state, ratio)
            chunks.append(chunk)
        assert torch.allclose(torch.cat(chunks, 2), decoder.decode(z, ratio).sample, atol=1e-5)


@torch.no_grad()
def test_tiles_and_slices_are_a_switch_and_streams_keep_to_them(decoder):
    """The decoder sees about as far as its tiles overlap, so the tiles differ little from the whole."""
    model, shapes = copy.deepcopy(decoder), set()
    z = torch.randn(2, 4, 3, 14, 16, generator=torch.Generator().manual_seed(1))
    whole = model.decode(z, 4).sample
    model.entries[0].register_forward_pre_hook(lambda _, given: shapes.add((len(given[0]), *given[0].shape[3:])))
    model.enable_slicing()
    assert torch.allclose(model.decode(z, 4).sample, whole, atol=1e-5)
    model.enable_tiling(96, 104, 32, 40)
    tiled = model.decode(z, 4).sample
    assert shapes == {(1, 14, 16), (1, 12, 13)}
    assert 0 < (tiled - whole).abs().mean() < 0.1 * whole.std()
    state, chunks = START, []
    for part in z.split([1, 2], 2):
        chunk, state = model.decode_chunk(part, state, 4)
        chunks.append(chunk)
    assert torch.allclose(torch.cat(chunks, 2), tiled, atol=1e-5)
    model.disable_tiling()
    with pytest.raises(ValueError, match="without tiles, sliced: the state is that of 2 x 14x16 in tiles of 96x104"):
        model.decode_chunk(z, state, 4)
    model.disable_slicing()
    assert torch.equal(model.decode(z, 4).sample, whole)
    with pytest.raises(ValueError, match="height 20: needs a multiple of 8"):
        model.enable_tiling(20)


def test_a_state_of_another_ratio_is_refused(decoder):
    z = torch.zeros(1, 4, 2, 2, 2)
    _, state = decoder.decode_chunk(z, START, 16)
    with pytest.raises(ValueError, match=r"^decode_chunk at 8x of a tiny decoder: the state is that of decode_chunk at 16x of"):
        decoder.decode_chunk(z, state, 8)


def test_frames_see_no_later_latent(decoder):
    z = torch.randn(1, 4, 4, 2, 2)
    later = z.clone()
    later[:, :, 3] += 1
    with torch.no_grad():
        before, after = (decoder.decode(part, 16).sample for part in (z, later))
    assert torch.equal(before[:, :, :33], after[:, :, :33])
    assert not torch.equal(before[:, :, 33:], after[:, :, 33:])


def test_lower_ratios_do_without_the_layers_of_higher_ones(decoder):
    higher = [decoder.entries[2], decoder.doubling[1]]
    used = {id(p) for layer in decoder._path(1) for p in layer.parameters()}
    assert not used & {id(p) for module in higher for p in module.parameters()}


def test_none_is_the_highest_ratio(decoder):
    z = torch.randn(1, 4, 2, 2, 2)
    with torch.no_grad():
        assert torch.equal(decoder.decode(z, return_dict=False)[0], decoder.decode(z, 16).sample)
        assert torch.equal(decoder(z), decoder.decode(z, 16).sample)


def test_weights_may_be_kept_in_a_narrower_type_between_calls(decoder):
    """As diffusers' hooks do it, which act when a layer is called: those that move weights to a GPU for each call, too."""
    z = torch.randn(1, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    narrow, rounded = copy.deepcopy(decoder), copy.deepcopy(decoder)
    for module in rounded.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.bfloat16().float()
    narrow.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert narrow.unfold.conv.weight.dtype == torch.bfloat16
    torch.testing.assert_close(narrow(z), rounded(z))


@pytest.mark.parametrize("ratios", [(2,), (4, 8), (8, 16)])
def test_bases_of_other_ratios_have_their_frames(ratios):
    model = TinyDecoder(ratios, (4,) * len(ratios), spatial_ratio=16, width=8, layers=1)
    with torch.no_grad():
        assert model.decode(torch.randn(1, 4, 3, 1, 2), ratios[-1]).sample.shape == (1, 3, 1 + 2 * ratios[-1], 16, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temporal_ratios": (4, 16)}, r"temporal_ratios \[4, 16\]: powers of two from 2 are needed, each twice"),
        ({"temporal_ratios": (3, 6, 12)}, r"temporal_ratios \[3, 6, 12\]: powers of two"),
        ({"temporal_ratios": ()}, r"temporal_ratios \[\]: powers of two"),
        ({"latent_channels": (4, 4)}, r"latent_channels \[4, 4\]: a number for each of the ratios \[4, 8, 16\]"),
        ({"width": 0}, r"spatial_ratio, out_channels, width or layers 0: at least 1"),
    ],
)
def test_illegal_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TinyDecoder(**change)


def test_latents_and_ratios_that_it_does_not_know_are_refused(decoder):
    with pytest.raises(ValueError, match="32"):
        decoder.decode(torch.zeros(1, 4, 1, 1, 1), 32)
    with pytest.raises(ValueError, match="4"):
        decoder.decode(torch.zeros(1, 5, 1, 1, 1), 16)


def test_it_starts_as_the_best_linear_map():
    """On a clip whose pixels are the same everywhere in a block of a 4x latent, nothing is lost."""
    torch.manual_seed(0)
    model = TinyDecoder((4,), (4,), width=8)
    z = torch.randn(1, 4, 5, 2, 2)
    colours = torch.einsum("oc,bcthw->bothw", torch.randn(3, 4), z)
    x = colours.repeat_interleave(4, 2)[:, :, 3:].repeat_interleave(8, 3).repeat_interleave(8, 4)
    model.fit_linear_path([z], x)
    with torch.no_grad():
        error = (model.decode(z).sample - x).square().mean() / x.var()
    assert error < 0.01


def test_the_start_is_better_than_chance_and_than_the_mean_colour(tokenizer, clip, tmp_path):
    clip = clip[:, :, :17]
    objective = TinyDecoderObjective(tiny_decoder_for(tokenizer, 8, 1), tokenizer, config(tmp_path, "none"))
    before = objective({"video": clip}, [seeded(0)], 0)
    objective.fit_linear_path(clip)
    after = objective({"video": clip}, [seeded(0)], 0)
    mean = clip.mean((0, 2, 3, 4), keepdim=True)
    assert after["squared"] < before["squared"]
    assert after["squared"] < (clip - mean).square().mean()


def test_one_clip_is_learned_by_heart(tokenizer, clip, tmp_path):
    clip = clip[:, :, :17]
    torch.manual_seed(0)
    objective = TinyDecoderObjective(tiny_decoder_for(tokenizer, 16, 1), tokenizer, config(tmp_path, "none"))
    objective.fit_linear_path(clip)
    optimizer = torch.optim.Adam(objective.model.parameters(), 5e-3)
    losses = []
    for _ in range(30):
        loss = objective({"video": clip}, [seeded(0)], 0)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 1.5


def test_training_leaves_the_tokenizer_alone_and_out_of_every_file(teacher, trained):
    before, after = make_tokenizer(settle=0.05).state_dict(), load_tokenizer(teacher).state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    model = TinyDecoder.from_pretrained(trained / "tiny_decoder")
    groups = load_checkpoint(trained / "tiny" / "step-00000004")[0]
    assert {name.removeprefix("model.") for name in groups["weights"]} == set(model.state_dict())
    assert parameter_count([model]) < parameter_count([load_tokenizer(teacher).decoder])


def test_the_log_has_the_losses_and_the_psnr_of_every_ratio(trained):
    lines = [json.loads(line) for line in (trained / "tiny" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    scored = [line for line in lines if "psnr_16x" in line]
    assert [line["step"] for line in scored] == [2, 4]
    assert all(line[f"psnr_{ratio}x"] > 5 for line in scored for ratio in RATIOS)


def test_an_interrupted_training_continues_to_the_same_weights(teacher, trained, tmp_path):
    settings = config(tmp_path, teacher, run=run_config(stop_after=2))
    assert train_tiny_decoder(settings) is None
    assert train_tiny_decoder(settings) == tmp_path / "tiny_decoder"
    whole, resumed = (TinyDecoder.from_pretrained(run / "tiny_decoder").state_dict() for run in (trained, tmp_path))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_training_goes_on_from_another_run(teacher, trained, tmp_path):
    """A learning rate of nearly zero leaves that run's decoder as it is."""
    slowly = optimization_config(learning_rate=1e-12, muon_learning_rate=1e-12)
    run = train_tiny_decoder(config(tmp_path, teacher, init=str(trained / "tiny_decoder"), optimization=slowly))
    before, after = (TinyDecoder.from_pretrained(folder).state_dict() for folder in (trained / "tiny_decoder", run))
    assert all(torch.allclose(value, after[name], atol=1e-9) for name, value in before.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 16}, "width 16: the decoder in .* has 8; state that"),
        ({"layers": 2}, "layers 2: the decoder in .* has 1; state that"),
        ({"init": "missing"}, "tiny decoder missing: no config.json there"),
    ],
)
def test_starts_that_do_not_fit_are_refused(teacher, trained, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        train_tiny_decoder(config(tmp_path, teacher, **{"init": str(trained / "tiny_decoder"), **change}))


def test_a_start_of_other_latents_is_refused(teacher, tmp_path):
    TinyDecoder(width=8, layers=1).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"init .*other: tiny decoder: its latent channels are \(16, 16, 16\), the tokenizer's"):
        train_tiny_decoder(config(tmp_path / "run", teacher, init=str(tmp_path / "other")))


def test_a_run_does_not_go_on_with_another_tokenizer(teacher, trained, tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(trained, run)
    shutil.copytree(teacher, other)
    model = make_tokenizer(settle=0.05, seed=1)
    model.save_pretrained(teacher.parent / "changed")
    with pytest.raises(UserError, match="tokenizer"):
        train_tiny_decoder(config(run, teacher.parent / "changed"))


def test_the_target_can_be_what_the_tokenizer_decodes(tokenizer, clip, tmp_path):
    clip = clip[:, :, :17]
    model = tiny_decoder_for(tokenizer, 8, 1)
    losses = [
        TinyDecoderObjective(model, tokenizer, config(tmp_path, "none", target=target))({"video": clip}, [seeded(0)], 0)["l1"]
        for target in ("clips", "tokenizer")
    ]
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": 18}, "18"),
        ({"data": ClipsConfig(train="synthetic", validation="synthetic", size=20, temporal_strides=(1,))}, "20"),
    ],
)
def test_clips_that_the_tokenizer_does_not_take_are_refused(teacher, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        train_tiny_decoder(config(tmp_path, teacher, **change))


def test_it_fits_the_tokenizer_that_it_was_made_for_and_no_other(tokenizer):
    tiny_decoder_for(tokenizer).check_latents_of(tokenizer)
    with pytest.raises(ValueError, match=r"its temporal ratios are \(4, 8\), the tokenizer's \(4, 8, 16\); they must be equal"):
        TinyDecoder((4, 8), (4, 4)).check_latents_of(tokenizer)
    with pytest.raises(ValueError, match=r"latent channels are \(16, 16, 16\), the tokenizer's \(4, 4, 4\)"):
        TinyDecoder().check_latents_of(tokenizer)


def test_the_linear_start_does_not_depend_on_processes_and_accumulation(teacher, tmp_path):
    settings = config(tmp_path, teacher)
    bucket = Bucket(17, 32, 32)
    clips = []
    for processes, batch_size, accumulate in ((1, 4, 1), (2, 2, 1), (1, 2, 2), (2, 1, 2)):
        options = optimization_config(batch_size=batch_size, accumulate=accumulate)
        source, _ = open_training_clips(settings.data, [bucket], options, processes, (1,))
        clips.append(first_clips(source, 0, options, processes))
    assert all(torch.equal(clips[0], other) for other in clips)
    assert len(clips[0]) == 4
