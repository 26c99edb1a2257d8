"""What a token budget costs: the time of a training step and of sampling, measured side by side.

Budgets are measured in turns, round after round, so that a slow moment of the machine meets all of them.
"""

import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor

from promag.diffusion.flow import flow_times, sample_flow, velocity
from promag.diffusion.train import hidden_matrices
from promag.diffusion.transformer import ProMAGTransformer3DModel
from promag.tokenizer.geometry import SPATIAL_RATIO, latent_frames
from promag.training.loop import Objective
from promag.training.optimizers import OptimizationConfig, make_optimizers
from promag.training.precision import Precision, autocast, choose_precision

Key = TypeVar("Key")
TEXT_TOKENS = 24  # of the random text, from each text encoder


def measure_in_turns(calls: Mapping[Key, Callable[[], Any]], rounds: int = 5) -> dict[Key, float]:
    """Call each of `calls` once to warm up, then `rounds` times in turns; return the median seconds of each."""
    times: dict[Key, list[float]] = {key: [] for key in calls}
    for call in calls.values():
        call()
    _wait()  # else the first round would wait for the warm-up
    for _ in range(rounds):
        for key, call in calls.items():
            started = time.perf_counter()
            call()
            _wait()
            times[key].append(time.perf_counter() - started)
    return {key: median(values) for key, values in times.items()}


class TransformerAlone(Objective):
    """A transformer without its text model: the same optimisers, random text."""

    def __init__(self, transformer: ProMAGTransformer3DModel):
        super().__init__()
        self.transformer = transformer

    def matrices(self) -> list[torch.nn.Parameter]:
        """Return what Muon trains."""
        return hidden_matrices(self.transformer)


def train_step(
    transformer: Any,
    frames: int,
    height: int,
    width: int,
    ratio: int,
    batch_size: int,
    optimization: OptimizationConfig | None,
    spatial: int = SPATIAL_RATIO,
    precision: Precision = "auto",
) -> Callable[[], None]:
    """Return a call that does one training step on random latents and text, with the optimisers of `optimization`.

    With `optimization` None it ends with the gradients: forward and backward alone. The weights of `transformer` change:
    pass a copy.
    """
    chosen = choose_precision(precision, transformer.device)
    optimizers = make_optimizers(TransformerAlone(transformer), optimization, chosen) if optimization else []
    text_tokens = [TEXT_TOKENS] * len(transformer.text_dims)
    loss = random_loss(transformer, frames, height, width, ratio, batch_size, text_tokens, spatial, precision)

    def step() -> None:
        loss().backward()
        for optimizer in optimizers:
            optimizer.step()
        transformer.zero_grad()

    return step


def random_loss(
    transformer: Any,
    frames: int,
    height: int,
    width: int,
    ratio: int,
    batch_size: int,
    text_tokens: Sequence[int],
    spatial: int = SPATIAL_RATIO,
    precision: Precision = "auto",
) -> Callable[[], Tensor]:
    """Return a call that makes the loss of random latents and text, of so many tokens from each text encoder."""
    device, config = transformer.device, transformer.config
    shape = (config["in_channels"], latent_frames(frames, ratio), height // spatial, width // spatial)
    x, noise = torch.randn(2, batch_size, *shape, device=device)
    sizes = zip(text_tokens, transformer.text_dims, strict=True)
    text = [torch.randn(batch_size, length, width, device=device) for length, width in sizes]
    pooled = torch.randn(batch_size, config["pooled_dim"], device=device) if config["pooled_dim"] else None

    def loss() -> Tensor:
        times = torch.full((batch_size,), 500.0, device=device)
        with autocast(device, precision):
            predicted = transformer(x, times, text, pooled_projections=pooled, temporal_ratio=ratio, return_dict=False)[0]
            return (predicted.float() - velocity(x, noise)).square().mean()

    return loss


def denoising(
    transformer: Any,
    frames: int,
    height: int,
    width: int,
    ratio: int,
    steps: int,
    videos: int = 1,
    spatial: int = SPATIAL_RATIO,
    precision: Precision = "auto",
) -> Callable[[], None]:
    """Return a call that denoises random latents of `videos` videos at once, text encoding and decoding aside.

    Each step predicts with and without text, as guidance needs.
    """
    device, config = transformer.device, transformer.config
    shape = (config["in_channels"], latent_frames(frames, ratio), height // spatial, width // spatial)
    noise = torch.randn(2 * videos, *shape, device=device)
    text = [torch.randn(2 * videos, TEXT_TOKENS, width, device=device) for width in transformer.text_dims]
    pooled = torch.randn(2 * videos, config["pooled_dim"], device=device) if config["pooled_dim"] else None

    def velocity_at(x: Tensor, times: Tensor) -> Tensor:
        predicted = transformer(x, 1000 * times, text, pooled_projections=pooled, temporal_ratio=ratio, return_dict=False)
        return predicted[0]

    def call() -> None:
        with autocast(device, precision):
            sample_flow(velocity_at, noise, flow_times(steps))

    return call


def sampling(
    pipe: Any,
    prompts: list[str],
    steps: int,
    guidance: float,
    ratio: int,
    precision: Precision = "auto",
    **size: int,
) -> Callable[[], Any]:
    """Return a call that samples one video for each prompt, in one batch, from text to pixels."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)

    def call() -> Any:
        with autocast(pipe.device, precision):
            return pipe(
                prompts,
                num_inference_steps=steps,
                guidance_scale=guidance,
                temporal_ratio=ratio,
                generator=generator,
                **size,
            ).frames

    return call


def peak_bytes(call: Callable[[], Any]) -> int:
    """Return the most memory that tensors take while `call` runs, beyond what was there before: call it once to warm up."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else each start and stop of the profiler is a line on stderr
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    assert profile.profiler is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # pyright: ignore
    taken = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))  # pyright: ignore
    return max(taken, default=0)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
