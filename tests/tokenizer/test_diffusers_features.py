"""What diffusers offers for its autoencoders works on the tokenizer, at every level."""

import pytest
import torch

from promag import AutoencoderKLProMAG
from tests.conftest import make_tokenizer

CPU = torch.device("cpu")
RATIOS = (4, 8, 16)


@pytest.fixture
def model():
    return make_tokenizer(settle=0.05)


@torch.no_grad()
def both_ways(model, clip):
    """What each level makes of a clip: its latent, and the clip again."""
    found = []
    for ratio in RATIOS:
        z = model.encode(clip, ratio).latent_dist.mode()
        found += [z, model.decode(z, ratio).sample]
    return found


@pytest.mark.parametrize("kind", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}])
def test_group_offload_changes_nothing_though_encode_is_not_forward(model, clip, kind):
    expected = both_ways(model, clip)
    model.enable_group_offload(onload_device=CPU, offload_device=CPU, **kind)
    assert all(torch.equal(a, b) for a, b in zip(both_ways(model, clip), expected, strict=True))


def test_layerwise_casting_stores_kernels_in_eight_bits(model, clip):
    expected = both_ways(model, clip)
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    small = [name for name, p in model.named_parameters() if p.dtype == torch.float8_e4m3fn]
    assert all(any(name.startswith(part) for name in small) for part in ("encoder.", "decoder.", "encoder_growth.1."))
    for found, exact in zip(both_ways(model, clip), expected, strict=True):
        assert 0 < (found - exact).norm() < 0.3 * exact.norm()


def test_shards_variants_types_and_device_maps(model, clip, tmp_path):
    expected = both_ways(model, clip)
    model.save_pretrained(tmp_path, max_shard_size="50KB", variant="v1")
    assert len(list(tmp_path.glob("diffusion_pytorch_model.v1-0*.safetensors"))) > 1
    for arguments in ({}, {"device_map": {"": "cpu"}}, {"low_cpu_mem_usage": False}):
        found = AutoencoderKLProMAG.from_pretrained(tmp_path, variant="v1", **arguments)
        assert all(torch.equal(a, b) for a, b in zip(both_ways(found, clip), expected, strict=True))
    half = AutoencoderKLProMAG.from_pretrained(tmp_path, variant="v1", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    for found, exact in zip(both_ways(half, clip), expected, strict=True):
        assert (found.float() - exact).norm() < 0.1 * exact.norm()
