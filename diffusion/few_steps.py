"""Few-step sampling by distillation: a student takes few steps without guidance where its teacher takes many with it.

The student's sampler visits the times 1 = t_0 > t_1 > ... > t_steps = 0. From t_k to t_{k+1} the teacher, the transformer of
`init`, follows its guided velocity in several Euler steps, at the times that its own sampling in `teacher_steps` steps visits.
The student has to reach the same latents in one step without guidance. Both start from a clip noised to t_k. The loss is the
squared distance between the two ends over the length of the window, which is the squared error of the mean velocity.

Sources: progressive distillation (arXiv 2202.00512, algorithm 2), guidance in the student (arXiv 2210.03142, sec. 3.1),
windows between the sampler's times (piecewise rectified flow, arXiv 2405.07510, sec. 3.2). Shapes: b c t h w latents, b t
masks of conditioning frames.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from promag.training.config import setting
from promag.training.throughput import Work

from . import ahead
from .conditioning import draw_cond_mask, mean_over_generated, times_of_frames
from .finetune import without_adapters
from .flow import flow_times, guide
from .objective import FlowObjective
from .text import Embedded
from .text_cache import CaptionEncoder

if TYPE_CHECKING:
    from .config import DiffusionConfig


@dataclass(frozen=True, kw_only=True)
class FewSteps:
    """The steps of the student, and what its teacher does in their place."""

    steps: int = setting(4, "steps in which the student samples, without guidance")
    guidance: float = setting(4.0, "guidance of the teacher; 1 for an `init` that samples without")
    teacher_steps: int = setting(24, "steps in which the teacher samples, a multiple of `steps`")

    def __post_init__(self) -> None:
        """Raise ValueError for steps that do not divide the teacher's, and for a teacher that is the student."""
        if self.steps < 1 or self.teacher_steps < 1 or self.teacher_steps % self.steps:
            raise ValueError(
                f"few_steps: steps {self.steps}, teacher_steps {self.teacher_steps}: at least 1 step is needed, and a multiple "
                "of it for the teacher"
            )
        if not 1 <= self.guidance < math.inf:
            raise ValueError(f"few_steps: guidance {self.guidance}: at least 1 is needed, and 1 is without")
        if self.guidance == 1 and self.teacher_steps == self.steps:
            raise ValueError(
                f"few_steps: a teacher of {self.teacher_steps} steps without guidance is what the student starts as; raise "
                "teacher_steps or guidance"
            )

    def times(self, mu: float) -> Tensor:
        """Return the teacher's times in each window, (steps, 1 + teacher_steps / steps); `mu` shifts them as in sampling."""
        inside = self.teacher_steps // self.steps
        return flow_times(self.teacher_steps, mu).unfold(0, inside + 1, inside)


def forget_other_ratios(transformer: Any, ratios: Sequence[int]) -> None:
    """Leave a student the latent statistics of the ratios that it is distilled at: it does not sample at others."""
    kept = {name: {key: transformer.config[name][key] for key in map(str, ratios)} for name in ("latents_mean", "latents_std")}
    transformer.register_to_config(**kept, temporal_ratios=sorted(ratios))


@dataclass(frozen=True)
class Inputs:
    """What both models are given beside latents and times."""

    text: Embedded
    null: Embedded  # as many null captions
    fps: Tensor  # (b,)
    ratio: int
    cond_mask: Tensor | None


class FewStepsObjective(FlowObjective):
    """Squared distance between the ends of the student's step and of the teacher's steps through the same window.

    Args:
        transformer: the student, at first a copy of the teacher, or the teacher with adapters.
        text: encodes captions for both; not trained.
        config: the training; `few_steps` is set.
        teacher: the frozen transformer; None if it is the student without its adapters.
    """

    def __init__(self, transformer: Any, text: CaptionEncoder, config: "DiffusionConfig", teacher: Any = None):
        super().__init__(transformer, text, config)
        assert config.few_steps is not None
        self.few_steps = config.few_steps
        self.teacher = (teacher,)  # a tuple: it is no part of what is trained, wrapped and saved

    def units(self) -> list[torch.nn.Module]:
        """Return the student's units and, where the teacher is a transformer of its own, the teacher's."""
        (teacher,) = self.teacher
        return [*super().units(), *([] if teacher is None else [*self.family.blocks(teacher), teacher])]

    def work(self, batch: dict[str, Any]) -> Work:
        """Return the transformer's tokens and FLOPs, with those of the teacher."""
        work, few = super().work(batch), self.few_steps
        calls = few.teacher_steps // few.steps * (2 if few.guidance > 1 else 1)
        return dataclasses.replace(work, flops=work.flops * (3 + calls) / 3)

    def forward(self, batch: dict[str, Any], generators: list[torch.Generator], step: int) -> dict[str, Tensor]:
        """Normalised latents b c t h w of one ratio, captions and frame rates in `batch` -> loss."""
        x = batch["latents"]
        draws = [torch.randint(self.few_steps.steps, (1,), generator=g, device=g.device) for g in generators]
        noise = randn_tensor(x.shape, generators, x.device)
        cond_mask = draw_cond_mask(self.condition, x.shape[2], generators)
        return {"loss": self.window_errors(x, noise, torch.cat(draws), batch, int(batch["ratio"][0]), cond_mask).mean()}

    def window_errors(
        self, x: Tensor, noise: Tensor, windows: Tensor, batch: dict[str, Any], ratio: int, cond_mask: Tensor | None = None
    ) -> Tensor:
        """Return the mean squared error of the mean velocity in a window of each clip, windows (b,) -> (b,)."""
        times = self.few_steps.times(self.mu(x)).to(x.device, non_blocking=True)
        with torch.no_grad():
            inputs = self._inputs(batch, ratio, cond_mask)
            start = self._noised(x, noise, times[windows, 0], cond_mask)
            goal = self._teacher_steps(start, windows, times, inputs)
        torch.clear_autocast_cache()  # it may hold weights of the student that were rounded without gradients
        end = self._student_step(start, windows, times, inputs)
        length = times[windows, 0] - times[windows, -1]
        errors = ((end - goal) / length.view(-1, 1, 1, 1, 1)).square()
        return errors.flatten(1).mean(1) if cond_mask is None else mean_over_generated(errors, cond_mask)

    @torch.no_grad()
    def validation_errors(
        self, x: Tensor, noise: Tensor, batch: dict[str, Any], ratio: int, cond_mask: Tensor | None = None
    ) -> Tensor:
        """Return the mean squared distance between the student's and the teacher's sample from the same noise, (b,)."""
        times = self.few_steps.times(self.mu(x)).to(x.device, non_blocking=True)
        inputs = self._inputs(batch, ratio, cond_mask)
        student = teacher = self._noised(x, noise, times[:1, 0].expand(len(x)), cond_mask)
        for k in range(self.few_steps.steps):
            windows = torch.full((len(x),), k, device=x.device)
            student = self._student_step(student, windows, times, inputs)
            teacher = self._teacher_steps(teacher, windows, times, inputs)
        errors = (student - teacher).square()
        return errors.flatten(1).mean(1) if cond_mask is None else mean_over_generated(errors, cond_mask)

    def _inputs(self, batch: dict[str, Any], ratio: int, cond_mask: Tensor | None) -> Inputs:
        null = self.text(batch, [True] * len(batch["caption"]))
        return Inputs(self.text(batch), null, batch["fps"], ratio, cond_mask)

    def _noised(self, x: Tensor, noise: Tensor, times: Tensor, cond_mask: Tensor | None) -> Tensor:
        """Return clips noised to times (b,), but for their conditioning frames."""
        times = times if cond_mask is None else times_of_frames(times, cond_mask)
        return ahead.interpolate(x, noise, times, self.base_ahead)

    def _student_step(self, x: Tensor, windows: Tensor, times: Tensor, inputs: Inputs) -> Tensor:
        def predict(x: Tensor, at: Tensor) -> Tensor:
            return self.family.predict(self.transformer, x, at, inputs.text, inputs.fps, inputs.ratio).float()

        return self._euler_step(predict, x, times[windows, 0], times[windows, -1], inputs.cond_mask)

    def _teacher_steps(self, x: Tensor, windows: Tensor, times: Tensor, inputs: Inputs) -> Tensor:
        guidance = self.few_steps.guidance
        both = inputs.null.merge(inputs.text, lambda a, b: torch.cat([a, b]))

        def predict(x: Tensor, at: Tensor) -> Tensor:
            if guidance == 1:
                return self.family.predict(teacher, x, at, inputs.text, inputs.fps, inputs.ratio).float()
            x, at, fps = (torch.cat([part] * 2) for part in (x, at, inputs.fps))
            without, with_text = self.family.predict(teacher, x, at, both, fps, inputs.ratio).float().chunk(2)
            return guide(with_text, without, guidance)

        with self._as_teacher() as teacher:
            for j in range(times.shape[1] - 1):
                x = self._euler_step(predict, x, times[windows, j], times[windows, j + 1], inputs.cond_mask)
        return x

    @contextlib.contextmanager
    def _as_teacher(self) -> Iterator[Any]:
        (teacher,) = self.teacher
        if teacher is not None:
            yield teacher
            return
        with without_adapters(self.transformer):
            yield self.transformer

    def _euler_step(
        self, predict: Callable[[Tensor, Tensor], Tensor], x: Tensor, now: Tensor, then: Tensor, cond_mask: Tensor | None
    ) -> Tensor:
        """Move latents from times (b,) to later ones; conditioning frames stay at time 0."""
        if cond_mask is not None:
            now, then = times_of_frames(now, cond_mask), times_of_frames(then, cond_mask)
        return ahead.advance(x, predict(x, now), now, then, self.base_ahead)
