"""Features of a pipeline that save memory or time: offloading (here to "cpu"), small types, tiles, caches."""

import accelerate
import numpy as np
import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from PIL import Image

from promag.pipelines.sampling import sample_videos
from tests.pipelines.conftest import call, like
from tests.tiny_pipeline import PROMPTS

CPU = torch.device("cpu")
PICTURE = Image.new("RGB", (24, 16), (200, 30, 90))


def weights_on(pipe, device):
    parts = (pipe.text_encoder, pipe.transformer, pipe.vae)
    return all(p.device.type == device for part in parts for p in part.parameters())


@pytest.fixture
def own(pipe):
    return like(pipe)


def test_sequential_offload_frees_all_weights_and_changes_nothing(pipe, own):
    # As enable_sequential_cpu_offload does, except that it names the device cpu:0, which accelerate cannot move back from.
    for part in (own.text_encoder, own.transformer, own.vae):
        accelerate.cpu_offload(part, CPU, offload_buffers=bool(part._parameters))
    assert weights_on(own, "meta")
    for arguments in ({}, {"image": PICTURE, "temporal_ratio": 4}):
        assert np.array_equal(call(own, **arguments), call(pipe, **arguments))
    videos = [sample_videos(each, PROMPTS[:1], 1, 1.0, "fp32", name=None) for each in (own, pipe)]
    assert np.array_equal(*videos)  # the precision is that of the device on which it computes
    assert weights_on(own, "meta")


def test_model_offload_loads_one_part_at_a_time_and_changes_nothing(pipe, own):
    own.enable_model_cpu_offload(device="cpu")
    assert [type(hook.hook).__name__ for hook in own._all_hooks] == ["CpuOffload"] * 3
    assert own.model_cpu_offload_seq.split("->")[-2:] == ["transformer", "vae"]
    for _ in range(2):
        assert np.array_equal(call(own, image=PICTURE), call(pipe, image=PICTURE))
    assert len(own._all_hooks) == 3


@pytest.mark.parametrize("kind", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}])
def test_group_offload_changes_nothing(pipe, own, kind):
    own.enable_group_offload(onload_device=CPU, offload_device=CPU, **kind)
    assert any(hasattr(module, "_diffusers_hook") for module in own.vae.modules())
    assert np.array_equal(call(own, image=PICTURE), call(pipe, image=PICTURE))


def test_layerwise_casting_stores_eight_bits_and_changes_the_video_little(pipe, own):
    for part in (own.transformer, own.vae):
        part.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    eighth = torch.float8_e4m3fn
    assert own.transformer.transformer_blocks[0].attn1.to_q.weight.dtype == eighth
    assert own.transformer.time_embed.linear_1.weight.dtype == torch.float32
    assert own.vae.decoder.head.conv.weight.dtype == eighth
    assert (own.transformer.dtype, own.vae.dtype) == (torch.float32, torch.float32)
    difference = np.abs(call(own) - call(pipe)).mean()
    assert 0 < difference < 0.05


def test_tiles_and_slices_of_the_autoencoder_are_used(pipe, own):
    own.vae.enable_slicing()
    assert np.allclose(call(own, PROMPTS), call(pipe, PROMPTS), atol=1e-5)
    own.vae.enable_tiling(16, 16, 8, 8)
    tiled = call(own, PROMPTS)
    assert (
        np.abs(tiled - call(pipe, PROMPTS)).max() > 1e-3
    )  # random weights have wide receptive fields, so the difference is not small here
    own.vae.disable_tiling()
    assert np.allclose(call(own, PROMPTS), call(pipe, PROMPTS), atol=1e-5)


def caches(pipe):
    now = {"current_timestep_callback": lambda: pipe.current_timestep}
    pooled = ["hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask", "pooled_projections"]
    return {
        "first block": FirstBlockCacheConfig(threshold=10.0),
        "pyramid": PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            cross_attention_block_skip_range=3,
            spatial_attention_timestep_skip_range=(-1, 1001),
            cross_attention_timestep_skip_range=(-1, 1001),
            **now,
        ),
        "faster": FasterCacheConfig(
            spatial_attention_timestep_skip_range=(-1, 1001),
            unconditional_batch_timestep_skip_range=(-1, 1001),
            unconditional_batch_skip_range=2,
            _unconditional_conditional_input_kwargs_identifiers=pooled,
            **now,
        ),
        "taylor": TaylorSeerCacheConfig(disable_cache_before_step=2, cache_identifiers=[r"transformer_blocks\.\d+\.attn\d"]),
        "mag": MagCacheConfig(mag_ratios=[1.0] * 8, num_inference_steps=4, threshold=1.0, max_skip_steps=1),
    }


@pytest.mark.parametrize("name", ["first block", "pyramid", "faster", "taylor", "mag"])
def test_caches_of_diffusers_skip_work_are_reset_and_leave_no_trace(pipe, own, name):
    """A block's feed-forward and attention are called less often; two consecutive videos are equal."""
    calls = {"attn1": 0, "attn2": 0, "rows": 0}
    block = own.transformer.transformer_blocks[-1]
    for part in ("attn1", "attn2"):
        getattr(block, part).to_out[0].register_forward_hook(lambda *_, part=part: calls.update({part: calls[part] + 1}))

    def count_rows(module, arguments, output):
        calls["rows"] += len(output)

    own.transformer.patch_embed.register_forward_hook(count_rows)
    plain = call(own, num_inference_steps=4)
    before = dict(calls)
    assert before == {"attn1": 4, "attn2": 4, "rows": 8}
    own.transformer.enable_cache(caches(own)[name])
    first = call(own, num_inference_steps=4)
    spent = {part: calls[part] - before[part] for part in calls}
    assert any(spent[part] < before[part] for part in calls)
    assert 0 < np.abs(first - plain).mean() < 0.2
    assert np.array_equal(call(own, num_inference_steps=4), first)
    own.transformer.disable_cache()
    assert np.array_equal(call(own, num_inference_steps=4), plain)


def test_a_pipeline_with_accelerate_hooks_runs_on_their_device(pipe, own):
    """Device maps do this: each part is dispatched, and its weights are elsewhere until it is called."""
    for part in (own.text_encoder, own.transformer, own.vae):
        accelerate.dispatch_model(part, {"": "cpu"}, force_hooks=True)
    assert np.array_equal(call(own), call(pipe))
