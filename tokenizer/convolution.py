"""3D convolution that takes the fast kernel on a CPU for a single clip, too.

PyTorch convolves a batch of one in float32 on a CPU by a slow kernel where batch x channels x frames x height is 20,480 or less
(at::use_mkldnn): 3 to 8 times slower than oneDNN's, which every other call takes. The operator below calls oneDNN's. It is an
operator of its own, because `torch.mkldnn_convolution` knows neither tensors without data nor FLOP counters.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

AVAILABLE = torch.backends.mkldnn.is_available()


def use_channels_last(model: nn.Module) -> None:
    """Store the weights of a model's 3D convolutions in channels-last order, which is that of its activations."""
    for module in model.modules():
        if isinstance(module, nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)  # pyright: ignore[reportCallIssue]


def conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], padding: tuple[int, ...]) -> Tensor:
    """Return F.conv3d of x (B C T H W)."""
    one_clip_on_cpu = len(x) == 1 and x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"
    if AVAILABLE and one_clip_on_cpu and not torch.is_autocast_enabled("cpu"):
        return _conv3d_of_one(x, weight, bias, stride, padding)
    return F.conv3d(x, weight, bias, stride, padding)


@torch.library.custom_op("promag::conv3d_of_one", mutates_args=(), device_types="cpu")
def _conv3d_of_one(x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int]) -> Tensor:
    x, weight = (tensor.contiguous(memory_format=torch.channels_last_3d) for tensor in (x, weight))
    return torch.mkldnn_convolution(x, weight, bias, padding, stride, [1, 1, 1], 1)


@_conv3d_of_one.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int]) -> Tensor:
    y = F.conv3d(x, weight, bias, stride, padding)
    return y.contiguous(memory_format=torch.channels_last_3d)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.stride, ctx.padding = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_sizes = None if bias is None else list(bias.shape)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    options = (ctx.stride, ctx.padding, [1, 1, 1], False, [0, 0, 0], 1, wanted)
    return *torch.ops.aten.convolution_backward(gradient, x, weight, ctx.bias_sizes, *options), None, None


_conv3d_of_one.register_autograd(_gradients, setup_context=_keep)


@register_flop_formula(torch.ops.promag.conv3d_of_one)
def _flops(x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return conv_flop_count(x, weight, out_shape)
