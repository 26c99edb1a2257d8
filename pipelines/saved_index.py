"""What a saved pipeline's model_index.json may contain; it is read before any part is loaded."""

from collections.abc import Mapping
from typing import Any

from promag.training.config import UserError

# Whose classes a saved pipeline may name: to load a class is to import its library.
LIBRARIES = ("promag", "diffusers", "transformers")
OURS = {"transformer": ("ProMAGTransformer3DModel",), "vae": ("AutoencoderKLProMAG",), "tiny_decoder": ("TinyDecoder",)}
WAN_PARTS = {"transformer": ("WanTransformer3DModel",), "vae": ("AutoencoderKLWan", "AutoencoderKLProMAG")}
TEXT = tuple(f"{part}{number}" for part in ("tokenizer", "text_encoder") for number in ("", "_2", "_3"))
PARTS = (*TEXT, "transformer", "transformer_2", "vae", "tiny_decoder", "scheduler")


def check_index(index: Mapping[str, Any], models: Mapping[str, tuple[str, ...]] = OURS) -> None:
    """Raise UserError for a part that is no pair of library and class, of a foreign library, or of another class.

    `models` has the legal classes of the transformer and of the autoencoder.
    """
    for name in PARTS:
        part = index.get(name, [None, None])
        if not (isinstance(part, list | tuple) and len(part) == 2 and all(isinstance(x, str | None) for x in part)):
            raise UserError(f"model_index.json: {name} is {part!r:.100}: a library and a class are needed, or null and null")
        library, kind = part
        if library is None:
            continue
        if library not in LIBRARIES:
            raise UserError(f"model_index.json: {name} is {kind} of {library!r}: legal are {', '.join(LIBRARIES)}")
        legal = models.get(name.removesuffix("_2"))
        if legal and kind not in legal:
            raise UserError(f"model_index.json: {name} is {kind}: {' or '.join(legal)} is needed")
