"""Save a trained pipeline in bf16 with a model card.

Its video tokenizer is not copied: the folder links to a published one, which must be the one that was trained with.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from promag.diffusion.validation import training_figures
from promag.pipelines.sampling import load_pipeline
from promag.reports.pipeline_card import trained_card
from promag.tokenizer.train import forget_where_it_was, load_tokenizer
from promag.training.config import UserError, load_yaml, run_main
from promag.training.run import machines_of, write_atomically

SETTINGS = ("steps", "learning_rate", "muon", "ema_decay")


def main(argv: Sequence[str]) -> int:
    """Write the folder; with --record also the figures as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("pipeline", type=Path, help="RUN/pipeline of a finished training on generated clips")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the published video tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; its path is the name on the card")
    parser.add_argument("--prompts", type=int, default=64, help="prompts of trained, and of held-out combinations")
    parser.add_argument("--steps", type=int, default=24, help="denoising steps")
    parser.add_argument("--guidance", type=float, default=4.0, help="classifier-free guidance")
    parser.add_argument("--record", type=Path, help="append the figures to this results file")
    arguments = parser.parse_args(argv)

    recipe = trainings_of(arguments.pipeline.parent)
    pipe: Any = load_pipeline(arguments.pipeline)
    check_tokenizer(pipe.vae, arguments.tokenizer)
    pipe.to(dtype=torch.bfloat16)
    vae = arguments.out / "vae"
    if vae.is_symlink():  # as published by earlier versions: weights must not be written through it
        vae.unlink()
    pipe.save_pretrained(arguments.out)
    forget_where_it_was(arguments.out)
    # The same bytes as the published tokenizer: git stores them once, and the folder can be copied alone.
    shutil.rmtree(vae)
    shutil.copytree(arguments.tokenizer, vae, ignore=shutil.ignore_patterns("README.md"))
    # Scored as a user would, from the folder that is published.
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "record.jsonl"
        command = [sys.executable, str(Path(__file__).with_name("evaluate_pipeline.py")), str(arguments.out)]
        command += ["--record", str(found)]
        for name in ("prompts", "steps", "guidance"):
            command += [f"--{name}", str(getattr(arguments, name))]
        if subprocess.run([*command, "--note", f"published as {arguments.out}"], check=False).returncode:
            raise UserError(f"{arguments.out}: could not be scored")
        lines = found.read_text()
    records = [json.loads(line) for line in lines.splitlines()]
    write_atomically(arguments.out / "README.md", trained_card(pipe, str(arguments.out), records, recipe))
    if arguments.record:
        with open(arguments.record, "a") as file:
            file.write(lines)
    print(arguments.out)
    return 0


def check_tokenizer(trained: Any, published: Path) -> None:
    """Raise UserError where a published tokenizer is not, in bfloat16, the one that a pipeline was trained with."""
    weights = load_tokenizer(published).state_dict()
    own = trained.state_dict()
    differs = list(own.keys() ^ weights.keys())
    differs += [name for name in own.keys() & weights.keys() if not torch.equal(own[name].bfloat16(), weights[name].bfloat16())]
    if differs:
        raise UserError(f"--tokenizer {published}: {len(differs)} weights are not the pipeline's own, {min(differs)} first")


def trainings_of(run: Path) -> list[dict[str, Any]]:
    """Return how a run's transformer was trained, in the runs that it started from first.

    Raises UserError for a folder that is no run, and for one that was not trained on generated clips.
    """
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run}: no config.yaml there; give RUN/pipeline of a training")
    config: Any = load_yaml(str(run / "config.yaml"))
    if config["data"]["train"] != "shapes":
        raise UserError(f"{run}: trained on {config['data']['train']}; only prompts of generated clips (shapes) can be scored")
    before = trainings_of(Path(config["init"]).parent) if config["init"] else []
    ratios = [budget["ratio"] for budget in config["budgets"]]
    found = training_figures(run, ratios[0])
    if not found:
        raise UserError(f"{run}: its training left no figures")
    settings = {key: config["loop"][key] for key in SETTINGS}
    data = {key: config["data"][key] for key in ("shapes", "frames", "size")} | {"emphasis": config["data"].get("emphasis", ())}
    spent = {"steps": found["steps"], "seconds": found["seconds"], "machines": machines_of(run)}  # it may have ended early
    return [*before, {"ratios": ratios, **data, **settings, "batch": samples_a_step(run), "shift": config["shift"], **spent}]


def samples_a_step(run: Path) -> int:
    """Return the samples of a step, of all processes; a run without its checkpoints is taken to be of one process."""
    if states := sorted(run.glob("*/step-*/state.json")):
        return json.loads(states[-1].read_text())["global_batch"]
    loop: Any = load_yaml(str(run / "config.yaml"))["loop"]
    return loop["batch_size"] * loop["accumulate"]


if __name__ == "__main__":
    raise SystemExit(run_main(main))
