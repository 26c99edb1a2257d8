"""Models and pipelines that are saved and loaded as safetensors alone: unpickling a file may run whatever its author wished."""

from pathlib import Path
from typing import Any, Self

from .config import UserError

PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")


class SafetensorsOnly:
    """To be named before the class of diffusers that saves and loads."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Self:
        """Load as the class of diffusers does, from safetensors alone.

        Raises UserError where the folder, or the saved pipeline that it is a part of, holds a pickle.
        """
        if kwargs.get("use_safetensors") is False:
            raise UserError(f"use_safetensors False: {cls.__name__} is loaded from safetensors alone; use True")
        place = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        if place.is_dir():
            check_no_pickles(place)
        else:  # a name on the hub
            kwargs["use_safetensors"] = True
        parent: Any = super()
        return parent.from_pretrained(pretrained_model_name_or_path, **kwargs)

    def save_pretrained(
        self,
        save_directory: Any,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        **kwargs: Any,
    ) -> None:
        """Save as the class of diffusers does; raises UserError for `safe_serialization=False`, which asks for pickles."""
        if not safe_serialization:
            raise UserError(f"safe_serialization False: {type(self).__name__} is saved as safetensors alone; use True")
        if max_shard_size is not None:
            kwargs["max_shard_size"] = max_shard_size
        parent: Any = super()
        parent.save_pretrained(save_directory, safe_serialization=True, variant=variant, **kwargs)


def check_no_pickles(folder: Path) -> None:
    """Raise UserError where a folder, or the saved pipeline whose part it is, holds a file that might be a pickle."""
    whole = folder.parent if (folder.parent / "model_index.json").exists() else folder
    found = sorted(str(path.relative_to(whole)) for path in whole.rglob("*") if path.suffix in PICKLES)
    if found:
        raise UserError(f"{whole}: {', '.join(found)}: may be pickles, which run code when loaded; only safetensors are loaded")
