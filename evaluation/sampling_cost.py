"""What sampling a video costs at each token budget: tokens, FLOPs, and the seconds it is expected to take here.

Expectations come from what this machine took for the same budget before, scaled by FLOPs and frames; never from a table.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from promag.diffusion.flops import forward_flops
from promag.pipelines.sampling import SampleRequest, Seconds, make_videos, trained_ratios
from promag.tokenizer.geometry import latent_frames, tokens
from promag.training.precision import Precision

PROBE_STEPS = 2


@dataclass(frozen=True)
class SamplingCost:
    """One video at one temporal ratio."""

    ratio: int
    frames: int
    latent_frames: int
    tokens: int
    flops: float  # of the transformer in all steps, guidance included; text encoding and decoding are left out


def sampling_cost(pipe: Any, ratio: int, frames: int, steps: int, guidance: float) -> SamplingCost:
    """Count what a video of the pipeline's size costs; raises ValueError for an illegal number of frames."""
    known, transformer = pipe.config, pipe.transformer.config
    patch = tuple(transformer["patch_size"])
    count = tokens(frames, known["height"], known["width"], ratio, patch)
    lengths = [part.model_max_length for part in (pipe.tokenizer, pipe.tokenizer_2, pipe.tokenizer_3) if part is not None]
    batch = 2 if guidance > 1 else 1  # as the pipeline: guidance of 1 and less is off
    step = forward_flops({**transformer, "text_dim": pipe.transformer.text_dims}, count, lengths, batch)
    return SamplingCost(ratio, frames, latent_frames(frames, ratio), count, steps * step)


class Pace:
    """How fast this machine was at each ratio the last time, to expect from."""

    def __init__(self):
        self._last: dict[int, tuple[SamplingCost, Seconds, str]] = {}

    def learn(self, cost: SamplingCost, seconds: Seconds, when: str) -> None:
        """Remember what a video took; `when` says in words which one."""
        self._last[cost.ratio] = (cost, seconds, when)

    def expect(self, cost: SamplingCost) -> tuple[Seconds, str] | None:
        """Return what a video should take and from which measurement that follows; None before the first at its ratio."""
        if cost.ratio not in self._last:
            return None
        known, took, when = self._last[cost.ratio]
        denoising = took.denoising * cost.flops / known.flops
        return Seconds(took.text, denoising, took.decoding * cost.frames / known.frames), when


def measure_pace(pipe: Any, precision: Precision, on_progress: Callable[[str], None]) -> Pace:
    """Make a video of two denoising steps at every ratio that the pipeline was trained at; the second time counts."""
    pace, frames = Pace(), pipe.config["num_frames"]
    options = {"num_inference_steps": PROBE_STEPS, "guidance_scale": 2.0}
    for ratio in trained_ratios(pipe):
        cost = sampling_cost(pipe, ratio, frames, PROBE_STEPS, 2.0)
        for _ in range(2):
            seconds = sum(
                (s for _, s in make_videos(pipe, [SampleRequest("", 0)], 1, precision, temporal_ratio=ratio, **options)),
                Seconds(),
            )
        pace.learn(cost, seconds, f"{PROBE_STEPS} steps at the start")
        on_progress(f"{ratio}x: {PROBE_STEPS} steps in {seconds.denoising:.2f} s, decoding in {seconds.decoding:.2f} s")
    return pace
