"""ProMAG: progressively grown video tokenizers and text-to-video diffusion in their latent space.

The public classes and functions are imported on first use, and diffusers knows the classes: after `import promag`,
`diffusers.DiffusionPipeline.from_pretrained(folder)` loads a folder that `ProMAGPipeline.save_pretrained` wrote.
"""

import importlib
import logging
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from promag.data.video import write_video
    from promag.diffusion.flow import sample_flow
    from promag.diffusion.openclip import OpenCLIPTextModel
    from promag.diffusion.transformer import ProMAGTransformer3DModel
    from promag.pipelines.sampling import load_pipeline, sample_videos
    from promag.pipelines.text_to_video import ProMAGPipeline
    from promag.tokenizer.autoencoder import AutoencoderKLProMAG
    from promag.tokenizer.checkpoint import load_tokenizer
    from promag.tokenizer.tiny_decoder import TinyDecoder

__all__ = [
    "AutoencoderKLProMAG",
    "OpenCLIPTextModel",
    "ProMAGPipeline",
    "ProMAGTransformer3DModel",
    "TinyDecoder",
    "load_pipeline",
    "load_tokenizer",
    "sample_flow",
    "sample_videos",
    "write_video",
]
__version__ = "0.1.0"

_CLASSES = [name for name in __all__ if name[0].isupper()]

_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").exists() and (_root / "tokenizer" / "__init__.py").exists():
    # In a checkout the subpackages lie beside this folder; an installed package holds them itself.
    __path__.append(str(_root))

_HOME = {
    "OpenCLIPTextModel": ".diffusion.openclip",
    "AutoencoderKLProMAG": ".tokenizer.autoencoder",
    "ProMAGPipeline": ".pipelines.text_to_video",
    "ProMAGTransformer3DModel": ".diffusion.transformer",
    "TinyDecoder": ".tokenizer.tiny_decoder",
    "load_pipeline": ".pipelines.sampling",
    "load_tokenizer": ".tokenizer.checkpoint",
    "sample_flow": ".diffusion.flow",
    "sample_videos": ".pipelines.sampling",
    "write_video": ".data.video",
    # diffusers asks the package that a saved class names for the base class by which to load it.
    "ModelMixin": "diffusers.models.modeling_utils",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'promag' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOME[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def _register(diffusers: Any) -> None:
    """Add our classes to the names that diffusers imports on demand, as if they lay in `diffusers.promag`."""
    sys.modules["diffusers.promag"] = sys.modules[__name__]
    for name in _CLASSES:
        diffusers._class_to_module[name] = "promag"
    # diffusers 0.42 lists, at every cast of a model, the modules that should have stayed in float32, even where there are none.
    logging.getLogger("diffusers.models.modeling_utils").addFilter(_names_a_module)
    # It also tells that a stock pipeline's autoencoder is ours, which is meant.
    logging.getLogger("diffusers.pipelines.pipeline_utils").addFilter(_names_no_class_of_ours)


def _names_a_module(record: logging.LogRecord) -> bool:
    ours = tuple(f"There are modules in {name} that should be kept in float32: []" for name in _CLASSES)
    return not record.getMessage().startswith(ours)


def _names_no_class_of_ours(record: logging.LogRecord) -> bool:
    return not re.fullmatch(r"Expected types for vae: .*, got <class 'promag\.\w+'>\.", record.getMessage().strip())


class _AfterDiffusers:
    """Import hook that registers our classes once diffusers is imported: importing it here would take seconds."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "diffusers":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            _register(sys.modules[name])  # diffusers replaces itself by a lazy module

        spec.loader.exec_module = exec_module
        return spec


if "diffusers" in sys.modules:
    _register(sys.modules["diffusers"])
else:
    import importlib.util

    sys.meta_path.insert(0, _AfterDiffusers())
