"""Training a tiny decoder of a tokenizer's latents, at all of its ratios together.

A run directory holds the folder `tiny` (checkpoints, metrics) and `tiny_decoder/`, what was trained.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from promag.data.buckets import Bucket
from promag.data.stream import TrainingStream
from promag.training.config import UserError, check_seed, required, setting
from promag.training.loop import Metrics, Objective, RunConfig, close_trackers, make_accelerator, train
from promag.training.optimizers import OptimizationConfig
from promag.training.precision import Precision, check_training_precision
from promag.training.processes import broadcast_from_main, choose_precision_once, wait_for_everyone
from promag.training.run import open_run, record_data
from promag.training.state import hash_weights
from promag.training.trackers import Log

from .checkpoint import load_tokenizer, save_model
from .clips import check_clips, first_clips, open_training_clips, open_validation_clips, record_videos
from .config import MAY_CHANGE, ClipsConfig
from .convolution import use_channels_last
from .distillation import CrossedAutoencoder, move_teacher
from .losses import reconstruction_loss, reparametrise, squared_loss
from .metrics import evaluate
from .tiny_decoder import TinyDecoder, load_tiny_decoder

FOLDER = "tiny_decoder"


@dataclass(frozen=True, kw_only=True)
class TinyDecoderConfig:
    """A whole training of a tiny decoder."""

    output_dir: str = required("run directory")
    tokenizer: str = required("folder of the tokenizer, or autoencoder of diffusers, whose latents are decoded")
    seed: int = setting(0, "decides weights, data order and noise")
    precision: Precision = setting("auto", "auto measures which of bf16 and fp32 is faster")
    init: str | None = setting(None, "folder of a tiny decoder to go on from; null begins with a linear map")
    width: int = setting(64, "channels of all layers")
    layers: int = setting(2, "residual blocks, which all ratios share")
    target: Literal["clips", "tokenizer"] = setting(
        "clips", "what decoded latents must equal: the clips, or what the tokenizer's decoder makes, which then runs too"
    )
    frames: int = setting(65, "frames per clip: 1 + the highest ratio*k")
    mse_weight: float = setting(6.0, "weight of the squared error beside L1, whose weight is 1")
    data: ClipsConfig = setting(ClipsConfig(), "the clips")
    optimization: OptimizationConfig = setting(OptimizationConfig(muon_learning_rate=0.004), "the optimisation")
    run: RunConfig = setting(RunConfig(), "logging, validation, checkpoints")

    def __post_init__(self) -> None:
        """Raise ValueError for settings that cannot be meant."""
        check_training_precision(self.precision)
        check_seed(self.seed)
        if self.mse_weight < 0 or min(self.width, self.layers) < 1:
            raise ValueError(
                f"mse_weight {self.mse_weight}, width {self.width}, layers {self.layers}: mse_weight must be 0 or "
                "more, width and layers at least 1"
            )


class TinyDecoderObjective(Objective):
    """L1 and squared error of what is decoded from a frozen tokenizer's latents, the mean over its ratios."""

    def __init__(self, model: TinyDecoder, tokenizer: Any, config: TinyDecoderConfig):
        super().__init__()
        self.model, self.mse_weight, self.target = model, config.mse_weight, config.target
        self.tokenizer = (tokenizer,)  # a tuple: it is no part of what is trained, wrapped and saved

    def matrices(self) -> list[nn.Parameter]:
        """Return the kernels between hidden features."""
        return self.model.hidden_kernels()

    def forward(self, batch: dict[str, Any], generators: list[torch.Generator], step: int) -> dict[str, Tensor]:
        """B C T H W in batch["video"] -> loss, its parts."""
        x, ratios = batch["video"], self.model.temporal_ratios
        (tokenizer,) = self.tokenizer
        with torch.no_grad():
            latents = [reparametrise(posterior, generators) for posterior in tokenizer.encode_levels(x, ratios)]
        sums = {"l1": x.new_zeros(()), "squared": x.new_zeros(())}
        for ratio, z in zip(ratios, latents, strict=True):
            with torch.no_grad():
                goal = x if self.target == "clips" else tokenizer.decode(z, ratio).sample
            output = self.model(z, ratio)
            sums["l1"] = sums["l1"] + reconstruction_loss(output, goal) / len(ratios)
            sums["squared"] = sums["squared"] + squared_loss(output, goal) / len(ratios)
        return {"loss": sums["l1"] + self.mse_weight * sums["squared"], **sums}

    @torch.no_grad()
    def fit_linear_path(self, x: Tensor) -> None:
        """Start an untrained decoder as the linear map that fits clips B C T H W best."""
        (tokenizer,), model = self.tokenizer, cast(Any, self.model)
        x = x.to(tokenizer.device)
        latents = [posterior.mode() for posterior in tokenizer.encode_levels(x, model.temporal_ratios)]
        model.to(x.device).fit_linear_path(latents, x)

    def evaluate(self, clips: Sequence[Tensor], precision: Precision) -> Metrics:
        """Return by ratio the PSNR of clips 1 C T H W, encoded by the tokenizer and decoded by what is trained."""
        crossed = CrossedAutoencoder(*self.tokenizer, self.model)
        return {f"psnr_{ratio}x": evaluate(crossed, clips, ratio, precision)["psnr"] for ratio in self.model.temporal_ratios}


def train_tiny_decoder(config: TinyDecoderConfig) -> Path | None:
    """Train, or continue to train, and return the folder of the decoder, None if stopped early.

    Raises UserError for a missing or unsuitable tokenizer, clips or run directory.
    """
    precision = choose_precision_once(config.precision, config.output_dir)
    config = dataclasses.replace(config, precision=precision)
    accelerator = make_accelerator(Path(config.output_dir), precision, config.run.trackers)
    run = open_run(config.output_dir, config, MAY_CHANGE, write=accelerator.is_main_process)
    tokenizer: Any = load_tokenizer(config.tokenizer).requires_grad_(False)
    check_clips(tokenizer, tokenizer.temporal_ratios[-1], config.frames, config.data.size, config.data.size)
    bucket = Bucket(config.frames, config.data.size, config.data.size)
    rank, world, options = accelerator.process_index, accelerator.num_processes, config.optimization
    source, plan = open_training_clips(config.data, [bucket], options, world, config.data.temporal_strides)
    broadcast_from_main(lambda: record_videos(run, config.data))
    broadcast_from_main(lambda: record_data(run, {"tokenizer": hash_weights([tokenizer])}))
    clips = open_validation_clips(config.data, config.frames)

    torch.manual_seed(config.seed)
    model = _model(config, tokenizer)
    if config.init is not None:
        broadcast_from_main(lambda: record_data(run, {"init": hash_weights([model])}))
    use_channels_last(model)
    accelerator.print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters trained\n{plan}")
    move_teacher(tokenizer, tokenizer.temporal_ratios, config.target == "tokenizer", accelerator.device)
    objective = TinyDecoderObjective(model, tokenizer, config)

    def open_stream(first: int) -> TrainingStream:
        return TrainingStream(source, config.seed, options.batch_size, rank, world, first, options.accumulate)

    if config.init is None:
        objective.fit_linear_path(first_clips(source, config.seed, options, world))

    def validate(log: Log, step: int) -> Metrics:
        return objective.evaluate(clips, config.precision)

    outcome = train(accelerator, run / "tiny", objective, open_stream, options, config.run, config.seed, validate)
    if outcome.finished and accelerator.is_main_process:
        save_model(model, run / FOLDER)
    wait_for_everyone()
    close_trackers(accelerator)
    return run / FOLDER if outcome.finished else None


def tiny_decoder_for(tokenizer: Any, width: int = 64, layers: int = 2) -> TinyDecoder:
    """Return an untrained tiny decoder for the latents of a tokenizer; raises UserError for latents that it cannot decode."""
    try:
        return TinyDecoder(
            tokenizer.temporal_ratios, tokenizer.level_channels, tokenizer.spatial_compression_ratio, width=width, layers=layers
        )
    except ValueError as error:
        raise UserError(f"tiny decoder: {error}") from None


def _model(config: TinyDecoderConfig, tokenizer: Any) -> TinyDecoder:
    """Return the decoder to train; raises UserError for one of other latents or of another size than the configuration's."""
    if config.init is None:
        return tiny_decoder_for(tokenizer, config.width, config.layers)
    model: Any = load_tiny_decoder(config.init)
    try:
        model.check_latents_of(tokenizer)
    except ValueError as error:
        raise UserError(f"init {config.init}: {error}") from None
    for name in ("width", "layers"):
        if (value := getattr(config, name)) != model.config[name]:
            raise UserError(f"{name} {value}: the decoder in {config.init} has {model.config[name]}; state that")
    return model
