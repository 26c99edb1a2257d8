"""Cost of a token budget for a transformer: arithmetic, time and memory, at one clip length and over many.

Weights are untrained and latents random: cost does not depend on them. Budgets are measured in turns, round after round, so
that a slow moment of the machine affects all of them. Clip lengths that exceed a limit of time are extrapolated by a curve in
the number of tokens N, a + b N + c N^2 with no negative coefficient, fitted to the measured lengths with the smallest relative
errors: attention is quadratic in N, everything else linear, and launching kernels constant.
"""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from promag.diffusion.attention import choose_attention
from promag.diffusion.config import DiffusionConfig
from promag.diffusion.families import hidden_matrices
from promag.diffusion.flops import forward_flops, training_flops
from promag.diffusion.flow import flow_times, sample_flow, velocity
from promag.diffusion.transformer import ProMAGTransformer3DModel
from promag.training.compilation import compile_blocks
from promag.training.device import best_device
from promag.training.graphs import enable_graphs
from promag.training.loop import Objective
from promag.training.optimizers import OptimizationConfig, muon_flops
from promag.training.precision import DTYPES, Chosen, Precision, autocast, choose_precision

from .budgets import Budget, CodedSize
from .speed.step import WeightUpdate
from .speed.timing import MIB, free_bytes, measure_in_turns, peak_bytes

RANDOM_TEXT_TOKENS = 24  # tokens of random text from each text encoder
LENGTHS = (17, 33, 65, 129, 257, 513, 1025)  # pixel frames
MEASURES = ("train_step_seconds", "denoising_step_seconds", "gradient_peak_mib")


# -- what is measured ------------------------------------------------------------------------------------------------


class TransformerAlone(Objective):
    """A transformer without its text model: the same optimisers, random text."""

    def __init__(self, transformer: ProMAGTransformer3DModel):
        super().__init__()
        self.transformer = transformer

    def matrices(self) -> list[torch.nn.Parameter]:
        """Return the weights that Muon trains."""
        return hidden_matrices(self.transformer)


def train_step(
    transformer: Any, size: CodedSize, batch_size: int, update: WeightUpdate | None, precision: Precision = "auto"
) -> Callable[[], None]:
    """Return a call that does one training step on random latents and text, ending with `update` of the transformer.

    With `update` None it ends with the gradients: forward and backward alone.
    """
    text_tokens = [RANDOM_TEXT_TOKENS] * len(transformer.text_dims)
    loss = random_loss(transformer, size, batch_size, text_tokens, precision)

    def step() -> None:
        loss().backward()
        if update:
            update()
        transformer.zero_grad()

    return step


def random_loss(
    transformer: Any, size: CodedSize, batch_size: int, text_tokens: Sequence[int], precision: Precision = "auto"
) -> Callable[[], Tensor]:
    """Return a call that computes the loss on random latents and text, with so many tokens from each text encoder."""
    device = transformer.device
    x, noise = torch.randn(2, batch_size, *_latent_shape(transformer, size), device=device)
    text, pooled = _random_text(transformer, batch_size, text_tokens)

    def loss() -> Tensor:
        times = torch.full((batch_size,), 500.0, device=device)
        with autocast(device, precision):
            predicted = transformer(x, times, text, pooled_projections=pooled, temporal_ratio=size.ratio, return_dict=False)[0]
            return (predicted.float() - velocity(x, noise)).square().mean()

    return loss


def _latent_shape(transformer: Any, size: CodedSize) -> tuple[int, int, int, int]:
    """Return c t h w of a clip's latent."""
    return transformer.config["in_channels"], *size.latent_shape


def _random_text(transformer: Any, count: int, tokens: Sequence[int]) -> tuple[list[Tensor], Tensor | None]:
    """Return random text of `count` prompts, with so many tokens from each text encoder, and its pooled vectors if any."""
    device, pooled = transformer.device, transformer.config["pooled_dim"]
    sizes = zip(tokens, transformer.text_dims, strict=True)
    text = [torch.randn(count, length, width, device=device) for length, width in sizes]
    return text, torch.randn(count, pooled, device=device) if pooled else None


def denoising(
    transformer: Any, size: CodedSize, steps: int, videos: int = 1, precision: Precision = "auto"
) -> Callable[[], None]:
    """Return a call that denoises random latents of `videos` videos at once, text encoding and decoding aside.

    Each step predicts with and without text, as guidance needs.
    """
    device = transformer.device
    noise = torch.randn(2 * videos, *_latent_shape(transformer, size), device=device)
    text, pooled = _random_text(transformer, 2 * videos, [RANDOM_TEXT_TOKENS] * len(transformer.text_dims))

    def velocity_at(x: Tensor, times: Tensor) -> Tensor:
        predicted = transformer(x, 1000 * times, text, pooled_projections=pooled, temporal_ratio=size.ratio, return_dict=False)
        return predicted[0]

    def call() -> None:
        with autocast(device, precision):
            sample_flow(velocity_at, noise, flow_times(steps))

    return call


def sampling(
    pipe: Any,
    prompts: list[str],
    steps: int,
    guidance: float,
    ratio: int,
    precision: Precision = "auto",
    **size: int,
) -> Callable[[], Any]:
    """Return a call that samples one video for each prompt, in one batch, from text to pixels."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)

    def call() -> Any:
        with autocast(pipe.device, precision):
            return pipe(
                prompts,
                num_inference_steps=steps,
                guidance_scale=guidance,
                temporal_ratio=ratio,
                generator=generator,
                **size,
            ).frames

    return call


# -- budgets ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Effort:
    """Extent of the measurement."""

    batch: int  # clips in a training step
    steps: int  # denoising steps of a video; 0 leaves denoising out
    rounds: int  # timed rounds, of which the median counts
    videos: int = 1  # denoised at once
    seconds: float = 0.0  # limit for the lengths, all budgets together


class BudgetCosts:
    """Measures the budgets that a configuration's transformer can take, one transformer for each number of channels.

    `budgets` has those whose latent the transformer's patches divide, `attention` the chosen kernel, `precision` the chosen
    type. Raises UserError for a configuration without a transformer of its own.
    """

    def __init__(
        self,
        budgets: Sequence[Budget],
        config: DiffusionConfig,
        height: int,
        width: int,
        device: torch.device | None = None,
    ):
        shape = config.own_model
        self.optimization: OptimizationConfig = config.optimization
        self.graphs = config.graphs
        self.height, self.width, self.device = height, width, device or best_device()
        self.precision: Chosen = choose_precision(config.precision, self.device)
        self.patch: tuple[int, int, int] = tuple(shape.patch_size)  # pyright: ignore[reportAttributeAccessIssue]
        self.budgets = [b for b in budgets if b.tokens(LENGTHS[0], height, width, self.patch) is not None]
        self.attention, self._models = "", {}
        self._updates: dict[int, WeightUpdate] = {}
        for channels in dict.fromkeys(budget.channels for budget in self.budgets):
            torch.manual_seed(config.seed)
            text: dict[str, Any] = {"text_dim": config.text.width, "pooled_dim": config.text.width}
            model: Any = ProMAGTransformer3DModel(**asdict(shape), **text, in_channels=channels)
            self._models[channels] = model.to(self.device).train()
            self.attention = choose_attention(model, config.attention, self.device, DTYPES[self.precision])
            if config.compile:
                compile_blocks(model)
            if config.graphs:
                enable_graphs(model)

    def parameters(self, budget: Budget) -> int:
        """Return the transformer's number of weights."""
        return sum(p.numel() for p in self._models[budget.channels].parameters())

    def muon_gflops(self, budget: Budget) -> float:
        """Return the arithmetic of Muon in a step; 0 where AdamW trains all."""
        matrices = hidden_matrices(self._models[budget.channels]) if self.optimization.muon_learning_rate else []
        return sum(muon_flops(matrix.shape, self.precision) for matrix in matrices) / 1e9

    def tokens(self, budget: Budget, frames: int) -> int:
        """Return the tokens of a clip."""
        count = budget.tokens(frames, self.height, self.width, self.patch)
        assert count is not None
        return count

    def gflops(self, budget: Budget, frames: int, training: bool) -> float:
        """Return the arithmetic of one clip, counted by formula."""
        count = training_flops if training else forward_flops
        return count(self._models[budget.channels].config, self.tokens(budget, frames), RANDOM_TEXT_TOKENS) / 1e9

    def training(self, budget: Budget, frames: int, batch: int, optimize: bool = True) -> Callable[[], None]:
        """Return a call that does a training step, or without `optimize` its forward and backward pass alone."""
        size, update = budget.size(frames, self.height, self.width), self._update(budget) if optimize else None
        return train_step(self._models[budget.channels], size, batch, update, self.precision)

    def _update(self, budget: Budget) -> WeightUpdate:
        """Return the one update of a transformer, whose moments and averages all its budgets share."""
        if budget.channels not in self._updates:
            objective = TransformerAlone(self._models[budget.channels])
            self._updates[budget.channels] = WeightUpdate(objective, self.optimization, self.precision, self.graphs)
        return self._updates[budget.channels]

    def denoising(self, budget: Budget, frames: int, steps: int, videos: int = 1) -> Callable[[], None]:
        """Return a call that denoises videos with guidance."""
        size = budget.size(frames, self.height, self.width)
        return denoising(self._models[budget.channels], size, steps, videos, self.precision)

    def decoding(self, budget: Budget, frames: int) -> Callable[[], None]:
        """Return a call that decodes the latents of one video."""
        model, size = budget.model, budget.size(frames, self.height, self.width)
        z = torch.randn(1, budget.channels, *size.latent_shape, device=model.device, dtype=model.dtype)

        @torch.no_grad()
        def call() -> None:
            with autocast(z.device, self.precision, z.dtype):
                model.decode(z, budget.ratio)

        return call

    def measure_length(self, frames: int, effort: Effort) -> dict[str, dict[str, Any]]:
        """Measure every budget in turns at one clip length; return figures by its name.

        Seconds of denoising, decoding and sampling (both together) are those of one video. Without denoising steps, and for
        budgets without a model, the figures that need them are left out.
        """
        by_name = {budget.name: budget for budget in self.budgets}
        calls = {
            "gradient": {name: self.training(b, frames, effort.batch, optimize=False) for name, b in by_name.items()},
            "train_step": {name: self.training(b, frames, effort.batch) for name, b in by_name.items()},
            "denoising": {
                name: self.denoising(b, frames, effort.steps, effort.videos) for name, b in by_name.items() if effort.steps
            },
            "decoding": {name: self.decoding(b, frames) for name, b in by_name.items() if b.model is not None},
        }
        seconds = {kind: measure_in_turns(of_kind, effort.rounds) for kind, of_kind in calls.items()}
        rows: dict[str, dict[str, Any]] = {}
        for name, budget in by_name.items():
            rows[name] = row = {
                "tokens": self.tokens(budget, frames),
                "parameters": self.parameters(budget),
                "forward_gflops": self.gflops(budget, frames, training=False),
                "training_gflops": self.gflops(budget, frames, training=True),
            }
            row |= {f"{kind}_seconds": of_kind[name] for kind, of_kind in seconds.items() if name in of_kind}
            row["train_peak_mib"] = peak_bytes(calls["train_step"][name]) / MIB
            if "denoising_seconds" in row:
                row["denoising_seconds"] /= effort.videos
                row["denoising_peak_mib"] = peak_bytes(calls["denoising"][name]) / MIB
            if {"denoising_seconds", "decoding_seconds"} <= row.keys():
                row["sampling_seconds"] = row["denoising_seconds"] + row["decoding_seconds"]
        return rows

    def measure_lengths(self, effort: Effort) -> dict[str, list[dict[str, Any]]]:
        """Return, by budget, points for each of LENGTHS: frames, tokens, training_gflops, MEASURES, and `measured`.

        A point is a training step of one clip, one denoising step with guidance, and the peak memory of forward and backward
        pass, whose growth no optimiser hides. Short clips are measured first. A length is left to the fitted curve where its
        measurement would end after `effort.seconds`, or where it would take too much memory.
        """
        started, points = time.perf_counter(), {budget.name: [] for budget in self.budgets}
        seconds_per_gflop: dict[str, float] = {}  # each budget's last measurement
        for frames, budget in itertools.product(LENGTHS, self.budgets):
            point: dict[str, Any] = {"frames": frames, "tokens": self.tokens(budget, frames)}
            point["training_gflops"] = work = self.gflops(budget, frames, training=True)
            before = time.perf_counter()
            # The first length is always measured, or there would be nothing to fit a curve to.
            expected = seconds_per_gflop.get(budget.name)
            in_time = expected is None or before - started + expected * work <= effort.seconds
            point["measured"] = in_time and self._has_room(points[budget.name], work)
            if point["measured"]:
                point |= self._measure_point(budget, frames)
                seconds_per_gflop[budget.name] = (time.perf_counter() - before) / work
            points[budget.name].append(point)
        for budget in self.budgets:
            self._extrapolate(points, budget)
        return points

    def _measure_point(self, budget: Budget, frames: int) -> dict[str, float]:
        calls = (self.training(budget, frames, 1), self.denoising(budget, frames, 1))
        seconds = [measure_in_turns({"": call}, 1)[""] for call in calls]
        peak = peak_bytes(self.training(budget, frames, 1, optimize=False)) / MIB
        return dict(zip(MEASURES, (*seconds, peak), strict=True))

    def _has_room(self, points: Sequence[Mapping[str, Any]], gflops: float) -> bool:
        """Tell whether a step is likely to fit the memory: the last one's, scaled by arithmetic."""
        last = next((p for p in reversed(points) if p["measured"]), None)
        return last is None or last["gradient_peak_mib"] * MIB * gflops / last["training_gflops"] < 0.8 * free_bytes()

    def _extrapolate(self, points: Mapping[str, list[dict[str, Any]]], budget: Budget) -> None:
        """Fill in what was not measured from the curve of all budgets that share this one's transformer."""
        sharing = [b.name for b in self.budgets if b.channels == budget.channels]
        measured = [point for name in sharing for point in points[name] if point["measured"]]
        for measure in MEASURES:
            curve = fit_curve([(point["tokens"], point[measure]) for point in measured])
            for point in points[budget.name]:
                if not point["measured"]:
                    point[measure] = curve.value(point["tokens"])


@dataclass(frozen=True)
class Curve:
    """y = a + b N + c N^2, fitted to points (N, y)."""

    coefficients: tuple[float, float, float]

    def value(self, tokens: float) -> float:
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
            solution = np.linalg.lstsq(terms[:, chosen], np.ones(len(x)), rcond=None)[0]
            error = float(np.square(terms[:, chosen] @ solution - 1).sum())
            if solution.min() >= 0 and (best is None or error < best[0]):
                coefficients = np.zeros(3)
                coefficients[list(chosen)] = solution
                best = error, tuple(float(c / scale**power) for power, c in enumerate(coefficients))
    assert best is not None  # one positive term alone always fits positive values
    a, b, c = best[1]
    return Curve((a, b, c))


def fit_errors(lengths: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, float | None]:
    """Return, for each measure, the largest error of a curve fitted without a budget's longest measured clip, at that clip.

    A fraction of the measured value, so 0.1 is 10 %; None where no budget has four measured lengths.
    """
    errors: dict[str, float | None] = dict.fromkeys(MEASURES)
    for points in lengths.values():
        measured = [point for point in points if point["measured"]]
        for measure in MEASURES if len(measured) > 3 else ():
            curve = fit_curve([(point["tokens"], point[measure]) for point in measured[:-1]])
            error = abs(curve.value(measured[-1]["tokens"]) / measured[-1][measure] - 1)
            errors[measure] = max(error, errors[measure] or 0.0)
    return errors
