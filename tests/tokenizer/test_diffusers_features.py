"""The features that diffusers offers for its autoencoders work on the tokenizer, at every level."""

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module

from promag import AutoencoderKLProMAG
from promag.tokenizer.layers import START
from tests.conftest import make_tokenizer

CPU = torch.device("cpu")
RATIOS = (4, 8, 16)


@pytest.fixture
def model():
    return make_tokenizer(settle=0.05)


@torch.no_grad()
def both_ways(model, clip):
    """Return each level's latent and reconstruction of a clip."""
    result = []
    for ratio in RATIOS:
        z = model.encode(clip, ratio).latent_dist.mode()
        result += [z, model.decode(z, ratio).sample]
    return result


@pytest.mark.parametrize("kind", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}])
def test_group_offload_changes_nothing_though_encode_is_not_forward(model, clip, kind):
    expected = both_ways(model, clip)
    model.enable_group_offload(onload_device=CPU, offload_device=CPU, **kind)
    assert all(torch.equal(a, b) for a, b in zip(both_ways(model, clip), expected, strict=True))


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offload_is_by_leaves(model, kind, caplog):
    model.enable_group_offload(CPU, CPU, offload_type=kind, num_blocks_per_group=1)
    convolutions = [module for module in model.modules() if isinstance(module, torch.nn.Conv3d)]
    assert all(module._diffusers_hook.get_hook("group_offloading") for module in convolutions)
    assert ("AutoencoderKLProMAG: group offloading uses leaf_level" in caplog.text) == (kind == "block_level")


def test_layerwise_casting_stores_kernels_in_eight_bits(model, clip):
    expected = both_ways(model, clip)
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    small = [name for name, p in model.named_parameters() if p.dtype == torch.float8_e4m3fn]
    assert all(any(name.startswith(part) for name in small) for part in ("encoder.", "decoder.", "encoder_growth.1."))
    for result, exact in zip(both_ways(model, clip), expected, strict=True):
        assert 0 < (result - exact).norm() < 0.3 * exact.norm()


def test_shards_variants_types_and_device_maps(model, clip, tmp_path):
    expected = both_ways(model, clip)
    model.save_pretrained(tmp_path, max_shard_size="50KB", variant="v1")
    assert len(list(tmp_path.glob("diffusion_pytorch_model.v1-0*.safetensors"))) > 1
    for arguments in ({}, {"device_map": {"": "cpu"}}, {"low_cpu_mem_usage": False}):
        result = AutoencoderKLProMAG.from_pretrained(tmp_path, variant="v1", **arguments)
        assert all(torch.equal(a, b) for a, b in zip(both_ways(result, clip), expected, strict=True))
    half = AutoencoderKLProMAG.from_pretrained(tmp_path, variant="v1", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    for result, exact in zip(both_ways(half, clip), expected, strict=True):
        assert (result.float() - exact).norm() < 0.1 * exact.norm()


class Fetch(ModelHook):
    """A hook that loads the weights before each call, as model offloading does, and counts the calls."""

    def __init__(self, weights):
        self.weights, self.fetched = weights, 0

    def pre_forward(self, module, *args, **kwargs):
        self.fetched += 1
        module.load_state_dict(self.weights)
        return args, kwargs


@torch.no_grad()
def test_model_offload_brings_the_weights_before_every_kind_of_call(model, clip):
    z = model.encode(clip, 16).latent_dist.mode()
    calls = {
        "encode": lambda: model.encode(clip, 16).latent_dist.mode(),
        "encode_levels": lambda: model.encode_levels(clip, (16,))[0].mode(),
        "encode_chunk": lambda: model.encode_chunk(clip, START, 16)[0].mode(),
        "decode": lambda: model.decode(z, 16).sample,
        "decode_chunk": lambda: model.decode_chunk(z, START, 16)[0],
        "lift": lambda: model.lift(z, 16, 4),
        "forward": lambda: model(clip, 16).sample,
    }
    expected = {name: call() for name, call in calls.items()}
    hook = Fetch({name: value.clone() for name, value in model.state_dict().items()})
    add_hook_to_module(model, hook)
    for name, call in calls.items():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))  # not there
        before = hook.fetched
        assert torch.equal(call(), expected[name]), name
        assert hook.fetched > before
