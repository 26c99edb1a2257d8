"""Suite `train`: whole training steps, of the transformer at each ratio and of the tokenizer at each level.

A step is the forward and the backward pass, clipping, the optimisers (Muon for the matrices where the preset has it) and the
average of the weights; data come ready on the device. FLOPs are the model's own: recomputation and optimisers are left out.
The tokenizer's loss is that of pixels and KL: without LPIPS, discriminator and the steps on latents.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from promag.tokenizer.config import StageConfig, TokenizerConfig
from promag.tokenizer.convolution import use_channels_last
from promag.tokenizer.objectives import StageObjective
from promag.tokenizer.train import train_only
from promag.training.compilation import compile_blocks
from promag.training.loop import seeded
from promag.training.precision import Chosen, autocast

from .cases import Group, Job, Options
from .step import WeightUpdate
from .subjects import find_presets, grow, tokenizer_subject
from .transformer import Measured, measured

PART = "train step"


@dataclass(frozen=True)
class Load:
    """What suits a preset of a tokenizer on a kind of device: height and width in pixels, clips in a step."""

    size: int
    clips: int


LOADS = {
    "cpu": {"tiny": Load(64, 4), "small": Load(64, 4), "base": Load(64, 4)},
    "cuda": {"tiny": Load(64, 32), "small": Load(128, 8), "base": Load(128, 2)},
}
RANKS = {"tiny": 1, "small": 1, "base": 3}


def groups(options: Options) -> list[Group]:
    """Return a group for each transformer, precision and way to run, and one for each stage of each tokenizer."""
    transformers = [_transformer(one, options) for one in measured(options)]
    return transformers + [
        _tokenizer(subject.name, subject.config, stage, ratio, precision, compiled, options)
        for subject in map(tokenizer_subject, find_presets(options.presets, "tokenizer"))
        if subject.config
        for precision in options.precisions
        for compiled in options.compiled
        for stage in subject.config.stages
        for ratio in sorted({*stage.turns} & {*options.ratios})
    ]


# -- the transformer -------------------------------------------------------------------------------------------------


def _transformer(one: Measured, options: Options) -> Group:
    """Return steps of equal clips at every ratio and, on a GPU, of as many clips as have the tokens of the first ratio."""
    batches = [(ratio, one.load.clips) for ratio in options.ratios]
    if options.device.type == "cuda":
        tokens = {ratio: one.tokens(options, ratio) for ratio in options.ratios}
        most = max(tokens.values()) * one.load.clips
        batches += [(ratio, most // tokens[ratio]) for ratio in options.ratios if most // tokens[ratio] > one.load.clips]

    def build() -> Sequence[Job]:
        costs = one.costs(options)
        budgets = {budget.ratio: budget for budget in costs.budgets}
        first = costs.budgets[0]
        facts = {"attention": costs.attention, "parameters": costs.parameters(first), "muon_gflop": costs.muon_gflops(first)}
        return [
            Job(
                costs.training(budgets[ratio], options.frames, clips),
                clips,
                clips * costs.gflops(budgets[ratio], options.frames, training=True),
                {**facts, "tokens": clips * costs.tokens(budgets[ratio], options.frames)},
            )
            for ratio, clips in batches
        ]

    settings = [one.settings(options, PART, ratio, clips) for ratio, clips in batches]
    # A recorded step runs as it is, then it is recorded, then replayed.
    return Group("train", settings, build, "product", one.rank, memory=not one.graphs, warm_up=3 if one.graphs else 1)


# -- the tokenizer ---------------------------------------------------------------------------------------------------


def _tokenizer(
    name: str,
    config: TokenizerConfig,
    stage: StageConfig,
    ratio: int,
    precision: Chosen,
    compiled: bool,
    options: Options,
) -> Group:
    load = LOADS[options.device.type].get(name, Load(config.data.size, stage.optimization.batch_size))
    clips = options.train_batch_size or load.clips
    shape = [clips, 3, stage.frames, load.size, load.size]
    settings = {"part": PART, "model": f"tokenizer {name}", "stage": stage.name, "ratio": ratio, "shape": shape}
    settings |= {"precision": precision, "compiled": compiled}
    pixels = replace(stage, latent_pretrain_steps=0, perceptual=None, adversarial=None)
    if stage.by_turns:
        pixels = replace(pixels, ratio=ratio, by_turns=None)  # a batch of that ratio

    def build() -> Sequence[Job]:
        with torch.device("meta"):
            objective = stage_objective(config, stage, pixels)
            with FlopCounterMode(display=False) as counter:
                objective({"video": torch.empty(shape)}, [seeded(i) for i in range(clips)], 0)["loss"].backward()
        facts = {"parameters": sum(p.numel() for p in objective.parameters() if p.requires_grad)}
        facts["gradient_checkpointing"] = config.gradient_checkpointing
        step = tokenizer_step(config, stage, pixels, shape, options.device, precision, compiled)
        return [Job(step, clips, counter.get_total_flops() / 1e9, facts)]

    return Group("train", [settings], build, "convolution", RANKS.get(name, 2))


def stage_objective(config: TokenizerConfig, stage: StageConfig, pixels: StageConfig) -> StageObjective:
    """Return what a stage trains, on a new model, with the losses of `pixels`; as train_stage prepares it."""
    model, added = grow(config, stage)
    use_channels_last(model)
    train_only(model, stage, added)
    return StageObjective(model, pixels, added)


def tokenizer_step(
    config: TokenizerConfig,
    stage: StageConfig,
    pixels: StageConfig,
    shape: Sequence[int],
    device: torch.device,
    precision: Chosen,
    compiled: bool = False,
) -> Callable[[], None]:
    """Return a call that does one whole training step on random pixels (B C T H W)."""
    torch.manual_seed(0)
    with torch.device(device):
        objective = stage_objective(config, stage, pixels).train()
        x = torch.rand(*shape) * 2 - 1
    model: Any = objective.model
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if compiled:
        compile_blocks(model)
    update = WeightUpdate(objective, stage.optimization, precision)
    generators = [seeded(i, device=device) for i in range(shape[0])]

    def step() -> None:
        with autocast(device, precision):
            loss = objective({"video": x}, generators, 0)["loss"]
        loss.backward()
        update()

    return step
