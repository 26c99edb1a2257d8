"""Loading and saving trained tokenizers."""

import json
import os
import shutil
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


def save_model(model: Any, folder: Path) -> None:
    """Replace `folder` by a saved model in one rename."""
    aside, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    for stale in (aside, old):
        shutil.rmtree(stale, ignore_errors=True)
    model.save_pretrained(aside)
    forget_where_it_was(aside)
    if folder.exists():
        folder.rename(old)
    move_into_place(aside, folder)
    shutil.rmtree(old, ignore_errors=True)


def forget_where_it_was(folder: Path) -> None:
    """Take the path that a saved model, or the parts of a pipeline, were loaded from out of the configurations."""
    for file in folder.rglob("*.json"):
        values = json.loads(file.read_text(encoding="utf-8"))
        if values.pop("_name_or_path", None) is not None:
            write_atomically(file, json.dumps(values, indent=2) + "\n")
