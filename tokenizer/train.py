"""Training the tokenizer stage by stage: the base, then each grown level on top of what is frozen below it.

A run directory holds one folder per stage (checkpoints, metrics) and `tokenizer/`, the model with all levels trained so far.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from promag.data.buckets import Bucket
from promag.data.datasets import TrainingStream, open_dataset
from promag.data.sources import Source, open_sources
from promag.data.tar_stream import Sharding
from promag.training.compilation import compile_blocks
from promag.training.config import UserError, setting
from promag.training.loop import (
    Metrics,
    Objective,
    Outcome,
    RunConfig,
    choose_precision_once,
    close_trackers,
    make_accelerator,
    train,
)
from promag.training.optimizers import OptimizationConfig
from promag.training.precision import Precision, check_training_precision
from promag.training.run import open_run, write_atomically
from promag.training.trackers import Log

from .autoencoder import AutoencoderKLProMAG, parameter_count
from .discriminator import Adversarial, AdversarialLoss
from .geometry import check_frames, check_size
from .growth import Growth
from .losses import kl_loss, latent_loss, reconstruction_loss, reparametrise, squared_loss
from .metrics import evaluate, to_uint8
from .perceptual import LPIPS


@dataclass(frozen=True)
class AutoencoderConfig:
    """The base level's shape; see AutoencoderKLProMAG."""

    latent_channels: int = setting("channels of the latent at every level")
    patch_size: int = setting("side of the pixel patches that become channels")
    block_out_channels: tuple[int, ...] = setting("widths from fine to coarse")
    layers_per_block: int = setting("residual blocks at each width")
    strides: tuple[tuple[int, int], ...] = setting("(time, space) of each down-sampling")
    linear_shortcuts: bool = setting("averaging and duplicating shortcuts around resampling; false for plain blocks")


@dataclass(frozen=True)
class TokenizerDataConfig:
    """What is trained on and what is looked at."""

    train: str = setting("clips.jsonl, a pattern of tar shards with braces or wildcards, or synthetic for generated clips")
    extra_sources: tuple[Source, ...] | None = setting("other clips trained on beside these, each by its share; null for none")
    validation: str = setting("as train, for validation; never trained on")
    synthetic_clips: int = setting("how many generated clips there are, where they are trained on")
    size: int = setting("height and width in pixels")
    temporal_strides: tuple[int, ...] = setting("frame steps at which clips are read: 1 is their own rate")
    in_memory: bool = setting(
        "keep each clip of an index, decoded and scaled, in memory after its first read, shared by the loader's processes: "
        "for sets of clips that fit; shapes are generated as ever"
    )
    validation_clips: int = setting("how many clips each validation reconstructs")
    sharding: Sharding = setting("how shards are read, where shards are trained on")


@dataclass(frozen=True)
class PerceptualConfig:
    """LPIPS as a loss."""

    path: str = setting("folder with the weights of vgg16 and of lpips")
    weight: float = setting("of the loss")
    frames: int = setting("frames of each clip that are compared, drawn anew at each step")

    def __post_init__(self) -> None:
        """Raise ValueError for settings that cannot be meant."""
        if self.weight <= 0 or self.frames < 1:
            raise ValueError(f"perceptual weight {self.weight}, frames {self.frames}: a weight above 0 and 1 frame are needed")


@dataclass(frozen=True)
class StageConfig:
    """One level and how it is trained."""

    ratio: int = setting("temporal ratio of the level")
    frames: int = setting("frames per clip: 1 + ratio*k")
    buckets: tuple[Bucket, ...] | None = setting(
        "shapes of training clips, a batch of each by turns; null for `frames` at the data's size alone, as in validation"
    )
    growth: Growth | None = setting(
        "how the level, and any between it and the one below, is grown; null for one that needs no growing"
    )
    trainable: Literal["new", "all"] = setting("the levels that the stage adds, or every weight of the model")
    inherited_lr_scale: float = setting(
        "learning rate of what a stage trains but starts from the levels below, over that of the rest"
    )
    latent_pretrain_steps: int = setting("first steps that regress the lower latent instead of pixels")
    mse_weight: float = setting("weight of the squared error beside L1, whose weight is 1")
    kl_weight: float = setting("weight of the KL term")
    perceptual: PerceptualConfig | None = setting("LPIPS beside the pixel losses; null for none")
    adversarial: Adversarial | None = setting("a discriminator, switched on late; null for none")
    optimization: OptimizationConfig = setting("the optimisation")

    def __post_init__(self) -> None:
        """Raise ValueError for a setting that cannot be meant."""
        if self.inherited_lr_scale <= 0:
            raise ValueError(f"inherited_lr_scale {self.inherited_lr_scale}: must be above 0")


@dataclass(frozen=True)
class TokenizerConfig:
    """A whole tokenizer training."""

    output_dir: str = setting("run directory")
    seed: int = setting("decides weights, data order and noise")
    precision: Precision = setting("auto measures which of bf16 and fp32 is faster", default="auto", kw_only=True)
    gradient_checkpointing: bool = setting("compute blocks again in the backward pass: less memory, a second forward pass")
    compile: bool = setting("compile the repeated blocks: minutes at the start, then faster steps; for GPUs")
    init: str | None = setting("a trained tokenizer to grow, or to train its highest level further; null starts anew")
    only_stage: int | None = setting("train this ratio's stage alone; null runs all")
    model: AutoencoderConfig | None = setting("the base level; null where `init` has it")
    data: TokenizerDataConfig = setting("the clips")
    stages: tuple[StageConfig, ...] = setting("levels, lowest first")
    run: RunConfig = setting("logging, validation, checkpoints")

    def __post_init__(self) -> None:
        """Raise ValueError where stages, frames and sizes do not fit together."""
        check_training_precision(self.precision)
        check_size(self.data.size, self.data.size)
        ratios = [stage.ratio for stage in self.stages]
        if not ratios:
            raise ValueError("stages: at least one is needed")
        for stage, before in zip(self.stages[1:], ratios, strict=False):
            if stage.ratio not in (2 * before, 4 * before, 8 * before):
                raise ValueError(f"stages {ratios}: each ratio must be 2, 4 or 8 times the one before")
        for stage in self.stages:
            check_frames(stage.frames, stage.ratio)
            for bucket in self.buckets_of(stage):
                check_frames(bucket.frames, stage.ratio)
                check_size(bucket.height, bucket.width)
        if self.only_stage is not None and self.only_stage not in ratios:
            raise ValueError(f"only_stage {self.only_stage}: the stages are {', '.join(map(str, ratios))}")

    def buckets_of(self, stage: StageConfig) -> tuple[Bucket, ...]:
        """Return the shapes that a stage trains on."""
        return stage.buckets or (Bucket(stage.frames, self.data.size, self.data.size, batch_size=None),)


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


class StageObjective(Objective):
    """L1, squared error and KL, LPIPS and a discriminator where the stage has them.

    In the first `latent_pretrain_steps` of a grown level the loss is the error of the lower latent instead: those steps run
    no decoder, which makes them several times cheaper.
    """

    def __init__(self, model: AutoencoderKLProMAG, stage: StageConfig, inherited: Sequence[nn.Module] = ()):
        super().__init__()
        self.model, self.stage, self.inherited = model, stage, tuple(inherited)  # a tuple: they are registered in the model
        self.below = model.temporal_ratios[model.level_of(stage.ratio) - 1] if stage.growth else None
        self.lpips = LPIPS.load(stage.perceptual.path) if stage.perceptual else None
        self.adversary = AdversarialLoss(stage.adversarial) if stage.adversarial else None

    def clipped_apart(self) -> list[nn.Module]:
        """Return the discriminator, whose gradients must not shrink the autoencoder's."""
        return [self.adversary] if self.adversary else []

    def rate_factors(self) -> list[tuple[nn.Module, float]]:
        """Give what was trained before, and the discriminator, learning rates of their own."""
        factors = [(module, self.stage.inherited_lr_scale) for module in self.inherited]
        if self.adversary and (settings := self.stage.adversarial):
            factors.append((self.adversary, settings.learning_rate / self.stage.optimization.learning_rate))
        return factors

    def matrices(self) -> list[nn.Parameter]:
        """Return the kernels between hidden features: neither those at pixels and latents nor the discriminator's."""
        return self.model.hidden_kernels()

    def forward(self, batch: dict[str, Any], generators: list[torch.Generator], step: int) -> dict[str, Tensor]:
        """B C T H W in batch["video"] -> loss, its parts."""
        x, stage = batch["video"], self.stage
        if self.below is not None and step < stage.latent_pretrain_steps:
            posterior, target = self.model.encode_levels(x, (stage.ratio, self.below))
            z = reparametrise(posterior, generators)
            fit = latent_loss(self.model.lift(z, stage.ratio, self.below), target.mode())
            kl = kl_loss(posterior)
            return {"loss": fit + stage.kl_weight * kl, "latent": fit, "kl": kl}
        posterior = self.model.encode(x, stage.ratio).latent_dist  # pyright: ignore
        output = self.model.decode(reparametrise(posterior, generators), stage.ratio).sample  # pyright: ignore
        parts = {"l1": reconstruction_loss(output, x), "squared": squared_loss(output, x)}
        loss = parts["l1"] + stage.mse_weight * parts["squared"]
        if self.lpips and stage.perceptual:
            orders = (torch.randperm(x.shape[2], generator=g, device=x.device) for g in generators)
            picked = torch.stack(list(orders))[:, : stage.perceptual.frames]
            few = (video[torch.arange(len(x))[:, None], :, picked].transpose(1, 2) for video in (output, x))
            parts["lpips"] = self.lpips(*few).mean()
            loss = loss + stage.perceptual.weight * parts["lpips"]
        if self.adversary and stage.adversarial and step >= stage.adversarial.start:
            judged = self.adversary(output, x, loss, step)
            loss = loss + judged["generator"] + judged["discriminator"]
            parts |= judged
        parts["kl"] = kl_loss(posterior)
        return {"loss": loss + stage.kl_weight * parts["kl"], **parts}


def train_tokenizer(config: TokenizerConfig, build: Callable[[], Any] | None = None) -> Path | None:
    """Run the stages that are not finished yet and return the folder of the tokenizer, None if stopped early.

    `build` makes the base instead of `config.model`: another autoencoder behind AutoencoderKLProMAG's interface.
    Raises UserError for a missing or unsuitable checkpoint, clips or run directory.
    """
    precision = choose_precision_once(config.precision, config.output_dir)
    config = dataclasses.replace(config, precision=precision)
    accelerator = make_accelerator(
        Path(config.output_dir),
        precision,
        config.run.trackers,
        unused=any(_leaves_unused(stage) for stage in config.stages),
    )
    run = open_run(config.output_dir, config, MAY_CHANGE, write=accelerator.is_main_process)
    for stage in config.stages:
        if config.only_stage not in (None, stage.ratio):
            continue
        outcome = train_stage(accelerator, run, config, stage, build)
        if not outcome.finished:
            return None
    close_trackers(accelerator)
    return run / "tokenizer"


def _leaves_unused(stage: StageConfig) -> bool:
    """Tell whether some step of a stage leaves weights that it trains without a gradient."""
    copies = stage.growth and "finetune" in (stage.growth.encoder, stage.growth.decoder)
    return bool(stage.trainable == "all" or stage.adversarial or copies)


def train_stage(
    accelerator: Accelerator,
    run: Path,
    config: TokenizerConfig,
    stage: StageConfig,
    build: Callable[[], Any] | None = None,
) -> Outcome:
    """Train one level from the levels below it, found in the run directory or in `config.init`."""
    folder, done = run / f"{stage.ratio}x", run / f"{stage.ratio}x" / "done.json"
    if done.exists() and (run / "tokenizer").exists():
        accelerator.print(f"{stage.ratio}x: already trained in {folder}")
        return Outcome(stage.optimization.steps, 0.0, True, {})
    data = config.data
    rank, world = accelerator.process_index, accelerator.num_processes
    source, plan = open_sources(
        data.train,
        data.extra_sources or (),
        config.buckets_of(stage),
        count=data.synthetic_clips,
        batch_size=stage.optimization.batch_size,
        world_size=world,
        temporal_strides=data.temporal_strides,
        sharding=data.sharding,
        in_memory=data.in_memory,
    )
    fixed = open_dataset(data.validation, "eval", frames=stage.frames, size=data.size, count=data.validation_clips)
    clips = [fixed.fixed(i)["video"][None] for i in range(min(data.validation_clips, len(fixed)))]

    torch.manual_seed(config.seed * 1000 + stage.ratio)
    model, added = _model_for(run, config, stage, build)
    for module in model.modules():
        if isinstance(module, nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)  # pyright: ignore[reportCallIssue]
    trained = model.train_only(*(added if stage.trainable == "new" else model.temporal_ratios))
    accelerator.print(
        f"{stage.ratio}x: {sum(p.numel() for p in trained) / 1e6:.2f} M parameters trained of "
        f"{parameter_count([model]) / 1e6:.2f} M\n{plan}"
    )
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if config.compile:
        compile_blocks(model)

    def open_stream(first: int) -> TrainingStream:
        return TrainingStream(source, config.seed, stage.optimization.batch_size, rank, world, first)

    def validate(log: Log, step: int) -> Metrics:
        if log.trackers:
            log.picture(f"{stage.ratio}x/reconstruction", _sheet(model, clips[:4], stage.ratio), step)
        return evaluate(model, clips, stage.ratio, config.precision)

    objective = StageObjective(model, stage, model.inherited_modules(added))
    outcome = train(accelerator, folder, objective, open_stream, stage.optimization, config.run, config.seed, validate)
    if outcome.finished and accelerator.is_main_process:
        save_model(model, run / "tokenizer")
        write_atomically(done, f'{{"seconds": {outcome.seconds:.1f}, "steps": {outcome.step}}}\n')
    accelerator.wait_for_everyone()
    return outcome


def _model_for(
    run: Path, config: TokenizerConfig, stage: StageConfig, build: Callable[[], Any] | None
) -> tuple[AutoencoderKLProMAG, Sequence[int]]:
    """Return the model that a stage trains and the ratios that the stage adds to it."""
    if stage.growth is None:
        if config.init:
            return _continued(Path(config.init), stage), (stage.ratio,)
        if build is None and config.model is None:
            raise UserError(f"model null: stage {stage.ratio}x starts from scratch and needs a model")
        model: Any = build() if build else AutoencoderKLProMAG(**asdict(config.model))  # pyright: ignore
        if model.temporal_ratios[0] != stage.ratio:
            raise UserError(f"stage {stage.ratio}x without growth: the base's strides make it {model.temporal_ratios[0]}x")
        if config.model and config.model.linear_shortcuts:
            model.start_from_means()
        return model, model.temporal_ratios
    place = Path(config.init) if config.init and not (run / "tokenizer").exists() else run / "tokenizer"
    model = load_tokenizer(place)
    have, highest = len(model.temporal_ratios), model.temporal_ratios[-1]
    if stage.ratio not in (2 * highest, 4 * highest, 8 * highest):
        known = ", ".join(f"{r}x" for r in model.temporal_ratios)
        can = ", ".join(f"{highest * k}x" for k in (2, 4, 8))
        raise UserError(f"stage {stage.ratio}x: the tokenizer in {place} has {known}; one stage grows it to one of {can}")
    while model.temporal_ratios[-1] < stage.ratio:
        model.grow(stage.growth)
    return model, model.temporal_ratios[have:]


def _continued(place: Path, stage: StageConfig) -> AutoencoderKLProMAG:
    """Load a tokenizer whose highest level is to be trained further: levels above would no longer fit a changed one."""
    model = load_tokenizer(place)
    if stage.ratio != model.temporal_ratios[-1]:
        known = ", ".join(f"{r}x" for r in model.temporal_ratios)
        raise UserError(
            f"stage {stage.ratio}x without growth: of {place} ({known}) the highest level alone can be trained further"
        )
    return model


def load_tokenizer(folder: str | os.PathLike) -> AutoencoderKLProMAG:
    """Load a trained tokenizer for inference; raises UserError if the folder does not hold one."""
    folder = Path(folder)
    if (folder / "vae" / "config.json").exists():
        folder = folder / "vae"  # a whole pipeline
    if not (folder / "config.json").exists():
        raise UserError(f"tokenizer {folder}: no config.json there; give a folder of `promag train-tokenizer`, or a pipeline")
    try:
        model = AutoencoderKLProMAG.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"tokenizer {folder}: cannot be loaded: {' '.join(str(error).split())}") from None
    assert isinstance(model, AutoencoderKLProMAG)
    return model.eval()


def save_model(model: Any, folder: Path) -> None:
    """Replace `folder` by a saved model in one rename."""
    aside, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    for stale in (aside, old):
        shutil.rmtree(stale, ignore_errors=True)
    model.save_pretrained(aside)
    forget_where_it_was(aside)
    if folder.exists():
        folder.rename(old)
    aside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def forget_where_it_was(folder: Path) -> None:
    """Take the path that a saved model, or the parts of a pipeline, were loaded from out of the configurations."""
    for file in folder.rglob("*.json"):
        values = json.loads(file.read_text())
        if values.pop("_name_or_path", None) is not None:
            write_atomically(file, json.dumps(values, indent=2) + "\n")


@torch.no_grad()
def _sheet(model: AutoencoderKLProMAG, clips: list[Tensor], ratio: int) -> Any:
    """Originals above reconstructions, 8 frames across: uint8 H W 3."""
    rows = []
    for clip in clips:
        output = model(clip.to(model.device), ratio).sample.cpu()
        picked = torch.linspace(0, clip.shape[2] - 1, 8).round().long()
        rows += [torch.cat(list(to_uint8(v[:, :, picked])[0]), 1) for v in (clip, output)]
    return torch.cat(rows, 0).numpy()
