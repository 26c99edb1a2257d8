"""Training a text-to-video transformer on cached latents of one temporal ratio, or of several by turns.

A run directory holds a folder (16x, or 4x-8x-16x) with checkpoints and metrics, and vocabulary.json, the text tokenizer of a
small text model that is trained along. Assembling a pipeline from what was trained is pipelines/build.py's matter.
"""

import copy
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CLIPTextModel

from promag.data.buckets import Bucket, Buckets, bucket_plan
from promag.data.stream import Mixture, TrainingStream
from promag.training.compilation import compile_blocks
from promag.training.config import UserError
from promag.training.files import write_atomically
from promag.training.graphs import check_graphs, disable_graphs, enable_graphs, recompute_block
from promag.training.loop import Metrics, Outcome, close_trackers, make_accelerator, train
from promag.training.precision import DTYPES
from promag.training.processes import broadcast_from_main, choose_precision_once, processes
from promag.training.run import open_run, record_data
from promag.training.state import hash_weights
from promag.training.trackers import Log

from .attention import choose_attention
from .cache_store import Shards
from .config import MAY_CHANGE, DiffusionConfig, SamplesConfig
from .families import LatentStatistics, adopt, family_of, load_transformer
from .few_steps import FewStepsObjective, forget_other_ratios
from .finetune import adapt_to_latents, add_lora, narrow_frozen
from .latent_cache import LatentDataset, normalise_alike, weight_by_caption
from .objective import FlowObjective
from .text import PAD, CutTexts, learn_vocabulary, load_frozen, read_vocabulary, small_clip, tokenizer_rules
from .text_cache import CaptionEncoder, EmbeddingCache
from .transformer import ProMAGTransformer3DModel
from .validation import ValidationSet, validation_losses

VOCABULARY = "vocabulary.json"  # in the run directory


@dataclass(frozen=True)
class BucketCache:
    """Folders of the caches of one split and bucket: latents in the budgets' order, embeddings of each frozen text encoder."""

    bucket: Bucket
    latents: Sequence[Path]
    texts: Mapping[int, Path]  # by the encoder's number


@dataclass(frozen=True)
class TrainingResult:
    """Result of a training: the averaged transformer, the small text model trained with it, and how it ended."""

    transformer: Any  # with the adapters of a training with lora
    small_text: tuple[Any, Any] | None  # tokenizer and model
    fps: float  # median of the training clips
    outcome: Outcome | None = None  # None while it goes on


def _open_latents(config: DiffusionConfig, cached: Sequence[BucketCache]) -> list[list[LatentDataset]]:
    """Return the latents of each bucket, in the budgets' order; all buckets of a ratio share mean and deviation."""
    scale, datasets = config.data.scale, []
    for part in cached:
        texts = [EmbeddingCache(folder, number) for number, folder in part.texts.items()]
        pairs = zip(part.latents, config.ratios, strict=True)
        datasets.append([LatentDataset(folder, ratio, scale, texts) for folder, ratio in pairs])
    for parts in zip(*datasets, strict=True):
        normalise_alike(parts, scale)
    return datasets


def mixed(
    config: DiffusionConfig, buckets: Sequence[Bucket], latents: Sequence[Sequence[LatentDataset]]
) -> tuple[Mixture, str]:
    """Return the mixture that steps draw from, each step from one budget and bucket, and the plan of the buckets for the log.

    A bucket's share of the steps is that of the batches which an epoch of it fills. The clips of a bucket come once an epoch,
    or as often as their weights say, whatever the budgets of the steps.
    """
    clips, batches = [parts[0] for parts in latents], Buckets(buckets).batch_sizes(config.optimization.batch_size)
    epochs = [len(part) if part.weights is None else float(part.weights.sum()) for part in clips]
    filled = [draws / size for draws, size in zip(epochs, batches, strict=True)]
    several = len(config.budgets)
    plan = bucket_plan(buckets, [len(part) for part in clips], batches, filled)
    mixture = Mixture(
        [part for parts in latents for part in parts],
        [budget.share * share for share in filled for budget in config.budgets],
        [bucket.batch_size for bucket in buckets for _ in range(several)],
        orders=[number for number in range(len(buckets)) for _ in range(several)],
    )
    return mixture, plan


def fingerprints(config: DiffusionConfig, cached: Mapping[str, Sequence[BucketCache]]) -> dict[str, Any]:
    """Return what the caches of each split were made from, as a run records it: a cache may move, and its shards may change."""
    places = {}
    for split, parts in cached.items():
        for part in parts:
            places |= {f"{split} {part.bucket} {r}x": path for r, path in zip(config.ratios, part.latents, strict=True)}
            places |= {f"{split} {part.bucket} text {number}": path for number, path in part.texts.items()}
    prints = {name: Shards(Path(place)).index["fingerprint"] for name, place in places.items()}
    return {name: {key: value for key, value in kept.items() if key != "shard_size"} for name, kept in prints.items()}


def open_vocabulary(place: Path, config: DiffusionConfig, latents: Sequence[LatentDataset], max_length: int) -> Any:
    """Return the text tokenizer of the small CLIP: what a run keeps in `place`, or learned from all captions and kept there."""

    def read_or_learn() -> str:
        if not place.exists():
            captions = itertools.chain.from_iterable(part.captions() for part in latents)
            learned = learn_vocabulary(captions, config.text.vocabulary, max_length)
            _print_cut(learned, latents)
            write_atomically(place, json.dumps(tokenizer_rules(learned)))
        return place.read_text(encoding="utf-8")

    return read_vocabulary(broadcast_from_main(read_or_learn), max_length)


def _print_cut(tokenizer: Any, latents: Sequence[LatentDataset]) -> None:
    """Print how many captions a tokenizer's length cuts, if any, with an example."""
    cut = CutTexts(tokenizer)
    captions = itertools.chain.from_iterable(part.captions() for part in latents)
    while texts := list(itertools.islice(captions, 1000)):
        cut.add(texts)
    if cut.example is not None:
        print(f"captions: {cut}", flush=True)


def open_text(config: DiffusionConfig, latents: Sequence[LatentDataset]) -> CaptionEncoder:
    """Return the encoder of captions: caches of frozen text encoders, and the small CLIP, a new one or that of `init`.

    `latents` has one dataset for each bucket; captions are read from all of them, all else from the first.
    """
    frozen = {cache.number: cache for cache in latents[0].texts}
    caches = [frozen.get(number) for number in range(1, len(config.text.encoders) + 1)]
    if not (small := config.text.small):
        return CaptionEncoder(caches)
    if config.init:
        tokenizer, model = load_frozen(config.init, None, small.tokens, caches.index(None) + 1)
        if not isinstance(model, CLIPTextModel) or tokenizer.pad_token != PAD:
            raise UserError(
                f"init {config.init}: its text encoder {caches.index(None) + 1}, a {type(model).__name__}, was not trained "
                "with the transformer, as the small one is; name it in text.encoders"
            )
        model.float()  # published pipelines are in bfloat16, in which it would hardly learn
        model.requires_grad_(config.lora is None and config.few_steps is None)
        if processes().is_main_process and not (Path(config.output_dir) / config.stage).exists():  # a new run
            _print_cut(tokenizer, latents)
    else:
        tokenizer = open_vocabulary(Path(config.output_dir) / VOCABULARY, config, latents, small.tokens)
        model = small_clip(tokenizer, config.text.width, config.text.layers, config.text.heads)
    return CaptionEncoder(caches, tokenizer, model)


def new_transformer(
    config: DiffusionConfig, latents: Sequence[LatentDataset], text: CaptionEncoder
) -> ProMAGTransformer3DModel:
    """Return an untrained transformer for these latents, whose statistics it keeps, and this text."""
    return ProMAGTransformer3DModel(
        **asdict(config.own_model),
        in_channels=latents[0].index["shape"][0],
        text_dim=text.widths,
        pooled_dim=text.pooled_width,
        temporal_ratios=config.ratios,
        base_ahead=config.base_ahead,
        condition_frames=config.condition.max_frames,
        latents_mean={str(part.ratio): part.mean.flatten().tolist() for part in latents},
        latents_std={str(part.ratio): part.std.flatten().tolist() for part in latents},
    )


def starting_transformer(
    config: DiffusionConfig, latents: Sequence[LatentDataset], text: CaptionEncoder, statistics: LatentStatistics | None
) -> Any:
    """Return the transformer that a training starts from: that of `init`, made fit for these latents, or a new one.

    Raises UserError for latents of several numbers of channels.
    """
    channels = {part.index["shape"][0] for part in latents}
    if len(channels) > 1:
        raise UserError(f"budgets {config.stage}: their latents have {sorted(channels)} channels; one model needs one number")
    if config.init is None:
        return new_transformer(config, latents, text)
    transformer = load_transformer(config.init)
    frozen = config.lora is not None or config.few_steps is not None
    adapt_to_latents(transformer, latents, text, config.condition.max_frames, frozen, statistics, config.base_ahead)
    if config.few_steps:
        forget_other_ratios(transformer, config.ratios)
    return transformer


def _models(
    config: DiffusionConfig, transformer: Any, text: CaptionEncoder, statistics: LatentStatistics | None
) -> dict[str, str]:
    """Return hashes of what a run reads at each start beside its caches: the vocabulary, and the transformer of `init`."""
    parts: dict[str, Any] = {} if text.learned is None else {"vocabulary": tokenizer_rules(text.tokenizer)}
    if config.init:
        own, stock = transformer.config, family_of(transformer).is_stock
        scales = [statistics.mean, statistics.std] if stock and statistics else [own["latents_mean"], own["latents_std"]]
        parts["init"] = [hash_weights([transformer]), *scales]
    return {name: hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest() for name, part in parts.items()}


def make_objective(transformer: Any, text: CaptionEncoder, config: DiffusionConfig, device: torch.device) -> FlowObjective:
    """Return what the training minimises; the teacher of few_steps is a frozen copy, or the transformer without adapters."""
    if config.graphs:
        check_graphs(device)
    teacher = None
    if config.few_steps and not config.lora:
        teacher = copy.deepcopy(transformer).requires_grad_(False).eval()
        if config.run.distributed == "ddp":  # no part of the objective; fsdp2 moves shards of it
            teacher.to(device)
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing(recompute_block)
    for model in (transformer, teacher):
        if config.compile and model is not None:
            compile_blocks(model)
        if config.graphs and model is not None:
            enable_graphs(model)
    if config.few_steps:
        return FewStepsObjective(transformer, text, config, teacher)
    return FlowObjective(transformer, text, config)


def _adapters_without_muon(config: DiffusionConfig) -> DiffusionConfig:
    """Return the configuration of a training of adapters with AdamW alone.

    Muon is made for matrices that are trained from scratch: its steps have the same size, however small adapters begin.
    """
    if config.lora is None:
        return config
    return replace(config, optimization=replace(config.optimization, muon_learning_rate=None))


def train_diffusion(
    config: DiffusionConfig,
    cached: Sequence[BucketCache],
    validation: Sequence[BucketCache],
    sample: Callable[["TrainingResult", SamplesConfig], Sequence[np.ndarray]] | None = None,
    statistics: LatentStatistics | None = None,
) -> TrainingResult:
    """Train, or continue to train, a transformer on the caches of the training and the validation split, by bucket.

    `sample` returns the videos, T H W 3 of uint8, that `config.samples` asks for. `statistics` are those that the autoencoder's
    configuration states, which transformers of diffusers need.

    Raises UserError for a cache of another ratio or other clips, an unsuitable run directory, and one that was started with
    other caches, another vocabulary or another `init`.
    """
    precision = choose_precision_once(config.precision, config.output_dir)
    given = replace(adopt(config), precision=precision)
    config = _adapters_without_muon(given)
    accelerator = make_accelerator(Path(config.output_dir), precision, config.run.trackers)
    if config != given:
        accelerator.print(
            f"lora: AdamW trains the adapters, at learning_rate {config.optimization.learning_rate:g}; muon_learning_rate "
            f"{given.optimization.muon_learning_rate:g} is not used"
        )
    run = open_run(config.output_dir, config, MAY_CHANGE, accelerator.is_main_process, (VOCABULARY,))
    splits = {"train": cached, "eval": validation}
    broadcast_from_main(lambda: record_data(run, fingerprints(config, splits)))
    by_bucket, validation_sets = (_open_latents(config, split) for split in (cached, validation))
    weight_by_caption(by_bucket, config.data.caption_weights)
    buckets, latents = [part.bucket for part in cached], [part for parts in by_bucket for part in parts]

    torch.manual_seed(config.seed)
    text = open_text(config, [parts[0] for parts in by_bucket])
    transformer = starting_transformer(config, latents, text, statistics)
    broadcast_from_main(lambda: record_data(run, _models(config, transformer, text, statistics)))
    if config.lora:
        add_lora(transformer, config.lora)
        # FSDP2 gathers weights of one type together; our own pipelines take the type of their transformer for their latents.
        if family_of(transformer).is_stock and precision == "bf16" and config.run.distributed == "ddp":
            narrow_frozen(transformer)
    attention = choose_attention(transformer, config.attention, accelerator.device, DTYPES[precision])
    accelerator.print(f"attention: {attention}")
    objective = make_objective(transformer, text, config, accelerator.device)
    count = sum(p.numel() for p in transformer.parameters() if p.requires_grad)
    source, plan = mixed(config, buckets, by_bucket)
    clips = f"latents of {sum(len(parts[0]) for parts in by_bucket)} clips" + (f"\n{plan}" if len(buckets) > 1 else "")
    accelerator.print(f"{config.stage}: {count / 1e6:.2f} M parameters trained, {clips}")
    shown = buckets.index(config.data.default_bucket) if config.data.default_bucket in buckets else 0
    fps = by_bucket[shown][0].fps
    checks = [
        ValidationSet(part, str(cache.bucket), trained, cache.bucket.batch_size or config.optimization.batch_size)
        for cache, parts in zip(validation, validation_sets, strict=True)
        for part, trained in zip(parts, by_bucket[0], strict=True)
    ]

    def validate(log: Log, step: int) -> Metrics:
        if config.samples and sample and (step % config.samples.every == 0 or step == config.optimization.steps):
            # Every rank samples: a transformer may be spread over them. Those without trackers show nothing.
            videos = sample(TrainingResult(transformer, text.learned, fps), config.samples)
            for i, (prompt, video) in enumerate(zip(config.samples.prompts, videos, strict=True)):
                log.video(f"{i} {prompt}", video, fps, step)
        with accelerator.autocast():
            return validation_losses(objective, checks, first_given=config.condition.max_frames > 0)

    rank, world = accelerator.process_index, accelerator.num_processes

    def open_stream(first: int) -> TrainingStream:
        options = config.optimization
        return TrainingStream(source, config.seed, options.batch_size, rank, world, first, options.accumulate)

    folder, settings = run / config.stage, config.optimization
    outcome = train(accelerator, folder, objective, open_stream, settings, config.run, config.seed, validate, config.graphs)
    close_trackers(accelerator)
    disable_graphs(objective.transformer)
    return TrainingResult(objective.transformer.cpu(), objective.text.cpu().learned, fps, outcome)
