"""How existing video autoencoders of diffusers code a clip stretch by stretch, their states being values.

Shapes: B C T H W pixels, b c t h w latents. AutoencoderKLWan and AutoencoderKLCogVideoX take the state of their convolutions as
an argument; the other classes have none and code whole clips alone.

Every stretch is coded by `run(call, x, features, state)`. With gradient checkpointing `run` keeps these arguments alone: the
states between stretches, but nothing of what lies within one. Whole clips are then coded by stretches too, to equal results.
"""

import functools
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, patchify, unpatchify
from torch import Tensor, nn

from .layers import State, is_first

Run = Callable[..., tuple[Tensor, State]]


def at_once(call: Run, *arguments: Any) -> tuple[Tensor, State]:
    """Code a stretch without gradient checkpointing."""
    return call(*arguments)


class Added:
    """Context in which features, if there are any, are added to the outputs of a layer, call by call."""

    def __init__(self, layer: nn.Module, features: Tensor | None):
        self.layer, self.features, self.used = layer, features, 0

    def __enter__(self) -> None:
        self.handle = None if self.features is None else self.layer.register_forward_hook(self._add)

    def __exit__(self, _type: type | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        if self.handle is not None:
            self.handle.remove()

    def _add(self, _layer: nn.Module, _inputs: Any, output: Any) -> Any:
        assert self.features is not None
        y = output[0] if isinstance(output, tuple) else output  # with its cache, in AutoencoderKLCogVideoX
        part = self.features[:, :, self.used : self.used + y.shape[2]]
        self.used += y.shape[2]
        return (y + part, *output[1:]) if isinstance(output, tuple) else y + part


class _WanStream:
    """AutoencoderKLWan codes the first frame, then four at a time; its state is what each convolution saw last."""

    @staticmethod
    def encode(model: Any, x: Tensor, state: State, run: Run = at_once) -> tuple[Tensor, State]:
        x = patchify(x, model.config.patch_size) if model.config.patch_size is not None else x
        parts = [x[:, :, :1], *_in_fours(x[:, :, 1:])] if is_first(state) else _in_fours(x)
        caches, outputs = _caches(model.encoder, state), []
        for part in parts:
            coded, caches = run(functools.partial(_wan, model.encoder), part, None, caches)
            outputs.append(coded)
        return model.quant_conv(torch.cat(outputs, 2)), caches

    @staticmethod
    def decode(model: Any, z: Tensor, features: Tensor | None, state: State, run: Run = at_once) -> tuple[Tensor, State]:
        z = model.post_quant_conv(z)
        caches, outputs = _caches(model.decoder, state), []
        for i in range(z.shape[2]):
            call = functools.partial(_wan, model.decoder, first_chunk=is_first(state) and i == 0)
            coded, caches = run(call, z[:, :, i : i + 1], _frames(features, i, i + 1), caches)
            outputs.append(coded)
        x = torch.cat(outputs, 2)
        x = unpatchify(x, model.config.patch_size) if model.config.patch_size is not None else x
        return x.clamp(-1, 1), caches


def _wan(part: Any, x: Tensor, features: Tensor | None, caches: State, **more: bool) -> tuple[Tensor, State]:
    kept = list(caches)  # the class changes its list in place
    with Added(part.conv_in, features):
        return part(x, feat_cache=kept, feat_idx=[0], **more), tuple(kept)


def _in_fours(x: Tensor) -> list[Tensor]:
    return list(x.split(4, 2)) if x.shape[2] else []


def _caches(part: nn.Module, state: State) -> State:
    return (None,) * sum(isinstance(module, WanCausalConv3d) for module in part.modules()) if is_first(state) else state


def _frames(features: Tensor | None, start: int, stop: int) -> Tensor | None:
    return None if features is None else features[:, :, start:stop]


class _CogVideoXStream:
    """AutoencoderKLCogVideoX codes 1 + 8 frames, then 8 at a time, normalised over each stretch; so chunks hold whole ones."""

    @staticmethod
    def encode(model: Any, x: Tensor, state: State, run: Run = at_once) -> tuple[Tensor, State]:
        coded, state = _in_stretches(model.encoder, x, None, model.num_sample_frames_batch_size, state, run)
        return (coded if model.quant_conv is None else model.quant_conv(coded)), state

    @staticmethod
    def decode(model: Any, z: Tensor, features: Tensor | None, state: State, run: Run = at_once) -> tuple[Tensor, State]:
        z = z if model.post_quant_conv is None else model.post_quant_conv(z)
        return _in_stretches(model.decoder, z, features, model.num_latent_frames_batch_size, state, run)


def _in_stretches(part: Any, x: Tensor, features: Tensor | None, length: int, state: State, run: Run) -> tuple[Tensor, State]:
    first = x.shape[2] % length if is_first(state) else 0
    if x.shape[2] % length != (1 if is_first(state) else 0):
        chunk, count = ("first", "1 + ") if is_first(state) else ("later", "")
        raise ValueError(f"{x.shape[2]} frames in a {chunk} chunk: AutoencoderKLCogVideoX needs {count}{length}k")
    cache, outputs = (None if is_first(state) else state), []
    stops = list(range(first + length, x.shape[2] + 1, length)) or [x.shape[2]]
    for start, stop in zip([0, *stops], stops, strict=False):
        frames = _frames(features, start, stop)
        coded, cache = run(functools.partial(_cog_video_x, part), x[:, :, start:stop], frames, cache)
        outputs.append(coded)
    return torch.cat(outputs, 2), cache


def _cog_video_x(part: Any, x: Tensor, features: Tensor | None, cache: State) -> tuple[Tensor, State]:
    with Added(part.conv_in, features):
        return part(x, conv_cache=cache)


STREAMS = {"AutoencoderKLWan": _WanStream, "AutoencoderKLCogVideoX": _CogVideoXStream}
