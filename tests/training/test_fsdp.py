"""What FSDP2 refuses; what it does is tested on two processes (tests/scripts/test_two_processes.py)."""

import pytest
import torch
from torch import nn

from promag.training.config import UserError
from promag.training.fsdp import shard

CPU = torch.device("cpu")


def test_one_process_is_refused():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(UserError, match="parallel fsdp2: one process has nobody to share weights with"):
        shard(model, [model[0]], CPU, 1, False)


def test_trained_weights_outside_of_the_units_are_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"parallel fsdp2: 1\.weight and 1 more weights cannot be spread here; use ddp"):
        shard(model, [model[0]], CPU, 2, False)
