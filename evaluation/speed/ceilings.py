"""What a machine can do at most: products of matrices, 3D convolutions, copies in memory, decoding of video.

Each is the best of a few rounds on sizes that suit the machine: a limit to measure attained speeds by, not an average.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from promag.data.video.container import open_container
from promag.training.precision import DTYPES, Chosen
from promag.training.throughput import ENOUGH, fastest, matmul_tflops

# Clips of a convolution: batch, channels, frames, height, width. The best channel count of these is the ceiling.
ON_CPU = ((2, 64, 8, 32, 32), (2, 128, 8, 32, 32), (2, 256, 8, 16, 16))
ON_GPU = ((4, 128, 17, 128, 128), (4, 256, 17, 64, 64), (4, 512, 17, 32, 32))
COPIED = {"cpu": 2**28, "cuda": 2**31}  # bytes, more than any cache holds


@dataclass(frozen=True)
class Ceilings:
    """The limits of a machine: TFLOP/s by precision, GB/s of reading and writing together, frames/s of one thread."""

    product_tflops: dict[str, float]
    convolution_tflops: dict[str, float]
    copy_gb_per_second: float
    decoder_frames_per_second: float | None = None  # frames of 256x456, a key frame every 12

    def tflops(self, kind: str, precision: str) -> float:
        """Return the limit of a kind of arithmetic, `product` or `convolution`."""
        return asdict(self)[f"{kind}_tflops"][precision]


def measure_ceilings(device: torch.device, precisions: Sequence[Chosen], video: Path | None = None) -> Ceilings:
    """Measure the limits of a device, and of decoding the file `video` on one thread of the CPU."""
    products = {name: matmul_tflops(device, bf16=name == "bf16") for name in precisions}
    convolutions = {name: convolution_tflops(device, DTYPES[name]) for name in precisions}
    frames = decoder_frames_per_second(video) if video else None
    return Ceilings(products, convolutions, copy_gb_per_second(device), frames)


@torch.no_grad()
def convolution_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the highest TFLOP/s of 3x3x3 convolutions over a few channel counts, in channels-last-3d."""
    best = 0.0
    for batch, channels, *size in ON_GPU if device.type == "cuda" else ON_CPU:
        options: dict[str, Any] = {"memory_format": torch.channels_last_3d}
        x = torch.ones(batch, channels, *size, dtype=dtype, device=device).contiguous(**options)
        kernel = torch.ones(channels, channels, 3, 3, 3, dtype=dtype, device=device).contiguous(**options)
        seconds = fastest(lambda x=x, kernel=kernel: F.conv3d(x, kernel, padding=1))
        best = max(best, 2 * 27 * channels * x.numel() / seconds / 1e12)
        if seconds > ENOUGH:  # emulated bfloat16: larger ones would take minutes
            break
    return best


def copy_gb_per_second(device: torch.device) -> float:
    """Return GB/s of copying a large tensor, bytes read and bytes written both counted."""
    source = torch.ones(COPIED[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / fastest(lambda: target.copy_(source)) / 1e9


def decode_alone(*paths: str | Path) -> int:
    """Decode whole files on one thread, without making pictures of the frames; return the number of frames."""
    frames = 0
    for path in paths:
        with open_container(path) as video:
            frames += sum(1 for _ in video.frames())
    return frames


def decoder_frames_per_second(path: Path) -> float:
    """Return the frames a second of decoding a whole file on one thread, without making pictures of the frames."""
    seconds = fastest(lambda: decode_alone(path), rounds=2)
    return decode_alone(path) / seconds
