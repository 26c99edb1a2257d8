"""A stage that trains all levels of one tokenizer by turns: alone, and as the last one of the run that grew them."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from promag.tokenizer.autoencoder import AutoencoderKLProMAG
from promag.tokenizer.checkpoint import load_tokenizer, save_model
from promag.tokenizer.distillation import Distillation
from promag.tokenizer.growth import Growth
from promag.tokenizer.objectives import StageObjective
from promag.tokenizer.train import _may_change, leaves_unused, train_only, train_tokenizer
from promag.training.config import UserError, save_yaml
from promag.training.run import recorded_data
from tests.conftest import make_tokenizer
from tests.existing_models import small_existing
from tests.tokenizer.test_killed import equal, snapshots, weights  # noqa: F401
from tests.tokenizer.test_train import RUN, make_config, records, short, stage, trained  # noqa: F401

TURNS = dataclasses.replace(stage(8, 9, trainable="all"), by_turns=(8, 4, 8))


GROWING = (short(stage(4, 5)), short(stage(8, 9, Growth())))


def with_turns(folder, last=TURNS, stop_after=None, stages=GROWING, **change):
    run = dataclasses.replace(RUN, stop_after=stop_after)
    return make_config(folder, stages=(*stages, short(last)), run=run, **change)


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    run = tmp_path_factory.mktemp("grown")
    train_tokenizer(dataclasses.replace(with_turns(run), stages=GROWING))
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = tmp_path_factory.mktemp("whole")
    assert train_tokenizer(with_turns(run)) == run / "tokenizer"
    return run


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Return a run that was stopped within each of its stages, the last time within that by turns."""
    run = tmp_path_factory.mktemp("begun")
    for _ in range(3):
        assert train_tokenizer(with_turns(run, stop_after=1)) is None
    return run


@pytest.mark.parametrize("trainable", ["all", "decoder"])
def test_one_run_equals_a_run_that_grows_and_one_that_trains_by_turns(grown, whole, tmp_path, trainable):
    last = dataclasses.replace(TURNS, trainable=trainable)
    if trainable == "decoder":
        whole = tmp_path / "whole"
        train_tokenizer(with_turns(whole, last))
    train_tokenizer(with_turns(tmp_path / "two", last, stages=(), init=str(grown / "tokenizer"), model=None))
    assert equal(weights(whole), weights(tmp_path / "two"))
    first, second = ([r["loss"] for r in records(run, "4x-8x") if "loss" in r] for run in (whole, tmp_path / "two"))
    assert first == second
    before, after = weights(grown), weights(whole)
    changed = {key.split(".")[0] for key, value in after.items() if not torch.equal(value, before[key])}
    decoding = {"decoder", "decoder_growth"}
    assert changed == (decoding if trainable == "decoder" else {"encoder", "encoder_growth", *decoding})


def test_a_run_with_a_stage_by_turns_continues_bit_for_bit(begun, whole, tmp_path, capsys):
    run = shutil.copytree(begun, tmp_path / "run")
    assert train_tokenizer(with_turns(run, stop_after=1)) == run / "tokenizer"
    assert equal(weights(run), weights(whole))
    capsys.readouterr()
    train_tokenizer(with_turns(run))
    output = capsys.readouterr().out
    assert all(f"{name}: already trained in {run / name}\n" in output for name in ("4x", "8x", "4x-8x"))
    assert equal(weights(run), weights(whole))
    assert {path.name for path in run.iterdir() if path.is_dir()} == {"4x", "8x", "4x-8x", "tokenizer"}


def test_a_stage_by_turns_is_chosen_by_its_name_and_a_ratio_means_its_growth(whole, tmp_path, capsys):
    chosen = [with_turns(tmp_path, only_stage=name).chosen_stages for name in (4, "4x", "8", "8x", "4x-8x", None)]
    assert [[s.name for s in stages] for stages in chosen] == [["4x"], ["4x"], ["8x"], ["8x"], ["4x-8x"], ["4x", "8x", "4x-8x"]]
    alone = with_turns(tmp_path, stages=(), init="tokenizer", only_stage=8)
    assert [s.name for s in alone.chosen_stages] == ["4x-8x"]
    for name in (4, "8x", "4x-8x"):
        train_tokenizer(with_turns(tmp_path, only_stage=name))
    assert equal(weights(tmp_path), weights(whole))
    with pytest.raises(UserError, match=r"tokenizer .*: no config\.json there"):
        train_tokenizer(with_turns(tmp_path / "none", only_stage="4x-8x"))


def test_a_lost_or_damaged_tokenizer_is_built_again_with_its_stage_by_turns(whole, tmp_path):
    run = tmp_path / "run"
    for damage in ("lost", "cut"):
        shutil.copytree(whole, run)
        if damage == "lost":
            shutil.rmtree(run / "tokenizer")
        else:
            file = run / "tokenizer" / "diffusion_pytorch_model.safetensors"
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        train_tokenizer(with_turns(run, only_stage=4 if damage == "lost" else None))
        train_tokenizer(with_turns(run))
        assert equal(weights(run), weights(whole))
        shutil.rmtree(run)


def test_a_lost_or_changed_start_of_a_stage_by_turns_is_named(begun, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "lost")
    shutil.rmtree(tmp_path / "lost" / "4x-8x")
    message = "stage 4x-8x: .* is no longer what it starts from, but its training in .*4x-8x stands at step 0 of 2"
    with pytest.raises(UserError, match=message):
        train_tokenizer(with_turns(tmp_path / "lost"))
    shutil.rmtree(tmp_path / "lost" / "tokenizer")  # one of the two moved away, as the message says
    train_tokenizer(with_turns(tmp_path / "lost"))
    assert equal(weights(tmp_path / "lost"), weights(whole))

    changed = shutil.copytree(begun, tmp_path / "changed")
    assert {"the tokenizer that 8x starts from", "the tokenizer that 4x-8x starts from"} <= recorded_data(changed).keys()
    model = load_tokenizer(changed / "tokenizer")
    with torch.no_grad():
        next(model.decoder.parameters()).add_(1)
    save_model(model, changed / "tokenizer")
    with pytest.raises(UserError, match=message.replace("step 0", "step 1")):
        train_tokenizer(with_turns(changed))


def test_a_stage_by_turns_killed_before_any_change_of_a_file_continues_to_the_same_weights(begun, whole, tmp_path, snapshots):  # noqa: F811
    start = shutil.copytree(begun, tmp_path / "run")
    runs = snapshots.take(start, lambda: train_tokenizer(with_turns(start)))
    assert 15 < len(runs) < 200
    for run in runs:
        assert train_tokenizer(with_turns(run)) == run / "tokenizer"
        assert equal(weights(run), weights(whole)), run
        assert (run / "4x-8x" / "done.json").exists()


def test_levels_on_an_autoencoder_of_diffusers_are_trained_by_turns_with_it(tmp_path):
    small_existing("Wan 2.1").save_pretrained(tmp_path / "wan")
    start = {"init": str(tmp_path / "wan"), "model": None}
    for _ in range(3):
        stages = (short(stage(8, 9, Growth(width=16))),)
        run = train_tokenizer(with_turns(tmp_path / "run", stages=stages, stop_after=1, **start))
    assert run == tmp_path / "run" / "tokenizer"
    before, after = load_tokenizer(tmp_path / "run" / "growth").state_dict(), load_tokenizer(run).state_dict()
    changed = {key.split(".")[0] for key, value in after.items() if not torch.equal(value, before[key])}
    assert {"encoder", "decoder", "encoder_growth", "decoder_growth"} <= changed
    base = small_existing("Wan 2.1").state_dict()
    assert torch.equal(before["encoder.model.encoder.conv_in.weight"], base["encoder.conv_in.weight"])


def test_stages_by_turns_that_cannot_be_are_named(trained, tmp_path):  # noqa: F811
    needs = "needs a stage without growth and latent_pretrain_steps, and trainable all or decoder"
    for change in ({"trainable": "new"}, {"growth": Growth()}, {"latent_pretrain_steps": 1}):
        with pytest.raises(ValueError, match=rf"by_turns \[8, 4, 8\] with ratio 8, .*: {needs}"):
            dataclasses.replace(TURNS, **change)
    for turns, ratio in (((4, 8), 16), ((4, 8), 4), ((8, 8), 8), ((0, 8), 8)):
        with pytest.raises(ValueError, match=f"with ratio {ratio}: needs two or more ratios, and the highest of them"):
            dataclasses.replace(TURNS, by_turns=turns, ratio=ratio, frames=17)
    assert leaves_unused(dataclasses.replace(TURNS, trainable="decoder"))

    sixteen = dataclasses.replace(stage(16, 17, trainable="all"), by_turns=(8, 16))
    three = dataclasses.replace(TURNS, by_turns=(3, 8), frames=25)
    for stages, message in (
        ((TURNS,), "stage 4x-8x: by_turns needs stages before it that grow its levels, or init"),
        ((*GROWING, TURNS, stage(16, 17, Growth())), "stage 4x-8x: by_turns is for the last stage"),
        ((*GROWING, TURNS, TURNS), "stage 4x-8x: by_turns is for the last stage"),
        ((*GROWING, sixteen), "stage 8x-16x: by_turns after the 8x stage needs that ratio, not 16"),
        ((*GROWING, stage(16, 17, Growth()), TURNS), "stage 4x-8x: by_turns after the 16x stage needs that ratio, not 8"),
        ((*GROWING, three), "stage 3x-8x: by_turns: the stages grow 4x, 8x, not 3x"),
        ((GROWING[0], stage(8, 9)), "stage 8x: only the first stage, and a last one by turns, can be without growth"),
        ((*GROWING, stage(8, 9, trainable="decoder")), r"stages \[4, 8, 8\]: each ratio must be 2, 4 or 8 times"),
        ((stage(4, 5, trainable="decoder"),), "stage 4x: trainable decoder needs init"),
        ((*GROWING, dataclasses.replace(TURNS, frames=6)), "6 frames: 4x needs"),
    ):
        with pytest.raises(ValueError, match=message):
            make_config(tmp_path, stages=stages)
    with pytest.raises(ValueError, match="stage 4x-8x: by_turns with distill"):
        with_turns(tmp_path, distill=Distillation(teacher="teacher"))
    with pytest.raises(ValueError, match="only_stage 4x-16x: the stages are 4x, 8x, 4x-8x"):
        with_turns(tmp_path, only_stage="4x-16x")

    # Named before anything is grown.
    last = dataclasses.replace(stage(32, 33, trainable="all"), by_turns=(2, 4, 32))
    growing = make_config(tmp_path, init=str(trained / "tokenizer"), model=None, stages=(stage(32, 33, Growth()), last))
    with pytest.raises(UserError, match=r"stage 2x-4x-32x by_turns: .*, grown by .* has 4x, 8x, 16x, 32x, not 2x"):
        train_tokenizer(growing)
    assert not (tmp_path / "32x").exists()


def test_all_levels_are_trained_by_turns_and_every_one_is_validated(trained, tmp_path):  # noqa: F811
    together = dataclasses.replace(stage(16, 17, trainable="all"), by_turns=(4, 8, 16))
    run = train_tokenizer(make_config(tmp_path, init=str(trained / "tokenizer"), model=None, stages=(together,)))
    assert run is not None
    before, after = (load_tokenizer(place).state_dict() for place in (trained / "tokenizer", run))
    changed = {key.split(".")[0] for key, value in after.items() if not torch.equal(value, before[key])}
    assert changed == {"encoder", "decoder", "encoder_growth", "decoder_growth", "own_decoders"}
    (last,) = [r for r in records(tmp_path, "4x-8x-16x") if "psnr" in r]
    assert {"psnr", "psnr_4x", "psnr_8x"} <= last.keys()

    unknown = dataclasses.replace(together, by_turns=(2, 4, 16))
    config = make_config(tmp_path / "b", init=str(trained / "tokenizer"), model=None, stages=(unknown,))
    with pytest.raises(UserError, match=r"by_turns: .* has 4x, 8x, 16x, not 2x"):
        train_tokenizer(config)

    model = make_tokenizer(settle=0.05)
    objective = StageObjective(model, together)
    for step, ratio in ((0, 4), (1, 8), (2, 16), (3, 4)):
        model.zero_grad()
        objective({"video": torch.rand(1, 3, 17, 16, 16)}, [torch.Generator().manual_seed(0)], step)["loss"].backward()
        used = [p.grad is not None for p in (next(grown.parameters()) for grown in model.decoder_growth)]
        assert used == [ratio >= 8, ratio >= 16]


def test_a_stage_by_turns_trains_what_decodes_each_of_its_ratios():
    model, last = make_tokenizer(levels=2, decoder="finetune"), dataclasses.replace(TURNS, trainable="decoder")
    train_only(model, last, (8,))
    parts = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert parts == {"decoder", "decoder_growth", "own_decoders"}
    objective = StageObjective(model, last)
    for step, used in ((0, {"decoder_growth.0", "own_decoders.1"}), (1, {"decoder.body", "decoder.head"})):  # at 8x, at 4x
        model.zero_grad()
        objective({"video": torch.rand(1, 3, 9, 16, 16)}, [torch.Generator().manual_seed(0)], step)["loss"].backward()
        named = {".".join(name.split(".")[:2]) for name, p in model.named_parameters() if p.grad is not None}
        assert named == used


def test_copies_in_a_level_that_is_trained_further_may_have_no_gradient():
    model, further = make_tokenizer(levels=2, settle=0.05, mixing="none", encoder="finetune"), stage(8, 9)
    train_only(model, further, (8,))
    objective = StageObjective(model, further)
    objective({"video": torch.rand(1, 3, 9, 16, 16)}, [torch.Generator().manual_seed(0)], 0)["loss"].backward()
    unused = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert {name.partition(".")[0] for name in unused} == {"own_encoders"}
    assert leaves_unused(further, from_init=True)
    assert not leaves_unused(stage(4, 5))  # of a base from scratch all weights have gradients


def test_growth_is_saved_before_the_tokenizer_which_ends_its_stage(tmp_path):
    small_existing("Wan 2.1").save_pretrained(tmp_path / "wan")
    run, stages = tmp_path / "run", (short(stage(8, 9, Growth(width=16))),)

    def go_on(stop_after=None):
        settings = dataclasses.replace(RUN, stop_after=stop_after)
        return train_tokenizer(make_config(run, init=str(tmp_path / "wan"), model=None, stages=stages, run=settings))

    assert go_on(1) is None
    (run / "tokenizer").mkdir()
    (run / "tokenizer" / "notes.txt").write_text("")  # a tokenizer cannot be saved there
    with pytest.raises(UserError, match="tokenizer: holds other files than a model's"):
        go_on()
    assert load_tokenizer(run / "growth").temporal_ratios == (4, 8)


@pytest.mark.parametrize(
    ("name", "size", "frames", "message"),
    [
        ("Wan 2.2", 72, 9, "stage 8x: height 72: needs a multiple of 16; use 64 or 80"),
        ("CogVideoX", 64, 25, r"stage 8x: 25 frames: 8x needs 1 \+ 16k; use 17 or 33"),
    ],
)
def test_clips_that_a_loaded_autoencoder_does_not_take_are_named(tmp_path, name, size, frames, message):
    small_existing(name).save_pretrained(tmp_path / "base")
    stages = (stage(8, frames, Growth(width=16)),)
    config = make_config(tmp_path / "run", init=str(tmp_path / "base"), model=None, stages=stages)
    with pytest.raises(UserError, match=message):
        train_tokenizer(dataclasses.replace(config, data=dataclasses.replace(config.data, size=size)))


def test_latents_are_not_cached_for_levels_that_cannot_use_them(tmp_path):
    model = AutoencoderKLProMAG.from_base(small_existing("Wan 2.1"))
    model.grow(Growth(width=16, encoder="finetune"))
    save_model(model, tmp_path / "grown")
    stages = (stage(16, 17, Growth(width=16), 2),)
    config = make_config(tmp_path / "run", init=str(tmp_path / "grown"), model=None, stages=stages)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, latent_cache="latents"))
    with pytest.raises(
        UserError, match=r"stage 16x: base latents: 16x encodes with the copy .* 8x has .*; set data.latent_cache to null"
    ):
        train_tokenizer(config, open_latents=lambda *_: pytest.fail("latents were cached"))


@pytest.mark.parametrize("place", ["absolute", "relative"])
def test_cached_latents_may_move_but_neither_begin_nor_end_within_a_run(tmp_path, place, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, stages = Path("run") if place == "relative" else tmp_path / "run", (stage(8, 9, Growth(), 2),)
    (run / "8x").mkdir(parents=True)
    (run / "8x" / "done.json").write_text('{"seconds": 1.0, "steps": 4}')
    save_model(make_tokenizer(levels=2), run / "tokenizer")

    def config(cache):
        whole = make_config(run, init="wan", model=None, stages=stages)
        return dataclasses.replace(whole, data=dataclasses.replace(whole.data, latent_cache=cache))

    for before, now, legal in (("a", "b", True), (None, None, True), ("a", None, False), (None, "a", False)):
        save_yaml(run / "config.yaml", config(before))
        if legal:
            assert train_tokenizer(config(now)) == run / "tokenizer"
        else:
            with pytest.raises(UserError, match=rf"other settings \(data.latent_cache is {before!r} there, {now!r} now\)"):
                train_tokenizer(config(now))
    (run / "8x" / "done.json").unlink()
    assert "data.latent_cache" in _may_change(config("a"))  # nothing was trained on pixels in place of latents
