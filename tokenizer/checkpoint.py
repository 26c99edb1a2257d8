"""Loading and saving trained tokenizers."""

import json
import os
import shutil
from math import prod
from pathlib import Path
from typing import Any

from promag.training.config import UserError
from promag.training.files import move_into_place, write_atomically

from .autoencoder import AutoencoderKLProMAG


def load_tokenizer(folder: str | os.PathLike) -> AutoencoderKLProMAG:
    """Load a trained tokenizer for inference; raises UserError if the folder does not hold one."""
    folder = Path(folder)
    if (folder / "vae" / "config.json").exists():
        folder = folder / "vae"  # a whole pipeline
    if not (folder / "config.json").exists():
        raise UserError(f"tokenizer {folder}: no config.json there; give a folder of `promag train-tokenizer`, or a pipeline")
    try:
        model = AutoencoderKLProMAG.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"tokenizer {folder}: cannot be loaded: {' '.join(str(error).split())}") from None
    assert isinstance(model, AutoencoderKLProMAG)
    return model.eval()


def saved_ratios(folder: Path) -> tuple[int, ...]:
    """Return the temporal ratios of a saved tokenizer from its configuration alone, lowest first; none without one."""
    file = folder / "config.json"
    if not file.exists():
        return ()
    config = json.loads(file.read_text(encoding="utf-8"))
    base = prod(time for time, _ in config["strides"])
    return tuple(base * 2**level for level in range(1 + len(config["growth"])))


def save_model(model: Any, folder: Path) -> None:
    """Save a model aside and put it in the place of `folder`; after a kill, `finish_save` leaves the old or the new one."""
    finish_save(folder)
    new, old = _asides(folder)
    model.save_pretrained(new)
    forget_source_path(new)
    if folder.exists():
        os.replace(folder, old)
    move_into_place(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def finish_save(folder: Path) -> None:
    """Finish a `save_model` that was killed between its two renames, and remove what a killed one left beside `folder`."""
    new, old = _asides(folder)
    if old.exists() and not folder.exists():
        os.replace(new if new.exists() else old, folder)
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)


def _asides(folder: Path) -> tuple[Path, Path]:
    return folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")


def forget_source_path(folder: Path) -> None:
    """Take the path that a saved model, or the parts of a pipeline, were loaded from out of the configurations."""
    for file in folder.rglob("*.json"):
        values = json.loads(file.read_text(encoding="utf-8"))
        if values.pop("_name_or_path", None) is not None:
            write_atomically(file, json.dumps(values, indent=2) + "\n")
