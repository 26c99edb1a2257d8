"""The settings of a tokenizer's training: the base, the clips, the stages and the run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator

from promag.data.buckets import Bucket
from promag.data.shards.stream import Sharding
from promag.data.sources import Source
from promag.training.config import check_seed, required, setting
from promag.training.loop import RunConfig
from promag.training.optimizers import OptimizationConfig
from promag.training.precision import Precision, check_training_precision

from .base import SPATIAL_RATIOS, BaseConfig
from .discriminator import Adversarial
from .distillation import Distillation
from .existing import Features
from .geometry import check_frames, check_size, ratio_names, stage_name
from .growth import Growth, named_growth


def _check_strides(strides: Sequence[int]) -> None:
    if not strides or min(strides) < 1:
        raise ValueError(f"temporal_strides {list(strides)}: needs one or more whole numbers from 1 up")


@dataclass(frozen=True, kw_only=True)
class ClipsConfig:
    """Clips for training and for validation."""

    train: str = setting(
        "clips-train.jsonl", "clips.jsonl, a pattern of tar shards with braces or wildcards, or synthetic for generated clips"
    )
    extra_sources: tuple[Source, ...] | None = setting(
        None, "other clips trained on beside these, each by its share; null for none"
    )
    validation: str = setting("clips-eval.jsonl", "as train, for validation; never trained on")
    synthetic_clips: int = setting(4096, "how many generated clips there are, where they are trained on")
    size: int = setting(64, "height and width in pixels")
    temporal_strides: tuple[int, ...] = setting((1, 2), "frame steps at which clips are read: 1 is their own rate")
    in_memory: bool = setting(
        False,
        "keep each clip of an index, decoded and scaled, in memory after its first read, shared by the loader's processes: "
        "for sets of clips that fit; shapes are generated as ever",
    )
    validation_clips: int = setting(16, "how many clips each validation reconstructs")
    sharding: Sharding = setting(Sharding(), "how shards are read, where shards are trained on")

    def __post_init__(self) -> None:
        """Raise ValueError for a count of clips below 1, and for frame steps that cannot be meant."""
        _check_strides(self.temporal_strides)
        for name in ("synthetic_clips", "validation_clips"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: at least 1 is needed")


@dataclass(frozen=True, kw_only=True)
class TokenizerDataConfig(ClipsConfig):
    """Clips, and cached latents of them, for training and for validation."""

    latent_cache: str | None = setting(
        None,
        "folder for latents of an existing autoencoder: levels grown on it take their first steps on these, without pixels; "
        "null encodes the clips of each step",
    )
    latent_clips: int = setting(4096, "how many clips, drawn as the training would draw them, are cached for each stage")


@dataclass(frozen=True)
class PerceptualConfig:
    """LPIPS as a loss."""

    path: str = required("folder with the weights of vgg16 and of lpips")
    weight: float = setting(1.0, "weight of the loss")
    frames: int = setting(4, "frames of each clip that are compared, drawn anew at each step")

    def __post_init__(self) -> None:
        """Raise ValueError for settings that cannot be meant."""
        if self.weight <= 0 or self.frames < 1:
            raise ValueError(f"perceptual weight {self.weight}, frames {self.frames}: a weight above 0 and 1 frame are needed")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One level and how it is trained."""

    ratio: int = required("temporal ratio of the level")
    frames: int = required("frames per clip: 1 + ratio*k")
    buckets: tuple[Bucket, ...] | None = setting(
        None, "shapes of training clips, a batch of each by turns; null for `frames` at the data's size alone, as in validation"
    )
    temporal_strides: tuple[int, ...] | None = setting(None, "frame steps at which its clips are read; null for the data's")
    growth: Annotated[Growth | None, BeforeValidator(named_growth)] = setting(
        None,
        "how the level, and any between it and the one below, is grown; paper as the paper's figure draws it; null for one "
        "that needs no growing",
    )
    by_turns: tuple[int, ...] | None = setting(
        None, "ratios trained by turns, a batch for each entry, where all levels are there; null for the stage's own alone"
    )
    trainable: Literal["new", "all", "decoder"] = setting(
        "new",
        "the levels that the stage adds; every weight of the model; or what decodes alone, which leaves latents as they are",
    )
    inherited_lr_scale: float = setting(
        1.0, "learning rate of what a stage trains but starts from the levels below, over that of the rest"
    )
    latent_pretrain_steps: int = setting(0, "first steps that regress the lower latent instead of pixels")
    latent_batch_size: int | None = setting(
        None, "clips per process and batch in those steps where they are on cached latents; null for the optimisation's"
    )
    mse_weight: float = setting(6.0, "weight of the squared error beside L1, whose weight is 1")
    kl_weight: float = setting(1e-6, "weight of the KL term")
    between_weight: float = setting(1.0, "weight of frames between key frames in the pixel losses, over that of key frames")
    change_weight: float = setting(0.0, "weight of L1 between the changes from frame to frame")
    consistency_weight: float = setting(0.0, "weight of the error of the reconstruction's latent against the clip's")
    perceptual: PerceptualConfig | None = setting(None, "LPIPS beside the pixel losses; null for none")
    adversarial: Adversarial | None = setting(None, "a discriminator, switched on late; null for none")
    optimization: OptimizationConfig = setting(OptimizationConfig(muon_learning_rate=0.004), "the optimisation")

    def __post_init__(self) -> None:
        """Raise ValueError for a setting that cannot be meant."""
        if self.growth and self.growth.hand_over in ("wide", "frames") and self.latent_pretrain_steps:
            raise ValueError(
                f"latent_pretrain_steps {self.latent_pretrain_steps} with growth hand_over {self.growth.hand_over!r}: "
                "there is no estimate of a latent to train; use 0, or hand_over latent or both"
            )
        if self.by_turns is not None:
            given = f"by_turns {list(self.by_turns)} with ratio {self.ratio}"
            if self.growth or self.latent_pretrain_steps or self.trainable == "new":
                raise ValueError(
                    f"{given}, trainable {self.trainable!r}, latent_pretrain_steps {self.latent_pretrain_steps}: needs a stage "
                    "without growth and latent_pretrain_steps, and trainable all or decoder"
                )
            if len({*self.by_turns}) < 2 or min(self.by_turns) < 1 or self.ratio != max(self.by_turns):
                raise ValueError(f"{given}: needs two or more ratios, and the highest of them as the stage's own")
        if self.latent_pretrain_steps and self.growth is None:
            raise ValueError(
                f"latent_pretrain_steps {self.latent_pretrain_steps} without growth: a level that is not grown has no lower "
                "latent to regress; use 0"
            )
        for name in ("mse_weight", "kl_weight", "between_weight", "change_weight", "consistency_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)}: 0 or more is needed, and finite")
        if self.buckets == ():
            raise ValueError("buckets []: give one or more, or null for `frames` at the data's size")
        if self.temporal_strides is not None:
            _check_strides(self.temporal_strides)
        if self.latent_batch_size is not None and self.latent_batch_size < 1:
            raise ValueError(f"latent_batch_size {self.latent_batch_size}: at least 1 is needed")
        if self.inherited_lr_scale <= 0:
            raise ValueError(f"inherited_lr_scale {self.inherited_lr_scale}: must be above 0")
        if self.trainable == "decoder" and self.growth is not None:
            raise ValueError("trainable decoder with growth: a grown level needs its encoder trained too; use new or all")

    @property
    def turns(self) -> tuple[int, ...]:
        """The ratios of the stage's batches, one after the other: its own alone, or those that it trains by turns."""
        return self.by_turns or (self.ratio,)

    @property
    def name(self) -> str:
        """The name of the stage and of its folder in the run directory: 16x, or 4x-8x-16x where it trains these by turns."""
        return stage_name(sorted({*self.turns}))


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """A whole tokenizer training."""

    output_dir: str = required("run directory")
    seed: int = setting(0, "decides weights, data order and noise")
    precision: Precision = setting("auto", "auto measures which of bf16 and fp32 is faster")
    gradient_checkpointing: bool = setting(
        False, "compute blocks again in the backward pass: less memory, a second forward pass"
    )
    compile: bool = setting(False, "compile the repeated blocks: minutes at the start, then faster steps; for GPUs")
    init: str | None = setting(
        None, "a trained tokenizer, or a video autoencoder of diffusers, to grow or to train further; null starts anew"
    )
    base_features: Features = setting(
        "latents", "what levels grown on an autoencoder of diffusers see of it: latents, or encoder for its features too"
    )
    only_stage: int | str | None = setting(
        None, "train one stage alone: its ratio, or its name, such as 4x-8x-16x for one by turns; null runs all"
    )
    distill: Distillation | None = setting(
        None, "an autoencoder whose latents the trained one learns; null for latents of its own"
    )
    model: BaseConfig | None = setting(None, "the base level; null where `init` has it")
    data: TokenizerDataConfig = setting(TokenizerDataConfig(), "the clips")
    stages: tuple[StageConfig, ...] = required("levels, lowest first")
    run: RunConfig = setting(RunConfig(), "logging, validation, checkpoints")

    def __post_init__(self) -> None:
        """Raise ValueError where stages, frames and sizes do not fit together."""
        check_training_precision(self.precision)
        check_seed(self.seed)
        if self.init is not None and self.model is not None:
            raise ValueError(f"init {self.init}, model given: the base is that of `init`; give model null")
        multiple = self.model.spatial_ratio if self.model else SPATIAL_RATIOS[0]
        check_size(self.data.size, self.data.size, multiple)
        if self.data.latent_cache:
            self._check_latent_cache()
        self._check_order()
        for stage in self.stages:
            self._check_stage(stage, multiple)
        if not self.chosen_stages:
            raise ValueError(f"only_stage {self.only_stage}: the stages are {', '.join(stage.name for stage in self.stages)}")

    def _check_latent_cache(self) -> None:
        """Raise ValueError where no stage can use cached latents, or one needs pixels in their place."""
        if self.distill:
            raise ValueError("latent_cache with distill: a student needs pixels; use null")
        if self.base_features != "latents" or self.data.latent_clips < 1:
            raise ValueError(
                f"latent_cache with base_features {self.base_features!r}, latent_clips {self.data.latent_clips}: "
                "needs latents, and 1 clip or more"
            )
        if not any(stage.latent_pretrain_steps for stage in self.stages):
            raise ValueError(
                f"latent_cache {self.data.latent_cache}: no stage has latent_pretrain_steps, which alone train on cached "
                "latents; give some, or latent_cache null"
            )
        copied = None
        for stage in self.stages:
            if stage.growth and stage.growth.encoder == "finetune":
                copied = copied or stage.name
            if stage.latent_pretrain_steps and copied:
                raise ValueError(
                    f"latent_cache with latent_pretrain_steps in stage {stage.name}: the encoders that stage {copied} trains "
                    "(growth encoder 'finetune') need pixels; use null, or growth encoder frozen"
                )

    def _check_stage(self, stage: StageConfig, multiple: int) -> None:
        """Raise ValueError where a stage does not fit the training; sides of its clips are multiples of `multiple`."""
        if stage.trainable == "decoder" and self.init is None and stage == self.stages[0]:
            raise ValueError(f"stage {stage.name}: trainable decoder needs init, the tokenizer whose decoder is trained")
        if stage.latent_pretrain_steps and self.trains_target(stage):
            raise ValueError(
                f"stage {stage.name}: latent_pretrain_steps {stage.latent_pretrain_steps} with trainable all: they would "
                "train the encoder whose latents they regress; use 0, or trainable new"
            )
        if stage.latent_pretrain_steps and self.distill:
            raise ValueError(f"stage {stage.name}: latent_pretrain_steps with distill: give one of the two")
        if stage.consistency_weight and self.distill:
            raise ValueError(f"stage {stage.name}: consistency_weight with distill, whose encoder has a loss of its own; use 0")
        if stage.by_turns and self.distill:
            raise ValueError(f"stage {stage.name}: by_turns with distill: give one of the two")
        for ratio in sorted({*stage.turns}):
            check_frames(stage.frames, ratio)
            for bucket in self.buckets_of(stage):
                check_frames(bucket.frames, ratio)
        for bucket in self.buckets_of(stage):
            check_size(bucket.height, bucket.width, multiple)

    def _check_order(self) -> None:
        """Raise ValueError where stages do not follow from each other: levels grow, then one stage may train them by turns."""
        if not self.stages:
            raise ValueError("stages: at least one is needed")
        *growing, last = self.stages
        ratios = [stage.ratio for stage in self.stages]
        for stage, before in zip(self.stages[1:], ratios, strict=False):
            if stage.by_turns is None and stage.ratio not in (2 * before, 4 * before, 8 * before):
                raise ValueError(f"stages {ratios}: each ratio must be 2, 4 or 8 times the one before")
            if stage.by_turns is None and stage.growth is None:
                raise ValueError(f"stage {stage.name}: only the first stage, and a last one by turns, can be without growth")
        for stage in growing:
            if stage.by_turns:
                raise ValueError(f"stage {stage.name}: by_turns is for the last stage, after those that grow the levels")
        if last.by_turns is None:
            return
        if not growing and self.init is None:
            raise ValueError(f"stage {last.name}: by_turns needs stages before it that grow its levels, or init")
        if growing and last.ratio != ratios[-2]:
            raise ValueError(f"stage {last.name}: by_turns after the {ratios[-2]}x stage needs that ratio, not {last.ratio}")
        from_scratch = self.init is None and self.stages[0].growth is None
        if from_scratch and (absent := sorted({*last.turns} - {*self.grown_ratios()})):
            have, lacks = ratio_names(self.grown_ratios()), ratio_names(absent)
            raise ValueError(f"stage {last.name}: by_turns: the stages grow {have}, not {lacks}")

    def grown_ratios(self) -> list[int]:
        """Return the ratios of the levels that the stages make, lowest first, those between two stages among them."""
        ratios = [self.stages[0].ratio]
        while ratios[-1] < self.stages[-1].ratio:
            ratios.append(2 * ratios[-1])
        return ratios

    @property
    def chosen_stages(self) -> tuple[StageConfig, ...]:
        """The stages to run: all, or the one that `only_stage` names; a ratio means the stage that grows it, where one does."""
        if self.only_stage is None:
            return self.stages
        chosen = str(self.only_stage)  # on a command line a ratio is text
        named = [stage for stage in self.stages if chosen == stage.name]
        return tuple(named or [stage for stage in self.stages if chosen == str(stage.ratio)][:1])

    def trains_target(self, stage: StageConfig) -> bool:
        """Tell whether a growing stage trains the encoder whose latents its `latent_pretrain_steps` would regress.

        A copy of the encoders (growth encoder finetune) leaves those below untrained, and cached latents of the base stay as
        they are.
        """
        cached = self.data.latent_cache is not None and stage == self.stages[0]
        return stage.trainable == "all" and stage.growth is not None and stage.growth.encoder == "frozen" and not cached

    def folder_of(self, stage: StageConfig) -> Path:
        """Return the folder of a stage's checkpoints and metrics."""
        return Path(self.output_dir) / stage.name

    def buckets_of(self, stage: StageConfig) -> tuple[Bucket, ...]:
        """Return the shapes that a stage trains on."""
        return stage.buckets or (Bucket(stage.frames, self.data.size, self.data.size),)


# Keys that may differ when a run is continued: they do not change what is learned. A run that ended at a bad sample may go
# on without it.
MAY_CHANGE = (
    "output_dir",
    "only_stage",
    "run",
    "gradient_checkpointing",
    "compile",
    "data.in_memory",
    "data.validation_clips",
    "data.sharding.bad",
)
