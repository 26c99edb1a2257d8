"""Prompts of samples: frozen encoders encode them once, the trained encoder each time."""

import shutil

import pytest
import torch

from promag.diffusion.config import TextConfig, TextEncoderConfig
from promag.diffusion.text import encode, learn_vocabulary, load_frozen, side_by_side, small_clip, tokenize
from promag.pipelines.build import SampleText
from tests.scripts.test_scripts import write_t5

PROMPTS = ["a red disc", "a blue square"]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_frozen_embeddings_are_cached_and_trained_ones_computed_anew(tmp_path, order):
    write_t5(tmp_path / "t5")
    encoders = [TextEncoderConfig(model=str(tmp_path / "t5"), max_length=8), TextEncoderConfig(max_length=6)]
    text = TextConfig(
        encoders=tuple(encoders[i] for i in order), vocabulary=300, width=16, layers=1, heads=2, learning_rate=1e-3
    )
    vocabulary = learn_vocabulary(PROMPTS, 300, 6)
    torch.manual_seed(0)
    learned, frozen = (vocabulary, small_clip(vocabulary, 16, 1, 2)), load_frozen(str(tmp_path / "t5"), None, 8)
    kept = SampleText(text, PROMPTS)
    for round in range(2):
        for prompts in (PROMPTS, [""], PROMPTS[1:]):
            actual = kept.encode(prompts, learned)
            with torch.no_grad():
                expected = side_by_side(
                    [encode(pair[1], tokenize(pair[0], prompts)) for pair in _ordered(frozen, learned, order)]
                )
            for ours, reference in zip((*actual.tokens, *actual.masks), (*expected.tokens, *expected.masks), strict=True):
                assert torch.allclose(ours, reference, atol=1e-6)
            assert torch.allclose(actual.pooled, expected.pooled, atol=1e-6)
        if round == 0:
            shutil.rmtree(tmp_path / "t5")  # is not needed again
            with torch.no_grad():
                for parameter in learned[1].parameters():
                    parameter.mul_(1.5)


def _ordered(frozen, learned, order):
    pairs = (frozen, learned)
    return [pairs[i] for i in order]


def test_a_prompt_that_is_cut_is_named_by_every_encoder(tmp_path, caplog):
    write_t5(tmp_path / "t5")
    encoders = (TextEncoderConfig(model=str(tmp_path / "t5"), max_length=3), TextEncoderConfig(max_length=4))
    text = TextConfig(encoders=encoders, vocabulary=300, width=16, layers=1, heads=2, learning_rate=1e-3)
    vocabulary = learn_vocabulary(PROMPTS, 300, 4)
    kept = SampleText(text, PROMPTS[:1])
    for _ in range(2):
        kept.encode(PROMPTS[:1], (vocabulary, small_clip(vocabulary, 16, 1, 2)))
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("prompt 'a red disc' is longer than the text encoder's 3 tokens: ")
    assert second == "prompt 'a red disc' is longer than the text encoder's 4 tokens: 'disc' is cut off"
