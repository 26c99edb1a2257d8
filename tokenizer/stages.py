"""The stages of a tokenizer training that are finished."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .geometry import stage_name


def finished_stages(run: Path, config: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any], Mapping[str, float]]]:
    """Return name, settings, and seconds and steps of each finished stage of a run; `config` is its plain configuration.

    The name is that of the stage's folder in the run.
    """
    ratios = [stage["by_turns"] or [stage["ratio"]] for stage in config["stages"]]
    names = [stage_name(sorted({*trained})) for trained in ratios]
    return [
        (name, stage, json.loads(done.read_text(encoding="utf-8")))
        for name, stage in zip(names, config["stages"], strict=True)
        if (done := run / name / "done.json").exists()
    ]
