"""Suite `transformer`: gradients of a training batch, and denoising, by temporal ratio.

Untrained weights, random latents and text. Gradients are the forward and the backward pass alone: suite `train` has the whole
step. Denoising predicts with and without text, as guidance needs, and decodes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from promag.data.buckets import sides
from promag.diffusion.config import DiffusionConfig
from promag.evaluation.budgets import Budget
from promag.evaluation.cost import BudgetCosts
from promag.tokenizer.geometry import SPATIAL_RATIO, tokens
from promag.training.config import UserError
from promag.training.precision import Chosen

from .cases import Group, Job, Options, way
from .subjects import diffusion_preset, find_presets, preset_name

CHANNELS = 8  # channels of the latents; they play no part but in the first and the last layer
DENOISING_STEPS = 4


@dataclass(frozen=True)
class Load:
    """What suits a preset on a kind of device: its height and width in pixels, clips in a step, videos denoised at once."""

    size: int | tuple[int, int]
    clips: int
    videos: int


LOADS = {
    "cpu": {"tiny": Load(64, 16, 8), "small": Load(128, 4, 1), "base": Load(128, 1, 1)},
    "cuda": {"tiny": Load(64, 256, 64), "small": Load(128, 64, 16), "base": Load(256, 8, 4)},
}
RANKS = {"cpu": {"tiny": 0, "base": 2}, "cuda": {"base": 0, "small": 0, "tiny": 2}}  # ranks of whole steps; their parts follow


@dataclass(frozen=True)
class Measured:
    """A preset with its load, at one precision and way to run."""

    name: str
    config: DiffusionConfig
    load: Load
    precision: Chosen
    compiled: bool
    graphs: bool
    rank: int

    def settings(self, options: Options, part: str, ratio: int, batch: int) -> dict[str, Any]:
        """Return what identifies a case."""
        shape = [batch, 3, options.frames, *sides(self.load.size)]
        case = {"part": part, "model": self.name, "ratio": ratio, "shape": shape}
        return {**case, "precision": self.precision, **way(self.compiled, self.graphs)}

    def tokens(self, options: Options, ratio: int) -> int:
        """Return the tokens of a clip."""
        return tokens(options.frames, *sides(self.load.size), ratio, self.config.own_model.patch_size)

    def costs(self, options: Options) -> BudgetCosts:
        """Return what builds the calls, with a new transformer."""
        budgets = [Budget(f"{r}x", None, r, SPATIAL_RATIO, CHANNELS, True) for r in options.ratios]
        config = replace(self.config, compile=self.compiled, graphs=self.graphs, precision=self.precision)
        return BudgetCosts(budgets, config, *sides(self.load.size), options.device)


def measured(options: Options) -> list[Measured]:
    """Return the presets to measure; raises UserError for frames and ratios that a preset does not take."""
    every = []
    for preset in find_presets(options.presets, "diffusion"):
        config, name, kind = diffusion_preset(preset), preset_name(preset), options.device.type
        load = LOADS[kind].get(name, Load(config.data.size, config.optimization.batch_size, 1))
        load = replace(load, clips=options.train_batch_size or load.clips, videos=options.batch_size or load.videos)
        rank = RANKS[kind].get(name, 1)
        every += [
            Measured(name, config, load, precision, compiled, graphs, rank + 2 * (compiled != options.compiled[-1]))
            for precision in options.precisions
            for compiled, graphs in options.ways
        ]
    for one in every:
        for ratio in options.ratios:
            try:
                one.tokens(options, ratio)
            except ValueError as error:
                raise UserError(f"preset {one.name}: {error}") from None
    return every


def groups(options: Options) -> list[Group]:
    """Return two groups for each preset, precision and way to run."""
    return [group for one in measured(options) for group in (_gradients(one, options), _denoising(one, options))]


def _gradients(one: Measured, options: Options) -> Group:
    clips = one.load.clips

    def build() -> Sequence[Job]:
        costs = one.costs(options)
        return [
            Job(
                costs.training(budget, options.frames, clips, optimize=False),
                clips,
                clips * costs.gflops(budget, options.frames, training=True),
                {"tokens": clips * costs.tokens(budget, options.frames), "attention": costs.attention},
            )
            for budget in costs.budgets
        ]

    settings = [one.settings(options, "gradients", ratio, clips) for ratio in options.ratios]
    return Group("transformer", settings, build, "product", one.rank + 1, memory=not one.graphs)


def _denoising(one: Measured, options: Options) -> Group:
    videos = one.load.videos

    def build() -> Sequence[Job]:
        costs = one.costs(options)
        return [
            Job(
                costs.denoising(budget, options.frames, DENOISING_STEPS, videos),
                videos * DENOISING_STEPS,
                2 * videos * DENOISING_STEPS * costs.gflops(budget, options.frames, training=False),
                {"tokens": videos * costs.tokens(budget, options.frames), "attention": costs.attention},
            )
            for budget in costs.budgets
        ]

    settings = [one.settings(options, "denoising", ratio, videos) | {"steps": DENOISING_STEPS} for ratio in options.ratios]
    return Group("transformer", settings, build, "product", one.rank + 1, memory=not one.graphs)
