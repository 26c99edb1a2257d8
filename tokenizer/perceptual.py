"""Metrics that need another network's weights, which the user gives by path: LPIPS and FVD.

Shapes: B C T H W in [-1, 1]. LPIPS: arXiv 1801.03924, with VGG16; FVD: arXiv 1812.01717, with an I3D in TorchScript.
"""

import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from promag.training.config import UserError, first_line, one_line

VGG16 = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512)
TAPS = (1, 3, 6, 9, 12)  # convolutions whose activations are compared: relu1_2, 2_2, 3_3, 4_3, 5_3
# What LPIPS subtracts and divides by, for pictures in [-1, 1].
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
I3D_SIZE, I3D_FRAMES = 224, 10  # pixels a side, and fewest frames of a clip


class LPIPS(nn.Module):
    """Learned perceptual distance of two clips, frame by frame: 0 for equal ones, larger is worse.

    `load` reads trained weights; untrained ones serve tests alone. Gradients reach the pictures, never the weights.
    """

    def __init__(self):
        super().__init__()
        widths = [w for w in VGG16 if w != "pool"]
        self.convs = nn.ModuleList(
            nn.Conv2d(before, width, 3, padding=1)  # pyright: ignore[reportArgumentType]
            for before, width in zip([3, *widths[:-1]], widths, strict=True)
        )
        self.weights = nn.ParameterList(torch.ones(self.convs[tap].out_channels) for tap in TAPS)  # pyright: ignore
        self.requires_grad_(False)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "LPIPS":
        """Read torchvision's vgg16 and the linear layers of lpips from the .pth or .safetensors files of a folder.

        Raises UserError naming what is missing.
        """
        state = _read_all(Path(folder))
        # torchvision counts ReLUs and poolings too: 0, 2, 5, 7, 10, 12, 14, ...
        places, place = [], 0
        for width in VGG16:
            places += [] if width == "pool" else [place]
            place += 1 if width == "pool" else 2
        names = {f"convs.{i}.{part}": f"features.{p}.{part}" for i, p in enumerate(places) for part in ("weight", "bias")}
        names |= {f"weights.{i}": f"lin{i}.model.1.weight" for i in range(len(TAPS))}
        missing = [name for name in names.values() if name not in state]
        if missing:
            raise UserError(f"LPIPS weights {folder}: no {missing[0]} there; put vgg16 (torchvision) and vgg.pth (lpips) in it")
        model = cls()
        own = model.state_dict()
        model.load_state_dict({key: state[name].float().reshape(own[key].shape) for key, name in names.items()})
        return model.eval()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the mean distance over the frames of each clip: (B,)."""
        frames = [rearrange(x.float(), "b c t h w -> (b t) c h w") for x in (a, b)]
        total = frames[0].new_zeros(len(frames[0]))
        for one, two, weight in zip(*(self._activations(x) for x in frames), self.weights, strict=True):
            difference = (_normalised(one) - _normalised(two)).square()
            total = total + (difference * weight.view(1, -1, 1, 1)).sum(1).mean((1, 2))
        return total.unflatten(0, (a.shape[0], a.shape[2])).mean(1)

    def _activations(self, x: Tensor) -> list[Tensor]:
        x = (x - x.new_tensor(SHIFT).view(1, 3, 1, 1)) / x.new_tensor(SCALE).view(1, 3, 1, 1)
        kept, index = [], 0
        for width in VGG16:
            if width == "pool":
                x = F.max_pool2d(x, 2)
                continue
            x = F.relu(self.convs[index](x))
            if index in TAPS:
                kept.append(x)
            index += 1
        return kept


def _normalised(x: Tensor) -> Tensor:
    return x / (x.square().sum(1, keepdim=True) + 1e-10).sqrt()  # a root of 0 has no gradient


class VideoFeatures:
    """Features of an I3D in TorchScript, as FVD compares them: clips of at least 10 frames to (B, 400).

    TorchScript is a program that reads and writes files if it likes: load it only from a source that you trust.
    """

    def __init__(self, path: str | os.PathLike):
        try:
            self.model: Any = torch.jit.load(os.fspath(path), map_location="cpu").eval()
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(f"FVD weights {path}: not a TorchScript model: {first_line(error)}") from None

    @torch.no_grad()
    def __call__(self, clip: Tensor) -> Tensor:
        """B C T H W on any device -> B D on the CPU; raises ValueError for clips that are too short."""
        if clip.shape[2] < I3D_FRAMES:
            raise ValueError(f"FVD of clips of {clip.shape[2]} frames: at least {I3D_FRAMES} are needed")
        frames = rearrange(clip.float().clamp(-1, 1), "b c t h w -> (b t) c h w")
        frames = F.interpolate(frames, (I3D_SIZE, I3D_SIZE), mode="bilinear", align_corners=False)
        x = rearrange(frames, "(b t) c h w -> b c t h w", b=len(clip))
        return self.model.to(x.device)(x, rescale=False, resize=False, return_features=True).cpu()


def check_fvd_frames(path: str | os.PathLike | None, frames: int, clips: str = "clips") -> None:
    """Raise UserError where an I3D is given for FVD (`--fvd`) and the clips are too short for it."""
    if path is not None and frames < I3D_FRAMES:
        raise UserError(
            f"--fvd {path}: {clips} of {frames} frames; at least {I3D_FRAMES} are needed; use longer ones, or leave it out"
        )


def frechet_distance(one: Tensor, two: Tensor) -> float:
    """Return the Fréchet distance of two sets of features, each (N, D) with N of at least 2, as of two Gaussians."""
    if min(len(one), len(two)) < 2 or one.shape[1] != two.shape[1]:
        raise ValueError(f"features {tuple(one.shape)} and {tuple(two.shape)}: two sets of at least 2 of one width are needed")
    one, two = one.double(), two.double()
    # Roots p and q of the covariances, p.T @ p and q.T @ q: the trace of the root of their product is p @ q.T's nuclear norm.
    p, q = (torch.linalg.qr((x - x.mean(0)) / (len(x) - 1) ** 0.5, mode="r").R for x in (one, two))
    root = torch.linalg.svdvals(p @ q.T).sum()
    return float((one.mean(0) - two.mean(0)).square().sum() + p.square().sum() + q.square().sum() - 2 * root)


def _read_all(folder: Path) -> dict[str, Tensor]:
    files: Sequence[Path] = sorted([*folder.glob("*.safetensors"), *folder.glob("*.pth"), *folder.glob("*.pt")])
    if not files:
        raise UserError(f"LPIPS weights {folder}: no .pth or .safetensors file there")
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            state |= (
                load_file(file) if file.suffix == ".safetensors" else torch.load(file, map_location="cpu", weights_only=True)
            )
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, SafetensorError) as error:
            raise UserError(f"LPIPS weights {file}: cannot be read: {one_line(error)}") from None
    return state
