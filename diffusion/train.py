"""Training a text-to-video transformer on cached latents of one temporal ratio, or of several by turns.

A run directory holds a folder (16x, or 4x-8x-16x) with checkpoints and metrics; assembling a pipeline from what was trained is
pipelines/assemble.py's matter.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..tokenizer.geometry import check_frames, check_size, latent_frames, tokens
from ..training.buckets import Bucket, Buckets, bucket_plan
from ..training.config import UserError, setting
from ..training.datasets import Mixture, TrainingStream
from ..training.loop import Metrics, Objective, Outcome, Pace, close_trackers, make_accelerator, train
from ..training.optimizers import LoopSettings
from ..training.run import open_run
from ..training.throughput import Work
from ..training.trackers import Log
from .attention import choose_attention
from .condition import Condition, draw_given, frame_times, mean_over_made
from .embeddings import CaptionEncoder, EmbeddingCache
from .flops import training_flops
from .flow import interpolate, sample_times, token_shift, velocity
from .held_out import HeldOut, held_out_losses
from .latents import LatentDataset, Scale, normalise_alike
from .lora import Lora, add_lora
from .start import load_transformer, take_up
from .text import Embedded, draw_dropped, learn_vocabulary, load_frozen, small_clip
from .transformer import ProMAGTransformer3DModel

SMALL = "small"  # the encoder that is trained along


@dataclass(frozen=True)
class TextEncoder:
    """One source of text vectors."""

    model: str = setting("small: a CLIP trained along; folder or hub name of a T5, UMT5 or CLIP, kept frozen; open_clip:NAME")
    weights: str | None = setting("of an open_clip:NAME model: a tag or a file; null for all others")
    max_length: int = setting("text tokens; longer captions are cut")


@dataclass(frozen=True)
class Text:
    """Where text vectors come from."""

    encoders: tuple[TextEncoder, ...] = setting("one to three; the transformer sees the tokens of all")
    vocabulary: int = setting("size of the vocabulary learned from the captions, for the small CLIP")
    width: int = setting("of the small CLIP")
    layers: int = setting("of the small CLIP")
    heads: int = setting("of the small CLIP")
    learning_rate: float = setting("peak rate of the small CLIP: at the transformer's, captions may become all alike to it")

    def __post_init__(self) -> None:
        """Raise ValueError for a rate that would not train, and for encoders that a pipeline cannot hold."""
        if self.learning_rate <= 0:
            raise ValueError(f"text learning_rate {self.learning_rate}: must be above 0")
        models = [encoder.model for encoder in self.encoders]
        if not 1 <= len(models) <= 3 or models.count(SMALL) > 1:
            raise ValueError(f"text encoders {models}: one to three are needed, the small one at most once")

    @property
    def frozen(self) -> dict[int, TextEncoder]:
        """The encoders that are not trained, by their number from 1, as in text_encoder, text_encoder_2, ..."""
        return {n: encoder for n, encoder in enumerate(self.encoders, 1) if encoder.model != SMALL}

    @property
    def small(self) -> TextEncoder | None:
        """The encoder that is trained along, if there is one."""
        return next((encoder for encoder in self.encoders if encoder.model == SMALL), None)


@dataclass(frozen=True)
class Model:
    """The transformer's shape; see ProMAGTransformer3DModel."""

    patch_size: tuple[int, int, int] = setting("(t, h, w) latent positions per token")
    num_layers: int = setting("transformer blocks")
    num_attention_heads: int = setting("heads")
    attention_head_dim: int = setting("width of a head")
    local_convolution: bool = setting("whether each block begins with a depthwise convolution over neighbouring tokens")


@dataclass(frozen=True)
class Data:
    """Clips, and how their latents are cached."""

    train: str = setting("clips.jsonl from prepare_clips, or shapes for generated clips")
    validation: str = setting("the same, for the held-out loss; never trained on")
    shapes: int = setting("how many generated clips are cached for training")
    validation_clips: int = setting("how many clips are cached for the held-out loss, of each bucket")
    frames: int = setting("frames per clip, 1 + ratio*k; pipelines make as many by default")
    size: int = setting("height and width in pixels; the same")
    buckets: tuple[Bucket, ...] | None = setting(
        "shapes of clips, a batch of each by turns, `frames` at `size` among them; null for that one alone"
    )
    cache: str = setting("folder for latent caches; each ratio and split has its own folder in it")
    dtype: Literal["float32", "bfloat16", "float16"] = setting("of cached latents and text embeddings")
    shard_size: int = setting("clips per file of a cache: processes divide caching by files, a kill costs a part of one")
    scale: Scale = setting("channel: every latent channel weighs alike; global: strong channels weigh more, as they show more")

    @property
    def shapes_trained(self) -> tuple[Bucket, ...]:
        """The shapes of clips that are trained on."""
        return self.buckets or (self.default_shape,)

    @property
    def default_shape(self) -> Bucket:
        """The shape that pipelines make by default."""
        shape = Bucket(self.frames, self.size, self.size, batch_size=None)
        return next((bucket for bucket in self.buckets or () if str(bucket) == str(shape)), shape)

    def __post_init__(self) -> None:
        """Raise ValueError for buckets without the default shape, or with a shape twice."""
        shapes = [str(bucket) for bucket in self.shapes_trained]
        if str(self.default_shape) not in shapes or len(set(shapes)) < len(shapes):
            raise ValueError(f"buckets {', '.join(shapes)}: each shape once, {self.default_shape} (frames and size) among them")


@dataclass(frozen=True)
class Budget:
    """One temporal ratio that the model learns to generate at."""

    ratio: int = setting("temporal ratio of the latents")
    share: float = setting("part of the batches, among the shares of all budgets")

    def __post_init__(self) -> None:
        """Raise ValueError for a share that would never be drawn."""
        if self.share <= 0:
            raise ValueError(f"budget {self.ratio}x, share {self.share}: must be above 0")


@dataclass(frozen=True)
class Samples:
    """Videos made while training, of the same noise each time, under the averaged weights; the trackers show them."""

    prompts: tuple[str, ...] = setting("one video each")
    every: int = setting("steps between two times, a multiple of validate_every; the last step has them too")
    steps: int = setting("denoising steps")
    guidance: float = setting("classifier-free guidance")

    def __post_init__(self) -> None:
        """Raise ValueError for settings that cannot be meant."""
        if not self.prompts or self.every < 1 or self.steps < 1:
            raise ValueError(
                f"samples: {len(self.prompts)} prompts, every {self.every}, steps {self.steps}: at least 1 of each is needed"
            )


@dataclass(frozen=True)
class DiffusionConfig:
    """A whole text-to-video training."""

    output_dir: str = setting("run directory")
    seed: int = setting("decides weights, data order and noise")
    precision: Literal["bf16", "no"] = setting("autocast, or plain float32")
    attention: str = setting("auto, or a backend of diffusers' dispatch: native, flash, xformers, ...; tried before it is used")
    gradient_checkpointing: bool = setting("compute blocks again in the backward pass: less memory, a second forward pass")
    tokenizer: str = setting("folder of a trained video tokenizer")
    init: str | None = setting("a trained pipeline to train further, its small text encoder too; null starts anew")
    lora: Lora | None = setting("train adapters on the transformer of `init` alone; null trains all weights")
    budgets: tuple[Budget, ...] = setting(
        "temporal ratios that one model is trained at; pipelines sample at the first by default"
    )
    caption_dropout: float = setting("part of the captions replaced by the null caption, for guidance")
    shift: float = setting("of times towards noise: the factor of t / (1 - t) at 256 tokens, growing with their root")
    condition: Condition = setting("given first frames, for image-to-video and continuation")
    text: Text = setting("text encoders")
    model: Model | None = setting("transformer; null where `init` has it")
    data: Data = setting("clips and latents")
    loop: LoopSettings = setting("optimisation")
    samples: Samples | None = setting("videos made while training; null for none")
    pace: Pace = setting("logging, validation, checkpoints")

    def __post_init__(self) -> None:
        """Raise ValueError where frames, size, ratio and patch do not fit together."""
        if not self.budgets or len(set(self.ratios)) < len(self.budgets):
            raise ValueError(f"budgets {list(self.ratios)}: one or more ratios are needed, each of them once")
        for bucket, ratio in itertools.product(self.data.shapes_trained, self.ratios):
            check_size(bucket.height, bucket.width)
            check_frames(bucket.frames, ratio)
            if self.model:
                tokens(bucket.frames, bucket.height, bucket.width, ratio, self.model.patch_size)
        if self.data.shard_size < 1:
            raise ValueError(f"shard_size {self.data.shard_size}: at least 1 clip is needed")
        if (self.model is None) != (self.init is not None):
            raise ValueError(
                f"init {self.init}, model {'null' if self.model is None else 'given'}: exactly one of both is needed"
            )
        if self.lora and self.init is None:
            raise ValueError("lora: adapters need a trained transformer; name one with init")
        if self.condition.probability and self.model and self.model.patch_size[0] > 1:
            raise ValueError(f"condition: needs patches of one latent frame; patch_size is {list(self.model.patch_size)}")
        lengths = {bucket.frames for bucket in self.data.shapes_trained if bucket.frames > 1} or {1}
        fewest = latent_frames(min(lengths), max(self.ratios))  # images aside, of which nothing can be given
        if self.condition.given >= fewest:
            raise ValueError(f"condition frames {self.condition.frames}: clips have {fewest} latent frames, one must be left")
        if self.samples and self.samples.every % self.pace.validate_every:
            raise ValueError(
                f"samples every {self.samples.every}: a multiple of validate_every, {self.pace.validate_every}, is needed"
            )
        if not 0 <= self.caption_dropout < 1:
            raise ValueError(f"caption_dropout {self.caption_dropout}: must be in [0, 1)")
        if self.shift <= 0:
            raise ValueError(f"shift {self.shift}: must be above 0")

    @property
    def ratios(self) -> tuple[int, ...]:
        """The temporal ratios of the budgets."""
        return tuple(budget.ratio for budget in self.budgets)

    @property
    def stage(self) -> str:
        """The name of the training's folder in the run directory: 16x, or 4x-8x-16x."""
        return "-".join(f"{ratio}x" for ratio in self.ratios)


# Keys that may differ when a run is continued: they do not change what is learned.
MAY_CHANGE = (
    *("output_dir", "pace", "samples", "attention", "gradient_checkpointing"),
    *("tokenizer", "data.cache", "data.shard_size"),
)


@dataclass(frozen=True)
class Cached:
    """Where the latents of one split and bucket lie, in the budgets' order, and the embeddings of each frozen text encoder."""

    bucket: Bucket
    latents: Sequence[Path]
    texts: Mapping[int, Path]  # by the encoder's number


@dataclass(frozen=True)
class Trained:
    """What a training leaves: the averaged transformer, the small text model trained along, and how it ended."""

    transformer: ProMAGTransformer3DModel  # with the adapters of a training with lora
    small_text: tuple[Any, Any] | None  # tokenizer and model
    fps: float  # median of the training clips
    outcome: Outcome | None = None  # None while it goes on


def hidden_matrices(transformer: ProMAGTransformer3DModel) -> list[torch.nn.Parameter]:
    """Return the weights of the linear layers in a transformer's blocks: what Muon trains."""
    layers = (m for m in transformer.transformer_blocks.modules() if isinstance(m, torch.nn.Linear))
    return [parameter for layer in layers for parameter in layer.parameters() if parameter.ndim == 2]


class FlowObjective(Objective):
    """Squared error of the velocity at logit-normal times, captions dropped and first frames given now and then."""

    def __init__(self, transformer: Any, text: CaptionEncoder, config: DiffusionConfig):
        super().__init__()
        self.transformer, self.text = transformer, text
        self.caption_dropout, self.shift, self.condition = config.caption_dropout, config.shift, config.condition
        self.text_rate_factor = config.text.learning_rate / config.loop.learning_rate

    def rate_factors(self) -> list[tuple[torch.nn.Module, float]]:
        """Slow the text model down: at the transformer's rate what all captions share drowns what tells them apart."""
        return [(self.text, self.text_rate_factor)]

    def matrices(self) -> list[torch.nn.Parameter]:
        """Return the weights of the blocks' linear layers."""
        return hidden_matrices(self.transformer)

    def units(self) -> list[torch.nn.Module]:
        """Return the transformer's blocks, the transformer, and the small text model."""
        text = self.text.model
        return [*self.transformer.transformer_blocks, self.transformer, *([] if text is None else [text])]

    def work(self, batch: dict[str, Any]) -> Work:
        """Return the transformer's tokens and FLOPs; those of the text model are left out."""
        x, config = batch["latents"], self.transformer.config
        count = prod(x.shape[2:]) // prod(config["patch_size"])
        return Work(len(x) * count, training_flops(config, count, self.text.lengths, len(x)))

    def forward(self, batch: dict[str, Any], generators: list[torch.Generator], step: int) -> dict[str, Tensor]:
        """Normalised latents b c t h w of one ratio, captions and frame rates in `batch` -> loss."""
        x = batch["latents"]
        text = self.text(batch, draw_dropped(self.caption_dropout, generators))
        times = sample_times(self.mu(x), generators, x.device)
        noise = randn_tensor(x.shape, generators, x.device)
        given = draw_given(self.condition, x.shape[2], generators)
        return {"loss": self.errors(x, noise, times, text, batch["fps"], int(batch["ratio"][0]), given).mean()}

    def errors(
        self,
        x: Tensor,
        noise: Tensor,
        times: Tensor,
        text: Embedded,
        fps: Tensor,
        ratio: int,
        given: Tensor | None = None,
    ) -> Tensor:
        """Return the mean squared velocity error of each clip, (b,), over the frames that are not given (b t)."""
        times = times if given is None else frame_times(times, given)
        predicted = self.transformer(
            interpolate(x, noise, times),
            times * 1000,
            text.tokens,
            encoder_attention_mask=text.masks,
            pooled_projections=text.pooled,
            temporal_ratio=ratio,
            fps=fps.float(),
            return_dict=False,
        )[0]
        errors = F.mse_loss(predicted.float(), velocity(x, noise), reduction="none")
        return errors.flatten(1).mean(1) if given is None else mean_over_made(errors, given)

    def mu(self, x: Tensor) -> float:
        """Return the time shift for latents of this size."""
        pt, ph, pw = self.transformer.config["patch_size"]
        return token_shift(x.shape[2] // pt * (x.shape[3] // ph) * (x.shape[4] // pw), self.shift)


def _open_latents(config: DiffusionConfig, cached: Sequence[Cached]) -> list[list[LatentDataset]]:
    """Return the latents of each bucket, in the budgets' order; those of a ratio are normalised alike."""
    scale, found = config.data.scale, []
    for part in cached:
        texts = [EmbeddingCache(folder, number) for number, folder in part.texts.items()]
        pairs = zip(part.latents, config.ratios, strict=True)
        found.append([LatentDataset(folder, ratio, scale, texts) for folder, ratio in pairs])
    for parts in zip(*found, strict=True):
        normalise_alike(parts, scale)
    return found


def mixed(
    config: DiffusionConfig, buckets: Sequence[Bucket], latents: Sequence[Sequence[LatentDataset]]
) -> tuple[Mixture, str]:
    """Return what batches are drawn from, each from one budget and bucket, and the plan of the buckets for the log.

    A bucket is drawn as often as its clips fill batches, whatever the budget.
    """
    counts, batches = [len(parts[0]) for parts in latents], Buckets(buckets).batch_sizes(config.loop.batch_size)
    drawn = [count / size for count, size in zip(counts, batches, strict=True)]
    shares = [budget.share * share for share in drawn for budget in config.budgets]
    sizes = [bucket.batch_size for bucket in buckets for _ in config.budgets]
    plan = bucket_plan(buckets, counts, batches, drawn)
    return Mixture([part for parts in latents for part in parts], shares, sizes), plan


def open_text(config: DiffusionConfig, latents: Sequence[LatentDataset]) -> CaptionEncoder:
    """Return what encodes captions: the caches of frozen encoders, and the small CLIP, a new one or that of `init`.

    `latents` are of each bucket; captions are read from the caches of all, and what is not of captions from the first.
    """
    frozen = {cache.number: cache for cache in latents[0].texts}
    caches = [frozen.get(number) for number in range(1, len(config.text.encoders) + 1)]
    if not (small := config.text.small):
        return CaptionEncoder(caches)
    if config.init:
        tokenizer, model = load_frozen(config.init, None, small.max_length, caches.index(None) + 1)
        model.requires_grad_(config.lora is None)
    else:
        tokenizer = learn_vocabulary(
            itertools.chain.from_iterable(part.captions() for part in latents), config.text.vocabulary, small.max_length
        )
        model = small_clip(tokenizer, config.text.width, config.text.layers, config.text.heads)
    return CaptionEncoder(caches, tokenizer, model)


def new_transformer(
    config: DiffusionConfig, latents: Sequence[LatentDataset], text: CaptionEncoder
) -> ProMAGTransformer3DModel:
    """Return an untrained transformer for these latents, whose statistics it keeps, and this text."""
    assert config.model is not None
    return ProMAGTransformer3DModel(
        **asdict(config.model),
        in_channels=latents[0].index["shape"][0],
        text_dim=text.widths,
        pooled_dim=text.pooled_width,
        temporal_ratios=config.ratios,
        condition_frames=config.condition.given,
        latents_mean={str(part.ratio): part.mean.flatten().tolist() for part in latents},
        latents_std={str(part.ratio): part.std.flatten().tolist() for part in latents},
    )


def train_diffusion(
    config: DiffusionConfig,
    cached: Sequence[Cached],
    validation: Sequence[Cached],
    sample: Callable[["Trained", Samples], Sequence[np.ndarray]] | None = None,
) -> Trained:
    """Train, or continue to train, a transformer on the caches of the training split and of the held-out one, by bucket.

    `sample` makes the videos, T H W 3 of uint8, that `config.samples` asks for.

    Raises UserError for a cache of another ratio or other clips, or an unsuitable run directory.
    """
    accelerator = make_accelerator(Path(config.output_dir), config.precision, config.pace.trackers)
    run = open_run(config.output_dir, config, MAY_CHANGE, write=accelerator.is_main_process)
    by_bucket, held_out = (_open_latents(config, split) for split in (cached, validation))
    buckets, latents = [part.bucket for part in cached], [part for parts in by_bucket for part in parts]

    torch.manual_seed(config.seed)
    text = open_text(config, [parts[0] for parts in by_bucket])
    channels = {part.index["shape"][0] for part in latents}
    if len(channels) > 1:
        raise UserError(f"budgets {config.stage}: their latents have {sorted(channels)} channels; one model needs one number")
    if config.init:
        transformer = load_transformer(config.init)
        take_up(transformer, latents, text, config.condition.given, frozen=config.lora is not None)
    else:
        transformer = new_transformer(config, latents, text)
    if config.lora:
        add_lora(transformer, config.lora)
    compute = torch.bfloat16 if config.precision == "bf16" else torch.float32
    accelerator.print(f"attention: {choose_attention(transformer, config.attention, accelerator.device, compute)}")
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    objective = FlowObjective(transformer, text, config)
    count = sum(p.numel() for p in transformer.parameters() if p.requires_grad)
    source, plan = mixed(config, buckets, by_bucket)
    clips = f"latents of {sum(len(parts[0]) for parts in by_bucket)} clips" + (f"\n{plan}" if len(buckets) > 1 else "")
    accelerator.print(f"{config.stage}: {count / 1e6:.2f} M parameters trained, {clips}")
    shown = buckets.index(config.data.default_shape) if config.data.default_shape in buckets else 0
    fps = by_bucket[shown][0].fps
    checks = [
        HeldOut(part, str(cache.bucket), transformer, accelerator.device)
        for cache, parts in zip(validation, held_out, strict=True)
        for part in parts
    ]

    def validate(log: Log, step: int) -> Metrics:
        if config.samples and sample and (step % config.samples.every == 0 or step == config.loop.steps):
            # Every rank samples: a transformer may be spread over them. Those without trackers show nothing.
            videos = sample(Trained(transformer, text.learned, fps), config.samples)
            for i, (prompt, video) in enumerate(zip(config.samples.prompts, videos, strict=True)):
                log.video(f"{config.stage}/{i} {prompt}", video, fps, step)
        with accelerator.autocast():
            return held_out_losses(objective, checks, first_given=config.condition.given > 0)

    rank, world = accelerator.process_index, accelerator.num_processes

    def open_stream(first: int) -> TrainingStream:
        return TrainingStream(source, config.seed, config.loop.batch_size, rank, world, first)

    outcome = train(accelerator, run / config.stage, objective, open_stream, config.loop, config.pace, config.seed, validate)
    close_trackers(accelerator)
    return Trained(objective.transformer.cpu(), objective.text.cpu().learned, fps, outcome)
