"""The presets' transformers, built without memory, have the number of parameters that the presets' first lines state."""

import re
from pathlib import Path

import pytest
import torch

from promag import ProMAGTransformer3DModel
from promag.diffusion.config import DiffusionConfig
from promag.training.config import build, load_yaml


def transformer(path: Path) -> ProMAGTransformer3DModel:
    config = build(DiffusionConfig, load_yaml(path), str(path))
    text = {"text_dim": config.text.width, "pooled_dim": config.text.width}
    with torch.device("meta"):
        return ProMAGTransformer3DModel(**vars(config.model), **text)


PRESETS = [path for path in sorted(Path("configs/diffusion").glob("*.yaml")) if path.stem not in ("wan", "few-steps")]
PRESETS.append(Path("configs/paper/diffusion.yaml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_the_transformer_has_the_stated_parameters(path):
    model = transformer(path)
    number, unit = re.search(r": ([\d.]+) ([MB]) parameters", path.read_text().splitlines()[0]).groups()
    stated = float(number) * {"M": 1e6, "B": 1e9}[unit]
    count = sum(p.numel() for p in model.parameters())
    assert all(p.is_meta for p in model.parameters())
    assert count == pytest.approx(stated, rel=0.1)
