"""Tokenizer training on generated clips at the smallest size."""

import dataclasses
import json
import shutil

import pytest
import torch
from PIL import Image

from promag.data.buckets import Bucket
from promag.data.clip_index import Digests, load_clips, save_clips
from promag.data.clips import prepare
from promag.data.datasets import SyntheticDataset
from promag.data.listing import list_videos
from promag.data.shards.stream import Sharding
from promag.data.shards.writer import write_shards
from promag.data.sources import Source
from promag.tokenizer.base import BaseConfig
from promag.tokenizer.checkpoint import load_tokenizer, save_tokenizer
from promag.tokenizer.config import StageConfig, TokenizerConfig, TokenizerDataConfig
from promag.tokenizer.discriminator import Adversarial
from promag.tokenizer.distillation import Distillation
from promag.tokenizer.growth import PAPER_GROWTH, Growth
from promag.tokenizer.objectives import StageObjective
from promag.tokenizer.train import leaves_unused, train_only, train_tokenizer
from promag.training.config import UserError, build
from promag.training.optimizers import make_optimizers, weights_and_keys
from promag.training.run import load_checkpoint
from tests.conftest import SHORT, make_tokenizer, optimization_config, run_config
from tests.data.conftest import counting

LOOP = optimization_config(muon_learning_rate=0.01)
RUN = run_config(validate_every=4, save_every=50, keep_last=1)


def stage(ratio, frames, growth=None, latent_pretrain_steps=0, trainable="new", adversarial=None):
    return StageConfig(
        ratio=ratio,
        frames=frames,
        growth=growth,
        trainable=trainable,
        inherited_lr_scale=0.5,
        latent_pretrain_steps=latent_pretrain_steps,
        mse_weight=1.0,
        adversarial=adversarial,
        optimization=LOOP,
    )


def short(settings, steps=2):
    return dataclasses.replace(settings, optimization=dataclasses.replace(settings.optimization, steps=steps))


def adversarial_config(**change):
    return Adversarial(start=2, kind="hinge", width=4, layers=1, penalty_every=1, **change)


def data_config(train="synthetic", validation="synthetic", **change):
    values = {"synthetic_clips": 8, "size": 32, "temporal_strides": (1,), "validation_clips": 1, "sharding": Sharding(1, 4)}
    return TokenizerDataConfig(train=train, validation=validation, **{**values, **change})


def make_config(folder, **change):
    config = TokenizerConfig(
        output_dir=str(folder),
        precision="fp32",
        model=None if change.get("init") else BaseConfig(**SHORT),
        data=data_config(),
        stages=(stage(4, 5), stage(8, 9, Growth(), 2), stage(16, 17, Growth(decoder="finetune"))),
        run=RUN,
    )
    return dataclasses.replace(config, **change)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    shown = dataclasses.replace(RUN, trackers=("tensorboard",))
    assert train_tokenizer(make_config(run, run=shown)) == run / "tokenizer"
    return run


def records(run, stage):
    name = stage if isinstance(stage, str) else f"{stage}x"
    return [json.loads(line) for line in (run / name / "metrics.jsonl").read_text().splitlines()]


def test_stages_follow_each_other_into_one_checkpoint(trained):
    model = load_tokenizer(trained / "tokenizer")
    assert model.temporal_ratios == (4, 8, 16)
    for ratio in (4, 8, 16):
        steps = [r for r in records(trained, ratio) if "loss" in r]
        assert [r["step"] for r in steps] == [1, 2, 3, 4]
        assert [r["psnr"] for r in records(trained, ratio) if "psnr" in r]
    assert ["latent" in r for r in records(trained, 8) if "loss" in r] == [True, True, False, False]


def test_interrupted_and_continued_is_bit_for_bit_the_same(trained, tmp_path):
    half = dataclasses.replace(RUN, stop_after=2)
    for _ in range(6):
        folder = train_tokenizer(make_config(tmp_path, run=half))
    assert folder == tmp_path / "tokenizer"
    a, b = (load_tokenizer(run / "tokenizer").state_dict() for run in (trained, tmp_path))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_one_stage_alone_leaves_the_lower_levels_bit_equal(trained, tmp_path):
    before = load_tokenizer(trained / "tokenizer")
    growing = make_config(tmp_path, init=str(trained / "tokenizer"), only_stage=32, stages=(stage(32, 33, Growth()),))
    train_tokenizer(growing)
    after = load_tokenizer(tmp_path / "tokenizer")
    assert after.temporal_ratios == (4, 8, 16, 32)
    new = after.state_dict()
    assert all(torch.equal(value, new[key]) for key, value in before.state_dict().items())


def test_the_highest_level_is_trained_further(trained, tmp_path):
    before = load_tokenizer(trained / "tokenizer").state_dict()
    init = str(trained / "tokenizer")
    train_tokenizer(make_config(tmp_path / "a", init=init, stages=(stage(16, 17),)))
    after = load_tokenizer(tmp_path / "a" / "tokenizer").state_dict()
    changed = {key.split(".")[0] + "." + key.split(".")[1] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"encoder_growth.1", "decoder_growth.1", "own_decoders.2"}
    with pytest.raises(UserError, match=r"stage 8x without growth: only the highest level of .* \(4x, 8x, 16x\) can"):
        train_tokenizer(make_config(tmp_path / "b", init=init, stages=(stage(8, 9),)))


def test_a_finished_run_is_not_trained_again(trained, capsys):
    weights = (trained / "tokenizer" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    train_tokenizer(make_config(trained))
    assert "4x: already trained" in capsys.readouterr().out
    assert (trained / "tokenizer" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns == weights


def test_tensorboard_holds_curves_and_pictures(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tags = EventAccumulator(str(next((trained / "tensorboard").rglob("events*")).parent)).Reload().Tags()
    assert {"4x/loss", "8x/latent", "16x/psnr"} <= set(tags["scalars"])
    assert "16x/reconstruction" in tags["images"]


def test_mistakes_are_named(trained, tmp_path):
    with pytest.raises(UserError, match="was started with other settings"):
        train_tokenizer(make_config(trained, seed=1))
    train_tokenizer(make_config(tmp_path / "a", stages=(stage(4, 5),)))
    too_high = make_config(tmp_path / "b", init=str(tmp_path / "a" / "tokenizer"), stages=(stage(64, 65, Growth()),))
    with pytest.raises(UserError, match=r"stage 64x: the tokenizer in .* has 4x; one stage grows it to one of 8x, 16x, 32x"):
        train_tokenizer(too_high)
    with pytest.raises(UserError, match=r"no config\.json there"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(UserError, match="stage 8x without growth: the base's strides make it 4x"):
        train_tokenizer(make_config(tmp_path / "c", stages=(stage(8, 9),)))
    with pytest.raises(ValueError, match=r"stages \[4, 12\]: each ratio must be 2, 4 or 8 times"):
        make_config(tmp_path, stages=(stage(4, 5), stage(12, 13, Growth())))
    with pytest.raises(ValueError, match="6 frames: 4x needs"):
        make_config(tmp_path, stages=(stage(4, 6),))
    with pytest.raises(ValueError, match="only_stage 64: the stages are 4x, 8x, 16x"):
        make_config(tmp_path, only_stage=64)


def test_one_stage_grows_two_levels_and_may_train_every_weight(trained, tmp_path):
    first = make_config(tmp_path / "base", stages=(stage(4, 5),))
    train_tokenizer(first)
    base = load_tokenizer(tmp_path / "base" / "tokenizer").state_dict()
    for trains in ("new", "all"):
        warm = stage(16, 17, Growth(mixing="none"), trainable=trains)
        train_tokenizer(make_config(tmp_path / trains, init=str(tmp_path / "base" / "tokenizer"), stages=(warm,)))
        model = load_tokenizer(tmp_path / trains / "tokenizer")
        assert model.temporal_ratios == (4, 8, 16)
        new = model.state_dict()
        kept = all(torch.equal(value, new[key]) for key, value in base.items())
        assert kept == (trains == "new")
        fresh = load_tokenizer(tmp_path / "base" / "tokenizer")
        for _ in range(2):
            fresh.grow(Growth(mixing="none"))
        assert any(not torch.equal(v, new[k]) for k, v in fresh.state_dict().items() if k.startswith("decoder_growth.0"))


@pytest.mark.parametrize("trainable", ["new", "all"])
@pytest.mark.parametrize("ratio", [8, 16])
@pytest.mark.parametrize(
    "growth",
    [
        {},
        {"mixing": "none"},
        {"birth": False},
        {"latent": "dual"},
        {"decoder": "finetune"},
        {"sum_at": "features"},
        {"hand_over": "both"},
    ],
)
def test_weights_that_may_have_no_gradient_are_declared(trainable, ratio, growth):
    """Several processes wait for the gradient of every trained weight unless some are declared to have none."""
    model, frames = make_tokenizer(levels=1, settle=0.05), 1 + ratio
    added = [model.grow(Growth(**growth)) for _ in range(ratio // 8)]
    trained = model.train_only(*(added if trainable == "new" else model.temporal_ratios))
    settings = stage(ratio, frames, Growth(**growth), latent_pretrain_steps=1, trainable=trainable)
    objective = StageObjective(model, settings, added)
    assert objective.below == 4  # a trained level
    unused = set()
    for step in (0, 1):
        model.zero_grad()
        objective({"video": torch.rand(1, 3, frames, 16, 16)}, [torch.Generator().manual_seed(0)], step)["loss"].backward()
        unused |= {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert trained
    if unused:
        assert leaves_unused(settings), unused
    elif growth in ({}, {"latent": "dual"}) and trainable == "new":
        assert not leaves_unused(settings)


@pytest.mark.parametrize("trainable", ["new", "decoder"])
def test_first_convolutions_that_wide_levels_skip_are_declared(trainable):
    model, wide = make_tokenizer(levels=1, settle=0.05), Growth(hand_over="wide")
    added = [model.grow(wide) for _ in range(2)]
    settings = stage(16, 17, wide if trainable == "new" else None, trainable=trainable)
    train_only(model, settings, added)
    objective = StageObjective(model, settings, added)
    objective({"video": torch.rand(1, 3, 17, 16, 16)}, [torch.Generator().manual_seed(0)], 0)["loss"].backward()
    unused = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None and name.endswith("weight")}
    assert unused == {"decoder_growth.0.conv_in.weight", *(() if trainable == "new" else ("decoder.body.0.weight",))}
    assert leaves_unused(settings)


@pytest.mark.parametrize("levels", [1, 3])
def test_a_stage_alone_grows_on_the_level_of_the_stage_before_it(tmp_path, levels):
    save_tokenizer(make_tokenizer(levels=levels), tmp_path / "tokenizer")
    has = "4x" if levels == 1 else "4x, 8x, 16x"
    stages = make_config(tmp_path).stages if levels == 1 else (stage(8, 9), stage(32, 33, Growth()))
    needs = rf"stage \d+x: the tokenizer in .* has {has}; its highest must be 8x, as stage 8x leaves it; run that stage first"
    with pytest.raises(UserError, match=needs):
        train_tokenizer(make_config(tmp_path, stages=stages, only_stage=stages[-1].ratio))


def test_settings_of_a_stage_that_cannot_be_are_named(tmp_path):
    for name in ("validation_clips", "synthetic_clips"):
        with pytest.raises(ValueError, match=f"{name} 0: at least 1 is needed"):
            data_config(**{name: 0})
    copied, frozen = stage(8, 9, Growth(encoder="finetune")), stage(16, 17, Growth(), 2)
    for stages in ((copied, frozen), (dataclasses.replace(copied, latent_pretrain_steps=2),)):
        with pytest.raises(ValueError, match=r"latent_cache with .* \d+x: the encoders that stage 8x trains .* need pixels"):
            make_config(tmp_path, init="wan", model=None, data=data_config(latent_cache="latents"), stages=stages)
    save_tokenizer(make_tokenizer(levels=1), tmp_path / "tokenizer")
    with pytest.raises(UserError, match="stage 8x: growth heads 5: must divide the level's width of 16"):
        train_tokenizer(make_config(tmp_path, stages=(stage(4, 5), stage(8, 9, Growth(heads=5))), only_stage=8))
    distilled = dataclasses.replace(stage(4, 5), consistency_weight=0.1)
    with pytest.raises(ValueError, match="consistency_weight with distill"):
        make_config(tmp_path, stages=(distilled,), distill=Distillation(teacher="teacher"))
    with pytest.raises(ValueError, match="latent_pretrain_steps 2 with growth hand_over 'wide'"):
        stage(8, 9, PAPER_GROWTH, 2)
    with pytest.raises(ValueError, match="change_weight -1: 0 or more is needed"):
        dataclasses.replace(stage(8, 9), change_weight=-1)
    values = {"ratio": 8, "frames": 9}
    assert build(StageConfig, {**values, "growth": "paper"}, "x").growth == PAPER_GROWTH
    with pytest.raises(UserError, match="growth 'plain': paper is the one that has a name"):
        build(StageConfig, {**values, "growth": "plain"}, "x")


def test_each_weight_of_a_stage_adds_its_part_to_the_loss():
    torch.manual_seed(0)
    model, batch = make_tokenizer(settle=0.05), {"video": torch.rand(1, 3, 17, 16, 16) * 2 - 1}

    def losses(**change):
        objective = StageObjective(model, dataclasses.replace(stage(16, 17), **change))
        return {name: v.item() for name, v in objective(batch, [torch.Generator().manual_seed(0)], 0).items()}

    plain = losses()
    assert plain.keys() == {"loss", "l1", "squared", "kl"}
    changed = losses(change_weight=0.5)
    assert changed["loss"] == pytest.approx(plain["loss"] + 0.5 * changed["change"])
    kept = losses(consistency_weight=0.1)
    assert kept["loss"] == pytest.approx(plain["loss"] + 0.1 * kept["consistency"])
    assert kept["consistency"] > 0
    between = losses(between_weight=3.0)
    assert between["l1"] != pytest.approx(plain["l1"])
    assert losses(between_weight=1.0) == plain


def test_a_discriminator_switched_on_late_resumes_bit_for_bit(tmp_path):
    adversarial = adversarial_config(learning_rate=2e-3, lecam_weight=0.1, penalty_weight=1.0)
    stages = (stage(4, 5, adversarial=adversarial),)
    train_tokenizer(make_config(tmp_path / "whole", stages=stages))
    half = dataclasses.replace(RUN, stop_after=3)  # the averages of LeCam are resumed
    for _ in range(2):
        train_tokenizer(make_config(tmp_path / "parts", stages=stages, run=half))
    steps = [r for r in records(tmp_path / "whole", 4) if "loss" in r]
    assert ["generator" in r for r in steps] == [False, False, True, True]
    ends = [load_checkpoint(tmp_path / run / "4x" / "step-00000004")[0] for run in ("whole", "parts")]
    for group in ("weights", "buffers", "optimizer"):
        assert ends[0][group].keys() == ends[1][group].keys()
        assert all(torch.equal(value, ends[1][group][key]) for key, value in ends[0][group].items())
    assert any("discriminator" in key for key in ends[0]["weights"])
    assert ends[0]["buffers"]["adversary.averages"].abs().max() > 0


def test_inherited_weights_have_their_own_learning_rate():
    model = make_tokenizer(levels=2)
    model.grow(Growth(encoder="finetune"))
    model.train_only(16)
    objective = StageObjective(model, stage(16, 17, Growth()), [16])
    adam, muon = make_optimizers(objective, optimization_config(learning_rate=1e-3, muon_learning_rate=4e-3))
    for optimizer, factor in ((adam, 1.0), (muon, 4.0)):
        factors = {id(w): None for w, _ in weights_and_keys(optimizer)}
        for (weight, view), group in ((pair, g) for pair in weights_and_keys(optimizer) for g in optimizer.param_groups):
            if any(view is p for p in group["params"]):
                factors[id(weight)] = group["factor"]
        copied = {id(p) for p in model.own_encoders.parameters()}
        assert {f for i, f in factors.items() if i in copied} == {factor / 2}
        assert {f for i, f in factors.items() if i not in copied} == {factor}
    names = {id(p): n for n, p in model.named_parameters()}
    trained = {names[id(w)].split(".")[0] for optimizer in (adam, muon) for w, _ in weights_and_keys(optimizer)}
    assert trained == {"encoder_growth", "decoder_growth", "own_encoders"}


def test_the_discriminator_has_its_own_learning_rate():
    adversarial = adversarial_config(learning_rate=4e-3, lecam_weight=0, penalty_weight=0)
    objective = StageObjective(make_tokenizer(levels=1), stage(4, 5, adversarial=adversarial))
    (adam,) = make_optimizers(objective, optimization_config(learning_rate=1e-3))
    factors = {id(p): group["factor"] for group in adam.param_groups for p in group["params"]}
    assert objective.adversary is not None
    assert {factors[id(p)] for p in objective.adversary.parameters()} == {4.0}
    assert {factors[id(p)] for p in objective.model.parameters()} == {1.0}


# -- shards and buckets ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Twelve videos of 12 frames and eight images in shards."""
    folder = tmp_path_factory.mktemp("clips")
    for k in range(12):
        counting(folder / f"v{k}.mp4", 12)
    for k in range(8):
        Image.new("RGB", (40, 40), (20 * k, 90, 90)).save(folder / f"i{k}.png")
    save_clips(folder / "clips.jsonl", prepare(list_videos(folder, images=True), progress=False).clips)
    write_shards(folder / "clips.jsonl", folder / "shards", 6, progress=False)
    return folder / "shards"


@pytest.fixture(scope="module")
def bucketed(shards):
    """Two stages that train on videos, and on images in larger batches."""

    def config(folder, **change):
        four = dataclasses.replace(stage(4, 5), buckets=(Bucket(5, 32, 48), Bucket(1, 32, 32, 2)))
        eight = dataclasses.replace(stage(8, 9, Growth(), 2), buckets=(Bucket(9, 32, 32), Bucket(1, 32, 32, 2)))
        data = data_config(f"{shards}/*.tar", f"{shards}/*.tar", sharding=Sharding(2, 4))
        return make_config(folder, data=data, stages=(four, eight), run=run_config(validate_every=4, save_every=50), **change)

    return config


def test_training_on_bucketed_shards_continues_bit_for_bit(bucketed, tmp_path, capsys):
    train_tokenizer(bucketed(tmp_path / "whole"))
    output = capsys.readouterr().out
    assert "5x32x48     12      1  75.0%" in output
    assert output.count("16 steps an epoch\n") == 2
    lines = records(tmp_path / "whole", 4) + records(tmp_path / "whole", 8)
    assert len([r for r in lines if "loss" in r]) == 8
    half = dataclasses.replace(bucketed(tmp_path / "half").run, stop_after=2, workers=2)
    for _ in range(4):
        folder = train_tokenizer(dataclasses.replace(bucketed(tmp_path / "half"), run=half))
    assert folder == tmp_path / "half" / "tokenizer"
    a, b = (load_tokenizer(tmp_path / run / "tokenizer").state_dict() for run in ("whole", "half"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_resumed_run_may_switch_in_memory_on_or_off(shards, tmp_path):
    index = str(shards.parent / "clips.jsonl")

    def half(name, in_memory):
        data = data_config(index, index, temporal_strides=(1, 2), in_memory=in_memory)
        run = dataclasses.replace(RUN, stop_after=2, workers=1)
        return train_tokenizer(make_config(tmp_path / name, data=data, stages=(stage(4, 5),), run=run))

    for run, first, second in (("files", False, False), ("into", False, True), ("out", True, False)):
        assert half(run, first) is None
        assert half(run, second) == tmp_path / run / "tokenizer"
    files, *others = (load_tokenizer(tmp_path / run / "tokenizer").state_dict() for run in ("files", "into", "out"))
    for other in others:
        assert all(torch.equal(files[key], other[key]) for key in files)
    data = data_config(f"{shards}/*.tar", index, in_memory=True)
    with pytest.raises(UserError, match="in_memory true with shards"):
        train_tokenizer(make_config(tmp_path / "shards", data=data, stages=(stage(4, 5),)))


@pytest.mark.parametrize("kind", ["index", "extra", "shards", "synthetic"])
def test_a_run_resumes_only_with_its_own_clips(shards, tmp_path, monkeypatch, kind):
    folder = tmp_path / "clips"
    folder.mkdir()
    rows = [clip for clip in load_clips(shards.parent / "clips.jsonl") if clip.frames > 1]
    index, half = folder / "clips.jsonl", dataclasses.replace(RUN, stop_after=2)

    def write(clips):
        save_clips(index, clips)
        if kind == "shards":
            shutil.rmtree(folder / "shards", ignore_errors=True)
            write_shards(index, folder / "shards", 6, progress=False)

    def go_on():
        extra = (Source(train=str(index), share=0.5, temporal_strides=(1,)),) if kind == "extra" else None
        train = {"index": str(index), "shards": f"{folder}/shards/*.tar"}.get(kind, "synthetic")
        data = data_config(train, extra_sources=extra)
        return train_tokenizer(make_config(tmp_path / "run", data=data, stages=(stage(4, 5),), run=half))

    write(rows)
    assert go_on() is None
    if kind == "synthetic":
        monkeypatch.setattr(SyntheticDataset, "digests", lambda self, count: Digests("", "another generator's"))
    else:
        write([*rows[1:], dataclasses.replace(rows[0], frames=rows[0].frames - 1)])
    name = "extra_sources 0" if kind == "extra" else "train"
    with pytest.raises(UserError, match=rf"run .* was trained on other data: videos {name} differs; give it the data"):
        go_on()
    monkeypatch.undo()
    if kind in ("index", "extra"):  # videos may move, and captions be corrected, which no tokenizer reads
        moved = [dataclasses.replace(clip, path=shutil.copy(clip.path, folder), caption="corrected") for clip in rows]
        write(moved)
    else:
        write(rows)
    assert go_on() == tmp_path / "run" / "tokenizer"
    shutil.rmtree(folder)
    assert go_on() == tmp_path / "run" / "tokenizer"  # a finished run no longer needs its clips


def test_buckets_must_fit_their_level(bucketed, tmp_path):
    good = bucketed(tmp_path)
    for bucket, message in ((Bucket(6, 32, 32), "6 frames"), (Bucket(5, 32, 36), "width 36")):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(good, stages=(dataclasses.replace(good.stages[0], buckets=(bucket,)),))
