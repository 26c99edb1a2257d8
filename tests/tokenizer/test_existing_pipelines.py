"""Pipelines of diffusers that sample with a grown autoencoder in the place of their own."""

import json
import re

import diffusers
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    WanPipeline,
    WanTransformer3DModel,
    WanVideoToVideoPipeline,
)
from PIL import Image

from promag import AutoencoderKLProMAG
from promag.tokenizer.growth import Growth
from tests.existing_models import SMALL
from tests.tokenizer.test_existing import grown
from tests.wan import make_stock


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_stock_pipeline_of_the_family_samples_with_it(dtype, tmp_path):
    _, model = grown("Wan 2.1")
    shape = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16}
    transformer = WanTransformer3DModel(**shape, freq_dim=16, ffn_dim=16, num_layers=1, rope_max_seq_len=32)
    parts = {"tokenizer": None, "text_encoder": None, "scheduler": FlowMatchEulerDiscreteScheduler()}
    sizes = {}
    for ratio in (None, 8, 4):
        pipe = WanPipeline(vae=model.serve(ratio).to(dtype), transformer=transformer.to(dtype), **parts)
        pipe.set_progress_bar_config(disable=True)
        latents = []
        result = pipe(
            prompt_embeds=torch.zeros(1, 4, 16),
            negative_prompt_embeds=torch.zeros(1, 4, 16),
            num_frames=17,
            height=16,
            width=16,
            num_inference_steps=1,
            output_type="pt",
            callback_on_step_end=lambda _, i, t, values, kept=latents: kept.append(values["latents"]) or values,
        )
        assert result.frames.shape == (1, 17, 3, 16, 16)
        sizes[ratio] = latents[0].shape[2]
        scaled = latents[0].float() * torch.tensor([1.0, 2.0, 0.5, 1.5]).view(-1, 1, 1, 1)
        raw = (scaled + torch.tensor([0.1, -0.2, 0.3, 0.0]).view(-1, 1, 1, 1)).to(dtype)
        video = model.decode(raw, ratio).sample.float().clamp(-1, 1) / 2 + 0.5
        difference = (result.frames.float() - video.transpose(1, 2)).abs().mean()
        assert difference < (5e-3 if dtype == torch.bfloat16 else 1e-5)
    assert sizes == {None: 2, 8: 3, 4: 5}
    config = model.serve(None).config
    assert (config.z_dim, config.scale_factor_temporal, config.scale_factor_spatial) == (4, 16, 8)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert not {"z_dim", "scale_factor_temporal"} & stored.keys()
    with pytest.raises(ValueError, match=re.escape("temporal ratio 32: this tokenizer has 4x, 8x, 16x")):
        model.serve(32)


@torch.no_grad()
def test_wans_video_to_video_pipeline_samples_with_it(monkeypatch):
    _, model = grown("Wan 2.1")
    stock = make_stock()
    parts = {"tokenizer": stock.tokenizer, "text_encoder": stock.text_encoder, "transformer": stock.transformer}
    pipe = WanVideoToVideoPipeline(**parts, scheduler=stock.scheduler, vae=model.serve(16))
    pipe.set_progress_bar_config(disable=True)
    assert (pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial) == (16, 8)
    video = [Image.new("RGB", (16, 16), (i, 0, 0)) for i in range(17)]
    call = {"height": 16, "width": 16, "num_inference_steps": 2, "max_sequence_length": 8, "output_type": "pt"}
    assert pipe(video, "a red disc", **call).frames.shape == (1, 17, 3, 16, 16)
    with monkeypatch.context() as mochi:
        mochi.setattr(AutoencoderKLProMAG, "temporal_compression_ratio", 6)
        assert not hasattr(model, "temperal_downsample")  # sum and count cannot state it


@pytest.mark.parametrize("takes_time", [False, True])  # the decoder of 0.9.0, and from 0.9.1 on
@torch.no_grad()
def test_an_ltx_pipeline_samples_with_a_grown_autoencoder_and_the_statistics_in_its_buffers(takes_time):
    base = diffusers.AutoencoderKLLTXVideo(**SMALL["LTX"][1], timestep_conditioning=takes_time).eval()
    base.latents_mean.copy_(torch.linspace(-1, 1, 8))
    base.latents_std.copy_(torch.linspace(0.5, 2, 8))
    model = AutoencoderKLProMAG.from_base(base)
    model.grow(Growth(width=16))
    scale = model.encoder_growth[0].scale
    assert torch.equal(scale.mean.flatten(), base.latents_mean)
    assert torch.equal(scale.std.flatten(), base.latents_std)
    shape = {"in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16}
    transformer = LTXVideoTransformer3DModel(**shape, num_layers=1, caption_channels=16)
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = LTXPipeline(scheduler=scheduler, vae=model, text_encoder=None, tokenizer=None, transformer=transformer)
    pipe.set_progress_bar_config(disable=True)
    text = {"prompt_embeds": torch.zeros(1, 4, 16), "prompt_attention_mask": torch.ones(1, 4)}
    text |= {f"negative_{name}": value for name, value in text.items()}
    frames = pipe(**text, num_frames=33, height=64, width=64, num_inference_steps=1, output_type="pt").frames
    assert frames.shape == (1, 33, 3, 64, 64)  # three latent frames at 16x
