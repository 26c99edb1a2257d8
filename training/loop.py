"""The one training loop: any objective, any deterministic stream, resumable at every checkpoint.

The data of step s depends on (seed, rank, s) alone and so does all noise, so a resumed run needs no sampler or RNG state
and repeats an uninterrupted one bit for bit (on a CPU).
"""

import contextlib
import hashlib
import itertools
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import ProjectConfiguration, parse_flag_from_env, send_to_device
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from .config import UserError, setting
from .muon import Muon
from .run import StopSignal, append_metrics, checkpoints, cut_metrics, keep_last, load_checkpoint, save_checkpoint

Metrics = Mapping[str, float]

NEWTON_SCHULZ_STEPS = 4  # of Muon: one fewer than its authors', a fifth cheaper; singular values end a little less alike


@dataclass(frozen=True)
class LoopSettings:
    """How one stage is optimised and how often it speaks."""

    steps: int = setting("optimiser steps of the stage")
    batch_size: int = setting("clips per process and step")
    learning_rate: float = setting("peak of the schedule")
    warmup: int = setting("steps of linear warm-up")
    schedule: Literal["cosine", "constant"] = setting("after the warm-up: down to 5 % of the peak, or constant")
    weight_decay: float = setting("decoupled, as in AdamW")
    clip_norm: float = setting("largest gradient norm")
    ema_decay: float = setting("highest decay of the averaged weights")
    muon: float | None = setting("peak rate of Muon for hidden matrices and convolution kernels; null: AdamW for these too")

    def __post_init__(self) -> None:
        """Raise ValueError for a setting that cannot be meant."""
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: at least 1 is needed")
        for name in ("learning_rate", "muon"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name} {value}: must be above 0")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay {self.ema_decay}: must be in [0, 1)")

    def rate_at(self, step: int) -> float:
        """Return the learning rate of step 0, 1, ..."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.learning_rate
        along = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.05 + 0.95 * (1 + math.cos(math.pi * along)) / 2)


@dataclass(frozen=True)
class Pace:
    """What may change from one call to the next without changing what is learned."""

    log_every: int = setting("steps between two log lines")
    validate_every: int = setting("steps between two validations")
    save_every: int = setting("steps between two checkpoints")
    keep_last: int = setting("checkpoints kept of each stage")
    workers: int = setting("data loading processes; 0 loads in the training process")
    stop_after: int | None = setting("save and end this call after so many steps; null runs to the end")


@dataclass(frozen=True)
class Outcome:
    """What a call of `train` ended with."""

    step: int
    seconds: float
    finished: bool
    metrics: Metrics


class Objective(nn.Module):
    """What is minimised: called with a batch and a generator, returns a dictionary of scalars, `loss` among them."""

    def clipped_apart(self) -> list[nn.Module]:
        """Return modules whose gradients are clipped by a norm of their own, each apart from all else."""
        return []

    def rate_factors(self) -> list[tuple[nn.Module, float]]:
        """Return modules that learn at another rate than the rest, each with its factor."""
        return []

    def matrices(self) -> list[nn.Parameter]:
        """Return the weights that Muon may train: matrices and kernels that map hidden features to hidden features."""
        return []

    def forward(self, batch: dict[str, Any], generator: torch.Generator, step: int) -> dict[str, Tensor]:
        """Return the losses of one batch."""
        raise TypeError("an Objective defines forward")


def make_accelerator(run: Path, precision: Literal["bf16", "no"], unused: bool = False) -> Accelerator:
    """Return the process's Accelerator with TensorBoard below `run`; `unused` lets some weights have no gradient."""
    return Accelerator(
        mixed_precision=precision,
        log_with="tensorboard",
        project_config=ProjectConfiguration(project_dir=str(run), logging_dir=str(run)),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unused)],
    )


def close_trackers(accelerator: Accelerator) -> None:
    """Finish what TensorBoard writes. The processes stay connected: what follows a training may still need them."""
    for tracker in accelerator.trackers:
        tracker.finish()


@contextlib.contextmanager
def main_process_first() -> Iterator[bool]:
    """Let the main process do the block while the others wait, then let them do it; yields whether this is the main one."""
    # Before any Accelerator, this alone decides whether processes on CPUs find each other.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    with state.main_process_first():
        yield state.is_main_process


def seeded(*numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator that depends on the given numbers alone."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


def train(
    accelerator: Accelerator,
    folder: Path,
    objective: Objective,
    open_stream: Callable[[int], IterableDataset],
    settings: LoopSettings,
    pace: Pace,
    seed: int,
    validate: Callable[[Any, int], Metrics] | None = None,
) -> Outcome:
    """Train what is trainable in `objective` and leave its averaged weights in place.

    Args:
        accelerator: the process's Accelerator.
        folder: where the checkpoints and metrics of this stage go; its last name is shown.
        objective: holds the model; only parameters that require gradients are trained and saved.
        open_stream: returns the stream of this rank's batches from a given step on.
        settings: how to optimise.
        pace: how often to log, validate and save.
        seed: all noise of step s comes from (seed, rank, s).
        validate: called with the TensorBoard tracker and the step, under the averaged weights; returns metrics.

    A checkpoint in `folder` is continued. SIGTERM and SIGINT save and return an Outcome that is not finished.
    Raises FloatingPointError on a loss that is not finite.
    """
    name = folder.name
    named = {n: p for n, p in objective.named_parameters() if p.requires_grad}
    parameters = list(named.values())
    apart = [[p for p in module.parameters() if p.requires_grad] for module in objective.clipped_apart()]
    theirs = {id(p) for group in apart for p in group}
    together = [p for p in parameters if id(p) not in theirs]
    objective.to(accelerator.device)
    optimizers = make_optimizers(objective, settings)
    ema = EMAModel(parameters, decay=settings.ema_decay, use_ema_warmup=True, power=0.75)
    buffers = dict(objective.named_buffers())
    first, seconds = _resume(folder, named, buffers, optimizers, ema)
    if first:
        accelerator.print(f"{name}: continues at step {first} of {settings.steps}")
    wrapped, *prepared = accelerator.prepare(objective, *optimizers)
    tracker = _open_tracker(accelerator, name)
    metrics_file, metrics = folder / "metrics.jsonl", {}
    if accelerator.is_main_process:
        cut_metrics(metrics_file, first)

    last = settings.steps if pace.stop_after is None else min(settings.steps, first + pace.stop_after)
    loader = DataLoader(
        open_stream(first), batch_size=None, num_workers=pace.workers, worker_init_fn=_leave_signals_to_the_parent
    )
    batches = iter(loader) if first < last else iter(())
    bar = tqdm(
        initial=first,
        total=settings.steps,
        desc=name,
        disable=not accelerator.is_main_process,
        mininterval=2,
        file=sys.stderr,
    )
    step = first
    with StopSignal() as stop, _shut_down_after(batches):
        objective.train()
        sums: dict[str, Tensor] = {}
        since = started = time.perf_counter()
        since_step = first
        while step < last and not _any_rank(accelerator, stop.received is not None):
            batch = send_to_device(next(batches), accelerator.device)
            for group in itertools.chain.from_iterable(optimizer.param_groups for optimizer in prepared):
                group["lr"] = settings.rate_at(step) * group["factor"]
            generator = seeded(seed, accelerator.process_index, step, device=accelerator.device)
            with accelerator.autocast():
                losses = wrapped(batch, generator, step)
            accelerator.backward(losses["loss"])
            norm = accelerator.clip_grad_norm_(together, settings.clip_norm)
            for group in apart:
                accelerator.clip_grad_norm_(group, settings.clip_norm)
            for optimizer in prepared:
                optimizer.step()
                optimizer.zero_grad()
            ema.step(parameters)
            step += 1
            bar.update()

            for key, value in {**losses, "gradient_norm": norm}.items():
                sums[key] = sums.get(key, 0) + value.detach().float()
            if step % pace.log_every == 0 or step == last:
                now = time.perf_counter()
                record = {k: float(v) / (step - since_step) for k, v in sums.items()}
                _check_finite(record, name, step)
                record["samples_per_second"] = (
                    (step - since_step) * settings.batch_size * accelerator.num_processes / (now - since)
                )
                record["learning_rate"] = settings.rate_at(step - 1)
                _write(accelerator, metrics_file, name, step, record)
                bar.set_postfix({k: f"{record[k]:.4g}" for k in losses})
                sums, since, since_step = {}, now, step
            if validate and (step % pace.validate_every == 0 or step == settings.steps):
                before = time.perf_counter()
                metrics = _validate(validate, tracker, step, objective, ema, parameters)
                _write(accelerator, metrics_file, name, step, {**metrics, "train_seconds": seconds + before - started})
                if accelerator.is_main_process:
                    bar.write(f"{name} step {step}: " + "  ".join(f"{k} {v:.4g}" for k, v in metrics.items()), sys.stderr)
                pause = time.perf_counter() - before
                started, since = started + pause, since + pause
            if step % pace.save_every == 0 and step < last:
                _save(accelerator, folder, step, seconds + time.perf_counter() - started, named, buffers, optimizers, ema, pace)
    bar.close()
    seconds += time.perf_counter() - started
    if step > first:
        _save(accelerator, folder, step, seconds, named, buffers, optimizers, ema, pace)
    if stop.received:
        accelerator.print(f"{name}: {stop.received} received, saved at step {step} of {settings.steps}")
    ema.copy_to(parameters)
    objective.eval()
    return Outcome(step, seconds, step >= settings.steps, metrics)


def averaged_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return the averaged weights, by parameter name, and the meta data of the newest checkpoint in `folder`."""
    found = checkpoints(folder)
    if not found:
        return None
    groups, meta = load_checkpoint(found[-1])
    return groups["ema"], meta


def make_optimizers(objective: Objective, settings: LoopSettings) -> list[torch.optim.Optimizer]:
    """Return AdamW and, where asked for, Muon for the objective's matrices; to be called where the weights will stay.

    A group's `factor` is its learning rate over the schedule's. Raises UserError where Muon has nothing to train.
    """
    factors = {id(p): factor for module, factor in objective.rate_factors() for p in module.parameters()}
    matrices = [] if settings.muon is None else [p for p in objective.matrices() if p.requires_grad]
    if settings.muon is not None and not matrices:
        raise UserError(f"muon {settings.muon}: nothing here has matrices that Muon may train; set it to null")
    theirs = {id(p) for p in matrices}
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in objective.parameters():
        if parameter.requires_grad and id(parameter) not in theirs:
            groups.setdefault(factors.get(id(parameter), 1.0), []).append(parameter)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            [{"params": group, "factor": factor} for factor, group in groups.items()],
            settings.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=settings.weight_decay,
            fused=True,
        )
    ]
    if settings.muon is not None:
        muon = Muon(matrices, lr=settings.muon, weight_decay=settings.weight_decay, ns_steps=NEWTON_SCHULZ_STEPS)
        muon.param_groups[0]["factor"] = settings.muon / settings.learning_rate
        optimizers.append(muon)
    return optimizers


def _resume(
    folder: Path,
    named: dict[str, nn.Parameter],
    buffers: dict[str, Tensor],
    optimizers: list[torch.optim.Optimizer],
    ema: EMAModel,
) -> tuple[int, float]:
    found = checkpoints(folder)
    if not found:
        return 0, 0.0
    groups, meta = load_checkpoint(found[-1])
    with torch.no_grad():
        for (name, parameter), shadow in zip(named.items(), ema.shadow_params, strict=True):
            parameter.copy_(groups["weights"][name])
            shadow.copy_(groups["ema"][name])
        for name, buffer in buffers.items():
            buffer.copy_(groups["buffers"][name])
    ema.optimization_step = meta["step"]
    slots: dict[str, dict[str, Tensor]] = {}
    for key, value in groups["optimizer"].items():
        name, _, slot = key.rpartition("/")
        # The fused optimiser walks weights and moments in memory order: both must have the weights' layout.
        like = named[name] if value.shape == named[name].shape else value
        slots.setdefault(name, {})[slot] = torch.empty_like(like, dtype=value.dtype).copy_(value)
    names = {id(p): name for name, p in named.items()}
    for optimizer in optimizers:
        state = {i: slots[names[id(p)]] for i, (p, _) in enumerate(_held(optimizer)) if names[id(p)] in slots}
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return meta["step"], meta["seconds"]


def _held(optimizer: torch.optim.Optimizer) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Return the weights that an optimiser trains, in the order in which its state numbers them, and the state's keys."""
    keys = [p for group in optimizer.param_groups for p in group["params"]]
    return list(zip(optimizer.weights if isinstance(optimizer, Muon) else keys, keys, strict=True))


def _save(accelerator, folder: Path, step: int, seconds: float, named, buffers, optimizers, ema: EMAModel, pace: Pace) -> None:
    if accelerator.is_main_process:
        slots = {id(p): optimizer.state.get(key, {}) for optimizer in optimizers for p, key in _held(optimizer)}
        groups = {
            "weights": dict(named),
            "ema": dict(zip(named, ema.shadow_params, strict=True)),
            "optimizer": {f"{n}/{k}": v for n, p in named.items() for k, v in slots[id(p)].items()},
            "buffers": buffers,
        }
        save_checkpoint(folder, step, groups, {"seconds": seconds})
        keep_last(folder, pace.keep_last)
    accelerator.wait_for_everyone()


def _validate(validate, tracker, step: int, objective: nn.Module, ema: EMAModel, parameters: list[nn.Parameter]) -> Metrics:
    ema.store(parameters)
    ema.copy_to(parameters)
    objective.eval()
    with torch.no_grad():
        metrics = validate(tracker, step)
    objective.train()
    ema.restore(parameters)
    return metrics


def _write(accelerator: Accelerator, file: Path, name: str, step: int, record: Metrics) -> None:
    if accelerator.is_main_process:
        append_metrics(file, {"step": step, **record})
        accelerator.log({f"{name}/{k}": v for k, v in record.items()}, step=step)


def _open_tracker(accelerator: Accelerator, name: str) -> Any:
    if not accelerator.trackers:
        accelerator.init_trackers("tensorboard")
    return accelerator.get_tracker("tensorboard") if accelerator.is_main_process else None


def _any_rank(accelerator: Accelerator, flag: bool) -> bool:
    if accelerator.num_processes == 1:
        return flag
    total: Any = accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum")
    return bool(total.item())


def _check_finite(record: Metrics, name: str, step: int) -> None:
    bad = [key for key, value in record.items() if not math.isfinite(value)]
    if bad:
        raise FloatingPointError(f"{name}: {', '.join(bad)} not finite by step {step}; lower learning_rate or raise warmup")


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
