"""Options that several commands share: one word, one meaning, one default; and the checks of files to write."""

import argparse
import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from promag.training.config import UserError
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
    "--lora": {"type": Path, "metavar": "FOLDER", "help": "adapters for the transformer, of `promag train-diffusion --lora`"},
    "--contact-sheet": {"type": Path, "metavar": "FILE.png", "help": "picture to write, with frames of the videos"},
    "--record": {"type": Path, "help": RECORD},
    "--note": {"default": "", "help": "text that the recorded lines carry"},
}


def share(parser: Any, *names: str, **changes: Any) -> None:
    """Add shared options to a parser or a group of it; `changes` are arguments of add_argument, for all of them."""
    for name in names:
        parser.add_argument(name, **{**SHARED[name], **changes})


def check_writable(
    option: str, path: str | os.PathLike | None, others: Iterable[str | os.PathLike | None] = (), appended: bool = False
) -> None:
    """Raise UserError where a file cannot be written; nothing is left behind, and missing folders are not made.

    Args:
        option: name of the option that gives the file.
        path: the file; None where the option is left out.
        others: files and folders that the command reads or writes too: the file must be none of them.
        appended: lines are appended to the file, so that its folder need not be writable.
    """
    if path is None:
        return
    check_apart(option, path, others)
    path, made = Path(path), []
    probe = path.with_name(f".{path.name}.{os.getpid()}.part")  # as long as the name that `replaced_file` writes to
    try:
        if path.exists():
            open(path, "ab").close()  # refuses a folder too
        if not (appended and path.exists()):
            for folder in reversed(path.parents):
                if not folder.exists():
                    folder.mkdir()
                    made.append(folder)
            probe.touch()
            probe.unlink()
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written: {error.strerror}; name another file") from None
    finally:
        for folder in reversed(made):
            with contextlib.suppress(OSError):  # another process may have put something there
                folder.rmdir()


def check_apart(option: str, path: str | os.PathLike, others: Iterable[str | os.PathLike | None]) -> None:
    """Raise UserError where a file or folder to write is, or holds, one of the `others` that a command uses."""
    place = Path(path).resolve()
    for other in filter(None, others):
        there = Path(other).resolve()
        if place in (there, *there.parents) or (
            os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other)
        ):
            raise UserError(f"{option} {path}: would overwrite {other}, which this command uses too; give another name")


def check_at_least_one(arguments: argparse.Namespace, *names: str) -> None:
    """Raise UserError where an option of whole numbers is given and below 1; `names` are those of its arguments."""
    for name in names:
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: at least 1 is needed")


def check_different(option: str, values: Sequence[Any] | None) -> None:
    """Raise UserError where one of an option's values is given twice."""
    if twice := [value for value, count in Counter(values or ()).items() if count > 1]:
        raise UserError(f"{option} {' '.join(map(str, values or ()))}: {twice[0]} is given twice; give every value once")


def name_of(path: str | os.PathLike) -> str:
    """Return the last part of a path; of `.` and `..` the name of the folder that they stand for."""
    return os.path.basename(os.path.abspath(path))
