"""Run by each of two processes (test_two_processes.py): the shards that FSDP2 keeps, and Muon on sharded weights."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from promag import ProMAGTransformer3DModel
from promag.training.fsdp import full, local_shard, shard
from promag.training.optimizers import Muon
from promag.training.processes import processes

MUON = {"lr": 0.1, "weight_decay": 0.1, "ns_steps": 4}
SHAPES = ((6, 4), (5, 3), (3, 7), (1, 4), (8, 8))  # one of two processes has more rows than the other, or all of them


class Holder(nn.Module):
    """An objective that holds the sharded model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model


class Matrices(nn.Module):
    """Matrices, each of which multiplies the first numbers of the input."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.weights = nn.ParameterList(torch.randn(shape) for shape in SHAPES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum((weight @ x[: weight.shape[1]]).square().sum() for weight in self.weights)


def spread_transformer(device: torch.device, bf16: bool) -> dict:
    torch.manual_seed(0)
    model = ProMAGTransformer3DModel(in_channels=4, num_layers=3, num_attention_heads=2, attention_head_dim=8, text_dim=8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    whole = sum(p.numel() for p in model.parameters())
    objective, seen = Holder(model), []
    units = [*model.transformer_blocks, model]
    make_whole = shard(objective, units, device, 2, bf16)
    here = sum(local_shard(p).numel() for p in model.parameters())
    largest = max((local_shard(p).numel() / p.numel(), tuple(p.shape)) for p in model.parameters() if p.shape[0] > 1)
    model.transformer_blocks[0].register_forward_pre_hook(lambda block, _: seen.append(block.attn1.to_q.weight))
    latents, text = torch.randn(1, 4, 2, 4, 4), torch.randn(1, 3, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        model(latents, torch.tensor([500.0]), text).sample.sum().backward()
    gradients = {type(p.grad) for p in model.parameters() if p.grad is not None}
    kept = [p for p in model.parameters() if not isinstance(p, DTensor)]
    make_whole()
    after = objective.model.state_dict()
    return {
        "part": here / whole,
        "largest": largest,
        "computed_in": str(seen[0].dtype),
        "gradients": [kind.__name__ for kind in gradients],
        "gathered_after_the_step": len(kept),
        "class": type(objective.model).__name__,
        "equal": all(torch.equal(value, after[name]) for name, value in before.items()) and before.keys() == after.keys(),
    }


def muon(device: torch.device) -> list[float]:
    """Return the distance of each matrix, after two steps, from that of torch.optim.Muon on whole matrices."""
    plain, spread = Matrices(), Holder(Matrices())
    shard(spread, [spread.model], device, 2, False)
    options = [Muon(list(plain.weights), **MUON), Muon(list(spread.model.weights), **MUON)]
    for step in range(2):
        x = torch.randn(
            8, generator=torch.Generator().manual_seed(step)
        )  # equal on both processes, so the mean gradient is that of each
        for model, optimizer in zip((plain, spread.model), options, strict=True):
            model(x).backward()
            optimizer.step()
            optimizer.zero_grad()
    pairs = zip(plain.weights, spread.model.weights, strict=True)
    return [float((a - full(b)).detach().abs().max()) for a, b in pairs]


def main(arguments: Sequence[str]) -> None:
    """Write the results of this process into the given folder."""
    state = processes()
    results = {"float32": spread_transformer(state.device, False), "bf16": spread_transformer(state.device, True)}
    results["muon_learning_rate"] = muon(state.device)
    (Path(arguments[0]) / f"spread-{state.process_index}.json").write_text(json.dumps(results))
