"""Parts of a pipeline that a command is given: another autoencoder, a tiny decoder, and adapters for the transformer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from promag.pipelines.lora import recorded_sampling
from promag.pipelines.sampling import trained_ratios
from promag.pipelines.stock import StockPipeline
from promag.tokenizer.geometry import ratio_names
from promag.training.config import UserError, one_line

TINY_DECODER: dict[str, Any] = {  # arguments of add_argument
    "nargs": "?",
    "const": "",
    "metavar": "FOLDER",
    "help": "decode by a tiny decoder, faster and less sharp: that of a folder, or without one the pipeline's own",
}

TOKENIZER: dict[str, Any] = {
    "type": Path,
    "metavar": "FOLDER",
    "help": "autoencoder in the place of a WanPipeline's own: one grown from that, or a student of it",
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


def load_lora(pipe: Any, folder: Path) -> Sequence[int]:
    """Load the adapters in a folder, or in a safetensors file, into a pipeline's transformer; return the ratios that both know.

    The pipeline then samples by default at a temporal ratio that the adapters were trained at, and a WanPipeline at these
    alone. With the adapters of a student it samples by default in the student's steps, without guidance.
    Raises UserError for a folder without adapters, for adapters of another transformer, and for adapters that were
    trained at none of the pipeline's ratios.
    """
    given = [folder] if folder.is_file() else sorted(folder.glob("*.safetensors"))
    if not given:  # diffusers would look for a name that is no folder on a hub
        raise UserError(f"--lora {folder}: no adapters there; give the folder `lora` of a `promag train-diffusion --lora` run")
    if len(given) > 1:
        raise UserError(f"--lora {folder}: holds {', '.join(path.name for path in given)}; name one of these files")
    try:
        pipe.load_lora_weights(str(given[0].parent), weight_name=given[0].name, use_safetensors=True, local_files_only=True)
        sampling = recorded_sampling(given[0])
    except (OSError, ValueError, LookupError, RuntimeError, SafetensorError) as error:
        raise UserError(f"--lora {folder}: cannot be loaded into this pipeline's transformer: {one_line(error)}") from None
    ratios = sampling.pop("temporal_ratios", None)
    if sampling:
        loader = pipe.pipe if isinstance(pipe, StockPipeline) else pipe
        loader.register_to_config(**sampling)
    return _limit_ratios(pipe, ratios, folder) if ratios else trained_ratios(pipe)


def _limit_ratios(pipe: Any, ratios: Sequence[int], folder: Path) -> Sequence[int]:
    """Let a pipeline sample at the temporal ratios that its adapters were trained at; return those that it has."""
    stock = isinstance(pipe, StockPipeline)
    has = pipe.vae.temporal_ratios if stock else trained_ratios(pipe)  # the weights of a stock pipeline belong to no ratio
    both = [ratio for ratio in ratios if ratio in has]
    if not both:
        trained, sampled = ratio_names(ratios), ratio_names(has)
        use = "name the autoencoder that they were trained with by --tokenizer" if stock else "name the pipeline they are for"
        raise UserError(f"--lora {folder}: trained at {trained}; this pipeline samples at {sampled}; {use}")
    if stock:
        pipe.limit_ratios(both)
    elif pipe.config["temporal_ratio"] not in both:
        pipe.register_to_config(temporal_ratio=both[0])
    return both
