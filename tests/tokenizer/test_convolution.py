"""The convolution of one clip by oneDNN's kernel equals F.conv3d in values, gradients, FLOPs and shapes."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from promag.tokenizer import convolution
from promag.tokenizer.convolution import conv3d
from promag.tokenizer.layers import CausalConv3d
from tests.conftest import make_tokenizer

OPERATOR = "promag::conv3d_of_one"
SLOW = "aten::slow_conv3d_forward"

pytestmark = pytest.mark.skipif(not convolution.AVAILABLE, reason="this PyTorch has no oneDNN")


def operators(call) -> set[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return {event.key for event in profile.key_averages()}


def arguments(kernel=3, stride=(1, 1, 1), bias=True):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 8, 5, 6, 10, generator=generator)
    weight = torch.randn(12, 8, kernel, kernel, kernel, generator=generator)
    return x, weight, torch.randn(12, generator=generator) if bias else None, stride, (0, kernel // 2, kernel // 2)


@pytest.mark.parametrize("changes", [{}, {"kernel": 1}, {"stride": (2, 1, 2)}, {"bias": False}], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d], ids=str)
def test_values_and_gradients_are_those_of_conv3d(changes, layout):
    x, weight, bias, *rest = arguments(**changes)
    results = []
    for function in (conv3d, F.conv3d):
        leaves = [x.clone(memory_format=layout), weight.clone(memory_format=layout), None if bias is None else bias.clone()]
        for leaf in leaves[: 3 if bias is not None else 2]:
            leaf.requires_grad_()
        y = function(*leaves, *rest)
        y.square().sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in leaves if leaf is not None)])
    for own, expected in zip(*results, strict=True):
        assert torch.allclose(own, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_operator_checks_pass_and_second_gradients_equal_conv3ds():
    torch.library.opcheck(convolution._conv3d_of_one, (*arguments()[:3], [1, 1, 1], [0, 1, 1]))
    x, weight, bias, *rest = arguments()
    weight.requires_grad_()
    (gradient,) = torch.autograd.grad(conv3d(x, weight, bias, *rest).square().sum(), weight, create_graph=True)
    (twice,) = torch.autograd.grad(gradient.sum(), weight)
    (expected,) = torch.autograd.grad(
        torch.autograd.grad(F.conv3d(x, weight, bias, *rest).square().sum(), weight, create_graph=True)[0].sum(), weight
    )
    assert torch.allclose(twice, expected, rtol=1e-3, atol=1e-2)


def test_one_clip_in_float32_never_takes_the_slow_kernel():
    model = make_tokenizer(3)
    x = torch.rand(1, 3, 17, 16, 16)

    @torch.no_grad()
    def reconstruct():
        model(x, 16)

    called = operators(reconstruct)
    assert OPERATOR in called
    assert SLOW not in called
    assert SLOW in operators(lambda: F.conv3d(*arguments()))  # the slow kernel is used otherwise


def test_other_calls_are_conv3d(monkeypatch):
    x, weight, bias, *rest = arguments()
    assert OPERATOR not in operators(lambda: conv3d(x.expand(2, -1, -1, -1, -1), weight, bias, *rest))
    assert OPERATOR not in operators(lambda: conv3d(x.double(), weight.double(), bias.double(), *rest))
    with torch.autocast("cpu", torch.bfloat16):
        assert conv3d(x, weight, bias, *rest).dtype == torch.bfloat16
    assert conv3d(x.to("meta"), weight.to("meta"), None, *rest).shape == (1, 12, 3, 6, 10)
    monkeypatch.setattr(convolution, "AVAILABLE", False)
    assert OPERATOR not in operators(lambda: conv3d(x, weight, bias, *rest))


def test_flops_and_shapes_equal_those_of_conv3d():
    x, weight, bias, *rest = arguments(stride=(1, 2, 1))
    weight.requires_grad_()
    counts = []
    for function in (conv3d, F.conv3d):
        with FlopCounterMode(display=False) as counter:
            function(x, weight, bias, *rest).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * (2 * 12 * 8 * 27 * 3 * 3 * 10)  # forward, and the kernel's gradient
    with FakeTensorMode():
        fake = conv3d(torch.empty(1, 8, 5, 6, 10), torch.empty(12, 8, 3, 3, 3), None, *rest)
    real = conv3d(x, weight, None, *rest)
    assert (fake.shape, fake.stride()) == (real.shape, real.stride())


def test_it_compiles():
    torch.manual_seed(0)
    layer, x = CausalConv3d(8, 12), torch.randn(1, 8, 5, 6, 10)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    own, expected = compiled(x)[0], layer(x)[0]
    assert torch.equal(own, expected)
    own.sum().backward()
    assert layer.weight.grad is not None
    assert float(layer.weight.grad.abs().sum()) > 0
