"""Models and pipelines that are saved and loaded only as safetensors: unpickling a file can run arbitrary code."""

from pathlib import Path
from typing import Any, Self

from safetensors import safe_open
from torch import nn

from .config import UserError

PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")


class SafetensorsOnly:
    """Mixin that precedes the diffusers base class whose saving and loading it restricts."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Self:
        """Load as the diffusers base class does, but only from safetensors.

        Raises UserError if the folder, or the saved pipeline around it, contains a pickle, and if a model's file lacks
        tensors, which would stay uninitialised.
        """
        if kwargs.get("use_safetensors") is False:
            raise UserError(f"use_safetensors False: {cls.__name__} is loaded only from safetensors; use True")
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        if folder.is_dir():
            check_no_pickles(folder)
        else:  # a name on the hub
            kwargs["use_safetensors"] = True
        parent: Any = super()
        loaded: Any = parent.from_pretrained(pretrained_model_name_or_path, **kwargs)
        model: Any = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
        if isinstance(model, nn.Module):
            check_complete(model, folder, kwargs.get("variant"))
        return loaded  # pyright: ignore[reportReturnType]

    def save_pretrained(
        self,
        save_directory: Any,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        **kwargs: Any,
    ) -> None:
        """Save as the diffusers base class does; raises UserError for `safe_serialization=False`, which asks for pickles."""
        if not safe_serialization:
            raise UserError(f"safe_serialization False: {type(self).__name__} is saved only as safetensors; use True")
        if max_shard_size is not None:
            kwargs["max_shard_size"] = max_shard_size
        parent: Any = super()
        parent.save_pretrained(save_directory, safe_serialization=True, variant=variant, **kwargs)


def check_no_pickles(folder: Path) -> None:
    """Raise UserError if a folder, or the saved pipeline around it, contains a file that may be a pickle."""
    root = folder.parent if (folder.parent / "model_index.json").exists() else folder
    pickles = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.suffix in PICKLES)
    if pickles:
        raise UserError(
            f"{root}: {', '.join(pickles)}: may be pickles, which run code when loaded; only safetensors are loaded"
        )


def check_complete(model: nn.Module, folder: Path, variant: str | None = None) -> None:
    """Raise UserError if the safetensors files of a saved model lack tensors that the model has.

    Loaders leave such tensors random or empty. Weights tied to a saved weight may be missing. The check is skipped if `folder`
    has no files (a name on the hub) or if the files follow another naming convention than the model.
    """
    files = sorted(folder.glob("*.safetensors"))
    variant_files = [file for file in files if f".{variant}" in file.name]
    names: set[str] = set()
    for file in variant_files or [file for file in files if file.name.count(".") == 1] or files:
        with safe_open(file, "pt") as opened:
            names |= set(opened.keys())
    saved = {id(value) for name, value in model.named_parameters(remove_duplicate=False) if name in names}
    tied = {name for name, value in model.named_parameters(remove_duplicate=False) if id(value) in saved}
    missing = sorted(model.state_dict().keys() - names - tied)
    if missing and names & model.state_dict().keys():
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(
            f"{folder}: {type(model).__name__} lacks {', '.join(missing[:3])}{more}; the file is damaged or another model's"
        )
