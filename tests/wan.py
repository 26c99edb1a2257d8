"""The smallest WanPipeline with every part and random weights."""

from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from promag.diffusion.text import learn_vocabulary
from promag.tokenizer.autoencoder import AutoencoderKLProMAG
from promag.tokenizer.growth import Growth

PROMPTS = ["a red disc moves left", "a blue square grows"]
TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 12,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
MEAN, STD = (0.5, -1.0, 0.25, 2.0), (2.0, 0.5, 1.5, 1.0)
AUTOENCODER = {
    "base_dim": 4,
    "z_dim": 4,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
    "latents_mean": MEAN,
    "latents_std": STD,
}


def make_transformer(**change: Any) -> WanTransformer3DModel:
    """Return a transformer with random weights."""
    torch.manual_seed(0)
    return WanTransformer3DModel(**{**TRANSFORMER, **change})


def make_text() -> tuple[Any, UMT5EncoderModel]:
    """Return a tokenizer and a UMT5 of width 12 with random weights."""
    vocabulary = learn_vocabulary(PROMPTS, 300)
    torch.manual_seed(0)
    sizes = {"d_model": 12, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return vocabulary, UMT5EncoderModel(UMT5Config(vocab_size=len(vocabulary), **sizes)).eval()


def make_autoencoder(**change: Any) -> AutoencoderKLWan:
    """Return a 4x8x8 autoencoder with random weights."""
    torch.manual_seed(0)
    return AutoencoderKLWan(**{**AUTOENCODER, **change}).eval()


def make_grown(levels: int = 3) -> AutoencoderKLProMAG:
    """Return a tokenizer of `levels` levels on top of such an autoencoder, none of its weights zero."""
    model = AutoencoderKLProMAG.from_base(make_autoencoder())
    for _ in range(levels - 1):
        model.grow(Growth(width=16))
    with torch.no_grad():
        for part in (model.encoder_growth, model.decoder_growth):
            for parameter in part.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def make_stock(**change: Any) -> WanPipeline:
    """Return a WanPipeline with the scheduler of the published ones."""
    tokenizer, text_encoder = make_text()
    scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    parts = {"transformer": make_transformer(), "vae": make_autoencoder(), "scheduler": scheduler}
    pipe = WanPipeline(tokenizer=tokenizer, text_encoder=text_encoder, **{**parts, **change})
    pipe.set_progress_bar_config(disable=True)
    return pipe
