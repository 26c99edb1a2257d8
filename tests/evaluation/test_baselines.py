import diffusers
import pytest
import torch

from promag.evaluation.baselines import build_baseline, open_baseline

WAN = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 2, 2], "num_res_blocks": 1, "temperal_downsample": [False, True, True]}


def test_a_baseline_has_the_interface_of_our_tokenizer():
    torch.manual_seed(0)
    baseline = build_baseline("AutoencoderKLWan", WAN)
    assert baseline.temporal_ratios == (4,)
    assert len(baseline.train_only(4)) == len(list(baseline.model.parameters()))
    x = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    posterior = baseline.encode(x, 4).latent_dist
    assert posterior.mode().shape == (1, 4, 2, 2, 2)
    assert torch.equal(baseline(x, 4).sample, baseline.model.decode(baseline.model.encode(x).latent_dist.mode()).sample)
    with pytest.raises(ValueError, match="temporal ratio 8: this tokenizer has 4x"):
        baseline.encode(x, 8)
    with pytest.raises(ValueError, match="6 frames: 4x needs"):
        baseline.encode(torch.zeros(1, 3, 6, 16, 16))


def test_every_weight_of_a_baseline_learns():
    torch.manual_seed(0)
    baseline = build_baseline("AutoencoderKLWan", WAN)
    baseline(torch.rand(1, 3, 9, 16, 16) * 0.1).sample.square().mean().backward()
    without = [name for name, p in baseline.named_parameters() if p.grad is None]
    assert without == []


def test_hidden_kernels_of_a_baseline_exclude_those_at_pixels_and_latents():
    baseline = build_baseline("AutoencoderKLWan", WAN)
    hidden = {id(p) for p in baseline.hidden_kernels()}
    ends = [f"{side}.conv_{end}" for side in ("encoder", "decoder") for end in ("in", "out")]
    ends += ["quant_conv", "post_quant_conv"]
    at_ends = {name for name, p in baseline.model.named_parameters() if name.endswith("weight") and id(p) not in hidden}
    assert at_ends == {f"{end}.weight" for end in ends}


@pytest.mark.parametrize("name", ["AutoencoderKLNothing", "UNet2DModel"])
def test_an_unknown_baseline_is_named(name):
    with pytest.raises(ValueError, match=f"autoencoder '{name}': diffusers .* has no autoencoder of that name"):
        build_baseline(name, {})


LTX = {
    "block_out_channels": (8, 8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8, 8),
    "latent_channels": 8,
    "layers_per_block": (1, 1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1, 1),
    "spatio_temporal_scaling": (True, True, True, False),
    "decoder_spatio_temporal_scaling": (True, True, True, False),
    "decoder_inject_noise": (False, False, False, False, False),
}
COGVIDEOX = {
    "down_block_types": ("CogVideoXDownBlock3D",) * 4,
    "up_block_types": ("CogVideoXUpBlock3D",) * 4,
    "block_out_channels": (8, 8, 8, 8),
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 2,
}
HUNYUAN = {
    "latent_channels": 4,
    "block_out_channels": (8, 8, 8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 2,
}
SAVED = {  # class, configuration, temporal ratio, spatial ratio, latent channels, frames between legal lengths
    "Wan": (WAN, 4, 8, 4, 4),
    "LTXVideo": (LTX, 8, 32, 8, 8),
    "CogVideoX": (COGVIDEOX, 4, 8, 4, 8),
    "HunyuanVideo": (HUNYUAN, 4, 8, 4, 4),
    "QwenImage": (WAN, 4, 8, 4, 4),
}


@pytest.mark.parametrize("name", SAVED)
def test_a_saved_autoencoder_is_opened_by_the_class_in_its_config(name, tmp_path):
    config, *arithmetic = SAVED[name]
    torch.manual_seed(0)
    build_baseline(f"AutoencoderKL{name}", config).save_pretrained(tmp_path)
    opened = open_baseline(tmp_path)
    baseline, spatial, channels = opened.model, opened.spatial, opened.channels
    assert [baseline.temporal_ratios[0], spatial, channels, opened.step] == arithmetic
    x = torch.rand(1, 3, 1 + 2 * arithmetic[0], 64, 64) * 2 - 1
    with torch.no_grad():
        assert baseline(x).sample.shape == x.shape
        assert baseline.encode(x).latent_dist.mode().shape == (1, channels, 3, 64 // spatial, 64 // spatial)


def test_a_decoder_with_a_time_input_gets_time_zero(tmp_path):
    torch.manual_seed(0)
    build_baseline("AutoencoderKLLTXVideo", {**LTX, "timestep_conditioning": True}).save_pretrained(tmp_path)
    baseline = open_baseline(tmp_path).model
    z = torch.randn(1, 8, 2, 2, 2)
    with torch.no_grad():
        assert torch.equal(baseline.decode(z).sample, baseline.model.decode(z, temb=torch.zeros(1)).sample)


def test_autoencoders_that_cannot_be_compared_are_refused_with_a_reason(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json there"):
        open_baseline(tmp_path)
    image = {"block_out_channels": (8, 8), "latent_channels": 4, "norm_num_groups": 2}
    image |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    diffusers.AutoencoderKL(**image).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="AutoencoderKL: its temporal ratio is not in its config"):
        open_baseline(tmp_path)


def test_a_baseline_is_opened_only_from_whole_safetensors(tmp_path):
    model = build_baseline("AutoencoderKLWan", WAN).model
    model.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    with pytest.raises(ValueError, match=r"autoencoder .*pickled: cannot be loaded: .*\.safetensors"):
        open_baseline(tmp_path / "pickled")
    model.save_pretrained(tmp_path / "cut")
    file = tmp_path / "cut" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"cut/diffusion_pytorch_model\.safetensors: is no whole safetensors file"):
        open_baseline(tmp_path / "cut")
    (tmp_path / "cut" / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"cut/config\.json: contains \[\]: a mapping of keys is needed"):
        open_baseline(tmp_path / "cut")
