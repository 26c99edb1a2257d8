"""The folders of a tokenizer training's stages, and which of them are finished."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .geometry import stage_name


def stage_folders(run: Path, stages: Sequence[Sequence[int]]) -> list[Path]:
    """Return the folders of a run's stages, each given by the ratios that it trains; of a stage by turns 4x-8x-16x for example.

    Earlier versions named a stage by turns by its highest ratio alone. Its folder keeps that name where no other stage has it.
    """
    names = [stage_name(sorted({*ratios})) for ratios in stages]
    earlier = [stage_name([max(ratios)]) for ratios in stages]
    return [
        run / (old if old not in names and (run / old).exists() else name) for name, old in zip(names, earlier, strict=True)
    ]


def finished_stages(run: Path, config: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any], Mapping[str, float]]]:
    """Return name, settings, and seconds and steps of each finished stage of a run; `config` is its plain configuration."""
    ratios = [stage.get("by_turns") or [stage["ratio"]] for stage in config["stages"]]
    files = [folder / "done.json" for folder in stage_folders(run, ratios)]
    return [
        (stage_name(sorted({*trained})), stage, json.loads(done.read_text(encoding="utf-8")))
        for trained, stage, done in zip(ratios, config["stages"], files, strict=True)
        if done.exists()
    ]
