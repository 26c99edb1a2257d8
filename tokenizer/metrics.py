"""Reconstruction metrics, each with its protocol.

Shapes: B C T H W in [-1, 1]. Values are clamped to that range and rounded to 8 bits first: what a viewer would see.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from promag.training.precision import Precision, autocast

from .losses import latent_loss
from .packaged_metrics import PerceptualMetrics
from .perceptual import frechet_distance

MS_SSIM_BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, five scales
MS_SSIM_SIDES = (11, 22, 44, 99, 176)  # smallest picture for each scale: its windows of 11 pixels must fit
LEAST_DETAIL = 0.1 / 255  # root mean square of a clip's high frequencies, a tenth of a grey level: flat clips have less
MAX_PSNR = 120.0  # dB; where all pixels are equal it would be infinite, which neither JSON nor a mean or a plot takes
PROTOCOL = "8-bit RGB; PSNR over all pixels of a clip, SSIM per frame (11x11 Gaussian, reflected border); means over clips"


def _torchmetrics() -> Any:
    """Import torchmetrics on first use: with matplotlib it takes a tenth of the time in which a command starts."""
    from torchmetrics.functional import image

    return image


def to_uint8(x: Tensor) -> Tensor:
    """Turn B C T H W in [-1, 1] into uint8 B T H W C."""
    return rearrange((x.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8), "b c t h w -> b t h w c")


def from_uint8(frames: Tensor) -> Tensor:
    """Turn uint8 B T H W C into float B C T H W in [-1, 1]."""
    return rearrange(frames.float() / 127.5 - 1, "b t h w c -> b c t h w")


def _unit(x: Tensor) -> Tensor:
    return (x.float().clamp(-1, 1) * 127.5 + 127.5).round() / 255


def psnr(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Return the PSNR of each clip in dB, over all its pixels and at most MAX_PSNR: shape (B,)."""
    _check_pair(reconstruction, target)
    return _bounded_psnr(_unit(reconstruction), _unit(target))


def psnr_per_frame(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Return the PSNR of each frame in dB, at most MAX_PSNR: shape (B, T)."""
    _check_pair(reconstruction, target)
    a, b = (rearrange(_unit(x), "b c t h w -> (b t) c h w") for x in (reconstruction, target))
    return _bounded_psnr(a, b).unflatten(0, (target.shape[0], target.shape[2]))


def _bounded_psnr(a: Tensor, b: Tensor) -> Tensor:
    dim = tuple(range(1, a.ndim))
    return _torchmetrics().peak_signal_noise_ratio(a, b, data_range=1.0, reduction="none", dim=dim).clamp(max=MAX_PSNR)


def ssim(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Return the SSIM of each clip, averaged over its frames: shape (B,).

    Positions at the border, which is padded by reflection, count too; Wang et al. 2004 leave them out.
    """
    _check_pair(reconstruction, target)
    a, b = (rearrange(_unit(x), "b c t h w -> (b t) c h w") for x in (reconstruction, target))
    values = _torchmetrics().structural_similarity_index_measure(a, b, data_range=1.0, reduction="none")
    assert isinstance(values, Tensor)
    return values.unflatten(0, (target.shape[0], target.shape[2])).mean(1)


def ms_ssim(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Return the multi-scale SSIM of each clip, averaged over its frames: shape (B,).

    Five scales from 176 pixels a side on; a smaller picture has the first ones that its size allows, their weights
    normalised to sum to 1. The coarsest scale counts positions at the border as `ssim` does. Raises ValueError below 11 pixels.
    """
    _check_pair(reconstruction, target)
    scales = ms_ssim_scales(*target.shape[3:])
    if not scales:
        raise ValueError(f"ms_ssim of {target.shape[3]}x{target.shape[4]}: sides of at least {MS_SSIM_SIDES[0]} are needed")
    betas = MS_SSIM_BETAS[:scales]
    a, b = (rearrange(_unit(x), "b c t h w -> (b t) c h w") for x in (reconstruction, target))
    values = _torchmetrics().multiscale_structural_similarity_index_measure(
        a, b, data_range=1.0, reduction="none", betas=tuple(beta / sum(betas) for beta in betas)
    )
    return values.unflatten(0, (target.shape[0], target.shape[2])).mean(1)


def ms_ssim_scales(height: int, width: int) -> int:
    """Return how many scales of MS-SSIM a picture allows, 0 to 5."""
    return sum(min(height, width) >= side for side in MS_SSIM_SIDES)


def flicker(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Return how much frame-to-frame changes differ from the target's, in 8-bit grey levels: shape (B,).

    0 for equal clips and for one frame alone. A still error does not count, one that comes and goes does.
    """
    _check_pair(reconstruction, target)
    if target.shape[2] == 1:
        return target.new_zeros(len(target), dtype=torch.float32)
    change = _unit(reconstruction).diff(dim=2) - _unit(target).diff(dim=2)
    return 255 * change.abs().mean((1, 2, 3, 4))


def motion(clip: Tensor) -> Tensor:
    """Return the mean absolute change from frame to frame in 8-bit grey levels: shape (B,)."""
    if clip.shape[2] == 1:
        return clip.new_zeros(len(clip), dtype=torch.float32)
    return 255 * _unit(clip).diff(dim=2).abs().mean((1, 2, 3, 4))


def jitter(clip: Tensor) -> Tensor:
    """Return how unsteady each pixel's change is, in 8-bit grey levels: shape (B,).

    The mean absolute second difference over frames: 0 where all changes at a constant rate, and for fewer than 3 frames. Needs
    no target, so it can be taken of generated videos.
    """
    if clip.shape[2] < 3:
        return clip.new_zeros(len(clip), dtype=torch.float32)
    return 255 * _unit(clip).diff(n=2, dim=2).abs().mean((1, 2, 3, 4))


def high_frequency_energy(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Return the energy above half the Nyquist frequency as a fraction of the target's: shape (B,).

    Below 1 is blur, above 1 is noise or ringing. Luminance (BT.601), every frame, spatial frequencies of at least 0.25
    cycles per pixel along either axis.
    """
    _check_pair(reconstruction, target)
    return _high_frequencies(reconstruction) / _high_frequencies(target).clamp_min(1e-12)


def has_detail(clip: Tensor) -> Tensor:
    """Return whether the high frequencies of each clip, as above, have a root mean square of LEAST_DETAIL: shape (B,)."""
    frames, height, width = clip.shape[2:]
    return _high_frequencies(clip) / (frames * (height * width) ** 2) >= LEAST_DETAIL**2  # Parseval's theorem


def _high_frequencies(x: Tensor) -> Tensor:
    """B C T H W -> the energy of each clip's high frequencies, B."""
    weights = x.new_tensor([0.299, 0.587, 0.114], dtype=torch.float32).view(1, 3, 1, 1, 1)
    spectrum = torch.fft.rfft2((_unit(x) * weights).sum(1)).abs().square()  # B T H W/2+1
    rows = torch.fft.fftfreq(x.shape[3], device=x.device).abs()[:, None] >= 0.25
    frequencies = torch.fft.rfftfreq(x.shape[4], device=x.device)[None]
    weight = torch.where((frequencies == 0) | (frequencies == 0.5), 1, 2)  # rfft2 omits each other one's negative
    return (spectrum * (rows | (frequencies >= 0.25)) * weight).sum((1, 2, 3))


def _check_pair(reconstruction: Tensor, target: Tensor) -> None:
    if reconstruction.shape != target.shape or target.ndim != 5:
        raise ValueError(f"shapes {tuple(reconstruction.shape)} and {tuple(target.shape)}: two equal B C T H W are needed")


@torch.no_grad()
def evaluate(model: Any, clips: Iterable[Tensor], temporal_ratio: int, precision: Precision = "auto") -> dict[str, float]:
    """Reconstruct clips (each 1 C T H W) at one ratio from the posterior's mean; return means over clips.

    Keys: psnr, psnr_std, psnr_first (first frame), ssim, clips.
    """
    values: dict[str, list[float]] = {"psnr": [], "psnr_first": [], "ssim": []}
    for clip, output in _reconstructions(model, clips, temporal_ratio, precision):
        values["psnr"] += psnr(output, clip).tolist()
        values["psnr_first"] += psnr(output[:, :, :1], clip[:, :, :1]).tolist()
        values["ssim"] += ssim(output, clip).tolist()
    means = {key: sum(v) / len(v) for key, v in values.items()}
    return {**means, "psnr_std": float(torch.tensor(values["psnr"]).std(correction=0)), "clips": len(values["psnr"])}


@torch.no_grad()
def evaluate_fully(
    model: Any,
    clips: Iterable[Tensor],
    temporal_ratio: int,
    perceptual: PerceptualMetrics | None = None,
    precision: Precision = "auto",
    fps: Sequence[float] = (),
) -> dict[str, Any]:
    """Reconstruct as `evaluate` does and return every metric.

    Args:
        model: encodes and decodes.
        clips: each 1 C T H W.
        temporal_ratio: one of the model's.
        perceptual: metrics of trained models, see below.
        precision: precision in which models with float32 weights run.
        fps: frames per second of each clip; ColorVideoVDP needs them.

    Beside the keys of `evaluate`: ms_ssim; flicker; high_frequency (of clips that have detail, see `has_detail`); psnr_key and
    psnr_between (means of per-frame PSNR over frames 0, r, 2r, ... and over the others); psnr_every_2nd and psnr_every_4th
    (frames 0, 2, 4, ... and 0, 4, 8, ..., whatever the ratio); psnr_per_frame, a list; psnr_low_motion, psnr_mid_motion and
    psnr_top_motion (terciles of the clips by `motion`, from 3 clips on); and per_clip with those of each that are not over all
    clips, and its motion.

    Of `perceptual`: lpips and fvd, None where it lacks them, or with fewer than 2 clips for fvd; cvvdp and vmaf, left out where
    it lacks them or the clips are too small; frechet_frames, left out where it lacks it or with fewer than 2 frames.
    """
    perceptual = perceptual or PerceptualMetrics()
    rows: list[dict[str, float]] = []
    frames: list[Tensor] = []
    # Features of clips and of frames, by key: the originals' and the reconstructions'.
    measured = {"fvd": perceptual.video_features, "frechet_frames": perceptual.frame_features}
    networks = {key: network for key, network in measured.items() if network}
    features: dict[str, tuple[list[Tensor], list[Tensor]]] = {key: ([], []) for key in networks}
    for i, (clip, output) in enumerate(_reconstructions(model, clips, temporal_ratio, precision)):
        shown = from_uint8(to_uint8(output))
        per_frame = psnr_per_frame(output, clip)[0]
        row = _untrained_metrics(output, clip, per_frame, temporal_ratio)
        if perceptual.lpips:
            row["lpips"] = perceptual.lpips(shown, clip)
        if perceptual.cvvdp and i >= len(fps):
            raise ValueError(f"fps of {len(fps)} clips: clip {i} has none, and ColorVideoVDP needs it")
        for name, metric in perceptual.full_reference(*clip.shape[3:]).items():
            row[name] = metric(shown, clip, fps[i] if fps else 0.0)
        for name, network in networks.items():
            for kept, video in zip(features[name], (from_uint8(to_uint8(clip)), shown), strict=True):
                kept.append(network(video))
        rows.append({name: float(value) for name, value in row.items()})
        frames.append(per_frame.cpu())
    by_name = {name: [row[name] for row in rows if name in row] for name in dict.fromkeys(name for row in rows for name in row)}
    results: dict[str, Any] = {name: sum(values) / len(values) for name, values in by_name.items()}
    results["lpips"] = results.get("lpips")
    sets = {name: (torch.cat(original), torch.cat(reconstructed)) for name, (original, reconstructed) in features.items()}
    results["fvd"] = None
    results |= {name: frechet_distance(*pair) for name, pair in sets.items() if len(pair[0]) > 1}
    results |= {"psnr_std": float(torch.tensor([row["psnr"] for row in rows]).std(correction=0)), "clips": len(rows)}
    if third := len(rows) // 3:
        order = [row["psnr"] for row in sorted(rows, key=lambda row: row["motion"])]
        parts = {"low": order[:third], "mid": order[third:-third], "top": order[-third:]}
        results |= {f"psnr_{name}_motion": sum(values) / len(values) for name, values in parts.items()}
    if len({len(f) for f in frames}) == 1:
        results["psnr_per_frame"] = torch.stack(frames).mean(0).tolist()
    results["per_clip"] = rows
    return results


def _untrained_metrics(output: Tensor, clip: Tensor, per_frame: Tensor, temporal_ratio: int) -> dict[str, Any]:
    """Return the metrics of one clip that need no trained model; `per_frame` is the PSNR of each frame, (T,)."""
    key = torch.arange(clip.shape[2]) % temporal_ratio == 0
    row = {
        "psnr": psnr(output, clip),
        "psnr_first": per_frame[0],
        "ssim": ssim(output, clip),
        "flicker": flicker(output, clip),
        "psnr_key": per_frame[key].mean(),
        "psnr_every_2nd": per_frame[::2].mean(),
        "psnr_every_4th": per_frame[::4].mean(),
        "motion": motion(clip),
    }
    if has_detail(clip):
        row["high_frequency"] = high_frequency_energy(output, clip)
    if ms_ssim_scales(*clip.shape[3:]):
        row["ms_ssim"] = ms_ssim(output, clip)
    if not key.all():
        row["psnr_between"] = per_frame[~key].mean()
    return row


@torch.no_grad()
def evaluate_lift(
    model: Any, clips: Iterable[Tensor], temporal_ratio: int, precision: Precision = "auto"
) -> dict[str, dict[str, float]]:
    """Lift latents of one ratio to estimates of every lower one that it can, without pixels; return by ratio (as text) means.

    Keys: latent_error, the squared error of the estimate in units of the true latent's variance in each channel (1 is what
    its mean alone would give); psnr, after that ratio's own decoder. Empty for a model's lowest ratio, and where features
    are handed over alone.
    """
    lower = model.lifts(temporal_ratio)
    results: dict[int, list[tuple[float, float]]] = {ratio: [] for ratio in lower}
    for clip in clips if lower else ():
        clip = clip.to(model.device)
        with autocast(clip.device, precision, model.dtype):
            z, *true = (posterior.mode() for posterior in model.encode_levels(clip, (temporal_ratio, *lower)))
            for ratio, target in zip(lower, true, strict=True):
                estimate = model.lift(z, temporal_ratio, ratio)
                output = model.decode(estimate, ratio).sample
                results[ratio].append((float(latent_loss(estimate, target)), float(psnr(output, clip))))
    return {
        str(ratio): {name: sum(row[i] for row in rows) / len(rows) for i, name in enumerate(("latent_error", "psnr"))}
        for ratio, rows in results.items()
    }


@torch.no_grad()
def evaluate_latents(
    model: Any, reference: Any, clips: Iterable[Tensor], temporal_ratio: int, precision: Precision = "auto"
) -> float:
    """Return the mean error of a model's latents of clips in units of the variance of the reference's, channel by channel."""
    errors = []
    for clip in clips:
        clip = clip.to(model.device)
        with autocast(clip.device, precision, model.dtype):
            z, target = (m.encode(clip, temporal_ratio).latent_dist.mode() for m in (model, reference))
        errors.append(float(latent_loss(z, target)))
    return sum(errors) / len(errors)


def _reconstructions(
    model: Any, clips: Iterable[Tensor], temporal_ratio: int, precision: Precision
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each clip and its reconstruction, under autocast where the weights are float32."""
    count = 0
    for clip in clips:
        clip = clip.to(model.device)
        with autocast(clip.device, precision, model.dtype):
            output = model(clip, temporal_ratio).sample
        yield clip, output
        count += 1
    if not count:
        raise ValueError("no clips to evaluate: at least 1 is needed")
