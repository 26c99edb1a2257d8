"""Distillation into a small autoencoder, and training what decodes alone."""

import math
import shutil
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLLTXVideo, AutoencoderKLWan, CogVideoXDDIMScheduler, CogVideoXPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from promag.tokenizer.autoencoder import AutoencoderKLProMAG
from promag.tokenizer.base import BaseConfig, least_squares
from promag.tokenizer.checkpoint import load_tokenizer, saved_ratios
from promag.tokenizer.config import TokenizerConfig
from promag.tokenizer.distillation import CrossedAutoencoder, Distillation, load_teacher, move_teacher, take_entries
from promag.tokenizer.growth import Growth
from promag.tokenizer.layers import START
from promag.tokenizer.levels import parameter_count
from promag.tokenizer.losses import posterior_loss
from promag.tokenizer.metrics import evaluate_latents, psnr
from promag.tokenizer.objectives import DistillationObjective
from promag.tokenizer.train import train_tokenizer
from promag.training.config import UserError, build, load_yaml
from promag.training.run import load_checkpoint
from tests.conftest import TINY, make_tokenizer, run_config
from tests.existing_models import SMALL as EXISTING
from tests.existing_models import small_existing
from tests.tokenizer.test_train import data_config, make_config, records, stage
from tests.wan import MEAN, STD, make_stock

SMALL = {**TINY, "block_out_channels": (8, 8, 8)}
SMALL_16X = {**SMALL, "block_out_channels": (8, 8, 8, 8, 8), "strides": ((2, 2), (2, 1), (2, 1), (2, 1))}


def distilling(folder, teacher, ratio=4, model=SMALL, **change):
    values = {"model": BaseConfig(**model), "stages": (stage(ratio, 1 + ratio),)}
    return make_config(folder, **{**values, "distill": Distillation(teacher=str(teacher)), **change})


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory):
    """Return the run that trained a student of the teacher's 16x latents."""
    run = tmp_path_factory.mktemp("student")
    assert train_tokenizer(distilling(run, teacher, 16, SMALL_16X)) == run / "tokenizer"
    return run


def test_one_small_decoder_takes_the_place_of_every_level(teacher, student, clip):
    small, large = load_tokenizer(student / "tokenizer"), load_tokenizer(teacher)
    assert small.temporal_ratios == (16,)
    assert parameter_count([small]) < parameter_count([large]) / 4
    z = large.encode(clip, 16).latent_dist.mode()
    assert small.decode(z).sample.shape == clip.shape
    assert small.encode(clip).latent_dist.mode().shape == z.shape


def test_the_teacher_stays_as_it_was_and_out_of_every_file(teacher, student):
    before, after = make_tokenizer(settle=0.05).state_dict(), load_tokenizer(teacher).state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    names = set(load_tokenizer(student / "tokenizer").state_dict())
    groups = load_checkpoint(student / "16x" / "step-00000004")[0]
    assert {name.removeprefix("model.") for name in groups["weights"]} == names
    assert groups["buffers"] == {}


def test_the_log_compares_pixels_and_latents(student):
    lines = records(student, 16)
    assert all({"l1", "squared", "latent"} <= line.keys() and "kl" not in line for line in lines if "loss" in line)
    assert [line["latent_error"] > 0 for line in lines if "psnr" in line] == [True]


def test_validation_decodes_the_latents_of_the_teacher(teacher, student):
    small, large = load_tokenizer(student / "tokenizer"), load_tokenizer(teacher)
    objective = DistillationObjective(small, stage(16, 17), large)
    clip = torch.rand(1, 3, 17, 16, 16) * 2 - 1
    metrics = objective.evaluate([clip], "fp32")
    with torch.no_grad():
        z = large.encode(clip, 16).latent_dist.mode()
        own = small.encode(clip).latent_dist.mode()
        assert metrics["psnr"] == pytest.approx(float(psnr(small.decode(z).sample, clip)))
        assert metrics["psnr"] != pytest.approx(float(psnr(small.decode(own).sample, clip)))
    variance = z.var(dim=(0, 2, 3, 4), keepdim=True)
    assert metrics["latent_error"] == pytest.approx(float(((own - z).square() / variance).mean()), rel=1e-4)


def test_two_steps_and_two_more_equal_four(teacher, student, tmp_path):
    half = run_config(validate_every=4, stop_after=2)
    for _ in range(2):
        train_tokenizer(distilling(tmp_path, teacher, 16, SMALL_16X, run=half))
    whole, parts = (load_tokenizer(run / "tokenizer").state_dict() for run in (student, tmp_path))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


@pytest.mark.parametrize(
    ("ratios", "decodes", "moved"),
    [
        ([8], False, {"encoder.body", "encoder.head", "encoder_growth.0"}),
        ([4, 16], False, {"encoder.body", "encoder.head", "encoder_growth.0", "encoder_growth.1"}),
        ([8], True, None),
    ],
)
def test_only_what_runs_of_a_teacher_takes_memory_of_the_device(ratios, decodes, moved):
    large = move_teacher(make_tokenizer(), ratios, decodes, torch.device("meta"))
    there = {".".join(name.split(".")[:2]) for name, p in large.named_parameters() if p.is_meta}
    every = {".".join(name.split(".")[:2]) for name, _ in large.named_parameters()}
    assert there == (every if moved is None else moved)
    assert large.device == torch.device("meta")


@pytest.mark.parametrize("target", ["clips", "teacher"])
def test_one_batch_is_learned_by_heart(target, clip):
    """Four frames of what the teacher makes of one clip, latents and pixels, are learned to a small error."""
    torch.manual_seed(0)
    large, small = make_tokenizer(levels=1), AutoencoderKLProMAG(**{**SMALL, "block_out_channels": (16, 16, 16)})
    large.init_from_block_means()
    objective = DistillationObjective(small, stage(4, 5), large, target)
    optimizer = torch.optim.Adam(small.parameters(), 5e-3)
    losses = []
    for _ in range(60):
        parts = objective({"video": clip[:, :, :5]}, [torch.Generator().manual_seed(0)], 0)
        optimizer.zero_grad()
        parts["loss"].backward()
        optimizer.step()
        losses.append({key: float(value.detach()) for key, value in parts.items()})
    assert losses[-1]["l1"] < 0.5 * losses[0]["l1"]
    assert losses[-1]["latent"] < 0.2 * losses[0]["latent"]
    assert evaluate_latents(small, large, [clip[:, :, :5]], 4, "fp32") < 0.2


def test_a_student_starts_at_linear_maps_between_clips_and_latents(clip):
    large = make_tokenizer(levels=1, settle=0.05)
    started, fitted = make_tokenizer(levels=1), make_tokenizer(levels=1)
    started.init_from_block_means()
    objectives = [DistillationObjective(model, stage(4, 33), large) for model in (started, fitted)]
    objectives[1].fit_linear_paths(clip)
    before, after = (objective.evaluate([clip], "fp32") for objective in objectives)
    assert after["latent_error"] < 0.8 < 1 < before["latent_error"]
    assert after["psnr"] > before["psnr"] + 3


def test_nearly_collinear_features_get_small_weights():
    """Large weights that cancel each other let the first steps of training blow up."""
    generator = torch.Generator().manual_seed(0)
    one, noise = (torch.randn(1, 1, 4, 8, 8, generator=generator) for _ in range(2))
    weight, bias = least_squares(torch.cat([one, one + 1e-3 * noise], 1), one + 0.1 * noise + 2)
    assert weight.shape == (1, 2)
    torch.testing.assert_close(weight, torch.full((1, 2), 0.5), atol=0.05, rtol=0)  # not -99 and 100
    torch.testing.assert_close(bias, torch.tensor([2.0]), atol=0.05, rtol=0)


def test_the_encoders_gradients_are_clipped_separately():
    small, large = make_tokenizer(levels=2), make_tokenizer(levels=2)
    small.train_only(8)
    objective = DistillationObjective(small, stage(8, 9, Growth()), large, added=(8,))
    assert objective.separately_clipped() == [small.encoder_growth]


def test_the_target_decides_what_pixels_are_compared_with(clip):
    large, small = make_tokenizer(levels=1, settle=0.05), make_tokenizer(levels=1, seed=1, settle=0.05)
    batch = {"video": clip[:, :, :5]}
    errors = {}
    for target in ("clips", "teacher"):
        objective = DistillationObjective(small, stage(4, 5), large, target)
        errors[target] = float(objective(batch, [torch.Generator().manual_seed(0)], 0)["l1"].detach())
    with torch.no_grad():
        posterior = large.encode(batch["video"], 4).latent_dist
        z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(0))
        outputs = {"clips": batch["video"], "teacher": large.decode(z, 4).sample}
        for target, output in outputs.items():
            assert errors[target] == pytest.approx(float((small.decode(z).sample - output).abs().mean()))


def test_posteriors_are_compared_by_mean_and_standard_deviation(clip):
    mean = torch.randn(1, 4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    variance = mean.var(dim=(0, 2, 3, 4), keepdim=True)
    target = DiagonalGaussianDistribution(torch.cat([mean, torch.full_like(mean, 2 * math.log(0.5))], 1))
    other = DiagonalGaussianDistribution(torch.cat([mean + 2 * variance.sqrt(), torch.full_like(mean, 2 * math.log(0.7))], 1))
    assert float(posterior_loss(target, target)) == 0
    assert float(posterior_loss(other, target)) == pytest.approx(4 + float((0.04 / variance).mean()), rel=1e-4)


def test_a_student_streams(teacher, student, clip):
    small, large = load_tokenizer(student / "tokenizer"), load_tokenizer(teacher)
    with torch.no_grad():
        z = large.encode(clip, 16).latent_dist.mode()
        whole, parts, state = small.decode(z).sample, [], START
        for chunk in (z[:, :, :1], z[:, :, 1:2], z[:, :, 2:]):
            part, state = small.decode_chunk(chunk, state)
            parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 2), whole, atol=1e-4, rtol=0)


def test_a_student_is_grown_with_its_teachers_latents(teacher, tmp_path):
    stages = (stage(4, 5), stage(8, 9, Growth()))
    train_tokenizer(distilling(tmp_path, teacher, stages=stages))
    assert load_tokenizer(tmp_path / "tokenizer").temporal_ratios == (4, 8)
    assert all("latent" in line for line in records(tmp_path, 8) if "loss" in line)


def test_teachers_that_do_not_fit_are_named(teacher, tmp_path):
    student = make_tokenizer(levels=1)
    with pytest.raises(UserError, match=r"distill.teacher .*: temporal ratio 32: this tokenizer has 4x, 8x, 16x"):
        load_teacher(str(teacher), student, 32)
    other = AutoencoderKLProMAG(**{**SMALL, "latent_channels": 8})
    with pytest.raises(UserError, match="its 4x latents have latent_channels 4, the model's 8; choose `model` so"):
        load_teacher(str(teacher), other, 4)
    with pytest.raises(UserError, match=r"tokenizer .*nowhere: no config\.json there"):
        train_tokenizer(distilling(tmp_path / "a", tmp_path / "nowhere"))
    with pytest.raises(UserError, match="stage 16x without growth: the base's strides make it 4x"):
        train_tokenizer(distilling(tmp_path / "b", teacher, 16))
    with pytest.raises(ValueError, match="stage 8x: latent_pretrain_steps with distill"):
        distilling(tmp_path / "c", teacher, stages=(stage(4, 5), stage(8, 9, Growth(), 2)))


def test_another_teacher_is_refused_where_a_run_continues(teacher, tmp_path):
    copy, run = tmp_path / "teacher", tmp_path / "run"
    shutil.copytree(teacher, copy)
    half = run_config(stop_after=2)
    train_tokenizer(distilling(run, copy, run=half))
    make_tokenizer(settle=0.05, seed=1).save_pretrained(copy)
    with pytest.raises(UserError, match="was trained on other data: the teacher of 4x differs"):
        train_tokenizer(distilling(run, copy, run=half))


def test_a_crossed_autoencoder_encodes_with_one_and_decodes_with_the_other(clip):
    one, other = make_tokenizer(levels=1, settle=0.05), make_tokenizer(levels=1, seed=1, settle=0.05)
    with torch.no_grad():
        output = CrossedAutoencoder(one, other)(clip, 4).sample
        assert torch.equal(output, other.decode(one.encode(clip, 4).latent_dist.mode(), 4).sample)
        assert not torch.allclose(output, one(clip, 4).sample)


# -- what decodes alone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", ["frozen", "finetune"])
def test_training_what_decodes_leaves_every_latent_bit_equal(decoder, tmp_path, clip):
    before = make_tokenizer(levels=2, settle=0.05, decoder=decoder)
    before.save_pretrained(tmp_path / "before")
    stages = (stage(8, 9, trainable="decoder"),)
    train_tokenizer(make_config(tmp_path / "run", init=str(tmp_path / "before"), stages=stages))
    after = load_tokenizer(tmp_path / "run" / "tokenizer")
    for ratio in (4, 8):
        assert after.encoding_fingerprint(ratio) == before.encoding_fingerprint(ratio)
    posteriors = [model.encode(clip, 8).latent_dist.parameters for model in (before, after)]
    assert torch.equal(*posteriors)
    old, new = before.state_dict(), after.state_dict()
    changed = {key.split(".")[0] for key in old if not torch.equal(old[key], new[key])}
    assert changed == {"decoder_growth", "decoder" if decoder == "frozen" else "own_decoders"}


def test_training_what_decodes_needs_a_trained_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="stage 4x: trainable decoder needs init"):
        make_config(tmp_path, stages=(stage(4, 5, trainable="decoder"),))
    with pytest.raises(ValueError, match="trainable decoder with growth: a grown level needs its encoder trained too"):
        stage(8, 9, Growth(), trainable="decoder")


# -- autoencoders of diffusers ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """Return the folder of a small AutoencoderKLWan."""
    folder = tmp_path_factory.mktemp("wan")
    small_existing("Wan 2.1").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("trainable", ["decoder", "all"])
def test_an_autoencoder_of_diffusers_is_trained_further_in_its_own_format(trainable, wan, tmp_path):
    stages = (stage(4, 5, trainable=trainable),)
    folder = train_tokenizer(make_config(tmp_path, init=str(wan), model=None, stages=stages))
    before, after = (AutoencoderKLWan.from_pretrained(place) for place in (wan, folder))
    assert {**after.config, "_name_or_path": ""} == {**before.config, "_name_or_path": ""}
    old, new = before.state_dict(), after.state_dict()
    changed = {key.split(".")[0] for key in old if not torch.equal(old[key], new[key])}
    decoding = {"decoder", "post_quant_conv"}
    assert changed == (decoding if trainable == "decoder" else {*decoding, "encoder", "quant_conv"})
    assert saved_ratios(folder) == load_tokenizer(folder).temporal_ratios == (4,)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "config.json").write_text('{"_class_name": "AutoencoderKLProMAG", "growth": []}')
    with pytest.raises(UserError, match="needs strides and growth, which list a tokenizer's levels"):
        saved_ratios(tmp_path / "cut")


def test_a_level_grows_on_an_autoencoder_that_was_trained_further(wan, tmp_path):
    stages = (stage(4, 5, trainable="decoder"), stage(8, 9, Growth(width=16)))
    folder = train_tokenizer(make_config(tmp_path, init=str(wan), model=None, stages=stages))
    assert load_tokenizer(folder).temporal_ratios == (4, 8)
    assert not (tmp_path / "growth").exists()  # the autoencoder that the level was grown on is in no folder any more
    assert not torch.equal(*(load_tokenizer(place).decoder.model.decoder.conv_in.weight for place in (wan, folder)))


def test_a_student_has_what_the_pipelines_of_its_teacher_read(wan, tmp_path):
    teacher = load_tokenizer(wan)
    student = load_tokenizer(train_tokenizer(distilling(tmp_path, wan)))
    for key in ("z_dim", "latents_mean", "latents_std", "scale_factor_temporal", "scale_factor_spatial"):
        assert student.config[key] == teacher.config[key]
    assert student.config["block_out_channels"] == list(SMALL["block_out_channels"])
    z = torch.randn(1, 4, 2, 2, 2)
    assert student.decode(z, return_dict=False)[0].shape == teacher.decode(z, return_dict=False)[0].shape == (1, 3, 5, 16, 16)


def test_the_stock_pipeline_decodes_with_a_student(tmp_path):
    stock = make_stock()
    stock.vae.save_pretrained(tmp_path / "vae")
    student: Any = load_tokenizer(train_tokenizer(distilling(tmp_path / "run", tmp_path / "vae")))
    call = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 2, "guidance_scale": 1.0}

    def sample(vae, output):
        generator = torch.Generator().manual_seed(1)
        pipe = make_stock(vae=vae)
        return pipe("a red disc", generator=generator, max_sequence_length=8, output_type=output, **call).frames

    latents = sample(stock.vae, "latent")
    assert torch.equal(sample(student, "latent"), latents)
    mean, std = (torch.tensor(values).view(1, 4, 1, 1, 1) for values in (MEAN, STD))
    with torch.no_grad():
        expected = student.decode(latents * std + mean).sample.transpose(1, 2)
    torch.testing.assert_close(sample(student, "pt"), (expected / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)


def test_the_pipelines_of_cogvideox_know_the_pixels_of_a_students_latents():
    teacher, student = AutoencoderKLProMAG.from_base(small_existing("CogVideoX")), AutoencoderKLProMAG(**SMALL).eval()
    before = student.encoding_fingerprint(4)
    take_entries(student, teacher)
    assert student.encoding_fingerprint(4) == before
    parts: dict[str, Any] = {"tokenizer": None, "text_encoder": None, "transformer": None, "vae": student}
    pipe = CogVideoXPipeline(**parts, scheduler=CogVideoXDDIMScheduler())
    assert (pipe.vae_scale_factor_spatial, pipe.vae_scale_factor_temporal) == (8, 4)
    with torch.no_grad():
        assert pipe.decode_latents(torch.randn(1, 3, 4, 2, 2)).shape == (1, 3, 9, 16, 16)


def test_ltx_pipelines_read_a_students_statistics_and_give_its_decoder_no_time(tmp_path):
    torch.manual_seed(0)
    base = AutoencoderKLLTXVideo(**EXISTING["LTX"][1], timestep_conditioning=True)
    base.latents_mean.copy_(torch.linspace(-1, 1, 8))
    base.latents_std.copy_(torch.linspace(0.5, 2, 8))
    student = AutoencoderKLProMAG(**{**SMALL, "latent_channels": 8})
    with pytest.raises(AttributeError, match="latents_mean"):
        _ = student.latents_mean
    take_entries(student, AutoencoderKLProMAG.from_base(base))
    student.save_pretrained(tmp_path)
    again: Any = load_tokenizer(tmp_path)
    assert torch.equal(again.latents_mean, base.latents_mean)
    assert torch.equal(again.latents_std, base.latents_std)
    assert again.config.timestep_conditioning is False


def test_a_student_of_latents_of_another_spatial_ratio(tmp_path):
    small_existing("Wan 2.2").save_pretrained(tmp_path / "wan")  # 4x16x16
    model = {**SMALL, "strides": ((2, 2), (2, 2))}
    run = train_tokenizer(distilling(tmp_path / "run", tmp_path / "wan", model=model))
    student, teacher = load_tokenizer(run), load_tokenizer(tmp_path / "wan")
    assert student.spatial_compression_ratio == teacher.spatial_compression_ratio == 16
    z = torch.randn(1, 4, 2, 1, 2)
    assert student.decode(z).sample.shape == teacher.decode(z).sample.shape == (1, 3, 5, 16, 32)
    with pytest.raises(UserError, match="have pixels per latent position 16, the model's 8"):
        load_teacher(str(tmp_path / "wan"), make_tokenizer(levels=1), 4)
    with pytest.raises(ValueError, match="height 40: needs a multiple of 16; use 32 or 48"):
        make_config(tmp_path, model=BaseConfig(**model), data=data_config(size=40))
    with pytest.raises(ValueError, match="patch_size times spatial strides is 4: it must be one of 8, 16, 32"):
        AutoencoderKLProMAG(**{**SMALL, "strides": ((2, 1), (2, 1))})


# -- presets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "ratio", "size", "decoder"), [("distilled", 4, 11.6, 6.8), ("distilled-tiny", 16, 0.93, 0.55)]
)
def test_presets_have_the_sizes_that_they_state(name, ratio, size, decoder):
    config = build(TokenizerConfig, load_yaml(f"tokenizer/{name}"), name)
    with torch.device("meta"):
        model = AutoencoderKLProMAG(**vars(config.model))
    assert parameter_count([model]) / 1e6 == pytest.approx(size, abs=0.05)
    assert parameter_count([model.decoder]) / 1e6 == pytest.approx(decoder, abs=0.05)
    assert model.temporal_ratios == (ratio,) == tuple(stage.ratio for stage in config.stages)
