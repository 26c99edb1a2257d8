"""Tests on a GPU; skipped without one."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig

from promag.data.datasets import SyntheticDataset
from promag.diffusion.attention import choose_attention, probe
from promag.diffusion.latent_cache import LatentDataset, LatentFingerprint, write_latents
from promag.diffusion.train import train_diffusion
from promag.pipelines.build import clip_encoder
from promag.pipelines.sampling import SampleRequest, make_videos
from promag.tokenizer.checkpoint import load_tokenizer
from promag.tokenizer.streaming import reconstruct_stream
from promag.tokenizer.tiny_training import tiny_decoder_for
from promag.tokenizer.train import train_tokenizer
from promag.training.compilation import compile_blocks
from promag.training.graphs import NAME, CudaRecorder, enable_graphs, recompute_block
from promag.training.sending import Sender
from promag.training.throughput import matmul_tflops
from tests.conftest import run_config
from tests.diffusion.test_few_steps import distilling
from tests.diffusion.test_resumed_data import write
from tests.pipelines.conftest import call
from tests.tiny_pipeline import make_pipeline
from tests.tokenizer.test_train import make_config, records
from tests.training.test_graphs import ADAPTERS, SHAPES, arguments, gradients, learn
from tests.training.test_loop import SETTINGS, Sick
from tests.training.test_loop import run as run_training
from tests.training.test_update import Layers, make, results, take_steps

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
    whole, parts = (make_config(tmp_path / name, precision="bf16") for name in ("whole", "parts"))
    whole, parts = (dataclasses.replace(config, stages=config.stages[:2]) for config in (whole, parts))
    assert train_tokenizer(whole) == tmp_path / "whole" / "tokenizer"
    stopping = dataclasses.replace(parts, run=dataclasses.replace(parts.run, stop_after=2))
    assert [train_tokenizer(stopping) for _ in range(4)][-1] == tmp_path / "parts" / "tokenizer"
    for ratio in (4, 8):
        losses = [[r["loss"] for r in records(tmp_path / name, ratio) if "loss" in r] for name in ("whole", "parts")]
        assert len(losses[0]) == 4
        assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert load_tokenizer(tmp_path / "parts" / "tokenizer").temporal_ratios == (4, 8)


@pytest.mark.usefixtures("exact")
def test_cached_latents_are_those_that_the_gpu_encodes(on_gpu, tmp_path):
    """The GPU works through batches of a shard while the process waits for the next clips."""
    clips, encode = SyntheticDataset("train", 12, 17, 32), clip_encoder(on_gpu, torch.device("cuda"), "fp32")
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


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("decoder_first", [True, False])
def test_offloaded_pipelines_decode_by_a_tiny_decoder(offload, decoder_first):
    plain, offloaded = make_pipeline().to("cuda"), make_pipeline()
    decoder = tiny_decoder_for(plain.vae, width=8, layers=1)
    plain.enable_tiny_decoder(copy.deepcopy(decoder))
    steps = [lambda: offloaded.enable_tiny_decoder(decoder), lambda: OFFLOADS[offload](offloaded)]
    for step in steps if decoder_first else steps[::-1]:
        step()
    for _ in range(2):
        np.testing.assert_allclose(call(offloaded), call(plain), atol=2e-2)
    if offload == "model":
        assert {part.device.type for part in (offloaded.transformer, offloaded.vae, decoder)} == {"cpu"}


def test_the_measured_peak_is_that_of_a_tensor_core():
    assert matmul_tflops("cuda", bf16=True) > 2 * matmul_tflops("cuda", bf16=False)


# -- CUDA graphs -----------------------------------------------------------------------------------------------------

RUNS = {  # by name: what is done to the replayed model, whether under autocast, shapes of the steps, tolerance
    "float32": (lambda model: None, False, (*SHAPES, SHAPES[0]), 1e-4),
    "bfloat16": (lambda model: None, True, (*SHAPES, SHAPES[0]), 0.02),
    "recomputed": (lambda model: model.enable_gradient_checkpointing(recompute_block), False, SHAPES, 1e-4),
}


def on_gpu_arguments(*shape, **changes):
    given = arguments(*shape, **changes)

    def move(x):
        return x.detach().cuda().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x

    return {key: tuple(map(move, value)) if isinstance(value, tuple) else move(value) for key, value in given.items()}


def assert_near(one, other, tolerance):
    """Assert that no value differs by more than a share of its tensor's largest."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert (value - other[name]).abs().max() <= tolerance * max(1e-3, value.abs().max()), name


def assert_steps_equal(change, bf16, shapes, tolerance):
    """Assert that gradients, weights and the gradients of the text agree in steps of two batches each."""
    plain = make_pipeline().transformer.cuda().train()
    replayed = copy.deepcopy(plain)
    change(replayed)
    enable_graphs(replayed)
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in (plain, replayed)]
    for step, shape in enumerate(shapes):
        of_text = []
        for model, optimizer in zip((plain, replayed), optimizers, strict=True):
            optimizer.zero_grad()
            given = [on_gpu_arguments(*shape, seed=2 * step + part, learned=True) for part in (0, 1)]
            for one in given:
                with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
                    loss = (model(**one)[0].float() - one["hidden_states"]).square().mean()
                loss.backward()
            of_text.append({str(part): one["pooled_projections"].grad for part, one in enumerate(given)})
        assert_near(gradients(plain), gradients(replayed), tolerance)
        assert_near(*of_text, tolerance)
        for model, optimizer in zip((plain, replayed), optimizers, strict=True):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
    assert len(replayed._diffusers_hook.get_hook(NAME).recordings) == len({*shapes})
    assert_near(*(dict(model.named_parameters()) for model in (plain, replayed)), tolerance)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("run", RUNS)
def test_replayed_training_steps_equal_plain_ones(run):
    assert_steps_equal(*RUNS[run])


@pytest.mark.usefixtures("exact")
def test_replayed_updates_equal_plain_ones():
    plain, replayed = (make(recorder, Layers().cuda()) for recorder in (None, CudaRecorder()))
    for objective, update in (plain, replayed):
        take_steps(objective, update, range(8), skipped={0, 4})
    torch.testing.assert_close(results(*replayed), results(*plain), rtol=1e-4, atol=1e-6)
    assert [recorded is not None for recorded in replayed[1].recordings.values()] == [True]


def test_the_host_never_waits_inside_the_transformer():
    model = make_pipeline().transformer.cuda().train()
    given = on_gpu_arguments(learned=True, fps=8.0)
    learn(model, **given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        learn(model, **given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


STEPS = 8  # of the training that is watched


class Watched(Sick):
    """Raises where the host waits for the GPU between the third step and the last; figures are on the GPU."""

    def forward(self, batch, generators, step):
        torch.cuda.set_sync_debug_mode("error" if 2 <= step < STEPS - 1 else "default")
        return {"loss": super().forward(batch, generators, step)["loss"]}


@pytest.mark.parametrize("muon", [None, 0.02])
def test_the_host_never_waits_inside_a_training_step(tmp_path, capsys, muon):
    settings = dataclasses.replace(SETTINGS, steps=STEPS, max_skipped=1, muon_learning_rate=muon)
    rare = run_config(log_every=50, validate_every=50, save_every=50)
    outcome, objective = run_training(tmp_path, rare, settings, Watched(4))
    assert outcome.finished
    assert "step 5: loss, gradient_norm not finite, skipped (1 in all)" in capsys.readouterr().err
    assert all(p.isfinite().all() for p in objective.parameters())


def test_batches_arrive_whole_while_a_step_computes():
    send, busy = Sender(torch.device("cuda"), ("sample",)), torch.randn(4096, 4096, device="cuda")
    for number in range(20):
        batch = send({"x": torch.full((64, 1024), float(number)).pin_memory(), "sample": torch.tensor([number])})
        busy = (busy @ busy).tanh()
        assert batch["sample"] == [number]
        assert batch["x"].mean().item() == number


@pytest.mark.usefixtures("exact")
def test_a_replayed_pipeline_samples_the_same_videos():
    plain, replayed = (make_pipeline().to("cuda") for _ in range(2))
    replayed.enable_graphs()
    options = ({}, {"temporal_ratio": 4}, {"guidance_scale": 1.0}, {"fps": 24.0}, {"num_inference_steps": 5}, {})
    for option in options:
        np.testing.assert_allclose(call(replayed, **option), call(plain, **option), atol=1e-4)
    assert len(replayed.transformer._diffusers_hook.get_hook(NAME).recordings) == 4
    replayed.to("cpu").to("cuda")
    np.testing.assert_allclose(call(replayed), call(plain), atol=1e-4)
    replayed.disable_graphs()
    np.testing.assert_allclose(call(replayed), call(plain), atol=1e-4)


@pytest.mark.usefixtures("exact")
def test_a_pipelines_recordings_outlive_those_of_another():
    first, second, plain = (make_pipeline().to("cuda") for _ in range(3))
    for pipe in (first, second):
        pipe.enable_graphs()
        call(pipe)
    first.disable_graphs()
    torch.cuda.empty_cache()
    for option in ({}, {"temporal_ratio": 4}, {}):
        np.testing.assert_allclose(call(second, **option), call(plain, **option), atol=1e-4)


@pytest.mark.usefixtures("exact")
def test_adapters_may_change_and_recordings_be_dropped_between_replays():
    plain = make_pipeline().transformer.cuda().eval()
    replayed = copy.deepcopy(plain)
    enable_graphs(replayed, recordings=1)
    for change in (lambda model: None, *ADAPTERS.values()):
        for model in (plain, replayed):
            torch.manual_seed(1)
            change(model)
        for shape in (*SHAPES[:2], SHAPES[0]):
            given = on_gpu_arguments(*shape)
            with torch.no_grad():
                expected, again = (model(**given)[0] for model in (plain, replayed))
            torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-4)
    assert len(replayed._diffusers_hook.get_hook(NAME).recordings) == 1


@pytest.mark.parametrize("graphs", [False, True])
def test_overlapped_videos_are_the_same(graphs):
    pipe = make_pipeline().to("cuda")
    if graphs:
        pipe.enable_graphs()
    requests = [SampleRequest("a red disc moves left", seed) for seed in range(5)]
    plain, overlapped = (
        [videos for videos, _ in make_videos(pipe, requests, 1, "fp32", num_inference_steps=3, overlap=overlap)]
        for overlap in (False, True)
    )
    np.testing.assert_allclose(np.int16(overlapped), np.int16(plain), atol=1)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_a_replayed_pipeline_that_is_offloaded_is_refused(offload):
    pipe = make_pipeline()
    if offload == "group":
        OFFLOADS[offload](pipe)
        with pytest.raises(ValueError, match="has hooks"):
            pipe.enable_graphs()
        return
    pipe.enable_graphs()
    OFFLOADS[offload](pipe)
    with pytest.raises(ValueError, match=r"graphs: .* has hooks"):
        call(pipe)


def test_a_replayed_pipeline_refuses_a_cache_of_blocks():
    pipe = make_pipeline().to("cuda")
    pipe.enable_graphs()
    call(pipe)
    pipe.transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(ValueError, match=r"graphs: .* has hooks"):
        call(pipe)


def test_a_student_trained_through_graphs_equals_one_trained_without(tmp_path):
    make_pipeline().save_pretrained(tmp_path / "init")
    cached = write(tmp_path / "cache")
    states = []
    for graphs in (False, True):
        config = distilling(tmp_path / f"graphs-{graphs}", tmp_path / "init", lora={"rank": 2}, graphs=graphs, precision="fp32")
        trained = train_diffusion(config, cached, cached)
        assert trained.outcome is not None
        assert trained.outcome.step == 4
        states.append(trained.transformer.state_dict())
    assert_near(*states, 1e-3)


def test_replayed_steps_of_compiled_blocks_equal_plain_ones():  # the last: blocks take long to compile
    assert_steps_equal(compile_blocks, True, SHAPES[1:] * 2, 0.05)
