"""The work that is killed: trainings, caches, publishing and shards, at the smallest sizes."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from promag.data.clip_index import load_clips, save_clips
from promag.data.clips import prepare
from promag.data.listing import list_videos
from promag.data.shards.writer import write_shards
from promag.data.synthetic import clip
from promag.data.video import write_video
from promag.diffusion.config import DiffusionConfig
from promag.pipelines.build import cache, train_pipeline
from promag.pipelines.sampling import load_pipeline
from promag.scripts.publish import save_published
from promag.tokenizer.checkpoint import load_tokenizer, save_model
from promag.tokenizer.config import TokenizerConfig
from promag.tokenizer.train import train_tokenizer
from promag.training.config import UserError, build, load_yaml
from promag.training.files import read_json_lines, write_atomically

SIZE = 32
LOOP = {"batch_size": 1, "warmup": 1, "learning_rate": 0.01}
RUN = {"log_every": 1, "validate_every": 2, "save_every": 1, "keep_last": 1, "workers": 0, "trackers": [], "peak_tflops": 1.0}
MODEL = {"latent_channels": 4, "patch_size": 4, "block_out_channels": [16, 16, 16], "layers_per_block": 1}


@dataclass(frozen=True)
class Target:
    """Work that may be killed and started again.

    Args:
        run: does the work in a folder, with inputs from another one; called again, it continues.
        make_inputs: make those inputs in an empty folder, in this order.
        processes: numbers of processes that it is tried with.
    """

    run: Callable[[Path, Path], Any]
    make_inputs: tuple[Callable[[Path], None], ...] = ()
    processes: tuple[int, ...] = (1,)


def make_models(folder: Path) -> None:
    """Make a grown tokenizer, a text encoder, a pipeline and a published tokenizer."""
    from transformers import T5Config, T5EncoderModel

    from promag.diffusion.text import learn_vocabulary

    vocabulary = learn_vocabulary(["a red disc moves left"], 300)
    torch.manual_seed(0)
    t5 = T5EncoderModel(T5Config(vocab_size=len(vocabulary), d_model=12, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    for part in (t5, vocabulary):
        part.save_pretrained(folder / "t5")
    train_tokenizer(tokenizer_config(folder / "tokenizer-run"))
    config = diffusion_config(folder / "pipeline-run", folder)
    train_pipeline(config)
    publish_tokenizer(folder / "published", folder)


def make_videos(folder: Path) -> None:
    """Make five videos."""
    for number in range(5):
        pixels, _ = clip(number, "eval", 12, 48)
        write_video(folder / "videos" / f"v{number}.mp4", pixels, 10)


def make_captioned(folder: Path) -> None:
    """Make an index, its caches, and the index with other captions for two clips."""
    clips = prepare([(str(path), path.stem) for path in sorted((folder / "videos").iterdir())], progress=False).clips
    save_clips(folder / "clips.jsonl", clips)
    corrected = [dataclasses.replace(c, caption="a disc") for c in clips[1:3]]
    save_clips(folder / "corrected.jsonl", [clips[0], *corrected, *clips[3:]])
    config = _on_clips(folder / "captioned", folder, "clips.jsonl")
    cache(config, load_tokenizer(config.tokenizer))


def _on_clips(folder: Path, inputs: Path, index: str) -> DiffusionConfig:
    config, index = diffusion_config(folder, inputs), str(inputs / index)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, train=index, validation=index))


def tokenizer_config(folder: Path) -> TokenizerConfig:
    """Return the training of a tokenizer at 4x, and grown to 8x."""
    values: Any = load_yaml("tokenizer/tiny") | {"output_dir": str(folder), "precision": "fp32"}
    values["model"] |= MODEL
    values["data"] = {"synthetic_clips": 4, "validation_clips": 1, "size": SIZE, "temporal_strides": [1]}
    values["data"] |= {"train": "synthetic", "validation": "synthetic"}
    base, grown, _ = values["stages"]
    values["stages"] = [
        base | {"frames": 5, "optimization": LOOP | {"steps": 3}},
        grown | {"frames": 9, "latent_pretrain_steps": 1, "optimization": LOOP | {"steps": 3}},
    ]
    return build(TokenizerConfig, values | {"run": RUN}, "kills")


def diffusion_config(folder: Path, inputs: Path) -> DiffusionConfig:
    """Return the training of a text-to-video pipeline on latents at 4x and 8x, with a frozen and a trained text encoder."""
    values: Any = load_yaml("diffusion/tiny") | {"output_dir": str(folder), "precision": "fp32", "samples": None}
    values |= {"tokenizer": str(inputs / "tokenizer-run" / "tokenizer")}
    values["budgets"] = [{"ratio": 4, "share": 0.5}, {"ratio": 8, "share": 0.5}]
    values["data"] |= {"synthetic_clips": 5, "validation_clips": 2, "frames": 9, "size": SIZE, "shard_size": 2}
    values["data"] |= {"cache": str(folder / "latents")}
    encoders = [{"model": str(inputs / "t5"), "max_length": 8}, {"model": "small", "max_length": 8}]
    values["text"] |= {"encoders": encoders, "width": 16, "layers": 1, "heads": 2}
    values["model"] |= {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
    values["optimization"] |= LOOP | {"steps": 4}
    return build(DiffusionConfig, values | {"run": RUN}, "kills")


def publish_tokenizer(folder: Path, inputs: Path) -> None:
    """Save a tokenizer as `promag publish tokenizer` does, with a card."""
    model: Any = load_tokenizer(inputs / "tokenizer-run" / "tokenizer")
    save_model(model.to(torch.bfloat16), folder)
    write_atomically(folder / "README.md", "a card\n")


def _train_tokenizer(folder: Path, inputs: Path) -> None:
    train_tokenizer(tokenizer_config(folder / "run"))


def _cache(folder: Path, inputs: Path) -> None:
    config = diffusion_config(folder / "run", inputs)
    cache(config, load_tokenizer(config.tokenizer))


def _correct_captions(folder: Path, inputs: Path) -> None:
    """Cache clips of which two have other captions than in the cache that is there."""
    if not (folder / "begun").exists():
        shutil.copytree(inputs / "captioned", folder / "run", dirs_exist_ok=True)
        (folder / "begun").touch()
    config = _on_clips(folder / "run", inputs, "corrected.jsonl")
    cache(config, load_tokenizer(config.tokenizer))


def _train_diffusion(folder: Path, inputs: Path) -> None:
    """Train on latents that are there, so that all kills hit the training."""
    config = diffusion_config(folder / "run", inputs)
    latents = str(inputs / "pipeline-run" / "latents")
    train_pipeline(dataclasses.replace(config, data=dataclasses.replace(config.data, cache=latents)))


def _publish(folder: Path, inputs: Path) -> None:
    """Publish in the place of older models."""
    for name, older in (("tokenizer", "published"), ("pipeline", "pipeline-run/pipeline")):
        if not (folder / f"{name}-begun").exists():
            shutil.copytree(inputs / older, folder / name, dirs_exist_ok=True)
            (folder / f"{name}-begun").touch()
    publish_tokenizer(folder / "tokenizer", inputs)
    save_published(load_pipeline(inputs / "pipeline-run" / "pipeline"), inputs / "published", folder / "pipeline")


def _write_shards(folder: Path, inputs: Path) -> None:
    """Prepare an index, with its columns beside it, and write it as shards."""
    from promag.data import clip_index

    clip_index.SAVE_COLUMNS_FROM = 1
    save_clips(folder / "clips.jsonl", prepare(list_videos(inputs / "videos"), progress=False).clips)
    load_clips(folder / "clips.jsonl")
    try:
        write_shards(folder / "clips.jsonl", folder / "shards", 1, progress=False)
    except UserError as error:
        if "holds whole shards already" not in str(error):
            raise


TARGETS: Mapping[str, Target] = {
    "tokenizer": Target(_train_tokenizer, processes=(1, 2)),
    "caches": Target(_cache, (make_models,), (1, 2)),
    "captions": Target(_correct_captions, (make_models, make_videos, make_captioned), (1, 2)),
    "diffusion": Target(_train_diffusion, (make_models,), (1, 2)),
    "publish": Target(_publish, (make_models,)),
    "shards": Target(_write_shards, (make_videos,)),
}


def result_of(folder: Path) -> dict[str, Any]:
    """Return every file below a folder with what must not depend on kills: bytes, but for times and machines."""
    return {str(path.relative_to(folder)): _content(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def _content(path: Path) -> Any:
    if path.name == "metrics.jsonl":
        return [(record["step"], record.get("loss")) for record in read_json_lines(path)]
    if path.name in ("done.json", "state.json"):
        return {key: value for key, value in json.loads(path.read_text(encoding="utf-8")).items() if key != "seconds"}
    if path.name.endswith(".columns"):  # it holds the time of its index
        from safetensors.numpy import load_file

        return {name: np.asarray(value).tolist() for name, value in load_file(path).items()}
    if path.name == "tokenizer.json":  # transformers keeps the padding of the last call in it
        values = json.loads(path.read_text(encoding="utf-8"))
        return {key: value for key, value in values.items() if key not in ("padding", "truncation")}
    return path.read_bytes()
