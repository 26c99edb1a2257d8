"""Checks of a pipeline call's arguments: an illegal one is an error that names what is legal. All raise ValueError."""

from collections.abc import Sequence
from typing import Any

from promag.tokenizer.geometry import check_ratio

OUTPUT_TYPES = ("np", "pil", "pt", "latent")


def check_prompts(prompt: Any, prompt_embeds: Any, negative_prompt: Any, negative_prompt_embeds: Any) -> None:
    """Refuse prompts given twice or not at all, and what is no text."""
    if (prompt is None) == (prompt_embeds is None):
        raise ValueError("prompt and prompt_embeds: exactly one of them is needed")
    if prompt is not None and (not isinstance(prompt, str | list) or (not prompt and isinstance(prompt, list))):
        raise ValueError(f"prompt {prompt!r}: a text or a list of texts is needed")
    if negative_prompt is not None and negative_prompt_embeds is not None:
        raise ValueError("negative_prompt and negative_prompt_embeds: at most one of them can be given")
    if not isinstance(negative_prompt, str | list | None):
        raise ValueError(f"negative_prompt {negative_prompt!r}: a text or a list of texts is needed")
    if isinstance(negative_prompt, list) and prompt is not None:
        wanted = len(prompt) if isinstance(prompt, list) else 1
        if len(negative_prompt) != wanted:
            raise ValueError(f"negative_prompt: {len(negative_prompt)} texts; give one text, or as many as prompts")


def check_budget(ratio: int, tokenizer: Any, transformer: Any) -> None:
    """Refuse a temporal ratio that the tokenizer does not have or the transformer was not trained at."""
    check_ratio(ratio, tokenizer.temporal_ratios)
    trained = sorted(map(int, transformer.config["latents_mean"] or {}))
    if ratio not in trained:
        raise ValueError(f"temporal_ratio {ratio}: the transformer was trained at {', '.join(f'{r}x' for r in trained)}")


def check_numbers(fps: float, **counts: int) -> None:
    """Refuse a frame rate that is not above 0 and counts below 1."""
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} {value}: at least 1 is needed")
    if fps <= 0:
        raise ValueError(f"fps {fps}: must be above 0")


def check_latents(latents: Any, shape: tuple[int, ...], strength: float) -> None:
    """Refuse latents of another shape, a share of the steps outside [0, 1], and one below 1 without latents to start from."""
    if not 0 <= strength <= 1:
        raise ValueError(f"denoise_strength {strength}: 0 to 1 are legal")
    if latents is None and strength < 1:
        raise ValueError(f"denoise_strength {strength}: needs the latents to start from; 1 starts from noise")
    if latents is not None and tuple(latents.shape) != shape:
        raise ValueError(f"latents of shape {tuple(latents.shape)}: {shape} is needed")


def check_names(output_type: str, callback_tensors: Sequence[str], legal: Sequence[str]) -> None:
    """Refuse an unknown output type and names of tensors that are not `legal` for a callback."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type {output_type!r}: use one of {', '.join(OUTPUT_TYPES)}")
    unknown = set(callback_tensors) - set(legal)
    if unknown:
        raise ValueError(f"callback_on_step_end_tensor_inputs {sorted(unknown)}: legal are {', '.join(legal)}")
