"""Suite `sampling`: a whole call of a pipeline, from a prompt to pixels, by temporal ratio and number of steps."""

from collections.abc import Sequence

from promag.evaluation.cost import sampling
from promag.evaluation.sampling_cost import sampling_cost
from promag.pipelines.sampling import load_pipeline, trained_ratios
from promag.training.compilation import compile_blocks
from promag.training.config import UserError
from promag.training.precision import Chosen

from .cases import Group, Job, Options

PROMPT = "a red disc moves left"
GUIDANCE = 4.0


def groups(options: Options) -> list[Group]:
    """Return a group for each number of steps, precision and way to run; raises UserError for a pipeline that is not there."""
    pipe = load_pipeline(options.pipeline)
    ratios = [ratio for ratio in trained_ratios(pipe) if ratio in options.ratios]
    if not ratios:
        raise UserError(f"--ratios {list(options.ratios)}: {options.pipeline} was trained at {list(trained_ratios(pipe))}")
    return [
        _group(ratios, steps, precision, compiled, options)
        for precision in options.precisions
        for steps in options.steps
        for compiled in options.compiled
    ]


def _group(ratios: Sequence[int], steps: int, precision: Chosen, compiled: bool, options: Options) -> Group:
    videos = options.batch_size or 1

    def build() -> Sequence[Job]:
        pipe = load_pipeline(options.pipeline).to(options.device)
        if compiled:
            compile_blocks(pipe.transformer)
        frames, jobs = pipe.config["num_frames"], []
        for ratio in ratios:
            cost = sampling_cost(pipe, ratio, frames, steps, GUIDANCE)
            call = sampling(pipe, [PROMPT] * videos, steps, GUIDANCE, ratio, precision)
            facts = {"tokens": cost.tokens, "denoising_gflop": videos * cost.flops / 1e9}
            jobs.append(Job(call, videos, None, facts))
        return jobs

    name = "/".join(options.pipeline.rstrip("/").split("/")[-2:])
    common = {"part": f"{steps} steps", "model": name, "steps": steps, "guidance": GUIDANCE, "videos": videos}
    settings = [{**common, "ratio": ratio, "precision": precision, "compiled": compiled} for ratio in ratios]
    return Group("sampling", settings, build, None, 0 if steps == min(options.steps) else 1)
