"""The way of a training's batches to their device."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils._pytree import tree_leaves


class Sender:
    """Copies batches to a device; to a GPU on a stream of its own, while the step before still computes.

    Args:
        device: where batches go.
        host_keys: tensors of a batch that become Python numbers: DDP moves all tensors to the device, also those on the host.
    """

    def __init__(self, device: torch.device, host_keys: Sequence[str] = ()):
        self.device, self.host_keys = device, [*host_keys]
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Any) -> Any:
        """Return a batch whose tensors are on the device; what is queued there from now on finds them complete."""
        batch = {**batch, **{key: batch[key].tolist() for key in self.host_keys}}
        if self.stream is None:
            return send_to_device(batch, self.device)
        with torch.cuda.stream(self.stream):
            sent = send_to_device(batch, self.device, non_blocking=True)
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self.stream)
        for leaf in tree_leaves(sent):
            if isinstance(leaf, Tensor) and leaf.is_cuda:
                leaf.record_stream(computing)  # its memory is free for the next copy only after the step
        return sent
