"""The endless stream of batches that a trainer reads, from one dataset or a mixture of several.

Which clips a batch holds, and how each is cropped, is decided by the batch's address alone (epochs.py), so a run continues at
any step, with any number of loader workers, on the same data.

Shapes: C T H W of items, B C T H W of batches.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from .epochs import ClipOrder, Interleaving


class Clips(Protocol):
    """A dataset whose clips are shown by their number; `weights` says how often each comes in an epoch, None once each."""

    weights: np.ndarray | None

    def __len__(self) -> int:
        """Count the clips."""
        ...

    def item(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """Return an element made of clip `index`, where `rng` decides all else."""
        ...


class BatchSource(Protocol):
    """A source of batches for a stream."""

    def items(self, seed: int, step: int, slot: int, batches_per_step: int, batch_size: int) -> list[dict[str, Any]]:
        """Return the elements of one batch of a step, each with `sample`, its number in the training."""
        ...


class Mixture:
    """Several datasets of which each step draws from one by their shares; all batches of a step come from the same one.

    The clips of each dataset come by epochs, whatever the others' shares.

    Args:
        datasets: the datasets to draw from.
        shares: each dataset's share of the steps, above 0; they need not add up to 1.
        batch_sizes: batch size of each dataset; None uses the stream's.
        orders: datasets with the same number here hold the same clips, seen in several ways (at several temporal ratios), and
            share one order: a clip comes once an epoch, from any of them. None keeps all apart.

    Raises ValueError for shares that are not positive or not as many as the datasets, and for datasets of one order that differ
    in clips or batch size.
    """

    def __init__(
        self,
        datasets: Sequence[Clips],
        shares: Sequence[float],
        batch_sizes: Sequence[int | None] | None = None,
        orders: Sequence[int] | None = None,
    ):
        if len(datasets) != len(shares) or not datasets or min(shares) <= 0:
            raise ValueError(f"{len(datasets)} datasets with shares {list(shares)}: one share above 0 for each is needed")
        self.datasets, self.shares = list(datasets), [share / sum(shares) for share in shares]
        self.batch_sizes = batch_sizes or [None] * len(datasets)
        orders = list(range(len(datasets)) if orders is None else orders)
        self._alike = [[k for k, other in enumerate(orders) if other == order] for order in orders]
        for first, *others in self._alike:
            same = [(len(datasets[k]), self.batch_sizes[k]) for k in (first, *others)]
            if len(set(same)) > 1:
                raise ValueError(f"datasets of one order with (clips, batch size) {same}: they must be equal")
        self._planned: tuple[int, Interleaving, list[ClipOrder]] | None = None  # for one seed

    def choose(self, seed: int, step: int) -> int:
        """Return the number of the dataset that a step draws from."""
        return self._plan(seed)[0].source(step)

    def items(self, seed: int, step: int, slot: int, batches_per_step: int, batch_size: int) -> list[dict[str, Any]]:
        """Return the elements of one batch of a step: slot 0 to `batches_per_step` - 1.

        `batch_size` is that of datasets that state none. Sample n of the training is shown by `default_rng((seed, n))`.
        """
        sources, orders = self._plan(seed)
        chosen = sources.source(step)
        size = self.batch_sizes[chosen] or batch_size
        before = sum(sources.earlier(k, step) for k in self._alike[chosen]) * batches_per_step * size
        first = step * batches_per_step * max(other or batch_size for other in self.batch_sizes)
        dataset, order = self.datasets[chosen], orders[self._alike[chosen][0]]
        return [
            {"sample": first + n, **dataset.item(order.clip(before + n), np.random.default_rng((seed, first + n)))}
            for n in range(slot * size, (slot + 1) * size)
        ]

    def _plan(self, seed: int) -> tuple[Interleaving, list[ClipOrder]]:
        if self._planned is None or self._planned[0] != seed:
            orders = [ClipOrder(len(clips), seed, number, clips.weights) for number, clips in enumerate(self.datasets)]
            self._planned = seed, Interleaving(self.shares, seed), orders
        return self._planned[1:]


@dataclass(frozen=True)
class FirstThen:
    """A source for the first steps of a training and another one for all later steps; each numbers its own samples."""

    first: BatchSource
    steps: int
    then: BatchSource

    def items(self, seed: int, step: int, slot: int, batches_per_step: int, batch_size: int) -> list[dict[str, Any]]:
        """Return the elements of one batch of a step."""
        source = self.first if step < self.steps else self.then
        return source.items(seed, step, slot, batches_per_step, batch_size)


@dataclass(frozen=True)
class DrawnClips:
    """The clips that a training of batches of one would be shown: clip i is its i-th, cut and ordered as it would be.

    The source's buckets must state no batch sizes of their own: those would be what a step takes.
    """

    source: BatchSource
    seed: int

    def fixed(self, index: int) -> dict[str, Any]:
        """Return clip `index`."""
        return self.source.items(self.seed, index, 0, 1, 1)[0]


class TrainingStream(IterableDataset):
    """An endless stream of batches for one rank, from `first_batch` on; a batch depends on nothing but its address.

    Samples are numbered through the whole training, step by step and in a step batch by batch: the first batches of all ranks,
    then the next of `accumulate`. So ranks and accumulation may be traded against each other, and against the batch size too
    except with shards, whose order is that of batches (epochs.py). Where buckets have batch sizes of their own, every step has
    as many numbers as one of the largest. FirstThen's sources each number all steps of the training that way, so where their
    largest batches differ, numbers are left out or come twice.

    Read it through `DataLoader(stream, batch_size=None, num_workers=any)`: batches come in their order. A batch holds the keys
    of an item, collated (video B C T H W, caption a list, numbers as tensors), step, and sample: the numbers.

    Args:
        dataset: the clips, or the mixture, to draw from.
        seed: decides all that is drawn.
        batch_size: elements of a batch where the dataset states none.
        rank: number of this process.
        world_size: ranks.
        first_batch: this rank's first batch, counted from the start of the training; a step has `accumulate` of them.
        accumulate: batches of a rank in a step.
    """

    def __init__(
        self,
        dataset: Clips | BatchSource,
        seed: int,
        batch_size: int,
        rank: int,
        world_size: int,
        first_batch: int = 0,
        accumulate: int = 1,
    ):
        if not 0 <= rank < world_size or min(batch_size, accumulate) < 1 or seed < 0 or first_batch < 0:
            raise ValueError(
                f"rank {rank} of {world_size}, batch_size {batch_size}, accumulate {accumulate}, seed {seed}, first_batch "
                f"{first_batch}: 0 <= rank < world_size, batch_size and accumulate >= 1, seed and first_batch >= 0 are legal"
            )
        self.dataset: Any = dataset if hasattr(dataset, "items") else Mixture([dataset], [1.0])  # pyright: ignore
        self.seed, self.batch_size, self.rank, self.world_size = seed, batch_size, rank, world_size
        self.first_batch, self.accumulate = first_batch, accumulate

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield this worker's share: worker w of W makes the whole batches first_batch + w, + W, ..."""
        worker = get_worker_info()
        number, stride = (self.first_batch + worker.id, worker.num_workers) if worker else (self.first_batch, 1)
        while True:
            yield self.batch(number)
            number += stride

    def batch(self, number: int) -> dict[str, Any]:
        """Return one batch of this rank."""
        step, part = divmod(number, self.accumulate)
        slot, batches_per_step = part * self.world_size + self.rank, self.world_size * self.accumulate
        items = self.dataset.items(self.seed, step, slot, batches_per_step, self.batch_size)
        return {"step": step, **{key: _collate([item[key] for item in items]) for key in items[0]}}


def _collate(values: list[Any]) -> Any:
    if isinstance(values[0], Tensor):
        return torch.stack(values)
    return values if isinstance(values[0], str) else torch.tensor(values)
