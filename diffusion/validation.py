"""The validation loss: clips and noise are fixed, so two runs or two steps differ only in the model.

Shapes: b c t h w latents.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from promag.training.files import read_json_lines
from promag.training.loop import Metrics, seeded
from promag.training.processes import processes, sum_over_processes

from .latent_cache import LatentDataset

if TYPE_CHECKING:
    from .objective import FlowObjective


class ValidationSet:
    """Validation clips of one temporal ratio and one bucket, read from their cache again for each validation.

    A clip's index seeds its noise. Latents are normalised with the statistics of the training clips, not of these.

    Args:
        clips: cached latents and embeddings.
        bucket: name of the clips' size in the metrics.
        trained: training clips of the same ratio, which have the statistics.
        batch_size: clips that each process scores at once.
    """

    def __init__(self, clips: LatentDataset, bucket: str, trained: LatentDataset, batch_size: int):
        self.clips, self.ratio, self.bucket, self.batch_size = clips, clips.ratio, bucket, batch_size
        self.trained = trained
        self.frames: int = clips.index["shape"][1]
        self.text_keys = [key for text in clips.texts for key in text.keys.values()]

    def __len__(self) -> int:
        """Return the number of clips."""
        return len(self.clips)

    def loss(self, objective: "FlowObjective", first_given: bool = False) -> float:
        """Return the mean loss over clips; with `first_given` the first latent frame is conditioning.

        The processes divide the clips among them. A sharded model needs the same number of calls in every process, so a process
        without clips left scores one again and does not count it.
        """
        state = processes()
        device = torch.device(state.device or "cpu")
        errors = torch.zeros(len(self), device=device)
        for first in range(0, len(self), self.batch_size * state.num_processes):
            batch = range(first + state.process_index * self.batch_size, len(self))[: self.batch_size]
            values = self._errors(objective, batch or range(1), device, first_given)
            if batch:
                errors[batch.start : batch.stop] = values
        return float(sum_over_processes(errors).mean())

    def _errors(self, objective: "FlowObjective", clips: range, device: torch.device, first_given: bool) -> Tensor:
        """Return each clip's error, (b,)."""
        rows = [self.clips.fixed(i) for i in clips]
        x = torch.stack([row["latents"] for row in rows]) * self.clips.std + self.clips.mean
        x = ((x - self.trained.mean) / self.trained.std).to(device)
        noise = torch.stack([torch.randn(x.shape[1:], generator=seeded(0, i)) for i in clips]).to(device)
        fps = torch.tensor([row["fps"] for row in rows], device=device)
        keys = [key for key in self.text_keys if key in rows[0]]
        batch: dict[str, Any] = {key: torch.stack([row[key] for row in rows]).to(device) for key in keys}
        batch |= {"caption": [row["caption"] for row in rows], "fps": fps}
        cond_mask = torch.arange(self.frames, device=device).expand(len(x), -1) < 1 if first_given else None
        return objective.validation_errors(x, noise, batch, self.ratio, cond_mask)


def validation_losses(objective: "FlowObjective", parts: Sequence[ValidationSet], first_given: bool) -> Metrics:
    """Return the mean loss over all ratios and, where there are several, the mean at each ratio and of each bucket.

    With `first_given` also return the mean over clips of two or more latent frames with the first one as conditioning.
    """
    losses = [part.loss(objective) for part in parts]
    means = _grouped("x", parts, losses, [part.ratio for part in parts])
    means |= {"validation_loss": sum(means.values()) / len(means)}
    metrics = {key: value for key, value in means.items() if len(means) > 2 or key == "validation_loss"}
    by_bucket = _grouped("", parts, losses, [part.bucket for part in parts])
    metrics |= by_bucket if len(by_bucket) > 1 else {}
    longer = [part for part in parts if first_given and part.frames > 1]
    if longer:
        conditioned = _grouped("x", longer, [part.loss(objective, True) for part in longer], [part.ratio for part in longer])
        metrics["validation_loss_first_given"] = sum(conditioned.values()) / len(conditioned)
    return metrics


def _grouped(unit: str, parts: Sequence[ValidationSet], losses: Sequence[float], keys: Iterable[object]) -> dict[str, float]:
    """Return the mean over the clips of all parts that share a key."""
    sums: dict[str, list[float]] = {}
    for part, loss, key in zip(parts, losses, keys, strict=True):
        total = sums.setdefault(f"validation_loss_{key}{unit}", [0.0, 0])
        total[0] += loss * len(part)
        total[1] += len(part)
    return {name: total / clips for name, (total, clips) in sums.items()}


def training_figures(run: Path, ratio: int) -> dict[str, Any]:
    """Return steps, seconds and validation loss at a ratio from the training in a run's folder; empty if there is none.

    `curve` holds step and loss of each validation.
    """
    files = [file for file in sorted(run.glob("*/metrics.jsonl")) if f"{ratio}x" in file.parent.name.split("-")]
    lines = [line for file in files for line in read_json_lines(file)]
    validated = [line for line in lines if "validation_loss" in line]
    if not validated:
        return {}
    curve = [[line["step"], line.get(f"validation_loss_{ratio}x", line["validation_loss"])] for line in validated]
    last = validated[-1]
    return {"steps": last["step"], "seconds": last["train_seconds"], "validation_loss": curve[-1][1], "curve": curve}
