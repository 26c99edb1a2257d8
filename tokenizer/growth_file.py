"""What was grown, saved apart from its base: a small file beside a large autoencoder that stays as it is.

A folder holds growth.json (the base's class, configuration and fingerprint, its path from this folder, and the settings of
each level) and growth.safetensors (the weights of the levels).
"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from promag.training.config import UserError, one_line
from promag.training.files import replaced_folder, write_atomically
from promag.training.safetensors_only import read_mapping

from .base import BASE_SETTINGS
from .existing import fingerprint
from .growth import Growth

SETTINGS, WEIGHTS = "growth.json", "growth.safetensors"
GROWN = ("encoder_growth.", "decoder_growth.", "own_encoders.", "own_decoders.")


def base_weights(model: Any) -> dict[str, Tensor]:
    """Return the base's weights by the names of its own class."""
    if model.existing:
        return {**model.encoder.model.state_dict(), **model.decoder.model.state_dict()}
    return {name: value for name, value in model.state_dict().items() if name.startswith(("encoder.", "decoder."))}


def describe_base(model: Any) -> dict[str, Any]:
    """Return class, configuration and fingerprint of a model's base."""
    if model.existing:
        settings: dict[str, Any] = asdict(model.existing)
    else:
        settings = {"class_name": type(model).__name__, "config": {key: model.own_config[key] for key in BASE_SETTINGS}}
    return {**settings, "fingerprint": fingerprint(base_weights(model))}


def write_growth(model: Any, folder: Path, dtype: torch.dtype | None) -> None:
    """Save the levels above the base; see `AutoencoderKLProMAG.save_growth`."""
    if not len(model.encoder_growth):
        raise ValueError(f"save_growth: nothing was grown yet; the model has {model.temporal_ratios[0]}x alone")
    grown = ((name, value) for name, value in model.state_dict().items() if name.startswith(GROWN))
    weights = {name: value.detach().to("cpu", dtype).contiguous() for name, value in grown}
    settings = {"base": describe_base(model), "growth": model.config["growth"], "path": _path_from(folder, model.base_path)}
    if folder.exists() and any(folder.iterdir()) and not (folder / SETTINGS).is_file():
        raise UserError(f"{folder}: holds other files than those of save_growth; name another folder")
    with replaced_folder(folder) as aside:
        save_file(weights, aside / WEIGHTS)
        write_atomically(aside / SETTINGS, json.dumps(settings, indent=1) + "\n")


def _path_from(folder: Path, base: str | None) -> str | None:
    """Return a base's path from a folder of levels: both may be moved together, and where they are does not matter."""
    try:
        return base and os.path.relpath(os.path.realpath(base), os.path.realpath(folder))
    except ValueError:  # another drive of Windows
        return base


def read_growth(cls: Any, folder: Path, base: Any) -> Any:
    """Load the levels on their base; see `AutoencoderKLProMAG.load_growth`."""
    settings = read_mapping(folder / SETTINGS)
    try:
        wanted, growth, path = settings["base"], settings["growth"], settings.get("path")
        features, name, known = wanted.get("features", "latents"), wanted["class_name"], wanted["fingerprint"]
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{folder / SETTINGS}: needs base, with class_name and fingerprint, and growth") from None
    load = f"load it with AutoencoderKLProMAG.load_growth({str(folder)!r}, BASE) and save that whole by save_pretrained"
    if base is None:
        if path is None:
            raise UserError(f"{folder}: was grown on an {name} whose folder is not recorded; name its base: {load}")
        base = os.path.normpath(os.path.join(os.path.realpath(folder), path))  # an absolute path of earlier versions stays one
    if isinstance(base, nn.Module):
        place, is_a = "the base given", type(base).__name__
    elif Path(base, "config.json").is_file():
        place, is_a = str(base), str(read_mapping(Path(base, "config.json")).get("_class_name"))
    else:
        raise UserError(f"{folder}: its base, an {name}, is not in {base}; put it there, or {load}")
    if is_a != name:
        raise UserError(f"{folder}: was grown on an {name}; {place} is an {is_a}")
    model: Any
    if name != cls.__name__:
        model = cls.from_base(base, features)
    else:
        model = base if isinstance(base, nn.Module) else cls.from_pretrained(base)
    if len(model.encoder_growth):
        raise UserError(f"{folder}: {place} has levels already, up to {model.temporal_ratios[-1]}x; name its base alone")
    if (has := describe_base(model)["fingerprint"]) != known:
        half = any(p.dtype == torch.float16 for p in model.parameters())
        other = "is in float16, which rounds them: load it in float32 or bfloat16" if half else f"has other weights, {has[:12]}"
        raise UserError(f"{folder}: was grown on an {name} of fingerprint {str(known)[:12]}; {place} {other}")
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS}: cannot be read: {one_line(error)}") from None
    try:
        for level in growth:
            model.grow(Growth(**level))
        needed = {key for key in model.state_dict() if key.startswith(GROWN)}
        if needed != weights.keys():
            odd = sorted(needed ^ weights.keys())
            raise ValueError(f"its levels need other tensors, first {odd[0]}")
        model.load_state_dict(weights, strict=False)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder}: cannot be loaded: {one_line(error)}") from None
    return model.eval()
