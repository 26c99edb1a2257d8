"""Compiling the blocks that a model repeats: minutes at the start of a training on a GPU, fewer and larger kernels after.

Blocks are compiled one by one (regional compilation), for each shape that training meets. Validation has other shapes: it
runs what is compiled where that fits, and all else eagerly.
"""

import contextlib
from typing import Any

import torch

from .config import UserError

BACKEND = "inductor"
SHAPES = 256  # for which one kind of block may be compiled; beyond its own limit of 8 PyTorch silently stops compiling


def compile_blocks(model: Any) -> None:
    """Compile a model's repeated blocks in place; its weights keep their names. Raises UserError where it names none."""
    torch._dynamo.config.recompile_limit = max(SHAPES, torch._dynamo.config.recompile_limit)  # pyright: ignore
    try:
        model.compile_repeated_blocks(dynamic=False, backend=BACKEND)
    except ValueError as error:
        raise UserError(f"compile: {' '.join(str(error).split())}; set it to false") from None


def no_recompile() -> contextlib.AbstractContextManager:
    """Run what is compiled where it fits and all else eagerly: nothing new is compiled in the block."""
    return torch.compiler.set_stance("eager_on_recompile")
