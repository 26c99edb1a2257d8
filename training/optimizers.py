"""Optimisation of one stage: settings, learning rates, and the optimisers, AdamW alone or with Muon for the matrices."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed import get_rank, get_world_size
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim._muon import _adjust_lr

from .config import UserError, setting
from .fsdp import as_dtensor, full, local_shard, shard_like
from .precision import DTYPES, Chosen

if TYPE_CHECKING:
    from .loop import Objective

BATCHED = 2**26  # numbers of the matrices that one product holds: 0.1 GB in bfloat16, and some copies
NEWTON_SCHULZ_STEPS = 4  # one fewer than Muon's authors', a fifth cheaper; singular values end a little less alike


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    """Settings for optimising one stage."""

    steps: int = setting(10_000, "optimiser steps of the stage")
    batch_size: int = setting(4, "clips per process and batch")
    accumulate: int = setting(1, "batches of which one step averages the gradients")
    learning_rate: float = setting(4e-4, "peak of the schedule")
    warmup: int = setting(200, "steps of linear warm-up")
    schedule: Literal["cosine", "linear", "constant"] = setting(
        "cosine", "after the warm-up: down to 5 % of the peak, or constant"
    )
    weight_decay: float = setting(0.01, "decoupled, as in AdamW")
    clip_norm: float = setting(1.0, "largest gradient norm; .inf clips nothing")
    ema_decay: float = setting(0.999, "highest decay of the averaged weights")
    max_skipped: int = setting(
        10, "steps in a row with a loss or gradient that is not finite before training ends; each is skipped"
    )
    muon_learning_rate: float | None = setting(
        None, "peak rate of Muon for hidden matrices and convolution kernels; null: AdamW for these too"
    )

    def __post_init__(self) -> None:
        """Raise ValueError for a setting that cannot be meant."""
        for name in ("steps", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: at least 1 is needed")
        for name in ("warmup", "weight_decay", "max_skipped"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name} {value}: must be 0 or above, and finite")
        for name in ("learning_rate", "muon_learning_rate"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} {value}: must be above 0, and finite")
        if not self.clip_norm > 0:
            raise ValueError(f"clip_norm {self.clip_norm}: must be above 0; .inf clips nothing")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay {self.ema_decay}: must be in [0, 1)")

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of step 0, 1, ..."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.learning_rate
        along = (step - self.warmup) / max(1, self.steps - self.warmup)
        left = 1 - along if self.schedule == "linear" else (1 + math.cos(math.pi * along)) / 2
        return self.learning_rate * (0.05 + 0.95 * left)


def make_optimizers(
    objective: "Objective", settings: OptimizationConfig, precision: Chosen = "bf16"
) -> list[torch.optim.Optimizer]:
    """Return AdamW and, where asked for, Muon for the objective's matrices; call it when the weights are where they will stay.

    Muon orthogonalises in `precision`: processors that only emulate bfloat16 would spend more time on it than on the model.
    A group's `factor` is its learning rate over the schedule's. Raises UserError where Muon has nothing to train.
    """
    factors = {id(p): factor for module, factor in objective.learning_rate_scales() for p in module.parameters()}
    matrices = [] if settings.muon_learning_rate is None else [p for p in objective.matrices() if p.requires_grad]
    if settings.muon_learning_rate is not None and not matrices:
        raise UserError(
            f"muon_learning_rate {settings.muon_learning_rate}: nothing here has matrices that Muon may train; set it to null"
        )
    muon_ids = {id(p) for p in matrices}
    rest = [p for p in objective.parameters() if p.requires_grad and id(p) not in muon_ids]
    optimizers: list[torch.optim.Optimizer] = []
    if rest:  # adapters may be matrices alone
        groups, options = _groups(rest, factors, 1.0), {"betas": (0.9, 0.99), "weight_decay": settings.weight_decay}
        optimizers.append(torch.optim.AdamW(groups, settings.learning_rate, **options, fused=True))
    if settings.muon_learning_rate is not None:
        groups = _groups(matrices, factors, settings.muon_learning_rate / settings.learning_rate)
        options = {"weight_decay": settings.weight_decay, "ns_steps": NEWTON_SCHULZ_STEPS, "dtype": DTYPES[precision]}
        optimizers.append(Muon(groups, lr=settings.muon_learning_rate, **options))
    return optimizers


def _groups(weights: Iterable[nn.Parameter], factors: dict[int, float], rate: float) -> list[dict[str, Any]]:
    """Gather weights of one factor each; `rate` is what a weight without a factor of its own has."""
    by_scale: dict[float, list[nn.Parameter]] = {}
    for weight in weights:
        by_scale.setdefault(rate * factors.get(id(weight), 1.0), []).append(weight)
    return [{"params": group, "factor": factor} for factor, group in by_scale.items()]


def muon_flops(shape: Sequence[int], precision: Chosen = "bf16") -> float:
    """Return the FLOPs of orthogonalising a matrix of that shape in a step of Muon, whose products are in `precision`.

    A product of k Newton-Schulz steps takes a Gram matrix, 4 k - 3 products of such matrices, and one with the matrix.
    """
    short, long = sorted(shape)
    at_once = _steps_at_once(NEWTON_SCHULZ_STEPS, short, long, DTYPES[precision])
    return float(sum(4 * short**2 * long + 2 * (4 * steps - 3) * short**3 for steps in at_once))


def weights_and_keys(optimizer: torch.optim.Optimizer) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Return the pairs of a trained weight and its key in the optimiser's state, in the order of the state's numbers."""
    keys = [p for group in optimizer.param_groups for p in group["params"]]
    return list(zip(optimizer.weights if isinstance(optimizer, Muon) else keys, keys, strict=True))


def to_saved(optimizer: torch.optim.Optimizer, value: Tensor, weight: Tensor) -> Tensor:
    """Return a moment as checkpoints hold it: shaped like its weight, whatever the weight's memory layout.

    The moment of a sharded weight is sharded likewise (fsdp.py).
    """
    if isinstance(weight, DTensor):
        return as_dtensor(value, weight) if isinstance(optimizer, Muon) else value
    if not isinstance(optimizer, Muon) or not _channels_last(weight):
        return value.view_as(weight) if value.numel() == weight.numel() else value
    return value.unflatten(1, (*weight.shape[2:], weight.shape[1])).movedim(-1, 1)


def from_saved(optimizer: torch.optim.Optimizer, value: Tensor, weight: Tensor) -> Tensor:
    """Invert `to_saved`, also for another memory layout or sharding; `value` is full on every process."""
    if value.shape != weight.shape:
        return value
    if isinstance(weight, DTensor):
        spread: Any = shard_like(value, weight)
        return spread.to_local() if isinstance(optimizer, Muon) else spread
    # The fused AdamW walks weights and moments in memory order: both must have the weights' layout.
    laid_out = torch.empty_like(weight, dtype=value.dtype).copy_(value)
    return _matrix(laid_out, weight).clone() if isinstance(optimizer, Muon) else laid_out


class Muon(torch.optim.Muon):
    """Orthogonalised momentum (Jordan et al. 2024) by torch.optim.Muon, which takes matrices alone.

    Args:
        weights: at least two axes, outputs first, in the memory layout and on the device where they will stay; or groups
            of them, as torch's optimisers take.
        dtype: type in which matrices are orthogonalised; torch.optim.Muon always takes bfloat16.
        options: keyword arguments of torch.optim.Muon.

    `weights` are trained in place. The optimiser's own parameters are their matrix views, in the same order, and its state
    has the shape of those. Of weights that are spread over processes (fsdp.py), which must be matrices, they are the parts
    that this process holds; each process orthogonalises some of the matrices whole and gives the others their parts.

    `found_inf` is what it is to torch's fused optimisers: a scalar on the weights' device, or None. Where it is 1, a step
    leaves weights and momenta as they are, whatever the gradients, which it may overwrite.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        weights: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        dtype: torch.dtype = torch.bfloat16,
        **options: Any,
    ):
        items: list[Any] = list(weights)
        groups = items if items and isinstance(items[0], dict) else [{"params": items}]
        self.weights: list[nn.Parameter] = [weight for group in groups for weight in group["params"]]
        views = [nn.Parameter(_matrix(local_shard(weight).data, weight)) for weight in self.weights]
        for view, weight in zip(views, self.weights, strict=True):
            if view.data_ptr() != local_shard(weight).data_ptr() or (isinstance(weight, DTensor) and weight.ndim != 2):
                raise ValueError(
                    f"weight of shape {tuple(weight.shape)}, strides {weight.stride()}: no matrix view of it exists"
                )
        self.dtype = dtype
        rest = iter(views)
        super().__init__([{**group, "params": [next(rest) for _ in group["params"]]} for group in groups], **options)

    @property
    def _views(self) -> list[nn.Parameter]:
        return [view for group in self.param_groups for view in group["params"]]

    def step(self, closure: Any = None) -> Any:
        """Take one step with the gradients that the weights hold now."""
        spread = {}
        for view, weight in zip(self._views, self.weights, strict=True):
            if view.data_ptr() != local_shard(weight).data_ptr():
                raise RuntimeError(
                    f"weight of shape {tuple(weight.shape)} lies elsewhere now: build the optimiser after moving it"
                )
            if isinstance(weight, DTensor):
                spread[view] = weight
            gradient: Any = weight.grad
            if gradient is not None:
                gradient = gradient._local_tensor if isinstance(gradient, DTensor) else _matrix(gradient, weight)
            view.grad = gradient
        if not spread:
            return self._step_in_batches()
        for group in self.param_groups:
            views = [view for view in group["params"] if view.grad is not None]
            for first in range(0, len(views), get_world_size()):
                self._step_of_parts({view: spread[view] for view in views[first : first + get_world_size()]}, group)
        return None

    @torch.no_grad()
    def _step_in_batches(self) -> None:
        """Do what torch.optim.Muon does matrix by matrix, with all matrices of a shape in one product.

        A GPU would wait for hundreds of small products to be started, and the cores of a CPU share one of them badly.
        """
        for group in self.param_groups:
            views = [view for view in group["params"] if view.grad is not None]
            if not views:
                continue
            gradients: list[Any] = [view.grad for view in views]
            momenta = [self._momentum(view) for view in views]
            lr = self._skip_if_bad(gradients, momenta, group["lr"])
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            updates = torch._foreach_lerp(gradients, momenta, group["momentum"]) if group["nesterov"] else momenta
            torch._foreach_mul_(views, 1 - lr * group["weight_decay"])
            for batch in _batches([tuple(view.shape) for view in views]):
                rows, columns = views[batch[0]].shape
                matrices = torch.empty(len(batch), rows, columns, dtype=self.dtype, device=views[batch[0]].device)
                torch._foreach_copy_(list(matrices.unbind()), [updates[i] for i in batch])
                step = _orthogonal(matrices, group).float()
                rate = _adjust_lr(lr, group["adjust_lr_fn"], torch.Size((rows, columns)))
                if isinstance(rate, Tensor):
                    step, rate = step.mul_(rate), 1.0
                torch._foreach_add_([views[i] for i in batch], list(step.unbind()), alpha=-rate)

    @torch.no_grad()
    def _step_of_parts(self, weights: Mapping[nn.Parameter, Any], group: Mapping[str, Any]) -> None:
        """Take a step of at most as many matrices as there are processes, given by the parts held here; one for each."""
        mine: Tensor | None = None
        gradients: list[Any] = [view.grad for view in weights]
        lr = self._skip_if_bad(gradients, [self._momentum(view) for view in weights], group["lr"])
        for owner, (view, weight) in enumerate(weights.items()):
            momentum: Any = self._momentum(view)
            momentum.lerp_(view.grad, 1 - group["momentum"])
            update = view.grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum  # pyright: ignore
            whole = full(as_dtensor(update.to(self.dtype), weight))  # Newton-Schulz begins with that rounding
            mine = whole.float() if owner == get_rank() else mine
        # All have what they need before any begins: the products of one overlap with those of the others.
        step = None if mine is None else _orthogonal_step(mine, group, self.dtype)
        for owner, (view, weight) in enumerate(weights.items()):
            whole = step if owner == get_rank() and step is not None else torch.empty(weight.shape, device=view.device)
            part: Any = distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=owner)
            view.mul_(1 - lr * group["weight_decay"]).add_(part.to_local() * lr)

    def _skip_if_bad(self, gradients: Sequence[Tensor], momenta: Sequence[Tensor], lr: Any) -> Any:
        """Where `found_inf` is 1, put the momenta in place of the gradients; return the learning rate, or then 0."""
        if self.found_inf is None:
            return lr
        for gradient, momentum in zip(gradients, momenta, strict=True):
            torch.where(self.found_inf.bool(), momentum, gradient, out=gradient)
        return lr * (1 - self.found_inf)

    def _momentum(self, view: nn.Parameter) -> Any:
        """Return a matrix's momentum, made of zeros in its first step."""
        state = self.state[view]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(view)
        return state["momentum_buffer"]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of the weights, or set them to zero."""
        super().zero_grad()
        for weight in self.weights:
            if set_to_none:
                weight.grad = None
            elif weight.grad is not None:
                weight.grad.zero_()


def _batches(shapes: list[tuple[int, ...]]) -> list[list[int]]:
    """Group the numbers of matrices by shape, so many that their numbers stay below BATCHED."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for number, shape in enumerate(shapes):
        by_shape.setdefault(shape, []).append(number)
    pairs = ((numbers, max(1, BATCHED // prod(shape))) for shape, numbers in by_shape.items())
    return [numbers[i : i + size] for numbers, size in pairs for i in range(0, len(numbers), size)]


def _orthogonal(updates: Tensor, group: Mapping[str, Any]) -> Tensor:
    """Orthogonalise matrices B rows columns by Newton-Schulz steps in their type, as torch.optim.Muon does one.

    A step multiplies the matrices by a I + b G + c G^2, G their Gram matrix. Such factors commute, and the step turns G into
    factor^2 G, so those of several steps are multiplied first: Gram matrices are small where the matrices are long
    (https://tridao.me/blog/2026/gram-newton-schulz).
    """
    a, b, c = group["ns_coefficients"]
    x = updates.mT if updates.shape[1] > updates.shape[2] else updates
    x = x / x.flatten(1).norm(dim=1).clamp(min=group["eps"])[:, None, None]
    for steps in _steps_at_once(group["ns_steps"], x.shape[1], x.shape[2], x.dtype):
        gram = x @ x.mT
        rest = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # the factor is a I + rest
        if steps == 1:
            x = torch.baddbmm(x, rest, x, beta=a)
            continue
        factors = rest.clone()
        factors.diagonal(dim1=1, dim2=2).add_(a)
        for _ in range(steps - 1):
            for _ in range(2):
                gram = torch.baddbmm(gram, rest, gram, beta=a)
            rest = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            factors = torch.baddbmm(factors, rest, factors, beta=a)
        x = factors @ x
    return x.mT if updates.shape[1] > updates.shape[2] else x


def _steps_at_once(steps: int, rows: int, columns: int, dtype: torch.dtype) -> list[int]:
    """Divide the Newton-Schulz steps of matrices, not higher than wide, into those that one Gram matrix serves.

    Several at once save little or nothing for matrices that are not long. In bfloat16 a third one would blow up the rounding
    of the Gram matrix, whose smallest eigenvalues it makes negative.
    """
    most = 1 if columns < 4 * rows else 4 if dtype == torch.float32 else 2
    return [min(most, steps - first) for first in range(0, steps, most)]


def _orthogonal_step(update: Tensor, group: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    """Return the update of torch.optim.Muon at a learning rate of 1."""
    return -_adjust_lr(1.0, group["adjust_lr_fn"], update.shape) * _orthogonal(update[None].to(dtype), group)[0].float()


def _matrix(tensor: Tensor, weight: Tensor) -> Tensor:
    """Return out x rest of a tensor shaped like `weight`, whose memory order decides the order of columns."""
    return (tensor.movedim(1, -1) if _channels_last(weight) else tensor).flatten(1)


def _channels_last(weight: Tensor) -> bool:
    return weight.ndim > 2 and not weight.is_contiguous()
