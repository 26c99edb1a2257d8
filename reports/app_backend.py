"""What the buttons of the page do: settings in, HTML out, without the page's framework."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from promag.data.video import encode_mp4
from promag.evaluation.sampling_cost import Pace, sampling_cost
from promag.pipelines.sampling import Order, make_videos, trained_ratios
from promag.training.config import UserError
from promag.training.precision import Precision

from . import app_html as page
from .side_by_side import Comparison, fit_size
from .uploads import UploadLimits, check_upload

CRF = 14
Told = Callable[[int, int], None]  # done, total


class Studio:
    """A tokenizer, and a pipeline or none, at work for the page's visitors: one thing is computed at a time.

    Args:
        tokenizer: reconstructs videos.
        pipe: samples videos; without, `lengths`, `costs` and `sample` cannot be called.
        pace: how fast this machine was at each ratio.
        limits: of uploaded videos.
        precision: of sampling and reconstructing.
    """

    def __init__(self, tokenizer: Any, pipe: Any, pace: Pace, limits: UploadLimits, precision: Precision = "auto"):
        self.tokenizer, self.pipe, self.pace, self.limits = tokenizer, pipe, pace, limits
        self.precision: Precision = precision
        self.lock = threading.Lock()

    @property
    def lengths(self) -> list[int]:
        """Frame counts that every trained ratio allows, up to the trained one."""
        step, most = max(trained_ratios(self.pipe)), self.pipe.config["num_frames"]
        return [*range(1 + step, most, step), most]

    def costs(self, ratio: int, frames: int, steps: float, guidance: float) -> str:
        """Return the table of budgets for these settings."""
        found = [sampling_cost(self.pipe, r, frames, int(steps), guidance) for r in trained_ratios(self.pipe)]
        return page.cost_table([(cost, self.pace.expect(cost)) for cost in found], ratio)

    def sample(
        self,
        prompt: str,
        negative: str,
        ratio: int,
        frames: int,
        steps: float,
        guidance: float,
        seed: float | None,
        told: Told,
    ) -> str:
        """Make one video; `told` is called after each step."""
        if seed is None or not 0 <= seed < 2**63:
            return page.message(f"seed {seed}: 0 to 2^63 - 1 are legal")
        order, steps = Order(prompt, int(seed)), int(steps)
        how = {"negative_prompt": negative, "num_frames": frames, "num_inference_steps": steps, "temporal_ratio": ratio}
        try:
            with self.lock:
                ((videos, spent),) = make_videos(self.pipe, [order], 1, self.precision, told, guidance_scale=guidance, **how)
        except ValueError as error:
            return page.message(str(error))
        cost, video, fps = sampling_cost(self.pipe, ratio, frames, steps, guidance), videos[0], self.pipe.config["fps"]
        self.pace.learn(cost, spent, "the last video")
        times = max(1, page.COLUMN // video.shape[2])
        mp4 = encode_mp4(video.repeat(times, 1).repeat(times, 2), fps, CRF)
        return page.sampled(mp4, prompt, order.seed, cost, spent, fps, video.shape[2] * times)

    def compare(self, path: str | None, side: int, told: Told) -> str:
        """Reconstruct an uploaded video, `side` pixels its shorter side, at every ratio; `told` is called with frames."""
        if path is None:
            return page.message("no video was given: choose a file first")
        try:
            facts = check_upload(path, self.limits)
        except UserError as error:
            return page.message(str(error))
        size, ratios = fit_size(facts.height, facts.width, side), self.tokenizer.temporal_ratios
        work = Comparison(
            self.tokenizer,
            ratios,
            path,
            facts.frames,
            size=size,
            enlarge=max(1, page.COLUMN // size[1]),
            precision=self.precision,
            on_progress=lambda done: told(done, facts.frames),
        )
        with self.lock, torch.no_grad():
            film = np.concatenate(list(work))
        came = f"{facts.frames} frames of {facts.width}x{facts.height} at {facts.fps:.3g} a second"
        described = f"{Path(path).name}: {came}, worked on at {size[1]}x{size[0]}"
        psnr = {ratio: work.psnr(ratio) for ratio in ratios}
        mp4 = encode_mp4(film, facts.fps, CRF)
        return page.comparison(mp4, film.shape[1:3], work.frame_psnr, psnr, work.seconds, described)
