"""On this CPU the backends native and _native_flash work, the latter without masks; flash and xformers do not."""

import logging
from importlib.util import find_spec

import pytest
import torch

from promag import ProMAGTransformer3DModel
from promag.diffusion.attention import choose_attention, probe
from promag.training.config import UserError
from tests.diffusion.test_transformer import SMALL, inputs

CPU = torch.device("cpu")


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = ProMAGTransformer3DModel(**SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def backends(model):
    return [
        str(getattr(a.processor._attention_backend, "value", None))
        for b in model.transformer_blocks
        for a in (b.attn1, b.attn2)
    ]


@pytest.mark.parametrize(("name", "set_to"), [("native", ["native"] * 4), ("_native_flash", ["_native_flash", "native"] * 2)])
def test_a_working_backend_is_set_and_cross_attention_gets_one_that_takes_masks(model, name, set_to, caplog):
    before = model(**inputs()).sample
    with caplog.at_level(logging.INFO):
        chosen = choose_attention(model, name, CPU, torch.float32)
    assert backends(model) == set_to
    assert chosen.startswith(name)
    assert f"attention on cpu: {chosen}" in caplog.text
    assert torch.allclose(model(**inputs()).sample, before, atol=1e-5)


def test_auto_on_a_cpu_keeps_plain_attention(model):
    assert choose_attention(model, "auto", CPU, torch.bfloat16).startswith("written out")
    assert backends(model) == ["None"] * 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flash", "attention: flash does not work on cpu: RuntimeError: Flash Attention backend 'flash' is not usable"),
        ("xformers", "attention: xformers does not work on cpu: "),
        ("_native_cudnn", "attention: _native_cudnn does not work on cpu: RuntimeError: No viable backend"),
        ("fast", "attention 'fast': use one of auto, flash, "),
    ],
)
def test_a_backend_that_does_not_work_is_refused_in_one_line(model, name, message):
    with pytest.raises(UserError) as error:
        choose_attention(model, name, CPU, torch.float32)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert backends(model) == ["None"] * 4


def test_a_backend_without_its_package_says_which_is_missing(model):
    for name, package in (("xformers", "xformers>="), ("flash", "flash-attn>="), ("sage", "sageattention>=")):
        if find_spec(package.removesuffix(">=").replace("flash-attn", "flash_attn")):
            continue
        with pytest.raises(UserError, match=f"not usable because of missing package .* Please install `{package}"):
            choose_attention(model, name, CPU, torch.float32)


def test_a_probe_sees_missing_gradients_and_masks():
    assert probe("native", CPU, torch.bfloat16, 16, masked=True) is None
    assert "mask" in (probe("_native_flash", CPU, torch.float32, 16, masked=True) or "")
    assert "does not support backward on CPU" in (probe("flex", CPU, torch.float32, 16) or "")


def test_kernels_get_one_type_under_autocast(model):
    choose_attention(model, "_native_flash", CPU, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(**inputs()).sample
    assert torch.allclose(half.float(), model(**inputs()).sample, atol=0.2)
