"""Similarity of a video and its prompt by a CLIP model, whose trained weights the user names by path.

It is the cosine of text and picture embeddings (CLIP: arXiv 2103.00020), that is CLIPScore (arXiv 2104.08718) without its scale
and its clamp at 0. Videos are uint8 (T, H, W, 3).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from promag.diffusion.text import log_lost_ends, lost_ends
from promag.training.config import UserError, one_line

BATCH = 32  # pictures encoded at once
OPEN_CLIP = "open_clip:"
# Raised on loading a folder that is not a model, or an incomplete one.
UNLOADABLE = (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError)


class ClipSimilarity:
    """Cosine between a text's embedding and each frame's, averaged over the frames: from -1 to 1.

    Args:
        embed_text: maps a text to (1, D); text beyond the model's length is cut, as CLIP's own tokenizers do, and logged.
        embed_pictures: maps RGB pictures to (N, D).
    """

    def __init__(self, embed_text: Callable[[str], Tensor], embed_pictures: Callable[[Sequence[Image.Image]], Tensor]):
        self.embed_text, self.embed_pictures = embed_text, embed_pictures

    @classmethod
    def load(cls, model: str, weights: str | None = None) -> "ClipSimilarity":
        """Load a CLIP model by path.

        Args:
            model: folder of a CLIP model of transformers, `open_clip:NAME` (ViT-B-32) or `open_clip:local-dir:FOLDER`.
            weights: file with the weights of `open_clip:NAME`; the other two include theirs.

        Raises UserError naming what is missing.
        """
        named = model.startswith(OPEN_CLIP) and not model.startswith(f"{OPEN_CLIP}local-dir:")
        if named != (weights is not None):
            raise UserError(f"clip {model}: " + (_NEEDS if named else f"includes its weights; leave {weights} out"))
        if weights is not None and not Path(weights).is_file():
            raise UserError(f"clip {model}: no file {weights} with its weights")
        return cls(*(_open_clip(model, weights) if model.startswith(OPEN_CLIP) else _transformers(model)))

    @torch.no_grad()
    def __call__(self, video: np.ndarray, prompt: str) -> float:
        """Return the similarity of one video and its prompt."""
        text = F.normalize(self.embed_text(prompt).float(), dim=-1)
        pictures = [Image.fromarray(frame) for frame in video]
        parts = [self.embed_pictures(pictures[i : i + BATCH]).float() for i in range(0, len(pictures), BATCH)]
        return float((F.normalize(torch.cat(parts), dim=-1) @ text.T).mean())


def load_similarity(model: str | None, weights: str | None) -> ClipSimilarity | None:
    """Return the CLIP similarity that the options --clip and --clip-weights name, None without a model.

    Raises UserError as `ClipSimilarity.load` does, and for weights without a model.
    """
    if weights and not model:
        raise UserError(f"--clip-weights {weights}: name the model they belong to, --clip open_clip:NAME")
    return ClipSimilarity.load(model, weights) if model else None


_NEEDS = "needs a file with its trained weights (--clip-weights)"


def _open_clip(model: str, weights: str | None) -> tuple[Callable[[str], Tensor], Callable[[Sequence[Image.Image]], Tensor]]:
    try:
        import open_clip
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision beside another build of torch
        raise UserError(
            f"clip {model}: needs open_clip, which cannot be imported: {error}; run pip install 'promag[open-clip]'"
        ) from None
    name = model.removeprefix(OPEN_CLIP)
    try:
        net, _, prepare = open_clip.create_model_and_transforms(name, pretrained=weights, require_pretrained=True)
        tokenize = open_clip.get_tokenizer(name)
    except UNLOADABLE as error:
        raise UserError(f"clip {model}: cannot be loaded: {one_line(error)}") from None
    clip: Any = net.eval()
    to_tensor: Any = prepare

    def embed_text(prompt: str) -> Tensor:
        log_lost_ends(_lost_in_open_clip(tokenize, prompt), f"the CLIP model's {tokenize.context_length} tokens")
        return clip.encode_text(tokenize([prompt]))

    return (
        embed_text,
        lambda pictures: clip.encode_image(torch.stack([to_tensor(picture) for picture in pictures])),
    )


def _lost_in_open_clip(tokenizer: Any, prompt: str) -> dict[str, str]:
    """Return the prompt with the end that it loses, if it is cut."""
    if hasattr(tokenizer, "tokenizer"):  # one of transformers
        return lost_ends(tokenizer.tokenizer, [prompt], tokenizer.context_length)
    lost = tokenizer.encode(prompt)[tokenizer.context_length - 2 :]  # the start and the end are marked
    return {prompt: tokenizer.decode(lost).strip()} if lost else {}


def _transformers(model: str) -> tuple[Callable[[str], Tensor], Callable[[Sequence[Image.Image]], Tensor]]:
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    if not (Path(model) / "config.json").exists():
        raise UserError(f"clip {model}: no config.json there; give a folder of transformers, or {OPEN_CLIP}NAME")
    try:
        loaded: Any = CLIPModel.from_pretrained(model, output_loading_info=True, use_safetensors=True)
        tokenize: Any = AutoTokenizer.from_pretrained(model)
        prepare: Any = CLIPImageProcessor.from_pretrained(model)
    except UNLOADABLE as error:
        raise UserError(f"clip {model}: cannot be loaded: {one_line(error)}") from None
    clip, loading = loaded
    if loading["missing_keys"]:  # transformers initialises them at random, with a warning
        raise UserError(f"clip {model}: no weights there for {sorted(loading['missing_keys'])[0]}; is it a text model alone?")
    clip.eval()

    def embed_text(prompt: str) -> Tensor:
        log_lost_ends(lost_ends(tokenize, [prompt]), f"the CLIP model's {tokenize.model_max_length} tokens")
        tokens = tokenize([prompt], truncation=True, return_tensors="pt")
        return clip.get_text_features(**tokens).pooler_output

    def embed_pictures(pictures: Sequence[Image.Image]) -> Tensor:
        return clip.get_image_features(prepare(list(pictures), return_tensors="pt")["pixel_values"]).pooler_output

    return embed_text, embed_pictures
