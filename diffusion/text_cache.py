"""Cached text embeddings: captions encoded once by frozen encoders, which need not be in memory while training.

One cache for each encoder (see cache_store.py), made from the captions in a cache of latents. A shard holds for its n captions:
tokens (those that are real, of all captions in one row, S D), ends (where each caption's end, n), pooled (n D), where the
encoder has a pooled vector, and texts (a hash of the captions). null.safetensors holds the same of the null caption, once.

Shapes: B captions, L text tokens, D width.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NotRequired

import torch
from pydantic import ConfigDict, NonNegativeInt, PositiveInt
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from typing_extensions import TypedDict

from promag.training.config import UserError, one_line
from promag.training.files import save_tensors_atomically, write_atomically
from promag.training.processes import broadcast_from_main, processes, wait_for_everyone
from promag.training.progress import ProgressBar

from .cache_store import (
    AGAIN,
    CACHE_DTYPES,
    Fingerprint,
    Index,
    Shards,
    clips_of,
    finish,
    hash_texts,
    open_or_resume_cache,
    read_record,
    shard_path,
    stretch,
    write_shard,
)
from .text import (
    NULL_CAPTION,
    CutTexts,
    Embedded,
    encode,
    encoder_files,
    encoder_settings,
    hash_text_encoder,
    side_by_side,
    text_widths,
    tokenize,
)

BATCH = 32  # captions encoded at once


@dataclass(frozen=True)
class TextFingerprint(Fingerprint):
    """Identity of the inputs of a cache of embeddings."""

    hashed: ClassVar[Mapping[str, str]] = {
        "encoder": "another text encoder",
        "settings": "a text encoder of other settings",
        "clips": "other clips, or clips of another generator (data/synthetic.py)",
    }

    encoder: str  # hash of the weights and the text tokenizer
    clips: str  # hash of the clip list
    max_length: int
    dtype: str
    shard_size: int
    settings: str | None = field(default=None, kw_only=True)  # hash of `encoder_settings`; earlier versions had none


class _Digest(TypedDict):
    digest: str
    settings: NotRequired[str]
    files: list[list[Any]]  # name, size and time of each


def encoder_digest(model: str, weights: str | None, memory: Path, load: Callable[[], tuple[Any, Any]]) -> tuple[str, str]:
    """Return the hash of a text encoder and its tokenizer, and its settings, without reading them where `memory` has both.

    Args:
        model: as in `load_frozen`, likewise `weights`.
        memory: a JSON file of the hashes made before, each with the sizes and times of the files that were hashed.
        load: returns the text tokenizer and the encoder; not called where the files are the same as before.
    """
    recorded = read_record(memory, dict[str, _Digest]) if memory.exists() else {}
    name = model if weights is None else f"{model} {weights}"
    files = encoder_files(model, weights)
    if files is not None and recorded.get(name, {}).get("files") == files and "settings" in recorded[name]:
        return recorded[name]["digest"], recorded[name]["settings"]
    tokenizer, encoder = load()
    digest, settings = hash_text_encoder(tokenizer, encoder), encoder_settings(encoder)
    if (files := encoder_files(model, weights)) is not None:
        memory.parent.mkdir(parents=True, exist_ok=True)
        entry = {"digest": digest, "settings": settings, "files": files}
        write_atomically(memory, json.dumps({**recorded, name: entry}, indent=1))
    return digest, settings


def write_embeddings(
    folder: Path,
    fingerprint: TextFingerprint,
    latents: Path,
    load: Callable[[], tuple[Any, Any]],
    clean: Callable[[str], str] = str,
) -> Path:
    """Encode the captions of a cache of latents where they are not cached yet; return the folder.

    The processes that run together divide the missing shards among them; a shard is the same for any number of processes and
    interruptions. Shards whose captions have changed count as missing.

    Args:
        folder: folder of the cache. An interrupted cache continues at the first missing shard.
        fingerprint: the texts and the encoder that the cache is made from.
        latents: folder of the whole cache of latents that has the captions.
        load: returns the text tokenizer and the encoder; not called where nothing is missing.
        clean: returns a caption as it is tokenized; the fingerprint's encoder states which function.

    Raises UserError where the folder holds something else.
    """
    captions, size = Shards(latents), fingerprint.shard_size
    missing = broadcast_from_main(lambda: _open(folder, fingerprint, captions))
    if missing is None:
        return folder
    state, dtype = processes(), CACHE_DTYPES[fingerprint.dtype]
    mine = missing[state.process_index :: state.num_processes]
    if mine or state.is_main_process:
        tokenizer, encoder = load()
        encoder.to(state.device)
        cut = CutTexts(tokenizer)
        for number in ProgressBar(mine, desc="caching text", unit="shard", disable=not state.is_main_process):
            texts = _texts_of(captions, number, size)
            cleaned = [clean(text) for text in texts]
            cut.add(cleaned)
            tensors = _encode(tokenizer, encoder, cleaned, dtype)
            write_shard(folder, number, fingerprint, {**tensors, "texts": hash_texts(texts)})
        if cut.example is not None:
            print(f"{folder}: {cut}", flush=True)
        if state.is_main_process:
            save_tensors_atomically(folder / "null.safetensors", _encode(tokenizer, encoder, [clean(NULL_CAPTION)], dtype))
            width, pooled = text_widths(encoder)
            facts = {"width": width, "pooled": pooled}
        encoder.cpu()
    wait_for_everyone()
    if state.is_main_process:
        finish(folder, fingerprint, captions.clips, size, **facts)
    wait_for_everyone()
    return folder


def _open(folder: Path, fingerprint: TextFingerprint, captions: Shards) -> list[int] | None:
    """Open or create a cache; return the shards to encode, None if it is complete."""
    size = fingerprint.shard_size
    unfinished = open_or_resume_cache(folder, fingerprint, math.ceil(captions.clips / size))
    if unfinished is None:
        return None
    changed = []
    for number in unfinished.outdated:
        with safe_open(shard_path(folder, number), "pt") as shard:
            if not torch.equal(shard.get_tensor("texts"), hash_texts(_texts_of(captions, number, size))):
                changed.append(number)
    return sorted([*unfinished.missing, *changed])


def _texts_of(captions: Shards, number: int, size: int) -> list[str]:
    """Return the captions of one shard of embeddings."""
    return [captions.caption(clip) for clip in clips_of(number, size, captions.clips)]


@torch.no_grad()
def _encode(tokenizer: Any, encoder: Any, texts: Sequence[str], dtype: torch.dtype) -> dict[str, Tensor]:
    tokens, lengths, pooled = [], [], []
    for first in range(0, len(texts), BATCH):
        text = encode(encoder, tokenize(tokenizer, texts[first : first + BATCH]))
        real = text.masks[0].bool()
        tokens.append(text.tokens[0][real].to(dtype).cpu())
        lengths.append(real.sum(1).cpu())
        if text.pooled is not None:
            pooled.append(text.pooled.to(dtype).cpu())
    tensors = {"tokens": torch.cat(tokens), "ends": torch.cat(lengths).cumsum(0)}
    return {**tensors, "pooled": torch.cat(pooled)} if pooled else tensors


class _TextSource(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow", strict=True)  # pyright: ignore[reportGeneralTypeIssues]

    clips: str
    max_length: PositiveInt
    dtype: Literal["float32", "bfloat16", "float16"]


class TextIndex(Index):
    """What the index of a cache of embeddings states."""

    fingerprint: _TextSource  # pyright: ignore[reportIncompatibleVariableOverride, reportGeneralTypeIssues]
    width: PositiveInt
    pooled: NonNegativeInt  # width of the pooled vector; 0 without one


class EmbeddingCache:
    """Embeddings of all captions by one frozen encoder, the `number`th of a training.

    Raises UserError for a folder that holds no whole cache.
    """

    def __init__(self, folder: Path, number: int):
        ragged = {"ends": "tokens"}
        self.shards, self.folder, self.number = Shards(folder, TextIndex, {"ends": ()}, ragged), folder, number
        index = self.shards.index
        self.width, self.pooled_width = index["width"], index["pooled"]
        if self.pooled_width:
            self.shards.rows["pooled"] = [self.pooled_width]
        self.length: int = index["fingerprint"]["max_length"]
        self.clips: str = index["fingerprint"]["clips"]
        self.keys = {name: f"text_{number}_{name}" for name in ("tokens", "mask", "pooled")}

    def row(self, clip: int) -> dict[str, Tensor]:
        """Return a caption's tokens, L D, mask, L, and pooled vector, D, under keys of this encoder."""
        shard, row = self.shards.place(clip)
        first, end = stretch(shard.get_slice("ends"), row)
        pooled = shard.get_slice("pooled")[row] if self.pooled_width else None
        tokens = shard.get_slice("tokens")[first:end] if end > first else None
        if problem := self._problem(tokens, pooled):
            raise self.shards.damaged(clip, problem)
        return self._padded(tokens, pooled)

    def null(self) -> Embedded:
        """Return the embedding of the null caption, a batch of one."""
        file = self.folder / "null.safetensors"
        try:
            tensors = load_file(file)
            tokens, pooled = tensors["tokens"], tensors["pooled"][0] if self.pooled_width else None
        except (OSError, SafetensorError, LookupError) as error:
            raise UserError(f"cache {file}: cannot be read: {one_line(error)}; {AGAIN}") from None
        if problem := self._problem(tokens, pooled):
            raise UserError(f"cache {file}: {problem}; {AGAIN}")
        row = self._padded(tokens, pooled)
        return self.embedded({key: value[None] for key, value in row.items()})

    def _problem(self, tokens: Tensor | None, pooled: Tensor | None) -> str | None:
        """Return what is wrong with a caption's tensors, None if nothing is."""
        if tokens is not None and (tokens.ndim != 2 or len(tokens) > self.length or tokens.shape[1] != self.width):
            return f"tokens of shape {tuple(tokens.shape)}: at most {self.length} of width {self.width} are needed"
        if pooled is not None and tuple(pooled.shape) != (self.pooled_width,):
            return f"pooled of shape {tuple(pooled.shape)}: ({self.pooled_width},) is needed"
        if not all(x.is_floating_point() and x.isfinite().all() for x in (tokens, pooled) if x is not None):
            return "its embedding is not finite"
        return None

    def embedded(self, batch: Mapping[str, Any]) -> Embedded:
        """Return this encoder's part of a batch of rows, as float32."""
        pooled = batch[self.keys["pooled"]].float() if self.pooled_width else None
        return Embedded((batch[self.keys["tokens"]].float(),), (batch[self.keys["mask"]],), pooled)

    def _padded(self, real: Tensor | None, pooled: Tensor | None) -> dict[str, Tensor]:
        dtype = CACHE_DTYPES[self.shards.index["fingerprint"]["dtype"]]
        tokens, mask = torch.zeros(self.length, self.width, dtype=dtype), torch.zeros(self.length, dtype=torch.bool)
        if real is not None:
            tokens[: len(real)], mask[: len(real)] = real, True
        row = {self.keys["tokens"]: tokens, self.keys["mask"]: mask}
        return row if pooled is None else {**row, self.keys["pooled"]: pooled}


class CaptionEncoder(nn.Module):
    """Encodes the captions of a training: cached embeddings of frozen encoders, and a small trained text model.

    Args:
        caches: for each encoder, in order: its cache, or None for the trained text model.
        tokenizer: tokenizer of the trained text model.
        model: the trained text model.
    """

    def __init__(self, caches: Sequence[EmbeddingCache | None], tokenizer: Any = None, model: Any = None):
        super().__init__()
        self.caches, self.tokenizer, self.model = caches, tokenizer, model
        self.nulls = [cache and cache.null() for cache in caches]
        learned = text_widths(model) if model is not None else (0, 0)
        self.widths = tuple(cache.width if cache else learned[0] for cache in caches)
        self.pooled_width = sum(cache.pooled_width if cache else learned[1] for cache in caches)
        self.lengths = tuple(cache.length if cache else int(tokenizer.model_max_length) for cache in caches)

    @property
    def learned(self) -> tuple[Any, Any] | None:
        """Tokenizer and text model of the encoder that learns, if there is one."""
        return None if self.model is None else (self.tokenizer, self.model)

    def forward(self, batch: Mapping[str, Any], dropped: Sequence[bool] | None = None) -> Embedded:
        """Encode the captions of a batch: `caption`, and what EmbeddingCache.row gave; `dropped` ones as the null caption."""
        captions, parts = list(batch["caption"]), []
        dropped = dropped or [False] * len(captions)
        for number, (cache, null) in enumerate(zip(self.caches, self.nulls, strict=True)):
            if cache is None or null is None:
                texts = [NULL_CAPTION if drop else caption for caption, drop in zip(captions, dropped, strict=True)]
                parts.append(encode(self.model, tokenize(self.tokenizer, texts)))
            else:
                text = cache.embedded(batch)
                self.nulls[number] = null = _moved(null, text.tokens[0].device)  # once: the host waits for such a copy
                parts.append(_replace(text, null, dropped))
        return side_by_side(parts)


def _moved(text: Embedded, device: torch.device) -> Embedded:
    return text.map(lambda part: part.to(device))


def _replace(text: Embedded, null: Embedded, dropped: Sequence[bool]) -> Embedded:
    which = torch.tensor(dropped).to(text.tokens[0].device, non_blocking=True)

    def replace(x: Tensor, by: Tensor) -> Tensor:
        return torch.where(which.view(-1, *[1] * (x.ndim - 1)), by, x)

    return text.merge(null, replace)
