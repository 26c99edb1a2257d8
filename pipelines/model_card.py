"""The model card of a pipeline: its description, usage and parts, all read from the pipeline itself."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import nn

from promag.tokenizer.geometry import latent_frames, ratio_names, tokens
from promag.tokenizer.levels import parameter_count

FOLDER = "PATH/OF/THIS/FOLDER"  # in the card of a pipeline that is saved and not uploaded
EMPTY = "This model card has been automatically generated."  # how diffusers ends the description of a card without content


class Carded:
    """Mixin of a pipeline that writes how to load it into the folders it is saved in, and into what it uploads."""

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as the pipeline does, with a README.md that says to import promag first, unless there is one."""
        parent: Any = super()
        parent.save_pretrained(save_directory, *args, **kwargs)
        path, pipe = Path(save_directory) / "README.md", cast(Any, self)
        if path.parent.is_dir() and not path.exists() and None not in (pipe.transformer, pipe.vae):
            path.write_text(pipeline_card(self, FOLDER), encoding="utf-8")

    def _upload_folder(self, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """Upload what push_to_hub saved, with a card that says how to use it in place of an empty one."""
        path, parent = Path(working_dir) / "README.md", cast(Any, super())
        if path.exists() and any(text in path.read_text(encoding="utf-8") for text in (EMPTY, FOLDER)):
            path.write_text(pipeline_card(self, repo_id, hub=True), encoding="utf-8")
        return parent._upload_folder(working_dir, repo_id, *args, **kwargs)


def pipeline_card(pipe: Any, name: str, hub: bool = False) -> str:
    """Return the Markdown card of a pipeline in the folder `name`, or with `hub` in the hub repository of that name."""
    # diffusers cannot load classes of an installed package from a repository name, but it can from a local snapshot.
    place = f'snapshot_download("{name}")' if hub else f'"{name}"'
    config = pipe.config
    frames, height, width = (config[key] for key in ("num_frames", "height", "width"))
    size = f"{frames} frames of {height}x{width} (height x width)"
    parts = {key: part for key, part in pipe.components.items() if isinstance(part, nn.Module)}
    return "\n".join(
        [
            "---",
            "library_name: diffusers",
            "pipeline_tag: text-to-video",
            "tags: [text-to-video, video, promag]",
            "---",
            "",
            f"# {name}",
            "",
            "Text to video in the latent space of a progressively grown tokenizer (ProMAG, arXiv 2501.05442).",
            f"Trained on {size} at {config['fps']:g} frames per second; these are the defaults of a call, in "
            f"{config['num_inference_steps']} steps {_guidance(config['guidance_scale'])}.",
            "",
            "```python",
            "import promag",
            "from diffusers import DiffusionPipeline",
            *(["from huggingface_hub import snapshot_download"] if hub else []),
            "",
            f"pipe = DiffusionPipeline.from_pretrained({place})",
            *(["# pipe.enable_tiny_decoder() decodes faster, less sharply"] if "tiny_decoder" in parts else []),
            'frames = pipe("what the video shows").frames[0]',
            f'promag.write_video("video.mp4", (frames * 255).round().astype("uint8"), {config["fps"]:g})',
            "```",
            "Import promag first: diffusers alone raises `module diffusers has no attribute ProMAGPipeline`.",
            "",
            f"## Budgets for {size}",
            "",
            "| temporal_ratio | latent frames | tokens |",
            "| --- | --- | --- |",
            *(_budget(pipe, int(ratio), frames, height, width) for ratio in pipe.transformer.config["latents_mean"] or {}),
            "",
            f"Default: {config['temporal_ratio']}. {_conditioning(pipe)}",
            "",
            "## Parts",
            "",
            "| part | class | parameters |",
            "| --- | --- | --- |",
            *(f"| {key} | {type(part).__name__} | {parameter_count([part]):,} |" for key, part in parts.items()),
            "",
        ]
    )


def lora_card(name: str, base: str, sampling: Mapping[str, Any], fps: float) -> str:
    """Return the Markdown card of adapters in the folder `name` for the pipeline in the folder `base`.

    `sampling` is what their file records: temporal_ratios, and of a student num_inference_steps and guidance_scale.
    """
    steps = {key: value for key, value in sampling.items() if key != "temporal_ratios"}
    call = "".join(f", {key}={value:g}" for key, value in {"temporal_ratio": sampling["temporal_ratios"][0], **steps}.items())
    ratios = ratio_names(sampling["temporal_ratios"])
    few = f", and sampled in {steps['num_inference_steps']} steps {_guidance(steps['guidance_scale'])}" if steps else ""
    return "\n".join(
        [
            "---",
            "library_name: diffusers",
            "pipeline_tag: text-to-video",
            "tags: [text-to-video, video, lora, promag]",
            "---",
            "",
            f"# {name}",
            "",
            f"LoRA adapters for the transformer of `{base}`, trained at {ratios}{few}.",
            "",
            "```python",
            "import promag",
            "from diffusers import DiffusionPipeline",
            "",
            f'pipe = DiffusionPipeline.from_pretrained("{base}")',
            f'pipe.load_lora_weights("{name}")',
            "pipe.fuse_lora()  # into the weights, for speed",
            f'frames = pipe("what the video shows"{call}).frames[0]',
            f'promag.write_video("video.mp4", (frames * 255).round().astype("uint8"), {fps:g})',
            "```",
            f'`promag sample {base} --lora {name} --prompt "..." --out video.mp4` does the same from the command line.',
            "",
        ]
    )


def _guidance(scale: float) -> str:
    return f"with guidance {scale:g}" if scale > 1 else "without guidance"


def _budget(pipe: Any, ratio: int, frames: int, height: int, width: int) -> str:
    if (frames - 1) % ratio:
        return f"| {ratio} | needs 1 + {ratio}k frames | |"
    patch = tuple(pipe.transformer.config["patch_size"])
    try:
        count = tokens(frames, height, width, ratio, patch, pipe.vae.spatial_compression_ratio)
    except ValueError:
        return f"| {ratio} | {latent_frames(frames, ratio)}: not divisible by patches of {patch[0]} | |"
    return f"| {ratio} | {latent_frames(frames, ratio)} | {count:,} |"


def _conditioning(pipe: Any) -> str:
    frames = pipe.transformer.config["condition_frames"]
    if not frames:
        return "Trained on text alone: without a first image or clip."
    return f"Takes a first image (`image=`) or a clip to continue (`video=`), up to {frames} latent frames of it."
