"""The features that diffusers offers for its models work on the transformer."""

import pytest
import torch
from diffusers.hooks import HookRegistry
from diffusers.hooks._helpers import TransformerBlockRegistry
from peft import LoraConfig

from promag import ProMAGTransformer3DModel
from promag.diffusion.transformer import ProMAGTransformerBlock
from tests.diffusion.test_transformer import SMALL, inputs

CPU = torch.device("cpu")


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = ProMAGTransformer3DModel(**SMALL, local_convolution=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.fixture
def expected(model):
    with torch.no_grad():
        return model(**inputs()).sample


@torch.no_grad()
def test_fused_projections_are_one_product_and_change_nothing(model, expected):
    model.fuse_qkv_projections()
    block = model.transformer_blocks[0]
    assert block.attn1.to_qkv.out_features == 3 * block.attn2.to_kv.out_features // 2
    block.attn1.to_q.weight.fill_(torch.nan)  # no longer called
    block.attn2.to_v.weight.fill_(torch.nan)
    assert torch.allclose(model(**inputs()).sample, expected, atol=1e-5)
    model.unfuse_qkv_projections()
    assert model(**inputs()).sample.isnan().all()


@torch.no_grad()
def test_blocks_compile_in_one_graph_each(model, expected):
    model.compile_repeated_blocks(fullgraph=True, backend="eager")  # traced only: code generation is PyTorch's matter
    assert torch.allclose(model(**inputs()).sample, expected, atol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize("kind", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}])
@torch.no_grad()
def test_group_offload_changes_nothing(model, expected, kind):
    model.enable_group_offload(onload_device=CPU, offload_device=CPU, **kind)
    assert isinstance(model._diffusers_hook, HookRegistry)
    assert torch.equal(model(**inputs()).sample, expected)


@torch.no_grad()
def test_layerwise_casting_stores_the_blocks_in_eight_bits_and_embeddings_whole(model, expected):
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    small = {name for name, p in model.named_parameters() if p.dtype == torch.float8_e4m3fn}
    assert {"transformer_blocks.0.local.weight", "transformer_blocks.1.ff.net.2.weight"} <= small
    assert not [name for name in small if "_embed" in name or "norm" in name or "modulation" in name]
    result = model(**inputs()).sample
    assert 0 < (result - expected).norm() < 0.2 * expected.norm()


def test_the_block_is_registered_with_the_caches():
    assert TransformerBlockRegistry.get(ProMAGTransformerBlock).return_hidden_states_index == 0
    assert ProMAGTransformer3DModel._repeated_blocks == ["ProMAGTransformerBlock"]
    model = ProMAGTransformer3DModel(**SMALL)
    assert [block.attn2.is_cross_attention for block in model.transformer_blocks] == [True, True]
    assert not any(block.attn1.is_cross_attention for block in model.transformer_blocks)


@torch.no_grad()
def test_shards_variants_types_and_device_maps(model, expected, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="20KB", variant="v1")
    assert len(list(tmp_path.glob("diffusion_pytorch_model.v1-0*.safetensors"))) > 1
    for device_map in (None, "auto", {"": "cpu"}):
        result = ProMAGTransformer3DModel.from_pretrained(tmp_path, variant="v1", device_map=device_map)
        assert torch.equal(result(**inputs()).sample, expected)
    with pytest.raises(OSError, match="no file named"):
        ProMAGTransformer3DModel.from_pretrained(tmp_path)
    half = ProMAGTransformer3DModel.from_pretrained(tmp_path, variant="v1", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    given = {k: v.bfloat16() if k.endswith("states") or k == "pooled_projections" else v for k, v in inputs().items()}
    assert (half(**given).sample.float() - expected).norm() < 0.05 * expected.norm()


@torch.no_grad()
def test_a_device_map_of_several_places_splits_between_blocks(model, expected, tmp_path):
    model.save_pretrained(tmp_path / "model")
    parts = [name for name, _ in model.named_children() if name != "transformer_blocks"]
    places = {
        "scale_shift_table": "cpu",
        **dict.fromkeys((*parts, "transformer_blocks.0"), "cpu"),
        "transformer_blocks.1": "disk",
    }
    result = ProMAGTransformer3DModel.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=str(tmp_path / "disk")
    )
    assert result.transformer_blocks[1].ff.net[2].weight.device.type == "meta"
    assert torch.equal(result(**inputs()).sample, expected)


@torch.no_grad()
def test_adapters_of_peft_are_added_weighted_switched_off_and_removed(model, expected):
    names = {"first": ["to_q", "to_v"], "second": ["ff.net.2"]}
    for name, targets in names.items():
        model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), adapter_name=name)
    outputs = []
    for name in names:
        model.set_adapter(name)
        outputs.append(model(**inputs()).sample)
    assert all(not torch.allclose(result, expected, atol=1e-3) for result in outputs)
    assert not torch.allclose(*outputs, atol=1e-3)
    assert torch.allclose(model(**inputs(), attention_kwargs={"scale": 0.0}).sample, expected, atol=1e-5)
    model.disable_adapters()
    assert torch.equal(model(**inputs()).sample, expected)
    model.delete_adapters(list(names))
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
