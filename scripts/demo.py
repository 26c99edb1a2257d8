"""Run the whole system at a small size and write a page of results.

It grows a tokenizer 4x -> 8x -> 16x, trains one text-to-video model at 4x and at 16x, and compares both. The page is there
after about a minute, with samples of the trained pipeline that comes with the project, and fills up as training proceeds.

What an earlier call trained is used again, and what it left unfinished continues.
"""

import dataclasses
import functools
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from promag.data.clip_index import save_clips
from promag.data.clips import prepare
from promag.data.listing import list_videos
from promag.demo.config import DemoConfig, diffusion_config, tokenizer_config, tokenizer_folder
from promag.demo.figures import LEFT_OUT, SHOWN, make_report, read_clips, reconstruct, sample_shipped, shipped_absent
from promag.demo.page import LivePage
from promag.pipelines.build import train_pipeline
from promag.reports.contact_sheet import write_contact_sheet
from promag.reports.demo_report import Report, write_report
from promag.scripts._options import check_writable
from promag.tokenizer.checkpoint import load_tokenizer
from promag.tokenizer.train import train_tokenizer
from promag.training.command_line import continues, parse_config, run_main
from promag.training.config import UserError, plain
from promag.training.device import best_device
from promag.training.files import write_atomically
from promag.training.precision import choose_for_run
from promag.training.run import append_result

SETTINGS = "settings.json"  # the settings of the indices lie beside them

say = functools.partial(print, flush=True)  # at once, also where the output is a file


@continues
def main(argv: Sequence[str]) -> int:
    """Train, sample, compare, and print where the report and the videos lie."""
    config = parse_config(DemoConfig, argv, __doc__ or "")
    check_writable("--record", config.record, appended=True)
    precision = choose_for_run(config.precision, best_device(), tokenizer_folder(config))
    config = dataclasses.replace(config, precision=precision)
    started = time.perf_counter()
    clips = index_videos(config) if config.videos else ("synthetic", "synthetic")
    with LivePage(config) as page:
        report = train_and_measure(config, page, *clips, started)
    if report is None:
        say("stopped early; the same command continues")
        return 0
    run = Path(config.output_dir)
    file = write_report(run, report)
    shown = [(clip.caption, {"original": clip.original, **by_name(clip.by_ratio)}) for clip in report.reconstructions]
    write_contact_sheet(run / "reconstructions.png", shown)
    write_contact_sheet(run / "samples.png", [(clip.prompt, by_name(clip.by_ratio)) for clip in report.samples])
    if config.record:
        record_report(config, run, round(time.perf_counter() - started))
    say(f"\nreport: {file}\nfigures: {run / 'report.json'}\nvideos: {run / 'videos'}, frames in *.png beside them")
    return 0


def train_and_measure(config: DemoConfig, page: LivePage, train: str, evaluation: str, started: float) -> Report | None:
    """Train what is not trained yet and return the finished report; None if stopped early. `page` shows what there is."""
    if absent := shipped_absent(config):
        say(f"first samples are left out: {absent}")
        page.report = dataclasses.replace(page.report, facts={LEFT_OUT: absent})
    elif config.shipped and not config.videos:
        say(f"first: samples of {config.shipped}, which was trained before")
        samples, reconstructions = sample_shipped(config)
        page.report = dataclasses.replace(page.report, shipped=samples, shipped_reconstructions=reconstructions)
    say(f"page: {page.write()}, which fills up as training proceeds")

    say("1/3 tokenizer: 4x, then grown on top of what is frozen below")
    folder = train_tokenizer(tokenizer_config(config, train, evaluation))
    if folder is None:
        return None
    model = load_tokenizer(folder)
    shown = reconstruct(model, read_clips(config, evaluation, SHOWN), config.precision, model.temporal_ratios)
    page.report = dataclasses.replace(page.report, reconstructions=shown)

    say(f"2/3 text-to-video at {' and '.join(f'{r}x' for r in config.ratios)}, by turns")
    pipeline = train_pipeline(diffusion_config(config, folder, train, evaluation))
    if pipeline is None:
        return None

    say("3/3 samples, scores and timings")
    report = make_report(config, model, pipeline, evaluation, started)
    early = page.report
    return dataclasses.replace(
        report,
        facts={**report.facts, **early.facts},
        shipped=early.shipped,
        shipped_reconstructions=early.shipped_reconstructions,
    )


def record_report(config: DemoConfig, run: Path, seconds: int) -> None:
    """Append the figures to `config.record`."""
    figures = json.loads((run / "report.json").read_text(encoding="utf-8"))
    settings = plain(dataclasses.replace(config, record=None))  # where it is recorded is no setting of the run
    record = {"what": "demo", "seed": config.seed, "seconds": seconds, "config": settings}
    append_result(config.record or "", {**record, "rows": figures["rows"], "facts": figures["facts"]})


def by_name(videos: Mapping[int, np.ndarray]) -> dict[str, np.ndarray]:
    """Name the videos of each ratio: 4x."""
    return {f"{ratio}x": video for ratio, video in videos.items()}


def index_videos(config: DemoConfig) -> tuple[str, str]:
    """Index a folder of videos, a part of them for evaluation, and return both indices; those that are there are kept.

    Raises UserError where these were made with other settings, and for too few videos.
    """
    folder = Path(config.output_dir) / "clips"
    paths = folder / "train.jsonl", folder / "eval.jsonl"
    settings = {key: getattr(config, key) for key in ("frames", "validation_fraction")}
    settings["videos"] = os.path.abspath(config.videos or "")
    if all(path.exists() for path in paths):
        _check_same_settings(folder, settings)
        say(f"clips: the indices in {folder} are used again")
        return str(paths[0]), str(paths[1])
    prepared = prepare(list_videos(config.videos or ""))
    for path, reason in prepared.quarantined:
        say(f"left out {path}: {reason}")
    long = sorted((c for c in prepared.clips if c.frames >= config.frames), key=lambda clip: clip.sha256)
    short = len(prepared.clips) - len(long)
    if short:
        say(f"left out {short} of {len(prepared.clips)} videos that are shorter than {config.frames} frames")
    if len(long) < 2:
        raise UserError(
            f"videos {config.videos}: {len(long)} of {len(prepared.clips)} have {config.frames} frames; at least 2 are needed, "
            "one to train on and one to evaluate"
        )
    kept = max(1, round(config.validation_fraction * len(long)))
    # Before the indices, so that there are none without their settings.
    write_atomically(folder / SETTINGS, json.dumps(settings))
    # Ordered by content, so that names and dates do not decide what is trained on.
    for path, part in zip(paths, (long[kept:], long[:kept]), strict=True):
        save_clips(path, part)
    say(f"clips: {len(long) - kept} to train on, {kept} to evaluate on")
    return str(paths[0]), str(paths[1])


def _check_same_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise UserError where the indices in a folder were made with other settings."""
    file = folder / SETTINGS
    if not file.exists():
        raise UserError(
            f"clips {folder}: an earlier version indexed them and did not record from which videos; if they are the same, "
            "delete this folder, else use another --output-dir"
        )
    made_with = json.loads(file.read_text(encoding="utf-8"))
    differs = [
        f"{key} is {made_with.get(key)!r} there, {value!r} now"
        for key, value in settings.items()
        if made_with.get(key) != value
    ]
    if differs:
        raise UserError(
            f"clips {folder}: were indexed with other settings ({'; '.join(differs)}), and models beside them may be trained "
            f"on these; use another --output-dir, or delete {folder.parent}"
        )


if __name__ == "__main__":
    raise SystemExit(run_main(main))
