"""Loading, casting, sampling and saving the shipped checkpoints gives no warnings."""

import logging
import warnings

import pytest
import torch
from diffusers import DiffusionPipeline

from promag import AutoencoderKLProMAG, ProMAGPipeline

LIBRARIES = ("diffusers", "transformers", "accelerate", "peft")


@pytest.fixture
def messages():
    """All warnings, and all log messages of level warning or higher, while the test runs."""
    logged: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logged.append(record.getMessage())

    handler = Collect(logging.WARNING)
    for name in LIBRARIES:
        logging.getLogger(name).addHandler(handler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: [
            *logged,
            *(str(w.message) for w in caught if not issubclass(w.category, ResourceWarning)),
        ]  # of other tests
    for name in LIBRARIES:
        logging.getLogger(name).removeHandler(handler)


def test_our_models_warn_of_nothing(messages, tmp_path):
    tokenizer = AutoencoderKLProMAG.from_pretrained("checkpoints/tiny")
    tokenizer.to(torch.bfloat16).to(torch.device("cpu"), dtype=torch.float32)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    AutoencoderKLProMAG.from_pretrained(tmp_path / "tokenizer", dtype=torch.bfloat16)
    pipe = ProMAGPipeline.from_pretrained("checkpoints/tiny-video")
    pipe.to(torch.float32).to(dtype=torch.bfloat16).to("cpu")
    pipe("a red disc", num_inference_steps=1, num_frames=17, height=32, width=32)
    pipe.save_pretrained(tmp_path / "pipeline")
    DiffusionPipeline.from_pretrained(tmp_path / "pipeline", dtype=torch.bfloat16)
    assert messages() == []


def test_modules_that_should_stay_in_float32_are_still_named(messages, monkeypatch, tokenizer):
    monkeypatch.setattr(type(tokenizer), "_keep_in_fp32_modules", ["head"])
    tokenizer.to(torch.float32)
    assert [text.partition(". ")[0] for text in messages()] == [
        "There are modules in AutoencoderKLProMAG that should be kept in float32: ['head']"
    ]
