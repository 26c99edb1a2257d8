"""Memory of training a text-to-video transformer: weights, gradients, moments and averages, and a batch's activations.

It is counted, not read from an allocator: static memory follows from parameter counts, and hooks see what the forward pass
saves for the backward pass. Both work on tensors without data, so that a model can be counted that would not fit here.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from promag.data.buckets import sides
from promag.diffusion.config import DiffusionConfig, TextConfig, TransformerConfig
from promag.diffusion.text import learn_vocabulary, small_clip
from promag.diffusion.transformer import ProMAGAttention, ProMAGTransformer3DModel

from .budgets import CodedSize
from .cost import random_loss

FLOAT = 4  # bytes; weights, gradients, moments and averages are float32
BACKEND = "native"  # PyTorch's fused attention, which like a GPU's kernels saves no scores


@dataclass(frozen=True)
class StaticMemory:
    """Bytes that every process holds throughout training."""

    weights: int
    gradients: int
    optimizer: int
    ema: int

    @property
    def total(self) -> int:
        """The sum of all."""
        return self.weights + self.gradients + self.optimizer + self.ema


@dataclass(frozen=True)
class Activations:
    """Bytes that the forward pass saves for the backward pass."""

    per_clip: int
    per_clip_checkpointed: int  # at its peak, when one block's are recomputed
    per_step: int  # for any batch size: autocast's bf16 copies of weights


@dataclass(frozen=True)
class ShardedMemory:
    """Bytes of each process where FSDP2 shards a transformer and the jointly trained text model."""

    local: int  # weights, gradients, moments and averages, on the process that holds most
    gathered: int  # at most: weights outside of blocks, two blocks, and the gradients that are being reduced

    @property
    def total(self) -> int:
        """The sum of both."""
        return self.local + self.gathered


def sharded_memory(
    transformer: ProMAGTransformer3DModel, text: Iterable[nn.Parameter], by_muon: Iterable[nn.Parameter], world: int
) -> ShardedMemory:
    """Return the memory of each of `world` processes under bf16, where the rows of each weight are divided, rounded up."""
    muon_ids = {id(p) for p in by_muon}
    trained = [*transformer.parameters(), *text]
    # Copies of a weight's size: itself, gradient, average, and one moment under Muon or two under AdamW.
    shards = [(-(-p.shape[0] // world) * p[0].numel(), 4 if id(p) in muon_ids else 5) for p in trained]
    block = sum(p.numel() for p in transformer.transformer_blocks[0].parameters())
    outside = sum(p.numel() for p in trained) - len(transformer.transformer_blocks) * block
    # Outside of blocks weights and gradients are float32. The next block is gathered in bfloat16 while the current one
    # computes; the current one's gradients are in bfloat16, and in float32 too while they are reduced.
    local = FLOAT * sum(size * copies for size, copies in shards)
    return ShardedMemory(local, 2 * FLOAT * outside + (2 * 2 + 2 + FLOAT) * block)


def static_memory(trained: Iterable[nn.Parameter], by_muon: Iterable[nn.Parameter]) -> StaticMemory:
    """Return the memory of `trained` weights: Muon keeps one moment of its own, AdamW two and a step count of the others."""
    by_muon = list(by_muon)
    muon_ids = {id(p) for p in by_muon}
    by_adamw = [p for p in trained if id(p) not in muon_ids]
    muon_size, adamw_size = (sum(p.numel() for p in group) for group in (by_muon, by_adamw))
    weights = FLOAT * (muon_size + adamw_size)
    return StaticMemory(weights, weights, FLOAT * (muon_size + 2 * adamw_size + len(by_adamw)), weights)


def transformer_alone(model: TransformerConfig, text_dims: list[int], pooled: int) -> ProMAGTransformer3DModel:
    """Return an untrained transformer on torch's default device, for text encoders of these widths."""
    transformer = ProMAGTransformer3DModel(**asdict(model), text_dim=text_dims, pooled_dim=pooled)
    for module in transformer.modules():
        if isinstance(module, ProMAGAttention):
            module.set_attention_backend(BACKEND)
    return transformer


def small_text(text: TextConfig) -> list[nn.Parameter]:
    """Return the weights of the jointly trained text model with its largest vocabulary; none if there is no such model."""
    if text.small is None:
        return []
    tokenizer = learn_vocabulary([], text.vocabulary, text.small.tokens)
    model = small_clip(tokenizer, text.width, text.layers, text.heads)
    model.resize_token_embeddings(text.vocabulary, mean_resizing=False)
    return list(model.parameters())


def text_shape(config: DiffusionConfig, frozen_width: int) -> tuple[list[int], int, list[int]]:
    """Return widths, pooled width and tokens of a configuration's text encoders; frozen ones have the given width."""
    text = config.text
    widths = [text.width if encoder == text.small else frozen_width for encoder in text.encoders]
    return widths, text.width if text.small else 0, [encoder.tokens for encoder in text.encoders]


def activation_bytes(
    config: DiffusionConfig, frozen_width: int, ratio: int, size: int | Sequence[int], fake: bool = True
) -> Activations:
    """Count the activations of a training step at `data.frames` frames of a size, on tensors without data if `fake`.

    Raises UserError for a configuration without a transformer of its own.
    """
    shape = config.own_model
    widths, pooled, tokens = text_shape(config, frozen_width)

    def saved(model: TransformerConfig, batch: int, checkpointing: bool) -> int:
        with FakeTensorMode() if fake else contextlib.nullcontext():
            transformer = transformer_alone(model, widths, pooled)
            if checkpointing:
                transformer.enable_gradient_checkpointing()
            loss = random_loss(transformer, CodedSize(config.data.frames, *sides(size), ratio), batch, tokens, "bf16")
            return saved_bytes(loss, transformer)

    shallower = replace(shape, num_layers=shape.num_layers - 1)
    two, three = (saved(shape, batch, False) for batch in (2, 3))
    per_clip = three - two
    per_block = per_clip - (saved(shallower, 3, False) - saved(shallower, 2, False))
    checkpointed = saved(shape, 3, True) - saved(shape, 2, True)
    return Activations(per_clip, checkpointed + per_block, two - 2 * per_clip)


def saved_bytes(loss: Callable[[], Tensor], model: nn.Module) -> int:
    """Return the bytes that the graph of `loss()` saves beside the weights; each storage counts once."""
    weights = {_memory(p) for p in model.parameters()}
    with _saved() as kept:
        graph = loss()
    del graph
    return sum(storage.nbytes() for address, storage in kept.items() if address not in weights)


@contextlib.contextmanager
def _saved() -> Iterator[dict[int, Any]]:
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[_memory(tensor)] = tensor.untyped_storage()  # kept alive, so that its address is not reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def peak_live_bytes(call: Callable[[], Any]) -> int:
    """Return the most bytes that the tensors made by `call()` hold at once, also where they have no data.

    What the backward pass of `call` saves and makes counts too; workspaces inside of operators do not.
    """
    with _Live() as live:
        call()
    return live.peak


class _Live(TorchDispatchMode):
    """Mode that sums the storages which operators make and which are still referred to."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {_memory(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor) and (memory := _memory(tensor)) not in inputs and memory not in self.sizes:
                self._count(tensor.untyped_storage())
        return outputs

    def _count(self, storage: Any) -> None:
        size = storage.nbytes()
        self.sizes[storage._cdata] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, storage._cdata)

    def _release(self, address: int) -> None:
        self.now -= self.sizes.pop(address)
