"""Measure what a draft at a high temporal ratio, refined at a low one, gains.

The same prompts and seeds are sampled in several ways: from noise at the low ratio with several numbers of steps; the draft
alone; the draft taken to the low ratio, without pixels where the tokenizer's latents lift, noised to several times and refined.
Ways of about equal seconds are compared.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from promag.evaluation.generation import steadiness_and_sharpness, warm_up
from promag.evaluation.prompt_accuracy import accuracies, format_accuracy, scenes_to_score
from promag.pipelines.inputs import steps_and_guidance
from promag.pipelines.sampling import Draft, load_pipeline, sample_timed, trained_ratios
from promag.reports.contact_sheet import write_contact_sheet
from promag.scripts._options import check_at_least_one, check_writable, share
from promag.tokenizer.metrics import from_uint8, psnr
from promag.training.command_line import Parser, run_main
from promag.training.config import UserError
from promag.training.device import best_device
from promag.training.precision import choose_precision
from promag.training.run import append_result

PROTOCOL = (
    "one video for each prompt, noise seeded by its number, all ways in one process, batches of 8 on otherwise idle cores; "
    "seconds of a video, text and decoding included, after an untimed call at each ratio; Wilson 95 % intervals; jitter and "
    "high-frequency energy against rendered clips of the same captions; PSNR between the videos of two ways, mean over videos"
)
SHOWN = 6  # prompts on the contact sheet


def main(argv: Sequence[str]) -> int:
    """Sample every way, print a table of them, and append a line for each to --record."""
    arguments = _parse(argv)
    arguments.precision = choose_precision(arguments.precision, best_device())
    pipe: Any = load_pipeline(arguments.checkpoint)
    pipe.set_progress_bar_config(disable=True)
    ratio, legal = arguments.ratio, trained_ratios(pipe)
    for option, value in (("--ratio", ratio), ("--draft-ratio", arguments.draft_ratio)):
        if value not in legal:
            raise UserError(f"{option} {value}: the pipeline was trained at {', '.join(f'{r}x' for r in legal)}")
    steps, guidance = steps_and_guidance(pipe.config, arguments.steps, arguments.guidance)
    draft_steps = arguments.draft_steps or steps
    scenes = scenes_to_score(arguments.prompts, seed=0)

    def sample(
        name: str, steps: int, sampled_ratio: int, draft: Draft | None = None
    ) -> tuple[list[np.ndarray], dict[str, Any]]:
        options = {"temporal_ratio": sampled_ratio, "draft": draft}
        prompts = [scene.caption() for scene in scenes]
        videos, spent = sample_timed(pipe, prompts, steps, guidance, arguments.precision, name=name, **options)
        return videos, {
            "way": name,
            "seconds": spent.total / len(videos),
            "accuracy": accuracies(videos, scenes),
            **steadiness_and_sharpness(videos, scenes),
        }

    try:
        for each in (arguments.draft_ratio, ratio):
            warm_up(pipe, each, arguments.prompts, guidance, arguments.precision)
        draft_videos, draft_row = sample(f"{arguments.draft_ratio}x alone", draft_steps, arguments.draft_ratio)
        direct = [sample(f"{ratio}x from noise, {n} steps", n, ratio) for n in arguments.from_noise_steps]
        refined = [
            sample(f"refined from {s:g}", steps, ratio, Draft(arguments.draft_ratio, draft_steps, s))
            for s in arguments.strengths
        ]
    except ValueError as error:
        raise UserError(str(error)) from None
    for videos, row in refined:
        others, rival = min(direct, key=lambda pair: abs(pair[1]["seconds"] - row["seconds"]))
        row |= {"psnr_to_draft": _psnr(videos, draft_videos), "rival": rival["way"], "psnr_to_rival": _psnr(videos, others)}
    rows = [draft_row, *(row for _, row in direct), *(row for _, row in refined)]
    common = {name: getattr(arguments, name) for name in ("ratio", "draft_ratio", "prompts", "note")}
    common |= {"draft_steps": draft_steps, "steps": steps, "guidance": guidance, "protocol": PROTOCOL}
    for row in rows:
        print(_format(row))
        if arguments.record:
            append_result(arguments.record, {"what": "draft and refine", **row, **common})
    if arguments.contact_sheet:
        ways = {row["way"]: videos for videos, row in [(draft_videos, draft_row), *direct[-1:], *refined]}
        shown = [(s.caption(), {way: videos[i] for way, videos in ways.items()}) for i, s in enumerate(scenes[:SHOWN])]
        print(write_contact_sheet(arguments.contact_sheet, shown))
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("checkpoint", type=Path, help="folder of a pipeline that was trained at both ratios")
    add("--ratio", type=int, default=4, help="temporal ratio of the videos")
    add("--draft-ratio", type=int, default=16, help="temporal ratio of the drafts")
    add("--draft-steps", type=int, help="denoising steps of a draft; left out: --steps")
    share(parser, "--steps", help="denoising steps at the low ratio, shared by strength; left out: the pipeline's own")
    add("--strengths", type=float, nargs="+", default=[0.25, 0.5, 0.75], help="shares of the steps that refine the draft")
    add("--from-noise-steps", type=int, nargs="+", default=[12, 18, 24, 32], help="numbers of steps from noise")
    share(parser, "--prompts", "--guidance", "--precision", "--record", "--note")
    share(parser, "--contact-sheet")
    arguments = parser.parse_args(argv)
    check_at_least_one(arguments, "prompts", "steps", "draft_steps")
    if (sheet := arguments.contact_sheet) and sheet.suffix.lower() != ".png":
        raise UserError(f"--contact-sheet {sheet}: a .png file is needed")
    check_writable("--record", arguments.record, appended=True)
    check_writable("--contact-sheet", arguments.contact_sheet, [arguments.record])
    return arguments


def _tensor(video: np.ndarray) -> Tensor:
    return from_uint8(torch.from_numpy(video[None]))


def _psnr(videos: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> float:
    return fmean(float(psnr(_tensor(a), _tensor(b))) for a, b in zip(videos, others, strict=True))


def _format(row: dict[str, Any]) -> str:
    text = f"{row['way']}: {row['seconds']:.3f} s, {format_accuracy(row['accuracy'])}; jitter {row['jitter']:.2f} (true clips "
    text += f"{row['jitter_of_true_clips']:.2f}), high frequencies {row['high_frequency']:.2f}"
    if "rival" in row:
        text += f"; {row['psnr_to_draft']:.1f} dB to the draft, {row['psnr_to_rival']:.1f} dB to {row['rival']}"
    return text


if __name__ == "__main__":
    raise SystemExit(run_main(main))
