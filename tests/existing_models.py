"""Small configurations of diffusers' video autoencoders, as their published ones are built."""

import diffusers
import torch

_WAN = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
    "latents_mean": [0.1, -0.2, 0.3, 0.0],
    "latents_std": [1.0, 2.0, 0.5, 1.5],
}
SMALL = {  # name -> class, configuration
    "Wan 2.1": ("AutoencoderKLWan", _WAN),
    "Wan 2.2": (
        "AutoencoderKLWan",
        {**_WAN, "is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16},
    ),
    "HunyuanVideo": (
        "AutoencoderKLHunyuanVideo",
        {"latent_channels": 4, "block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 2},
    ),
    "HunyuanVideo 1.5": (
        "AutoencoderKLHunyuanVideo15",
        {"latent_channels": 4, "block_out_channels": (8, 8, 16, 16, 16), "layers_per_block": 1},
    ),
    "CogVideoX": (
        "AutoencoderKLCogVideoX",
        {
            "down_block_types": ("CogVideoXDownBlock3D",) * 4,
            "up_block_types": ("CogVideoXUpBlock3D",) * 4,
            "block_out_channels": (8, 8, 8, 8),
            "latent_channels": 4,
            "layers_per_block": 1,
            "norm_num_groups": 2,
        },
    ),
    "LTX": (
        "AutoencoderKLLTXVideo",
        {
            "block_out_channels": (8, 8, 8, 8),
            "decoder_block_out_channels": (8, 8, 8, 8),
            "latent_channels": 8,
            "layers_per_block": (1, 1, 1, 1, 1),
            "decoder_layers_per_block": (1, 1, 1, 1, 1),
        },
    ),
}

UNKNOWN = {"Wan 2.2": {"clip_output": False}}  # what the published config.json holds beside what the class takes


def small_existing(name: str):
    """Return a small autoencoder with random weights, for inference."""
    torch.manual_seed(0)
    class_name, config = SMALL[name]
    model = getattr(diffusers, class_name)(**config).eval()
    model.register_to_config(**UNKNOWN.get(name, {}))
    return model
