"""Settings that FSDP2 refuses; its results are tested on two processes (tests/scripts/test_two_processes.py)."""

import pytest
import torch
from torch import nn

from promag.training.config import UserError
from promag.training.fsdp import shard

CPU = torch.device("cpu")


def test_one_process_is_refused():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(UserError, match="distributed fsdp2: needs several processes"):
        shard(model, [model[0]], CPU, 1, False)


def test_trained_weights_outside_the_fsdp_units_are_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"distributed fsdp2: 1\.weight and 1 more weights cannot be sharded here; use ddp"):
        shard(model, [model[0]], CPU, 2, False)
