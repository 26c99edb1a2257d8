"""A diffusion transformer over video latents, conditioned on text, temporal ratio and frame rate.

Shapes: b c t h w latents, N = t*h*w / patch tokens, D width, L text tokens. Sources: DiT with adaLN-zero
(arXiv 2212.09748, sec. 3.2), one modulation shared by all blocks (adaLN-single, PixArt-alpha, arXiv 2310.00426, sec. 2.3),
QK normalisation (arXiv 2302.05442, sec. 2.1), rotary positions (arXiv 2104.09864) over time, height and width.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import (
    PixArtAlphaTextProjection,
    TimestepEmbedding,
    Timesteps,
    apply_rotary_emb,
    get_1d_rotary_pos_embed,
)
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import FP32LayerNorm, RMSNorm
from einops import rearrange
from torch import Tensor, nn

from promag.tokenizer.geometry import ratio_names
from promag.training.safetensors_only import SafetensorsOnly

from .ahead import check_lead, half_times
from .inputs import (
    check_defaults,
    check_latents,
    check_pooled,
    check_ratio_and_rate,
    check_shape,
    check_statistics,
    check_text,
    check_time,
    per_clip,
    scaled_adapters,
)

# Rotary positions count latent frames of this ratio: adjacent 16x latent frames are four positions apart.
POSITION_RATIO = 4
PLAIN_SCORES = 2**20  # queries times keys of a head up to which a CPU computes attention by plain matrix products
# Wavelengths range from 2 pi to 2 pi times this. Latents have tens of positions along a side, not thousands: with the 10,000
# of language models most dimensions would hardly rotate (RoPE for vision, arXiv 2403.13298, sec. 3.2, uses 100).
ROPE_THETA = 100.0
PLACE_WIDTH = 8  # absolute position features for each axis: sines and cosines of four octaves


class ProMAGAttnProcessor:
    """Attention through diffusers' dispatch, which makes the backend a setting; by default plain matrix products on a CPU.

    PyTorch's fused CPU kernel is built for long sequences without gradients. On the short sequences of small video latents its
    backward pass takes two to five times as long as the plain products.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "ProMAGAttention",
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """B N D and, for cross-attention, B L D and its mask B 1 1 L (True: attend) -> B N D."""
        q: Any
        k: Any
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in attn.project(hidden_states, encoder_hidden_states))
        q, k = attn.norm_q(q), attn.norm_k(k)  # B N heads d
        if rotary is not None:
            q, k = (apply_rotary_emb(x, rotary, sequence_dim=1) for x in (q, k))  # pyright: ignore[reportArgumentType]
        if q.device.type == "cpu" and self._attention_backend is None and q.shape[1] * k.shape[1] <= PLAIN_SCORES:
            out: Any = plain_attention(q, k, v, attention_mask)
        else:
            q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast the norms' float32 weights widen them; kernels need one type
            out = dispatch_attention_fn(
                q, k, v, attn_mask=attention_mask, backend=self._attention_backend, parallel_config=self._parallel_config
            )
        return attn.to_out[0](out.flatten(2, 3).to(hidden_states.dtype))


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention as two matrix products and a softmax: q B N heads d, k and v B L heads d, mask B 1 1 L -> B N heads d."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1, torch.float32).to(v.dtype) @ v).transpose(1, 2)


class ProMAGAttention(nn.Module, AttentionModuleMixin):
    """Self- or cross-attention with RMS-normalised queries and keys.

    diffusers reads `is_cross_attention` and `use_bias` when it caches attention or fuses its projections.
    """

    _default_processor_cls = ProMAGAttnProcessor
    _available_processors = [ProMAGAttnProcessor]  # noqa: RUF012 (the name and kind that diffusers looks for)
    use_bias = True

    def __init__(self, dim: int, heads: int, is_cross_attention: bool = False):
        super().__init__()
        self.heads, self.is_cross_attention = heads, is_cross_attention
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_q, self.norm_k = RMSNorm(dim // heads, 1e-6), RMSNorm(dim // heads, 1e-6)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.set_processor(self._default_processor_cls())  # pyright: ignore[reportArgumentType]

    def project(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values; `fuse_qkv_projections` makes this one product."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        fused: Any = self  # to_kv and to_qkv exist only while the projections are fused
        if not self.fused_projections:
            return self.to_q(hidden_states), self.to_k(context), self.to_v(context)
        if self.is_cross_attention:
            return self.to_q(hidden_states), *fused.to_kv(context).chunk(2, -1)
        return fused.to_qkv(hidden_states).chunk(3, -1)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Call the processor."""
        processor: Any = self.processor
        return processor(self, hidden_states, **kwargs)


class LocalConvolution(nn.Conv3d):
    """Depthwise 3x3x3 convolution over a token grid, initialised with small weights."""

    def __init__(self, dim: int):
        super().__init__(dim, dim, 3, padding=1, groups=dim)
        nn.init.normal_(self.weight, std=0.05)
        nn.init.zeros_(self.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, hidden_states: Tensor, grid: tuple[int, int, int]) -> Tensor:  # pyright: ignore
        """Convolve B N D tokens of a (t, h, w) grid."""
        x = hidden_states.transpose(1, 2).unflatten(2, grid).contiguous(memory_format=torch.channels_last_3d)
        # CPUs have no good bf16 kernel for depthwise convolutions: in float32, the weights' type, this is three times as fast.
        with torch.autocast("cpu", enabled=False) if x.device.type == "cpu" else nullcontext():
            x = super().forward(x.to(self.weight.dtype))
        return x.to(hidden_states.dtype).flatten(2).transpose(1, 2)


class ProMAGTransformerBlock(nn.Module):
    """Self-attention, cross-attention to text and feed-forward, each with a residual connection.

    The gates of self-attention and feed-forward and the output matrix of cross-attention start at zero. With
    `local_convolution` a depthwise 3x3x3 convolution with a residual connection comes first.
    """

    def __init__(self, dim: int, heads: int, local_convolution: bool):
        super().__init__()
        self.local = LocalConvolution(dim) if local_convolution else None
        self.norm1 = FP32LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.attn1 = ProMAGAttention(dim, heads)
        self.norm2 = FP32LayerNorm(dim, 1e-6, elementwise_affine=True)
        self.attn2 = ProMAGAttention(dim, heads, is_cross_attention=True)
        self.norm3 = FP32LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.ff = FeedForward(dim, mult=4, activation_fn="gelu-approximate")
        self.scale_shift_table = nn.Parameter(torch.zeros(6, dim))
        nn.init.zeros_(self.attn2.to_out[0].weight)  # pyright: ignore[reportArgumentType]

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        modulation: Tensor,
        rotary: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        grid: tuple[int, int, int],
    ) -> Tensor:
        """B N D tokens of a (t, h, w) grid, B L D text, B G 6 D modulation (G is 1, or t for one per frame) -> B N D."""
        if self.local is not None:
            hidden_states = hidden_states + self.local(hidden_states, grid)
        table = (self.scale_shift_table + modulation.float()).to(hidden_states.dtype)
        shift1, scale1, gate1, shift3, scale3, gate3 = table.unsqueeze(3).unbind(2)  # each B G 1 D
        h = modulate(self.norm1(hidden_states), scale1, shift1)
        hidden_states = hidden_states + scaled(self.attn1(h, rotary=rotary), gate1)
        h = self.attn2(self.norm2(hidden_states), encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask)
        hidden_states = hidden_states + h
        h = modulate(self.norm3(hidden_states), scale3, shift3)
        return hidden_states + scaled(self.ff(h), gate3)


# First-block cache, MagCache and layer skipping look up what a block returns: one tensor, the tokens.
TransformerBlockRegistry.register(ProMAGTransformerBlock, TransformerBlockMetadata(return_hidden_states_index=0))


def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply tokens B N D by factors B G 1 D: the tokens in order, in G equal groups with one factor each."""
    return (x.unflatten(1, (factor.shape[1], -1)) * factor).flatten(1, 2)


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return x * (1 + scale) + shift; shapes as in `scaled`."""
    return (x.unflatten(1, (scale.shape[1], -1)) * (1 + scale) + shift).flatten(1, 2)


class ProMAGTransformer3DModel(SafetensorsOnly, ModelMixin, ConfigMixin, AttentionMixin, CacheMixin, PeftAdapterMixin):
    """Predicts the rectified-flow velocity of a video latent from its noisy version, text, time, ratio and frame rate.

    Args:
        in_channels: channels of the latent.
        patch_size: latent positions (t, h, w) in one token.
        num_layers: transformer blocks.
        num_attention_heads: heads; the model's width is heads times `attention_head_dim`.
        attention_head_dim: width of a head, a multiple of 2 and at least 6.
        text_dim: width of the text tokens, or a list with one for each text encoder.
        pooled_dim: width of the pooled text vectors, concatenated, that join the modulation; 0 for none.
        temporal_ratios: temporal ratios of the latents in training; for information alone.
        condition_frames: maximum number of clean first latent frames in training; 0 for text-to-video only.
        local_convolution: whether each block begins with a depthwise convolution over neighbouring tokens (conditional
            positional encoding, arXiv 2102.10882). With few training clips the model then learns compact objects much sooner.
        base_ahead: lead of the first half of the channels, the key frames' of a dual latent, in training (see ahead.py); 0 for
            none.
        latents_mean: for each ratio, as a string, the mean of each channel over the training latents.
        latents_std: likewise the standard deviation. The model's input is (latent - mean) / std.
        sample_defaults: height, width, num_frames, temporal_ratio and fps of the videos that its pipeline samples by default,
            num_inference_steps and guidance_scale.

    Raises ValueError for settings that do not fit together.
    """

    __module__ = "promag"
    _supports_gradient_checkpointing = True
    _no_split_modules = ["ProMAGTransformerBlock"]  # noqa: RUF012
    _repeated_blocks = ["ProMAGTransformerBlock"]  # noqa: RUF012
    _skip_layerwise_casting_patterns = ["_embed", "modulation", "norm"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        in_channels: int = 8,
        patch_size: Sequence[int] = (1, 2, 2),
        num_layers: int = 12,
        num_attention_heads: int = 6,
        attention_head_dim: int = 64,
        text_dim: int | Sequence[int] = 512,
        pooled_dim: int = 0,
        temporal_ratios: Sequence[int] = (4, 8, 16),
        condition_frames: int = 0,
        local_convolution: bool = False,
        base_ahead: float = 0.0,
        latents_mean: Mapping[str, Sequence[float]] | None = None,
        latents_std: Mapping[str, Sequence[float]] | None = None,
        sample_defaults: Mapping[str, float] | None = None,
    ):
        super().__init__()
        check_shape(patch_size, in_channels=in_channels, pooled_dim=pooled_dim, condition_frames=condition_frames)
        check_statistics(latents_mean, latents_std, in_channels)
        check_defaults(sample_defaults)
        if attention_head_dim % 2 or attention_head_dim < 6:
            raise ValueError(f"attention_head_dim {attention_head_dim}: an even number of at least 6 is needed")
        dim = num_attention_heads * attention_head_dim
        self.patch_embed = nn.Linear(in_channels * math.prod(patch_size), dim)
        self.place_embed = nn.Linear(3 * PLACE_WIDTH, dim)
        self.text_embeds = nn.ModuleList(PixArtAlphaTextProjection(width, dim) for width in self.text_dims)
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embed, self.ratio_embed, self.fps_embed = (TimestepEmbedding(256, dim) for _ in range(3))
        self.pooled_embed = PixArtAlphaTextProjection(pooled_dim, dim) if pooled_dim else None
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.transformer_blocks = nn.ModuleList(
            ProMAGTransformerBlock(dim, num_attention_heads, local_convolution) for _ in range(num_layers)
        )
        self.norm_out = FP32LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.zeros(2, dim))
        self.proj_out = nn.Linear(dim, in_channels * math.prod(patch_size))
        for layer in (self.modulation[1], self.proj_out):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)
        self.residual_time_embed = None
        self.set_base_ahead(base_ahead)
        self.gradient_checkpointing = False

    @property
    def text_dims(self) -> list[int]:
        """Width of the text tokens of each text encoder."""
        width = self.config["text_dim"]
        return [width] if isinstance(width, int) else list(width)

    def set_base_ahead(self, lead: float) -> None:
        """Set the lead of the key frames' channels; from 0 it adds an embedding of the residual's time that starts at zero.

        Raises ValueError for a lead outside [0, 1), for an odd number of channels, and for 0 after another lead.
        """
        check_lead(lead)
        if lead and self.config["in_channels"] % 2:
            raise ValueError(f"base_ahead {lead:g} with in_channels {self.config['in_channels']}: an even number is needed")
        if not lead and self.residual_time_embed is not None:
            raise ValueError(f"base_ahead 0: this model was trained with {self.config['base_ahead']:g}; keep a lead above 0")
        if lead and self.residual_time_embed is None:
            self.residual_time_embed = copy.deepcopy(self.time_embed)  # draws no random numbers, so all else starts the same
            for parameter in self.residual_time_embed.linear_2.parameters():
                nn.init.zeros_(parameter)
        self.register_to_config(base_ahead=lead)

    def normalise(self, latents: Tensor, temporal_ratio: int) -> Tensor:
        """Normalise the tokenizer's latents, b c t h w, with the channel statistics of the ratio."""
        mean, std = self._statistics(latents, temporal_ratio)
        return (latents - mean) / std

    def denormalise(self, latents: Tensor, temporal_ratio: int) -> Tensor:
        """Invert `normalise`."""
        mean, std = self._statistics(latents, temporal_ratio)
        return latents * std + mean

    def _statistics(self, latents: Tensor, temporal_ratio: int) -> list[Tensor]:
        mean, std = (self.config[name] or {} for name in ("latents_mean", "latents_std"))
        if str(temporal_ratio) not in mean.keys() & std.keys():
            have = ratio_names(ratio for ratio in mean if ratio in std) or "none"
            raise ValueError(f"temporal ratio {temporal_ratio}: this model has latent statistics for {have}")
        return [latents.new_tensor(part[str(temporal_ratio)]).view(1, -1, 1, 1, 1) for part in (mean, std)]

    @scaled_adapters
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | Sequence[Tensor],
        encoder_attention_mask: Tensor | Sequence[Tensor] | None = None,
        pooled_projections: Tensor | None = None,
        temporal_ratio: int | Tensor = 4,
        fps: float | Tensor = 8.0,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the velocity, noise minus clean latent.

        Args:
            hidden_states: noisy, normalised latents, b c t h w.
            timestep: time in [0, 1000], where 1000 is pure noise; (b,), or b t with one for each latent frame. With
                `base_ahead` it sets the times of both halves of the channels.
            encoder_hidden_states: text tokens, b L text_dim; with several text encoders a sequence, one for each.
            encoder_attention_mask: b L, nonzero at text tokens that are not padding; likewise a sequence.
            pooled_projections: pooled text vectors, b pooled_dim; None if `pooled_dim` is 0.
            temporal_ratio: temporal ratio of the latents, the same for the whole batch.
            fps: frames per second of the video, one number or (b,).
            attention_kwargs: may contain `scale`, the weight of LoRA adapters.
            return_dict: return an output object instead of a tuple.

        Raises ValueError for tensors and numbers of other kinds and shapes than these, where the latent is not divisible by
        the patch, and where there are not as many times as frames or patches of several frames.
        """
        check_latents(hidden_states, self.config["in_channels"])
        b, _, t, h, w = hidden_states.shape
        check_time(timestep, b)
        check_ratio_and_rate(temporal_ratio, fps, b)
        check_pooled(pooled_projections, self.config["pooled_dim"], b)
        pt, ph, pw = self.config["patch_size"]
        if t % pt or h % ph or w % pw:
            raise ValueError(f"latent of {t}x{h}x{w} (frames x height x width): not divisible by patch {(pt, ph, pw)}")
        timestep = timestep if timestep.ndim == 2 else timestep.expand(b)[:, None]  # b G
        if timestep.shape[1] != 1 and (timestep.shape != (b, t) or pt > 1):
            raise ValueError(
                f"timestep of shape {tuple(timestep.shape)}: ({b},) is legal, with patches of one frame ({b}, {t}) too"
            )
        x = rearrange(hidden_states, "b c (t u) (h p) (w q) -> b (t h w) (c u p q)", u=pt, p=ph, q=pw)
        step = float(torch.as_tensor(temporal_ratio).flatten()[0]) / POSITION_RATIO * pt
        grid = (t // pt, h // ph, w // pw)
        x = self.patch_embed(x) + self.place_embed(place_features(grid, step, x.device).to(x.dtype))
        text, mask = self._embed_text(encoder_hidden_states, encoder_attention_mask, b)

        ratio, rate = (per_clip(value, b, x.device) for value in (temporal_ratio, fps))
        embedding = self._embed_time(timestep, x)  # b G D
        embedding = embedding + self._embed(self.ratio_embed, 100 * ratio.log2(), x)[:, None]
        embedding = embedding + self._embed(self.fps_embed, 100 * rate.log2(), x)[:, None]
        if self.pooled_embed is not None:
            embedding = embedding + self.pooled_embed(pooled_projections)[:, None]
        modulation = self.modulation(embedding).unflatten(2, (6, -1))  # b G 6 D

        rotary = rotary_positions(self.config["attention_head_dim"], grid, step, x.device)
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                checkpoint: Any = self._gradient_checkpointing_func
                x = checkpoint(block, x, text, modulation, rotary, mask, grid)
            else:
                x = block(x, text, modulation, rotary, mask, grid)

        table = (self.scale_shift_table + embedding[:, :, None].float()).to(x.dtype)  # b G 2 D
        shift, scale = table.unsqueeze(3).unbind(2)
        x = self.proj_out(modulate(self.norm_out(x), scale, shift))
        sizes = {"t": t // pt, "h": h // ph, "w": w // pw, "u": pt, "p": ph, "q": pw}
        out = rearrange(x, "b (t h w) (c u p q) -> b c (t u) (h p) (w q)", **sizes)
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)  # pyright: ignore[reportArgumentType]

    def _embed_text(self, tokens: Any, mask: Any, batch: int) -> tuple[Tensor, Tensor | None]:
        """Project and concatenate the tokens of all encoders: tokens b L D and mask b 1 1 L (True: attend)."""
        tokens = tokens if isinstance(tokens, list | tuple) else [tokens]
        masks = [] if mask is None else mask if isinstance(mask, list | tuple) else [mask]
        check_text(tokens, masks, self.text_dims, batch)
        text = torch.cat([embed(part) for embed, part in zip(self.text_embeds, tokens, strict=True)], 1)
        return text, torch.cat([part.bool() for part in masks], 1)[:, None, None, :] if masks else None

    def _embed_time(self, timestep: Tensor, reference: Tensor) -> Tensor:
        """Embed times b G, or with `base_ahead` the two times that each of them sets: b G D."""
        if self.residual_time_embed is None:
            return self._embed(self.time_embed, timestep.flatten(), reference).unflatten(0, timestep.shape)
        base, residual = (1000 * t.flatten() for t in half_times(timestep.float() / 1000, self.config["base_ahead"]))
        embedding = self._embed(self.time_embed, base, reference) + self._embed(self.residual_time_embed, residual, reference)
        return embedding.unflatten(0, timestep.shape)

    def _embed(self, layer: nn.Module, value: Tensor, reference: Tensor) -> Tensor:
        return layer(self.time_proj(value).to(reference.dtype))


def place_features(grid: tuple[int, int, int], frame_step: float, device: torch.device) -> Tensor:
    """Return sines and cosines of each token's absolute position, N x 3*PLACE_WIDTH, for a grid of (t, h, w) tokens.

    Rotary positions give attention the distance between two tokens; these give each token its own position. Vertical and
    horizontal positions count from the centre in units of the longer side, so their range does not depend on the size.
    """
    t, h, w = grid
    time = torch.arange(t, device=device) * frame_step / 16  # wavelengths of 32, 16, 8 and 4 latent frames at 4x
    rows, columns = ((torch.arange(n, device=device) + 0.5 - n / 2) / max(h, w) for n in (h, w))
    octaves = 2 ** torch.arange(PLACE_WIDTH // 2, device=device) * math.pi
    parts = []
    for position in torch.meshgrid(time, rows, columns, indexing="ij"):
        angles = position.flatten()[:, None] * octaves
        parts += [angles.sin(), angles.cos()]
    return torch.cat(parts, 1)


def rotary_positions(
    head_dim: int, grid: tuple[int, int, int], frame_step: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, each N x head_dim, for a grid of (t, h, w) tokens with frames `frame_step` apart.

    Height and width each use a third of the head's dimensions, rounded down to an even number; time uses the rest.
    """
    side = 2 * (head_dim // 6)
    dims = (head_dim - 2 * side, side, side)
    steps = (frame_step, 1.0, 1.0)
    axes = [torch.arange(n, device=device, dtype=torch.float32) * s for n, s in zip(grid, steps, strict=True)]
    positions = torch.meshgrid(*axes, indexing="ij")
    parts = [
        get_1d_rotary_pos_embed(d, p.flatten(), theta=ROPE_THETA, use_real=True)  # pyright: ignore[reportArgumentType]
        for d, p in zip(dims, positions, strict=True)
    ]
    return torch.cat([cos for cos, _ in parts], 1), torch.cat([sin for _, sin in parts], 1)
