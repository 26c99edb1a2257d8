"""Published video autoencoders and Wan transformers of diffusers, by their configurations; built without their weights.

The configurations are those of the config.json files on huggingface.co, read on 2026-11-26. What a configuration leaves out is
the class's default, which for five of the autoencoders is the published value throughout.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers


@dataclass(frozen=True)
class Published:
    """A published model: its class in diffusers, what differs from the class's defaults, and where that stands."""

    name: str
    class_name: str
    source: str
    config: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> Any:
        """Return an untrained model of this configuration on torch's default device."""
        return getattr(diffusers, self.class_name)(**self.config).eval()


# Mean and deviation of the latent's channels do not matter to sizes and arithmetic: Wan 2.2 has 48 of each, here 0 and 1.
_WAN_2_2 = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "in_channels": 12,
    "out_channels": 12,
    "is_residual": True,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}

AUTOENCODERS = {
    model.name: model
    for model in (
        Published("Wan 2.1", "AutoencoderKLWan", "diffusers/Wan2.1-VAE"),
        Published("Wan 2.2", "AutoencoderKLWan", "Wan-AI/Wan2.2-TI2V-5B-Diffusers, as nvidia/Cosmos3-Edge has it", _WAN_2_2),
        Published("HunyuanVideo", "AutoencoderKLHunyuanVideo", "hunyuanvideo-community/HunyuanVideo"),
        Published("HunyuanVideo 1.5", "AutoencoderKLHunyuanVideo15", "DiffusersVersionsOfModels/HunyuanVideo-1.5-vae"),
        Published("CogVideoX", "AutoencoderKLCogVideoX", "THUDM/CogVideoX-2b"),
        Published("LTX 0.9.0", "AutoencoderKLLTXVideo", "diffusers/LTX-Video-0.9.0"),
    )
}

_CONVERSION = "scripts/convert_wan_to_diffusers.py of huggingface/diffusers"
TRANSFORMERS = {
    model.name: model
    for model in (
        Published(
            "Wan 2.1 1.3B", "WanTransformer3DModel", _CONVERSION, {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
        ),
        Published("Wan 2.1 14B", "WanTransformer3DModel", _CONVERSION),
    )
}
