"""The held-out loss: fixed clips at fixed times with fixed noise, so that two runs or steps differ by the model alone.

Shapes: b c t h w latents.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from promag.training.loop import Metrics, seeded

from .latent_cache import LatentDataset
from .transformer import ProMAGTransformer3DModel

if TYPE_CHECKING:
    from .train import FlowObjective

# Times at which the loss is measured, the same for every shift: the middles of five equal parts of (0, 1).
VALIDATION_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)


class ValidationSet:
    """Held-out clips of one ratio and of one bucket, `shape`.

    The noise is that of a clip's index. Latents are normalised with the training clips' statistics: a model must not see the
    held-out clips' own.
    """

    def __init__(self, unseen: LatentDataset, shape: str, transformer: ProMAGTransformer3DModel, device: torch.device):
        fixed = [unseen.fixed(i) for i in range(len(unseen))]
        x = torch.stack([f["latents"] for f in fixed]) * unseen.std + unseen.mean
        self.ratio, self.shape = unseen.ratio, shape
        self.x = transformer.normalise(x, self.ratio).to(device)
        self.noise = torch.stack([torch.randn(x.shape[1:], generator=seeded(0, i)) for i in range(len(x))]).to(device)
        self.fps = torch.tensor([f["fps"] for f in fixed], device=device)
        rows = [key for text in unseen.texts for key in text.keys.values() if key in fixed[0]]
        self.text: dict[str, Any] = {key: torch.stack([f[key] for f in fixed]).to(device) for key in rows}
        self.text["caption"] = [f["caption"] for f in fixed]

    def __len__(self) -> int:
        """Count the clips."""
        return len(self.x)

    def loss(self, objective: "FlowObjective", first_given: bool = False) -> float:
        """Return the mean over clips and times, of all frames or with the first latent frame given."""
        times = [torch.full((len(self.x),), t, device=self.x.device) for t in VALIDATION_TIMES]
        given = torch.arange(self.x.shape[2], device=self.x.device).expand(len(self.x), -1) < 1 if first_given else None
        text = objective.text(self.text)
        losses = [objective.errors(self.x, self.noise, t, text, self.fps, self.ratio, given).mean() for t in times]
        return float(torch.stack(losses).mean())


def validation_losses(objective: "FlowObjective", parts: Sequence[ValidationSet], first_given: bool) -> Metrics:
    """Return the mean over clips at each ratio, the mean of the ratios, and the mean of each shape where there are several.

    With `first_given` also the mean with the first latent frame given, of clips that have more than one.
    """
    losses = [part.loss(objective) for part in parts]
    found = _grouped("x", parts, losses, [part.ratio for part in parts])
    found |= {"validation_loss": sum(found.values()) / len(found)}
    several = {key: value for key, value in found.items() if len(found) > 2 or key == "validation_loss"}
    shapes = _grouped("", parts, losses, [part.shape for part in parts])
    several |= shapes if len(shapes) > 1 else {}
    longer = [part for part in parts if first_given and part.x.shape[2] > 1]
    if longer:
        given = _grouped("x", longer, [part.loss(objective, True) for part in longer], [part.ratio for part in longer])
        several["validation_loss_first_given"] = sum(given.values()) / len(given)
    return several


def _grouped(unit: str, parts: Sequence[ValidationSet], losses: Sequence[float], keys: Iterable[object]) -> dict[str, float]:
    """Return the mean over the clips of all parts with the same key."""
    sums: dict[str, list[float]] = {}
    for part, loss, key in zip(parts, losses, keys, strict=True):
        total = sums.setdefault(f"validation_loss_{key}{unit}", [0.0, 0])
        total[0] += loss * len(part)
        total[1] += len(part)
    return {name: total / clips for name, (total, clips) in sums.items()}


def training_figures(run: Path, ratio: int) -> dict[str, float]:
    """Return steps, seconds and the held-out loss at a ratio of the training that a run's folder holds; empty without one."""
    files = [file for file in sorted(run.glob("*/metrics.jsonl")) if f"{ratio}x" in file.parent.name.split("-")]
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    validated = [line for line in lines if "validation_loss" in line]
    if not validated:
        return {}
    last = validated[-1]
    loss = last.get(f"validation_loss_{ratio}x", last["validation_loss"])
    return {"steps": last["step"], "seconds": last["train_seconds"], "validation_loss": loss}
