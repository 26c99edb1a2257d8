"""The one training loop: any objective, any deterministic stream, resumable at every checkpoint.

A sample's data and noise depend on the seed and the sample's number in the whole training alone. So a resumed run needs no
sampler or RNG state and repeats an uninterrupted one bit for bit (on a CPU), and several processes learn what one process
learns from the same global batch, but for the order in which floats are summed.
"""

import contextlib
import functools
import hashlib
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import ProjectConfiguration, parse_flag_from_env
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from .compilation import no_recompile
from .config import UserError, setting
from .files import append_json, naming
from .fsdp import full, local_shard, shard
from .graphs import make_recorder
from .optimizers import OptimizationConfig, make_optimizers
from .precision import Chosen
from .processes import broadcast_from_main
from .progress import ProgressBar
from .run import StopSignal, cut_metrics, newest_checkpoint, save_checkpoint, step_of, sweep, thin_out
from .sending import Sender
from .skipping import Skipping
from .state import State
from .throughput import Meter, Work
from .trackers import Log, Tracker, check_trackers
from .update import Update

Metrics = Mapping[str, float]
# What `accelerate launch` would wrap the model with, by the variable in which it asks for that.
WRAPPERS = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings of a call that do not change what is learned."""

    log_every: int = setting(25, "steps between two log lines")
    validate_every: int = setting(500, "steps between two validations")
    save_every: int = setting(500, "steps between two checkpoints")
    keep_last: int = setting(2, "newest checkpoints kept of each stage")
    keep_every: int | None = setting(
        None, "checkpoints at multiples of so many steps are kept for good; null keeps none of them"
    )
    workers: int = setting(2, "data loading processes; 0 loads in the training process")
    distributed: Literal["ddp", "fsdp2"] = setting(
        "ddp", "ddp: every process holds all weights and moments; fsdp2: a shard of them"
    )
    stop_after: int | None = setting(None, "save and end this call after so many steps; null runs to the end")
    trackers: tuple[Tracker, ...] = setting(
        ("tensorboard",), "where curves, pictures and videos are shown: tensorboard, wandb, both or none"
    )
    peak_tflops: float | None = setting(None, "the device's stated peak in TFLOP/s, for MFU; null measures a matrix product")

    def __post_init__(self) -> None:
        """Raise ValueError for a setting that cannot be meant."""
        for name in ("log_every", "validate_every", "save_every", "keep_last", "keep_every", "stop_after"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} {value}: at least 1 is needed")
        if self.workers < 0:
            raise ValueError(f"workers {self.workers}: must not be negative")
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise ValueError(f"peak_tflops {self.peak_tflops}: must be above 0")


@dataclass(frozen=True)
class Outcome:
    """Result of a call of `train`."""

    step: int
    seconds: float
    finished: bool
    metrics: Metrics


class Objective(nn.Module):
    """The loss to minimise: called with a batch and a generator per sample; returns scalars, `loss` among them."""

    host_keys: Sequence[str] = ()  # what of a batch the host reads: numbers there, else the host would wait for the device

    def separately_clipped(self) -> list[nn.Module]:
        """Return modules whose gradients are clipped separately, each by its own norm."""
        return []

    def learning_rate_scales(self) -> list[tuple[nn.Module, float]]:
        """Return modules with a learning rate of their own, each with its scale on the schedule's."""
        return []

    def matrices(self) -> list[nn.Parameter]:
        """Return the weights that Muon may train: matrices and kernels that map hidden features to hidden features."""
        return []

    def units(self) -> list[nn.Module]:
        """Return modules whose weights FSDP2 gathers together, inner ones first; all that is trained must be in them."""
        return []

    def work(self, batch: dict[str, Any]) -> Work | None:
        """Return the work of a batch, for the throughput in the log; None where it is not counted."""
        return None

    def forward(self, batch: dict[str, Any], generators: list[torch.Generator], step: int) -> dict[str, Tensor]:
        """Return the losses of one batch."""
        raise TypeError("an Objective defines forward")


def make_accelerator(
    run: Path,
    precision: Chosen,
    trackers: Sequence[Tracker] = ("tensorboard",),
    unused: bool = False,
) -> Accelerator:
    """Return the process's Accelerator, TensorBoard's files below `run`; `unused` lets some weights have no gradient.

    Raises UserError for a tracker that is not installed, and where accelerate was launched with FSDP, DeepSpeed or Megatron-LM.
    """
    check_trackers(trackers)
    for variable, name in WRAPPERS.items():
        if parse_flag_from_env(variable):
            raise UserError(
                f"accelerate launch with {name} ({variable}): run.distributed, ddp or fsdp2, alone decides how a model is "
                "spread over processes; use accelerate launch --multi_gpu, or torchrun"
            )
    torch.backends.cudnn.benchmark = True  # a training's shapes stay the same, and the best 3D kernel is worth a search
    return Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        log_with=list(trackers) or None,
        project_config=ProjectConfiguration(project_dir=str(run), logging_dir=str(run / "tensorboard")),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unused)],
    )


def close_trackers(accelerator: Accelerator) -> None:
    """Finish the trackers' files; the processes stay connected for what follows."""
    for tracker in accelerator.trackers:
        tracker.finish()


def seeded(*numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator that depends on the given numbers alone."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


def train(
    accelerator: Accelerator,
    folder: Path,
    objective: Objective,
    open_stream: Callable[[int], IterableDataset],
    settings: OptimizationConfig,
    run: RunConfig,
    seed: int,
    validate: Callable[[Log, int], Metrics] | None = None,
    graphs: bool = False,
) -> Outcome:
    """Train what is trainable in `objective` and leave its averaged weights in place.

    Args:
        accelerator: the process's Accelerator.
        folder: where the checkpoints and metrics of this stage go; its last name is shown.
        objective: holds the model; only parameters that require gradients are trained and saved. With FSDP2 its units are
            replaced, in the end by plain modules on the CPU: take what was trained from the objective.
        open_stream: returns the stream of this rank's batches from a given step on.
        settings: how to optimise.
        run: how often to log, validate and save.
        seed: all noise of sample n comes from (seed, n).
        validate: called with a Log for pictures and videos and the step, under the averaged weights; returns metrics.
        graphs: replay clipping, optimisers and average as CUDA graphs too; the model's own graphs are the objective's matter.

    A checkpoint in `folder` is continued. SIGTERM and SIGINT save and return an Outcome that is not finished, even in the
    last step. A step whose loss or gradients are not finite is skipped on the device; the host names and counts it while the
    next one runs. Raises DivergedError (skipping.py) where `max_skipped` such steps in a row are not enough.
    """
    name = folder.name
    wrapped, make_whole = _distribute(accelerator, objective, run.distributed)  # lays weights out anew: first of all
    named = {n: p for n, p in objective.named_parameters() if p.requires_grad}
    separate = [[p for p in module.parameters() if p.requires_grad] for module in objective.separately_clipped()]
    separate_ids = {id(p) for group in separate for p in group}
    together = [p for p in named.values() if id(p) not in separate_ids]
    optimizers = make_optimizers(objective, settings, "bf16" if accelerator.mixed_precision == "bf16" else "fp32")
    parameters = [local_shard(p) for p in named.values()]
    ema = EMAModel(parameters, decay=settings.ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
    global_batch = accelerator.num_processes * settings.batch_size * settings.accumulate
    state = State(named, dict(objective.named_buffers()), optimizers, ema, global_batch)
    if checkpoint := broadcast_from_main(lambda: _resumable(folder, run)):
        state.resume(checkpoint)
    first = step = state.step
    if first:
        accelerator.print(f"{name}: continues at step {first} of {settings.steps}")
    update = Update(optimizers, ema, parameters, (together, *separate), settings.clip_norm, make_recorder(graphs))
    update.taken.fill_(first - state.skipped)
    log = _open_log(accelerator, name)
    metrics_file, metrics = folder / "metrics.jsonl", {}
    if accelerator.is_main_process:
        cut_metrics(metrics_file, first)

    last = settings.steps if run.stop_after is None else min(settings.steps, first + run.stop_after)
    loader = DataLoader(
        open_stream(first * settings.accumulate),
        batch_size=None,
        num_workers=run.workers,
        pin_memory=accelerator.device.type == "cuda",  # copied while the device works on
        worker_init_fn=_leave_signals_to_the_parent,
    )
    batches = iter(loader) if first < last else iter(())
    send = Sender(accelerator.device, objective.host_keys)
    bar = ProgressBar(
        initial=first,
        total=settings.steps,
        desc=name,
        unit="step",
        disable=not accelerator.is_main_process,
    )
    bf16 = accelerator.mixed_precision == "bf16"
    meter = Meter(accelerator.num_processes, accelerator.device, bf16, run.peak_tflops)
    skipping = Skipping(accelerator, state, name, settings.max_skipped, functools.partial(bar.write, file=sys.stderr))
    with StopSignal() as stop, _shut_down_after(batches), contextlib.closing(bar):
        objective.train()
        meter.start()
        saved, stopping = first, False
        while step < last and not stopping:
            for group in update.groups:
                group["lr"] = settings.learning_rate_at(step) * group["factor"]
            losses: dict[str, Any] = {}
            untouched = state.copy_of_buffers()
            for part in range(settings.accumulate):
                batch: Any = next(batches)
                generators = [seeded(seed, n, device=accelerator.device) for n in batch["sample"].tolist()]
                batch = send(batch)
                summing = part < settings.accumulate - 1  # DDP's gradients cross processes once a step, FSDP2's each time
                with accelerator.no_sync(wrapped) if summing else contextlib.nullcontext():
                    with accelerator.autocast():
                        results = wrapped(batch, generators, step)
                    accelerator.backward(results["loss"] / settings.accumulate)
                for key, value in results.items():
                    losses[key] = losses.get(key, 0) + value.detach().float() / settings.accumulate
                meter.count(len(batch["sample"]), objective.work(batch))
            losses["gradient_norm"], *others = map(full, update.clip())
            figures = {**losses, **{f"gradient norm {i + 2}": norm for i, norm in enumerate(others)}}
            skip = skipping.decide(step + 1, figures, stop.received is not None)
            update(skip)
            state.restore_buffers(untouched, skip)
            meter.add(losses, skip)
            for optimizer in optimizers:
                optimizer.zero_grad()
            step = state.step = step + 1
            bar.update()
            due = step == last or not all(step % every for every in (run.log_every, run.validate_every, run.save_every))
            stopping = skipping.read(everything=due)

            if step % run.log_every == 0 or step == last:
                meter.sums = _mean_over_ranks(accelerator, meter.sums)
                record = meter.read()
                record |= {"learning_rate": settings.learning_rate_at(step - 1), "skipped": state.skipped}
                _write(accelerator, metrics_file, log, step, record)
                bar.set_postfix({k: f"{record[k]:.4g}" for k in losses if k in record})
            if validate and (step % run.validate_every == 0 or step == settings.steps):
                seconds = state.seconds + meter.seconds()
                with meter.pause():
                    metrics = _validate(validate, log, step, objective, ema, parameters)
                    _write(accelerator, metrics_file, log, step, {**metrics, "train_seconds": seconds})
                    if accelerator.is_main_process:
                        message = "  ".join(f"{k} {v:.4g}" for k, v in metrics.items())
                        bar.write(f"{name} step {step}: {message}", sys.stderr)
            if step % run.save_every == 0 and step < last:
                _save(accelerator, folder, state, meter.seconds(), run, stop)
                saved = step
        skipping.read(everything=True)
        bar.close()
        seconds = meter.seconds()
        if step > saved:
            _save(accelerator, folder, state, seconds, run, stop)
        ema.copy_to(parameters)
        make_whole()
        objective.eval()
        stop.handled = True
    stopped = _any_rank(accelerator, stop.received is not None)  # a signal may come while the workers end
    accelerator.free_memory()  # it would keep the models of all stages
    if stop.received:
        accelerator.print(f"{name}: {stop.received} received, saved at step {step} of {settings.steps}")
    return Outcome(step, state.seconds + seconds, step >= settings.steps and not stopped, metrics)


def _distribute(
    accelerator: Accelerator, objective: Objective, distributed: Literal["ddp", "fsdp2"]
) -> tuple[nn.Module, Callable[[], None]]:
    """Wrap the objective for DDP or FSDP2; return the wrapped module and a function that makes its weights whole at the end."""
    device, world = accelerator.device, accelerator.num_processes
    if distributed == "fsdp2":
        return objective, shard(objective, objective.units(), device, world, accelerator.mixed_precision == "bf16")
    return accelerator.prepare(objective.to(device)), lambda: None


def _resumable(folder: Path, run: RunConfig) -> Path | None:
    """Remove what a killed call left, and checkpoints that it had still to delete; return the one to continue from."""
    sweep(folder)
    if newest := newest_checkpoint(folder):
        thin_out(folder, step_of(newest), run.keep_last, run.keep_every)
    return newest


def _save(accelerator: Accelerator, folder: Path, state: State, seconds: float, run: RunConfig, stop: StopSignal) -> None:
    """Write a checkpoint on rank 0, uninterrupted by signals; raises OSError on all ranks where the disk is full."""
    groups = state.groups()

    def save() -> None:
        try:
            save_checkpoint(folder, state.step, groups, state.meta(seconds))
            thin_out(folder, state.step, run.keep_last, run.keep_every)
        finally:
            _exhaust(groups)

    stop.saving = True
    if not accelerator.is_main_process:
        _exhaust(groups)
    broadcast_from_main(save)
    stop.saving = False


def _exhaust(groups: Iterator) -> None:
    for _ in groups:
        pass  # each process's parts are gathered on the main one


def _validate(validate, log: Log, step: int, objective: nn.Module, ema: EMAModel, parameters: list[nn.Parameter]) -> Metrics:
    ema.store(parameters)
    ema.copy_to(parameters)
    objective.eval()
    with torch.no_grad(), no_recompile():
        metrics = validate(log, step)
    objective.train()
    ema.restore(parameters)
    return metrics


def _write(accelerator: Accelerator, file: Path, log: Log, step: int, record: Metrics) -> None:
    if accelerator.is_main_process:
        append_json(file, {"step": step, **record})
        with naming(accelerator.logging_dir):
            log.figures(record, step)


def _open_log(accelerator: Accelerator, name: str) -> Log:
    if accelerator.log_with and not accelerator.trackers:
        accelerator.init_trackers("promag")
    return Log(accelerator.trackers if accelerator.is_main_process else (), name)


def _any_rank(accelerator: Accelerator, flag: bool) -> bool:
    """Return whether a flag is set on any rank."""
    if accelerator.num_processes == 1:
        return flag
    total: Any = accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum")
    return bool(total > 0)


def _mean_over_ranks(accelerator: Accelerator, figures: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return figures that every rank has as their means over the ranks."""
    if accelerator.num_processes == 1 or not figures:
        return figures
    means: Any = accelerator.reduce(torch.stack([value.to(accelerator.device) for value in figures.values()]), "mean")
    return dict(zip(figures, means, strict=True))


def _leave_signals_to_the_parent(worker: int) -> None:
    # Ctrl-C and schedulers signal the whole process group: a worker that died of it would break the save.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def _shut_down_after(batches: Iterator) -> Iterator[None]:
    """End the worker processes after the block, also after an exception: they ignore signals and would be waited for."""
    try:
        yield
    finally:
        close = getattr(batches, "_shutdown_workers", None)
        if close:
            close()
