"""The configuration of a text-to-video training."""

import itertools
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BeforeValidator

from promag.data.buckets import Bucket, read_size, sides
from promag.tokenizer.geometry import check_frames, check_size, latent_frames, stage_name, tokens
from promag.training.config import UserError, check_seed, required, setting
from promag.training.loop import RunConfig
from promag.training.optimizers import OptimizationConfig
from promag.training.precision import Precision, check_training_precision

from .ahead import check_lead
from .caption_weights import CaptionWeight
from .conditioning import Condition
from .few_steps import FewSteps
from .finetune import Lora
from .latent_cache import Scale

SMALL = "small"  # the text encoder that is trained with the transformer
CLIP_TEXT_TOKENS = 77


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """A text encoder."""

    model: str = setting(
        SMALL, "small (a CLIP trained with the transformer), folder or hub name of a frozen T5, UMT5 or CLIP, or open_clip:NAME"
    )
    weights: str | None = setting(None, "tag or file of the weights of an open_clip:NAME model; null for all others")
    max_length: int | None = setting(None, "number of text tokens, longer captions are cut; null for 77, for Wan 512")

    @property
    def tokens(self) -> int:
        """The number of text tokens; 77 until `adopt` has put that of the transformer's family in the place of null."""
        return CLIP_TEXT_TOKENS if self.max_length is None else self.max_length


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The text encoders and the settings of the small CLIP."""

    encoders: tuple[TextEncoderConfig, ...] = setting(
        (TextEncoderConfig(),), "one to three text encoders; the transformer sees the tokens of all"
    )
    vocabulary: int = setting(8192, "size of the vocabulary learned from the captions, for the small CLIP")
    width: int = setting(384, "width of the small CLIP")
    layers: int = setting(4, "layers of the small CLIP")
    heads: int = setting(6, "attention heads of the small CLIP")
    learning_rate: float = setting(
        2e-4, "peak learning rate of the small CLIP; at the transformer's, its caption embeddings may collapse"
    )

    def __post_init__(self) -> None:
        """Raise ValueError for a learning rate that is not positive, and for encoders that a pipeline cannot hold."""
        if self.learning_rate <= 0:
            raise ValueError(f"text learning_rate {self.learning_rate}: must be above 0")
        models = [encoder.model for encoder in self.encoders]
        if not 1 <= len(models) <= 3 or models.count(SMALL) > 1:
            raise ValueError(f"text encoders {models}: one to three are needed, the small one at most once")

    @property
    def frozen(self) -> dict[int, TextEncoderConfig]:
        """The encoders that are not trained, by their number from 1, as in text_encoder, text_encoder_2, ..."""
        return {n: encoder for n, encoder in enumerate(self.encoders, 1) if encoder.model != SMALL}

    @property
    def small(self) -> TextEncoderConfig | None:
        """The encoder that is trained with the transformer, if there is one."""
        return next((encoder for encoder in self.encoders if encoder.model == SMALL), None)


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The transformer's shape; see ProMAGTransformer3DModel."""

    patch_size: tuple[int, int, int] = setting((1, 2, 2), "(t, h, w) latent positions per token")
    num_layers: int = setting(12, "transformer blocks")
    num_attention_heads: int = setting(6, "attention heads")
    attention_head_dim: int = setting(64, "width of an attention head")
    local_convolution: bool = setting(False, "whether each block begins with a depthwise convolution over neighbouring tokens")


@dataclass(frozen=True, kw_only=True)
class DiffusionDataConfig:
    """Training and validation clips, and the caches of their latents."""

    train: str = setting(
        "clips-train.jsonl", "clips.jsonl of `promag prepare-clips`, a pattern of tar shards, or synthetic for generated clips"
    )
    validation: str = setting("clips-eval.jsonl", "the same for the validation loss; never trained on")
    synthetic_clips: int = setting(4096, "number of generated clips cached for training")
    validation_clips: int = setting(64, "number of clips per bucket cached for the validation loss")
    frames: int = setting(65, "frames per clip, 1 + ratio*k; also the pipeline's default")
    size: Annotated[int | tuple[int, int], BeforeValidator(read_size)] = setting(
        64, "pixels, one number for height and width or [height, width]; also the pipeline's default"
    )
    buckets: tuple[Bucket, ...] | None = setting(
        None, "clip shapes, each batch has one; must include `frames` at `size`; null trains on that shape only"
    )
    cache: str = required("folder for latent caches; each ratio and split has its own folder in it")
    dtype: Literal["float32", "bfloat16", "float16"] = setting("bfloat16", "dtype of cached latents and text embeddings")
    shard_size: int = setting(
        64, "clips per cache file; processes divide the files among them, and a kill loses at most the unfinished ones"
    )
    scale: Scale = setting(
        "global", "channel: all latent channels have equal weight; global: channels of higher variance weigh more"
    )
    caption_weights: tuple[CaptionWeight, ...] = setting(
        (), "clips sampled more often in training, chosen by words of their captions; [] for none"
    )

    @property
    def training_buckets(self) -> tuple[Bucket, ...]:
        """The clip shapes of the training."""
        return self.buckets or (self.default_bucket,)

    @property
    def default_bucket(self) -> Bucket:
        """The shape that pipelines generate by default."""
        shape = Bucket(self.frames, *sides(self.size))
        return next((bucket for bucket in self.buckets or () if str(bucket) == str(shape)), shape)

    def __post_init__(self) -> None:
        """Raise ValueError for buckets that lack the default shape or repeat a shape, and for no clips at all."""
        for name in ("synthetic_clips", "validation_clips", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} {getattr(self, name)}: at least 1 clip is needed")
        names = [str(bucket) for bucket in self.training_buckets]
        if str(self.default_bucket) not in names or len(set(names)) < len(names):
            raise ValueError(f"buckets {', '.join(names)}: each once, {self.default_bucket} (frames and size) among them")


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """One temporal ratio that the model learns to generate at."""

    ratio: int = required("temporal ratio of the latents")
    share: float = setting(1.0, "relative share of the batches; shares need not sum to 1")

    def __post_init__(self) -> None:
        """Raise ValueError for a share that is not positive."""
        if self.share <= 0:
            raise ValueError(f"budget {self.ratio}x, share {self.share}: must be above 0")


@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """Videos sampled during training from fixed noise with the averaged weights and logged to the trackers."""

    prompts: tuple[str, ...] = required("prompts, one video each")
    every: int = setting(5000, "steps between samplings, a multiple of validate_every; the last step samples too")
    steps: int | None = setting(None, "denoising steps; null for the pipeline's default: 30, or those of few_steps")
    guidance: float | None = setting(None, "classifier-free guidance; null for the pipeline's default: 4, or 1 with few_steps")

    def __post_init__(self) -> None:
        """Raise ValueError for invalid settings."""
        if not self.prompts or self.every < 1 or (self.steps is not None and self.steps < 1):
            raise ValueError(
                f"samples: {len(self.prompts)} prompts, every {self.every}, steps {self.steps}: at least 1 of each is needed"
            )


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """A text-to-video training."""

    output_dir: str = required("run directory")
    seed: int = setting(0, "seed of the initial weights, data order and noise")
    precision: Precision = setting("auto", "bf16, fp32, or auto, which measures which of them is faster")
    attention: str = setting(
        "auto", "auto, or an attention backend of diffusers (native, flash, xformers, ...); tested before it is used"
    )
    gradient_checkpointing: bool = setting(
        False, "recompute blocks in the backward pass: saves memory, costs a second forward pass"
    )
    compile: bool = setting(False, "compile the repeated blocks: takes minutes at the start, then steps are faster; for GPUs")
    graphs: bool = setting(
        False, "replay the passes over each shape of batch, and the weights' update, as CUDA graphs; for GPUs"
    )
    tokenizer: str = required("folder of a trained video tokenizer")
    init: str | None = setting(
        None, "a trained pipeline to fine-tune, ours with its small text encoder or a WanPipeline; null trains from scratch"
    )
    lora: Lora | None = setting(None, "train only adapters on the transformer of `init`, by AdamW; null trains all weights")
    budgets: tuple[BudgetConfig, ...] = setting(
        (BudgetConfig(ratio=16),), "temporal ratios that the model is trained at; pipelines sample at the first by default"
    )
    caption_dropout: float = setting(
        0.1, "fraction of captions replaced by the null caption, for guidance; none with few_steps"
    )
    shift: float = setting(
        3.0,
        "shift of times towards noise: factor of t / (1 - t) at 256 tokens, grows with the root of the token count; for Wan "
        "the factor at any number of tokens",
    )
    base_ahead: float = setting(
        0.0,
        "lead of the key frames' channels of dual latents in denoising, as a share of the time, below 1; 0 denoises all "
        "channels together",
    )
    few_steps: FewSteps | None = setting(
        None, "distil `init` into a student that samples in few steps without guidance; null trains on clips"
    )
    condition: Condition = setting(Condition(), "first-frame conditioning, for image-to-video and continuation")
    text: TextConfig = setting(TextConfig(), "text encoders")
    model: TransformerConfig | None = setting(None, "transformer; null if `init` provides it")
    data: DiffusionDataConfig = required("clips and latents")
    optimization: OptimizationConfig = setting(OptimizationConfig(muon_learning_rate=0.02), "optimisation")
    samples: SamplesConfig | None = setting(None, "videos sampled during training; null for none")
    run: RunConfig = setting(RunConfig(), "logging, validation, checkpoints")

    def __post_init__(self) -> None:
        """Raise ValueError if frames, size, ratios and patch are incompatible, and for other invalid settings."""
        check_training_precision(self.precision)
        check_seed(self.seed)
        if not self.budgets or len(set(self.ratios)) < len(self.budgets):
            raise ValueError(f"budgets {list(self.ratios)}: one or more ratios are needed, each of them once")
        for bucket, ratio in itertools.product(self.data.training_buckets, self.ratios):
            check_size(bucket.height, bucket.width)
            check_frames(bucket.frames, ratio)
            if self.model:
                tokens(bucket.frames, bucket.height, bucket.width, ratio, self.model.patch_size)
        if (self.model is None) != (self.init is not None):
            raise ValueError(
                f"init {self.init}, model {'null' if self.model is None else 'given'}: exactly one of both is needed"
            )
        if self.graphs and self.run.distributed == "fsdp2":
            raise ValueError("graphs: fsdp2 gathers the weights of each block anew, which a graph cannot; use distributed ddp")
        if self.lora and self.init is None:
            raise ValueError("lora: adapters need a trained transformer; name one with init")
        if self.few_steps and self.init is None:
            raise ValueError("few_steps: the student needs a trained teacher; name one with init")
        if self.condition.probability and self.model and self.model.patch_size[0] > 1:
            raise ValueError(f"condition: needs patches of one latent frame; patch_size is {list(self.model.patch_size)}")
        lengths = {bucket.frames for bucket in self.data.training_buckets if bucket.frames > 1} or {1}
        fewest = latent_frames(min(lengths), max(self.ratios))  # images are excluded: they have no frame to condition on
        if self.condition.max_frames >= fewest:
            raise ValueError(f"condition frames {self.condition.frames}: clips have {fewest} latent frames, one must be left")
        if self.samples and self.samples.every % self.run.validate_every:
            raise ValueError(
                f"samples every {self.samples.every}: a multiple of validate_every, {self.run.validate_every}, is needed"
            )
        if not 0 <= self.caption_dropout < 1:
            raise ValueError(f"caption_dropout {self.caption_dropout}: must be in [0, 1)")
        check_lead(self.base_ahead)
        if self.shift <= 0:
            raise ValueError(f"shift {self.shift}: must be above 0")

    @property
    def own_model(self) -> TransformerConfig:
        """The shape of the configuration's own transformer; raises UserError where `init` provides the transformer."""
        if self.model is None:
            raise UserError("model null: a configuration with a transformer of its own is needed")
        return self.model

    @property
    def ratios(self) -> tuple[int, ...]:
        """The temporal ratios of the budgets."""
        return tuple(budget.ratio for budget in self.budgets)

    @property
    def stage(self) -> str:
        """The name of the training's folder in the run directory: 16x, or 4x-8x-16x."""
        return stage_name(self.ratios)


# Keys that may differ when a run is resumed: they do not affect what the model learns.
MAY_CHANGE = (
    *("output_dir", "run", "samples", "attention", "gradient_checkpointing", "compile", "graphs"),
    *("tokenizer", "data.cache", "data.shard_size"),
)
