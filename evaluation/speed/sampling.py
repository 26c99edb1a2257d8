"""Suite `sampling`: a whole call of a pipeline, from a prompt to pixels, by temporal ratio, number of steps and decoder.

With overlap also batches in a row, one after the other and each decoded while the next one is denoised.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    return [
        make(Setup(cases, steps, guidance, precision, compiled, graphs, options))
        for precision in options.precisions
        for steps in options.steps
        for compiled, graphs in options.ways
        for make in ((_calls, _rows) if options.overlap else (_calls,))
    ]


@dataclass(frozen=True)
class Setup:
    """What the cases of a group share; `cases` are pairs of decoder and ratio."""

    cases: Sequence[tuple[str, int]]
    steps: int
    guidance: float
    precision: Chosen
    compiled: bool
    graphs: bool
    options: Options

    @property
    def videos(self) -> int:
        """Videos sampled at once."""
        return self.options.batch_size or 1

    def settings(self, part: str, decoder: str, ratio: int, **more: Any) -> dict[str, Any]:
        """Return what identifies a case."""
        name = "/".join(self.options.pipeline.rstrip("/").split("/")[-2:])
        common = {"part": part, "model": name, "steps": self.steps, "guidance": self.guidance, "videos": self.videos}
        case = {"ratio": ratio, "decoder": decoder, **more, "precision": self.precision}
        return {**common, **case, **way(self.compiled, self.graphs)}

    def pipes(self) -> dict[str, Any]:
        """Return the pipeline of each decoder, run as the setup says."""
        pipes = {decoder: _load(decoder, self.options) for decoder in dict.fromkeys(decoder for decoder, _ in self.cases)}
        for pipe in pipes.values():
            pipe.set_progress_bar_config(disable=True)
            if self.compiled:
                compile_blocks(pipe.transformer)
            if self.graphs:
                pipe.enable_graphs()
        return pipes

    def group(self, settings: Sequence[dict[str, Any]], build: Callable[[], Sequence[Job]], memory: bool) -> Group:
        """Return the group; the fewest steps are measured first."""
        rank = 0 if self.steps == min(self.options.steps) else 1
        return Group("sampling", settings, build, None, rank, memory=memory)


def _load(decoder: str, options: Options) -> Any:
    """Return the pipeline, with the tiny decoder where that is asked for; raises UserError where it has none."""
    pipe = load_pipeline(options.pipeline)
    if decoder == TINY:
        try:
            pipe.enable_tiny_decoder(options.tiny_decoder or None)
        except (ValueError, UserError) as error:
            raise UserError(f"--tiny-decoder {options.tiny_decoder}".rstrip() + f": {error}") from None
    return pipe.to(options.device)


def _calls(setup: Setup) -> Group:
    """Return the group of single calls."""

    def build() -> Sequence[Job]:
        pipes, jobs = setup.pipes(), []
        for decoder, ratio in setup.cases:
            pipe = pipes[decoder]
            cost = sampling_cost(pipe, ratio, pipe.config["num_frames"], setup.steps, setup.guidance)
            call = sampling(pipe, [PROMPT] * setup.videos, setup.steps, setup.guidance, ratio, setup.precision)
            facts = {"tokens": cost.tokens, "denoising_gflop": setup.videos * cost.flops / 1e9}
            jobs.append(Job(call, setup.videos, None, facts))
        return jobs

    settings = [setup.settings(f"{setup.steps} steps", *case) for case in setup.cases]
    return setup.group(settings, build, memory=not setup.graphs)


def _rows(setup: Setup) -> Group:
    """Return the group of batches in a row, each case without and with overlap."""
    requests = [SampleRequest(PROMPT, seed) for seed in range(IN_A_ROW * setup.videos)]
    cases = [(decoder, ratio, overlap) for decoder, ratio in setup.cases for overlap in (False, True)]

    def build() -> Sequence[Job]:
        pipes = setup.pipes()
        given = {"num_inference_steps": setup.steps, "guidance_scale": setup.guidance}

        def call(decoder: str, ratio: int, overlap: bool) -> Callable[[], Any]:
            arguments = {**given, "temporal_ratio": ratio, "overlap": overlap}
            return lambda: deque(make_videos(pipes[decoder], requests, setup.videos, setup.precision, **arguments), maxlen=0)

        return [Job(call(*case), len(requests)) for case in cases]

    settings = [
        setup.settings(f"{setup.steps} steps, {IN_A_ROW} in a row, {ratio}x, {decoder}", decoder, ratio, overlap=overlap)
        for decoder, ratio, overlap in cases
    ]
    return setup.group(settings, build, memory=False)  # the measured peak is the calling thread's alone
