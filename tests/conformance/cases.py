"""The classes that `tests/conformance/count.py` lets pytest collect: diffusers' shared tests with our pipeline and models.

The tests themselves are mixins in diffusers' repository, importable as `tests`. This file has only what they need:
tiny components, inputs and shapes.
"""

import functools
import importlib
import unittest
from typing import Any

import diffusers.pipelines
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from transformers import T5Config, T5EncoderModel

from promag import AutoencoderKLProMAG, ProMAGPipeline, ProMAGTransformer3DModel
from promag.diffusion.text import learn_vocabulary
from promag.tokenizer.growth import Growth
from promag.training.safetensors_only import SafetensorsOnly

torch.set_num_threads(1)
# Our layers and so all outputs start at zero, and comparing zeros proves nothing.
torch.nn.init.zeros_ = lambda tensor: torch.nn.init.normal_(tensor, std=0.05)

# One test looks the class up there by name and reads the source of its encode_prompt.
setattr(diffusers.pipelines, ProMAGPipeline.__name__, ProMAGPipeline)

PROMPT = "dance monkey"
STATISTICS: dict[str, Any] = {"latents_mean": {"4": [0.0] * 4}, "latents_std": {"4": [1.0] * 4}}
TRANSFORMER: dict[str, Any] = {
    "in_channels": 4,
    "patch_size": (1, 1, 1),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 16,
    "temporal_ratios": (4,),
    "local_convolution": True,
}
TOKENIZER: dict[str, Any] = {
    "latent_channels": 4,
    "patch_size": 4,
    "block_out_channels": (16, 16, 16),
    "layers_per_block": 1,
    "strides": ((2, 2), (2, 1)),
    "growth": ({**Growth().__dict__},),
}


class PipelineConfig:
    """A pipeline with a T5 text encoder at 4x: 9 frames of 16x16 pixels."""

    pipeline_class = ProMAGPipeline
    output_shape = (9, 3, 16, 16)
    arguments = ("prompt", "negative_prompt", "height", "width", "guidance_scale", "prompt_embeds", "negative_prompt_embeds")
    params = required_input_params_in_call_signature = frozenset(arguments)
    batch_params = batch_input_params = frozenset(["prompt", "negative_prompt"])
    optional = ("num_inference_steps", "num_videos_per_prompt", "generator", "latents", "output_type", "return_dict")
    optional_input_params = required_optional_params = frozenset(optional)
    callback_cfg_params = frozenset(["prompt_embeds", "negative_prompt_embeds"])
    test_layerwise_casting = test_group_offloading = True
    test_xformers_attention = False

    @pytest.fixture(autouse=True)
    def safetensors(self, monkeypatch: pytest.MonkeyPatch, record_property: Any) -> None:
        """Save safetensors if a test requests a pickle, which our classes refuse, and record the request."""
        save = SafetensorsOnly.save_pretrained

        @functools.wraps(save)  # pipelines inspect the arguments of their parts' methods
        def save_pretrained(pipe: Any, folder: Any, safe_serialization: bool = True, **more: Any) -> None:
            if not safe_serialization:
                record_property("asked_for", "a pickle")
            save(pipe, folder, **more)

        monkeypatch.setattr(SafetensorsOnly, "save_pretrained", save_pretrained)

    def get_dummy_components(self, num_layers: int = 2) -> dict[str, Any]:
        """Return every part of a pipeline, the same at each call."""
        torch.manual_seed(0)
        tokenizer = learn_vocabulary([PROMPT, "a negative prompt, very long"], 300, max_length=16)
        sizes: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
        return {
            "tokenizer": tokenizer,
            "text_encoder": T5EncoderModel(T5Config(vocab_size=len(tokenizer), **sizes)).eval(),
            "transformer": ProMAGTransformer3DModel(**TRANSFORMER, **STATISTICS, num_layers=num_layers),
            "vae": AutoencoderKLProMAG(**TOKENIZER),
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
            **{f"{part}_{n}": None for part in ("tokenizer", "text_encoder") for n in (2, 3)},
        }

    def get_dummy_inputs(self, device: Any = None, seed: int = 0) -> dict[str, Any]:
        """Return the arguments of a call of two steps; the older tests, which pass a device, compare arrays."""
        return {
            "prompt": PROMPT,
            "negative_prompt": "negative",
            "generator": torch.Generator().manual_seed(seed),
            "num_inference_steps": 2,
            "guidance_scale": 6.0,
            "height": 16,
            "width": 16,
            "num_frames": 9,
            "temporal_ratio": 4,
            "max_sequence_length": 16,
            "output_type": "pt" if device is None else "np",
        }


class TransformerConfig:
    """A transformer of two blocks over latents of 2x4x4."""

    model_class = ProMAGTransformer3DModel
    output_shape = input_shape = (4, 2, 4, 4)
    checkpointed = {"ProMAGTransformer3DModel"}  # noqa: RUF012
    main_input_name = "hidden_states"
    # The library's own patterns match modules called attn, ours like Wan's are attn1 and attn2.
    TAYLORSEER_CACHE_CONFIG = {  # noqa: RUF012
        "cache_interval": 3,
        "disable_cache_before_step": 1,
        "max_order": 1,
        "cache_identifiers": [r"transformer_blocks\.\d+\.attn1"],
    }

    def get_init_dict(self) -> dict[str, Any]:
        """Arguments of the model."""
        return {**TRANSFORMER, "num_layers": 2}

    def get_dummy_inputs(self, **_: Any) -> dict[str, Any]:
        """Arguments of its call, in the types that the test requests."""
        g = torch.Generator().manual_seed(0)
        kind = getattr(self, "torch_dtype", torch.float32)
        return {
            "hidden_states": torch.randn(2, 4, 2, 4, 4, generator=g).to(kind),
            "timestep": torch.tensor([300.0, 700.0]),
            "encoder_hidden_states": torch.randn(2, 12, 16, generator=g).to(kind),
            "encoder_attention_mask": torch.ones(2, 12, dtype=torch.long),
        }


class TokenizerConfig:
    """A tokenizer grown from 4x to 8x, given 9 frames of 16x16 pixels."""

    model_class = AutoencoderKLProMAG
    output_shape = input_shape = (3, 9, 16, 16)
    checkpointed = {"ResBlock", "Downsample", "Upsample", "Head", "CrossLevelAttention"}  # noqa: RUF012
    main_input_name = "sample"

    def get_init_dict(self) -> dict[str, Any]:
        """Arguments of the model."""
        return dict(TOKENIZER)

    def get_dummy_inputs(self) -> dict[str, Any]:
        """Arguments of its call."""
        return {"sample": torch.rand(2, 3, 9, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1}


CACHES = [f"{name}TesterMixin" for name in ("PyramidAttentionBroadcast", "FasterCache", "FirstBlockCache")]
CACHES += ["TaylorSeerCacheTesterMixin", "MagCacheTesterMixin"]
OFFLOAD = ["CPUOffloadTesterMixin", "GroupOffloadTesterMixin"]
MODEL = ["ModelTesterMixin", *OFFLOAD, "LayerwiseCastingTesterMixin", "TrainingTesterMixin"]
PIPELINE = ["PipelineTesterMixin", "PipelineOffloadTesterMixin", "GroupOffloadTesterMixin", "LayerwiseCastingTesterMixin"]
PIPELINE += ["LoraTesterMixin", "LoraMemoryTesterMixin", *CACHES]
TRANSFORMER_ONLY = [
    "AttentionTesterMixin",
    "AttentionBackendTesterMixin",
    "TorchCompileTesterMixin",
    "LoraTesterMixin",
    *CACHES,
]
# Name of the classes, their configuration, the module under `tests`, its mixins. Each mixin has a class of its own: the
# umbrella of the memory tests skips all of them without an accelerator, and two caches cannot share a class.
TABLE: list[tuple[str, type, str, list[str]]] = [
    ("Pipeline", PipelineConfig, "pipelines.testing_utils", PIPELINE),
    ("OldPipeline", PipelineConfig, "pipelines.test_pipelines_common", ["PipelineTesterMixin", *CACHES]),
    ("Transformer", TransformerConfig, "models.testing_utils", [*MODEL, *TRANSFORMER_ONLY]),
    ("Tokenizer", TokenizerConfig, "models.testing_utils", MODEL),
    ("Tokenizer", TokenizerConfig, "models.autoencoders.testing_utils", ["AutoencoderTesterMixin"]),
]


def collect() -> None:
    """Define a class for each line of the table and each of its mixins."""
    pipelines, models = (importlib.import_module(f"tests.{kind}.testing_utils") for kind in ("pipelines", "models"))
    for name, config, place, mixins in TABLE:
        module = importlib.import_module(f"tests.{place}")
        last = models.BaseModelTesterConfig if place.startswith("models") else pipelines.BasePipelineTesterConfig
        for mixin in mixins:
            made, tested = f"Test{name}_{mixin}", getattr(module, mixin)
            content: dict[str, Any] = {"__module__": __name__}
            if mixin == "TrainingTesterMixin":
                # It is marked as needing an accelerator, but does not.
                tested.pytestmark = [mark for mark in tested.pytestmark if mark.name != "skipif"]
                content["test_gradient_checkpointing_is_applied"] = checkpointing_test(tested, config)
            elif config is not PipelineConfig and mixin in OFFLOAD:
                # diffusers' combined mixin is marked so, its parts are not.
                content["pytestmark"] = [pytest.mark.skipif(not torch.cuda.is_available(), reason="test requires accelerator")]
            bases = (config, tested, unittest.TestCase if name == "OldPipeline" else last)
            globals()[made] = type(made, bases, content)


def checkpointing_test(tested: Any, config: Any) -> Any:
    """Return the shared test with the names of the modules that must report gradient checkpointing."""

    def test_gradient_checkpointing_is_applied(self: Any) -> None:
        tested.test_gradient_checkpointing_is_applied(self, expected_set=config.checkpointed)

    return test_gradient_checkpointing_is_applied


collect()
