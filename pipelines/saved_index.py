"""What a saved pipeline's model_index.json may contain; it is read before any part is loaded."""

from collections.abc import Mapping
from typing import Any

from promag.training.config import UserError

# Whose classes a saved pipeline may name: to load a class is to import its library.
LIBRARIES = ("promag", "diffusers", "transformers")
OURS = {"transformer": "ProMAGTransformer3DModel", "vae": "AutoencoderKLProMAG"}
TEXT = tuple(f"{part}{number}" for part in ("tokenizer", "text_encoder") for number in ("", "_2", "_3"))
PARTS = (*TEXT, *OURS, "scheduler")


def check_index(index: Mapping[str, Any]) -> None:
    """Raise UserError for a part that is no pair of library and class, of a foreign library, or of another kind."""
    for name in PARTS:
        part = index.get(name, [None, None])
        if not (isinstance(part, list | tuple) and len(part) == 2 and all(isinstance(x, str | None) for x in part)):
            raise UserError(f"model_index.json: {name} is {part!r:.100}: a library and a class are needed, or null and null")
        library, kind = part
        if library is None:
            continue
        if library not in LIBRARIES:
            raise UserError(f"model_index.json: {name} is {kind} of {library!r}: legal are {', '.join(LIBRARIES)}")
        if name in OURS and part[1] != OURS[name]:
            raise UserError(f"model_index.json: {name} is {kind}: {OURS[name]} of promag is needed")
