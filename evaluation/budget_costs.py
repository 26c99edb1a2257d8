"""What each token budget costs a transformer: arithmetic, time and memory, at one clip length and over many.

Weights are untrained and latents random: cost does not depend on them. Over clip length, what fits a limit of time is
measured; beyond it follows a curve in the number of tokens N, a + b N + c N^2 with no negative coefficient, fitted to what was
measured with the smallest relative errors: attention is quadratic in N, all else linear, and launching it constant.
"""

import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from promag.diffusion.config import DiffusionConfig
from promag.diffusion.flops import forward_flops, training_flops
from promag.diffusion.transformer import ProMAGTransformer3DModel
from promag.training.device import best_device
from promag.training.optimizers import OptimizationConfig
from promag.training.precision import Precision, autocast

from .budgets import Budget
from .cost import TEXT_TOKENS, denoising, measure_in_turns, peak_bytes, train_step

MIB = 2**20
LENGTHS = (17, 33, 65, 129, 257, 513, 1025)  # pixel frames
MEASURES = ("train_step_seconds", "denoising_step_seconds", "gradient_peak_mib")


@dataclass(frozen=True)
class Effort:
    """How much is measured, and how."""

    batch: int  # clips in a training step
    steps: int  # denoising steps of a video
    rounds: int  # of which the median counts
    seconds: float  # for the lengths, all budgets together


@dataclass(frozen=True)
class Curve:
    """y = a + b N + c N^2, fitted to points (N, y)."""

    coefficients: tuple[float, float, float]

    def at(self, tokens: float) -> float:
        """Return the value at so many tokens."""
        return sum(c * tokens**power for power, c in enumerate(self.coefficients))


def fit_curve(points: Sequence[tuple[float, float]]) -> Curve:
    """Fit by least squares of relative errors: no coefficient is negative, and there are two token counts for each.

    Raises ValueError without points and for values that are not above 0.
    """
    if not points or min(y for _, y in points) <= 0:
        raise ValueError(f"points {list(points)}: at least one is needed, with values above 0")
    x, y = np.array(points, float).T
    scale = x.max()
    terms = np.stack([(x / scale) ** power / y for power in range(3)], 1)
    best: tuple[float, tuple[float, ...]] | None = None
    for count in range(1, min(3, max(1, len(set(x)) // 2)) + 1):
        for chosen in itertools.combinations(range(3), count):
            found = np.linalg.lstsq(terms[:, chosen], np.ones(len(x)), rcond=None)[0]
            error = float(np.square(terms[:, chosen] @ found - 1).sum())
            if found.min() >= 0 and (best is None or error < best[0]):
                coefficients = np.zeros(3)
                coefficients[list(chosen)] = found
                best = error, tuple(float(c / scale**power) for power, c in enumerate(coefficients))
    assert best is not None  # one positive term alone always fits positive values
    a, b, c = best[1]
    return Curve((a, b, c))


class Costs:
    """Measures the budgets that a configuration's transformer can take, one transformer for each number of channels.

    Raises ValueError for a configuration without a transformer of its own.
    """

    def __init__(
        self, budgets: Sequence[Budget], config: DiffusionConfig, height: int, width: int, precision: Precision = "auto"
    ):
        if config.model is None:
            raise ValueError("model null: a configuration with a transformer of its own is needed")
        self.optimization: OptimizationConfig = config.optimization
        self.height, self.width, self.precision = height, width, precision
        self.patch: tuple[int, int, int] = tuple(config.model.patch_size)  # pyright: ignore[reportAttributeAccessIssue]
        self.budgets = [b for b in budgets if b.tokens(LENGTHS[0], height, width, self.patch) is not None]
        self.device = best_device()
        self._models: dict[int, Any] = {}
        for budget in self.budgets:
            if budget.channels not in self._models:
                torch.manual_seed(config.seed)
                text: dict[str, Any] = {"text_dim": config.text.width, "pooled_dim": config.text.width}
                model: Any = ProMAGTransformer3DModel(**asdict(config.model), **text, in_channels=budget.channels)
                self._models[budget.channels] = model.to(self.device)

    def tokens(self, budget: Budget, frames: int) -> int:
        """Return the tokens of a clip."""
        found = budget.tokens(frames, self.height, self.width, self.patch)
        assert found is not None
        return found

    def gflops(self, budget: Budget, frames: int, training: bool) -> float:
        """Return the arithmetic of one clip, counted by formula."""
        count = training_flops if training else forward_flops
        return count(self._models[budget.channels].config, self.tokens(budget, frames), TEXT_TOKENS) / 1e9

    def training(self, budget: Budget, frames: int, batch: int) -> Callable[[], None]:
        """Return a call that does a training step, optimisers included."""
        size = budget.size(frames, self.height, self.width)
        return train_step(
            self._models[budget.channels].train(),
            **size,
            batch_size=batch,
            optimization=self.optimization,
            precision=self.precision,
        )

    def denoising(self, budget: Budget, frames: int, steps: int) -> Callable[[], None]:
        """Return a call that denoises one video with guidance."""
        size = budget.size(frames, self.height, self.width)
        return denoising(self._models[budget.channels], **size, steps=steps, precision=self.precision)

    def decoding(self, budget: Budget, frames: int) -> Callable[[], None]:
        """Return a call that decodes the latents of one video."""
        model, size = budget.model, budget.size(frames, self.height, self.width)
        t = 1 + (size["frames"] - 1) // budget.ratio
        shape = (1, budget.channels, t, self.height // budget.spatial, self.width // budget.spatial)
        z = torch.randn(shape, device=model.device, dtype=model.dtype)

        @torch.no_grad()
        def call() -> None:
            with autocast(z.device, self.precision, enabled=z.dtype == torch.float32):
                model.decode(z, budget.ratio)

        return call

    def at_length(self, frames: int, effort: Effort) -> dict[str, dict[str, Any]]:
        """Measure every budget in turns at one clip length; return figures by its name."""
        by_name = {budget.name: budget for budget in self.budgets}
        trained = {name: self.training(b, frames, effort.batch) for name, b in by_name.items()}
        denoised = {name: self.denoising(b, frames, effort.steps) for name, b in by_name.items()}
        decoded = {name: self.decoding(b, frames) for name, b in by_name.items()}
        seconds = [measure_in_turns(calls, effort.rounds) for calls in (trained, denoised, decoded)]
        return {
            name: {
                "tokens": self.tokens(budget, frames),
                "parameters": sum(p.numel() for p in self._models[budget.channels].parameters()),
                "forward_gflops": self.gflops(budget, frames, training=False),
                "training_gflops": self.gflops(budget, frames, training=True),
                "train_step_seconds": seconds[0][name],
                "denoising_seconds": seconds[1][name],
                "decoding_seconds": seconds[2][name],
                "sampling_seconds": seconds[1][name] + seconds[2][name],
                "train_peak_mib": peak_bytes(trained[name]) / MIB,
                "denoising_peak_mib": peak_bytes(denoised[name]) / MIB,
            }
            for name, budget in by_name.items()
        }

    def over_lengths(self, effort: Effort) -> dict[str, list[dict[str, Any]]]:
        """Return, by budget, points for each of LENGTHS: frames, tokens, training_gflops, MEASURES, and `measured`.

        Measured is a training step of one clip, one denoising step with guidance, and the peak memory of forward and backward
        pass, whose growth no optimiser hides, shortest clips first. A length is left to the fitted curve where its turn would
        end after `effort.seconds`, or where it would take too much memory.
        """
        started, done = time.perf_counter(), {budget.name: [] for budget in self.budgets}
        pace: dict[str, float] = {}  # seconds that a budget's last turn took, by GFLOP
        for frames, budget in itertools.product(LENGTHS, self.budgets):
            point: dict[str, Any] = {"frames": frames, "tokens": self.tokens(budget, frames)}
            point["training_gflops"] = work = self.gflops(budget, frames, training=True)
            before = time.perf_counter()
            # The first length is always measured, or there would be nothing to fit a curve to.
            fits = budget.name not in pace or before - started + pace[budget.name] * work <= effort.seconds
            if fits and self._has_room(done[budget.name], work):
                point |= {"measured": True, **self._turn(budget, frames)}
                pace[budget.name] = (time.perf_counter() - before) / work
            else:
                point["measured"] = False
            done[budget.name].append(point)
        for budget in self.budgets:
            self._extrapolate(done, budget)
        return done

    def _turn(self, budget: Budget, frames: int) -> dict[str, float]:
        trained, denoised = self.training(budget, frames, 1), self.denoising(budget, frames, 1)
        seconds = [measure_in_turns({"": call}, 1)[""] for call in (trained, denoised)]
        size = budget.size(frames, self.height, self.width)
        gradients = train_step(
            self._models[budget.channels].train(), **size, batch_size=1, optimization=None, precision=self.precision
        )
        return dict(zip(MEASURES, (*seconds, peak_bytes(gradients) / MIB), strict=True))

    def _has_room(self, points: Sequence[Mapping[str, Any]], gflops: float) -> bool:
        """Tell whether a step is likely to fit the memory: by what the last one took, grown with its arithmetic."""
        last = next((p for p in reversed(points) if p["measured"]), None)
        return last is None or last["gradient_peak_mib"] * MIB * gflops / last["training_gflops"] < 0.8 * free_bytes()

    def _extrapolate(self, done: Mapping[str, list[dict[str, Any]]], budget: Budget) -> None:
        """Fill in what was not measured from the curve of all budgets that share this one's transformer."""
        alike = [b.name for b in self.budgets if b.channels == budget.channels]
        known = [point for name in alike for point in done[name] if point["measured"]]
        for measure in MEASURES:
            curve = fit_curve([(point["tokens"], point[measure]) for point in known])
            for point in done[budget.name]:
                if not point["measured"]:
                    point[measure] = curve.at(point["tokens"])


def fit_errors(lengths: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, float | None]:
    """Return, for each measure, how far off a curve fitted without a budget's longest measured clip is there, at most.

    A fraction of what was measured, so 0.1 is 10 %; None where no budget has four lengths that were measured.
    """
    errors: dict[str, float | None] = dict.fromkeys(MEASURES)
    for points in lengths.values():
        known = [point for point in points if point["measured"]]
        for measure in MEASURES if len(known) > 3 else ():
            curve = fit_curve([(point["tokens"], point[measure]) for point in known[:-1]])
            error = abs(curve.at(known[-1]["tokens"]) / known[-1][measure] - 1)
            errors[measure] = max(error, errors[measure] or 0.0)
    return errors


def free_bytes() -> int:
    """Return the memory that is free on the device that measures."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
