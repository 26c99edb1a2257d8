"""Token budgets side by side: reconstructions of the same clips by the levels of a tokenizer and by other autoencoders.

Shapes: B C T H W pixels in [-1, 1], b c t h w latents; kept videos are uint8 (T, H, W, 3).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor

from promag.tokenizer.checkpoint import load_tokenizer
from promag.tokenizer.geometry import SPATIAL_RATIO, check_ratio, check_size, latent_frames, tokens
from promag.tokenizer.metrics import evaluate_fully, from_uint8, psnr_per_frame, to_uint8
from promag.tokenizer.packaged_metrics import PerceptualMetrics
from promag.training.precision import Precision

from .bitrate import RateMeter

PATCHES = ((1, 1, 1), (1, 2, 2))
STORED_BITS = 16  # a latent value in a cache is bfloat16


@dataclass(frozen=True)
class CodedSize:
    """A clip's size in pixels, and the temporal and spatial ratio at which it is coded."""

    frames: int
    height: int
    width: int
    ratio: int
    spatial: int = SPATIAL_RATIO

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Frames, height and width (t h w) of the latent."""
        return latent_frames(self.frames, self.ratio), self.height // self.spatial, self.width // self.spatial

    def tokens(self, patch: tuple[int, int, int]) -> int:
        """Return the tokens at a transformer's patch size; raises ValueError where patches do not divide the latent."""
        return tokens(**asdict(self), patch=patch)


@dataclass(frozen=True, eq=False)
class Budget:
    """One way to spend tokens on a clip: a model at one temporal ratio."""

    name: str
    model: Any
    ratio: int
    spatial: int  # pixels a side of a latent position
    channels: int  # channels of the latent
    own: bool  # a level of the compared checkpoint, not another model
    step: int | None = None  # it takes 1 + step*k frames; None is the ratio

    def coded_frames(self, frames: int) -> int:
        """Return the shortest legal length of at least `frames` frames; clips are padded to it."""
        return frames + -(frames - 1) % (self.step or self.ratio)

    def size(self, frames: int, height: int, width: int) -> CodedSize:
        """Return a clip's size at this budget."""
        return CodedSize(self.coded_frames(frames), height, width, self.ratio, self.spatial)

    def tokens(self, frames: int, height: int, width: int, patch: tuple[int, int, int]) -> int | None:
        """Return the tokens of a clip at a transformer's patch size; None where patches do not divide the latent."""
        try:
            return self.size(frames, height, width).tokens(patch)
        except ValueError:
            return None

    def latent_values(self, frames: int, height: int, width: int) -> int:
        """Return the number of values in a clip's latent."""
        return self.channels * self.size(frames, height, width).tokens((1, 1, 1))

    def facts(self, frames: int, height: int, width: int) -> dict[str, Any]:
        """Return what a clip's size decides: ratios, latent frames, tokens by patch size, values and bits per pixel."""
        values = self.latent_values(frames, height, width)
        pixels = frames * height * width
        return {
            "ratio": self.ratio,
            "spatial_ratio": self.spatial,
            "latent_channels": self.channels,
            "latent_frames": latent_frames(self.coded_frames(frames), self.ratio),
            "coded_frames": self.coded_frames(frames),
            "tokens": {"x".join(map(str, p)): self.tokens(frames, height, width, p) for p in PATCHES},
            "latent_values": values,
            "latent_values_per_pixel": values / pixels,
            "stored_bits_per_pixel": STORED_BITS * values / pixels,
        }


def own_budgets(model: Any) -> list[Budget]:
    """Return a budget for each temporal ratio of one of our tokenizers, most tokens first."""
    levels = zip(model.temporal_ratios, model.level_channels, strict=True)
    space, step = model.spatial_ratio, model.latent_step
    return [Budget(f"{ratio}x", model, ratio, space, channels, True, ratio * step) for ratio, channels in levels]


def baseline_budget(name: str, folder: str | Path, ratio: int | None = None) -> Budget:
    """Return the budget of another autoencoder of diffusers, or of another tokenizer, at a temporal ratio.

    `ratio` may be None where there is one alone. Raises UserError as `load_tokenizer` does, and ValueError for a ratio that
    the model does not have, and for None where it has several.
    """
    budgets = {budget.ratio: budget for budget in own_budgets(load_tokenizer(folder))}
    if ratio is None and len(budgets) > 1:
        raise ValueError(
            f"{folder} has {', '.join(f'{r}x' for r in budgets)}; name one of them, {name}={folder}:{max(budgets)}"
        )
    chosen = next(iter(budgets)) if ratio is None else ratio
    check_ratio(chosen, tuple(budgets))
    return replace(budgets[chosen], name=name, own=False)


def check_budgets(budgets: Sequence[Budget], height: int, width: int) -> None:
    """Raise ValueError where two budgets have one name or the picture does not suit one of them."""
    names = [budget.name for budget in budgets]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two budgets are called {', '.join(twice)}: names must differ")
    for budget in budgets:
        try:
            check_size(height, width, budget.spatial)
        except ValueError as error:
            raise ValueError(f"{budget.name}: {error}") from None


class MeasuredModel(torch.nn.Module):
    """A budget's model for `evaluate_fully` that also measures the rate of its latents and passes each video to `keep`."""

    def __init__(self, budget: Budget, keep: Callable[[np.ndarray], None]):
        super().__init__()
        self.budget, self.keep, self.rate = budget, keep, RateMeter()

    @property
    def device(self) -> Any:
        """The device of the weights."""
        return self.budget.model.device

    @property
    def dtype(self) -> Any:
        """The type of the weights."""
        return self.budget.model.dtype

    def forward(self, clip: Tensor, temporal_ratio: int) -> DecoderOutput:
        """Reconstruct a clip from the posterior's mean; a clip that is too short is padded by its last frame, then cropped."""
        added = self.budget.coded_frames(clip.shape[2]) - clip.shape[2]
        padded = F.pad(clip, (0, 0, 0, 0, 0, added), mode="replicate") if added else clip
        posterior = self.budget.model.encode(padded, temporal_ratio).latent_dist
        self.rate.add(posterior)
        output = self.budget.model.decode(posterior.mode(), temporal_ratio).sample
        if output.shape != padded.shape:
            raise ValueError(f"{self.budget.name}: a clip of {tuple(padded.shape)} is reconstructed as {tuple(output.shape)}")
        output = output[:, :, : clip.shape[2]]
        self.keep(to_uint8(output)[0].cpu().numpy())
        return DecoderOutput(sample=output)


@dataclass(frozen=True, eq=False)
class ClipFacts:
    """A compared clip and the .npy files of its videos: the original and each budget's reconstruction."""

    name: str
    caption: str
    fps: float
    videos: Mapping[str, Path]
    psnr_per_frame: dict[str, list[float]]


ORIGINAL = "original"


def compare_reconstructions(
    budgets: Sequence[Budget],
    clips: Any,
    folder: Path,
    perceptual: PerceptualMetrics | None = None,
    on_progress: Callable[[str], None] = lambda line: None,
    precision: Precision = "auto",
) -> tuple[dict[str, dict[str, Any]], list[ClipFacts]]:
    """Reconstruct every clip at every budget; return the figures by budget, and the clips.

    The figures are those of `evaluate_fully`, and `kl_bits_per_pixel` (bitrate.py; None where a model has no variance).

    Args:
        budgets: the budgets to compare.
        clips: an open dataset; the first frames of each clip are taken, as `promag evaluate-tokenizer` does.
        folder: where the videos are written, one file for each clip and budget.
        perceptual: metrics of trained models; see `evaluate_fully`.
        on_progress: called with a line after each budget.
        precision: precision in which models with float32 weights run.
    """
    names = (ORIGINAL, *(budget.name for budget in budgets))
    facts, pixels = [], 0
    for i, label in enumerate(_labels(clips)):
        item = clips.fixed(i)
        paths = {name: folder / f"{i:04d}-{j:02d}.npy" for j, name in enumerate(names)}
        np.save(paths[ORIGINAL], to_uint8(item["video"][None])[0].numpy())
        facts.append(ClipFacts(label, item["caption"], float(item["fps"]), paths, {}))
        pixels += item["video"][0].numel()
    figures: dict[str, dict[str, Any]] = {}
    for budget in budgets:
        remaining = iter(facts)

        def keep(video: np.ndarray, name: str = budget.name, remaining: Iterator[ClipFacts] = remaining) -> None:
            clip = next(remaining)
            np.save(clip.videos[name], video)
            pair = (from_uint8(torch.from_numpy(x[None])) for x in (video, np.load(clip.videos[ORIGINAL])))
            clip.psnr_per_frame[name] = psnr_per_frame(*pair)[0].tolist()

        model = MeasuredModel(budget, keep)
        videos = (clips.fixed(i)["video"][None] for i in range(len(facts)))
        quality = evaluate_fully(model, videos, budget.ratio, perceptual, precision, [clip.fps for clip in facts])
        bits = model.rate.bits()
        figures[budget.name] = {**quality, "kl_bits_per_pixel": None if bits is None else bits / pixels}
        on_progress(f"{budget.name}: {len(facts)} clips, {quality['psnr']:.2f} dB")
    return figures, facts


def _labels(clips: Any) -> list[str]:
    """Return a label for each clip: its number, and its file's name if it has one."""
    rows = getattr(clips, "clips", None)
    return [str(i) if rows is None else f"{i} {Path(str(rows[i].path)).stem}" for i in range(len(clips))]
