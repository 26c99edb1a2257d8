"""Training the tokenizer stage by stage: the base, then each grown level on top of what is frozen below it.

A run directory holds one folder per stage (checkpoints, metrics) and `tokenizer/`, the model with all levels trained so far.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from promag.data.datasets import open_dataset
from promag.data.sources import digest_sources, open_sources
from promag.data.stream import Clips, DrawnClips, FirstThen, Mixture, TrainingStream
from promag.training.compilation import compile_blocks
from promag.training.config import UserError
from promag.training.files import finish_replacing, write_atomically
from promag.training.loop import Metrics, Outcome, close_trackers, make_accelerator, train
from promag.training.processes import broadcast_from_main, choose_precision_once
from promag.training.run import load_checkpoint, newest_checkpoint, open_run, record_data, recorded_data
from promag.training.state import hash_weights
from promag.training.trackers import Log

from .autoencoder import AutoencoderKLProMAG
from .checkpoint import class_name, find_damage, load_tokenizer, save_tokenizer, saved_ratios
from .config import MAY_CHANGE, StageConfig, TokenizerConfig, TokenizerDataConfig
from .distillation import load_teacher, take_entries
from .levels import parameter_count
from .metrics import to_uint8
from .objectives import DistillationObjective, StageObjective

# Opens cached latents of an existing base for a stage: items with "latents r" for each frame rate r.
OpenLatents = Callable[[TokenizerConfig, StageConfig, AutoencoderKLProMAG, DrawnClips], Clips]


def train_tokenizer(
    config: TokenizerConfig, build: Callable[[], Any] | None = None, open_latents: OpenLatents | None = None
) -> Path | None:
    """Run the stages that are not finished yet and return the folder of the tokenizer, None if stopped early.

    `build` makes the base instead of `config.model`: another autoencoder behind AutoencoderKLProMAG's interface. `open_latents`
    caches and opens the latents that `config.data.latent_cache` asks for.
    Raises UserError for a missing or unsuitable checkpoint, clips or run directory.
    """
    precision = choose_precision_once(config.precision, config.output_dir)
    config = dataclasses.replace(config, precision=precision)
    accelerator = make_accelerator(
        Path(config.output_dir),
        precision,
        config.run.trackers,
        unused=any(leaves_unused(stage) for stage in config.stages),
    )
    run = open_run(config.output_dir, config, MAY_CHANGE, write=accelerator.is_main_process)
    if accelerator.is_main_process:
        finish_replacing(run / "tokenizer")
    accelerator.wait_for_everyone()
    for stage in config.stages:
        if config.only_stage not in (None, stage.ratio):
            continue
        outcome = train_stage(accelerator, run, config, stage, build, open_latents)
        if not outcome.finished:
            return None
    close_trackers(accelerator)
    return run / "tokenizer"


def leaves_unused(stage: StageConfig) -> bool:
    """Tell whether some step of a stage leaves weights that it trains without a gradient."""
    growth = stage.growth
    copies = growth and "finetune" in (growth.encoder, growth.decoder)
    # A stage may add several levels, and then nothing reads the heads of the lower ones.
    idle_heads = growth and (growth.mixing == "none" or not growth.birth or growth.sum_at == "features")
    wide = growth and growth.hand_over == "both" and stage.latent_pretrain_steps  # steps on latents hand over no features
    return bool(stage.trainable == "all" or stage.by_turns or stage.adversarial or copies or idle_heads or wide)


def train_stage(
    accelerator: Accelerator,
    run: Path,
    config: TokenizerConfig,
    stage: StageConfig,
    build: Callable[[], Any] | None = None,
    open_latents: OpenLatents | None = None,
) -> Outcome:
    """Train one level on top of the levels below it, which the run directory or `config.init` holds."""
    folder = config.folder_of(stage)
    if _is_trained(run, stage, folder):
        if accelerator.is_main_process:
            _record_end(folder)
        accelerator.print(f"{stage.name}: already trained in {folder}")
        return Outcome(stage.optimization.steps, 0.0, True, {})
    data = config.data
    extra_sources = data.extra_sources or ()
    rank, world = accelerator.process_index, accelerator.num_processes
    source, plan = open_sources(
        data.train,
        extra_sources,
        config.buckets_of(stage),
        count=data.synthetic_clips,
        batch_size=stage.optimization.batch_size,
        batches_per_step=world * stage.optimization.accumulate,
        temporal_strides=stage.temporal_strides or data.temporal_strides,
        sharding=data.sharding,
        in_memory=data.in_memory,
    )
    broadcast_from_main(lambda: _record_videos(run, data))
    fixed = open_dataset(data.validation, "eval", frames=stage.frames, size=data.size, count=data.validation_clips)
    clips = [fixed.fixed(i)["video"][None] for i in range(min(data.validation_clips, len(fixed)))]

    torch.manual_seed(config.seed * 1000 + stage.ratio)
    model, added = _model_for(run, config, stage, build)
    for module in model.modules():
        if isinstance(module, nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)  # pyright: ignore[reportCallIssue]
    trained = _train_only(model, stage, added)
    accelerator.print(
        f"{stage.name}: {sum(p.numel() for p in trained) / 1e6:.2f} M parameters trained of "
        f"{parameter_count([model]) / 1e6:.2f} M\n{plan}"
    )
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if config.compile:
        compile_blocks(model)
    if data.latent_cache and stage.growth and stage.latent_pretrain_steps and open_latents:
        if model.existing is None:
            raise UserError(f"latent_cache {data.latent_cache}: only an existing autoencoder's latents are cached; use null")
        latents = open_latents(config, stage, model, DrawnClips(source, config.seed))
        source = FirstThen(Mixture([latents], [1.0], [stage.latent_batch_size]), stage.latent_pretrain_steps, source)

    objective = _objective(run, config, stage, model, added, accelerator.device)

    def open_stream(first: int) -> TrainingStream:
        options = stage.optimization
        return TrainingStream(source, config.seed, options.batch_size, rank, world, first, options.accumulate)

    anew = stage.growth is None and config.init is None
    if isinstance(objective, DistillationObjective) and anew and model.config["linear_shortcuts"]:
        objective.fit_linear_paths(next(iter(open_stream(0)))["video"])

    def validate(log: Log, step: int) -> Metrics:
        if log.trackers:
            log.picture(f"{folder.name}/reconstruction", _sheet(objective.reconstructor, clips[:4], stage.ratio), step)
        return objective.evaluate(clips, config.precision)

    outcome = train(accelerator, folder, objective, open_stream, stage.optimization, config.run, config.seed, validate)
    if outcome.finished and accelerator.is_main_process:
        save_tokenizer(model, run / "tokenizer")
        if model.existing and len(model.temporal_ratios) > 1:
            model.save_growth(run / "growth")
        _record_end(folder)
    accelerator.wait_for_everyone()
    return outcome


def _is_trained(run: Path, stage: StageConfig, folder: Path) -> bool:
    """Tell whether the run's tokenizer holds a stage's level; raises UserError where its training did not get to the end.

    The tokenizer decides, not the record beside the checkpoints: a run may be killed between writing the two. A damaged one
    does not count where the stage's checkpoints can replace it, and is an error where they are gone.
    """
    place = run / "tokenizer"
    if not place.exists():
        return False
    if damage := find_damage(place):
        if newest_checkpoint(folder) is None:
            raise UserError(f"stage {stage.name}: {damage}, and {folder} has no checkpoints to restore it from")
        return False
    if stage.growth is not None and stage.ratio not in saved_ratios(place):
        return False
    if not (folder / "done.json").exists() and (step := _newest_meta(folder)["step"]) < stage.optimization.steps:
        raise UserError(
            f"stage {stage.name}: {place} has that level, but its training in {folder} stands at step {step} of "
            f"{stage.optimization.steps}; move one of the two away, or use another --output_dir"
        )
    return True


def _newest_meta(folder: Path) -> dict[str, Any]:
    """Return the meta data of a stage's newest checkpoint; of step 0 where there is none."""
    newest = newest_checkpoint(folder)
    return load_checkpoint(newest)[1] if newest else {"step": 0, "seconds": 0.0}


def _record_end(folder: Path) -> None:
    """Write the seconds and steps of a finished stage beside its checkpoints, unless they are there."""
    if not (folder / "done.json").exists():
        meta = _newest_meta(folder)
        write_atomically(folder / "done.json", f'{{"seconds": {meta["seconds"]:.1f}, "steps": {meta["step"]}}}\n')


def _model_for(
    run: Path, config: TokenizerConfig, stage: StageConfig, build: Callable[[], Any] | None
) -> tuple[AutoencoderKLProMAG, Sequence[int]]:
    """Return the model that a stage trains and the ratios that the stage adds to it."""
    model: Any
    if stage.growth is None:
        if config.init:
            model = _continued(Path(config.init), stage)
            _record_start(run, config.folder_of(stage), model)
            return model, (stage.ratio,)
        if build is None and config.model is None:
            raise UserError(f"model null: stage {stage.ratio}x starts from scratch and needs a model")
        model = build() if build else AutoencoderKLProMAG(**asdict(config.model))  # pyright: ignore
        if model.temporal_ratios[0] != stage.ratio:
            raise UserError(f"stage {stage.name} without growth: the base's strides make it {model.temporal_ratios[0]}x")
        if config.model and config.model.linear_shortcuts:
            model.init_from_block_means()
        return model, model.temporal_ratios
    place = Path(config.init) if config.init and find_damage(run / "tokenizer") else run / "tokenizer"
    scratch = build if config.init is None and find_damage(place) else None
    model = scratch() if scratch else load_tokenizer(place, config.base_features)
    if model.existing and config.init:
        model.base_path = model.base_path or _base_path(Path(config.init))
    have, highest = len(model.temporal_ratios), model.temporal_ratios[-1]
    if stage.ratio not in (2 * highest, 4 * highest, 8 * highest):
        levels = ", ".join(f"{r}x" for r in model.temporal_ratios)
        can = ", ".join(f"{highest * k}x" for k in (2, 4, 8))
        raise UserError(f"stage {stage.name}: the tokenizer in {place} has {levels}; one stage grows it to one of {can}")
    _record_start(run, config.folder_of(stage), model)
    while model.temporal_ratios[-1] < stage.ratio:
        model.grow(stage.growth)
    return model, model.temporal_ratios[have:]


def _train_only(model: AutoencoderKLProMAG, stage: StageConfig, added: Sequence[int]) -> list[nn.Parameter]:
    """Freeze what a stage does not train, and return the parameters that it does."""
    if stage.trainable != "decoder":
        return model.train_only(*(added if stage.trainable == "new" else model.temporal_ratios))
    model.requires_grad_(False)
    for module in model.decoding_path(model.level_of(stage.ratio)):
        module.requires_grad_(True)
    return [p for p in model.parameters() if p.requires_grad]


def _objective(
    run: Path,
    config: TokenizerConfig,
    stage: StageConfig,
    model: AutoencoderKLProMAG,
    added: Sequence[int],
    device: torch.device,
) -> StageObjective:
    """Return what a stage minimises; a teacher is loaded, recorded and put on the device."""
    if config.distill is None:
        return StageObjective(model, stage, added)
    teacher = load_teacher(config.distill.teacher, model, stage.ratio)
    take_entries(model, teacher)
    broadcast_from_main(lambda: record_data(run, {f"the teacher of {stage.ratio}x": hash_weights([teacher])}))
    return DistillationObjective(model, stage, teacher.to(device), config.distill.target, added)


def _base_path(init: Path) -> str | None:
    """Return the folder of the autoencoder of diffusers that a run starts from, None where it starts from a grown one."""
    grown = (init / "config.json").is_file() and class_name(init) == AutoencoderKLProMAG.__name__
    return None if grown else load_tokenizer(init).base_path


def _record_videos(run: Path, data: TokenizerDataConfig) -> None:
    """Record the videos that a run is trained on; it reads no captions, so these may be corrected."""
    digests = digest_sources(data.train, data.extra_sources or (), data.synthetic_clips)
    kinds = ["videos"]
    if any(name.startswith("clips.") for name in recorded_data(run)):
        kinds.append("clips")  # earlier versions recorded hashes with captions
    record_data(run, {kind: {name: getattr(digest, kind) for name, digest in digests.items()} for kind in kinds})


def _record_start(run: Path, folder: Path, model: AutoencoderKLProMAG) -> None:
    """Record what a stage starts from: checkpoints hold only what it trains, so another one would mix with them."""
    broadcast_from_main(lambda: record_data(run, {f"the tokenizer that {folder.name} starts from": hash_weights([model])}))


def _continued(place: Path, stage: StageConfig) -> AutoencoderKLProMAG:
    """Load a tokenizer whose highest level is to be trained further: levels above would no longer fit a changed one."""
    model = load_tokenizer(place)
    if stage.ratio != model.temporal_ratios[-1]:
        levels = ", ".join(f"{r}x" for r in model.temporal_ratios)
        raise UserError(
            f"stage {stage.name} without growth: only the highest level of {place} ({levels}) can be trained further"
        )
    if absent := sorted({*stage.turns} - {*model.temporal_ratios}):
        levels = ", ".join(f"{r}x" for r in model.temporal_ratios)
        raise UserError(f"stage {stage.name} by_turns: {place} has {levels}, not {', '.join(f'{r}x' for r in absent)}")
    return model


@torch.no_grad()
def _sheet(model: Any, clips: list[Tensor], ratio: int) -> Any:
    """Originals above reconstructions, 8 frames across: uint8 H W 3."""
    rows = []
    for clip in clips:
        output = model(clip.to(model.device), ratio).sample.cpu()
        picked = torch.linspace(0, clip.shape[2] - 1, 8).round().long()
        rows += [torch.cat(list(to_uint8(v[:, :, picked])[0]), 1) for v in (clip, output)]
    return torch.cat(rows, 0).numpy()
