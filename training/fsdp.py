"""FSDP2: every process holds a part of each weight, gradient, moment and average, by torch's fully_shard.

A unit - one transformer block, say - is whole on each process only while it computes: its weights are gathered before it is
called, in the forward and in the backward pass, and its gradients are averaged and cut into parts after it. Parts are rows: the
first axis is divided. Source: PyTorch FSDP (arXiv 2304.11277), in the form that keeps a tensor for each weight.
"""

import copy
import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import destroy_process_group, get_rank, is_initialized
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from .config import UserError
from .processes import waiting_group

_meshes: list[DeviceMesh] = []  # none or one


def shard(objective: nn.Module, units: Sequence[nn.Module], device: torch.device, world: int, bf16: bool) -> Callable[[], None]:
    """Shard the units' weights over `world` processes, in place, and move all else to `device`.

    Args:
        objective: every weight of it that is trained must lie in a unit.
        units: modules whose weights are gathered together, inner ones before those around them; frozen ones need not be parts
            of the objective.
        device: device of this process.
        world: number of processes.
        bf16: gather the weights of inner units in bfloat16; gradients are summed in float32 all the same.

    Returns a function that replaces the objective's sharded modules, which can be neither copied nor saved, by plain ones on
    the CPU.
    Raises UserError for one process, for no units, and for trained weights outside of them.
    """
    if world < 2:
        raise UserError("distributed fsdp2: needs several processes; start them with torchrun, or use ddp")
    inside = {id(p) for unit in units for p in unit.parameters()}
    outside = [name for name, p in objective.named_parameters() if p.requires_grad and id(p) not in inside]
    if outside:
        raise UserError(f"distributed fsdp2: {outside[0]} and {len(outside) - 1} more weights cannot be sharded here; use ddp")
    plain = {name: _without_data(objective.get_submodule(name)) for name in _outermost(objective, units)}
    inner = {id(module) for unit in units for module in unit.modules() if module is not unit}
    mesh = _mesh(device.type, world)
    for unit in units:
        narrow = bf16 and id(unit) in inner  # embeddings, modulation and the small text model stay in float32
        # Inputs stay as they are: times and rotary positions need float32, and autocast narrows the rest. Roots are let go of
        # after the forward pass too: else validation would leave gathered averages that the next step takes for weights.
        policy = MixedPrecisionPolicy(torch.bfloat16 if narrow else None, torch.float32, cast_forward_inputs=False)
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    objective.to(device)

    def make_whole() -> None:
        for name, module in plain.items():
            sharded = objective.get_submodule(name)
            module.load_state_dict({key: full(value).cpu() for key, value in sharded.state_dict().items()}, assign=True)
            parent, _, child = name.rpartition(".")
            setattr(objective.get_submodule(parent), child, module)

    return make_whole


def _mesh(device_type: str, world: int) -> DeviceMesh:
    """Return the one mesh of this process, made on first use."""
    if not _meshes:
        _meshes.append(init_device_mesh(device_type, (world,)))
    return _meshes[0]


def leave_process_group() -> None:
    """End communication with the other processes and wait for the threads that did it; nothing where there are none.

    To be called at the end of a process that did not fail: a thread of gloo that lets go of its last tensor while the
    interpreter shuts down would abort it, and with it all others.
    """
    if not is_initialized():
        return
    gc.collect()  # modules are in cycles with their hooks, which know the group
    for mesh in _meshes:
        mesh.__dict__.get("_pg_registry", {}).clear()  # torch's caches keep meshes for good, and they the group
    _meshes.clear()
    waiting_group.cache_clear()
    destroy_process_group()


def _outermost(objective: nn.Module, units: Sequence[nn.Module]) -> list[str]:
    """Return the names of the units that are in no other unit."""
    names = [name for name, module in objective.named_modules() if any(module is unit for unit in units)]
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def _without_data(module: nn.Module) -> nn.Module:
    """Copy a module but for its weights' data."""
    empty: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in module.parameters()}
    return copy.deepcopy(module, empty)


def local_shard(weight: Any) -> nn.Parameter:
    """Return this rank's local shard as a plain parameter over the same memory; a weight that is not sharded as it is."""
    if not isinstance(weight, DTensor):
        return weight
    with torch.no_grad():
        return nn.Parameter(weight.to_local(), weight.requires_grad)


def full(tensor: Tensor) -> Tensor:
    """Return the full tensor on every rank; all ranks must call this together."""
    free: Any = tensor.detach()
    return free.full_tensor() if isinstance(free, DTensor) else free


def full_on_main(tensor: Tensor) -> Tensor:
    """Return the full tensor on rank 0's CPU and an empty one on other ranks; a tensor that is not sharded as it is."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    whole = full(tensor)
    return whole.cpu() if get_rank() == 0 else whole.new_empty(0)


def shard_like(whole: Tensor, weight: Tensor) -> Tensor:
    """Shard a tensor, full on every rank, as `weight` is sharded; return it as it is where `weight` is not."""
    if not isinstance(weight, DTensor):
        return whole
    return distribute_tensor(whole.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)


def as_dtensor(part: Tensor, weight: Tensor) -> Tensor:
    """Join the ranks' local shards to a DTensor, sharded as `weight`; return `part` where `weight` is not sharded."""
    if not isinstance(weight, DTensor):
        return part
    return DTensor.from_local(
        part, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
    )
