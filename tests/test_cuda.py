"""Tests on a GPU; skipped without one."""

import copy

import numpy as np
import pytest
import torch

from promag.data.datasets import SyntheticDataset
from promag.diffusion.attention import choose_attention, probe
from promag.diffusion.latent_cache import LatentDataset, LatentFingerprint, write_latents
from promag.pipelines.build import encoder
from promag.tokenizer.checkpoint import load_tokenizer
from promag.tokenizer.streaming import reconstruct_stream
from promag.tokenizer.train import train_tokenizer
from promag.training.throughput import matmul_tflops
from tests.pipelines.conftest import call
from tests.tiny_pipeline import make_pipeline
from tests.tokenizer.test_train import make_config, records

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
RATIOS = (4, 8, 16)


@pytest.fixture
def exact():
    """Compute float32 matrix products and convolutions in full float32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def on_gpu(tokenizer):
    return copy.deepcopy(tokenizer).cuda()


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("ratio", RATIOS)
def test_a_gpu_computes_the_same_as_the_cpu(tokenizer, on_gpu, clip, ratio):
    with torch.no_grad():
        z = tokenizer.encode(clip, ratio).latent_dist.mode()
        torch.testing.assert_close(on_gpu.encode(clip.cuda(), ratio).latent_dist.mode().cpu(), z, atol=1e-4, rtol=1e-4)
        video = tokenizer.decode(z, ratio).sample
        torch.testing.assert_close(on_gpu.decode(z.cuda(), ratio).sample.cpu(), video, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("ratio", RATIOS)
def test_chunks_equal_the_whole(on_gpu, clip, ratio):
    with torch.no_grad():
        whole = on_gpu(clip.cuda(), ratio).sample
        streamed = torch.cat(list(reconstruct_stream(on_gpu, clip.cuda().split([1, 16, 16], 2), ratio)), 2)
    assert (streamed - whole).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ratio", RATIOS)
def test_half_precision_stays_finite_and_close(on_gpu, clip, dtype, ratio):
    with torch.no_grad():
        whole = on_gpu(clip.cuda(), ratio).sample
        half = on_gpu.to(dtype)(clip.cuda().to(dtype), ratio).sample
    assert half.dtype == dtype
    assert (half.float() - whole).abs().mean() < 0.02


def test_training_continues_after_a_stop(tmp_path):
    run = tmp_path / "run"
    config = make_config(run, precision="bf16", stages=make_config(run).stages[:2])
    assert train_tokenizer(config) == run / "tokenizer"
    losses = [r["loss"] for r in records(run, 4) if "loss" in r]
    assert len(losses) == 4
    assert all(loss > 0 for loss in losses)
    assert load_tokenizer(run / "tokenizer").temporal_ratios == (4, 8)


@pytest.mark.usefixtures("exact")
def test_cached_latents_are_those_that_the_gpu_encodes(on_gpu, tmp_path):
    """The GPU works through batches of a shard while the process waits for the next clips."""
    clips, encode = SyntheticDataset("train", 12, 17, 32), encoder(on_gpu, torch.device("cuda"), "fp32")
    fingerprint = LatentFingerprint("any", "any", 16, 17, 32, 32, "float32", 8)
    write_latents({tmp_path: fingerprint}, 12, clips, encode, batch_size=2, workers=2)
    cached = LatentDataset(tmp_path)
    for number in range(12):
        (alone,) = encode(clips.fixed(number)["video"][None], (16,))
        latents = cached.fixed(number)["latents"] * cached.std + cached.mean
        torch.testing.assert_close(latents, alone[0].cpu(), atol=1e-4, rtol=1e-4)


def test_native_attention_works_and_is_chosen_where_flash_is_absent():
    device, transformer = torch.device("cuda"), make_pipeline().transformer.cuda()
    assert probe("native", device, torch.bfloat16, 64) is None
    assert choose_attention(transformer, "auto", device, torch.bfloat16).split(",")[0] in ("flash", "native")


OFFLOADS = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(),
    "sequential": lambda pipe: pipe.enable_sequential_cpu_offload(),
    "group": lambda pipe: pipe.enable_group_offload(torch.device("cuda"), offload_type="leaf_level"),
}


@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloaded_pipelines_sample_the_same_videos(offload):
    offloaded = make_pipeline()
    OFFLOADS[offload](offloaded)
    np.testing.assert_allclose(call(offloaded), call(make_pipeline().to("cuda")), atol=2e-2)


def test_the_measured_peak_is_that_of_a_tensor_core():
    assert matmul_tflops("cuda", bf16=True) > 2 * matmul_tflops("cuda", bf16=False)
