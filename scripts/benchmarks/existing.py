"""Count what growth on published autoencoders costs, and Wan 2.1 at 4x, 8x and 16x.

Nothing is measured and no weights are needed: models have their published configurations, FLOPs are counted on tensors without
data, and memory is the most that tensors hold at once, counted operator by operator. Workspaces inside of operators, and what
allocators and libraries take beside tensors, are left out.
"""

import argparse
import copy
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from promag import AutoencoderKLProMAG
from promag.diffusion.families import WAN_TEXT_TOKENS
from promag.evaluation.memory import peak_live_bytes, static_memory
from promag.evaluation.published import AUTOENCODERS, TRANSFORMERS, Published
from promag.scripts._options import check_writable, share
from promag.tokenizer.autoencoder import EXISTING_WIDTH
from promag.tokenizer.existing import describe
from promag.tokenizer.geometry import latent_frames, tokens
from promag.tokenizer.growth import Growth
from promag.tokenizer.levels import parameter_count
from promag.tokenizer.losses import latent_loss, reconstruction_loss
from promag.training.command_line import Parser, run_main
from promag.training.precision import autocast
from promag.training.run import append_result

LEVELS = 2
CODED = (65, 480, 832)  # frames, height and width of the clip whose coding is counted: every class takes 65 frames
ON_LATENTS = ((65, 480, 832), (81, 480, 832))  # clips of which the latents are trained on
ON_PIXELS = (65, 128, 128)
SIZES = {"480p": (480, 832), "720p": (720, 1280)}  # what the transformers generate
FRAMES, RATIOS, SPATIAL = 81, (4, 8, 16), 8  # Wan 2.1's
LORA = LoraConfig(r=32, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
CPU = torch.device("cpu")
GIB, MIB = 2**30, 2**20


def main(argv: Sequence[str]) -> int:
    """Print tables; with --record append a JSON line for each autoencoder and one for the transformers."""
    parser = Parser(__doc__)
    for option, models in (("--autoencoders", AUTOENCODERS), ("--transformers", TRANSFORMERS)):
        parser.add_argument(
            option, nargs="*", choices=models, default=list(models), metavar="NAME", help=f"some of {', '.join(models)}; all"
        )
    parser.add_argument(
        "--trained",
        nargs="*",
        choices=TRANSFORMERS,
        default=list(TRANSFORMERS)[:1],
        metavar="NAME",
        help="transformers whose training is counted, at 480p",
    )
    parser.add_argument(
        "--widths", type=int, nargs="+", default=[128, EXISTING_WIDTH, 384], help="channels of the levels' blocks"
    )
    share(parser, "--record")
    arguments = parser.parse_args(argv)
    check_writable("--record", arguments.record, appended=True)
    for name in arguments.autoencoders:
        line = autoencoder_line(AUTOENCODERS[name], arguments.widths)
        print(_autoencoder_text(line))
        _record(arguments, line)
    rows = []
    for name in arguments.transformers:
        rows += transformer_rows(TRANSFORMERS[name], name in arguments.trained)
    if rows:
        print(_transformer_text(rows))
        _record(arguments, {"what": "published transformers", "protocol": TRANSFORMER_PROTOCOL, "rows": rows})
    return 0


def _record(arguments: argparse.Namespace, line: dict[str, Any]) -> None:
    if arguments.record:
        append_result(arguments.record, line)


# -- counting --------------------------------------------------------------------------------------------------------


def count_flops(call: Callable[[], Any]) -> dict[str, int]:
    """Return the FLOPs of convolutions, linear layers and attention in a call on the meta device, and of all together."""
    with FlopCounterMode(display=False) as counter:
        call()
    # Without data attention is written out, as two batched products; linear layers are products of matrices.
    kinds = {"convolution": "convolution", "mm": "linear", "addmm": "linear", "bmm": "attention", "baddbmm": "attention"}
    counts: dict[str, int] = dict.fromkeys(("convolution", "linear", "attention"), 0)
    for operator, flops in counter.get_flop_counts()["Global"].items():
        counts[kinds[str(operator).removeprefix("aten.").removesuffix("_backward")]] += flops
    return {**counts, "total": sum(counts.values())}


def _gflops(call: Callable[[], Any]) -> float:
    with torch.no_grad():
        return count_flops(call)["total"] / 1e9


def as_fake(model: Any, mode: FakeTensorMode, dtype: torch.dtype | None = None) -> Any:
    """Return a copy of a model on the meta device whose weights are a CPU's but have no data."""
    copied = copy.deepcopy(model)
    with mode:
        for module in copied.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    empty = torch.empty(weight.shape, dtype=dtype or weight.dtype)
                    module._parameters[name] = nn.Parameter(empty, weight.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return copied


def _pass_bytes(model: Any, loss: Callable[[], Tensor]) -> int:
    """Return the peak of a forward and a backward pass: activations, gradients, temporary tensors, bf16 copies of weights."""

    def step() -> None:
        with autocast(CPU, "bf16"):
            value = loss()
        value.backward()

    peak = peak_live_bytes(step)
    model.zero_grad()
    return peak


# -- autoencoders ----------------------------------------------------------------------------------------------------

AUTOENCODER_PROTOCOL = (
    "configurations of diffusers without weights; FLOPs: 2 for a multiply-add in convolutions, products and attention, on the "
    "meta device; static memory: float32 weights, gradients, moments (Muon's one of kernels, AdamW's two of the rest) and "
    "averages of the level that is trained; pass: most that tensors of a forward and a backward pass under bf16 autocast hold "
    "at once, one clip, gradients included, on fake tensors of a CPU; checkpointed: the level's blocks computed again; the "
    "base's float32 weights and the levels below come on top; null: not a legal length; on latents: the loss of training on "
    "cached latents; on pixels: L1 through all decoders"
)


@dataclass(frozen=True)
class Clip:
    """Size of a clip in pixels."""

    frames: int
    height: int
    width: int

    def pixels(self, device: str, rate: int = 1) -> Tensor:
        """Return a clip of every `rate`-th frame, all zeros."""
        return torch.zeros(1, 3, 1 + (self.frames - 1) // rate, self.height, self.width, device=device)

    def latents(self, model: Any, rate: int = 1, device: str = "cpu") -> Tensor:
        """Return the base's latents of every `rate`-th frame, all zeros."""
        frames = latent_frames(1 + (self.frames - 1) // rate, model.base_ratio)
        sides = self.height // model.spatial_ratio, self.width // model.spatial_ratio
        return torch.zeros(1, model.latent_channels, frames, *sides, device=device)


def autoencoder_line(published: Published, widths: Sequence[int]) -> dict[str, Any]:
    """Return size, arithmetic and memory of a published autoencoder and of two levels grown on it, by their width."""
    with torch.device("meta"):
        base = published.build()
    existing = describe(base)
    coded = Clip(*CODED)
    with torch.no_grad():
        z = base.encode(coded.pixels("meta")).latent_dist.mode()
    weights = parameter_count([base])
    return {
        "what": "published autoencoder",
        "name": published.name,
        "class": published.class_name,
        "source": published.source,
        "parameters": weights,
        "bytes": {"bf16": 2 * weights, "fp32": 4 * weights},
        "temporal_ratio": existing.temporal_ratio,
        "spatial_ratio": existing.spatial_ratio,
        "latent_channels": existing.latent_channels,
        "clip": CODED,
        "encode_gflops": {rate: _gflops(lambda r=rate: base.encode(coded.pixels("meta", r))) for rate in (1, 2, 4)},
        "decode_gflops": _gflops(lambda: base.decode(z)),
        "growth": [_growth_row(asdict(existing), width) for width in widths],
        "protocol": AUTOENCODER_PROTOCOL,
    }


def grown(existing: dict[str, Any], width: int) -> AutoencoderKLProMAG:
    """Return two untrained levels on an autoencoder, on torch's default device."""
    return AutoencoderKLProMAG(existing=existing, growth=[asdict(Growth(width=width))] * LEVELS)


def _growth_row(existing: dict[str, Any], width: int) -> dict[str, Any]:
    with torch.device("meta"):
        model = grown(existing, width)
    ratios = model.temporal_ratios
    latents = {rate: Clip(*CODED).latents(model, rate, "meta") for rate in (1, 2, 4)}
    parameters = {ratio: parameter_count(model.level_modules(ratio)) for ratio in ratios[1:]}
    weights = sum(parameters.values())
    row: dict[str, Any] = {
        "width": width,
        "parameters": parameters,
        "bytes": {"bf16": 2 * weights, "fp32": 4 * weights},
        "encode_gflops": _gflops(lambda: model.encode_base_latents(latents, ratios[-1:])),
        "decode_gflops": _gflops(lambda: model.lift(latents[4], ratios[-1], ratios[0])),
    }
    if width == EXISTING_WIDTH:
        fake = FakeTensorMode()
        model = as_fake(model, fake).train()
        with fake:
            on_latents = [
                _training_row(model, Clip(*size), ratio, below)
                for size in ON_LATENTS
                for below, ratio in itertools.pairwise(ratios)
            ]
            row["training"] = [*on_latents, _training_row(model, Clip(*ON_PIXELS), ratios[-1])]
    return row


def _training_row(model: AutoencoderKLProMAG, clip: Clip, ratio: int, below: int | None = None) -> dict[str, Any]:
    """Return the memory of training one level, on latents of the ratio `below` it or, without one, on pixels."""
    trained = model.train_only(ratio)
    kernels = {id(p) for p in model.hidden_kernels()}
    static = static_memory(trained, [p for p in trained if id(p) in kernels])
    legal = (clip.frames - 1) % (ratio * model.latent_step) == 0
    peaks: dict[str, int | None] = dict.fromkeys(("pass", "pass_checkpointed"))
    for key in peaks if legal else ():
        model.enable_gradient_checkpointing() if key == "pass_checkpointed" else model.disable_gradient_checkpointing()
        peaks[key] = _pass_bytes(model, _latent_loss(model, clip, ratio, below) if below else _pixel_loss(model, clip, ratio))
    where = "latents" if below else "pixels"
    return {"on": where, **asdict(clip), "ratio": ratio, "static": {**asdict(static), "total": static.total}, **peaks}


def _latent_loss(model: AutoencoderKLProMAG, clip: Clip, ratio: int, below: int) -> Callable[[], Tensor]:
    rates = [2**i for i in range(1 + model.level_of(ratio))]
    latents = {rate: clip.latents(model, rate) for rate in rates}

    def loss() -> Tensor:
        posterior, target = model.encode_base_latents(latents, (ratio, below))
        return latent_loss(model.lift(posterior.mode(), ratio, below), target.mode())

    return loss


def _pixel_loss(model: AutoencoderKLProMAG, clip: Clip, ratio: int) -> Callable[[], Tensor]:
    x = clip.pixels("cpu")
    return lambda: reconstruction_loss(model(x, ratio).sample, x)  # pyright: ignore[reportAttributeAccessIssue]


def _autoencoder_text(line: dict[str, Any]) -> str:
    clip = "x".join(map(str, CODED))
    encode, decode = line["encode_gflops"], line["decode_gflops"]
    lines = [
        f"{line['name']}: {line['parameters'] / 1e6:.1f} M parameters, {line['bytes']['bf16'] / 1e6:.0f} MB in bf16; {clip}: "
        f"{encode[1] / 1e3:.1f} TFLOP to encode, {sum(encode.values()) / 1e3:.1f} at its three frame rates, {decode / 1e3:.1f} "
        "to decode"
    ]
    for row in line["growth"]:
        sizes = ", ".join(f"{ratio}x {count / 1e6:.2f} M" for ratio, count in row["parameters"].items())
        size, coding = row["bytes"], [row[f"{kind}_gflops"] / 1e3 for kind in ("encode", "decode")]
        lines.append(
            f"  width {row['width']}: {sizes}; {size['bf16'] / 1e6:.1f} MB in bf16, {size['fp32'] / 1e6:.1f} in fp32; "
            f"beside the base {coding[0]:.3f} TFLOP to encode, {coding[1]:.3f} to decode"
        )
        for training in row.get("training", ()):
            size = f"{training['frames']}x{training['height']}x{training['width']}"
            head = f"    {training['ratio']}x on {training['on']} of {size}: {training['static']['total'] / MIB:.0f} MiB static"
            if training["pass"] is None:
                lines.append(f"{head}; no legal length")
            else:
                passes = training["pass"] / GIB, training["pass_checkpointed"] / GIB
                lines.append(f"{head}, {passes[0]:.2f} GiB a clip, {passes[1]:.2f} with checkpointing")
    return "\n".join(lines)


# -- transformers ----------------------------------------------------------------------------------------------------

TRANSFORMER_PROTOCOL = (
    "configurations of diffusers without weights; one forward pass of one video without guidance, 512 text tokens; FLOPs: 2 "
    "for a multiply-add in products, attention and convolutions, on the meta device; inference: most that tensors beside bf16 "
    "weights hold at once, with attention that keeps no scores, on fake tensors of a CPU; latent: in bf16; training: most that "
    "tensors of a forward and a backward pass hold at once, one video, float32 weights under bf16 autocast, with gradients; "
    "checkpointed: blocks computed again; LoRA: rank 32 at the attention's four projections; static memory: float32 weights, "
    "gradients, AdamW's moments and averages of what is trained; frozen weights come on top"
)


def transformer_rows(published: Published, trained: bool) -> list[dict[str, Any]]:
    """Return tokens, FLOPs and memory of a published transformer by size of the video and temporal ratio.

    With `trained` the rows of the smallest size have the memory of training it, and of training LoRA adapters.
    """
    with torch.device("meta"):
        model = published.build()
        shallow = dataclasses.replace(published, config={**published.config, "num_layers": 2}).build()
    fake = FakeTensorMode()
    half = as_fake(shallow, fake, torch.bfloat16)  # activations of inference do not grow with the number of blocks
    rows = []
    for (name, (height, width)), ratio in itertools.product(SIZES.items(), RATIOS):
        shape = (model.config["in_channels"], latent_frames(FRAMES, ratio), height // SPATIAL, width // SPATIAL)
        with torch.no_grad():
            flops = count_flops(lambda size=shape: _velocity(model, size, "meta"))
            with fake:
                inference = peak_live_bytes(lambda size=shape: _velocity(half, size, dtype=torch.bfloat16))
        rows.append(
            {
                "name": published.name,
                "source": published.source,
                "parameters": parameter_count([model]),
                "size": name,
                "frames": FRAMES,
                "ratio": ratio,
                "latent_shape": shape,
                "tokens": tokens(FRAMES, height, width, ratio, model.config["patch_size"]),
                "gflops": {kind: count / 1e9 for kind, count in flops.items()},
                "latent_bytes": 2 * torch.Size(shape).numel(),
                "inference": inference,
            }
        )
    for lora in (False, True) if trained else ():
        if lora:
            model.requires_grad_(False).add_adapter(LORA)
        copied = as_fake(model.train(), fake)
        weights = [p for p in copied.parameters() if p.requires_grad]
        static = static_memory(weights, [])
        kept = {"parameters": sum(p.numel() for p in weights), "static": {**asdict(static), "total": static.total}}
        for row in rows[: len(RATIOS)]:
            peaks = {}
            for key in ("pass", "pass_checkpointed"):
                copied.enable_gradient_checkpointing() if key != "pass" else copied.disable_gradient_checkpointing()
                with fake:
                    peaks[key] = _transformer_pass(copied, row["latent_shape"])
            row["lora" if lora else "training"] = {**kept, **peaks}
    return rows


def _velocity(model: Any, shape: Sequence[int], device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    noisy = torch.zeros(1, *shape, device=device, dtype=dtype)
    text = torch.zeros(1, WAN_TEXT_TOKENS, model.config["text_dim"], device=device, dtype=dtype)
    return model(noisy, torch.zeros(1, device=device), text, return_dict=False)[0]


def _transformer_pass(model: Any, shape: Sequence[int]) -> int:
    return _pass_bytes(model, lambda: _velocity(model, shape).float().square().mean())


def _transformer_text(rows: Sequence[dict[str, Any]]) -> str:
    columns = (
        "tokens",
        "linear TFLOP",
        "attention",
        "all",
        "latent MiB",
        "inference GiB",
        "training GiB",
        "checkpointed",
        "LoRA GiB",
        "checkpointed",
    )
    lines = ["  ".join(columns)]
    for row in rows:
        linear = (row["gflops"]["linear"] + row["gflops"]["convolution"]) / 1e3
        flops = [linear, *(row["gflops"][key] / 1e3 for key in ("attention", "total"))]
        passes = [row[key][kind] / GIB for key in ("training", "lora") if key in row for kind in ("pass", "pass_checkpointed")]
        figures = [row["tokens"], *flops, row["latent_bytes"] / MIB, row["inference"] / GIB, *passes]
        lines.append(f"{row['name']} {row['size']} {row['ratio']}x: " + "  ".join(f"{value:.5g}" for value in figures))
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(run_main(main))
