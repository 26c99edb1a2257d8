"""Suite `sampling`: a whole call of a pipeline, from a prompt to pixels, by temporal ratio, number of steps and decoder.

With overlap also batches in a row, one after the other and each decoded while the next one is denoised.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from promag.evaluation.cost import sampling
from promag.evaluation.sampling_cost import sampling_cost
from promag.pipelines.sampling import SampleRequest, load_pipeline, make_videos, trained_ratios
from promag.training.compilation import compile_blocks
from promag.training.config import UserError
from promag.training.precision import Chosen

from .cases import Group, Job, Options, way

PROMPT = "a red disc moves left"
OWN, TINY = "tokenizer", "tiny"  # decoders
IN_A_ROW = 6  # batches


def groups(options: Options) -> list[Group]:
    """Return a group for each number of steps, precision and way to run; raises UserError for what cannot sample."""
    decoders = (OWN,) if options.tiny_decoder is None else (OWN, TINY)
    pipe: Any = None
    ratios: list[int] = []
    for decoder in decoders:
        pipe = _load(decoder, options)
        ratios = [ratio for ratio in trained_ratios(pipe) if ratio in options.ratios]
        if not ratios:
            trained = list(trained_ratios(pipe))
            raise UserError(f"--ratios {list(options.ratios)}: {options.pipeline} was trained at {trained}")
    cases = [(decoder, ratio) for decoder in decoders for ratio in ratios]
    guidance: float = pipe.config["guidance_scale"] if options.guidance is None else options.guidance
    kinds = (_group, _row) if options.overlap else (_group,)
    return [
        kind(cases, steps, guidance, precision, compiled, graphs, options)
        for precision in options.precisions
        for steps in options.steps
        for compiled, graphs in options.ways
        for kind in kinds
    ]


def _load(decoder: str, options: Options) -> Any:
    """Return the pipeline, with the tiny decoder where that is asked for; raises UserError where it has none."""
    pipe = load_pipeline(options.pipeline)
    if decoder == TINY:
        try:
            pipe.enable_tiny_decoder(options.tiny_decoder or None)
        except (ValueError, UserError) as error:
            raise UserError(f"--tiny-decoder {options.tiny_decoder}".rstrip() + f": {error}") from None
    return pipe.to(options.device)


def _group(
    cases: Sequence[tuple[str, int]],
    steps: int,
    guidance: float,
    precision: Chosen,
    compiled: bool,
    graphs: bool,
    options: Options,
) -> Group:
    videos = options.batch_size or 1

    def build() -> Sequence[Job]:
        pipes = _pipes(cases, compiled, graphs, options)
        jobs = []
        for decoder, ratio in cases:
            pipe = pipes[decoder]
            cost = sampling_cost(pipe, ratio, pipe.config["num_frames"], steps, guidance)
            call = sampling(pipe, [PROMPT] * videos, steps, guidance, ratio, precision)
            jobs.append(Job(call, videos, None, {"tokens": cost.tokens, "denoising_gflop": videos * cost.flops / 1e9}))
        return jobs

    common = {"part": f"{steps} steps", **_common(steps, guidance, options)}
    settings = [
        {**common, "ratio": ratio, "decoder": decoder, "precision": precision, **way(compiled, graphs)}
        for decoder, ratio in cases
    ]
    return Group("sampling", settings, build, None, 0 if steps == min(options.steps) else 1, memory=not graphs)


def _row(
    cases: Sequence[tuple[str, int]],
    steps: int,
    guidance: float,
    precision: Chosen,
    compiled: bool,
    graphs: bool,
    options: Options,
) -> Group:
    """Return the group of batches in a row, each case without and with overlap."""
    videos = options.batch_size or 1
    requests = [SampleRequest(PROMPT, seed) for seed in range(IN_A_ROW * videos)]

    def build() -> Sequence[Job]:
        pipes = _pipes(cases, compiled, graphs, options)
        given = {"num_inference_steps": steps, "guidance_scale": guidance}

        def call(decoder: str, ratio: int, overlap: bool) -> Callable[[], Any]:
            arguments = {**given, "temporal_ratio": ratio, "overlap": overlap}
            return lambda: deque(make_videos(pipes[decoder], requests, videos, precision, **arguments), maxlen=0)

        return [Job(call(*case, overlap), len(requests)) for case in cases for overlap in (False, True)]

    settings = [
        {
            "part": f"{steps} steps, {IN_A_ROW} in a row, {ratio}x, {decoder}",
            **_common(steps, guidance, options),
            **{"ratio": ratio, "decoder": decoder, "overlap": overlap, "precision": precision, **way(compiled, graphs)},
        }
        for decoder, ratio in cases
        for overlap in (False, True)
    ]
    # what the decoding thread holds does not show in the peak
    return Group("sampling", settings, build, None, 0 if steps == min(options.steps) else 1, memory=False)


def _common(steps: int, guidance: float, options: Options) -> dict[str, Any]:
    """Return what identifies all cases of a number of steps."""
    name = "/".join(options.pipeline.rstrip("/").split("/")[-2:])
    return {"model": name, "steps": steps, "guidance": guidance, "videos": options.batch_size or 1}


def _pipes(cases: Sequence[tuple[str, int]], compiled: bool, graphs: bool, options: Options) -> dict[str, Any]:
    """Return the pipeline of each decoder, run in the given way."""
    pipes = {decoder: _load(decoder, options) for decoder in dict.fromkeys(decoder for decoder, _ in cases)}
    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)
        if compiled:
            compile_blocks(pipe.transformer)
        if graphs:
            pipe.enable_graphs()
    return pipes
