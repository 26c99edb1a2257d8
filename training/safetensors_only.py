"""Models and pipelines that are saved and loaded only as safetensors: unpickling a file can run arbitrary code."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .config import UserError, one_line

PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}
MOST_LAYERS = 1000  # a damaged configuration that asks for millions would be built for hours
# safetensors' names of the types in which floating-point weights may be saved
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


class UnreadableModelError(UserError, OSError):
    """A saved model or pipeline that cannot be loaded; an OSError too, because diffusers and transformers raise these."""


class SafetensorsOnly:
    """Mixin that precedes the diffusers base class whose saving and loading it restricts."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Self:
        """Load as the diffusers base class does, but only from safetensors.

        Raises UserError if the folder, or the saved pipeline around it, contains a pickle or a damaged file, if a model's file
        lacks tensors, which would stay uninitialised, and if the folder cannot be loaded for another reason.
        """
        if kwargs.get("use_safetensors") is False:
            raise UserError(f"use_safetensors False: {cls.__name__} is loaded only from safetensors; use True")
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        parent: Any = super()
        if not folder.is_dir():  # a name on the hub
            return parent.from_pretrained(pretrained_model_name_or_path, **{**kwargs, "use_safetensors": True})
        check_folder(folder)
        try:
            loaded: Any = parent.from_pretrained(pretrained_model_name_or_path, **kwargs)
            model: Any = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
            if isinstance(model, nn.Module):
                check_complete(model, folder, kwargs.get("variant"))
        except UserError as error:
            raise error if str(folder) in str(error) else UserError(f"{folder}: {error}") from None
        except Exception as error:  # whatever diffusers and transformers raise for files that are not what they expect
            raise UnreadableModelError(f"{folder}: {cls.__name__} cannot be loaded: {one_line(error)}") from error
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


# -- what is checked before anything is loaded -----------------------------------------------------------------------


def check_folder(folder: Path) -> None:
    """Raise UserError if a saved model, or the saved pipeline around it, contains what may be a pickle or is damaged."""
    root = folder.parent if (folder.parent / "model_index.json").exists() else folder
    if pickles := sorted(str(path.relative_to(root)) for path in _files(root) if PICKLES & {*path.suffixes}):
        raise UserError(
            f"{root}: {', '.join(pickles)}: may be pickles, which run code when loaded; only safetensors are loaded"
        )
    check_files(root)


def check_files(folder: Path) -> None:
    """Raise UserError for damaged indexes of shards, configurations, and headers of safetensors files in a folder."""
    for path in sorted(_files(folder)):
        if path.suffix == ".json" and ".safetensors.index." in path.name:
            check_shards(path)
        elif path.name == "model_index.json" or path.name.endswith("config.json"):
            _check_layers(path, read_mapping(path))
        elif path.suffix == ".safetensors":
            tensor_types(path)


def _files(root: Path) -> Iterator[Path]:
    """Yield all files below a folder, also in parts that are links to folders."""
    yield from (path for path in root.rglob("*") if path.is_file() or path.suffix == ".safetensors")
    for part in root.iterdir():
        if part.is_symlink() and part.is_dir():
            yield from (path for path in part.rglob("*") if path.is_file())


def check_shards(index: Path) -> None:
    """Raise UserError if the index of a model's shards names other files than safetensors beside it."""
    shards = read_mapping(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{index}: weight_map is {shards!r:.100}: a mapping of tensors to safetensors files is needed")
    for shard in shards.values():
        if not isinstance(shard, str) or Path(shard).name != shard or Path(shard).suffix != ".safetensors":
            raise UserError(f"{index}: names the shard {shard!r:.100}: a .safetensors file beside the index is needed")
        if not (index.parent / shard).is_file():
            raise UnreadableModelError(f"{index}: names the shard {shard!r:.100}, which is not there")


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the mapping that a JSON file contains; raises UserError if it contains something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UnreadableModelError(f"{path}: is not JSON: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise UnreadableModelError(f"{path}: contains {values!r:.100}: a mapping of keys is needed")
    return values


def _check_layers(path: Path, values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            _check_layers(path, value)
        elif "layers" in key and isinstance(value, int) and value > MOST_LAYERS:
            raise UserError(f"{path}: {key} {value}: at most {MOST_LAYERS} are built")


def tensor_types(path: Path) -> dict[str, str]:
    """Return the type of each tensor in a safetensors file, from its header alone; raises UserError if it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise UnreadableModelError(f"{path}: is no whole safetensors file: {one_line(error)}") from None


def check_complete(model: nn.Module, folder: Path, variant: str | None = None) -> None:
    """Raise UserError if a model's weights are not those that the safetensors files of its folder should hold.

    Refused are files without some of the model's tensors, which loaders leave random or empty (weights tied to a saved weight
    may be missing), tensors saved as whole numbers, and values that are NaN or infinite. Names are not compared if the folder
    has no files (a name on the hub) or if the files put another prefix before the model's names.
    """
    files = sorted(folder.glob("*.safetensors"))
    variant_files = [file for file in files if f".{variant}" in file.name]
    types: dict[str, str] = {}
    for file in variant_files or [file for file in files if file.name.count(".") == 1] or files:
        types |= tensor_types(file)
    own: dict[str, Tensor] = model.state_dict()
    saved = {id(value) for name, value in model.named_parameters(remove_duplicate=False) if name in types}
    tied = {name for name, value in model.named_parameters(remove_duplicate=False) if id(value) in saved}
    wrong = {
        "lacks": sorted(own.keys() - types - tied),
        "needs a floating-point type for": [
            name for name, kind in types.items() if name in own and own[name].is_floating_point() and kind not in FLOATS
        ],
        "has NaN or infinite values in": [name for name, value in own.items() if not _is_finite(value)],
    }
    if not files or (own.keys().isdisjoint(types) and _renamed(own, types)):
        wrong["lacks"] = []
    for problem, names in wrong.items():
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            named = f"{', '.join(names[:3])}{more}"
            raise UserError(f"{folder}: {type(model).__name__} {problem} {named}; the file is damaged or another model's")


def _is_finite(value: Tensor) -> bool:
    """Tell whether a tensor's values are finite numbers, by their sum; types that cannot be added count as finite."""
    if value.is_meta or value.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        return True
    return bool(value.sum(dtype=torch.float64 if value.dtype == torch.float64 else torch.float32).isfinite())


def _renamed(own: Iterable[str], saved: Iterable[str]) -> bool:
    """Tell whether a file names a model's tensors with another prefix than the model."""
    return any(a.endswith(f".{b}") or b.endswith(f".{a}") for a in own for b in saved)
