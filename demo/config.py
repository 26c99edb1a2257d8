"""Sizes and lengths of the demo, and the trainings that they mean."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from promag.data.shards.stream import IN_ORDER
from promag.diffusion.conditioning import Condition
from promag.diffusion.config import BudgetConfig, DiffusionConfig, DiffusionDataConfig, TextConfig, TransformerConfig
from promag.tokenizer.base import BaseConfig
from promag.tokenizer.config import StageConfig, TokenizerConfig, TokenizerDataConfig
from promag.tokenizer.geometry import latent_frames, stage_name, tokens
from promag.training.config import check_seed, required, setting
from promag.training.loop import RunConfig
from promag.training.optimizers import OptimizationConfig
from promag.training.precision import Precision, check_training_precision

SHIPPED = "checkpoints/tiny-video"  # in a checkout; a wheel does not hold it


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Sizes and lengths of the demo."""

    output_dir: str = setting("runs/demo", "run directory")
    videos: str | None = setting(None, "folder of real videos, 65 frames or longer; null generates clips")
    record: str | None = setting(None, "results file that gets a JSON line with the report's figures; null for none")
    seed: int = setting(0, "decides weights, data order and noise")
    precision: Precision = setting("auto", "auto measures which of bf16 and fp32 is faster")
    size: int = setting(64, "height and width in pixels")
    frames: int = setting(65, "frames that text-to-video is trained on and samples: 1 + 16k")
    synthetic_clips: int = setting(1024, "generated clips that are trained on")
    validation_fraction: float = setting(0.1, "part of real videos kept for evaluation, at least one")
    evaluation_clips: int = setting(24, "clips reconstructed for the report's figures")
    shipped: str | None = setting(
        SHIPPED, "trained pipeline whose samples come first, where clips are generated; null for none"
    )
    ratios: tuple[int, ...] = setting((4, 16), "temporal ratios at which one text-to-video model is trained, by turns")
    prompts: int = setting(8, "prompts whose samples are shown")
    scored: int = setting(64, "generated-clip prompts sampled at each ratio and read by the scorer")
    steps: int = setting(16, "denoising steps of the demo's own model")
    guidance: float = setting(3.0, "classifier-free guidance of the demo's own model")
    tokenizer: BaseConfig = required("the tokenizer's base")
    stages: tuple[StageConfig, ...] = required("the tokenizer's levels")
    text: TextConfig = setting(TextConfig(), "text encoders")
    transformer: TransformerConfig = required("text-to-video transformer")
    shift: float = setting(3.0, "shift of the times towards noise, at 256 tokens")
    condition: Condition = setting(Condition(), "conditioning frames, for image-to-video and continuation")
    diffusion: OptimizationConfig = setting(OptimizationConfig(muon_learning_rate=0.02), "optimisation of the transformer")
    run: RunConfig = setting(RunConfig(), "logging, validation, checkpoints")

    def __post_init__(self) -> None:
        """Raise ValueError where ratios and frames do not fit together."""
        check_training_precision(self.precision)
        check_seed(self.seed)
        levels = [stage.ratio for stage in self.stages]
        unknown = [ratio for ratio in self.ratios if ratio not in levels]
        if unknown or not self.ratios:
            raise ValueError(f"ratios {self.ratios}: choose among the stages' {', '.join(map(str, levels))}")
        latent_frames(self.frames, max(levels))

    def tokens(self, ratio: int) -> int:
        """Return the tokens of a clip at a temporal ratio; raises ValueError where patches do not divide the latent."""
        return tokens(self.frames, self.size, self.size, ratio, self.transformer.patch_size, self.tokenizer.spatial_ratio)


def tokenizer_folder(config: DemoConfig) -> Path:
    """Return the run directory of the tokenizer's training."""
    return Path(config.output_dir) / "tokenizer-run"


def stage_folder(config: DemoConfig, stage: StageConfig) -> Path:
    """Return the folder of checkpoints and metrics of one of the tokenizer's stages."""
    return tokenizer_folder(config) / stage.name


def video_folder(config: DemoConfig) -> Path:
    """Return the folder of checkpoints and metrics of the text-to-video training."""
    return Path(config.output_dir) / "video" / stage_name(config.ratios)


def tokenizer_config(config: DemoConfig, train: str, evaluation: str) -> TokenizerConfig:
    """Return the tokenizer training that the demo's settings mean."""
    return TokenizerConfig(
        output_dir=str(tokenizer_folder(config)),
        seed=config.seed,
        precision=config.precision,
        model=config.tokenizer,
        data=TokenizerDataConfig(
            train=train,
            validation=evaluation,
            synthetic_clips=config.synthetic_clips,
            size=config.size,
            temporal_strides=(1,),
            validation_clips=8,
            sharding=IN_ORDER,
        ),
        stages=config.stages,
        run=config.run,
    )


def diffusion_config(config: DemoConfig, tokenizer: Path, train: str, evaluation: str) -> DiffusionConfig:
    """Return the text-to-video training, at all ratios, that the demo's settings mean."""
    run = Path(config.output_dir)
    return DiffusionConfig(
        output_dir=str(run / "video"),
        seed=config.seed,
        precision=config.precision,
        tokenizer=str(tokenizer),
        budgets=tuple(BudgetConfig(ratio=ratio) for ratio in config.ratios),
        shift=config.shift,
        condition=config.condition,
        text=config.text,
        model=config.transformer,
        data=DiffusionDataConfig(
            train=train,
            validation=evaluation,
            synthetic_clips=config.synthetic_clips,
            validation_clips=16,
            frames=config.frames,
            size=config.size,
            cache=str(run / "latents"),
        ),
        optimization=config.diffusion,
        run=dataclasses.replace(config.run, workers=0),  # cached latents are read in a millisecond
    )
