"""What the host reads of a batch comes as numbers, which nothing moves to a device."""

import torch

from promag.training.sending import Sender


def test_what_the_host_reads_becomes_numbers_and_the_rest_tensors_of_the_device():
    read = {"x": torch.arange(2.0), "ratio": torch.tensor([16, 16]), "caption": ["a", "b"]}
    batch = Sender(torch.device("meta"), ("ratio",))(read)
    assert batch["ratio"] == [16, 16]
    assert batch["x"].is_meta
    assert batch["caption"] == ["a", "b"]
    assert torch.equal(read["ratio"], torch.tensor([16, 16]))
