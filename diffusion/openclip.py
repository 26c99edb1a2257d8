"""Text towers of OpenCLIP models, as text encoders and tokenizers that are saved and loaded in the way of transformers.

Shapes: B prompts, L text tokens, D width. Needs the extra `promag[open-clip]`; open_clip is imported on first use.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor
from transformers import CLIPTokenizer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from promag.training.config import UserError, first_line
from promag.training.safetensors_only import SafetensorsOnly

PROBES = ("", "a red disc moves left", "Two dogs, 3 cats: it's late!", "wordsthatnobodyknows " * 30)


class OpenCLIPTextModel(SafetensorsOnly, ModelMixin, ConfigMixin):
    """The text tower of an OpenCLIP model.

    Args:
        embed_dim: width of the pooled vector.
        text_cfg: the text part of the OpenCLIP model's configuration.
        quick_gelu: whether the model uses the sigmoid approximation of GELU.
        pad_token_id: id of the padding token of the tower's training.
    """

    __module__ = "promag"

    @register_to_config
    def __init__(self, embed_dim: int, text_cfg: Mapping[str, Any], quick_gelu: bool = False, pad_token_id: int = 0):
        super().__init__()
        from open_clip.model import CLIPTextCfg, _build_text_tower

        self.text: Any = _build_text_tower(embed_dim, CLIPTextCfg(**{**text_cfg, "output_tokens": True}), quick_gelu)

    @property
    def width(self) -> int:
        """Width of the tokens."""
        return self.text.width

    @property
    def positions(self) -> int:
        """Maximum number of tokens."""
        return self.text.context_length

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> BaseModelOutputWithPooling:
        """Encode ids and mask, B L -> tokens after the last norm, B L D, and projected pooled vectors, B embed_dim.

        The ids are padded to the tower's full context with the padding token of its training. The output therefore depends
        neither on L nor on the tokenizer's padding token, not even without causal attention.
        """
        padded = input_ids.new_full((len(input_ids), self.positions), self.config["pad_token_id"])
        length = input_ids.shape[1]
        padded[:, :length] = torch.where(attention_mask.bool(), input_ids, padded[:, :length])
        pooled, tokens = self.text(padded)
        return BaseModelOutputWithPooling(last_hidden_state=tokens[:, :length], pooler_output=pooled)


def load_openclip(name: str, weights: str | None) -> tuple[Any, OpenCLIPTextModel]:
    """Return the tokenizer and the text tower of an OpenCLIP model.

    Args:
        name: a model's name (ViT-H-14), or local-dir:FOLDER or hf-hub:OWNER/NAME, which include the weights.
        weights: a tag of the named model (laion2b_s32b_b79k) or a file.

    Raises UserError if open_clip is not installed, the model cannot be loaded, or the tower or its tokenizer cannot be saved
    with a pipeline.
    """
    try:
        import open_clip
        from open_clip.transformer import TextTransformer
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision beside another build of torch
        raise UserError(
            f"open_clip:{name}: needs open_clip, which cannot be imported: {error}; run pip install 'promag[open-clip]'"
        ) from None
    includes_weights = name.startswith(("local-dir:", "hf-hub:"))
    if includes_weights == (weights is not None):
        needs = "brings its own weights, weights must be null" if includes_weights else "weights must name a tag or a file"
        raise UserError(f"open_clip:{name}, weights {weights}: {needs}")
    try:
        model = open_clip.create_model(name, pretrained=weights, force_custom_text=True, require_pretrained=True)
        config = _model_config(name)
        tokenizer = open_clip.get_tokenizer(name)
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        raise UserError(f"open_clip:{name}: cannot be loaded: {first_line(error)}") from None
    text: Any = model.text
    if not isinstance(text, TextTransformer):
        raise UserError(f"open_clip:{name}: its text tower is a model of transformers; name that model itself")
    converted, pad = _as_transformers(tokenizer, text.context_length)
    tower = OpenCLIPTextModel(config["embed_dim"], config["text_cfg"], config.get("quick_gelu", False), pad)
    tower.text.load_state_dict(text.state_dict())
    _check_tokens(name, tokenizer, converted, pad, text.context_length)
    return converted, tower


def _model_config(name: str) -> dict[str, Any]:
    import open_clip

    if name.startswith("local-dir:"):
        file = Path(name.removeprefix("local-dir:")) / "open_clip_config.json"
        return json.loads(file.read_text(encoding="utf-8"))["model_cfg"]
    if name.startswith("hf-hub:"):
        from huggingface_hub import hf_hub_download

        file = hf_hub_download(name.removeprefix("hf-hub:"), "open_clip_config.json")
        return json.loads(Path(file).read_text(encoding="utf-8"))["model_cfg"]
    return open_clip.get_model_config(name.replace("/", "-")) or {}


def _as_transformers(tokenizer: Any, length: int) -> tuple[Any, int]:
    """Convert a tokenizer to one of transformers; return it and the padding id of the model's own tokenizer."""
    inner = getattr(tokenizer, "tokenizer", None)
    if inner is not None:
        return inner, int(inner.pad_token_id or 0)
    start, end = (tokenizer.decoder[i] for i in (tokenizer.sot_token_id, tokenizer.eot_token_id))
    merges = [pair for pair in tokenizer.bpe_ranks if len(pair) == 2]
    ends = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    return CLIPTokenizer(vocab=tokenizer.encoder, merges=merges, model_max_length=length, **ends), 0


def _check_tokens(name: str, tokenizer: Any, converted: Any, pad: int, length: int) -> None:
    """Raise UserError if the converted tokenizer gives other ids, because the original masks or cleans texts in its own way."""
    original_ids = tokenizer(list(PROBES), context_length=length)
    encoded = converted(list(PROBES), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    if not torch.equal(original_ids, encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, pad)):
        raise UserError(f"open_clip:{name}: its tokenizer treats texts in a way that a pipeline cannot save; use another model")
