"""Text to tokens to vectors: a small CLIP text model for training from scratch, or a frozen T5 or CLIP by path.

Shapes: B prompts, L text tokens, D width.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
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

from ..training.config import UserError

PAD, START, END = "<|pad|>", "<|startoftext|>", "<|endoftext|>"
FROZEN = {"clip_text_model": CLIPTextModel, "clip": CLIPTextModel, "t5": T5EncoderModel, "umt5": UMT5EncoderModel}


class Embedded(NamedTuple):
    """Encoded prompts."""

    tokens: Tensor  # B L D
    mask: Tensor  # B L, 1 where a token is real
    pooled: Tensor | None  # B D, where the encoder has one


def learn_vocabulary(captions: Iterable[str], size: int = 1024, max_length: int = 32) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE vocabulary from captions; any text can be written with it, known words in few tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    # END must not be token 2: CLIP models read that number as "pool at the highest token id", for old checkpoints.
    special = [START, END, PAD]
    tokenizer.train_from_iterator(
        captions,
        trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    ids = [(token, tokenizer.token_to_id(token)) for token in (START, END)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=START,
        eos_token=END,
        model_max_length=max_length,
        padding_side="right",
    )


def small_clip(tokenizer: Any, width: int = 128, layers: int = 2, heads: int = 4) -> CLIPTextModel:
    """Return an untrained CLIP text model for a vocabulary from `learn_vocabulary`."""
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
    # Beside layers that write at a scale near one, words at the deviation of 0.02 that large models start with are lost.
    words: Any = model.get_input_embeddings()
    torch.nn.init.normal_(words.weight, std=1.0)
    return model


def load_frozen(path: str | os.PathLike, max_length: int) -> tuple[Any, Any]:
    """Load a T5, UMT5 or CLIP text encoder and its tokenizer from a folder or hub name, frozen.

    Raises UserError when nothing can be loaded there or it is another kind of model.
    """
    folder = Path(path)
    place = {"text_encoder": folder / "text_encoder", "tokenizer": folder / "tokenizer"}
    if not place["text_encoder"].is_dir():  # not a pipeline's folder: model and tokenizer lie side by side
        place = dict.fromkeys(place, path)
    try:
        kind = AutoConfig.from_pretrained(place["text_encoder"]).model_type
        if kind not in FROZEN:
            raise UserError(f"text encoder {path}: is a {kind} model; legal are {', '.join(sorted(FROZEN))}")
        encoder = FROZEN[kind].from_pretrained(place["text_encoder"])
        tokenizer = AutoTokenizer.from_pretrained(place["tokenizer"])
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"text encoder {path}: cannot be loaded: {str(error).splitlines()[0]}") from None
    tokenizer.model_max_length = max_length
    return tokenizer, encoder.requires_grad_(False).eval()


def text_widths(encoder: Any) -> tuple[int, int]:
    """Return (width of its tokens, width of its pooled vector or 0)."""
    config = encoder.config
    width = config.d_model if hasattr(config, "d_model") else config.hidden_size
    return width, width if isinstance(encoder, CLIPTextModel) else 0


def tokenize(tokenizer: Any, prompts: Sequence[str], max_length: int | None = None) -> dict[str, Tensor]:
    """Return input_ids and attention_mask, B L, padded to `max_length` (default: the tokenizer's); longer text is cut.

    The length never depends on the other prompts of the batch, so neither does any output.
    """
    encoded = tokenizer(
        list(prompts),
        padding="max_length",
        truncation=True,
        max_length=max_length or tokenizer.model_max_length,
        return_tensors="pt",
    )
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


def encode(encoder: Any, tokenized: dict[str, Tensor]) -> Embedded:
    """Run a text encoder on tokenized prompts, on the encoder's device."""
    device = next(encoder.parameters()).device
    ids, mask = tokenized["input_ids"].to(device), tokenized["attention_mask"].to(device)
    output = encoder(input_ids=ids, attention_mask=mask)
    pooled = getattr(output, "pooler_output", None)
    return Embedded(output.last_hidden_state, mask, pooled)


def drop_captions(captions: Sequence[str], probability: float, generators: Sequence[torch.Generator]) -> list[str]:
    """Replace captions by the null caption, the empty text, which guidance uses too."""
    draws = torch.cat([torch.rand(1, generator=g, device=g.device) for g in generators]).tolist()
    return ["" if draw < probability else caption for draw, caption in zip(draws, captions, strict=True)]
