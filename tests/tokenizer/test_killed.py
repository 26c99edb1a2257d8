"""A run killed before any file operation around a stage's end continues to the same weights as one that was not killed."""

import dataclasses
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

from promag.tokenizer.checkpoint import load_tokenizer, save_model
from promag.tokenizer.growth import Growth
from promag.tokenizer.train import train_tokenizer
from promag.training.config import UserError
from promag.training.files import finish_replacing
from tests.conftest import make_tokenizer
from tests.tokenizer.test_train import RUN, make_config, short, stage
from tests.training.test_run import small_files


class Snapshots:
    """Copies a folder before each change of a file in it that a call makes: what a kill at that moment leaves."""

    CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")

    def __init__(self):
        self.folder, self.copies = None, []
        sys.addaudithook(self)

    def __call__(self, event, arguments):
        if self.folder is None:
            return
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & 0o3
        if (writes or event in self.CHANGES) and self._inside(event, arguments):
            self._copy()

    def _inside(self, event, arguments):
        relative = event in ("os.remove", "os.rmdir") and arguments[1] != -1  # to a folder that is being removed
        return relative or str(arguments[0]).startswith(str(self.folder))

    def _copy(self):
        folder, self.folder = self.folder, None  # copying is no change
        self.copies.append(shutil.copytree(folder, folder.with_name(f"{folder.name}-{len(self.copies)}")))
        self.folder = folder

    def take(self, folder, call):
        """Return a copy of the folder before each change of a file by `call`, then one of what it left."""
        self.folder, self.copies = folder, []
        try:
            call()
            self._copy()
        finally:
            self.folder = None
        return self.copies


@pytest.fixture(scope="session")
def snapshots():
    return Snapshots()


def weights(run):
    return load_file(run / "tokenizer" / "diffusion_pytorch_model.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def two_stages(folder, stop_after=None, **change):
    stages = (short(stage(4, 5)), short(stage(8, 9, Growth())))
    return make_config(folder, stages=stages, run=dataclasses.replace(RUN, stop_after=stop_after), **change)


@pytest.mark.parametrize("ratio", [4, 8])
def test_a_stage_killed_before_any_change_of_a_file_continues_to_the_same_weights(snapshots, tmp_path, ratio):
    whole, begun = tmp_path / "whole", tmp_path / "begun"
    train_tokenizer(two_stages(whole, only_stage=4))
    if ratio == 8:
        shutil.copytree(whole, begun)
        train_tokenizer(two_stages(whole, only_stage=8))
    expected, config = weights(whole), (whole / "tokenizer" / "config.json").read_text()
    assert train_tokenizer(two_stages(begun, only_stage=ratio, stop_after=1)) is None  # at the first step of two
    runs = snapshots.take(begun, lambda: train_tokenizer(two_stages(begun, only_stage=ratio)))
    assert 20 < len(runs) < 200
    for run in runs:
        assert train_tokenizer(two_stages(run, only_stage=ratio)) == run / "tokenizer"
        assert equal(weights(run), expected), run
        assert (run / "tokenizer" / "config.json").read_text() == config
        assert not list(run.glob(".*"))
        assert (run / f"{ratio}x" / "done.json").exists()


def test_a_save_killed_before_any_change_of_a_file_leaves_the_old_or_the_new_model(snapshots, tmp_path):
    old, new = make_tokenizer(levels=1), make_tokenizer(levels=2)
    save_model(old, tmp_path / "run" / "tokenizer")
    outcomes = []
    for run in snapshots.take(tmp_path / "run", lambda: save_model(new, tmp_path / "run" / "tokenizer")):
        folder = run / "tokenizer"
        finish_replacing(folder)
        assert [p.name for p in run.iterdir()] == ["tokenizer"]
        saved = load_tokenizer(folder)
        assert equal(saved.state_dict(), (old if saved.temporal_ratios == (4,) else new).state_dict())
        outcomes.append(len(saved.temporal_ratios))
    assert outcomes == sorted(outcomes)  # the old one first, then the new one
    assert set(outcomes) == {1, 2}


def test_a_level_with_unfinished_training_is_refused(tmp_path):
    train_tokenizer(two_stages(tmp_path))
    shutil.rmtree(tmp_path / "8x")
    with pytest.raises(UserError, match=r"stage 8x: .* has that level, but its training in .* stands at step 0 of 2"):
        train_tokenizer(two_stages(tmp_path))


def test_a_lost_or_damaged_tokenizer_is_built_again_from_the_checkpoints(tmp_path):
    train_tokenizer(two_stages(tmp_path))
    expected = weights(tmp_path)
    file = tmp_path / "tokenizer" / "diffusion_pytorch_model.safetensors"
    half = file.read_bytes()[: file.stat().st_size // 2]
    for damage in (lambda: shutil.rmtree(tmp_path / "tokenizer"), lambda: file.write_bytes(half), file.unlink):
        damage()
        train_tokenizer(two_stages(tmp_path))
        assert equal(weights(tmp_path), expected)
    shutil.rmtree(tmp_path / "4x")
    file.unlink()
    with pytest.raises(UserError, match=r"stage 4x: .*tokenizer has no weights, and .*4x has no checkpoints to restore"):
        train_tokenizer(two_stages(tmp_path))


def test_a_tokenizer_that_changes_under_its_stage_is_named(tmp_path):
    """Checkpoints hold what a stage trains; with other levels below it would become another model."""
    train_tokenizer(two_stages(tmp_path, only_stage=4))
    assert train_tokenizer(two_stages(tmp_path, stop_after=1)) is None
    model = load_tokenizer(tmp_path / "tokenizer")
    with torch.no_grad():
        next(model.decoder.parameters()).add_(1)
    save_model(model, tmp_path / "tokenizer")
    with pytest.raises(UserError, match="was trained on other data: the tokenizer that 8x starts from differs"):
        train_tokenizer(two_stages(tmp_path))


def test_a_model_is_not_saved_over_a_folder_of_other_things(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="home: holds other files than a model's; name another folder"):
        save_model(make_tokenizer(levels=1), tmp_path / "home")
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["thesis.txt"]


def test_a_full_disk_keeps_the_previous_tokenizer(tmp_path):
    old = make_tokenizer(levels=1)
    save_model(old, tmp_path / "tokenizer")
    with small_files(4000), pytest.raises(OSError, match="File too large") as caught:
        save_model(make_tokenizer(levels=2), tmp_path / "tokenizer")
    assert caught.value.filename == str(tmp_path / "tokenizer")
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]
    assert equal(load_tokenizer(tmp_path / "tokenizer").state_dict(), old.state_dict())
