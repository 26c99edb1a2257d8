"""Inputs of a pipeline call: checked arguments and encoded prompts.

An illegal argument is a ValueError that names what is legal. Users give and get plain tensors of prompts, or a sequence of them
with one for each of several text encoders. Shapes: b videos, L text tokens, D width; masks b L, nonzero where a token is real.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from promag.diffusion.flow import MOST_STEPS
from promag.diffusion.inputs import check_attention_kwargs
from promag.diffusion.text import Embedded
from promag.tokenizer.geometry import check_ratio

MOST_VIDEO_TOKENS = 2**24
OUTPUT_TYPES = ("np", "pil", "pt", "latent")
NAMES = ("prompt_embeds", "prompt_attention_mask", "pooled_prompt_embeds")
NEGATIVE_NAMES = tuple(f"negative_{name}" for name in NAMES)

Tensors = Tensor | Sequence[Tensor]


# -- arguments -------------------------------------------------------------------------------------------------------


def check_prompts(prompt: Any, prompt_embeds: Any, negative_prompt: Any, negative_prompt_embeds: Any) -> None:
    """Refuse prompts given twice or not at all, what is no text, and texts that are no Unicode (lone surrogates)."""
    if (prompt is None) == (prompt_embeds is None):
        raise ValueError("prompt and prompt_embeds: exactly one of them is needed")
    if negative_prompt is not None and negative_prompt_embeds is not None:
        raise ValueError("negative_prompt and negative_prompt_embeds: at most one of them can be given")
    for name, given in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        texts = [given] if isinstance(given, str) else given
        if given is not None and not (isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)):
            raise ValueError(f"{name} {_short(given)}: a text or a list of texts is needed")
        for text in texts or ():
            if any("\ud800" <= letter <= "\udfff" for letter in text):
                raise ValueError(f"{name} {_short(text)}: holds half of a surrogate pair, which is no Unicode text")
    if isinstance(negative_prompt, list) and prompt is not None:
        wanted = len(prompt) if isinstance(prompt, list) else 1
        if len(negative_prompt) != wanted:
            raise ValueError(f"negative_prompt: {len(negative_prompt)} texts; give one text, or as many as prompts")


def _short(value: Any) -> str:
    """Return how a value is written, in one line of at most 200 letters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 200 else f"{text[:200]}..."


def check_kinds(kind: type, *parts: Any) -> None:
    """Refuse parts of a pipeline that are neither None nor instances of a class."""
    for part in parts:
        if not isinstance(part, kind | None):
            raise ValueError(
                f"{_short(part)} is no {kind.__name__}: a pipeline needs models of torch and a scheduler of diffusers"
            )


def check_parts(**parts: Any) -> None:
    """Refuse a pipeline that was made without a part which a call needs."""
    for name, part in parts.items():
        if part is None:
            raise ValueError(f"{name}: this pipeline was made without one; a call needs it")


def check_budget(ratio: int, tokenizer: Any, transformer: Any) -> None:
    """Refuse a temporal ratio that the tokenizer does not have or the transformer was not trained at."""
    check_ratio(ratio, tokenizer.temporal_ratios)
    trained = sorted(map(int, transformer.config["latents_mean"] or {}))
    if ratio not in trained:
        raise ValueError(
            f"temporal_ratio {ratio}: the transformer was trained at {', '.join(f'{r}x' for r in trained) or 'none'}"
        )


def with_defaults(config: Mapping[str, Any], **values: Any) -> list[Any]:
    """Return the values in their order, those that are None replaced by the pipeline's defaults of the same name."""
    return [config[name] if value is None else value for name, value in values.items()]


def check_counts(**counts: Any) -> None:
    """Refuse what is no whole number of at least 1: zero, fractions, texts and truth values among them."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name} {value!r}: a whole number of at least 1 is needed")


def check_finite(**numbers: Any) -> None:
    """Refuse what is no finite number: NaN, infinities, texts and truth values among them."""
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not _is_finite(value):
            raise ValueError(f"{name} {value!r}: a finite number is needed")


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # whole numbers beyond what a float holds
        return False


# The defaults of pipelines whose transformer states none.
DEFAULTS = {"height": 64, "width": 64, "num_frames": 65, "temporal_ratio": 16, "fps": 8.0}
DEFAULTS |= {"num_inference_steps": 30, "guidance_scale": 4.0}


class VideoShape(NamedTuple):
    """Size, length, token budget and frame rate of the videos of a call."""

    height: int
    width: int
    num_frames: int
    temporal_ratio: int
    fps: float

    @classmethod
    def of(cls, config: Mapping[str, Any], *values: Any) -> "VideoShape":
        """Return the values, in the order of the fields, with the pipeline's defaults for those that are None; checked."""
        names = cls._fields
        shape = cls(*with_defaults(config, **dict(zip(names, values, strict=True))))
        check_counts(**{name: getattr(shape, name) for name in names if name != "fps"})
        check_finite(fps=shape.fps)
        if shape.fps <= 0:
            raise ValueError(f"fps {shape.fps}: must be above 0")
        height, width, frames, ratio, fps = shape
        return cls(int(height), int(width), int(frames), int(ratio), float(fps))


def steps_and_guidance(config: Mapping[str, Any], steps: Any, guidance_scale: Any) -> tuple[int, float]:
    """Return the steps and the guidance of a call, the pipeline's defaults for those that are None; refuse illegal ones."""
    steps, guidance_scale = with_defaults(config, num_inference_steps=steps, guidance_scale=guidance_scale)
    check_counts(num_inference_steps=steps)
    check_finite(guidance_scale=guidance_scale)
    return int(steps), float(guidance_scale)


def check_numbers(videos: Any, lengths: Any) -> None:
    """Refuse illegal videos of each prompt, and lengths of text that are neither None nor counts."""
    check_counts(num_videos_per_prompt=videos)
    for length in lengths if isinstance(lengths, list | tuple) else [lengths]:
        if length is not None:
            check_counts(max_sequence_length=length)


def check_generators(generator: Any, videos: int) -> None:
    """Refuse what is no random generator, nor a list with one for each of so many videos."""
    generators = generator if isinstance(generator, list) else [generator] * videos
    for one in generators:
        if not isinstance(one, torch.Generator | None):
            raise ValueError(f"generator {one!r}: a torch.Generator, a list of them or None is needed")
    if len(generators) != videos:
        raise ValueError(f"generator: {len(generators)} given; use one, or one for each of the {videos} videos")


def check_latents(latents: Any, shape: tuple[int, ...], strength: float) -> None:
    """Refuse latents of another shape or not finite, strengths outside [0, 1], and those below 1 without latents."""
    check_finite(denoise_strength=strength)
    if not 0 <= strength <= 1:
        raise ValueError(f"denoise_strength {strength}: 0 to 1 are legal")
    if latents is None:
        if strength < 1:
            raise ValueError(f"denoise_strength {strength}: needs the latents to start from; 1 starts from noise")
        return
    if not isinstance(latents, Tensor) or tuple(latents.shape) != shape or not latents.is_floating_point():
        raise ValueError(f"latents {_kind(latents)}: a floating-point tensor of shape {shape} is needed")
    if not latents.isfinite().all():
        raise ValueError("latents: all values must be finite; some are NaN or infinite")


def check_callback(callback: Any, names: Any, legal: Sequence[str]) -> None:
    """Refuse what cannot be called, and names of tensors that are not `legal` for a callback."""
    if callback is not None and not callable(callback):
        raise ValueError(f"callback_on_step_end {_short(callback)}: a function (pipe, step, timestep, tensors) is needed")
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name in legal for name in names):
        raise ValueError(f"callback_on_step_end_tensor_inputs {_short(names)}: a list of these is legal: {', '.join(legal)}")


def changed_tensors(returned: Any, latents: Tensor) -> Mapping[str, Any]:
    """Return the tensors that a callback changed; refuse what is no mapping, and latents that do not fit."""
    changed = {} if returned is None else returned
    if not isinstance(changed, Mapping):
        raise ValueError(
            f"callback_on_step_end returned {_short(returned)}: a dictionary of changed tensors, or None, is needed"
        )
    new = changed.get("latents", latents)
    if not isinstance(new, Tensor) or new.shape != latents.shape:
        raise ValueError(f"callback_on_step_end returned latents {_short(new)}: a tensor of {tuple(latents.shape)} is needed")
    return changed


def check_options(output_type: Any, attention_kwargs: Any) -> None:
    """Refuse an unknown output type, and keyword arguments of the attention beside a finite `scale`."""
    if not isinstance(output_type, str) or output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type {_short(output_type)}: use one of {', '.join(OUTPUT_TYPES)}")
    check_attention_kwargs(attention_kwargs)


def check_decodable(latents: Any, output_type: Any) -> None:
    """Refuse what is no finite batch of latents, and a type of output that is none of videos."""
    if not isinstance(latents, Tensor) or latents.ndim != 5 or not latents.is_floating_point():
        raise ValueError(f"latents {_kind(latents)}: a floating-point tensor b c t h w is needed")
    if not latents.isfinite().all():
        raise ValueError("latents: all values must be finite; some are NaN or infinite")
    if not isinstance(output_type, str) or output_type not in (legal := OUTPUT_TYPES[:-1]):
        raise ValueError(f"output_type {_short(output_type)}: use one of {', '.join(legal)}")


def check_amount(token_count: int, steps: int, videos: int) -> None:
    """Refuse more steps than make a difference, and more tokens than any memory holds."""
    if steps > MOST_STEPS:
        raise ValueError(f"num_inference_steps {steps}: at most {MOST_STEPS} are legal")
    if token_count * videos > MOST_VIDEO_TOKENS:
        raise ValueError(
            f"height, width, num_frames, num_videos_per_prompt: {token_count * videos} tokens; at most {MOST_VIDEO_TOKENS} are "
            "legal"
        )


def check_result(result: Tensor, what: str) -> None:
    """Refuse a result that holds NaN or infinite values, of which a black video would be made."""
    if not result.isfinite().all():
        raise ValueError(
            f"{what}: holds NaN or infinite values; use a smaller guidance_scale or dtype=torch.float32, or check the weights"
        )


def first_noise(shape: tuple[int, ...], generator: Any, device: torch.device) -> Tensor:
    """Draw each video's noise in turn, so that it does not depend on how many follow."""
    generators = generator if isinstance(generator, list) else [generator] * shape[0]
    return torch.cat([randn_tensor((1, *shape[1:]), generator=g, device=device, dtype=torch.float32) for g in generators])


# -- prompts ---------------------------------------------------------------------------------------------------------


def pack(tokens: Any, masks: Any, pooled: Any, names: Sequence[str] = NAMES) -> Embedded:
    """Return given tensors as one value; raises ValueError, under the arguments' names, for those that do not fit together."""
    if masks is None:
        raise ValueError(f"{names[0]} without {names[1]}: both are needed, as encode_prompt returns them")
    tokens, masks = (
        _tensors(given, name, dimensions) for given, name, dimensions in zip((tokens, masks), names, (3, 2), strict=False)
    )
    shapes, masked = [tuple(part.shape[:2]) for part in tokens], [tuple(part.shape) for part in masks]
    if shapes != masked or len({shape[0] for shape in shapes}) != 1:
        raise ValueError(f"{names[1]} of shapes {masked}: {shapes} are needed, those of {names[0]}, all for as many prompts")
    if not all(part.isfinite().all() for part in tokens):
        raise ValueError(f"{names[0]}: all values must be finite; some are NaN or infinite")
    if not all(part.any(1).all() for part in masks):
        raise ValueError(f"{names[1]}: masks every token of a prompt; at least one must be real")
    if pooled is not None:
        if isinstance(pooled, list | tuple):
            raise ValueError(f"{names[2]} of type {type(pooled).__name__}: one tensor is needed, for all text encoders")
        (pooled,) = _tensors(pooled, names[2], 2)
        if len(pooled) != shapes[0][0]:
            raise ValueError(f"{names[2]} of {len(pooled)} prompts: {names[0]} are of {shapes[0][0]}")
        if not pooled.isfinite().all():
            raise ValueError(f"{names[2]}: all values must be finite; some are NaN or infinite")
    return Embedded(tokens, masks, pooled)


def _tensors(given: Any, name: str, dimensions: int) -> tuple[Tensor, ...]:
    """Return a tensor or a sequence of them as a tuple; raises ValueError for anything else and for other dimensions."""
    parts = tuple(given) if isinstance(given, list | tuple) else (given,)
    for part in parts:
        if not isinstance(part, Tensor) or part.ndim != dimensions or not len(part):
            raise ValueError(f"{name} {_kind(part)}: a tensor of {dimensions} dimensions, a row for each prompt, is needed")
        if "mask" not in name and not part.is_floating_point():
            raise ValueError(f"{name} {_kind(part)}: embeddings are floating point numbers")
    if not parts:
        raise ValueError(f"{name} {given!r}: at least one tensor is needed")
    return parts


def _kind(given: Any) -> str:
    if isinstance(given, Tensor):
        return f"of shape {tuple(given.shape)}, {str(given.dtype).removeprefix('torch.')}"
    return f"of type {type(given).__name__}"


def unpack(text: Embedded) -> tuple[Tensors, Tensors, Tensor | None]:
    """Return the tensors of `text` as users see them."""
    tokens, masks = (parts[0] if len(parts) == 1 else parts for parts in (text.tokens, text.masks))
    return tokens, masks, text.pooled


@dataclass(frozen=True)
class Prompts:
    """The prompts of all videos and, where guidance is on, as many negative ones. Raises ValueError for another number."""

    text: Embedded
    negative: Embedded | None

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.negative is not None and (count := len(self.negative.tokens[0])) != (needed := len(self)):
            raise ValueError(f"negative prompts: {count} for {needed} videos; give as many as prompts")

    def __len__(self) -> int:
        return len(self.text.tokens[0])

    def check(self, widths: Sequence[int], pooled_width: int) -> None:
        """Refuse tokens and pooled vectors of other widths than the transformer's."""
        for text, names in ((self.text, NAMES), (self.negative, NEGATIVE_NAMES)):
            if text is None:
                continue
            if (given := [part.shape[2] for part in text.tokens]) != list(widths):
                raise ValueError(f"{names[0]} of widths {given}: this transformer needs {list(widths)}")
            if (given := 0 if text.pooled is None else text.pooled.shape[1]) != pooled_width:
                raise ValueError(f"{names[2]} of width {given}: this transformer needs {pooled_width}")

    @cached_property
    def guided(self) -> Embedded:
        """The negative prompts and, after them, the prompts: the order that diffusers' caches expect."""
        if self.negative is None:
            raise ValueError("guidance_scale was raised above 1 while sampling: begin with one above 1")
        return self.negative.merge(self.text, lambda a, b: torch.cat([a, b]))

    def tensors(self) -> dict[str, Any]:
        """Return all tensors by the names of the call's arguments; None for those that are not there."""
        negative = (None,) * 3 if self.negative is None else unpack(self.negative)
        return {**dict(zip(NAMES, unpack(self.text), strict=True)), **dict(zip(NEGATIVE_NAMES, negative, strict=True))}

    def changed(self, tensors: Mapping[str, Any]) -> "Prompts":
        """Return the prompts with some tensors replaced; this same value if all of them are the old ones."""
        old = self.tensors()
        new = {name: tensors.get(name, value) for name, value in old.items()}
        if all(new[name] is value for name, value in old.items()):
            return self
        text, negative = ([new[name] for name in names] for names in (NAMES, NEGATIVE_NAMES))
        dtype = self.text.tokens[0].dtype
        other = None if negative[0] is None else _cast(pack(*negative, names=NEGATIVE_NAMES), dtype)
        return Prompts(_cast(pack(*text), dtype), other)


def repeat_for_videos(text: Embedded, times: int, device: torch.device, dtype: torch.dtype | None) -> Embedded:
    """Repeat each prompt for its videos, where they are sampled and in the transformer's type, without one in their own."""
    return _cast(text.map(lambda x: x.repeat_interleave(times, 0).to(device)), dtype)


def _cast(text: Embedded, dtype: torch.dtype | None) -> Embedded:
    """Return embeddings in another type; masks stay as they are."""
    return text.map(lambda x: x.to(dtype or x.dtype) if x.is_floating_point() else x)
