"""Pipelines of diffusers with transformers of other families: put together, saved, loaded, and called as our sampling does.

A WanPipeline's folder holds what that class saves, and may hold promag.json: the shape and the temporal ratios that it was
trained at. The stock pipeline decodes at the ratio that its autoencoder serves, the highest one when it is loaded.
"""

import inspect
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from torch import Tensor

from promag.diffusion.config import DiffusionConfig
from promag.diffusion.families import WAN_TEXT_TOKENS, LatentStatistics
from promag.tokenizer.autoencoder import AutoencoderKLProMAG
from promag.tokenizer.checkpoint import load_tokenizer
from promag.tokenizer.geometry import check_frames, check_ratio, check_size
from promag.training.config import UserError, one_line
from promag.training.files import write_atomically
from promag.training.safetensors_only import check_folder, read_mapping

from .decoding import offload_again
from .inputs import VideoShape, check_decodable, check_result, steps_and_guidance, with_defaults
from .lora import LoraLoader, rename_lora
from .saved_index import WAN_PARTS, check_index
from .timesteps import FLOW, FLOW_WITH_SETTINGS, check_flow

SETTINGS = "promag.json"


@dataclass(frozen=True)
class StockDefaults:
    """What a stock pipeline samples by default, and the temporal ratios that its transformer was trained at."""

    height: int = 480
    width: int = 832
    num_frames: int = 81
    fps: float = 16.0
    temporal_ratios: Sequence[int] = ()  # () for all of the autoencoder's
    num_inference_steps: int = 30
    guidance_scale: float = 4.0
    max_sequence_length: int = WAN_TEXT_TOKENS


WAN_2_2_5B = StockDefaults(height=704, width=1280, num_frames=121, fps=24.0)  # as its authors sample it


class StockPipeline:
    """A WanPipeline with the arguments and the defaults of our own pipeline.

    Args:
        pipe: the pipeline; its autoencoder may be a grown one.
        defaults: shape, rate and ratios of its videos, the first ratio by default; None: as its authors sample it.
    """

    def __init__(self, pipe: Any, defaults: StockDefaults | None = None):
        if not isinstance(pipe.vae, AutoencoderKLProMAG):
            pipe.register_modules(vae=AutoencoderKLProMAG.from_base(pipe.vae))
        # Of the published models the 5B one alone gives each latent frame a time of its own.
        stated = WAN_2_2_5B if pipe.config.expand_timesteps else StockDefaults()
        self.pipe, self.defaults = pipe, defaults or stated
        self.temporal_ratios = tuple(self.defaults.temporal_ratios) or pipe.vae.temporal_ratios
        for ratio in self.temporal_ratios:
            check_ratio(ratio, pipe.vae.temporal_ratios)
        first = self.temporal_ratios[0] if self.defaults.temporal_ratios else pipe.vae.temporal_ratios[-1]
        self.config = {**asdict(self.defaults), "temporal_ratio": first}

    def limit_ratios(self, ratios: Sequence[int]) -> None:
        """Sample at some of the temporal ratios alone, the first by default: those at which loaded adapters were trained."""
        self.temporal_ratios = tuple(ratios)
        self.config |= {"temporal_ratios": self.temporal_ratios, "temporal_ratio": ratios[0]}

    @property
    def transformer(self) -> Any:
        """The transformer."""
        return self.pipe.transformer

    @property
    def vae(self) -> AutoencoderKLProMAG:
        """The autoencoder; one of diffusers is the base of ours, without a further level."""
        return self.pipe.vae

    @property
    def scheduler(self) -> Any:
        """The scheduler."""
        return self.pipe.scheduler

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.pipe.device

    def to(self, *args: Any) -> "StockPipeline":
        """Move the parts."""
        self.pipe.to(*args)
        return self

    def set_progress_bar_config(self, **options: Any) -> None:
        """Set the options of the progress bar over the steps."""
        self.pipe.set_progress_bar_config(**options)

    def load_lora_weights(self, folder: str, weight_name: str, **options: Any) -> None:
        """Load adapters for the transformer from a safetensors file, in any of the namings of lora.py, or by Wan's own layers.

        Raises UserError for a file of which not every tensor fits the transformer, where diffusers warns and goes on, and where
        two transformers share the times: a file is for one of them, and does not tell for which.
        """
        if self.pipe.transformer_2 is not None:
            raise UserError(
                f"LoRA {Path(folder, weight_name)}: the pipeline has two transformers, and adapters are for one of them; load "
                "each file by WanPipeline.load_lora_weights, that of transformer_2 with load_into_transformer_2=True"
            )
        try:
            return LoraLoader.load_lora_weights(self.pipe, folder, weight_name=weight_name, **options)
        except UserError as error:
            try:
                translated = self.pipe.lora_state_dict(folder, weight_name=weight_name, **options)
            except (ValueError, LookupError):
                raise error from None
        rename_lora(translated, self.transformer, str(Path(folder, weight_name)))
        self.pipe.load_lora_weights(folder, weight_name=weight_name, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the stock pipeline, and the defaults beside its parts.

        Levels of the autoencoder above the trained ratios are left out: the highest one is that which a loaded pipeline
        decodes at. An autoencoder of diffusers without further levels is saved as its own class.
        """
        vae = self.vae
        self.pipe.register_modules(vae=without_levels_above(vae, max(self.temporal_ratios)))
        try:
            self.pipe.save_pretrained(folder)
        finally:
            self.pipe.register_modules(vae=vae)
        first = self.config["temporal_ratio"]
        ratios = [first, *(ratio for ratio in self.temporal_ratios if ratio != first)]
        values = {**asdict(self.defaults), "temporal_ratios": ratios}
        write_atomically(Path(folder) / SETTINGS, json.dumps(values, indent=2) + "\n")

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        temporal_ratio: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        fps: float | None = None,
        generator: Any = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        output_type: str = "np",
        callback_on_step_end: Any = None,
    ) -> Any:
        """Sample as WanPipeline does; embeddings of padding become zero, and the frame rate is no input of the model.

        Raises ValueError for a ratio, a number of frames and a size that the stock pipeline would round or cannot decode.
        """
        shape = VideoShape.of(self.config, height, width, num_frames, temporal_ratio, fps)
        steps, guidance = steps_and_guidance(self.config, num_inference_steps, guidance_scale)
        vae, ratio = self.vae, shape.temporal_ratio
        check_ratio(ratio, self.temporal_ratios)
        check_frames(shape.num_frames, ratio)
        _, *patch = self.transformer.config.patch_size
        check_size(shape.height, shape.width, math.lcm(16, vae.spatial_compression_ratio * math.lcm(*patch)))
        served, self.pipe.vae_scale_factor_temporal = vae.served, ratio
        vae.serve(ratio)
        try:
            return self.pipe(
                prompt=prompt,
                negative_prompt=negative_prompt,
                height=shape.height,
                width=shape.width,
                num_frames=shape.num_frames,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=generator,
                latents=latents,
                prompt_embeds=self._without_padding(prompt_embeds, prompt_attention_mask),
                negative_prompt_embeds=self._without_padding(negative_prompt_embeds, negative_prompt_attention_mask),
                output_type=output_type,
                callback_on_step_end=callback_on_step_end,
                max_sequence_length=self.defaults.max_sequence_length,
            )
        finally:
            vae.serve(served)
            self.pipe.vae_scale_factor_temporal = vae.temporal_compression_ratio

    @torch.no_grad()
    def decode_latents(self, latents: Tensor, temporal_ratio: int | None = None, output_type: str = "np") -> Any:
        """Decode latents b c t h w as output_type "latent" returns them, normalised; see ProMAGPipeline."""
        check_decodable(latents, output_type)
        (ratio,) = with_defaults(self.config, temporal_ratio=temporal_ratio)
        check_ratio(ratio, self.temporal_ratios)
        vae = self.vae
        latents = latents.to(self.pipe._execution_device, vae.dtype)
        mean, std = (latents.new_tensor(vae.config[name])[:, None, None, None] for name in ("latents_mean", "latents_std"))
        video = vae.decode(latents * std + mean, ratio, return_dict=False)[0]
        check_result(video, "video decoded from finite latents")
        offload_again(self.pipe)
        return self.pipe.video_processor.postprocess_video(video, output_type=output_type)

    def _without_padding(self, embeds: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """Move embeddings to the device of the stock call, which does not, with zeros at the padding."""
        if embeds is None:
            return None
        kept = embeds if mask is None else embeds * mask[..., None].to(embeds)
        return kept.to(self.pipe._execution_device)


def with_autoencoder(pipe: StockPipeline, vae: AutoencoderKLProMAG) -> StockPipeline:
    """Return a pipeline with another autoencoder of the same latents: one grown from the pipeline's own, or its student.

    Raises ValueError for one of other latents, and for one without the temporal ratios of the training.
    """
    own = pipe.vae
    for name, has, needed in (
        ("channels", vae.latent_channels, own.latent_channels),
        ("pixels a position", vae.spatial_compression_ratio, own.spatial_compression_ratio),
    ):
        if has != needed:
            raise ValueError(f"its latents have {name} {has}, those of the pipeline's own {needed}; give one grown from that")
    if LatentStatistics.of(vae.config) != LatentStatistics.of(own.config):
        raise ValueError("its latents_mean and latents_std are not those of the pipeline's own; give one grown from that")
    pipe.pipe.register_modules(vae=vae)
    pipe.pipe.vae_scale_factor_temporal = vae.temporal_compression_ratio
    return StockPipeline(pipe.pipe, pipe.defaults)


def without_levels_above(vae: AutoencoderKLProMAG, ratio: int) -> Any:
    """Return an autoencoder whose highest temporal ratio is `ratio`, its weights shared; the base alone as its own class."""
    level = vae.level_of(ratio)
    if level == 0 and vae.existing:
        return vae.base_model()
    if ratio == vae.temporal_ratios[-1]:
        return vae
    names = inspect.signature(AutoencoderKLProMAG.__init__).parameters
    settings = {name: value for name, value in vae.own_config.items() if name in names}
    model = AutoencoderKLProMAG(**{**settings, "growth": vae.config["growth"][:level]})
    weights = vae.state_dict()
    model.load_state_dict({name: weights[name] for name in model.state_dict()}, assign=True)
    return model.eval()


def is_stock(folder: str | Path) -> bool:
    """Return whether a folder holds a saved WanPipeline."""
    index = Path(folder) / "model_index.json"
    return index.is_file() and read_mapping(index).get("_class_name") == WanPipeline.__name__


def load_stock(folder: str | Path, tokenizer: str | Path | None = None) -> StockPipeline:
    """Load a saved WanPipeline, of which all weights must be safetensors; raises UserError if it cannot be loaded.

    `tokenizer` is the folder of an autoencoder that takes the place of its own.
    """
    folder = Path(folder)
    check_folder(folder)
    check_index(read_mapping(folder / "model_index.json"), WAN_PARTS)
    settings = read_mapping(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    try:
        defaults = StockDefaults(**settings) if settings else None
        pipe: Any = WanPipeline.from_pretrained(folder, use_safetensors=True)
        loaded = StockPipeline(pipe, defaults)
    except UserError:
        raise
    except Exception as error:  # whatever diffusers raises for files that are not what it expects
        raise UserError(f"pipeline {folder}: cannot be loaded: {one_line(error)}") from None
    if tokenizer is None:
        return loaded
    vae = load_tokenizer(tokenizer)
    try:
        return with_autoencoder(loaded, vae)
    except ValueError as error:
        raise UserError(f"tokenizer {tokenizer}: {error}") from None


def build_stock(config: DiffusionConfig, transformer: Any, vae: Any, fps: float, text: dict[str, Any]) -> StockPipeline:
    """Put a trained transformer, the autoencoder and the text encoder into a WanPipeline with the scheduler of `init`.

    Without a scheduler there it gets an Euler scheduler whose times are shifted as in training.
    """
    index = Path(config.init or "") / "model_index.json"
    stated = read_mapping(index) if index.is_file() else {}
    shape = config.data.default_bucket
    pipe = WanPipeline(
        **text,
        transformer=transformer,
        vae=vae,
        scheduler=_scheduler(Path(config.init or "") / "scheduler", config.shift),
        expand_timesteps=bool(stated.get("expand_timesteps")),
    )
    return StockPipeline(
        pipe,
        StockDefaults(
            height=shape.height,
            width=shape.width,
            num_frames=shape.frames,
            fps=fps,
            temporal_ratios=config.ratios,
            max_sequence_length=config.text.encoders[0].tokens,
        ),
    )


def _scheduler(folder: Path, shift: float) -> Any:
    """Load the scheduler in a folder, or make one; raises UserError for one that integrates no flow."""
    file = folder / "scheduler_config.json"
    if not file.is_file():
        return FlowMatchEulerDiscreteScheduler(shift=shift)
    name = read_mapping(file).get("_class_name")
    if name not in (*FLOW, *FLOW_WITH_SETTINGS):
        raise UserError(f"{file}: {name!r:.100}: legal are {', '.join((*FLOW, *FLOW_WITH_SETTINGS))}")
    scheduler = getattr(diffusers, name).from_pretrained(folder)
    try:
        check_flow(scheduler)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None
    return scheduler
