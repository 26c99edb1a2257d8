"""Parts that a command adds to a loaded pipeline: a tiny decoder, and adapters for the transformer."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from promag.pipelines.lora import rename_lora
from promag.pipelines.stock import StockPipeline
from promag.training.config import UserError, one_line

TINY_DECODER: dict[str, Any] = {  # arguments of add_argument
    "nargs": "?",
    "const": "",
    "metavar": "FOLDER",
    "help": "decode by a tiny decoder, faster and less sharp: that of a folder, or without one the pipeline's own",
}


def enable_tiny_decoder(pipe: Any, folder: str) -> None:
    """Let a pipeline decode by the tiny decoder of a folder, or by its own where `folder` is empty.

    Raises UserError for a pipeline that takes none, and for a folder without a decoder of its tokenizer's latents.
    """
    if not hasattr(pipe, "enable_tiny_decoder"):
        raise UserError(f"--tiny-decoder: {type(pipe).__name__} has none; it is for pipelines of `promag train-diffusion`")
    try:
        pipe.enable_tiny_decoder(folder or None)
    except ValueError as error:
        raise UserError(f"--tiny-decoder {folder}".rstrip() + f": {error}") from None


def load_lora(pipe: Any, folder: Path) -> None:
    """Load the adapters in a folder, or in a safetensors file, into a pipeline's transformer.

    Raises UserError for a folder without adapters and for adapters of another transformer.
    """
    given = [folder] if folder.is_file() else sorted(folder.glob("*.safetensors"))
    if not given:  # diffusers would look for a name that is no folder on a hub
        raise UserError(f"--lora {folder}: no adapters there; give the folder `lora` of a `promag train-diffusion --lora` run")
    if len(given) > 1:
        raise UserError(f"--lora {folder}: holds {', '.join(path.name for path in given)}; name one of these files")
    place, name = str(given[0].parent), given[0].name
    loader = pipe.pipe if isinstance(pipe, StockPipeline) else pipe
    try:
        if loader is not pipe:  # diffusers' own loader warns of tensors that fit nowhere, and goes on
            weights = loader.lora_state_dict(place, weight_name=name, use_safetensors=True, local_files_only=True)
            rename_lora(weights, pipe.transformer, str(given[0]))
        loader.load_lora_weights(place, weight_name=name, use_safetensors=True, local_files_only=True)
    except (OSError, ValueError, LookupError, RuntimeError, SafetensorError) as error:
        raise UserError(f"--lora {folder}: cannot be loaded into this pipeline's transformer: {one_line(error)}") from None
