"""Existing video autoencoders of diffusers as the base level that growth starts from.

Shapes: B C T H W pixels in [-1, 1], b c t h w latents. An autoencoder is split into what encodes and what decodes; both keep
the weights, the code and the results of their class, to the bit. It fits where 1 + r*N frames become 1 + N latent frames and
back.

What growth sees of an autoencoder are its latents or, with `features="encoder"`, also what its encoder's last convolution
sees. Latents can be cached, and then growth trains without pixels (see `train.py`).

Streaming, and gradient checkpointing by stretches: see `existing_streams.py`. The other classes code whole clips alone and
checkpoint their blocks themselves.
"""

import copy
import functools
import hashlib
import inspect
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from torch import Tensor, nn

from promag.training.config import UserError, one_line
from promag.training.safetensors_only import check_folder, read_mapping

from .existing_streams import STREAMS, Added, Run, at_once
from .geometry import nearest_frames
from .growth import LatentScale
from .layers import START, Handed, State

Features = Literal["latents", "encoder"]

PROBE = 64  # pixels: height and width of the clip by which an autoencoder's arithmetic is learned
DECODING = {"decoder", "post_quant_conv"}  # what diffusers' video autoencoders call the parts that decode
# What they call their convolutions at pixels and latents.
ENDS = {"conv_in", "conv_out", "quant_conv", "post_quant_conv"}
NO_NOISE = -30.0  # log-variance of latents of which only the mean is known: the lowest that diffusers' posterior keeps


@dataclass(frozen=True, kw_only=True)
class Existing:
    """An autoencoder's class and configuration, its arithmetic, and what growth sees of it; stored in our configuration."""

    class_name: str
    config: dict[str, Any]
    temporal_ratio: int
    spatial_ratio: int
    latent_channels: int
    latent_step: int = 1  # clips have 1 + k*latent_step latent frames
    latents_mean: list[float] | None = None  # one value a channel, where the class keeps them as buffers
    latents_std: list[float] | None = None
    features: Features = "latents"
    feature_channels: int = 0  # channels that the encoder's last convolution sees; 0 where growth sees latents alone

    def build(self) -> Any:
        """Return an untrained autoencoder of this class and configuration."""
        return existing_class(self.class_name)(**self._arguments())

    def _arguments(self) -> dict[str, Any]:
        return {key: value for key, value in self.config.items() if not key.startswith("_")}

    def encoding_settings(self, level: int) -> dict[str, Any]:
        """Return what decides the latents of a level beside weights: nothing of who saved the autoencoder, and where.

        What growth sees of it decides those of grown levels alone.
        """
        settings = {name: value for name, value in vars(self).items() if level or not name.startswith("feature")}
        return {**settings, "config": self._arguments()}

    def entries(self) -> dict[str, Any]:
        """Return the configuration as the pipelines of this family read it, with the statistics of a class's buffers."""
        buffers = {"latents_mean": self.latents_mean, "latents_std": self.latents_std}
        entries = {**self._arguments(), **{name: values for name, values in buffers.items() if values}}
        if "timestep_conditioning" in entries:  # here latents are decoded without noise, at time 0, as they are trained
            entries["timestep_conditioning"] = False
        return entries

    def scale(self) -> LatentScale:
        """Return mean and deviation of each latent channel as the autoencoder states them, else 0 and 1.

        Raises ValueError where it states them for another number of channels.
        """
        mean = self.latents_mean or self.config.get("latents_mean")
        std = self.latents_std or self.config.get("latents_std")
        if mean is not None and std is not None:
            if not len(mean) == len(std) == self.latent_channels:
                counts = f"latents_mean of {len(mean)} and latents_std of {len(std)} values"
                raise ValueError(f"{self.class_name}: {counts}, {self.latent_channels} latent channels")
            return LatentScale(*(torch.tensor(values, dtype=torch.float32) for values in (mean, std)))
        deviation = 1 / (self.config.get("scaling_factor") or 1.0)
        return LatentScale(torch.zeros(self.latent_channels), torch.full((self.latent_channels,), deviation))


# -- what an autoencoder is ------------------------------------------------------------------------------------------


def existing_class(name: str) -> Any:
    """Return a video autoencoder's class by its name in diffusers; raises ValueError where there is none."""
    found = getattr(diffusers, name, None) if name.startswith("Autoencoder") else None
    if found is None:
        raise ValueError(f"autoencoder {name!r}: diffusers {diffusers.__version__} has no autoencoder of that name")
    return found


def load_existing(folder: str | os.PathLike) -> Any:
    """Load a video autoencoder by the class that the folder's config.json names, for inference; only from safetensors.

    Raises UserError for a folder without one, and for one that cannot be loaded.
    """
    config = Path(folder) / "config.json"
    if not config.is_file():
        raise UserError(f"autoencoder {folder}: no config.json there; give a folder that save_pretrained wrote")
    name = str(read_mapping(config).get("_class_name"))
    check_folder(Path(folder))
    try:
        return existing_class(name).from_pretrained(folder, use_safetensors=True).eval()
    except Exception as error:  # whatever diffusers raises for files that are not what it expects
        raise UserError(f"autoencoder {folder}: cannot be loaded: {one_line(error)}") from None


def describe(model: Any, features: Features = "latents") -> Existing:
    """Learn an autoencoder's arithmetic by coding small clips.

    Raises ValueError where 1 + r*N frames do not become 1 + N latent frames and back, and for features that the class has not.
    """
    name = type(model).__name__
    if name.endswith("ProMAG"):
        raise ValueError(f"{name}: can be grown as it is, with grow(); load it with from_pretrained")
    ratio = _stated_ratio(model)
    if not ratio:
        raise ValueError(f"{name}: its temporal ratio is not in its configuration; a causal video autoencoder is needed")
    config = _settings(model)
    settings = json.dumps({key: value for key, value in config.items() if not key.startswith("_")})
    measured: dict[str, Any] = {**_arithmetic(type(model), settings, ratio, features), **_buffers(model)}
    return Existing(class_name=name, config=config, temporal_ratio=ratio, features=features, **measured)


@functools.cache
@torch.no_grad()
def _arithmetic(kind: Any, settings: str, ratio: int, features: Features) -> dict[str, int]:
    """Code small clips with an autoencoder on the meta device, where its weights and pixels take no time."""
    name, problem = kind.__name__, ""
    with torch.device("meta"):
        model = kind(**json.loads(settings)).eval()
    for step in (1, 2):  # CogVideoX decodes latent frames in pairs and takes 1 + 8k frames
        clip = torch.zeros(1, 3, 1 + step * ratio, PROBE, PROBE, dtype=model.dtype, device=model.device)
        try:
            latent = _moments(model, clip).chunk(2, 1)[0]
            output = _pixels(model, latent)
        except (AttributeError, RuntimeError, ValueError, IndexError) as error:
            problem = f"{type(error).__name__}: {one_line(error)}"
            continue
        if latent.ndim == 5 and latent.shape[2] == 1 + step and output.shape == clip.shape:
            seen = 0
            if features == "encoder":
                seen = _features(model, clip, latent)
            return {
                "spatial_ratio": PROBE // latent.shape[3],
                "latent_channels": latent.shape[1],
                "latent_step": step,
                "feature_channels": seen,
            }
        problem = f"a clip of {tuple(clip.shape)} becomes {tuple(latent.shape)} and {tuple(output.shape)}"
    raise ValueError(f"{name}: 1 + {ratio}*N frames to 1 + N latent frames and back are needed; {problem}")


def _settings(model: Any) -> dict[str, Any]:
    """Return the configuration of a model of diffusers without what its class does not take, which a file may hold too."""
    known = {*inspect.signature(type(model).__init__).parameters, "_class_name", "_diffusers_version"}
    return {key: value for key, value in dict(model.config).items() if key in known}


def _stated_ratio(model: Any) -> int | None:
    """Return the temporal ratio by whichever key of its configuration a model of diffusers states it; None without one."""
    config = model.config
    keys = ("scale_factor_temporal", "temporal_compression_ratio", "temporal_compress_times")
    stated = next(filter(None, map(config.get, keys)), None) or vars(model).get("temporal_compression_ratio")
    return int(stated or (2 ** sum(config["temperal_downsample"]) if config.get("temperal_downsample") else 0)) or None


def _buffers(model: Any) -> dict[str, list[float]]:
    """Return the latents' mean and deviation of a class that keeps them as buffers, as AutoencoderKLLTXVideo does."""
    named = {name: buffer for name, buffer in model.named_buffers() if name in ("latents_mean", "latents_std")}
    return {name: buffer.tolist() for name, buffer in named.items() if not buffer.is_meta}


def _features(model: Any, clip: Tensor, latent: Tensor) -> int:
    """Return the channels of what the encoder's last convolution sees; raises ValueError where the class has none to show."""
    name = type(model).__name__
    last = getattr(getattr(model, "encoder", None), "conv_out", None)
    if last is None:
        raise ValueError(f"features 'encoder': {name} has no encoder.conv_out; use latents")
    if getattr(model, "use_framewise_encoding", False):
        raise ValueError(f"features 'encoder': {name} blends overlapping stretches of frames; use latents")
    with _Inputs(last) as seen:
        _moments(model, clip)
    features = seen.joined()
    if features.shape[2:] != latent.shape[2:]:
        raise ValueError(
            f"features 'encoder': {name} has them of {tuple(features.shape)} beside {tuple(latent.shape)}; use latents"
        )
    return features.shape[1]


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 of weights rounded to bfloat16: a copy in that precision is the same base."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        rounded = value.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16)
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(rounded.numpy().tobytes())
    return digest.hexdigest()


def halves(model: Any) -> tuple[Any, Any]:
    """Return two autoencoders that share the weights of one: the first has only what encodes, the second what decodes."""
    shells = []
    for decoding in (False, True):
        shell = copy.copy(model)
        shell.use_tiling = shell.use_slicing = False  # AutoencoderKLProMAG cuts what it encodes and decodes into parts itself
        children = model._modules.items()
        # Empty parts, not None: some classes count the layers of both halves.
        shell._modules = {
            name: child if child is None or (name in DECODING) == decoding else nn.Module() for name, child in children
        }
        shell._buffers = dict.fromkeys(model._buffers) if decoding else dict(model._buffers)  # a saved file holds them once
        shells.append(shell)
    return shells[0], shells[1]


def joined(settings: Existing, encoder: "ExistingEncoder", decoder: "ExistingDecoder") -> Any:
    """Return the autoencoder of diffusers that an encoder and a decoder were split from, with their present weights."""
    with torch.device("meta"):
        model = settings.build()
    weights = {**encoder.model.state_dict(), **decoder.model.state_dict()}
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()


# -- encoding and decoding -------------------------------------------------------------------------------------------


def _moments(model: Any, x: Tensor) -> Tensor:
    encoded = model.encode(x)
    return encoded.latent_dist.parameters


def _pixels(model: Any, z: Tensor) -> Tensor:
    if model.config.get("timestep_conditioning"):  # LTX from 0.9.1 on: the decoder also takes away noise, here none
        return model.decode(z, temb=z.new_zeros(len(z))).sample
    return model.decode(z).sample


class _Inputs:
    """Context in which the inputs of a layer are kept, call by call."""

    def __init__(self, layer: nn.Module):
        self.layer, self.parts = layer, []

    def __enter__(self) -> "_Inputs":
        self.handle = self.layer.register_forward_pre_hook(lambda _, inputs: self.parts.append(inputs[0]))
        return self

    def __exit__(self, *_: Any) -> None:
        self.handle.remove()

    def joined(self) -> Tensor:
        """Return the inputs of all calls, one after the other in time."""
        return torch.cat(self.parts, 2)


class _Half(nn.Module):
    """What encodes or decodes, of an existing autoencoder; gradient checkpointing is diffusers' switch."""

    gradient_checkpointing = False
    _gradient_checkpointing_func: Any  # set by ModelMixin

    def __init__(self, model: Any, settings: Existing):
        super().__init__()
        self.model, self.settings = model, settings

    def ends(self) -> list[nn.Module]:
        """Return the layers at pixels and latents."""
        return [module for name, module in self.model.named_modules() if name.split(".")[-1] in ENDS]

    def _run(self, state: State) -> Run | None:
        """Return what runs each stretch of a clip, or None where a clip is coded whole by its class."""
        if state is not None:
            return at_once
        again = self.gradient_checkpointing and torch.is_grad_enabled() and self.settings.class_name in STREAMS
        return self._gradient_checkpointing_func if again else None


class ExistingEncoder(_Half):
    """Pixels to features and moments of an existing autoencoder; its features are the moments and, where asked for, more."""

    def __init__(self, model: Any, settings: Existing):
        super().__init__(model, settings)
        self.head = MomentsOnly(2 * settings.latent_channels)

    def stem(self, x: Tensor) -> Tensor:
        """B C T H W -> the same: what is made of each frame alone."""
        return x

    def features(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        """B C 1+r*N H W -> b 2c+D 1+N h w: moments, then D feature channels."""
        if self.settings.features == "latents":
            return self._moments(x, state)
        with _Inputs(self.model.encoder.conv_out) as seen:
            moments, state = self._moments(x, state)
        return torch.cat([moments, seen.joined().to(moments.dtype)], 1), state

    def _moments(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        run = self._run(state)
        if run is None:
            return _moments(self.model, x), None
        moments, after = _stream_of(self.settings).encode(self.model, x, START if state is None else state, run)
        return moments, None if state is None else after


class ExistingDecoder(_Half):
    """Latents of an existing autoencoder to pixels."""

    def forward(self, handed: Handed, state: State = None) -> tuple[Handed, State]:
        """B c 1+N h w, and features added behind the first convolution, B D 1+N h w -> B C 1+r*N H W."""
        z, features = handed
        assert z is not None, "features alone are handed over to this project's own decoders"
        count, step = z.shape[2], self.settings.latent_step
        legal = nearest_frames(count, step)
        if state is None and legal != (count,):
            use = " or ".join(map(str, legal))
            raise ValueError(f"{count} latent frames: {self.settings.class_name} decodes 1 + {step}k; use {use}")
        run = self._run(state)
        if run is not None:
            x, after = _stream_of(self.settings).decode(self.model, z, features, START if state is None else state, run)
            return (x, None), None if state is None else after
        if features is None:
            return (_pixels(self.model, z), None), None
        with Added(self.model.decoder.conv_in, features):
            return (_pixels(self.model, z), None), None

    def wide_channels(self) -> int:
        """Return the channels behind the first convolution; raises ValueError where the class has no such place to add to."""
        conv_in = getattr(getattr(self.model, "decoder", None), "conv_in", None)
        channels = getattr(getattr(conv_in, "conv", conv_in), "out_channels", None)
        if channels is None or getattr(self.model, "use_framewise_decoding", False):
            why = "has no decoder.conv_in" if channels is None else "blends overlapping stretches of frames"
            raise ValueError(f"growth hand_over: {self.settings.class_name} {why}; use latent")
        return channels


class MomentsOnly(nn.Module):
    """The head of an existing encoder: takes the moments, which its class computed, out of the features."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self, features: Tensor, state: State = None) -> tuple[Tensor, State]:
        """B 2c+D T H W -> B 2c T H W."""
        return features[:, : self.channels], state


def cached_features(latents: Mapping[int, Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Yield the features of an encoder that shows growth its latents alone, from cached means b c t h w, by frame rate."""
    for rate, means in latents.items():
        yield rate, torch.cat([means, torch.full_like(means, NO_NOISE)], 1)


# -- streaming -------------------------------------------------------------------------------------------------------


def _stream_of(settings: Existing) -> Any:
    """Return the functions by which a class codes a stream; raises ValueError where it cannot."""
    if settings.class_name not in STREAMS:
        able = " and ".join(STREAMS)
        raise ValueError(f"{settings.class_name}: codes whole clips only, no chunks of a stream; {able} can")
    return STREAMS[settings.class_name]


class OnExisting:
    """What an autoencoder answers for the base that it may have been grown on."""

    existing: Existing | None
    encoder: Any
    spatial_compression_ratio: Any
    temporal_compression_ratio: Any
    _internal_dict: Any

    @property
    def can_stream(self) -> bool:
        """Whether clips can be coded in chunks."""
        return self.existing is None or self.existing.class_name in STREAMS

    def check_can_stream(self) -> None:
        """Raise ValueError where clips cannot be coded in chunks."""
        if self.existing:
            _stream_of(self.existing)

    @property
    def own_config(self) -> Any:
        """The settings of this class alone, without what the pipelines of another family read."""
        return self._internal_dict

    def family_entries(self) -> dict[str, Any]:
        """Return what the pipelines of an autoencoder of diffusers read, for one that takes its place; {} for all others."""
        return self.own_config.get("entries") or (self.existing.entries() if self.existing else {})

    @property
    def latents_mean(self) -> Tensor:
        """The mean of each latent channel, for pipelines that ask the autoencoder instead of its configuration."""
        return self._latents("latents_mean")

    @property
    def latents_std(self) -> Tensor:
        """The deviation of each latent channel, for pipelines that ask the autoencoder instead of its configuration."""
        return self._latents("latents_std")

    @property
    def temperal_downsample(self) -> list[int]:
        """Numbers whose sum is log2 of the temporal ratio, and whose count is that of the spatial one.

        Pipelines such as WanVideoToVideoPipeline compute both ratios from this attribute, in this spelling.
        """
        space, time = (math.log2(ratio) for ratio in (self.spatial_compression_ratio, self.temporal_compression_ratio))
        if not (space.is_integer() and time.is_integer()):
            raise AttributeError("temperal_downsample: for ratios that are powers of 2")
        return [0] * (int(space) - 1) + [int(time)]

    def _latents(self, name: str) -> Tensor:
        if self.existing is not None:
            return getattr(self.encoder.model, name)
        if not (values := self.family_entries().get(name)):
            raise AttributeError(f"{type(self).__name__}: its configuration states no {name}")
        return torch.tensor(values)
