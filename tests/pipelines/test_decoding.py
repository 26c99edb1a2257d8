"""A pipeline that decodes by a tiny decoder."""

import accelerate
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from promag import ProMAGPipeline, TinyDecoder
from promag.tokenizer.tiny_training import tiny_decoder_for
from promag.training.config import UserError
from tests.pipelines.conftest import like
from tests.tiny_pipeline import PROMPTS, make_pipeline

CALL = {"prompt": PROMPTS[0], "num_inference_steps": 2}


def noise():
    return torch.Generator().manual_seed(3)


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline()


@pytest.fixture(scope="module")
def tiny(pipe, tmp_path_factory):
    """Return the folder of a tiny decoder for the pipeline's latents."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    tiny_decoder_for(pipe.vae, width=8, layers=1).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _decoding_by_the_tokenizer(pipe):
    yield
    pipe.register_modules(tiny_decoder=None)
    pipe.disable_tiny_decoder()


def test_it_decodes_the_same_latents(pipe, tiny):
    latents = pipe(**CALL, generator=noise(), output_type="latent").frames
    by_tokenizer = pipe(**CALL, generator=noise(), output_type="pt").frames
    pipe.enable_tiny_decoder(tiny)
    by_tiny = pipe(**CALL, generator=noise(), output_type="pt").frames
    with torch.no_grad():
        expected = TinyDecoder.from_pretrained(tiny).decode(latents, 16).sample
    assert torch.allclose(by_tiny[0], (expected[0].transpose(0, 1) / 2 + 0.5).clamp(0, 1), atol=1e-5)
    assert not torch.allclose(by_tiny, by_tokenizer, atol=0.01)
    pipe.disable_tiny_decoder()
    assert torch.equal(pipe(**CALL, generator=noise(), output_type="pt").frames, by_tokenizer)


@pytest.mark.parametrize("output_type", ["np", "pt", "pil"])
def test_latents_are_decoded_as_in_the_call(pipe, tiny, output_type):
    latents = pipe(**CALL, generator=noise(), output_type="latent").frames
    for enable in (pipe.disable_tiny_decoder, lambda: pipe.enable_tiny_decoder(tiny)):
        enable()
        frames = pipe(**CALL, generator=noise(), output_type=output_type).frames
        decoded = pipe.decode_latents(latents, output_type=output_type)
        assert not getattr(decoded, "requires_grad", False)
        assert type(decoded) is type(frames)
        assert np.array_equal(np.stack([np.asarray(f) for f in decoded]), np.stack([np.asarray(f) for f in frames]))
    assert pipe.decode_latents(latents, 4).shape == (1, 5, 16, 24, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": None}, "latents .*: a floating-point tensor b c t h w is needed"),
        ({"latents": torch.zeros(4, 2, 2, 3)}, "latents .*: a floating-point tensor b c t h w is needed"),
        ({"latents": torch.full((1, 4, 2, 2, 3), torch.nan)}, "latents: all values must be finite"),
        ({"latents": torch.zeros(1, 5, 2, 2, 3)}, r"latent of shape \(1, 5, 2, 2, 3\): B 4 t h w is needed"),
        ({"temporal_ratio": 32}, "temporal ratio 32: this tokenizer has 4x, 8x, 16x"),
        ({"output_type": "latent"}, "output_type 'latent': use one of np, pil, pt"),
    ],
)
def test_what_cannot_be_decoded_is_refused(pipe, change, message):
    with pytest.raises(ValueError, match=message):
        pipe.decode_latents(**{"latents": torch.zeros(1, 4, 2, 2, 3), **change})


def test_a_saved_pipeline_has_it_and_asks_before_it_decodes_by_it(pipe, tiny, tmp_path):
    without = pipe(**CALL, generator=noise()).frames
    pipe.enable_tiny_decoder(TinyDecoder.from_pretrained(tiny))
    by_tiny = pipe(**CALL, generator=noise()).frames
    pipe.save_pretrained(tmp_path)
    for kind in (ProMAGPipeline, DiffusionPipeline):
        loaded = kind.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert (loaded(**CALL, generator=noise()).frames == without).all()
        loaded.enable_tiny_decoder()
        assert (loaded(**CALL, generator=noise()).frames == by_tiny).all()
    assert "| tiny_decoder | TinyDecoder |" in (tmp_path / "README.md").read_text()
    again = ProMAGPipeline(**loaded.components)
    again.enable_tiny_decoder()


def test_it_follows_the_pipelines_type(pipe, tiny):
    half = make_pipeline().to(torch.bfloat16)
    half.enable_tiny_decoder(tiny)
    assert half.tiny_decoder.dtype == torch.bfloat16
    assert half(**CALL, generator=noise()).frames.shape == (1, 17, 16, 24, 3)


def test_without_one_it_is_refused(pipe):
    with pytest.raises(ValueError, match="enable_tiny_decoder: this pipeline was made without one; give a TinyDecoder"):
        pipe.enable_tiny_decoder()


def test_what_is_none_is_refused(pipe):
    with pytest.raises(ValueError, match="enable_tiny_decoder: 5 is none; give a TinyDecoder, or its folder"):
        pipe.enable_tiny_decoder(5)


def test_one_of_other_latents_is_refused(pipe):
    with pytest.raises(ValueError, match=r"latent channels are \(16, 16, 16\), the tokenizer's \(4, 4, 4\)"):
        pipe.enable_tiny_decoder(TinyDecoder())
    assert pipe.tiny_decoder is None


def test_a_folder_without_one_is_refused(pipe, tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        pipe.enable_tiny_decoder(tmp_path)


def test_a_saved_pipeline_may_not_name_another_class_for_it(pipe, tiny, tmp_path):
    pipe.enable_tiny_decoder(tiny)
    pipe.save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(index.read_text().replace('"TinyDecoder"', '"AutoencoderKLProMAG"'))
    with pytest.raises(UserError, match="tiny_decoder is AutoencoderKLProMAG: TinyDecoder is needed"):
        ProMAGPipeline.from_pretrained(tmp_path)


def test_it_decodes_in_the_slices_and_tiles_of_the_tokenizer(pipe, tiny):
    own = like(pipe)
    own.enable_tiny_decoder(tiny)
    shapes = []
    own.tiny_decoder.entries[2].register_forward_pre_hook(lambda _, given: shapes.append(tuple(given[0].shape)))
    latents = torch.randn(2, 4, 2, 2, 3, generator=noise())
    whole = own.decode_latents(latents, output_type="pt")
    own.vae.enable_slicing()
    assert torch.allclose(own.decode_latents(latents, output_type="pt"), whole, atol=1e-5)
    own.vae.enable_tiling(16, 16, 8, 8)
    own.decode_latents(latents)
    own.vae.disable_tiling()
    own.vae.disable_slicing()
    own.decode_latents(latents)
    assert shapes == [(2, 4, 2, 2, 3), *[(1, 4, 2, 2, 3)] * 2, *[(1, 4, 2, 2, 2)] * 4, (2, 4, 2, 2, 3)]


# -- offloading (here to "cpu") --------------------------------------------------------------------------------------


def offload_sequentially(pipe):
    """Do what enable_sequential_cpu_offload does, which names the device cpu:0, from which accelerate cannot move back."""
    for part in (pipe.text_encoder, pipe.transformer, pipe.vae, pipe.tiny_decoder):
        if part is not None:
            accelerate.cpu_offload(part, torch.device("cpu"), offload_buffers=bool(part._parameters))


OFFLOADS = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential": offload_sequentially,
    "group": lambda pipe: pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level"),
}


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("order", ["decoder first", "offloading first", "decoder again"])
def test_an_offloaded_pipeline_decodes_by_it(pipe, tiny, offload, order):
    latents = torch.randn(1, 4, 2, 2, 3, generator=noise())
    with torch.no_grad():
        expected = (TinyDecoder.from_pretrained(tiny).decode(latents, 16).sample.movedim(1, 2) / 2 + 0.5).clamp(0, 1)
    own = like(pipe)
    steps = [lambda: own.enable_tiny_decoder(tiny), lambda: OFFLOADS[offload](own)]
    for step in steps[::-1] if order == "offloading first" else steps:
        step()
    if order == "decoder again":
        own.disable_tiny_decoder()
        own.enable_tiny_decoder()
    for _ in range(2):
        assert torch.allclose(own.decode_latents(latents, output_type="pt"), expected, atol=1e-5)


def test_model_offload_frees_the_transformer_before_the_decoder_in_use(pipe, tiny):
    own = like(pipe)
    own.enable_model_cpu_offload(device="cpu")
    for change, order in (
        (lambda: own.enable_tiny_decoder(tiny), (own.text_encoder, own.transformer, "tiny_decoder", own.vae)),
        (own.disable_tiny_decoder, (own.text_encoder, own.transformer, own.vae, "tiny_decoder")),
        (own.enable_tiny_decoder, (own.text_encoder, own.transformer, "tiny_decoder", own.vae)),
    ):
        change()
        parts = [own.tiny_decoder if part == "tiny_decoder" else part for part in order]
        assert [hook.model for hook in own._all_hooks] == parts
        assert parts[2]._hf_hook.prev_module_hook.model is own.transformer


def test_latents_go_to_the_device_to_which_offloading_brings_it(pipe, tiny):
    own = like(pipe)
    own.enable_tiny_decoder(tiny)
    accelerate.cpu_offload_with_hook(own.tiny_decoder, torch.device("meta"))  # stands for a GPU, and computes no values
    devices = []
    own.tiny_decoder.entries[2].register_forward_pre_hook(
        lambda module, given: devices.append((module.weight.device.type, given[0].device.type))
    )
    with pytest.raises(RuntimeError, match="meta"):
        own.decode_latents(torch.zeros(1, 4, 2, 2, 3), 16)
    assert devices == [("meta", "meta")]
