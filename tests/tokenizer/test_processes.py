"""Two processes train a stage that adds two levels, although some weights have no gradient."""

import sys

import pytest
import torch

from promag.tokenizer.checkpoint import load_tokenizer
from promag.tokenizer.growth import Growth
from promag.tokenizer.train import train_tokenizer
from tests.processes import run_two_ranks
from tests.tokenizer.test_train import make_config, stage

KINDS = {"key-frames": Growth(), "none": Growth(mixing="none")}
DRIVER = "import sys; from tests.tokenizer.test_processes import train_all; train_all(sys.argv[1])"


def train_all(folder):
    """Train a base, and on it each kind of growth by two levels in one stage; its first step regresses the base's latent."""
    from promag.training.fsdp import leave_process_group

    base = make_config(f"{folder}/base", stages=(stage(4, 5),))
    train_tokenizer(base)
    for name, growth in KINDS.items():
        two = stage(16, 17, growth, latent_pretrain_steps=2)
        train_tokenizer(make_config(f"{folder}/{name}", init=f"{folder}/base/tokenizer", stages=(two,)))
    leave_process_group()


@pytest.mark.skipif(sys.platform == "win32", reason="gloo is tested on Unix")
def test_two_processes_train_a_stage_of_two_levels(tmp_path):
    run_two_ranks(DRIVER, tmp_path)
    base = load_tokenizer(tmp_path / "base" / "tokenizer").state_dict()
    for name, growth in KINDS.items():
        model = load_tokenizer(tmp_path / name / "tokenizer")
        assert model.temporal_ratios == (4, 8, 16)
        weights = model.state_dict()
        assert all(torch.equal(value, weights[key]) for key, value in base.items())
        fresh = load_tokenizer(tmp_path / "base" / "tokenizer")
        torch.manual_seed(16)  # as the stage seeds it
        for _ in range(2):
            fresh.grow(growth)
        for part in ("encoder_growth.0.blocks_full", "encoder_growth.1.head", "decoder_growth.0", "decoder_growth.1"):
            changed = [
                not torch.equal(value, weights[key]) for key, value in fresh.state_dict().items() if key.startswith(part)
            ]
            assert any(changed), (name, part)
