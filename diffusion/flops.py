"""FLOPs of the transformer, by formula: what a token budget costs, and what a training's throughput is measured by.

N tokens, D width, L text tokens. Products and sums count as two FLOPs, as in torch.utils.flop_counter, and only those of
matrix products and convolutions count.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

FREQUENCIES = 256  # width of the embeddings of time, ratio and frame rate
PLACE_FEATURES = 24  # features of a token's place


def forward_flops(config: Mapping[str, Any], tokens: int, text_tokens: int | Sequence[int], batch: int = 1) -> float:
    """Return the FLOPs of one forward pass of ProMAGTransformer3DModel, given its config and the tokens of each sample.

    `text_tokens` are those of each text encoder, in a sequence where the config's `text_dim` is one.
    """
    lengths, widths = ([x] if isinstance(x, int) else list(x) for x in (text_tokens, config["text_dim"]))
    n, text, d = tokens, sum(lengths), config["num_attention_heads"] * config["attention_head_dim"]
    patch = config["in_channels"] * prod(config["patch_size"])
    self_attention = 8 * n * d**2 + 4 * n**2 * d
    cross_attention = 4 * n * d**2 + 4 * text * d**2 + 4 * n * text * d
    feed_forward = 16 * n * d**2
    local = 2 * 27 * n * d if config["local_convolution"] else 0
    blocks = config["num_layers"] * (self_attention + cross_attention + feed_forward + local)
    ends = 4 * n * patch * d
    projections = sum(2 * length * (width * d + d**2) for length, width in zip(lengths, widths, strict=True))
    embedded = 3 + bool(config["base_ahead"])  # numbers: time, temporal ratio, frame rate; the residual's time if it differs
    embeddings = projections + embedded * 2 * (FREQUENCIES * d + d**2) + 12 * d**2
    pooled = 2 * (config["pooled_dim"] * d + d**2) if config["pooled_dim"] else 0
    places = 2 * n * PLACE_FEATURES * d  # once for the whole batch
    return float(batch * (blocks + ends + embeddings + pooled) + places)


def wan_forward_flops(config: Mapping[str, Any], tokens: int, text_tokens: int, batch: int = 1) -> float:
    """Return the FLOPs of one forward pass of WanTransformer3DModel, given its config and each sample's tokens."""
    n, text, d = tokens, text_tokens, config["num_attention_heads"] * config["attention_head_dim"]
    self_attention = 8 * n * d**2 + 4 * n**2 * d
    cross_attention = 4 * n * d**2 + 4 * text * d**2 + 4 * n * text * d
    blocks = config["num_layers"] * (self_attention + cross_attention + 4 * n * d * config["ffn_dim"])
    channels = config["in_channels"] + (config["out_channels"] or config["in_channels"])
    ends = 2 * n * channels * prod(config["patch_size"]) * d
    embeddings = 2 * text * (config["text_dim"] * d + d**2) + 2 * (config["freq_dim"] * d + d**2) + 12 * d**2
    return float(batch * (blocks + ends + embeddings))


def training_flops(config: Mapping[str, Any], tokens: int, text_tokens: int | Sequence[int], batch: int = 1) -> float:
    """Return the FLOPs of a forward and a backward pass: three forward passes, recomputation left out."""
    return 3 * forward_flops(config, tokens, text_tokens, batch)
