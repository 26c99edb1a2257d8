"""Build a pipeline from clips and frozen models: cache latents and text, train the transformer, assemble the parts."""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from promag.data.buckets import Bucket
from promag.data.datasets import open_by_bucket
from promag.diffusion.cache_store import Shards
from promag.diffusion.config import DiffusionConfig, SamplesConfig, TextConfig, TextEncoderConfig
from promag.diffusion.families import (
    LatentStatistics,
    adopt,
    check_autoencoder,
    family_of,
    family_of_init,
    transformer_folder,
)
from promag.diffusion.latent_cache import LatentFingerprint, write_latents
from promag.diffusion.text import NULL_CAPTION, Embedded, encode_prompts, load_frozen, side_by_side
from promag.diffusion.text_cache import TextFingerprint, encoder_digest, write_embeddings
from promag.diffusion.train import BucketCache, TrainingResult, train_diffusion
from promag.tokenizer.autoencoder import AutoencoderKLProMAG
from promag.tokenizer.checkpoint import find_damage, load_tokenizer, save_model
from promag.tokenizer.geometry import check_frames, check_ratio, tokens
from promag.training.config import UserError
from promag.training.device import best_device
from promag.training.graphs import check_graphs
from promag.training.precision import Precision, autocast
from promag.training.processes import broadcast_from_main, choose_precision_once, main_process_first, processes
from promag.training.safetensors_only import read_mapping

from .inputs import DEFAULTS
from .lora import record_sampling
from .sampling import sample_videos
from .stock import StockPipeline, build_stock
from .text_to_video import ProMAGPipeline


def train_pipeline(config: DiffusionConfig) -> Path | None:
    """Train a text-to-video pipeline, or adapters for one, as configured; return its folder, None if stopped early.

    Existing latents, embeddings, checkpoints and a finished pipeline are reused.
    Raises UserError for unsuitable tokenizers, text encoders, clips, caches and run directories.
    """
    if config.graphs:
        check_graphs(processes().device or best_device())
    config = adopt(config)
    config = dataclasses.replace(config, precision=choose_precision_once(config.precision, config.output_dir))
    folder = Path(config.output_dir) / ("lora" if config.lora else "pipeline")
    vae = load_tokenizer(config.tokenizer)
    cached = cache(config, vae)

    clean = family_of_init(config.init).clean
    text = SampleText(config.text, config.samples.prompts if config.samples else (), clean)

    def sample(so_far: TrainingResult, samples: SamplesConfig) -> list[np.ndarray]:
        pipe = assemble(config, so_far, vae, with_text=False)
        pipe.set_progress_bar_config(disable=True)
        options = (samples.steps, samples.guidance, config.precision)
        encode = functools.partial(text.encode, learned=so_far.small_text)
        cast(Any, vae).to(so_far.transformer.device)
        try:
            return sample_videos(pipe, samples.prompts, *options, name=None, encode=encode)
        finally:  # free the memory for training
            vae.cpu()

    trained = train_diffusion(config, cached["train"], cached["eval"], sample, LatentStatistics.of(vae.config))
    if not (trained.outcome and trained.outcome.finished):
        return None
    with main_process_first() as main:
        if main and find_damage(folder):
            adapters = SavedLora(trained.transformer, _sampling(config)) if config.lora else None
            save_model(adapters or assemble(config, trained, vae), folder)
    return folder


class SavedLora:
    """A transformer's adapters, saved in the format that `load_lora_weights` of its family's pipeline reads."""

    def __init__(self, transformer: Any, sampling: Mapping[str, Any] | None = None):
        self.transformer, self.sampling = transformer, sampling or {}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the adapters' weights, with their ranks, scales, targets and `sampling` as metadata of the file."""
        config: Any = self.transformer.peft_config
        weights: Any = get_peft_model_state_dict(self.transformer)
        kind: Any = WanPipeline if family_of(self.transformer).is_stock else ProMAGPipeline
        kind.save_lora_weights(folder, weights, transformer_lora_adapter_metadata=config["default"].to_dict())
        record_sampling(Path(folder) / LORA_WEIGHT_NAME_SAFE, self.sampling)


def _sampling(config: DiffusionConfig) -> dict[str, Any]:
    """Return how adapters are sampled: at the ratios of their training, and those of a student in its few steps."""
    few = config.few_steps
    return {"temporal_ratios": list(config.ratios)} | ({"num_inference_steps": few.steps, "guidance_scale": 1.0} if few else {})


def assemble(
    config: DiffusionConfig, trained: TrainingResult, vae: AutoencoderKLProMAG, with_text: bool = True
) -> ProMAGPipeline | StockPipeline:
    """Put a trained transformer, the tokenizer and, `with_text`, the text encoders into a pipeline of its family.

    The pipeline's defaults are the shape, fps and first ratio of the training, and the steps of a student without guidance.
    Frozen text encoders are loaded here, because training uses only their cached embeddings.
    """
    text: dict[str, Any] = {"tokenizer": None, "text_encoder": None}
    for number, encoder in enumerate(config.text.encoders if with_text else (), 1):
        pair = trained.small_text if encoder == config.text.small else _load(encoder)
        suffix = "" if number == 1 else f"_{number}"
        text |= dict(zip((f"tokenizer{suffix}", f"text_encoder{suffix}"), pair or (), strict=True))
    if family_of(trained.transformer).is_stock:
        return build_stock(config, trained.transformer, vae, trained.fps, text)
    few, shape = config.few_steps, config.data.default_bucket
    return ProMAGPipeline(
        **text,
        transformer=trained.transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=config.shift, use_dynamic_shifting=True),
        height=shape.height,
        width=shape.width,
        num_frames=shape.frames,
        fps=trained.fps,
        temporal_ratio=config.ratios[0],
        # Stated in any case: the transformer of `init` carries those of its own pipeline.
        num_inference_steps=few.steps if few else DEFAULTS["num_inference_steps"],
        guidance_scale=1.0 if few else DEFAULTS["guidance_scale"],
    )


def cache(config: DiffusionConfig, vae: AutoencoderKLProMAG) -> dict[str, list[BucketCache]]:
    """Cache the missing latents and frozen text embeddings of both splits, train and eval.

    Returns each split's caches, one per bucket.
    """
    config = adopt(config)
    check_autoencoder(config.init, LatentStatistics.of(vae.config))
    _check_dual(config, vae)
    latents = {split: cache_latents(config, split, vae) for split in ("train", "eval")}
    folders = {_name(config, split, bucket): caches[0] for split, parts in latents.items() for bucket, caches in parts}
    texts = cache_text(config, folders)
    return {
        split: [BucketCache(bucket, caches, texts[_name(config, split, bucket)]) for bucket, caches in parts]
        for split, parts in latents.items()
    }


def _check_dual(config: DiffusionConfig, vae: AutoencoderKLProMAG) -> None:
    """Raise UserError if `base_ahead` is set for budgets whose latents have no residual channels."""
    known = [ratio for ratio in config.ratios if ratio in vae.temporal_ratios]
    plain = [f"{ratio}x" for ratio in known if vae.level_channels[vae.level_of(ratio)] == vae.latent_channels]
    if config.base_ahead and plain:
        raise UserError(
            f"base_ahead {config.base_ahead:g}: the {' and '.join(plain)} latents of tokenizer {config.tokenizer} have no "
            "residual channels; grow these levels with latent: dual, or set base_ahead: 0"
        )


def _patch_of(init: str | None) -> tuple[int, int, int]:
    """Return the patch size of the transformer in `init`."""
    settings = read_mapping(transformer_folder(init or "") / "config.json")
    return tuple(settings.get("patch_size", (1, 1, 1)))


def _name(config: DiffusionConfig, split: str, bucket: Bucket, content: str = "") -> str:
    """Return the name of a cache's folder: train-16x, or with buckets train-16x-17x64x64."""
    return "-".join([split, *([content] if content else []), *([str(bucket)] if config.data.buckets else [])])


def cache_latents(config: DiffusionConfig, split: str, vae: AutoencoderKLProMAG) -> list[tuple[Bucket, list[Path]]]:
    """Cache the latents of one split ("train" or "eval"); return the caches' folders for each bucket that has clips.

    Clips are encoded at the budgets' ratios; several cost little more than the highest one. The tokenizer is on the processes'
    device only while it encodes.
    """
    data, ratios = config.data, config.ratios
    try:
        for ratio in ratios:
            check_ratio(ratio, vae.temporal_ratios)
        patch = config.model.patch_size if config.model else _patch_of(config.init)
        for bucket, ratio in itertools.product(data.training_buckets, ratios):
            check_frames(bucket.frames, ratio, vae.latent_step)
            tokens(bucket.frames, bucket.height, bucket.width, ratio, patch, vae.spatial_compression_ratio)
    except ValueError as error:
        raise UserError(f"tokenizer {config.tokenizer}: {error}") from None
    hashes = broadcast_from_main(lambda: {ratio: vae.encoding_fingerprint(ratio) for ratio in ratios})
    source, count = (data.train, data.synthetic_clips) if split == "train" else (data.validation, data.validation_clips)
    parts, device = open_by_bucket(source, split, data.training_buckets, count), processes().device
    counts = [len(clips) if split == "train" else min(count, len(clips)) for _, clips in parts]
    if len(parts) > 1 and processes().is_main_process:
        print(", ".join(f"{bucket}: {n} clips" for (bucket, _), n in zip(parts, counts, strict=True)), flush=True)
    encode = clip_encoder(vae, cast(Any, device), choose_precision_once(config.precision, config.output_dir))
    results = []
    for (bucket, clips), n in zip(parts, counts, strict=True):
        digests = broadcast_from_main(lambda clips=clips, n=n: clips.digests(n))
        caches = {
            Path(data.cache) / _name(config, split, bucket, f"{ratio}x"): LatentFingerprint(
                tokenizer=hashes[ratio],
                clips=digests.clips,
                ratio=ratio,
                frames=bucket.frames,
                height=bucket.height,
                width=bucket.width,
                dtype=data.dtype,
                shard_size=data.shard_size,
                videos=digests.videos,
            )
            for ratio in ratios
        }
        folders = write_latents(caches, n, clips, encode, workers=config.run.workers)
        results.append((bucket, folders))
    vae.cpu()
    return results


def cache_text(config: DiffusionConfig, latents: Mapping[str, Path]) -> dict[str, dict[int, Path]]:
    """Cache the frozen text encoders' embeddings of the captions in `latents`, which maps names to folders.

    There is one folder for each split and bucket. Returns for each name the embedding caches' folders by encoder number. An
    encoder is loaded only if embeddings are missing or its files have changed, and at most one is in memory at a time.
    """
    folders: dict[str, dict[int, Path]] = {name: {} for name in latents}
    memory, family = Path(config.data.cache) / "text-encoders.json", family_of_init(config.init)
    for number, encoder in config.text.frozen.items():
        load = functools.cache(lambda encoder=encoder: _load(encoder))
        facts = broadcast_from_main(lambda e=encoder, load=load: encoder_digest(e.model, e.weights, memory, load))
        digest, settings = facts
        if family.cleaning:
            digest = hashlib.sha256(f"{digest} {family.cleaning}".encode()).hexdigest()
        for name, folder in latents.items():
            split, dash, bucket = name.partition("-")
            source = Shards(folder).index["fingerprint"]
            limits = (encoder.tokens, config.data.dtype, config.data.shard_size)
            wanted = TextFingerprint(digest, source["clips"], *limits, videos=source.get("videos"), settings=settings)
            cache_folder = Path(config.data.cache) / f"{split}-text-{number}{dash}{bucket}"
            folders[name][number] = write_embeddings(cache_folder, wanted, folder, load, family.clean)
    return folders


def _load(encoder: TextEncoderConfig) -> tuple[Any, Any]:
    return load_frozen(encoder.model, encoder.weights, encoder.tokens)


def clip_encoder(
    vae: AutoencoderKLProMAG, device: torch.device, precision: Precision = "auto"
) -> Callable[[Tensor, Sequence[int]], list[Tensor]]:
    """Return a function (B C T H W, ratios) -> mean latents b c t h w per ratio; its first call moves `vae` to `device`."""
    model: Any = vae

    @torch.no_grad()
    def encode(x: Tensor, ratios: Sequence[int]) -> list[Tensor]:
        model.to(device).eval()
        with autocast(device, precision):
            return [posterior.mode().float() for posterior in model.encode_levels(x.to(device, non_blocking=True), ratios)]

    return encode


class SampleText:
    """Encodes a fixed set of prompts: with the trained text model at each call, with frozen ones only once, on rank 0.

    All processes call it together.

    Args:
        text: the text encoders of a training.
        prompts: all prompts that will be encoded, besides the null caption.
        clean: returns a prompt as frozen encoders read it.
    """

    def __init__(self, text: TextConfig, prompts: Sequence[str], clean: Callable[[str], str] = str):
        self.text, self.prompts, self.clean = text, list(dict.fromkeys([*prompts, NULL_CAPTION])), clean
        self._kept: dict[TextEncoderConfig, Embedded] = {}

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], learned: tuple[Any, Any] | None) -> Embedded:
        """Encode some of the prompts with all encoders; `learned` is the tokenizer and model of the trained encoder."""
        parts = []
        for encoder in self.text.encoders:
            if encoder == self.text.small and learned:
                tokenizer, model = learned
                parts.append(encode_prompts(tokenizer, model, prompts))
            else:
                rows = torch.tensor([self.prompts.index(prompt) for prompt in prompts])
                parts.append(self._frozen(encoder).map(lambda x, rows=rows: x[rows]))
        return side_by_side(parts)

    def _frozen(self, encoder: TextEncoderConfig) -> Embedded:
        def encode() -> Embedded:
            tokenizer, model = load_frozen(encoder.model, encoder.weights, encoder.tokens)
            return encode_prompts(tokenizer, model, [*map(self.clean, self.prompts)]).map(torch.Tensor.cpu)

        if encoder not in self._kept:
            self._kept[encoder] = broadcast_from_main(encode)  # a machine may not hold one for each of its processes
        return self._kept[encoder]
