"""Loading and saving trained tokenizers."""

import json
import os
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from promag.training.config import UserError
from promag.training.files import finish_replacing, replaced_folder, write_atomically
from promag.training.safetensors_only import read_mapping

from .autoencoder import AutoencoderKLProMAG
from .existing import Features, describe, existing_class
from .growth_file import SETTINGS

MARKERS = ("config.json", "model_index.json", "pytorch_lora_weights.safetensors")  # what a saved model has at least


def load_tokenizer(folder: str | os.PathLike, features: Features = "latents") -> AutoencoderKLProMAG:
    """Load a tokenizer for inference: ours, one saved by `save_growth`, a video autoencoder of diffusers, or a pipeline's.

    `features` are those that growth will see of an autoencoder of diffusers. Raises UserError if the folder does not hold one.
    """
    folder = Path(folder)
    if (folder / "vae" / "config.json").exists():
        folder = folder / "vae"  # a whole pipeline
    if is_growth(folder):
        return AutoencoderKLProMAG.load_growth(folder)
    if not (folder / "config.json").exists():
        raise UserError(
            f"tokenizer {folder}: no config.json there; give a folder of `promag train-tokenizer`, a pipeline, or a video "
            "autoencoder of diffusers"
        )
    if class_name(folder) != AutoencoderKLProMAG.__name__:
        try:
            return AutoencoderKLProMAG.from_base(folder, features).eval()
        except ValueError as error:
            raise error if str(folder) in str(error) else UserError(f"tokenizer {folder}: {error}") from None
    model = AutoencoderKLProMAG.from_pretrained(folder)
    assert isinstance(model, AutoencoderKLProMAG)
    return model.eval()


def is_growth(folder: Path) -> bool:
    """Return whether a folder holds levels that `save_growth` saved without their base."""
    return (folder / SETTINGS).exists()


def class_name(folder: Path) -> str:
    """Return the class that a saved model's configuration names; ours where it names none."""
    return str(read_mapping(folder / "config.json").get("_class_name", AutoencoderKLProMAG.__name__))


def saved_ratios(folder: Path) -> tuple[int, ...]:
    """Return the temporal ratios of a saved tokenizer, lowest first, from its configuration alone."""
    config = read_mapping(folder / "config.json")
    if class_name(folder) != AutoencoderKLProMAG.__name__:
        with torch.device("meta"):
            return (describe(existing_class(class_name(folder)).from_config(config)).temporal_ratio,)
    try:
        existing = config.get("existing")
        base = existing["temporal_ratio"] if existing else prod(time for time, _ in config["strides"])
        return tuple(base * 2**level for level in range(1 + len(config["growth"])))
    except (LookupError, TypeError, ValueError):
        raise UserError(f"{folder}: config.json needs strides and growth, which list a tokenizer's levels") from None


def find_damage(folder: Path) -> str | None:
    """Return what a saved model, a pipeline or adapters lack, from the headers of their files; None where they are whole."""
    if not any((folder / name).is_file() for name in MARKERS):
        return f"{folder} holds no model"
    file = folder
    try:
        for file in folder.rglob("*.json"):
            values = json.loads(file.read_text(encoding="utf-8"))
            wanted: list[Path] = []
            if file.name == "model_index.json":
                kinds = {name: kind for name, kind in values.items() if isinstance(kind, list) and len(kind) == 2}
                wanted = [file.parent / name for name, kind in kinds.items() if all(isinstance(k, str) for k in kind)]
            elif file.name.endswith(".safetensors.index.json"):
                wanted = [file.parent / part for part in values["weight_map"].values()]
            elif file.name == "config.json" and not any(file.parent.glob("*.safetensors")):
                return f"{file.parent} has no weights"
            if missing := [place for place in wanted if not place.exists()]:
                return f"{missing[0]} is missing"
        for file in folder.rglob("*.safetensors"):
            with safe_open(file, "pt"):
                pass
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        return f"{file} is damaged ({error})"
    return None


def save_tokenizer(model: AutoencoderKLProMAG, folder: Path) -> None:
    """Save a tokenizer by `save_model`: a base of diffusers that has no levels in its own class, as its pipelines load it."""
    alone = model.existing is not None and len(model.temporal_ratios) == 1
    save_model(model.base_model() if alone else model, folder)


def save_model(model: Any, folder: Path) -> None:
    """Save a model, or what has its `save_pretrained`, aside and put it in the place of `folder`; see `replaced_folder`.

    Raises UserError where `folder` holds something else than a saved model, and OSError where the disk is full.
    """
    finish_replacing(folder)
    if folder.exists() and any(folder.iterdir()) and not any((folder / name).is_file() for name in MARKERS):
        raise UserError(f"{folder}: holds other files than a model's; name another folder, or move them away")
    with replaced_folder(folder) as aside:
        model.save_pretrained(aside)
        forget_source_path(aside)


def forget_source_path(folder: Path) -> None:
    """Take the path that a saved model, or the parts of a pipeline, were loaded from out of the configurations."""
    for file in folder.rglob("*.json"):
        values = json.loads(file.read_text(encoding="utf-8"))
        if values.pop("_name_or_path", None) is not None:
            write_atomically(file, json.dumps(values, indent=2) + "\n")
