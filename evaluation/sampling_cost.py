"""Cost of sampling a video at each token budget: tokens, FLOPs, and the seconds to expect on this machine.

Expected seconds are those that this machine last took at the same ratio, scaled by FLOPs and frames.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from promag.diffusion.flops import forward_flops
from promag.pipelines.sampling import SampleRequest, Seconds, make_videos, trained_ratios
from promag.pipelines.timesteps import count_model_calls
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
    flops: float  # FLOPs of the transformer in all of its calls, guidance included, without text encoding and decoding


def sampling_cost(pipe: Any, ratio: int, frames: int, steps: int, guidance: float) -> SamplingCost:
    """Count the cost of a video of the pipeline's size; raises ValueError for an illegal number of frames."""
    config, transformer = pipe.config, pipe.transformer.config
    patch = tuple(transformer["patch_size"])
    count = tokens(frames, config["height"], config["width"], ratio, patch, pipe.vae.spatial_compression_ratio)
    lengths = [part.model_max_length for part in (pipe.tokenizer, pipe.tokenizer_2, pipe.tokenizer_3) if part is not None]
    batch = 2 if guidance > 1 else 1  # as the pipeline: guidance of 1 and less is off
    call = forward_flops({**transformer, "text_dim": pipe.transformer.text_dims}, count, lengths, batch)
    flops = count_model_calls(pipe.scheduler, steps) * call
    return SamplingCost(ratio, frames, latent_frames(frames, ratio), count, flops)


class Pace:
    """The last measured seconds of this machine at each ratio, and what to expect by them."""

    def __init__(self):
        self._last: dict[int, tuple[SamplingCost, Seconds, str]] = {}

    def learn(self, cost: SamplingCost, seconds: Seconds, when: str) -> None:
        """Remember the seconds of a video; `when` describes the measurement to readers."""
        self._last[cost.ratio] = (cost, seconds, when)

    def expect(self, cost: SamplingCost) -> tuple[Seconds, str] | None:
        """Return the expected seconds of a video and the measurement behind them; None before the first at its ratio."""
        if cost.ratio not in self._last:
            return None
        last, seconds, when = self._last[cost.ratio]
        denoising = seconds.denoising * cost.flops / last.flops
        return Seconds(seconds.text, denoising, seconds.decoding * cost.frames / last.frames), when


def measure_pace(pipe: Any, precision: Precision, on_progress: Callable[[str], None]) -> Pace:
    """Sample a video of two denoising steps, with the pipeline's guidance, twice at every trained ratio; the second counts."""
    pace, frames, guidance = Pace(), pipe.config["num_frames"], pipe.config["guidance_scale"]
    options: dict[str, Any] = {"num_inference_steps": PROBE_STEPS}
    for ratio in trained_ratios(pipe):
        cost = sampling_cost(pipe, ratio, frames, PROBE_STEPS, guidance)
        for _ in range(2):
            seconds = sum(
                (s for _, s in make_videos(pipe, [SampleRequest("", 0)], 1, precision, temporal_ratio=ratio, **options)),
                Seconds(),
            )
        pace.learn(cost, seconds, f"{PROBE_STEPS} steps at the start")
        on_progress(f"{ratio}x: {PROBE_STEPS} steps in {seconds.denoising:.2f} s, decoding in {seconds.decoding:.2f} s")
    return pace
