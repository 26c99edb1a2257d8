"""The text-to-video pipeline, from a first image or clip too, with the conventions of diffusers' video pipelines.

Shapes: B C T H W pixels, b c t h w latents.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils.outputs import BaseOutput
from diffusers.video_processor import VideoProcessor
from torch import Tensor, nn

from promag.diffusion.ahead import interpolate, paced
from promag.diffusion.flow import StopSampling, guide, sample_flow
from promag.diffusion.text import NULL_CAPTION, Embedded, encode_prompts, side_by_side
from promag.diffusion.transformer import ProMAGTransformer3DModel
from promag.tokenizer.autoencoder import AutoencoderKLProMAG
from promag.tokenizer.geometry import check_frames, check_size, latent_frames, tokens
from promag.tokenizer.tiny_decoder import TinyDecoder
from promag.training.safetensors_only import SafetensorsOnly, check_complete

from .conditioning_frames import check_conditioning, count_opening, read_conditioning_frames
from .decoding import Decoding
from .graphs import Graphed
from .inputs import (
    DEFAULTS,
    NAMES,
    NEGATIVE_NAMES,
    Prompts,
    Tensors,
    VideoShape,
    changed_tensors,
    check_amount,
    check_budget,
    check_callback,
    check_generators,
    check_kinds,
    check_latents,
    check_numbers,
    check_options,
    check_parts,
    check_prompts,
    check_result,
    first_noise,
    pack,
    repeat_for_videos,
    steps_and_guidance,
    unpack,
)
from .lora import LoraLoader
from .model_card import Carded
from .saved_index import check_index
from .timesteps import SchedulerStep, check_flow, set_flow_times


@dataclass
class ProMAGPipelineOutput(BaseOutput):
    """Videos: (B, T, H, W, 3) in [0, 1] as an array, lists of PIL images, a tensor (B, T, 3, H, W), or latents."""

    frames: Any


class ProMAGPipeline(Carded, Decoding, Graphed, SafetensorsOnly, DiffusionPipeline, LoraLoader):
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
        height: default height in pixels, what the model was trained on; likewise those below. None is what the transformer's
            configuration states, as it does after it was in a pipeline: `ProMAGPipeline(**pipe.components)` keeps them.
        width: default width in pixels.
        num_frames: default frames.
        fps: default frame rate of a video, an input of the transformer.
        temporal_ratio: default temporal ratio.
        num_inference_steps: default denoising steps.
        guidance_scale: default guidance.
        tiny_decoder: decodes in place of `vae` once `enable_tiny_decoder` is called.

    Raises UserError for a text encoder whose file lacks tensors, and ValueError for illegal defaults.
    """

    __module__ = "promag"
    _optional_components = ["tokenizer_2", "text_encoder_2", "tokenizer_3", "text_encoder_3", "tiny_decoder"]  # noqa: RUF012
    _callback_tensor_inputs = ["latents", *NAMES, *NEGATIVE_NAMES]  # noqa: RUF012 (the name and kind diffusers looks for)

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
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        temporal_ratio: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        tiny_decoder: TinyDecoder | None = None,
    ):
        super().__init__()
        encoders = (text_encoder, text_encoder_2, text_encoder_3)
        check_kinds(nn.Module, *encoders, transformer, vae, tiny_decoder)
        check_kinds(SchedulerMixin, scheduler)
        for encoder in encoders:
            if folder := getattr(encoder, "name_or_path", None):  # transformers only warns of random weights
                check_complete(encoder, Path(folder))
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, transformer=transformer, vae=vae, scheduler=scheduler
        )
        self.register_modules(tiny_decoder=tiny_decoder)
        self.register_modules(
            tokenizer_2=tokenizer_2, text_encoder_2=text_encoder_2, tokenizer_3=tokenizer_3, text_encoder_3=text_encoder_3
        )
        trained = DEFAULTS if transformer is None else {**DEFAULTS, **(transformer.config["sample_defaults"] or {})}
        shape = VideoShape.of(trained, height, width, num_frames, temporal_ratio, fps)
        steps, guidance = steps_and_guidance(trained, num_inference_steps, guidance_scale)
        self.register_to_config(**shape._asdict(), num_inference_steps=steps, guidance_scale=guidance)
        self._state_defaults()
        self.video_processor = VideoProcessor(vae_scale_factor=vae.spatial_compression_ratio if vae else 8)

    @classmethod
    def extract_init_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """Read the saved index, first thing in any loading; raises UserError for parts of another kind than the pipeline's."""
        check_index(config_dict)
        parts, *rest = super().extract_init_dict(config_dict, **kwargs)  # pyright: ignore[reportArgumentType]
        # Our own models come first: they refuse a folder that holds a pickle before anything else of it is loaded.
        return {name: parts[name] for name in sorted(parts, key=lambda name: name not in ("transformer", "vae"))}, *rest

    @property
    def components(self) -> dict[str, Any]:
        """The parts; the transformer's configuration carries the defaults of this pipeline to one that is made of them."""
        self._state_defaults()
        return super().components

    def _state_defaults(self) -> None:
        if self.transformer is not None:
            self.transformer.register_to_config(sample_defaults={name: self.config[name] for name in DEFAULTS})

    @property
    def guidance_scale(self) -> float:
        """Guidance of the call under way."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Tell whether the call under way also predicts from the negative prompt."""
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Steps of the call under way."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> Tensor | None:
        """The scheduler's timestep of the step under way, None outside a call; some caches ask for it."""
        return self._current_timestep

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        """The value in the running call."""
        return self._attention_kwargs

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` from a callback to end the denoising early."""
        return self._interrupt

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None = None,
        do_classifier_free_guidance: bool = True,
        num_videos_per_prompt: int = 1,
        prompt_embeds: Tensors | None = None,
        prompt_attention_mask: Tensors | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensors | None = None,
        negative_prompt_attention_mask: Tensors | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        max_sequence_length: int | Sequence[int] | None = None,
        device: torch.device | None = None,
    ) -> tuple[Tensors, Tensors, Tensor | None, Tensors | None, Tensors | None, Tensor | None]:
        """Encode prompts, and negative ones if there is guidance, by every text encoder; the call takes what this returns.

        Arguments are those of the call. Returns tokens b L D, masks b L and pooled vectors b D (None where no encoder has
        them) of the prompts, then of the negative prompts; of several text encoders, a sequence of tokens and of masks.

        Raises ValueError for more text tokens than an encoder takes, not as many lengths as encoders, and without encoders.
        """
        if prompt_embeds is None:
            text = self._encode([prompt] if isinstance(prompt, str) else list(prompt or ()), max_sequence_length)
        else:
            text = pack(prompt_embeds, prompt_attention_mask, pooled_prompt_embeds)
        negative = None
        if negative_prompt_embeds is not None:
            negative = pack(
                negative_prompt_embeds, negative_prompt_attention_mask, negative_pooled_prompt_embeds, NEGATIVE_NAMES
            )
        elif do_classifier_free_guidance:
            given = NULL_CAPTION if negative_prompt is None else negative_prompt
            given = [given] * len(text.tokens[0]) if isinstance(given, str) else given
            negative = self._encode(given, max_sequence_length)
        dtype = None if self.transformer is None else self.transformer.dtype
        place = (num_videos_per_prompt, device or self._execution_device, dtype)
        prompt_embeds, prompt_attention_mask, pooled_prompt_embeds = unpack(repeat_for_videos(text, *place))
        if negative is not None:
            negative = repeat_for_videos(negative, *place)
            negative_prompt_embeds, negative_prompt_attention_mask, negative_pooled_prompt_embeds = unpack(negative)
        return (
            prompt_embeds,
            prompt_attention_mask,
            pooled_prompt_embeds,
            negative_prompt_embeds,
            negative_prompt_attention_mask,
            negative_pooled_prompt_embeds,
        )

    def _encode(self, prompts: list[str], max_sequence_length: int | Sequence[int] | None) -> Embedded:
        pairs = [(getattr(self, f"tokenizer{n}"), getattr(self, f"text_encoder{n}")) for n in ("", "_2", "_3")]
        pairs = [pair for pair in pairs if None not in pair]
        if not pairs:
            raise ValueError("no text encoder is loaded: give prompt_embeds, and negative_prompt_embeds or guidance_scale 1")
        given: Any = max_sequence_length
        lengths: list[int | None] = list(given) if isinstance(given, list | tuple) else [given] * len(pairs)
        if len(lengths) != len(pairs):
            raise ValueError(f"max_sequence_length {lengths}: give one number, or one for each of {len(pairs)} text encoders")
        return side_by_side([encode_prompts(*pair, prompts, length) for pair, length in zip(pairs, lengths, strict=True)])

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_videos_per_prompt: int = 1,
        temporal_ratio: int | None = None,
        fps: float | None = None,
        image: Any = None,
        video: Any = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        denoise_strength: float = 1.0,
        prompt_embeds: Tensors | None = None,
        prompt_attention_mask: Tensors | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensors | None = None,
        negative_prompt_attention_mask: Tensors | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        max_sequence_length: int | Sequence[int] | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ProMAGPipelineOutput | tuple[Any]:
        """Sample videos.

        Args:
            prompt: one text or a list of texts.
            negative_prompt: text that guidance moves away from; None is the empty text, which was trained as "no caption".
            height: pixels, a multiple of 8 times the transformer's patch; None is the trained size.
            width: likewise.
            num_frames: 1 + temporal_ratio*k; None is the trained count.
            num_inference_steps: denoising steps, at least 1; None is the pipeline's default, 30 unless it was distilled.
            guidance_scale: 1 and less turn guidance off; None is the pipeline's default, 4 unless it was distilled.
            num_videos_per_prompt: videos of each prompt.
            temporal_ratio: token budget to sample at, one that the transformer was trained on.
            fps: frame rate of the video, an input of the transformer; above 0.
            image: the first frame: a picture of the video's size (PIL, array H W C or tensor C H W in [0, 1]), one for all
                prompts or a list with one for each.
            video: a clip to continue, likewise (a list of pictures, T H W C or T C H W). Its last frames open the new video:
                as many as the transformer was trained to be given, 1 + temporal_ratio*k of them.
            generator: source of the noise: one per video, or one that draws the noise of all videos in turn.
            latents: noise to start from, b c t h w, instead of drawn noise. Below strength 1 they are the latents to refine, at
                this ratio, as output_type "latent" returns them.
            denoise_strength: share of the steps that are made, the last ones. Below 1 they start from `latents`, noised to the
                time of the first of them (SDEdit, arXiv 2108.01073); 0 returns them unchanged.
            prompt_embeds: instead of `prompt`; this and the next five are what `encode_prompt` returns, a row for each prompt.
            prompt_attention_mask: needed with `prompt_embeds`.
            pooled_prompt_embeds: needed with `prompt_embeds` where a text encoder has pooled vectors.
            negative_prompt_embeds: instead of `negative_prompt`.
            negative_prompt_attention_mask: needed with `negative_prompt_embeds`.
            negative_pooled_prompt_embeds: likewise.
            max_sequence_length: text tokens, of every text encoder or of each; None is the text tokenizers' own.
            output_type: "np", "pil", "pt" or "latent" (the tokenizer's latents, not normalised).
            return_dict: return an output object instead of a tuple.
            attention_kwargs: may hold `scale`, the weight of LoRA adapters.
            callback_on_step_end: called as (pipe, step, timestep, tensors); may return changed tensors.
            callback_on_step_end_tensor_inputs: names of the tensors that the callback gets: latents, and the six arguments
                of this call that hold encoded prompts.

        Raises ValueError naming the value got and what is legal.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        config: Any = self.config
        video_shape = VideoShape.of(config, height, width, num_frames, temporal_ratio, fps)
        ratio, size = video_shape.temporal_ratio, (video_shape.height, video_shape.width)
        check_prompts(prompt, prompt_embeds, negative_prompt, negative_prompt_embeds)
        num_inference_steps, guidance_scale = steps_and_guidance(config, num_inference_steps, guidance_scale)
        check_numbers(num_videos_per_prompt, max_sequence_length)
        check_parts(transformer=self.transformer, vae=self.vae, scheduler=self.scheduler)
        check_budget(ratio, self.vae, self.transformer)
        check_options(output_type, attention_kwargs)
        check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        check_flow(self.scheduler, base_ahead := self.transformer.config["base_ahead"])
        spatial, patch = self.vae.spatial_compression_ratio, self.transformer.config["patch_size"]
        check_size(*size, spatial * patch[1], spatial * patch[2])
        check_frames(video_shape.num_frames, ratio, self.vae.latent_step)
        token_count = tokens(video_shape.num_frames, *size, ratio, tuple(patch), spatial)
        check_amount(token_count, num_inference_steps, num_videos_per_prompt)
        self._guidance_scale, self._attention_kwargs = guidance_scale, attention_kwargs
        self._current_timestep, self._interrupt = None, False
        device = self._execution_device

        embedded: Any = self.encode_prompt(
            prompt,
            negative_prompt,
            self.do_classifier_free_guidance,
            num_videos_per_prompt,
            prompt_embeds,
            prompt_attention_mask,
            pooled_prompt_embeds,
            negative_prompt_embeds,
            negative_prompt_attention_mask,
            negative_pooled_prompt_embeds,
            max_sequence_length,
            device,
        )
        negative = None if embedded[3] is None else pack(*embedded[3:], names=NEGATIVE_NAMES)
        prompts = Prompts(pack(*embedded[:3]), negative)
        prompts.check(self.transformer.text_dims, self.transformer.config["pooled_dim"])
        frames, channels = latent_frames(video_shape.num_frames, ratio), self.transformer.config["in_channels"]
        shape = (len(prompts), channels, frames, *(side // spatial for side in size))
        check_latents(latents, shape, denoise_strength)
        check_generators(generator, len(prompts))
        given = self._conditioning_latents(image, video, size, shape, num_videos_per_prompt, ratio, device)
        times = set_flow_times(self.scheduler, num_inference_steps, token_count, device, denoise_strength)
        steps = self._num_timesteps = len(times) - 1
        timesteps = self.scheduler.timesteps[len(self.scheduler.timesteps) - steps :]
        start = None if latents is None else latents.to(device, torch.float32)
        x = first_noise(shape, generator, device) if start is None or denoise_strength < 1 else start
        if start is not None and denoise_strength < 1:
            start = self.transformer.normalise(start, ratio)
            x = interpolate(start, x, times[:1], base_ahead) if steps else start
        calls = enumerate(times.tolist())  # asked once: in every step the host would wait for the device

        def predict(x: Tensor, time: Tensor) -> Tensor:
            if self._interrupt:
                raise StopSampling
            call, sigma = next(calls)
            self._current_timestep = timesteps[call]
            context = {"step_index": call, "sigma": sigma, "num_inference_steps": steps}
            with self.transformer.cache_context("cond_uncond", **context):
                return self._predict(x, time, prompts, ratio, video_shape.fps)

        progress: Any = self.progress_bar  # its decorator hides its arguments from type checkers
        with progress(total=steps) as bar:

            def after_step(number: int, time: Tensor, x: Tensor) -> Tensor:
                nonlocal prompts
                if callback_on_step_end is not None:
                    tensors = {"latents": x, **prompts.tensors()}
                    seen = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    changed = changed_tensors(callback_on_step_end(self, number, timesteps[number], seen), x)  # pyright: ignore
                    x, prompts = changed.get("latents", x), prompts.changed(changed)
                bar.update()
                return x

            step = paced(SchedulerStep(self.scheduler, timesteps, generator), base_ahead)
            x = sample_flow(predict, x, times, step=step, conditioning=given, callback=after_step)
        self._current_timestep = None

        x = self.transformer.denormalise(x, ratio)
        check_result(x, f"latents sampled with guidance_scale {guidance_scale:g} at {video_shape.fps:g} fps")
        result: Any = x if output_type == "latent" else self._decode(x, ratio, output_type)
        self.maybe_free_model_hooks()
        return ProMAGPipelineOutput(frames=result) if return_dict else (result,)

    def _predict(self, x: Tensor, times: Tensor, prompts: Prompts, ratio: int, fps: float) -> Tensor:
        """Return the velocity of latents b c t h w at times in [0, 1], (b,) or b t, guided if the call is."""
        guided = self.do_classifier_free_guidance
        tokens, masks, pooled = unpack(prompts.guided if guided else prompts.text)
        x, times = (torch.cat([part] * 2) if guided else part for part in (x, times))
        # By name, and one call for both halves of the guidance: caches split them by these names.
        predicted = self.transformer(
            hidden_states=x.to(self.transformer.dtype),
            timestep=1000 * times,
            encoder_hidden_states=tokens,
            encoder_attention_mask=masks,
            pooled_projections=pooled,
            temporal_ratio=ratio,
            fps=fps,
            attention_kwargs=self._attention_kwargs,
            return_dict=False,
        )[0].float()
        if not guided:
            return predicted
        without, with_text = predicted.chunk(2)
        return guide(with_text, without, self._guidance_scale)

    def _conditioning_latents(
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
        pixels = read_conditioning_frames(image, video, size, self.video_processor)
        if pixels is None:
            return None
        name, most = "image" if video is None else "video", self.transformer.config["condition_frames"]
        prompts = shape[0] // times
        check_conditioning(name, len(pixels), prompts, most, shape[2], ratio)
        opening = count_opening(pixels.shape[2], ratio, most, shape[2], self.vae.latent_step)
        pixels = pixels[:, :, -opening:].to(device, self.vae.dtype)
        latents = self.vae.encode(pixels, ratio).latent_dist.mode().float()  # pyright: ignore
        latents = self.transformer.normalise(latents, ratio)
        return latents.expand(prompts, *latents.shape[1:]).repeat_interleave(times, 0)
