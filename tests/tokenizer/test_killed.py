"""A run killed before any file operation around a stage's end continues to the same weights as one that was not killed."""

import dataclasses
import shutil
import sys

import pytest
import torch

from promag.tokenizer.checkpoint import load_tokenizer, save_model
from promag.tokenizer.growth import Growth
from promag.tokenizer.train import train_tokenizer
from promag.training.config import UserError
from promag.training.files import finish_replacing
from tests.conftest import make_tokenizer, run_config
from tests.tokenizer.test_train import make_config, stage
from tests.training.test_run import small_files


class Killed(BaseException):
    """Stands for a kill: only the test catches it."""


class Killer:
    """Ends a call before its n-th change of a file in a folder; later changes, such as those of handlers, fail too."""

    CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")

    def __init__(self):
        self.folder, self.left = None, 0
        sys.addaudithook(self)

    def __call__(self, event, arguments):
        if self.folder is None:
            return
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & 0o3
        if (writes or event in self.CHANGES) and self._inside(event, arguments):
            self.left -= 1
            if self.left < 0:
                raise Killed

    def _inside(self, event, arguments):
        relative = event in ("os.remove", "os.rmdir") and arguments[1] != -1  # to a folder that is being removed
        return relative or str(arguments[0]).startswith(str(self.folder))

    def run(self, folder, operations, call):
        """Return whether `call` finished within that many changes."""
        self.folder, self.left = folder, operations
        try:
            call()
        except Killed:
            return False
        finally:
            self.folder = None
        return True


@pytest.fixture(scope="session")
def killer():
    return Killer()


def weights(run):
    return load_tokenizer(run / "tokenizer").state_dict()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def two_stages(folder, stop_after=None, **change):
    loop = dataclasses.replace(stage(4, 5).optimization, steps=2)
    stages = [dataclasses.replace(s, optimization=loop) for s in (stage(4, 5), stage(8, 9, Growth()))]
    run = run_config(validate_every=50, save_every=50, keep_last=1, trackers=(), stop_after=stop_after)
    config = make_config(folder, stages=tuple(stages), run=run, **change)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, validation_clips=1))


@pytest.mark.parametrize("ratio", [4, 8])
def test_a_stage_killed_before_any_change_of_a_file_continues_to_the_same_weights(killer, tmp_path, ratio):
    whole, begun, run = tmp_path / "whole", tmp_path / "begun", tmp_path / "run"
    train_tokenizer(two_stages(whole, only_stage=4))
    if ratio == 8:
        shutil.copytree(whole, begun)
        train_tokenizer(two_stages(whole, only_stage=8))
    expected = weights(whole)
    assert train_tokenizer(two_stages(begun, only_stage=ratio, stop_after=1)) is None  # at the first step of two
    for operations in range(200):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(begun, run)
        ended = killer.run(run, operations, lambda: train_tokenizer(two_stages(run, only_stage=ratio)))
        assert train_tokenizer(two_stages(run, only_stage=ratio)) == run / "tokenizer"
        assert equal(weights(run), expected), operations
        assert not list(run.glob(".*"))
        assert (run / f"{ratio}x" / "done.json").exists()
        if ended:
            break
    assert 20 < operations < 199


def test_a_save_killed_before_any_change_of_a_file_leaves_the_old_or_the_new_model(killer, tmp_path):
    old, new = make_tokenizer(levels=1), make_tokenizer(levels=2)
    outcomes = []
    for operations in range(100):
        folder = tmp_path / str(operations) / "tokenizer"
        save_model(old, folder)
        ended = killer.run(folder.parent, operations, lambda folder=folder: save_model(new, folder))
        finish_replacing(folder)
        assert [p.name for p in folder.parent.iterdir()] == ["tokenizer"]
        ratios = load_tokenizer(folder).temporal_ratios
        assert equal(load_tokenizer(folder).state_dict(), (old if ratios == (4,) else new).state_dict())
        outcomes.append(len(ratios))
        if ended:
            break
    assert outcomes == sorted(outcomes)  # the old one first, then the new one
    assert set(outcomes) == {1, 2}
    assert ended


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
