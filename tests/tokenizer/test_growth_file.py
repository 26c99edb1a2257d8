"""Levels saved apart from their base, and the refusal of bases and files that do not fit them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from promag import AutoencoderKLProMAG
from promag.training.config import UserError
from tests.conftest import make_tokenizer
from tests.existing_models import small_existing
from tests.tokenizer.test_existing import grown, moments, settle_levels


@torch.no_grad()
def test_growth_on_our_own_base_is_saved_apart_too(tmp_path):
    base, model = make_tokenizer(levels=1), make_tokenizer(levels=1)
    model.grow()
    settle_levels(model, 0.05)
    model.save_growth(tmp_path / "growth")
    again = AutoencoderKLProMAG.load_growth(tmp_path / "growth", base)
    x = torch.rand(1, 3, 9, 16, 16)
    assert torch.equal(moments(again, x, 8), moments(model, x, 8))
    with pytest.raises(ValueError, match="nothing was grown yet"):
        make_tokenizer(levels=1).save_growth(tmp_path / "none")


def test_another_base_is_refused_by_name(tmp_path):
    _, model = grown("Wan 2.1")
    model.save_growth(tmp_path / "growth")
    other = small_existing("Wan 2.1")
    with torch.no_grad():
        other.decoder.conv_in.weight[0, 0, 0, 0, 0] += 1
    refused = [
        (other, "grown on an AutoencoderKLWan of fingerprint .*; the base given has other weights"),
        (small_existing("Wan 2.1").half(), "the base given is in float16, which rounds them: load it in float32 or bfloat16"),
        (small_existing("CogVideoX"), "grown on an AutoencoderKLWan; the base given is an AutoencoderKLCogVideoX"),
        (tmp_path / "nowhere", "its base, an AutoencoderKLWan, is not in .*nowhere; put it there, or load it with Auto"),
        (None, "was grown on an AutoencoderKLWan whose folder is not recorded; name its base: load it with AutoencoderKLP"),
    ]
    for base, message in refused:
        with pytest.raises(UserError, match=message):
            AutoencoderKLProMAG.load_growth(tmp_path / "growth", base)
    rounded = small_existing("Wan 2.1").to(torch.bfloat16)  # the same weights in lower precision are the same base
    assert AutoencoderKLProMAG.load_growth(tmp_path / "growth", rounded).temporal_ratios == (4, 8, 16)
    weights = load_file(tmp_path / "growth" / "growth.safetensors")
    save_file(dict(list(weights.items())[1:]), tmp_path / "growth" / "growth.safetensors")
    with pytest.raises(UserError, match=f"its levels need other tensors, first {next(iter(sorted(weights)))}"):
        AutoencoderKLProMAG.load_growth(tmp_path / "growth", small_existing("Wan 2.1"))
    settings = json.loads((tmp_path / "growth" / "growth.json").read_text())
    (tmp_path / "growth" / "growth.json").write_text(json.dumps({"growth": settings["growth"]}))
    with pytest.raises(UserError, match="needs base, with class_name and fingerprint, and growth"):
        AutoencoderKLProMAG.load_growth(tmp_path / "growth", small_existing("Wan 2.1"))
    (tmp_path / "growth" / "growth.json").write_text(json.dumps({**settings, "growth": [{"depth": 3}]}))
    with pytest.raises(UserError, match="growth: cannot be loaded"):
        AutoencoderKLProMAG.load_growth(tmp_path / "growth", small_existing("Wan 2.1"))
