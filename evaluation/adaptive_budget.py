"""Content-adaptive budgets: the smallest level of one checkpoint that gives each clip, or each segment, a wanted PSNR.

Segments are windows of 1 + r*N frames that are coded alone, each with a first frame of its own: any level may follow any
other, and each window costs the latent frame of that first frame.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from promag.tokenizer.metrics import psnr
from promag.tokenizer.streaming import reconstruct
from promag.training.precision import Precision, autocast

from .budgets import Budget, ClipFacts


@dataclass(frozen=True)
class Allocation:
    """Cost of a target: levels by part, tokens, and the cheapest fixed level whose worst part is no worse.

    At the fixed level every clip is coded whole: a part that is a segment of it has no first frame of its own there.
    """

    target: float  # dB
    levels: tuple[str, ...]  # chosen for each part
    tokens: int
    worst: float  # PSNR of the worst part in dB
    missed: int  # parts below the target at every level; they get their best one
    fixed: str  # no worse in its worst part, and misses no more; where no level is that good, the one of most tokens
    fixed_tokens: int
    fixed_worst: float  # PSNR of the worst part at the fixed level in dB

    @property
    def saved(self) -> float:
        """The fraction of tokens that the fixed level spends and this does not."""
        return 1 - self.tokens / self.fixed_tokens


def allocate(
    parts: Sequence[Mapping[str, float]],
    tokens: Mapping[str, int],
    target: float,
    whole: Sequence[Mapping[str, float]] | None = None,
    whole_tokens: Mapping[str, int] | None = None,
) -> Allocation:
    """Choose the smallest level that reaches `target` for each part, or its best where none does.

    Args:
        parts: PSNR in dB of each clip or segment by level.
        tokens: tokens of one part by level, most first.
        target: PSNR in dB.
        whole: PSNR in dB of each part where the clips are coded whole; left out: `parts`, which are whole clips.
        whole_tokens: tokens of all clips then, by level; left out: those of all parts.

    Raises ValueError without parts, or where `tokens` do not fall from level to level.
    """
    names = list(tokens)
    if not parts or any(tokens[a] <= tokens[b] for a, b in itertools.pairwise(names)):
        raise ValueError(f"{len(parts)} parts, tokens {dict(tokens)}: at least one part, and falling tokens, are needed")
    cheapest = names[::-1]
    chosen = [next((n for n in cheapest if part[n] >= target), max(cheapest, key=lambda n: part[n])) for part in parts]
    reached = [part[name] for part, name in zip(parts, chosen, strict=True)]
    worst, missed = min(reached), sum(value < target for value in reached)

    def as_good(name: str) -> bool:
        values = [part[name] for part in whole or parts]
        return min(values) >= worst and sum(value < target for value in values) <= missed

    fixed = next(filter(as_good, cheapest), names[0])
    return Allocation(
        target=target,
        levels=tuple(chosen),
        tokens=sum(tokens[name] for name in chosen),
        worst=worst,
        missed=missed,
        fixed=fixed,
        fixed_tokens=whole_tokens[fixed] if whole_tokens else len(parts) * tokens[fixed],
        fixed_worst=min(part[fixed] for part in whole or parts),
    )


@torch.no_grad()
def segment_psnr(budgets: Sequence[Budget], clip: Tensor, frames: int, precision: Precision = "auto") -> list[dict[str, float]]:
    """Code a clip (1 C T H W) in windows of `frames` frames and return the PSNR of each by budget.

    A last window that is shorter is padded by its last frame while it is coded, and compared on its own frames.
    """
    rows: list[dict[str, float]] = []
    for window in clip.split(frames, 2):
        row = {}
        for budget in budgets:
            x = window.to(budget.model.device)
            with autocast(x.device, precision, budget.model.dtype):
                output = reconstruct(budget.model, _padded(x, frames), budget.ratio).sample[:, :, : x.shape[2]]
            row[budget.name] = float(psnr(output, x))
        rows.append(row)
    return rows


def _padded(window: Tensor, frames: int) -> Tensor:
    added = frames - window.shape[2]
    return torch.cat([window, window[:, :, -1:].expand(-1, -1, added, -1, -1)], 2) if added else window


def segment_psnr_of_whole(per_frame: Mapping[str, Sequence[float]], frames: int) -> list[dict[str, float]]:
    """Return the PSNR of each window of `frames` frames by budget, where the clip was coded whole, from that of its frames."""
    errors = {name: 10 ** (-torch.tensor(values, dtype=torch.float64) / 10) for name, values in per_frame.items()}
    windows = {name: [-10 * math.log10(part.mean()) for part in values.split(frames)] for name, values in errors.items()}
    return [dict(zip(windows, row, strict=True)) for row in zip(*windows.values(), strict=True)]


def sweep(
    parts: Sequence[Mapping[str, float]],
    tokens: Mapping[str, int],
    targets: Sequence[float],
    whole: Sequence[Mapping[str, float]] | None = None,
    whole_tokens: Mapping[str, int] | None = None,
) -> list[dict[str, Any]]:
    """Return the allocation at each target as plain figures; see `allocate`."""
    rows = []
    for target in targets:
        best = allocate(parts, tokens, target, whole, whole_tokens)
        counts = {name: best.levels.count(name) for name in tokens}
        row = {"target": target, "parts": counts, "tokens": best.tokens, "worst": best.worst, "missed": best.missed}
        fixed = {"fixed": best.fixed, "fixed_tokens": best.fixed_tokens, "fixed_worst": best.fixed_worst}
        rows.append({**row, **fixed, "saved": best.saved})
    return rows


def adaptive_figures(
    budgets: Sequence[Budget],
    reconstruction: Mapping[str, Mapping[str, Any]],
    facts: Sequence[ClipFacts],
    clips: Any,
    shape: tuple[int, int, int],
    segment: int,
    target: float,
    precision: Precision = "auto",
) -> dict[str, Any]:
    """Measure the segments of every clip and return all figures of a content-adaptive budget.

    Args:
        budgets: the levels of one checkpoint, most tokens first.
        reconstruction: their figures by `compare_reconstructions`.
        facts: the clips by the same.
        clips: the open dataset that it read.
        shape: frames, height and width of a clip.
        segment: frames of a segment, 1 + r*N at every level.
        target: PSNR in dB of `by_clip` and `by_segment`; `sweep_by_clip` and `sweep_by_segment` have every half dB.
        precision: precision in which models with float32 weights run.

    Tokens are those of patches of 1x2x2, or of single latent positions where these do not divide the latent.
    """
    names = [budget.name for budget in budgets]
    of_clips = [{name: reconstruction[name]["per_clip"][i]["psnr"] for name in names} for i in range(len(clips))]
    of_segments = [segment_psnr(budgets, clips.fixed(i)["video"][None], segment, precision) for i in range(len(clips))]
    patch = (1, 2, 2) if budgets[0].tokens(*shape, (1, 2, 2)) else (1, 1, 1)
    counts = {
        budget.name: {"clip_tokens": budget.tokens(*shape, patch), "segment_tokens": budget.tokens(segment, *shape[1:], patch)}
        for budget in budgets
    }
    figures: dict[str, Any] = {"target": target, "segment_frames": segment, "patch": patch, "tokens": counts}
    per_frame = [{name: clip.psnr_per_frame[name] for name in names} for clip in facts]
    of_whole = [segment_psnr_of_whole(values, segment) for values in per_frame]
    whole_tokens = {name: len(clips) * (counts[name]["clip_tokens"] or 0) for name in names}
    segments, whole = ([part for clip in rows for part in clip] for rows in (of_segments, of_whole))
    for kind, parts, fixed in (("clip", of_clips, of_clips), ("segment", segments, whole)):
        tokens = {name: counts[name][f"{kind}_tokens"] or 0 for name in names}
        figures[f"by_{kind}"] = sweep(parts, tokens, [target], fixed, whole_tokens)[0]
        figures[f"sweep_by_{kind}"] = sweep(parts, tokens, _targets(parts), fixed, whole_tokens)
    return {**figures, "clip_psnr": of_clips, "segment_psnr": of_segments, "segment_psnr_of_whole": of_whole}


def _targets(parts: Sequence[Mapping[str, float]]) -> list[float]:
    """Return every half dB from below the worst part to above the best."""
    values = [value for part in parts for value in part.values()]
    return [step / 2 for step in range(math.floor(2 * min(values)), math.ceil(2 * max(values)) + 1)]
