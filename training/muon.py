"""Muon for weights of any number of axes: a convolution kernel counts as the matrix of its outputs by all else."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Muon(torch.optim.Muon):
    """Orthogonalised momentum (Jordan et al. 2024) by torch.optim.Muon, which takes matrices alone.

    Args:
        weights: at least two axes, outputs first, in the memory layout and on the device where they will stay.
        options: those of torch.optim.Muon.

    `weights` are trained in place. The optimiser's own parameters are their matrix views, in the same order, and its state
    has the shape of those.
    """

    def __init__(self, weights: Iterable[nn.Parameter], **options: Any):
        self.weights = list(weights)
        views = [nn.Parameter(_matrix(weight.data, weight)) for weight in self.weights]
        for view, weight in zip(views, self.weights, strict=True):
            if view.data_ptr() != weight.data_ptr():
                raise ValueError(
                    f"weight of shape {tuple(weight.shape)}, strides {weight.stride()}: no matrix view of it exists"
                )
        super().__init__(views, **options)

    @property
    def _views(self) -> list[nn.Parameter]:
        return self.param_groups[0]["params"]

    def step(self, closure: Any = None) -> Any:
        """Take one step with the gradients that the weights hold now."""
        for view, weight in zip(self._views, self.weights, strict=True):
            view.grad = None if weight.grad is None else _matrix(weight.grad, weight)
        return super().step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of the weights, or set them to zero."""
        super().zero_grad()
        for weight in self.weights:
            if set_to_none:
                weight.grad = None
            elif weight.grad is not None:
                weight.grad.zero_()


def _matrix(tensor: Tensor, weight: Tensor) -> Tensor:
    """Return out x rest of a tensor shaped like `weight`, whose memory order decides the order of columns."""
    if weight.ndim > 2 and not weight.is_contiguous():
        tensor = tensor.movedim(1, -1)  # channels last
    return tensor.flatten(1)
