"""LoRA adapters for the transformer, from files in any of the usual namings.

    transformer.LAYER.lora_A.weight        diffusers, and `promag train-diffusion`
    LAYER.lora_A.weight                    bare
    base_model.model.LAYER.lora_A.weight   peft; adapter_config.json beside the file states alpha
    diffusion_model.LAYER.lora_A.weight    ComfyUI
    lora_unet_LAYER.lora_down.weight       kohya: the layer's dots are underscores; LAYER.alpha states alpha

LAYER is the dotted name of a linear layer. lora_A and lora_down, lora_B and lora_up are the same, in every naming. An adapter
adds alpha / rank * B A to the layer's weight; without a stated alpha it is the rank, as in diffusers.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.loaders import SanaLoraLoaderMixin
from diffusers.loaders.lora_base import _fetch_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from torch import Tensor, nn

from promag.training.config import UserError, one_line
from promag.training.safetensors_only import PICKLES

SAMPLING = "promag_sampling"  # key of a file's metadata
PEFT = "base_model.model."
DOTTED, UNDERSCORED = (PEFT, "transformer.", "diffusion_model.", ""), ("lora_unet_", "lora_transformer_")
TENSOR = re.compile(r"(.+)\.lora[_.](A|B|down|up)(?:\.default)?\.(weight|bias)")
ENDS = {"down": "A", "up": "B"}
ALPHA = ".alpha"
# What of a peft configuration decides an adapter's output, beside its tensors.
PEFT_KEYS = ("rank_pattern", "alpha_pattern", "use_rslora", "lora_bias")
# How diffusers reads a file's tensors and metadata; its public function drops tensors that it does not know with a warning.
SOURCE: dict[str, Any] = {
    "weight_name": None,
    "local_files_only": None,
    "cache_dir": None,
    "force_download": False,
    "proxies": None,
    "token": None,
    "revision": None,
    "subfolder": None,
    "user_agent": {},
    "use_safetensors": True,
    "allow_pickle": False,
}
LEGAL = (
    "legal are transformer.LAYER.lora_A.weight, with the prefix diffusion_model. or base_model.model. or none instead, and "
    "lora_unet_LAYER.lora_down.weight"
)


# Of Sana the mixin has the name alone: it is diffusers' loader for pipelines with one transformer and no LoRA elsewhere.
class LoraLoader(SanaLoraLoaderMixin):
    """Loads, saves, scales and fuses the LoRA adapters of a pipeline's transformer."""

    transformer: Any

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """Load adapters for the transformer, from safetensors or a dictionary, in any of the namings of this module.

        Raises UserError for a pickle, a file that cannot be read, and adapters of which not every tensor fits the transformer.
        """
        given, low_cpu_mem_usage = pretrained_model_name_or_path_or_dict, kwargs.pop("low_cpu_mem_usage", True)
        name, weight_name = "dictionary", kwargs.get("weight_name") or ""
        if not isinstance(given, dict):
            name = str(Path(given, kwargs.get("subfolder") or "", weight_name))
            if Path(name).suffix in PICKLES or (weight_name and not weight_name.endswith(".safetensors")):
                raise UserError(f"LoRA {name}: may be a pickle, which runs code when loaded; only safetensors are loaded")
        try:
            weights, metadata = _fetch_state_dict(given, **{**SOURCE, **kwargs})
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"LoRA {name}: cannot be read: {one_line(error)}") from None
        adapters, alphas = rename_lora(weights, self.transformer, name)
        if alphas or metadata is None:
            config = _adapter_config(adapters, alphas)
            if not isinstance(given, dict) and any(key.startswith(PEFT) for key in weights):
                config |= _peft_config(Path(name))
            metadata = {f"transformer.{key}": value for key, value in config.items()}
        try:
            self.transformer.load_lora_adapter(
                {f"transformer.{key}": tensor for key, tensor in adapters.items()},
                metadata=metadata,
                adapter_name=adapter_name,
                hotswap=hotswap,
                low_cpu_mem_usage=low_cpu_mem_usage,
                _pipeline=self,
            )
        except TypeError as error:
            raise UserError(f"LoRA {name}: its configuration {metadata} cannot be used: {one_line(error)}") from None


def rename_lora(weights: Mapping[str, Tensor], transformer: nn.Module, name: str) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return adapters by peft's names, LAYER.lora_A.weight, and the stated alphas by layer.

    Raises UserError, naming the keys and `name`, for tensors that fit no linear layer, by name or by shape, and lone halves.
    """
    layers = linear_layers(transformer)
    places = {f"{prefix}{layer}": layer for layer in layers for prefix in DOTTED}
    places |= {f"{prefix}{layer.replace('.', '_')}": layer for layer in layers for prefix in UNDERSCORED}
    adapters: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    sources: dict[str, str] = {}  # the file's key of each adapter
    foreign = []
    for key, tensor in weights.items():
        match = TENSOR.fullmatch(key)
        if key.endswith(ALPHA) and (layer := places.get(key.removesuffix(ALPHA))):
            alphas[layer] = _alpha(key, tensor, name)
        elif match and (layer := places.get(match[1])):
            adapter_key = f"{layer}.lora_{ENDS.get(match[2], match[2])}.{match[3]}"
            adapters[adapter_key], sources[adapter_key] = tensor, key
        else:
            foreign.append(key)
    fitting = sorted({key.split(".lora_")[0] for key in adapters})
    if foreign or not adapters:
        problem = f"{len(foreign)} of its {len(weights)} tensors fit no layer of this transformer ({_some(foreign)})"
        fit = f"{len(weights) - len(foreign)} fit ({_some(fitting)})"
        raise UserError(f"LoRA {name}: {problem}; {fit if fitting else f'none fits: {LEGAL}; layers: {_some(layers)}'}")
    for layer in fitting:
        a, b = (adapters.get(f"{layer}.lora_{end}.weight") for end in "AB")
        if a is None or b is None:
            raise UserError(f"LoRA {name}: {layer} has only one of lora_A.weight and lora_B.weight; both are needed")
        rows, columns = layers[layer].weight.shape
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != columns or tuple(b.shape) != (rows, len(a)) or not len(a):
            raise UserError(
                f"LoRA {name}: {sources[f'{layer}.lora_A.weight']} of {tuple(a.shape)} with its other half of "
                f"{tuple(b.shape)}: (rank, {columns}) and ({rows}, rank) are needed"
            )
    broken = [sources[key] for key, tensor in adapters.items() if not (tensor.is_floating_point() and tensor.isfinite().all())]
    if broken:
        raise UserError(f"LoRA {name}: {_some(broken)}: all values must be finite numbers")
    return adapters, alphas


def record_sampling(file: Path, sampling: Mapping[str, Any]) -> None:
    """Write into the file of adapters how they are sampled; the file may then be moved alone.

    `sampling` may hold temporal_ratios, those of the training, and num_inference_steps and guidance_scale, those of a student.
    """
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(load(file.read_bytes()), file, {**metadata, SAMPLING: json.dumps(sampling)})


def recorded_sampling(file: Path) -> dict[str, Any]:
    """Return what `record_sampling` wrote into a file of adapters; {} where it wrote nothing."""
    with safe_open(file, "pt") as opened:
        return json.loads((opened.metadata() or {}).get(SAMPLING, "{}"))


def linear_layers(transformer: nn.Module) -> dict[str, nn.Linear]:
    """Return a model's linear layers by name; a layer that holds adapters counts as the one that it was."""
    layers = {}
    for name, module in transformer.named_modules():
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        if isinstance(module, nn.Linear) and not re.search(r"\.(base_layer|lora_\w+)(\.|$)", name):
            layers[name] = module
    return layers


def _alpha(key: str, tensor: Tensor, name: str) -> float:
    alpha = float(tensor) if tensor.numel() == 1 else math.nan
    if not math.isfinite(alpha):
        raise UserError(f"LoRA {name}: {key} is {tensor.tolist()}: one finite number is needed")
    return alpha


def _adapter_config(adapters: Mapping[str, Tensor], alphas: Mapping[str, float]) -> dict[str, Any]:
    """Return peft's configuration of adapters, with a rank and an alpha for each layer."""
    ranks = {key.removesuffix(".lora_A.weight"): len(a) for key, a in adapters.items() if key.endswith(".lora_A.weight")}
    rank = next(iter(ranks.values()))
    return {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": {f"^{layer}": rank for layer, rank in ranks.items()},
        "alpha_pattern": {f"^{layer}": alphas.get(layer, rank) for layer, rank in ranks.items()},
        "target_modules": list(ranks),
        "lora_bias": any(key.endswith(".bias") for key in adapters),
    }


def _peft_config(place: Path) -> dict[str, Any]:
    """Return what adapter_config.json states beside a file that peft saved; raises UserError without one."""
    file = (place if place.is_dir() else place.parent) / "adapter_config.json"
    try:
        config = {"rank_pattern": {}, "alpha_pattern": {}, **json.loads(file.read_text(encoding="utf-8"))}
        return {"r": config["r"], "lora_alpha": config["lora_alpha"]} | {key: config[key] for key in PEFT_KEYS if key in config}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"LoRA {place}: peft's names need {file} with their alpha: {error}") from None


def _some(names: Any) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
