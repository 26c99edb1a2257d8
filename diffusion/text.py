"""Text encoders and their tokenizers: a small CLIP text model trained from scratch, and frozen T5, CLIP and OpenCLIP models.

Shapes: B prompts, L text tokens, D width.
"""

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.utils.torch_utils import get_module_execution_device
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5EncoderModel,
    UMT5EncoderModel,
)

from promag.tokenizer.geometry import check_integer
from promag.training.config import UserError, one_line
from promag.training.safetensors_only import check_complete, check_files
from promag.training.state import hash_weights

from .openclip import OpenCLIPTextModel, load_openclip

logger = logging.getLogger(__name__)

OPEN_CLIP = "open_clip:"  # prefix of the names of OpenCLIP models
NULL_CAPTION = ""  # replaces dropped captions in training; the default negative prompt in sampling
MOST_TEXT_TOKENS = 2**16  # the longest text; T5 tokenizers without a length of their own state 10^30
# Settings of transformers' text models that weights do not show.
SETTINGS = (
    *("hidden_act", "dense_act_fn", "is_gated_act", "num_attention_heads", "num_heads", "layer_norm_eps", "layer_norm_epsilon"),
    *("relative_attention_max_distance", "scalable_attention", "eos_token_id", "pad_token_id"),
)
PAD, START, END = "<|pad|>", "<|startoftext|>", "<|endoftext|>"
FROZEN = {"clip_text_model": CLIPTextModel, "clip": CLIPTextModel, "t5": T5EncoderModel, "umt5": UMT5EncoderModel}


class Embedded(NamedTuple):
    """Prompts encoded by one text encoder or by several."""

    tokens: tuple[Tensor, ...]  # B L D for each encoder
    masks: tuple[Tensor, ...]  # B L for each encoder, nonzero at tokens that are not padding
    pooled: Tensor | None  # B D: pooled vectors, concatenated over the encoders that have one

    def map(self, change: Callable[[Tensor], Tensor]) -> "Embedded":
        """Return a copy in which `change` was applied to every tensor."""
        tokens, masks = (tuple(change(part) for part in parts) for parts in (self.tokens, self.masks))
        return Embedded(tokens, masks, None if self.pooled is None else change(self.pooled))

    def merge(self, other: "Embedded", change: Callable[[Tensor, Tensor], Tensor]) -> "Embedded":
        """Combine each tensor with its counterpart in `other`, from the same encoders, by `change`."""
        tokens, masks = (
            tuple(change(a, b) for a, b in zip(parts, other_parts, strict=True))
            for parts, other_parts in ((self.tokens, other.tokens), (self.masks, other.masks))
        )
        pooled = None if self.pooled is None or other.pooled is None else change(self.pooled, other.pooled)
        return Embedded(tokens, masks, pooled)


def side_by_side(parts: Sequence[Embedded]) -> Embedded:
    """Join the embeddings of the same prompts by several encoders."""
    pooled = [part.pooled for part in parts if part.pooled is not None]
    tokens, masks = (tuple(x for xs in group for x in xs) for group in ([p.tokens for p in parts], [p.masks for p in parts]))
    return Embedded(tokens, masks, torch.cat(pooled, 1) if pooled else None)


def learn_vocabulary(captions: Iterable[str], size: int = 1024, max_length: int = 32) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on captions; it can encode any text, and needs few tokens for words of the captions."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    # END must not have id 2: for compatibility with old checkpoints, CLIP models then pool at the highest token id.
    special = [START, END, PAD]
    tokenizer.train_from_iterator(
        captions,
        trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    ids = [(token, tokenizer.token_to_id(token)) for token in (START, END)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=ids)
    return read_vocabulary(tokenizer.to_str(), max_length)


def read_vocabulary(rules: str, max_length: int) -> PreTrainedTokenizerFast:
    """Return the tokenizer that `learn_vocabulary` trained, from the JSON of its rules (`tokenizer_rules`)."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(rules),
        pad_token=PAD,
        bos_token=START,
        eos_token=END,
        model_max_length=max_length,
        padding_side="right",
    )


def tokenizer_rules(tokenizer: Any) -> dict[str, Any]:
    """Return everything that determines the tokens of a text, except the length limit, which each call sets."""
    backend = getattr(tokenizer, "backend_tokenizer", None)  # tokenizers that work on bytes have none
    rules = json.loads(backend.to_str()) if backend else {"vocabulary": tokenizer.get_vocab()}
    for key in ("padding", "truncation"):  # set by the previous call
        rules.pop(key, None)
    return rules


def small_clip(tokenizer: Any, width: int = 128, layers: int = 2, heads: int = 4) -> CLIPTextModel:
    """Return an untrained CLIP text model for a tokenizer from `learn_vocabulary`."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=width,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = CLIPTextModel(config)
    # The layers' outputs have a scale near one: embeddings with the usual standard deviation of 0.02 would vanish beside them.
    embeddings: Any = model.get_input_embeddings()
    torch.nn.init.normal_(embeddings.weight, std=1.0)
    return model


def load_frozen(model: str, weights: str | None, max_length: int, number: int = 1) -> tuple[Any, Any]:
    """Load a text encoder and its tokenizer, frozen.

    Args:
        model: a folder or hub name of a T5, UMT5 or CLIP model of transformers, or open_clip:NAME.
        weights: tag or file of an OpenCLIP model's weights; None for models of transformers.
        max_length: number of text tokens; longer captions are cut.
        number: number of the text encoder, from 1, if `model` is the folder of a pipeline.

    Raises UserError if the model cannot be loaded, is of another kind, or has fewer positions than `max_length`.
    """
    if model.startswith(OPEN_CLIP):
        tokenizer, encoder = load_openclip(model.removeprefix(OPEN_CLIP), weights)
    elif weights is None:
        tokenizer, encoder = _load_transformers(model, number)
    else:
        raise UserError(f"text encoder {model}, weights {weights}: weights are named for {OPEN_CLIP} models alone; use null")
    try:
        check_length(encoder, max_length)
    except ValueError as error:
        raise UserError(f"text encoder {model}: max_length: {error}") from None
    tokenizer.model_max_length = max_length
    return tokenizer, encoder.requires_grad_(False).eval()


def _load_transformers(path: str, number: int) -> tuple[Any, Any]:
    suffix = "" if number == 1 else f"_{number}"
    place: dict[str, Any] = {name: Path(path) / f"{name}{suffix}" for name in ("text_encoder", "tokenizer")}
    if not place["text_encoder"].is_dir():  # not a pipeline's folder: model and tokenizer share a folder
        place = dict.fromkeys(place, path)
    for folder in set(map(Path, place.values())):
        if folder.is_dir():
            check_files(folder)
    try:
        kind = AutoConfig.from_pretrained(place["text_encoder"]).model_type
        if kind not in FROZEN:
            raise UserError(f"text encoder {path}: is a {kind} model; legal are {', '.join(sorted(FROZEN))}")
        encoder, loading = FROZEN[kind].from_pretrained(place["text_encoder"], output_loading_info=True, use_safetensors=True)
        if missing := sorted(loading["missing_keys"]):  # they would stay random
            raise UserError(f"text encoder {path}: its file lacks {', '.join(missing[:3])} ({len(missing)} tensors)")
        check_complete(encoder, Path(place["text_encoder"]))
        return AutoTokenizer.from_pretrained(place["tokenizer"]), encoder
    except UserError:
        raise
    except Exception as error:  # whatever transformers raises for files that are not what it expects
        raise UserError(f"text encoder {path}: cannot be loaded: {one_line(error)}") from None


def encoder_files(model: str, weights: str | None) -> list[list[Any]] | None:
    """Return names, sizes and modification times of a text encoder's files, or None if they cannot be listed.

    Equal lists mean equal encoders, so the weights need not be read to compare them. The arguments are those of `load_frozen`.
    """
    model = model.removeprefix(OPEN_CLIP)
    place = Path(weights or model.removeprefix("local-dir:"))
    if not place.exists() and weights is None:
        try:
            config = try_to_load_from_cache(model.removeprefix("hf-hub:"), "config.json")
        except HFValidationError:  # a path that does not exist is no name of a repository
            return None
        place = Path(config).parent if isinstance(config, str) else place
    if not place.exists():
        return None
    files = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    versions = [["transformers", version("transformers"), ""]]
    stats = [(str(path.resolve()), path.stat()) for path in files]
    return versions + [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def hash_text_encoder(tokenizer: Any, encoder: Any) -> str:
    """Return a hash of a text encoder's weights and of its tokenizer's rules."""
    return hashlib.sha256(
        (hash_weights([encoder]) + json.dumps(tokenizer_rules(tokenizer), sort_keys=True)).encode()
    ).hexdigest()


def encoder_settings(encoder: Any) -> str:
    """Return, as JSON, the settings of a text encoder that change its outputs and that its weights do not show."""
    config = encoder.config
    if isinstance(encoder, OpenCLIPTextModel):
        settings = {key: value for key, value in config.items() if not key.startswith("_")}
    else:
        settings = {key: getattr(config, key) for key in SETTINGS if hasattr(config, key)}
    return json.dumps(settings, sort_keys=True, default=str)


def text_widths(encoder: Any) -> tuple[int, int]:
    """Return the widths of the encoder's tokens and of its pooled vector; 0 if it has no pooled vector."""
    if isinstance(encoder, OpenCLIPTextModel):
        return encoder.width, encoder.config["embed_dim"]
    config = encoder.config
    width = config.d_model if hasattr(config, "d_model") else config.hidden_size
    return width, width if isinstance(encoder, CLIPTextModel) else 0


def check_length(encoder: Any, length: int) -> None:
    """Raise ValueError where an encoder takes fewer text tokens; T5 and UMT5 take any number up to MOST_TEXT_TOKENS."""
    if isinstance(encoder, OpenCLIPTextModel):
        positions = encoder.positions
    else:
        positions = encoder.config.max_position_embeddings if isinstance(encoder, CLIPTextModel) else MOST_TEXT_TOKENS
    check_integer("text tokens", length)
    if not 1 <= length <= positions:
        raise ValueError(f"{length} text tokens: this encoder takes 1 to {positions}")


def tokenize(tokenizer: Any, prompts: Sequence[str], max_length: int | None = None) -> dict[str, Tensor]:
    """Return input_ids and attention_mask, B L, padded to `max_length` (default: the tokenizer's); longer text is cut.

    The length never depends on the other prompts of the batch, so neither does any output. Raises ValueError for a length that
    leaves no room for the tokens at both ends, or is above MOST_TEXT_TOKENS.
    """
    length = tokenizer.model_max_length if max_length is None else max_length
    least = max(1, tokenizer.num_special_tokens_to_add())
    check_integer("text tokens", length)
    if not least <= length <= MOST_TEXT_TOKENS:
        raise ValueError(f"{length} text tokens: {least} to {MOST_TEXT_TOKENS} are needed; state max_sequence_length")
    if tokenizer.pad_token_id is None:
        raise ValueError(f"text tokenizer {tokenizer.name_or_path}: has no padding token")
    encoded = tokenizer(
        list(prompts),
        padding="max_length",
        truncation=True,
        max_length=int(length),
        return_tensors="pt",
    )
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


def lost_ends(tokenizer: Any, texts: Sequence[str], max_length: int | None = None) -> dict[str, str]:
    """Map each text that `tokenize` cuts to the end that is cut off."""
    length = tokenizer.model_max_length if max_length is None else max_length
    texts = list(dict.fromkeys(texts))
    room = max(0, length - tokenizer.num_special_tokens_to_add())
    rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    return {text: tokenizer.decode(ids[room:]).strip() for text, ids in zip(texts, rows, strict=True) if len(ids) > room}


class CutTexts:
    """Counts the texts that are longer than an encoder takes; `str` gives one line with an example and its lost end."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.texts = self.cut = 0
        self.example: tuple[str, str] | None = None

    def add(self, texts: Sequence[str]) -> None:
        """Count some more texts."""
        lost = lost_ends(self.tokenizer, texts)
        self.texts += len(texts)
        self.cut += sum(text in lost for text in texts)
        if lost and self.example is None:
            self.example = next(iter(lost.items()))

    def __str__(self) -> str:
        """Return one line with the counts and the first example; empty if no text is cut."""
        if self.example is None:
            return ""
        length, (text, lost) = self.tokenizer.model_max_length, self.example
        return f"{self.cut} of {self.texts} texts have more than {length} tokens and are cut; {text!r} loses {lost!r}"


def encode(encoder: Any, tokenized: dict[str, Tensor]) -> Embedded:
    """Run a text encoder on tokenized prompts, on its execution device, also if its weights are offloaded.

    Raises ValueError for more tokens than the encoder takes.
    """
    device = get_module_execution_device(encoder)
    ids, mask = (tokenized[name].to(device, non_blocking=True) for name in ("input_ids", "attention_mask"))
    check_length(encoder, ids.shape[1])
    output = encoder(input_ids=ids, attention_mask=mask)
    return Embedded((output.last_hidden_state,), (mask,), getattr(output, "pooler_output", None))


def encode_prompts(tokenizer: Any, encoder: Any, prompts: Sequence[str], max_length: int | None = None) -> Embedded:
    """Encode prompts by one text encoder; what a prompt loses beyond the length is logged.

    Raises ValueError, naming the encoder, if its configuration or its weights are damaged.
    """
    length = tokenizer.model_max_length if max_length is None else max_length
    tokenized = tokenize(tokenizer, prompts, length)
    log_lost_ends(lost_ends(tokenizer, prompts, length), f"the text encoder's {length} tokens")
    name = getattr(encoder, "name_or_path", None) or type(encoder).__name__
    try:
        text = encode(encoder, tokenized)
    except (AttributeError, LookupError, TypeError) as error:  # the model's code does not expect such a configuration
        raise ValueError(f"text encoder {name}: cannot encode: {one_line(error)}") from error
    if not all(part.isfinite().all() for part in text.tokens):
        raise ValueError(f"text encoder {name}: its embeddings hold NaN or infinite values")
    return text


def log_lost_ends(lost: Mapping[str, str], limit: str) -> None:
    """Log each prompt that is cut at a limit once, with its lost end; see `lost_ends`."""
    for prompt, end in lost.items():
        _warn_once(f"prompt {_shortened(prompt)} is longer than {limit}: {_shortened(end)} is cut off")


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 200 else f"{text[:100]}...{text[-100:]}")


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)


def draw_dropped(probability: float, generators: Sequence[torch.Generator]) -> list[bool]:
    """Draw the captions of a batch that the null caption replaces, each with its own generator.

    In place of a GPU's generator draws one of the CPU with the same seed: else the host would wait for the GPU.
    """
    hosts = (g if g.device.type == "cpu" else torch.Generator().manual_seed(g.initial_seed()) for g in generators)
    return [torch.rand(1, generator=g).item() < probability for g in hosts]
