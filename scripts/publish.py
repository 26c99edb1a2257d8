"""Save a tokenizer, pipeline or adapters in bf16 with a model card of their figures.

promag publish tokenizer RUN/tokenizer --out checkpoints/tiny --videos eval.jsonl --sources clips.csv
promag publish pipeline RUN/pipeline --out checkpoints/tiny-video --tokenizer checkpoints/tiny
promag publish lora RUN/lora --out checkpoints/tiny-video-fast --pipeline checkpoints/tiny-video
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from promag.data.datasets import ClipDataset, load_index, open_evaluation
from promag.data.tables import load_text
from promag.diffusion.config import DiffusionConfig
from promag.diffusion.validation import training_figures
from promag.pipelines.lora import recorded_sampling
from promag.pipelines.model_card import lora_card, pipeline_card
from promag.pipelines.sampling import load_pipeline
from promag.reports.pipeline_card import trained_card
from promag.reports.tokenizer_card import count_sources, tokenizer_card
from promag.scripts import evaluate_pipeline, evaluate_tokenizer
from promag.scripts._options import check_apart, check_at_least_one, check_writable, share
from promag.scripts._parts import enable_tiny_decoder
from promag.tokenizer.checkpoint import class_name, is_growth, load_tokenizer, save_model, save_tokenizer
from promag.tokenizer.config import TokenizerConfig
from promag.tokenizer.levels import parameter_count
from promag.tokenizer.stages import finished_stages
from promag.training.command_line import Parser, run_main
from promag.training.config import UserError
from promag.training.files import append_json, write_atomically
from promag.training.run import checkpoints, machines_of, read_config

SAMPLED = ("prompts", "steps", "guidance")  # options of prompt accuracy
LOOP_KEYS = ("steps", "learning_rate", "muon_learning_rate", "ema_decay")  # what a card states of a text-to-video training


def main(argv: Sequence[str]) -> int:
    """Write the folder; with --record also the figures as JSON lines. Raises UserError for mistakes."""
    parser = Parser(__doc__)
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)

    summary = "save a tokenizer with a card of its figures on unseen clips, its recipe, data and licences"
    tokenizer = kinds.add_parser("tokenizer", help=summary, description=summary)
    tokenizer.set_defaults(run=_publish_tokenizer)
    tokenizer.add_argument("checkpoint", type=Path, help="RUN/tokenizer of a finished training, or RUN/growth")
    share(tokenizer, "--videos", "--frames", "--size", "--count")
    tokenizer.add_argument("--sources", type=Path, required=True, help="CSV: split, source_repo, source_commit, licence")
    tokenizer.add_argument("--split", default="train", help="rows of that CSV that were trained on")
    tokenizer.add_argument("--credits", type=Path, help="Markdown to put under the sources")

    summary = "save a pipeline trained on generated clips with a card of its prompt accuracy, recipe and licence"
    pipeline = kinds.add_parser("pipeline", help=summary, description=summary)
    pipeline.set_defaults(run=_publish_pipeline)
    pipeline.add_argument("checkpoint", type=Path, help="RUN/pipeline of a finished training on generated clips")
    pipeline.add_argument("--tokenizer", type=Path, required=True, help="published tokenizer that it was trained with")
    pipeline.add_argument("--tiny-decoder", type=Path, metavar="FOLDER", help="tiny decoder that becomes its part")
    share(pipeline, "--prompts", "--steps", "--guidance")

    summary = "save adapters trained on generated clips with a card of their prompt accuracy, recipe and licence"
    lora = kinds.add_parser("lora", help=summary, description=summary)
    lora.set_defaults(run=_publish_lora)
    lora.add_argument("checkpoint", type=Path, help="RUN/lora of a finished training on generated clips")
    lora.add_argument("--pipeline", type=Path, required=True, help="published pipeline that they were trained on")
    share(lora, "--prompts", "--steps", "--guidance")

    for kind in (tokenizer, pipeline, lora):
        kind.add_argument("--out", type=Path, required=True, help="folder to write; its path is the name on the card")
        kind.add_argument(
            "--licence", metavar="ID", help="licence of the weights for the card, such as apache-2.0; left out: none"
        )
        share(kind, "--record")
    arguments = parser.parse_args(argv)
    # An older folder is replaced whole, so that nothing that is read may lie in it.
    inputs = ("checkpoint", "tokenizer", "pipeline", "tiny_decoder", "sources", "credits", "videos")
    check_apart("--out", arguments.out, [getattr(arguments, name, None) for name in inputs])
    check_writable("--out", arguments.out / "README.md")
    check_writable("--record", arguments.record, appended=True)
    lines, card = arguments.run(arguments)
    write_atomically(arguments.out / "README.md", card)
    if arguments.record:
        append_json(arguments.record, *map(json.loads, lines.splitlines()))
    print(arguments.out)
    return 0


def _score(
    evaluate: Callable[[Sequence[str]], int], published: Path, options: Mapping[str, Any], base: Path | None = None
) -> str:
    """Return the lines that a command records of a published folder, or of `base` with what was published."""
    with tempfile.TemporaryDirectory() as temporary:
        record = Path(temporary) / "record.jsonl"
        words = [str(base or published), "--record", str(record), "--note", f"published as {published}"]
        evaluate([*words, *(w for name, value in options.items() if value is not None for w in (f"--{name}", str(value)))])
        return record.read_text(encoding="utf-8")


# -- tokenizers ------------------------------------------------------------------------------------------------------


def _publish_tokenizer(arguments: argparse.Namespace) -> tuple[str, str]:
    """Write the weights; return the figures as a JSON line, and the card."""
    recipe = list_stages(arguments.checkpoint.resolve().parent)
    sources = count_sources(arguments.sources, arguments.split)
    credits = load_text(arguments.credits) if arguments.credits else ""
    model: Any = load_tokenizer(arguments.checkpoint)
    # An older folder is replaced below, so that mistakes must be known before.
    evaluate_tokenizer.check_shape(arguments, model, model.temporal_ratios[-1])
    check_at_least_one(arguments, "count")
    clips = open_evaluation(arguments.videos, None, arguments.frames, arguments.size, arguments.count)
    unseen = _is_unseen(clips, trained_files(arguments.checkpoint.resolve().parent))
    model.to(torch.bfloat16)
    kind = save_weights(model, arguments.out, levels_alone=is_growth(arguments.checkpoint))
    asked = {key: getattr(arguments, key) for key in ("videos", "frames", "size", "count")}
    line = _score(evaluate_tokenizer.main, arguments.out, asked)
    shape = {
        **kind,
        "latent_channels": model.config["latent_channels"],
        "temporal_ratios": model.temporal_ratios,
        "spatial_ratio": model.spatial_ratio,
        "dtype": "bfloat16",
    }
    card = tokenizer_card(str(arguments.out), shape, json.loads(line), recipe, sources, credits, arguments.licence, unseen)
    return line, card


def save_weights(model: Any, out: Path, levels_alone: bool) -> dict[str, Any]:
    """Save a tokenizer in the form in which it was given; return what its card tells of that, and its parameters."""
    if not levels_alone:
        save_tokenizer(model, out)
        other = {} if (saved := class_name(out)) == type(model).__name__ else {"class": saved}
        return {**other, "parameters": parameter_count([model])}
    model.save_growth(out)
    grown = [module for ratio in model.temporal_ratios[1:] for module in model.level_modules(ratio)]
    return {"base": model.existing.class_name if model.existing else type(model).__name__, "parameters": parameter_count(grown)}


def trained_files(run: Path) -> set[str] | None:
    """Return the SHA-256 of the videos that a run, and those before it, were trained on; None where no index says so."""
    config, files = _config_of(run, "tokenizer"), set[str]()
    if init := config["init"]:
        before = Path(init).parent
        earlier = trained_files(before) if (before / "config.yaml").is_file() else None
        if earlier is None:
            return None
        files |= earlier
    for source in (config["data"]["train"], *(extra["train"] for extra in config["data"]["extra_sources"] or ())):
        if source != "synthetic":
            try:
                files |= {clip.sha256 for clip in load_index(source)}
            except UserError:  # shards, or an index that has gone
                return None
    return files


def _is_unseen(clips: Any, trained: set[str] | None) -> bool:
    """Tell whether it is known of every clip that its file was not trained on."""
    return trained is not None and isinstance(clips, ClipDataset) and trained.isdisjoint(clip.sha256 for clip in clips.clips)


def list_stages(run: Path) -> list[dict[str, Any]]:
    """Return how each level of a run's tokenizer was trained, those of the runs that it started from first.

    The first is {"published": folder} where these started from a folder outside of a run.

    Raises UserError for a folder that is no run, and for a run that finished no stage.
    """
    config = _config_of(run, "tokenizer")
    before = _stages_before(config["init"])
    stages = []
    for name, stage, done in finished_stages(run, config):
        settings = {key: stage["optimization"][key] for key in ("steps", "learning_rate", "muon_learning_rate")}
        settings["batch"] = _global_batch(checkpoints(run / name), stage["optimization"])
        shape = {"name": name, "frames": stage["frames"], "size": config["data"]["size"], "buckets": stage["buckets"]}
        shape["extra_sources"] = {source["train"]: source["share"] for source in config["data"]["extra_sources"] or ()}
        spent = {"seconds": done["seconds"], "machines": machines_of(run)}
        stages.append({**shape, **settings, **_lower(stage), "loss": _loss(stage), **spent})
    if not stages:
        raise UserError(f"{run}: no stage of it is finished")
    return before + stages


def _stages_before(init: str | None) -> list[dict[str, Any]]:
    """Return the stages of the run that a tokenizer started from; the place alone where it lies in none."""
    if not init:
        return []
    run = Path(init).parent
    return list_stages(run) if (run / "config.yaml").is_file() else [{"published": init}]


def _lower(stage: Mapping[str, Any]) -> dict[str, str]:
    """Return what became of the encoders and decoders of the levels below a stage's; a base has none."""
    parts = {"all": ("trained", "trained"), "decoder": ("frozen", "trained")}.get(stage["trainable"])
    if parts and (stage["growth"] or stage["by_turns"]):
        return dict(zip(("encoder", "decoder"), parts, strict=True))
    return {key: stage["growth"][key] if stage["growth"] else "-" for key in ("encoder", "decoder")}


def _loss(stage: Mapping[str, Any]) -> str:
    parts = ["L1", f"{stage['mse_weight']:g} squared", f"{stage['kl_weight']:g} KL"]
    if stage["latent_pretrain_steps"]:
        parts.insert(0, f"first {stage['latent_pretrain_steps']} steps the lower latent; then")
    parts += [f"{weight:g} {name}" for name in ("change", "consistency") if (weight := stage[f"{name}_weight"])]
    parts += [f"{stage[name]['weight']:g} {name}" for name in ("perceptual", "adversarial") if stage[name]]
    notes = [" + ".join(parts).replace("; then + ", "; then ")]
    if (weight := stage["between_weight"]) != 1:
        notes.append(f"frames between key frames count {weight:g} times")
    if turns := stage["by_turns"]:
        notes.append(f"{', '.join(f'{ratio}x' for ratio in turns)} by turns")
    return "; ".join(notes)


# -- pipelines -------------------------------------------------------------------------------------------------------


def _publish_pipeline(arguments: argparse.Namespace) -> tuple[str, str]:
    """Write the pipeline, with a copy of its published tokenizer; return the figures as JSON lines, and the card."""
    evaluate_pipeline.check_numbers(arguments)
    recipe = list_trainings(arguments.checkpoint.resolve().parent)
    pipe: Any = load_pipeline(arguments.checkpoint)
    check_same(pipe.vae, load_tokenizer(arguments.tokenizer), f"--tokenizer {arguments.tokenizer}", "the pipeline's own")
    if arguments.tiny_decoder:
        enable_tiny_decoder(pipe, str(arguments.tiny_decoder))
    save_published(pipe, arguments.tokenizer, arguments.out)
    lines = _score(evaluate_pipeline.main, arguments.out, {key: getattr(arguments, key) for key in SAMPLED})
    opening = pipeline_card(pipe, str(arguments.out))
    return lines, trained_card(opening, [json.loads(line) for line in lines.splitlines()], recipe, arguments.licence)


def _publish_lora(arguments: argparse.Namespace) -> tuple[str, str]:
    """Write the adapters; return the figures as JSON lines, and the card."""
    evaluate_pipeline.check_numbers(arguments)
    run = arguments.checkpoint.resolve().parent
    init = _config_of(run, "lora")["init"]
    source = arguments.checkpoint / LORA_WEIGHT_NAME_SAFE
    if not source.is_file():
        raise UserError(f"{arguments.checkpoint}: no {source.name} there; give RUN/lora of a training with `lora`")
    sampling = recorded_sampling(source)
    if not sampling:
        raise UserError(
            f"{source}: states no temporal ratios; delete {arguments.checkpoint} and run its training command again, which "
            "saves it from the last checkpoint"
        )
    recipe = list_trainings(run)
    pipe: Any = load_pipeline(arguments.pipeline)
    before: Any = load_pipeline(init)
    check_same(before.transformer, pipe.transformer, f"--pipeline {arguments.pipeline}", "those of the adapters' training")
    save_model(_PublishedLora(source), arguments.out)
    options = {key: getattr(arguments, key) for key in SAMPLED} | {"lora": arguments.out}
    lines = _score(evaluate_pipeline.main, arguments.out, options, arguments.pipeline)
    opening = lora_card(str(arguments.out), str(arguments.pipeline), sampling, pipe.config["fps"])
    return lines, trained_card(opening, [json.loads(line) for line in lines.splitlines()], recipe, arguments.licence)


class _PublishedLora:
    def __init__(self, source: Path):
        self.source = source

    def save_pretrained(self, folder: Path) -> None:
        with safe_open(self.source, "pt") as opened:
            metadata = opened.metadata()
        weights = {name: weight.bfloat16() for name, weight in load_file(self.source).items()}
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, folder / self.source.name, metadata)


def save_published(pipe: Any, tokenizer: Path, folder: Path) -> None:
    """Put a pipeline in bfloat16, with a copy of its published tokenizer, in the place of `folder`."""
    save_model(_Published(pipe.to(dtype=torch.bfloat16), tokenizer), folder)


class _Published:
    def __init__(self, pipe: Any, tokenizer: Path):
        self.pipe, self.tokenizer = pipe, tokenizer

    def save_pretrained(self, folder: Path) -> None:
        self.pipe.save_pretrained(folder)
        # The same bytes as the published tokenizer: git stores them once, and the folder can be copied alone.
        shutil.rmtree(folder / "vae")
        shutil.copytree(self.tokenizer, folder / "vae", ignore=shutil.ignore_patterns("README.md"))


def check_same(trained: nn.Module, published: nn.Module, name: str, whose: str) -> None:
    """Raise UserError, with `name`, where published weights are not, in bfloat16, those that were trained with."""
    own, weights = ({key: value.cpu() for key, value in module.state_dict().items()} for module in (trained, published))
    differs = list(own.keys() ^ weights.keys())
    differs += [key for key in own.keys() & weights.keys() if not torch.equal(own[key].bfloat16(), weights[key].bfloat16())]
    if differs:
        raise UserError(f"{name}: {len(differs)} weights are not {whose}, {min(differs)} first")


def list_trainings(run: Path) -> list[dict[str, Any]]:
    """Return how a run's transformer was trained, in the runs that it started from first.

    Raises UserError for a folder that is no run, and for one that was not trained on generated clips.
    """
    config = _config_of(run, "pipeline")
    if config["data"]["train"] != "synthetic":
        raise UserError(
            f"{run}: trained on {config['data']['train']}; only prompts of generated clips (synthetic) can be scored"
        )
    before = _trainings_before(config["init"])
    ratios = [budget["ratio"] for budget in config["budgets"]]
    figures = training_figures(run, ratios[0])
    if not figures:
        raise UserError(f"{run}: its training left no figures")
    settings = {key: config["optimization"][key] for key in LOOP_KEYS}
    data = {key: config["data"][key] for key in ("synthetic_clips", "frames", "size")} | {
        "caption_weights": config["data"]["caption_weights"],
        "buckets": config["data"]["buckets"],
    }
    spent = {"steps": figures["steps"], "seconds": figures["seconds"], "machines": machines_of(run)}  # it may have ended early
    more = {"batch": samples_a_step(run), "shift": config["shift"], "few_steps": config["few_steps"]}
    return [*before, {"ratios": ratios, **data, **settings, **more, **spent}]


def _trainings_before(init: str | None) -> list[dict[str, Any]]:
    """Return the trainings of what a run started from; of a published pipeline, which has no run, its place alone."""
    if init is None:
        return []
    if (Path(init) / "README.md").is_file() and not (Path(init).parent / "config.yaml").is_file():
        return [{"published": init}]
    return list_trainings(Path(init).parent)


def samples_a_step(run: Path) -> int:
    """Return the samples of a step, of all processes; a run without its checkpoints is taken to be of one process."""
    states = [path for stage in sorted(run.iterdir()) for path in checkpoints(stage)]
    return _global_batch(states, _config_of(run, "pipeline")["optimization"])


def _global_batch(states: Sequence[Path], loop: Mapping[str, Any]) -> int:
    if states:
        return json.loads((states[-1] / "state.json").read_text(encoding="utf-8"))["global_batch"]
    return loop["batch_size"] * loop["accumulate"]


def _config_of(run: Path, kind: str) -> Any:
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run}: no config.yaml there; give RUN/{kind} of a training")
    return read_config(run, TokenizerConfig if kind == "tokenizer" else DiffusionConfig)


if __name__ == "__main__":
    raise SystemExit(run_main(main))
