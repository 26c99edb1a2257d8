"""The text-to-video pipeline, from a first image or clip too, with the conventions of diffusers' video pipelines.

Shapes: B C T H W pixels, b c t h w latents.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.loaders import SanaLoraLoaderMixin
from diffusers.utils.outputs import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from torch import Tensor

from ..diffusion.condition import frame_times
from ..diffusion.flow import guide, token_shift
from ..diffusion.text import NULL_CAPTION, Embedded, encode, side_by_side, tokenize
from ..diffusion.transformer import ProMAGTransformer3DModel
from ..tokenizer.autoencoder import AutoencoderKLProMAG
from ..tokenizer.geometry import check_ratio, check_size, latent_frames, tokens
from .given_frames import hold, last_frames, read_given

OUTPUT_TYPES = ("np", "pil", "pt", "latent")


@dataclass
class ProMAGPipelineOutput(BaseOutput):
    """Videos: (B, T, H, W, 3) in [0, 1] as an array, lists of PIL images, a tensor (B, T, 3, H, W), or latents."""

    frames: Any


# Of Sana the mixin has the name alone: it is diffusers' loader for pipelines with one transformer and no LoRA elsewhere.
class ProMAGPipeline(DiffusionPipeline, SanaLoraLoaderMixin):
    """Text to video: text encoders, a transformer over latents of one or several temporal ratios, a grown tokenizer.

    Args:
        tokenizer: text tokenizer.
        text_encoder: CLIP, T5, UMT5 or OpenCLIP text model.
        transformer: predicts the velocity of latents.
        vae: decodes latents to pixels.
        scheduler: a flow-matching scheduler.
        tokenizer_2: text tokenizer of a second text encoder, where the transformer was trained with one.
        text_encoder_2: second text encoder.
        tokenizer_3: text tokenizer of a third text encoder.
        text_encoder_3: third text encoder.
        height: default height in pixels, what the model was trained on; likewise the next four.
        width: default width in pixels.
        num_frames: default frames.
        fps: default frame rate that the model is told.
        temporal_ratio: default temporal ratio.
    """

    __module__ = "promag"
    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->transformer->vae"
    _optional_components = ["tokenizer_2", "text_encoder_2", "tokenizer_3", "text_encoder_3"]  # noqa: RUF012
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012 (the name and kind that diffusers looks for)

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        transformer: ProMAGTransformer3DModel,
        vae: AutoencoderKLProMAG,
        scheduler: FlowMatchEulerDiscreteScheduler,
        tokenizer_2: Any = None,
        text_encoder_2: Any = None,
        tokenizer_3: Any = None,
        text_encoder_3: Any = None,
        height: int = 64,
        width: int = 64,
        num_frames: int = 65,
        fps: float = 8.0,
        temporal_ratio: int = 16,
    ):
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, transformer=transformer, vae=vae, scheduler=scheduler
        )
        self.register_modules(
            tokenizer_2=tokenizer_2, text_encoder_2=text_encoder_2, tokenizer_3=tokenizer_3, text_encoder_3=text_encoder_3
        )
        self.register_to_config(height=height, width=width, num_frames=num_frames, fps=fps, temporal_ratio=temporal_ratio)
        self.video_processor = VideoProcessor(vae_scale_factor=vae.spatial_compression_ratio if vae else 8)

    @property
    def guidance_scale(self) -> float:
        """Guidance of the call under way."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Tell whether the call under way also predicts without text."""
        return self._guidance_scale != 1

    @property
    def num_timesteps(self) -> int:
        """Steps of the call under way."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` from a callback to end the denoising early."""
        return self._interrupt

    def encode_prompt(self, prompts: list[str], max_sequence_length: int | Sequence[int] | None = None) -> Embedded:
        """Encode prompts by every text encoder, side by side; see Embedded.

        Raises ValueError for more text tokens than an encoder takes, not as many lengths as encoders, and without encoders.
        """
        pairs = [(getattr(self, f"tokenizer{n}"), getattr(self, f"text_encoder{n}")) for n in ("", "_2", "_3")]
        pairs = [pair for pair in pairs if None not in pair]
        if not pairs:
            raise ValueError("no text encoder is loaded: give prompt_embeds, and negative_prompt_embeds or guidance_scale 1")
        given = max_sequence_length
        lengths = [given] * len(pairs) if given is None or isinstance(given, int) else list(given)
        if len(lengths) != len(pairs):
            raise ValueError(f"max_sequence_length {lengths}: give one number, or one for each of {len(pairs)} text encoders")
        parts = [
            encode(encoder, tokenize(tokenizer, prompts, length))
            for (tokenizer, encoder), length in zip(pairs, lengths, strict=True)
        ]
        text, dtype = side_by_side(parts), self.transformer.dtype
        return text.map(lambda x: x.to(dtype) if x.is_floating_point() else x)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] = NULL_CAPTION,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int = 30,
        guidance_scale: float = 4.0,
        num_videos_per_prompt: int = 1,
        temporal_ratio: int | None = None,
        fps: float | None = None,
        image: Any = None,
        video: Any = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Embedded | None = None,
        negative_prompt_embeds: Embedded | None = None,
        max_sequence_length: int | Sequence[int] | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] | list[str] = ("latents",),
    ) -> ProMAGPipelineOutput | tuple[Any]:
        """Sample videos.

        Args:
            prompt: one text or a list of texts.
            negative_prompt: what guidance moves away from; the empty text is what was trained as "no caption".
            height: pixels, a multiple of 8 times the transformer's patch; None is the trained size.
            width: likewise.
            num_frames: 1 + temporal_ratio*k; None is the trained count.
            num_inference_steps: denoising steps, at least 1.
            guidance_scale: 1 turns guidance off.
            num_videos_per_prompt: videos of each prompt.
            temporal_ratio: token budget to sample at, one that the transformer was trained on.
            fps: frame rate the transformer is told, above 0.
            image: the first frame: a picture of the video's size (PIL, array H W C or tensor C H W in [0, 1]), one for all
                prompts or a list with one for each.
            video: a clip to continue, likewise (a list of pictures, T H W C or T C H W). Its last frames open the new video:
                as many as the transformer was trained to be given, 1 + temporal_ratio*k of them.
            generator: of the first noise; one, or one per video.
            latents: first noise, b c t h w, instead of drawn noise.
            prompt_embeds: what `encode_prompt` returned, instead of `prompt`.
            negative_prompt_embeds: the same for `negative_prompt`.
            max_sequence_length: text tokens, of every text encoder or of each; None is the text tokenizers' own.
            output_type: "np", "pil", "pt" or "latent" (the tokenizer's latents, not normalised).
            return_dict: return an output object instead of a tuple.
            attention_kwargs: may hold `scale`, the weight of LoRA adapters.
            callback_on_step_end: called as (pipe, step, timestep, tensors); may return changed tensors.
            callback_on_step_end_tensor_inputs: names of the tensors that the callback gets: latents.

        Raises ValueError naming the value got and what is legal.
        """
        known: Any = self.config
        height, width = int(height or known["height"]), int(width or known["width"])
        num_frames = int(num_frames or known["num_frames"])
        ratio, fps = temporal_ratio or known["temporal_ratio"], fps or known["fps"]
        self._check_inputs(
            prompt, prompt_embeds, negative_prompt, ratio, num_inference_steps, num_videos_per_prompt, fps, output_type
        )
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(f"callback_on_step_end_tensor_inputs {sorted(unknown)}: legal are {self._callback_tensor_inputs}")
        patch = self.transformer.config["patch_size"]
        check_size(height, width, self.vae.spatial_compression_ratio * max(patch[1:]))
        token_count = tokens(num_frames, height, width, ratio, tuple(patch))
        self._guidance_scale, self._interrupt = guidance_scale, False
        device = self._execution_device

        text = prompt_embeds or self.encode_prompt(
            [prompt] if isinstance(prompt, str) else list(prompt or ()), max_sequence_length
        )
        text = _repeat(text, num_videos_per_prompt)
        batch = len(text.tokens[0])
        if self.do_classifier_free_guidance:
            count = batch // num_videos_per_prompt
            negatives = [negative_prompt] * count if isinstance(negative_prompt, str) else list(negative_prompt)
            null = _repeat(negative_prompt_embeds or self.encode_prompt(negatives, max_sequence_length), num_videos_per_prompt)
            text = _join(text, null)
        text = text.map(lambda x: x.to(device))

        shape = (
            batch,
            self.transformer.config["in_channels"],
            latent_frames(num_frames, ratio),
            height // self.vae.spatial_compression_ratio,
            width // self.vae.spatial_compression_ratio,
        )
        given = self._given_latents(image, video, (height, width), shape, num_videos_per_prompt, ratio, device)
        x = hold(self._first_latents(shape, generator, latents, device), given)
        self._set_timesteps(num_inference_steps, device, token_count)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        progress: Any = self.progress_bar  # its decorator hides its arguments from type checkers
        with progress(total=len(timesteps)) as bar:
            for i, t in enumerate(timesteps):
                if self._interrupt:
                    break
                doubled = torch.cat([x] * 2) if self.do_classifier_free_guidance else x
                times = t.expand(len(doubled))
                if given is not None:
                    frames_given = torch.arange(shape[2], device=device) < given.shape[2]
                    times = frame_times(times, frames_given.expand(len(doubled), -1))
                predicted = self.transformer(
                    doubled.to(self.transformer.dtype),
                    times,
                    text.tokens,
                    encoder_attention_mask=text.masks,
                    pooled_projections=text.pooled,
                    temporal_ratio=ratio,
                    fps=fps,
                    attention_kwargs=attention_kwargs,
                    return_dict=False,
                )[0].float()
                if self.do_classifier_free_guidance:
                    predicted = guide(*predicted.chunk(2), guidance_scale)
                x = hold(self.scheduler.step(predicted, t, x, return_dict=False)[0], given)
                if callback_on_step_end is not None:
                    seen = {"latents": x} if "latents" in callback_on_step_end_tensor_inputs else {}
                    x = hold((callback_on_step_end(self, i, t, seen) or {}).get("latents", x), given)
                bar.update()

        x = self.transformer.denormalise(x, ratio)
        if output_type == "latent":
            frames: Any = x
        else:
            video = self.vae.decode(x.to(self.vae.dtype), ratio, return_dict=False)[0]
            frames = self.video_processor.postprocess_video(video.float(), output_type=output_type)
        self.maybe_free_model_hooks()
        return ProMAGPipelineOutput(frames=frames) if return_dict else (frames,)

    def _check_inputs(self, prompt, prompt_embeds, negative_prompt, ratio, steps, videos, fps, output_type) -> None:
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("prompt and prompt_embeds: exactly one of them is needed")
        if prompt is not None and (not isinstance(prompt, str | list) or (not prompt and isinstance(prompt, list))):
            raise ValueError(f"prompt {prompt!r}: a text or a list of texts is needed")
        if isinstance(negative_prompt, list) and len(negative_prompt) != (len(prompt) if isinstance(prompt, list) else 1):
            raise ValueError(f"negative_prompt: {len(negative_prompt)} texts; give one text, or as many as prompts")
        check_ratio(ratio, self.vae.temporal_ratios)
        trained = sorted(map(int, self.transformer.config["latents_mean"] or {}))
        if ratio not in trained:
            raise ValueError(f"temporal_ratio {ratio}: the transformer was trained at {', '.join(f'{r}x' for r in trained)}")
        for name, value in (("num_inference_steps", steps), ("num_videos_per_prompt", videos)):
            if value < 1:
                raise ValueError(f"{name} {value}: at least 1 is needed")
        if fps <= 0:
            raise ValueError(f"fps {fps}: must be above 0")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type {output_type!r}: use one of {', '.join(OUTPUT_TYPES)}")

    def _first_latents(self, shape: tuple[int, ...], generator: Any, latents: Tensor | None, device: torch.device) -> Tensor:
        if latents is not None:
            if tuple(latents.shape) != shape:
                raise ValueError(f"latents of shape {tuple(latents.shape)}: {shape} is needed")
            return latents.to(device, torch.float32)
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise ValueError(f"generator: {len(generator)} given; use one, or one for each of the {shape[0]} videos")
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)

    def _given_latents(
        self,
        image: Any,
        video: Any,
        size: tuple[int, int],
        shape: tuple[int, ...],
        times: int,
        ratio: int,
        device: torch.device,
    ) -> Tensor | None:
        """Encode the first frames that the videos start with: normalised latents b c n h w, None without any."""
        pixels = read_given(image, video, size, self.video_processor)
        if pixels is None:
            return None
        name, trained = "image" if video is None else "video", self.transformer.config["condition_frames"]
        if not trained:
            raise ValueError(f"{name}: this transformer was trained without given frames (condition.probability 0)")
        if shape[2] < 2:
            raise ValueError(f"num_frames 1 with {name}: no frame is left to make; use {1 + ratio} or more")
        prompts = shape[0] // times
        if len(pixels) not in (1, prompts):
            raise ValueError(f"{name}: {len(pixels)} given; use one, or one for each of the {prompts} prompts")
        pixels = last_frames(pixels, ratio, min(trained, shape[2] - 1)).to(device, self.vae.dtype)
        latents = self.vae.encode(pixels, ratio).latent_dist.mode().float()  # pyright: ignore
        latents = self.transformer.normalise(latents, ratio)
        return latents.expand(prompts, *latents.shape[1:]).repeat_interleave(times, 0)

    def _set_timesteps(self, steps: int, device: torch.device, token_count: int) -> None:
        """Set flow times from 1 down to 1/steps, shifted for the number of tokens where the scheduler can."""
        sigmas = np.linspace(1.0, 1 / steps, steps)
        known: Any = self.scheduler.config
        dynamic = {"mu": token_shift(token_count, known["shift"])} if known.get("use_dynamic_shifting") else {}
        accepts = inspect.signature(self.scheduler.set_timesteps).parameters
        if "sigmas" in accepts:
            self.scheduler.set_timesteps(sigmas=sigmas.tolist(), device=device, **dynamic)
        else:
            self.scheduler.set_timesteps(steps, device=device, **dynamic)


def _repeat(text: Embedded, times: int) -> Embedded:
    return text.map(lambda x: x.repeat_interleave(times, 0))


def _join(text: Embedded, null: Embedded) -> Embedded:
    if len(text.tokens[0]) != len(null.tokens[0]):
        raise ValueError(f"negative prompts: {len(null.tokens[0])} for {len(text.tokens[0])} videos; give as many as prompts")
    return text.merge(null, lambda a, b: torch.cat([a, b]))
