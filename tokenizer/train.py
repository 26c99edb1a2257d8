"""Training the tokenizer stage by stage: the base, each grown level on what is frozen below it, then perhaps all by turns.

A run directory holds one folder per stage (checkpoints, metrics) and `tokenizer/`, the model with all levels trained so far.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from promag.data.stream import Clips, DrawnClips, FirstThen, Mixture, TrainingStream
from promag.training.compilation import compile_blocks
from promag.training.config import UserError, load_yaml
from promag.training.files import finish_replacing, write_atomically
from promag.training.loop import Metrics, Outcome, close_trackers, make_accelerator, train
from promag.training.processes import broadcast_from_main, choose_precision_once, wait_for_everyone
from promag.training.run import load_checkpoint, newest_checkpoint, open_run, record_data, recorded_data
from promag.training.state import hash_weights
from promag.training.trackers import Log

from .autoencoder import AutoencoderKLProMAG
from .checkpoint import class_name, find_damage, is_growth, load_tokenizer, save_tokenizer, saved_ratios
from .clips import check_clips, first_clips, open_training_clips, open_validation_clips, record_videos
from .config import MAY_CHANGE, StageConfig, TokenizerConfig
from .convolution import use_channels_last
from .distillation import load_teacher, move_teacher, take_entries
from .geometry import ratio_names
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
    config = replace(config, precision=precision)
    accelerator = make_accelerator(
        Path(config.output_dir),
        precision,
        config.run.trackers,
        unused=any(leaves_unused(stage, config.init is not None) for stage in config.stages),
    )
    run = open_run(config.output_dir, config, _may_change(config), write=accelerator.is_main_process)
    if accelerator.is_main_process:
        for name in ("tokenizer", "growth"):
            finish_replacing(run / name)
    wait_for_everyone()
    _check_levels(run, config, build)
    for stage in config.chosen_stages:
        outcome = train_stage(accelerator, run, config, stage, build, open_latents)
        if not outcome.finished:
            return None
    close_trackers(accelerator)
    return run / "tokenizer"


def _may_change(config: TokenizerConfig) -> tuple[str, ...]:
    """Return the keys that may differ where a run continues.

    The folder of cached latents may change; once a stage trains on them, whether latents are cached may not.
    """
    run = Path(config.output_dir)
    file = run / "config.yaml"
    before = load_yaml(file).get("data", {}).get("latent_cache") if file.exists() else None
    pretrained = [stage for stage in config.stages if stage.latent_pretrain_steps]
    folders = [config.folder_of(stage) for stage in pretrained]
    begun = any((folder / "done.json").exists() or newest_checkpoint(folder) for folder in folders)
    fixed = begun and (before is None) != (config.data.latent_cache is None)
    return MAY_CHANGE if fixed else (*MAY_CHANGE, "data.latent_cache")


def _check_levels(run: Path, config: TokenizerConfig, build: Callable[[], Any] | None) -> None:
    """Raise UserError, before anything is grown, where a last stage by turns names levels that there will not be."""
    first, last = config.stages[0], config.stages[-1]
    if last.by_turns is None or first.growth is None or (run / "tokenizer").exists():
        return
    base = load_tokenizer(config.init) if config.init else build() if build else None
    if base is not None:
        levels = sorted({*base.temporal_ratios, *config.grown_ratios()})
        _check_turns(last, levels, f"{config.init or 'the architecture'}, grown by the stages before,")


def _check_turns(stage: StageConfig, levels: Sequence[int], place: str | Path) -> None:
    """Raise UserError unless all ratios of a stage are among the levels."""
    if absent := sorted({*stage.turns} - {*levels}):
        have, lacks = ratio_names(levels), ratio_names(absent)
        raise UserError(f"stage {stage.name} by_turns: {place} has {have}, not {lacks}")


def leaves_unused(stage: StageConfig, from_init: bool = False) -> bool:
    """Tell whether some step of a stage leaves weights that it trains without a gradient; `from_init`: the run has an init."""
    growth = stage.growth
    copies = growth and "finetune" in (growth.encoder, growth.decoder)
    # A stage may add several levels, and then nothing reads the heads of the lower ones.
    idle_heads = growth and (growth.mixing == "none" or not growth.birth or growth.sum_at == "features")
    # Nothing reads the first convolution of a lower level that gets features alone; steps on latents hand over no features.
    wide = growth and (growth.hand_over == "wide" or (growth.hand_over == "both" and stage.latent_pretrain_steps))
    # Levels of either kind may be what a stage without growth trains, and its settings do not show which these are.
    trained_before = stage.trainable in ("all", "decoder") or (growth is None and from_init)
    return bool(trained_before or stage.by_turns or stage.adversarial or copies or idle_heads or wide)


def train_stage(
    accelerator: Accelerator,
    run: Path,
    config: TokenizerConfig,
    stage: StageConfig,
    build: Callable[[], Any] | None = None,
    open_latents: OpenLatents | None = None,
) -> Outcome:
    """Train one stage on the levels that the run directory or `config.init` holds."""
    folder = config.folder_of(stage)
    if _is_trained(run, config, stage, folder):
        if accelerator.is_main_process:
            _record_end(folder)
        accelerator.print(f"{stage.name}: already trained in {folder}")
        return Outcome(stage.optimization.steps, 0.0, True, {})
    data = config.data
    rank, world = accelerator.process_index, accelerator.num_processes
    strides = stage.temporal_strides or data.temporal_strides
    source, plan = open_training_clips(data, config.buckets_of(stage), stage.optimization, world, strides)
    broadcast_from_main(lambda: record_videos(run, data))
    clips = open_validation_clips(data, stage.frames)

    torch.manual_seed(config.seed * 1000 + stage.ratio)
    model, added = _model_for(run, config, stage, build)
    _check_shapes(config, stage, model, f"stage {stage.name}: ")
    use_channels_last(model)
    trained = train_only(model, stage, added)
    accelerator.print(
        f"{stage.name}: {sum(p.numel() for p in trained) / 1e6:.2f} M parameters trained of "
        f"{parameter_count([model]) / 1e6:.2f} M\n{plan}"
    )
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if config.compile:
        compile_blocks(model)
    if data.latent_cache and stage.latent_pretrain_steps:
        if open_latents is None:
            raise ValueError(f"latent_cache {data.latent_cache}: needs `open_latents`, which caches latents; use null")
        taken = broadcast_from_main(lambda: _newest_meta(folder)["step"])
        if taken < stage.latent_pretrain_steps:
            _check_cached(data.latent_cache, stage, model)
            one_each = [replace(bucket, batch_size=None) for bucket in config.buckets_of(stage)]
            drawn, _ = open_training_clips(data, one_each, stage.optimization, world, strides)
            latents = open_latents(config, stage, model, DrawnClips(drawn, config.seed))
            source = FirstThen(Mixture([latents], [1.0], [stage.latent_batch_size]), stage.latent_pretrain_steps, source)

    objective = _objective(run, config, stage, model, added, accelerator.device)

    def open_stream(first: int) -> TrainingStream:
        options = stage.optimization
        return TrainingStream(source, config.seed, options.batch_size, rank, world, first, options.accumulate)

    anew = stage.growth is None and config.init is None
    if isinstance(objective, DistillationObjective) and anew and model.config["linear_shortcuts"]:
        objective.fit_linear_paths(first_clips(source, config.seed, stage.optimization, world))

    def validate(log: Log, step: int) -> Metrics:
        if log.trackers:
            log.picture("reconstruction", _sheet(objective.reconstructor, clips[:4], stage.ratio), step)
        return objective.evaluate(clips, config.precision)

    outcome = train(accelerator, folder, objective, open_stream, stage.optimization, config.run, config.seed, validate)
    if outcome.finished and accelerator.is_main_process:
        # Before the tokenizer, which decides whether the stage is trained. The base must be as it was outside of the run:
        # growth.json names it by its folder and its weights.
        stages = config.stages[: config.stages.index(stage) + 1]
        if model.existing and all(each.growth and each.trainable == "new" for each in stages):
            model.save_growth(run / "growth")
        save_tokenizer(model, run / "tokenizer")
        _record_end(folder)
    wait_for_everyone()
    return outcome


def _is_trained(run: Path, config: TokenizerConfig, stage: StageConfig, folder: Path) -> bool:
    """Tell whether the run's tokenizer holds what a stage trained; raises UserError where its training did not end.

    The tokenizer decides, not the record beside the checkpoints: a run may be killed between writing the two. A stage that
    grows is in it if its level is; one by turns, which adds none, if it is no longer what that stage starts from. A damaged
    tokenizer does not count where the stage's checkpoints can replace it, and is an error where they are gone.
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
    follows = stage.by_turns is not None and stage != config.stages[0]
    if follows:
        start = recorded_data(run).get(_start_of(folder))
        if start in (None, hash_weights([load_tokenizer(place, config.base_features)])):
            return False
    if not (folder / "done.json").exists() and (step := _newest_meta(folder)["step"]) < stage.optimization.steps:
        state = "is no longer what it starts from" if follows else "has that level"
        raise UserError(
            f"stage {stage.name}: {place} {state}, but its training in {folder} stands at step {step} of "
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
    if stage.growth is None and stage == config.stages[0]:
        if config.init:
            model = _continued(Path(config.init), stage)
            _record_start(run, config.folder_of(stage), model)
            return model, (stage.ratio,)
        if build is None and config.model is None:
            raise UserError(f"model null: stage {stage.ratio}x starts from scratch and needs a model")
        try:
            model = build() if build else AutoencoderKLProMAG(**asdict(config.model))  # pyright: ignore
        except ValueError as error:
            raise UserError(f"model: {error}") from None
        if model.temporal_ratios[0] != stage.ratio:
            raise UserError(f"stage {stage.name} without growth: the base's strides make it {model.temporal_ratios[0]}x")
        if config.model and config.model.linear_shortcuts:
            model.init_from_block_means()
        return model, model.temporal_ratios
    place = Path(config.init) if config.init and find_damage(run / "tokenizer") else run / "tokenizer"
    scratch = build if config.init is None and stage == config.stages[0] and find_damage(place) else None
    model = scratch() if scratch else load_tokenizer(place, config.base_features)
    if model.existing and config.init:
        model.base_path = model.base_path or _base_path(Path(config.init))
    have, highest = len(model.temporal_ratios), model.temporal_ratios[-1]
    if stage.growth is None:
        _check_turns(stage, model.temporal_ratios, place)
        if highest != stage.ratio:
            raise UserError(f"stage {stage.name}: {place} has levels up to {highest}x; its own ratio must be the highest")
        _record_start(run, config.folder_of(stage), model)
        return model, (stage.ratio,)
    levels = ratio_names(model.temporal_ratios)
    if before := config.stages[: config.stages.index(stage)]:
        if before[-1].ratio != highest:
            raise UserError(
                f"stage {stage.name}: the tokenizer in {place} has {levels}; its highest must be {before[-1].ratio}x, as stage "
                f"{before[-1].name} leaves it; run that stage first"
            )
    elif stage.ratio not in (2 * highest, 4 * highest, 8 * highest):
        can = ", ".join(f"{highest * k}x" for k in (2, 4, 8))
        raise UserError(f"stage {stage.name}: the tokenizer in {place} has {levels}; one stage grows it to one of {can}")
    _record_start(run, config.folder_of(stage), model)
    try:
        while model.temporal_ratios[-1] < stage.ratio:
            model.grow(stage.growth)
    except ValueError as error:
        raise UserError(f"stage {stage.name}: {error}") from None
    return model, model.temporal_ratios[have:]


def _check_shapes(config: TokenizerConfig, stage: StageConfig, model: AutoencoderKLProMAG, place: str) -> None:
    """Raise UserError, which begins with `place`, where an autoencoder does not take a stage's clips at all of its ratios."""
    shapes = {(bucket.frames, bucket.height, bucket.width) for bucket in config.buckets_of(stage)}
    for frames, height, width in sorted({*shapes, (stage.frames, config.data.size, config.data.size)}):
        for ratio in sorted({*stage.turns}):
            check_clips(model, ratio, frames, height, width, place)


def _check_cached(cache: str, stage: StageConfig, model: AutoencoderKLProMAG) -> None:
    """Raise UserError where the latents of a model's base cannot stand for pixels in the first steps of a stage."""
    if model.existing is None:
        raise UserError(f"latent_cache {cache}: only an existing autoencoder's latents are cached; use null")
    try:
        model.check_takes_base_latents([stage.ratio])
    except ValueError as error:
        raise UserError(f"stage {stage.name}: {error}; set data.latent_cache to null") from None


def train_only(model: AutoencoderKLProMAG, stage: StageConfig, added: Sequence[int]) -> list[nn.Parameter]:
    """Freeze what a stage does not train, and return the parameters that it does."""
    if stage.trainable != "decoder":
        upto = [ratio for ratio in model.temporal_ratios if ratio <= stage.ratio]  # all, but where costs are counted later
        return model.train_only(*(added if stage.trainable == "new" else upto))
    model.requires_grad_(False)
    for ratio in stage.turns:
        for module in model.decoding_path(model.level_of(ratio)):
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
    """Return what a stage minimises; a teacher is loaded, recorded, and what runs of it put on the device."""
    if config.distill is None:
        return StageObjective(model, stage, added)
    teacher = load_teacher(config.distill.teacher, model, stage.ratio)
    take_entries(model, teacher)
    _check_shapes(config, stage, teacher, f"stage {stage.name}: distill.teacher {config.distill.teacher}: ")
    broadcast_from_main(lambda: record_data(run, {f"the teacher of {stage.ratio}x": hash_weights([teacher])}))
    move_teacher(teacher, [stage.ratio], config.distill.target == "teacher", device)
    return DistillationObjective(model, stage, teacher, config.distill.target, added)


def _base_path(init: Path) -> str | None:
    """Return the folder of the autoencoder of diffusers that a run starts from, None where it starts from a grown one."""
    place = init / "vae" if (init / "vae" / "config.json").exists() else init  # `init` may be a whole pipeline
    if is_growth(place) or not (place / "config.json").is_file():
        return load_tokenizer(place).base_path  # as it is recorded there, or the error that names the folder
    return None if class_name(place) == AutoencoderKLProMAG.__name__ else os.path.abspath(place)


def _record_start(run: Path, folder: Path, model: AutoencoderKLProMAG) -> None:
    """Record what a stage starts from: checkpoints hold only what it trains, so another one would mix with them."""
    broadcast_from_main(lambda: record_data(run, {_start_of(folder): hash_weights([model])}))


def _start_of(folder: Path) -> str:
    """Return the name in the run's record of the weights that a stage starts from."""
    return f"the tokenizer that {folder.name} starts from"


def _continued(place: Path, stage: StageConfig) -> AutoencoderKLProMAG:
    """Load a tokenizer whose highest level is to be trained further: levels above would no longer fit a changed one."""
    model = load_tokenizer(place)
    if stage.ratio != model.temporal_ratios[-1]:
        levels = ratio_names(model.temporal_ratios)
        raise UserError(
            f"stage {stage.name} without growth: only the highest level of {place} ({levels}) can be trained further"
        )
    _check_turns(stage, model.temporal_ratios, place)
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
