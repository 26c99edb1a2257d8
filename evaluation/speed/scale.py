"""What several GPUs give, derived from what one was measured to do and from bytes that cross between them.

Nothing here is measured. A collective of S bytes over n nodes of g GPUs moves S (g - 1) / g over the link of each GPU within
its node and S (n - 1) / n / g over its link to other nodes, for each GPU of a node carries its share (rings and hierarchies
alike: Thakur et al. 2005, "Optimization of Collective Communication Operations in MPICH"). An all-reduce is a
reduce-scatter and an all-gather. Latency is left out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from promag.diffusion.config import DiffusionConfig
from promag.diffusion.families import hidden_matrices
from promag.diffusion.flops import training_flops
from promag.evaluation.memory import text_shape, transformer_alone
from promag.tokenizer.geometry import tokens
from promag.training.optimizers import muon_flops

FLOAT, HALF = 4, 2  # bytes
UPDATED = 40  # bytes of memory traffic for each weight in clipping (12), an optimiser (16 and more) and averaging (12)
RECOMPUTED = 4 / 3  # forward passes and backward passes with checkpointing over those without


@dataclass(frozen=True)
class Cluster:
    """GPUs and their links: bytes a second that a GPU attains in one direction, within a node and between nodes."""

    gpus: int
    per_node: int = 8
    within: float = 300e9  # 450e9 are stated for the H100's NVLink
    between: float = 40e9  # 50e9 are stated for an adapter of 400 Gb/s for each GPU

    @property
    def local(self) -> int:
        """The GPUs of a node that take part."""
        return min(self.gpus, self.per_node)

    @property
    def nodes(self) -> int:
        """The nodes that take part."""
        return math.ceil(self.gpus / self.per_node)

    def gather_seconds(self, size: float) -> float:
        """Return the seconds of an all-gather to, or a reduce-scatter from, `size` bytes on every GPU."""
        g, n = self.local, self.nodes
        return size * ((g - 1) / g / self.within + (n - 1) / n / g / self.between)

    def reduce_seconds(self, size: float) -> float:
        """Return the seconds of an all-reduce of `size` bytes."""
        return 2 * self.gather_seconds(size)

    def scatter_seconds(self, size: float) -> float:
        """Return the seconds in which one GPU gives each other its part of `size` bytes: over its own links alone."""
        g = self.local
        return size * ((g - 1) / self.gpus / self.within + (self.gpus - g) / self.gpus / self.between)


@dataclass(frozen=True)
class Speed:
    """What one GPU does: the limit of products in FLOP/s, the share of it that training attains, bytes a second of memory."""

    peak: float
    mfu: float
    muon_share: float = 0.5  # share of the limit that products of stacked matrices reach
    memory: float = 2.7e12  # 3.35e12 are stated for the H100


@dataclass(frozen=True)
class Model:
    """What a training step moves and computes on each GPU."""

    in_blocks: int  # weights that FSDP2 gathers in bfloat16
    outside: int  # weights that it gathers in float32
    matrices: int  # weights that Muon trains
    count: int  # number of Muon's matrices
    muon_flops: float
    clip_flops: float  # model FLOPs of a clip, forward and backward
    clips: int  # clips of a step on each GPU
    recomputes: bool

    @property
    def weights(self) -> int:
        """All weights."""
        return self.in_blocks + self.outside


@dataclass(frozen=True)
class Step:
    """Seconds of the parts of a training step."""

    compute: float  # forward and backward pass
    hidden: float  # communication that may run beside them
    update: float  # clipping, optimisers, averages
    exposed: float  # communication within the update, which nothing runs beside

    @property
    def fastest(self) -> float:
        """Seconds where communication runs beside computing as far as it can."""
        return max(self.compute, self.hidden) + self.update + self.exposed

    @property
    def slowest(self) -> float:
        """Seconds where nothing overlaps."""
        return self.compute + self.hidden + self.update + self.exposed


def ddp_step(model: Model, speed: Speed, cluster: Cluster) -> Step:
    """Return a step in which every GPU holds all: float32 gradients are all-reduced, and each GPU does all of the update."""
    return Step(
        _compute(model, speed),
        cluster.reduce_seconds(FLOAT * model.weights),
        model.muon_flops / (speed.muon_share * speed.peak) + UPDATED * model.weights / speed.memory,
        0.0,
    )


def fsdp2_step(model: Model, speed: Speed, cluster: Cluster) -> Step:
    """Return a step in which every GPU holds a part, as training/fsdp.py and Muon do it.

    Weights are gathered for the forward and for the backward pass, float32 gradients reduce-scattered. For Muon each matrix is
    gathered in bfloat16; one GPU orthogonalises it whole and gives the others their parts in float32, matrix after matrix.
    """
    gathered = 2 * (HALF * model.in_blocks + FLOAT * model.outside)
    largest = math.ceil(model.count / cluster.gpus) / max(1, model.count)  # share of Muon's products on the busiest GPU
    muon = largest * model.muon_flops / (speed.muon_share * speed.peak)
    several = cluster.gpus > 1
    return Step(
        _compute(model, speed),
        cluster.gather_seconds(gathered) + cluster.gather_seconds(FLOAT * model.weights),
        muon + UPDATED * model.weights / cluster.gpus / speed.memory,
        several * (cluster.gather_seconds(HALF * model.matrices) + cluster.scatter_seconds(FLOAT * model.matrices)),
    )


def sent_bytes(model: Model, cluster: Cluster, sharded: bool) -> float:
    """Return the bytes that each GPU sends in a step, Muon's included."""
    rest = (cluster.gpus - 1) / cluster.gpus
    if not sharded:
        return rest * 2 * FLOAT * model.weights
    weights = 2 * (HALF * model.in_blocks + FLOAT * model.outside) + FLOAT * model.weights
    return rest * (weights + HALF * model.matrices + FLOAT * model.matrices / cluster.gpus)


def clips_per_second(model: Model, seconds: float, cluster: Cluster) -> float:
    """Return the clips a second of all GPUs together."""
    return cluster.gpus * model.clips / seconds


def models_of(config: DiffusionConfig, runs: Sequence[tuple[int, int]], text_width: int = 4096) -> list[Model]:
    """Return what a preset's transformer moves and computes for each (ratio, clips); frozen text encoders have that width.

    Raises UserError for a configuration without a transformer of its own.
    """
    shape = config.own_model
    widths, pooled, lengths = text_shape(config, text_width)
    with torch.device("meta"):
        transformer = transformer_alone(shape, widths, pooled)
    blocks: nn.Module = transformer.transformer_blocks
    in_blocks, every = (sum(p.numel() for p in module.parameters()) for module in (blocks, transformer))
    matrices = hidden_matrices(transformer) if config.optimization.muon_learning_rate else []
    clip, patch = config.data.default_bucket, shape.patch_size
    return [
        Model(
            in_blocks,
            every - in_blocks,
            sum(matrix.numel() for matrix in matrices),
            len(matrices),
            sum(muon_flops(matrix.shape) for matrix in matrices),
            training_flops(transformer.config, tokens(clip.frames, clip.height, clip.width, ratio, patch), lengths),
            clips,
            config.gradient_checkpointing,
        )
        for ratio, clips in runs
    ]


def _compute(model: Model, speed: Speed) -> float:
    factor = RECOMPUTED if model.recomputes else 1.0
    return factor * model.clips * model.clip_flops / (speed.peak * speed.mfu)
