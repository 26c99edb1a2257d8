"""From a stock WanPipeline and a grown autoencoder to a WanPipeline, or to adapters that it loads."""

import dataclasses

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKLWan, DiffusionPipeline, WanPipeline
from safetensors.torch import load_file

from promag import AutoencoderKLProMAG, load_tokenizer
from promag.diffusion.config import BudgetConfig, DiffusionConfig
from promag.diffusion.finetune import Lora, add_lora
from promag.pipelines.build import cache, train_pipeline
from promag.pipelines.sampling import open_pipeline, trained_ratios
from promag.pipelines.stock import StockPipeline, without_levels_above
from promag.tokenizer.growth import Growth
from promag.training.config import UserError, build, load_yaml
from promag.training.run import checkpoints, load_checkpoint
from tests.existing_models import small_existing
from tests.wan import make_autoencoder, make_grown, make_stock, make_transformer

CALL = {"height": 32, "width": 32, "num_frames": 17, "num_inference_steps": 2, "guidance_scale": 4.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("existing")
    make_stock().save_pretrained(place / "init")
    make_grown().save_pretrained(place / "grown")
    make_autoencoder().save_pretrained(place / "wan")
    return place


def configuration(folder, run, ratio=16, **change) -> DiffusionConfig:
    values = load_yaml("configs/diffusion/tiny.yaml")
    values.pop("text")
    values["data"] |= {"synthetic_clips": 3, "validation_clips": 2, "frames": 17, "size": 32, "cache": str(run / "latents")}
    values["optimization"] |= {"steps": 2, "batch_size": 2, "warmup": 1, "learning_rate": 0.01, "muon_learning_rate": None}
    values["run"] |= {"log_every": 1, "validate_every": 2, "save_every": 2, "workers": 0, "trackers": []}
    values |= {"output_dir": str(run), "tokenizer": str(folder / "grown"), "precision": "fp32", "samples": None, "shift": 3.0}
    values |= {"init": str(folder / "init"), "model": None, "budgets": [{"ratio": ratio}], **change}
    return build(DiffusionConfig, values, "test")


def sampled(pipe, **options):
    pipe.set_progress_bar_config(disable=True)
    return pipe("a red disc", generator=torch.Generator().manual_seed(0), **{"output_type": "pt", **CALL, **options}).frames


def test_a_stock_pipeline_is_trained_to_a_stock_pipeline(folder, tmp_path):
    samples = {"prompts": ["a red &amp; disc"], "every": 2, "steps": 1}
    saved = train_pipeline(configuration(folder, tmp_path, samples=samples))
    assert saved == tmp_path / "pipeline"
    stock = DiffusionPipeline.from_pretrained(saved)
    assert (type(stock), type(stock.vae)) == (WanPipeline, AutoencoderKLProMAG)
    assert (type(stock.scheduler).__name__, stock.scheduler.config.flow_shift) == ("UniPCMultistepScheduler", 3.0)
    before = make_transformer().state_dict()
    assert not any(torch.equal(before[name], value) for name, value in stock.transformer.state_dict().items())
    video = sampled(stock)
    assert video.shape == (1, 17, 3, 32, 32)
    pipe = open_pipeline(saved)
    assert trained_ratios(pipe) == (16,)
    shape = [pipe.config[key] for key in ("height", "width", "num_frames", "max_sequence_length")]
    assert shape == [32, 32, 17, 512]
    assert torch.equal(sampled(pipe), video)
    averaged = load_checkpoint(checkpoints(tmp_path / "16x")[-1])[0]["ema"]
    for name, value in stock.transformer.state_dict().items():
        assert torch.equal(averaged[f"transformer.{name}"], value)


def test_one_size_that_is_not_square_is_trained_and_sampled_by_default(folder, tmp_path):
    config = configuration(folder, tmp_path)
    pipe = open_pipeline(train_pipeline(dataclasses.replace(config, data=dataclasses.replace(config.data, size=(32, 48)))))
    video = pipe("a red disc", num_inference_steps=1, output_type="pt").frames
    assert video.shape == (1, 17, 3, 32, 48)


def test_the_saved_autoencoder_ends_at_the_trained_ratio(folder, tmp_path):
    grown = make_grown()
    for ratio, kind in ((16, AutoencoderKLProMAG), (8, AutoencoderKLProMAG), (4, AutoencoderKLWan)):
        vae: AutoencoderKLProMAG | AutoencoderKLWan = without_levels_above(grown, ratio)
        assert type(vae) is kind
        assert vae.config.scale_factor_temporal == ratio
        z = torch.randn(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert torch.equal(vae.decode(z).sample, grown.decode(z, ratio).sample)
    saved = train_pipeline(configuration(folder, tmp_path, 8))
    stock = DiffusionPipeline.from_pretrained(saved)
    assert stock.vae.temporal_ratios == (4, 8)
    assert sampled(stock, output_type="latent").shape == (1, 4, 3, 4, 4)
    assert torch.equal(sampled(stock), sampled(open_pipeline(saved)))


def test_several_ratios_are_sampled_from_one_pipeline(folder, tmp_path):
    budgets = (BudgetConfig(ratio=16), BudgetConfig(ratio=4))
    saved = train_pipeline(dataclasses.replace(configuration(folder, tmp_path), budgets=budgets))
    pipe = open_pipeline(saved)
    assert trained_ratios(pipe) == (4, 16)
    assert pipe.config["temporal_ratio"] == 16
    frames = [sampled(pipe, output_type="latent", temporal_ratio=ratio).shape[2] for ratio in (None, 4, 16)]
    assert frames == [2, 5, 2]
    assert sampled(pipe, temporal_ratio=4).shape == (1, 17, 3, 32, 32)
    stock = DiffusionPipeline.from_pretrained(saved, vae=pipe.vae.serve(4))
    assert torch.equal(sampled(stock), sampled(pipe, temporal_ratio=4))


def test_an_autoencoder_of_diffusers_needs_no_growth(folder, tmp_path):
    saved = train_pipeline(configuration(folder, tmp_path, 4, tokenizer=str(folder / "wan")))
    stock = DiffusionPipeline.from_pretrained(saved)
    assert type(stock.vae) is AutoencoderKLWan
    assert torch.equal(sampled(stock), sampled(open_pipeline(saved)))
    source = make_autoencoder().state_dict()
    assert all(torch.equal(source[name], value) for name, value in stock.vae.state_dict().items())


def test_adapters_are_loaded_by_the_stock_pipeline(folder, tmp_path):
    lora = {"rank": 2, "alpha": 4.0, "targets": ["to_q", "to_v", "ffn.net.2"]}
    values = {"steps": 2, "batch_size": 2, "warmup": 1, "learning_rate": 1.0, "muon_learning_rate": None}
    saved = train_pipeline(configuration(folder, tmp_path, lora=lora, optimization=values))
    assert saved == tmp_path / "lora"
    assert all(name.startswith("transformer.blocks.") for name in load_file(saved / "pytorch_lora_weights.safetensors"))
    stock = WanPipeline.from_pretrained(folder / "init", vae=load_tokenizer(folder / "grown"))
    before = sampled(stock)
    stock.load_lora_weights(saved)
    adapted = sampled(stock)
    assert not torch.allclose(adapted, before, atol=1e-3)
    own = WanPipeline.from_pretrained(folder / "init", vae=load_tokenizer(folder / "grown"))
    add_lora(own.transformer, Lora(2, 4, ("to_q", "to_v", "ffn.net.2")))
    weights = dict(own.transformer.named_parameters())
    with torch.no_grad():
        for name, value in load_checkpoint(checkpoints(tmp_path / "16x")[-1])[0]["ema"].items():
            weights[name.removeprefix("transformer.")].copy_(value)
    assert torch.equal(sampled(own), adapted)


def test_what_does_not_fit_is_refused_before_anything_is_encoded(folder, tmp_path):
    make_transformer(in_channels=8, out_channels=8).save_pretrained(tmp_path / "eight")
    make_transformer(in_channels=36).save_pretrained(tmp_path / "image")
    text = {"encoders": [{"model": str(folder / "init"), "max_length": 8}]}
    for init, message in (
        (tmp_path / "eight", "WanTransformer3DModel takes latents of 8 channels, .* the tokenizer's states them for 4"),
        (tmp_path / "image", "an image-to-video transformer"),
    ):
        with pytest.raises(UserError, match=message):
            cache(configuration(folder, tmp_path, init=str(init), text=text), load_tokenizer(folder / "grown"))
    assert not (tmp_path / "latents").exists()
    with pytest.raises(UserError, match="temporal ratio 8: this tokenizer has 4x; grow it to 8x first"):
        cache(configuration(folder, tmp_path, 8), make_grown(1))


def test_a_grown_autoencoder_in_a_stock_pipeline_is_sampled_at_all_its_ratios(tmp_path):
    make_stock(vae=make_grown()).save_pretrained(tmp_path)
    pipe = open_pipeline(tmp_path)
    assert isinstance(pipe, StockPipeline)
    assert trained_ratios(pipe) == (4, 8, 16)
    assert pipe.config["temporal_ratio"] == 16
    for ratio in (4, 8, 16):
        assert sampled(pipe, temporal_ratio=ratio).shape == (1, 17, 3, 32, 32)


def test_wan_2_2_with_its_coarser_grid_is_trained_under_autocast(tmp_path):
    """Its autoencoder has 16x16 pixels a latent position, its pipeline a time for each token, which are all the same here."""
    vae = AutoencoderKLProMAG.from_base(small_existing("Wan 2.2"))
    vae.grow(Growth(width=16))
    vae.save_pretrained(tmp_path / "grown")
    make_stock(vae=small_existing("Wan 2.2"), expand_timesteps=True).save_pretrained(tmp_path / "init")
    samples = {"prompts": ["a red disc"], "every": 2, "steps": 1}
    AcceleratorState._reset_state(reset_partial_state=True)
    given = {"lora": {"rank": 2}, "gradient_checkpointing": True, "precision": "bf16", "samples": samples}
    saved = train_pipeline(configuration(tmp_path, tmp_path / "lora-run", 8, **given))
    stock = WanPipeline.from_pretrained(tmp_path / "init", vae=load_tokenizer(tmp_path / "grown"))
    stock.load_lora_weights(saved)
    assert sampled(stock).shape == (1, 17, 3, 32, 32)
    AcceleratorState._reset_state(reset_partial_state=True)  # its precision belongs to the process
    saved = train_pipeline(configuration(tmp_path, tmp_path / "run", 8))
    stock = DiffusionPipeline.from_pretrained(saved)
    assert stock.config.expand_timesteps
    assert (stock.vae_scale_factor_spatial, stock.vae_scale_factor_temporal) == (16, 8)
    assert torch.equal(sampled(stock), sampled(open_pipeline(saved)))
    config = configuration(tmp_path, tmp_path / "odd", 8)
    odd = dataclasses.replace(config, data=dataclasses.replace(config.data, size=40))
    with pytest.raises(UserError, match="height 40: needs a multiple of 16"):
        cache(odd, vae)
