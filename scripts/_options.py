"""Options that several commands share: one word, one meaning, one default."""

from pathlib import Path
from typing import Any

from promag.training.precision import HELP, PRECISIONS

RECORD = "append the figures, with commit and machine, to this results file"
SHARED: dict[str, dict[str, Any]] = {
    "checkpoint": {"help": "folder of a tokenizer, or of a pipeline"},
    "--videos": {
        "required": True,
        "help": "folder, table (CSV, TSV, JSONL, JSON), one video, a clips.jsonl, tar shards, or synthetic",
    },
    "--split": {"help": "keep these rows of a table"},
    "--frames": {"type": int, "default": 65, "help": "frames from the start of each clip"},
    "--size": {"type": int, "default": 64, "help": "height and width in pixels"},
    "--count": {"type": int, "default": 64, "help": "number of clips, where --videos is synthetic"},
    "--ratios": {"type": int, "nargs": "+", "help": "temporal ratios; left out: all that the checkpoint has"},
    "--prompts": {"type": int, "default": 64, "help": "number of prompts"},
    "--steps": {"type": int, "help": "denoising steps; left out: the pipeline's own"},
    "--guidance": {"type": float, "help": "classifier-free guidance, 1 turns it off; left out: the pipeline's own"},
    "--batch-size": {"type": int, "default": 1, "help": "videos sampled at once"},
    "--train-batch-size": {"type": int, "default": 4, "help": "clips in a training step that is measured"},
    "--rounds": {"type": int, "default": 5, "help": "measurements; the median counts"},
    "--precision": {"choices": PRECISIONS, "default": "auto", "help": HELP},
    "--perceptual": {
        "nargs": "*",
        "metavar": "KEY",
        "help": "metrics of the extra 'metrics': cvvdp, vmaf, frechet_frames; left out: those installed; empty: none",
    },
    "--lpips": {"help": "folder with the weights of vgg16 (torchvision) and vgg.pth (lpips), for LPIPS"},
    "--fvd": {"help": "TorchScript file of an I3D, for FVD: a program, so take it from someone you trust"},
    "--clip": {
        "help": "CLIP model to score videos with: a folder of transformers, open_clip:NAME or open_clip:local-dir:FOLDER"
    },
    "--clip-weights": {"help": "file with the weights of open_clip:NAME"},
    "--contact-sheet": {"type": Path, "metavar": "FILE.png", "help": "picture to write, with frames of the videos"},
    "--record": {"type": Path, "help": RECORD},
    "--note": {"default": "", "help": "text that the recorded lines carry"},
}


def share(parser: Any, *names: str, **changes: Any) -> None:
    """Add shared options to a parser or a group of it; `changes` are arguments of add_argument, for all of them."""
    for name in names:
        parser.add_argument(name, **{**SHARED[name], **changes})
