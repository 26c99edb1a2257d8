"""The state of a training between two steps, as checkpoints hold it, and hashes of weights."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from .config import UserError
from .fsdp import as_dtensor, full_on_main, local_shard, shard_like
from .optimizers import from_saved, to_saved, weights_and_keys
from .run import load_checkpoint


def hash_weights(modules: Iterable[nn.Module]) -> str:
    """Return a hash of the modules' state dictionaries, names and float32 values."""
    digest = hashlib.sha256()
    for module in modules:
        for name, value in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class State:
    """Content of a checkpoint: weights, their averages, optimiser moments, buffers; step, seconds and skipped steps."""

    def __init__(
        self,
        named: dict[str, nn.Parameter],
        buffers: dict[str, Tensor],
        optimizers: list[torch.optim.Optimizer],
        ema: EMAModel,
        global_batch: int,
    ):
        self.named, self.buffers, self.optimizers, self.ema = named, buffers, optimizers, ema
        self.global_batch = global_batch  # samples a step, of all processes
        self.step = self.skipped = self.skipped_in_a_row = 0
        self.seconds = 0.0  # training time of the calls before this one

    def copy_of_buffers(self) -> dict[str, Tensor]:
        """Copy what a forward pass may change: moving averages, for example."""
        return {name: buffer.clone() for name, buffer in self.buffers.items() if buffer.is_floating_point()}

    def restore_buffers(self, untouched: Mapping[str, Tensor], skipping: Tensor) -> None:
        """Put buffers back to their copies where `skipping`, a scalar, is 1 instead of 0."""
        for name, value in untouched.items():
            torch.where(skipping.bool(), value, self.buffers[name], out=self.buffers[name])

    def count(self, skipped: bool) -> None:
        """Count a step that was taken or skipped."""
        self.skipped += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0

    def resume(self, path: Path) -> None:
        """Read a checkpoint, a tensor at a time; raises UserError where its steps had more or fewer samples."""
        groups, meta = load_checkpoint(path)
        if meta["global_batch"] != self.global_batch:
            raise UserError(
                f"{path}: was trained on {meta['global_batch']} samples a step, these processes have {self.global_batch} "
                "(processes x batch_size x accumulate); start as many processes as before"
            )
        with torch.no_grad():
            for (name, parameter), shadow in zip(self.named.items(), self.ema.shadow_params, strict=True):
                for place, group in ((local_shard(parameter), "weights"), (shadow, "ema")):
                    place.copy_(local_shard(shard_like(groups[group][name], parameter)))
            for name, buffer in self.buffers.items():
                buffer.copy_(groups["buffers"][name])
        slots: dict[str, list[str]] = {}
        for key in groups["optimizer"]:
            name, _, slot = key.rpartition("/")
            slots.setdefault(name, []).append(slot)
        names = {id(p): name for name, p in self.named.items()}
        for optimizer in self.optimizers:
            moments = {
                i: {
                    slot: from_saved(optimizer, groups["optimizer"][f"{names[id(p)]}/{slot}"], p)
                    for slot in slots.get(names[id(p)], ())
                }
                for i, (p, _) in enumerate(weights_and_keys(optimizer))
            }
            moments = {i: slot for i, slot in moments.items() if slot}
            optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        self.step, self.seconds = meta["step"], meta["seconds"]
        self.skipped, self.skipped_in_a_row = meta["skipped"], meta["skipped_in_a_row"]

    def groups(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield the groups of tensors, full on rank 0; all ranks must call this together.

        One group after the other: all of a sharded model's at once may not fit into memory.
        """
        yield "weights", {name: full_on_main(p) for name, p in self.named.items()}
        averages = zip(self.named.items(), self.ema.shadow_params, strict=True)
        yield "ema", {name: full_on_main(as_dtensor(shadow, p)) for (name, p), shadow in averages}
        slots = {
            id(p): {slot: to_saved(optimizer, value, p) for slot, value in optimizer.state.get(key, {}).items()}
            for optimizer in self.optimizers
            for p, key in weights_and_keys(optimizer)
        }
        yield "optimizer", {f"{n}/{k}": full_on_main(v) for n, p in self.named.items() for k, v in slots[id(p)].items()}
        yield "buffers", self.buffers

    def meta(self, seconds: float) -> dict[str, Any]:
        """Return a checkpoint's figures beside its tensors; `seconds` are those of this call."""
        counts = {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}
        return {"seconds": self.seconds + seconds, "global_batch": self.global_batch, **counts}
