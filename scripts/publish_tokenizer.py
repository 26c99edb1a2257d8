"""Save a trained tokenizer as bf16 safetensors with a model card."""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from promag.reports.tokenizer_card import count_sources, tokenizer_card
from promag.tokenizer.autoencoder import parameter_count
from promag.tokenizer.train import load_tokenizer, save_model
from promag.training.config import UserError, load_yaml, run_main
from promag.training.run import machines_of, write_atomically


def main(argv: Sequence[str]) -> int:
    """Write the folder; with --record also the figures as a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("tokenizer", type=Path, help="RUN/tokenizer of a finished training")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; its path is the name on the card")
    parser.add_argument("--videos", required=True, help="unseen clips, as evaluate_tokenizer.py takes them")
    parser.add_argument("--sources", type=Path, required=True, help="CSV of clips: split, source_repo, source_commit, licence")
    parser.add_argument("--split", default="train", help="rows of that CSV that were trained on")
    parser.add_argument("--credits", type=Path, help="Markdown to put under the sources")
    parser.add_argument("--frames", type=int, default=65, help="frames from the start of each clip that is scored")
    parser.add_argument("--size", type=int, default=64, help="height and width of the clips that are scored")
    parser.add_argument("--record", type=Path, help="append the figures to this results file")
    arguments = parser.parse_args(argv)

    recipe = stages_of(arguments.tokenizer.parent)
    sources = count_sources(arguments.sources, arguments.split)
    model: Any = load_tokenizer(arguments.tokenizer)
    model.to(torch.bfloat16)
    save_model(model, arguments.out)
    # Scored as a user would, from the folder that is published.
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "record.jsonl"
        command = [sys.executable, str(Path(__file__).with_name("evaluate_tokenizer.py")), str(arguments.out)]
        command += ["--videos", arguments.videos, "--frames", str(arguments.frames), "--size", str(arguments.size)]
        command += ["--record", str(found)]
        if subprocess.run([*command, "--note", f"published as {arguments.out}"], check=False).returncode:
            raise UserError(f"{arguments.out}: could not be scored on {arguments.videos}")
        line = found.read_text()
    shape = {
        "parameters": parameter_count([model]),
        "latent_channels": model.config["latent_channels"],
        "temporal_ratios": model.temporal_ratios,
        "dtype": "bfloat16",
    }
    credits = arguments.credits.read_text() if arguments.credits else ""
    card = tokenizer_card(str(arguments.out), shape, json.loads(line), recipe, sources, credits)
    write_atomically(arguments.out / "README.md", card)
    if arguments.record:
        with open(arguments.record, "a") as file:
            file.write(line)
    print(arguments.out)
    return 0


def stages_of(run: Path) -> list[dict[str, Any]]:
    """Return how each level of a run's tokenizer was trained, those of the runs that it started from first.

    Raises UserError for a folder that is no run, or that did not finish a stage.
    """
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run}: no config.yaml there; give RUN/tokenizer of a training")
    config: Any = load_yaml(str(run / "config.yaml"))
    before = stages_of(Path(config["init"]).parent) if config["init"] else []
    found = []
    for stage in config["stages"]:
        done = run / f"{stage['ratio']}x" / "done.json"
        if done.exists():
            growth = stage["growth"] or {"encoder": "-", "decoder": "-"}
            settings = {key: stage["loop"][key] for key in ("steps", "batch_size", "learning_rate", "muon")}
            lower = {key: growth[key] for key in ("encoder", "decoder")}
            shape = {"ratio": stage["ratio"], "frames": stage["frames"], "size": config["data"]["size"]}
            shape["also"] = {source["train"]: source["share"] for source in config["data"].get("also") or ()}
            spent = {"loss": _loss(stage), "seconds": json.loads(done.read_text())["seconds"], "machines": machines_of(run)}
            found.append({**shape, **settings, **lower, **spent})
    if not found:
        raise UserError(f"{run}: no stage of it is finished")
    return before + found


def _loss(stage: dict[str, Any]) -> str:
    parts = ["L1", f"{stage['squared_weight']:g} squared", f"{stage['kl_weight']:g} KL"]
    if stage["latent_steps"]:
        parts.insert(0, f"first {stage['latent_steps']} steps the lower latent; then")
    parts += [f"{stage[name]['weight']:g} {name}" for name in ("perceptual", "adversarial") if stage[name]]
    return " + ".join(parts).replace("; then + ", "; then ")


if __name__ == "__main__":
    raise SystemExit(run_main(main))
