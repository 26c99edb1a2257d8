"""The computed memory of training equals what optimisers and graphs hold."""

from dataclasses import replace

import pytest
import torch

from promag.diffusion.config import DiffusionConfig, TransformerConfig
from promag.diffusion.families import hidden_matrices
from promag.evaluation.budgets import CodedSize
from promag.evaluation.cost import TransformerAlone, random_loss
from promag.evaluation.memory import (
    activation_bytes,
    saved_bytes,
    sharded_memory,
    small_text,
    static_memory,
    transformer_alone,
)
from promag.training.config import build, load_yaml
from promag.training.optimizers import make_optimizers

SHAPE = TransformerConfig(num_layers=3, num_attention_heads=2, attention_head_dim=8, local_convolution=True)


@pytest.fixture(scope="module")
def config() -> DiffusionConfig:
    path = "configs/diffusion/tiny.yaml"
    tiny = build(DiffusionConfig, load_yaml(path), path)
    return replace(tiny, model=SHAPE, data=replace(tiny.data, frames=17, size=32))


@pytest.mark.parametrize("muon", [None, 0.02])
def test_static_memory_is_the_memory_after_a_step(config, muon):
    transformer = transformer_alone(SHAPE, [16], 16)
    optimizers = make_optimizers(TransformerAlone(transformer), replace(config.optimization, muon_learning_rate=muon))
    random_loss(transformer, CodedSize(17, 32, 32, 16), 2, [5])().backward()
    gradients = [p.grad.nbytes for p in transformer.parameters() if p.grad is not None]
    for optimizer in optimizers:
        optimizer.step()
    held = [value for o in optimizers for slots in o.state.values() for value in slots.values()]
    static = static_memory(transformer.parameters(), [] if muon is None else hidden_matrices(transformer))
    assert static.optimizer == sum(value.nbytes for value in held)
    assert static.weights == sum(p.nbytes for p in transformer.parameters())
    assert static.gradients == sum(gradients)
    assert static.total == static.weights + static.gradients + static.optimizer + static.ema


@pytest.mark.parametrize("world", [1, 3, 8])
def test_sharded_memory_is_the_largest_shard_of_each_weight(config, world):
    """Rows are divided as by torch.chunk. Each weight has a gradient, an average, and two moments, or one with Muon."""
    transformer = transformer_alone(SHAPE, [16], 16)
    muon = {id(p) for p in hidden_matrices(transformer)}
    parts = [(p.chunk(world)[0].nbytes, 4 if id(p) in muon else 5) for p in transformer.parameters()]
    counted = sharded_memory(transformer, [], hidden_matrices(transformer), world)
    assert counted.local == sum(size * times for size, times in parts)
    if world == 1:
        counters = 4 * (len(parts) - len(muon))  # AdamW's steps
        assert counted.local == static_memory(transformer.parameters(), hidden_matrices(transformer)).total - counters
    blocks = sum(p.nbytes for p in transformer.transformer_blocks.parameters())
    outside = sum(p.nbytes for p in transformer.parameters()) - blocks
    assert counted.gathered == 2 * outside + blocks // 3 * 5 // 2  # two in bf16, gradients in bf16 and float32


def test_tensors_without_data_count_like_real_ones(config):
    assert activation_bytes(config, 0, 16, 32) == activation_bytes(config, 0, 16, 32, fake=False)


def test_a_batch_takes_the_memory_of_its_clips(config):
    counted = activation_bytes(config, 0, 16, 32)
    transformer = transformer_alone(SHAPE, [config.text.width], config.text.width)
    loss = random_loss(transformer, CodedSize(17, 32, 32, 16), 7, [config.text.small.max_length], "bf16")
    seven = saved_bytes(loss, transformer)
    assert seven == 7 * counted.per_clip + counted.per_step
    assert counted.per_clip_checkpointed < counted.per_clip


def test_saved_bytes_leave_weights_out_and_count_memory_once():
    layer = torch.nn.Linear(3, 5)
    x = torch.ones(2, 3, requires_grad=True)

    def loss():
        return (layer(x).square() + x.exp().sum()).sum()  # the graph keeps x, the layer's output and the exponentials

    assert saved_bytes(loss, layer) == 4 * (2 * 3 + 2 * 5 + 2 * 3)


def test_the_small_text_model_has_its_whole_vocabulary(config):
    shapes = [p.shape for p in small_text(config.text)]
    assert (config.text.vocabulary, config.text.width) in shapes
    frozen = replace(config.text, encoders=(replace(config.text.encoders[0], model="t5"),))
    assert small_text(frozen) == []
