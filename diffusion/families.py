"""The families of transformers that the trainer trains: how each is called, what it is made of, and what it does not know.

ProMAG is our own: it is given the text's masks, the temporal ratio and the frame rate, and keeps the statistics by which its
latents are normalised. Wan is WanTransformer3DModel of diffusers, text-to-video (arXiv 2503.20314): it is given noisy latents,
times and the tokens of one text encoder, padded with zeros, and its latents are normalised by the autoencoder's own statistics,
which the stock WanPipeline undoes. Both predict the velocity, noise minus clean latent, at times in [0, 1000].

Shapes: b c t h w latents, b L D text.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from diffusers.utils.import_utils import is_ftfy_available
from torch import Tensor, nn

from promag.tokenizer.geometry import ratio_names
from promag.training.config import UserError, one_line
from promag.training.safetensors_only import check_complete, check_folder, read_mapping

from .flops import forward_flops, wan_forward_flops
from .flow import stated_shift, token_shift
from .text import Embedded
from .transformer import ProMAGTransformer3DModel

if TYPE_CHECKING:
    from .config import DiffusionConfig
    from .latent_cache import LatentDataset

WAN_TEXT_TOKENS = 512  # to which WanPipeline pads prompts by default


@dataclass(frozen=True)
class LatentStatistics:
    """Mean and standard deviation of each latent channel, as an autoencoder's configuration states them."""

    mean: Sequence[float]
    std: Sequence[float]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "LatentStatistics | None":
        """Return what an autoencoder's configuration states; None where it states nothing."""
        mean, std = (config.get(key) for key in ("latents_mean", "latents_std"))
        return cls(list(mean), list(std)) if mean and std else None


class Family(ABC):
    """What the trainer asks of a kind of transformer."""

    model: Any  # its class
    blocks_name: str  # attribute of the blocks that it repeats
    masks_text: bool  # whether cross-attention is given the mask of the padding
    attention: tuple[str, ...]  # backends that `auto` tries, the best first
    cpu_attention: str  # what `auto` takes on a CPU
    is_stock: bool  # whether a pipeline of diffusers samples with it
    cleaning = ""  # identity of `clean`; empty where it changes nothing

    def blocks(self, transformer: Any) -> Any:
        """Return the blocks that a transformer repeats."""
        return getattr(transformer, self.blocks_name)

    def clean(self, caption: str) -> str:
        """Return a caption as the family's pipeline gives it to the text tokenizer."""
        return caption

    @abstractmethod
    def load(self, folder: Path) -> Any:
        """Load a transformer from its own folder."""

    @abstractmethod
    def predict(self, transformer: Any, noisy: Tensor, times: Tensor, text: Embedded, fps: Tensor, ratio: int) -> Tensor:
        """Return the velocity at noisy latents and times in [0, 1], (b,), or b t with one for each latent frame."""

    @abstractmethod
    def mu(self, tokens: int, shift: float) -> float:
        """Return the logarithm of the factor by which times are shifted for a clip of `tokens` tokens."""

    @abstractmethod
    def forward_flops(self, config: Mapping[str, Any], tokens: int, text_tokens: Sequence[int], batch: int) -> float:
        """Return the FLOPs of one forward pass."""

    @abstractmethod
    def text_widths(self, transformer: Any) -> tuple[list[int], int | None]:
        """Return the widths of each encoder's text tokens, and of the pooled text vector: 0 for none, None for any."""

    @abstractmethod
    def normalise(
        self,
        transformer: Any,
        latents: Sequence["LatentDataset"],
        condition_frames: int,
        frozen: bool,
        statistics: LatentStatistics | None,
    ) -> None:
        """Let latents be normalised as a pretrained transformer needs it; `statistics` are the autoencoder's.

        Raises UserError for ratios and conditioning frames that it cannot be trained at, `frozen` or not.
        """


class ProMAGFamily(Family):
    """Our transformer."""

    model = ProMAGTransformer3DModel
    blocks_name = "transformer_blocks"
    masks_text = True
    attention = ("flash", "native")  # FlashAttention 2 needs a package of its own; PyTorch's contains an older version of it
    cpu_attention = "written out up to 1,024 x 1,024 tokens, above native"
    is_stock = False

    def load(self, folder: Path) -> Any:
        """Load a transformer from its own folder."""
        return self.model.from_pretrained(folder)

    def predict(self, transformer: Any, noisy: Tensor, times: Tensor, text: Embedded, fps: Tensor, ratio: int) -> Tensor:
        """Return the velocity at noisy latents and times in [0, 1], (b,) or b t with one for each latent frame."""
        return transformer(
            noisy,
            times * 1000,
            text.tokens,
            encoder_attention_mask=text.masks,
            pooled_projections=text.pooled,
            temporal_ratio=ratio,
            fps=fps.float(),
            return_dict=False,
        )[0]

    def mu(self, tokens: int, shift: float) -> float:
        """Return the logarithm of the factor by which times are shifted for a clip of `tokens` tokens."""
        return token_shift(tokens, shift)

    def forward_flops(self, config: Mapping[str, Any], tokens: int, text_tokens: Sequence[int], batch: int) -> float:
        """Return the FLOPs of one forward pass."""
        return forward_flops(config, tokens, text_tokens, batch)

    def text_widths(self, transformer: Any) -> tuple[list[int], int | None]:
        """Return the widths of the text tokens of each encoder, and of the pooled text vector."""
        return transformer.text_dims, transformer.config["pooled_dim"]

    def normalise(
        self,
        transformer: Any,
        latents: Sequence["LatentDataset"],
        condition_frames: int,
        frozen: bool,
        statistics: LatentStatistics | None,
    ) -> None:
        """Give the latents the statistics of a pretrained transformer, and it those of ratios that are new to it.

        Raises UserError with `frozen` for new ratios or more conditioning frames.
        """
        config = transformer.config
        mean, std = (dict(config[key] or {}) for key in ("latents_mean", "latents_std"))
        for part in latents:
            key = str(part.ratio)
            if key in mean:
                part.mean, part.std = (torch.tensor(values[key]).view(-1, 1, 1, 1) for values in (mean, std))
            elif frozen:
                trained = ratio_names(mean)
                raise UserError(
                    f"budget {key}x: the transformer of init was trained at {trained}; another needs a training of all its "
                    "weights, without lora and few_steps"
                )
            else:
                mean[key], std[key] = part.mean.flatten().tolist(), part.std.flatten().tolist()
        if frozen and condition_frames > config["condition_frames"]:
            raise UserError(
                f"condition frames {condition_frames}: the transformer of init was trained to be given "
                f"{config['condition_frames']}; more need a training of all its weights, without lora and few_steps"
            )
        transformer.register_to_config(
            latents_mean=mean,
            latents_std=std,
            temporal_ratios=sorted(map(int, mean)),
            condition_frames=max(condition_frames, config["condition_frames"]),
        )


class WanFamily(Family):
    """WanTransformer3DModel of diffusers, text-to-video."""

    model = WanTransformer3DModel
    blocks_name = "blocks"
    masks_text = False
    attention = ("native",)  # its queries are float32 under autocast, which other kernels refuse
    cpu_attention = "native"
    is_stock = True

    def load(self, folder: Path) -> Any:
        """Load a transformer from its own folder, in float32; raises UserError for one that is not text-to-video."""
        _check_text_to_video(folder, read_mapping(folder / "config.json"))
        check_folder(folder)
        transformer = self.model.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
        check_complete(transformer, folder)
        return transformer

    def predict(self, transformer: Any, noisy: Tensor, times: Tensor, text: Embedded, fps: Tensor, ratio: int) -> Tensor:
        """Return the velocity at noisy latents and times (b,) in [0, 1]; ratio and frame rate are no inputs."""
        if times.ndim != 1:
            raise ValueError("WanTransformer3DModel: takes one time for each clip, no clean first frames")
        tokens = text.tokens[0] * text.masks[0][..., None].to(text.tokens[0].dtype)  # the padding is zero
        return transformer(noisy, times * 1000, tokens, return_dict=False)[0]

    def mu(self, tokens: int, shift: float) -> float:
        """Return the logarithm of the factor by which times are shifted, at any size: the scheduler's flow_shift."""
        return math.log(shift)

    def forward_flops(self, config: Mapping[str, Any], tokens: int, text_tokens: Sequence[int], batch: int) -> float:
        """Return the FLOPs of one forward pass."""
        return wan_forward_flops(config, tokens, sum(text_tokens), batch)

    def text_widths(self, transformer: Any) -> tuple[list[int], int | None]:
        """Return the width of the text tokens; an encoder's pooled vector is left aside, as WanPipeline does."""
        return [transformer.config["text_dim"]], None

    @property
    def cleaning(self) -> str:
        """Identity of `clean`, which mends Unicode only where ftfy is installed."""
        return f"WanPipeline{' with ftfy' if is_ftfy_available() else ''}"

    def clean(self, caption: str) -> str:
        """Return a caption without HTML entities and with single spaces."""
        return prompt_clean(caption)

    def normalise(
        self,
        transformer: Any,
        latents: Sequence["LatentDataset"],
        condition_frames: int,
        frozen: bool,
        statistics: LatentStatistics | None,
    ) -> None:
        """Normalise the latents of every ratio by the autoencoder's own statistics.

        Raises UserError without them, and for conditioning frames.
        """
        if condition_frames:
            raise UserError(NO_FRAMES)
        given = _checked(statistics, transformer.config["in_channels"])
        for part in latents:
            part.mean, part.std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (given.mean, given.std))


def _check_text_to_video(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise UserError for the configuration of an image-to-video transformer."""
    given, out = config.get("in_channels", 16), config.get("out_channels", 16)
    if config.get("image_dim") or config.get("added_kv_proj_dim") or out not in (None, given):
        raise UserError(
            f"{folder}: an image-to-video transformer (in_channels {given}, out_channels {out}, image_dim "
            f"{config.get('image_dim')}); text-to-video is needed: as many in_channels as out_channels, image_dim null"
        )


def _checked(statistics: LatentStatistics | None, channels: int) -> LatentStatistics:
    """Return an autoencoder's statistics; raises UserError where they are missing, or of other channels."""
    if statistics is None or not len(statistics.mean) == len(statistics.std) == channels:
        stated = "none" if statistics is None else f"them for {len(statistics.mean)}"
        raise UserError(
            f"init: WanTransformer3DModel takes latents of {channels} channels, normalised by latents_mean and latents_std of "
            f"the autoencoder's configuration; the tokenizer's states {stated}"
        )
    return statistics


NO_FRAMES = "condition: WanTransformer3DModel was made for text alone; leave condition.probability at 0"
ONE_TIME = "base_ahead: WanTransformer3DModel takes one time for all channels; leave base_ahead at 0"
OWN_TIMES = "few_steps: WanPipeline samples at times of its scheduler's own; leave few_steps null"
PROMAG, WAN = ProMAGFamily(), WanFamily()
FAMILIES: dict[str, Family] = {family.model.__name__: family for family in (PROMAG, WAN)}


def family_of(transformer: Any) -> Family:
    """Return the family of a transformer."""
    return WAN if isinstance(transformer, WanTransformer3DModel) else PROMAG


def family_of_init(init: str | None) -> Family:
    """Return the family of the transformer in a pipeline's folder or in its own; raises UserError for an unknown class."""
    if init is None or not (config := transformer_folder(init) / "config.json").is_file():
        return PROMAG
    name = read_mapping(config).get("_class_name", ProMAGTransformer3DModel.__name__)
    if name not in FAMILIES:
        raise UserError(f"init {init}: a {name!r:.100}; legal are {' and '.join(FAMILIES)}")
    return FAMILIES[name]


def transformer_folder(init: str) -> Path:
    """Return the folder of the transformer in a pipeline's folder, or the folder itself."""
    folder = Path(init) / "transformer"
    return folder if folder.is_dir() else Path(init)


def load_transformer(init: str) -> Any:
    """Load the transformer from a pipeline's folder or from its own folder; raises UserError if none can be loaded."""
    try:
        return family_of_init(init).load(transformer_folder(init)).train()
    except (OSError, ValueError) as error:
        raise UserError(f"init {init}: no transformer can be loaded there: {one_line(error)}") from None


def adopt(config: "DiffusionConfig") -> "DiffusionConfig":
    """Return a training's configuration with what the family of `init` decides: text encoder and text length not chosen.

    Raises UserError for settings that the family does not know, for one of two transformers, and for other times than those
    that are sampled.
    """
    family, init = family_of_init(config.init), config.init
    if not family.is_stock or init is None:
        _check_shift(config, family)
        return _with_lengths(config)
    if config.condition.max_frames:
        raise UserError(NO_FRAMES)
    if config.base_ahead:
        raise UserError(ONE_TIME)
    if config.few_steps:
        raise UserError(OWN_TIMES)
    _check_alone(init)
    _check_shift(config, family)
    encoders = config.text.encoders
    if encoders == type(config.text)().encoders and (Path(init) / "text_encoder").is_dir():
        encoders = (replace(encoders[0], model=init),)
        config = replace(config, text=replace(config.text, encoders=encoders))
    if config.text.small or len(encoders) > 1:
        names = ", ".join(encoder.model for encoder in encoders)
        raise UserError(f"text encoders {names}: {family.model.__name__} takes one frozen T5 or UMT5; name it in text.encoders")
    return _with_lengths(config, WAN_TEXT_TOKENS)


def _with_lengths(config: "DiffusionConfig", length: int | None = None) -> "DiffusionConfig":
    """Return the configuration with a number of text tokens for each encoder; None is the encoders' own where none is given."""
    given = config.text.encoders
    encoders = tuple(replace(each, max_length=length or each.tokens) if each.max_length is None else each for each in given)
    return config if encoders == given else replace(config, text=replace(config.text, encoders=encoders))


def _check_alone(init: str) -> None:
    """Refuse a pipeline of two transformers, and one of the two by its own folder."""
    inside = not (Path(init) / "model_index.json").is_file()
    index = (Path(init).resolve().parent if inside else Path(init)) / "model_index.json"
    if index.is_file() and (read_mapping(index).get("transformer_2") or [None])[0]:
        raise UserError(
            f"init {init}: {'one of two transformers that' if inside else 'its two transformers'} share the times; the trainer "
            "trains one over all times, as Wan 2.1 and the 5B model of Wan 2.2 have it"
        )


def _check_shift(config: "DiffusionConfig", family: Family) -> None:
    """Refuse another shift than the scheduler of `init` has, where that samples later or taught: the times would differ."""
    if config.init is None or not (config.few_steps or config.lora or family.is_stock):
        return
    scheduler = Path(config.init) / "scheduler" / "scheduler_config.json"
    if scheduler.is_file() and (shift := stated_shift(read_mapping(scheduler))) != config.shift:
        what, who = ("few_steps", "the teacher") if config.few_steps else ("init", "its pipeline")
        other = "" if config.few_steps else f", or state {config.shift:g} there"
        raise UserError(f"{what}: shift {config.shift}: {who} samples with {shift:g} ({scheduler}); use shift {shift:g}{other}")


def check_autoencoder(init: str | None, statistics: LatentStatistics | None) -> None:
    """Refuse, before anything is encoded, a transformer that is not text-to-video or takes other latents than a tokenizer's."""
    if init is not None and family_of_init(init).is_stock:
        config = read_mapping(transformer_folder(init) / "config.json")
        _check_text_to_video(transformer_folder(init), config)
        _checked(statistics, config.get("in_channels", 16))


def hidden_matrices(transformer: Any) -> list[nn.Parameter]:
    """Return the weights of the linear layers in a transformer's blocks: what Muon trains."""
    layers = (m for m in family_of(transformer).blocks(transformer).modules() if isinstance(m, nn.Linear))
    return [parameter for layer in layers for parameter in layer.parameters() if parameter.ndim == 2]
