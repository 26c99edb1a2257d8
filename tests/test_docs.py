"""The blocks of docs/reference/pipeline.md run as they stand, one after the other."""

import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from promag import ProMAGPipeline
from tests.pipelines.conftest import like, pipe  # noqa: F401 (a fixture)

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "pipeline.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(pipe, tmp_path, monkeypatch):  # noqa: F811
    """Where the page's paths lie: a tiny pipeline, and adapters for it."""
    own = like(pipe)
    own.save_pretrained(tmp_path / "runs/discs/pipeline")
    own.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    ProMAGPipeline.save_lora_weights(tmp_path / "runs/discs/lora", get_peft_model_state_dict(own.transformer))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_block_of_the_pipelines_page_runs(folder):
    assert len(BLOCKS) == 15
    names = {}
    for number, block in enumerate(BLOCKS):
        code = compile(block, f"block {number} of {PAGE.name}", "exec")
        if not block.startswith("# needs a GPU") or torch.cuda.is_available():
            exec(code, names)
    assert (folder / "disc.mp4").stat().st_size > 0
    assert names["cheap"].shape == names["close"].shape == (1, 33, 16, 24, 3)
    options = {"latents": names["noise"], "num_frames": 33, "num_inference_steps": 30, "output_type": "pt"}
    expected = names["pipe"]("a red disc moves left", **options).frames
    own = (names["own"].transpose(1, 2) / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(own, expected, atol=1e-3)
