"""What memory training a text-to-video transformer takes: what stays from step to step, and what a batch's gradients need.

Counted, not read from an allocator: what stays is arithmetic on parameter counts, and what the forward pass keeps for the
backward pass is seen by hooks. Both work on models without data, so a model needs not fit here to be counted.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from promag.diffusion.config import DiffusionConfig, TextConfig, TransformerConfig
from promag.diffusion.text import learn_vocabulary, small_clip
from promag.diffusion.transformer import ProMAGAttention, ProMAGTransformer3DModel

from .cost import random_loss

FLOAT = 4  # bytes: weights, gradients, moments and averages are float32
BACKEND = "native"  # PyTorch's fused attention: like a GPU's kernels it keeps no scores


@dataclass(frozen=True)
class Standing:
    """Bytes that stay from step to step, on every process."""

    weights: int
    gradients: int
    optimizer: int
    ema: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.optimizer + self.ema


@dataclass(frozen=True)
class Activations:
    """Bytes that the forward pass keeps for the backward pass."""

    per_clip: int
    per_clip_checkpointed: int  # with one block's, computed again, at its height
    per_step: int  # whatever the batch: autocast's bf16 copies of weights


@dataclass(frozen=True)
class Spread:
    """Bytes on each process where FSDP2 spreads a transformer and the text model trained along over several."""

    stays: int  # weights, gradients, moments and averages, on the process that holds most
    gathered: int  # at most: what is outside of blocks, two blocks, and gradients of what is being averaged

    @property
    def total(self) -> int:
        """All of them."""
        return self.stays + self.gathered


def spread_bytes(
    transformer: ProMAGTransformer3DModel, text: Iterable[nn.Parameter], by_muon: Iterable[nn.Parameter], world: int
) -> Spread:
    """Return what each of `world` processes holds under bf16: rows are divided, and rounded up."""
    theirs = {id(p) for p in by_muon}
    trained = [*transformer.parameters(), *text]
    parts = [(-(-p.shape[0] // world) * p[0].numel(), 4 if id(p) in theirs else 5) for p in trained]
    block = sum(p.numel() for p in transformer.transformer_blocks[0].parameters())
    outside = sum(p.numel() for p in trained) - len(transformer.transformer_blocks) * block
    # Outside of blocks weights and gradients are float32. The next block is gathered, in bfloat16, while one computes; that
    # one's gradients are in bfloat16, and once more in float32 while they are averaged.
    return Spread(FLOAT * sum(size * times for size, times in parts), 2 * FLOAT * outside + (2 * 2 + 2 + FLOAT) * block)


def standing_bytes(trained: Iterable[nn.Parameter], by_muon: Iterable[nn.Parameter]) -> Standing:
    """Return what `trained` weights take, with one moment for those that Muon trains and two, and a step, for the rest."""
    by_muon = list(by_muon)
    theirs = {id(p) for p in by_muon}
    rest = [p for p in trained if id(p) not in theirs]
    ones, twos = (sum(p.numel() for p in group) for group in (by_muon, rest))
    weights = FLOAT * (ones + twos)
    return Standing(weights, weights, FLOAT * (ones + 2 * twos + len(rest)), weights)


def transformer_alone(model: TransformerConfig, text_dims: list[int], pooled: int) -> ProMAGTransformer3DModel:
    """Return an untrained transformer on the device that is in force, for text encoders of these widths."""
    transformer = ProMAGTransformer3DModel(**asdict(model), text_dim=text_dims, pooled_dim=pooled)
    for module in transformer.modules():
        if isinstance(module, ProMAGAttention):
            module.set_attention_backend(BACKEND)
    return transformer


def small_text(text: TextConfig) -> list[nn.Parameter]:
    """Return the weights of the text model that is trained along, with the largest vocabulary it may have; none without one."""
    if text.small is None:
        return []
    tokenizer = learn_vocabulary([], text.vocabulary, text.small.max_length)
    model = small_clip(tokenizer, text.width, text.layers, text.heads)
    model.resize_token_embeddings(text.vocabulary, mean_resizing=False)
    return list(model.parameters())


def text_shape(config: DiffusionConfig, frozen_width: int) -> tuple[list[int], int, list[int]]:
    """Return widths, pooled width and tokens of a configuration's text encoders, frozen ones being T5s of that width."""
    text = config.text
    widths = [text.width if encoder == text.small else frozen_width for encoder in text.encoders]
    return widths, text.width if text.small else 0, [encoder.max_length for encoder in text.encoders]


def activation_bytes(config: DiffusionConfig, frozen_width: int, ratio: int, size: int, fake: bool = True) -> Activations:
    """Count what one step at `data.frames` frames of `size` squared keeps, on tensors without data where `fake`.

    Raises ValueError for a configuration without a transformer of its own.
    """
    if config.model is None:
        raise ValueError("model null: a configuration with a transformer of its own is needed")
    widths, pooled, tokens = text_shape(config, frozen_width)

    def saved(model: TransformerConfig, batch: int, checkpointing: bool) -> int:
        with FakeTensorMode() if fake else contextlib.nullcontext():
            transformer = transformer_alone(model, widths, pooled)
            if checkpointing:
                transformer.enable_gradient_checkpointing()
            loss = random_loss(transformer, config.data.frames, size, size, ratio, batch, tokens, precision="bf16")
            return saved_bytes(loss, transformer)

    shallower = replace(config.model, num_layers=config.model.num_layers - 1)
    one, two = (saved(config.model, batch, False) for batch in (2, 3))
    block = two - one - (saved(shallower, 3, False) - saved(shallower, 2, False))
    checkpointed = saved(config.model, 3, True) - saved(config.model, 2, True)
    return Activations(two - one, checkpointed + block, one - 2 * (two - one))


def saved_bytes(loss: Callable[[], Tensor], model: nn.Module) -> int:
    """Return the bytes that the graph of `loss()` keeps beside the weights, each stretch of memory counted once."""
    weights = {_memory(p) for p in model.parameters()}
    with _saved() as kept:
        graph = loss()
    del graph
    return sum(storage.nbytes() for place, storage in kept.items() if place not in weights)


@contextlib.contextmanager
def _saved() -> Iterator[dict[int, Any]]:
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[_memory(tensor)] = tensor.untyped_storage()  # held, so that its place is not given to another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
