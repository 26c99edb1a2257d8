"""The model card of a published tokenizer: what it does, how well, what it was trained on and how."""

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from promag.data.buckets import sides
from promag.data.tables import load_text
from promag.evaluation.markdown import markdown_table
from promag.training.config import UserError

# Figures of the card: name, heading, digits after the point.
COLUMNS = (
    ("psnr", "PSNR", 2),
    ("psnr_first", "first frames", 2),
    ("psnr_key", "key frames", 2),
    ("psnr_between", "in between", 2),
    ("psnr_low_motion", "least motion", 2),
    ("psnr_top_motion", "most motion", 2),
    ("ssim", "SSIM", 3),
    ("ms_ssim", "MS-SSIM", 3),
    ("cvvdp", "JOD", 2),
    ("vmaf", "VMAF", 1),
    ("frechet_frames", "Fréchet", 2),
    ("flicker", "flicker", 2),
    ("high_frequency", "high freq.", 2),
)
STAGE_HEADS = ("stage", "lower encoder, decoder", "clips", "steps", "batch", "AdamW, Muon", "loss", "minutes", "on")


def tokenizer_card(
    name: str,
    shape: Mapping[str, Any],
    record: Mapping[str, Any],
    recipe: Sequence[Mapping[str, Any]],
    sources: Sequence[Mapping[str, Any]],
    credits: str,
    licence: str | None = None,
    unseen: bool = False,
) -> str:
    """Return the card as Markdown.

    Args:
        name: folder of the checkpoint, as users give it.
        shape: parameters, latent_channels, temporal_ratios, spatial_ratio, dtype, and where it differs from our own: class, of
            diffusers, or base, the class that levels in a folder of their own were grown on.
        record: the line that `promag evaluate-tokenizer` records for the published weights.
        recipe: one mapping per stage, with name, frames, size, buckets (None for the shape of these), steps, batch
            (samples a step, of all processes), learning_rate, muon_learning_rate, loss, seconds, encoder, decoder, machines and
            extra_sources (share of the steps by source). The first may be {"published": folder}: the autoencoder that the
            others start from.
        sources: one mapping per source of training clips, with repository, commit, licence and clips.
        credits: Markdown, under the table of sources.
        licence: identifier of the weights' licence; None states none.
        unseen: it is known that no clip of `record` is of a file that was trained on.
    """
    ratios = [f"{ratio}x" for ratio in shape["temporal_ratios"]]
    clips = sum(source["clips"] for source in sources)
    some = shape["temporal_ratios"][-1]
    columns = [column for column in COLUMNS if any(column[0] in values for values in record["ratios"].values())]
    return "\n".join(
        [
            "---",
            *([f"license: {licence}"] if licence else []),
            "library_name: diffusers",
            "tags: [video, autoencoder, promag]",
            "---",
            "",
            f"# {name}",
            "",
            f"{_subject(shape)}: one checkpoint "
            f"for {', '.join(ratios)} temporal compression, {shape['spatial_ratio']}x in height and width, "
            f"{shape['latent_channels']} latent channels.{_GROWN if len(ratios) > 1 else ''}",
            "",
            "```python",
            "import promag",
            "",
            f"tokenizer = promag.{_loading(name, shape)}",
            f"z = tokenizer.encode(clip, temporal_ratio={some}).latent_dist.mode()  # clip: B 3 1+{some}N H W in [-1, 1]",
            f"video = tokenizer.decode(z, temporal_ratio={some}).sample",
            "```",
            "",
            *([] if shape.get("base") else [f"`promag reconstruct {name} VIDEO --out compared.mp4` {_SHOWS}", ""]),
            "## How well it reconstructs",
            "",
            f"{record['protocol']}. {record['ratios'][str(some)]['clips']} clips at {record['size']}x{record['size']}"
            f"{', none of a file that it was trained on' if unseen else ''}. Commit {record['commit']}, {record['machine']}, "
            f"torch {record['versions']['torch']}.",
            "",
            markdown_table(["ratio", *(heading for _, heading, _ in columns)], _figures(record["ratios"], columns)),
            "",
            *_lifts(record["ratios"]),
            *_controls(record["ratios"], shape["temporal_ratios"][0]),
            "PSNR in dB; key frames are frames 0, r, 2r, ...; least and most motion are thirds of the clips; high freq. is the "
            "energy above half the Nyquist frequency against the original's (below 1 is blur)."
            f"{_explain(columns)} LPIPS and FVD were not measured for want of weights.",
            "",
            "## Recipe",
            "",
            markdown_table(STAGE_HEADS, _stages(recipe)),
            "",
            f"{_origin(recipe)}Weights are moving averages. Minutes by the clock.",
            "",
            "## Training data",
            "",
            f"{clips} clips; each keeps the licence of its source.",
            "",
            markdown_table(
                ["source", "commit", "licence", "clips"],
                [[s["repository"], f"`{s['commit'][:12]}`", s["licence"], str(s["clips"])] for s in sources],
            ),
            "",
            credits.strip(),
            "",
        ]
    )


_GROWN = " Grown level by level after ProMAG (arXiv 2501.05442)."
_SHOWS = "shows your own clip at every ratio."


def _subject(shape: Mapping[str, Any]) -> str:
    """Return what was published, in words."""
    size = f"with {shape['parameters'] / 1e6:.1f} M parameters in {shape['dtype']}"
    if base := shape.get("base"):
        return f"Levels {size} for the {base} that they were grown on, which is not in this folder"
    return f"An {shape['class']} {size}" if shape.get("class") else f"A causal video tokenizer {size}"


def _loading(name: str, shape: Mapping[str, Any]) -> str:
    """Return the call that loads what was published."""
    if base := shape.get("base"):
        return f'AutoencoderKLProMAG.load_growth("{name}", "BASE")  # BASE: folder of that {base}'
    return f'{"load_tokenizer" if shape.get("class") else "AutoencoderKLProMAG.from_pretrained"}("{name}")'


Columns = Sequence[tuple[str, str, int]]
MEANINGS = {
    "cvvdp": "JOD is ColorVideoVDP's just-objectionable differences (10 is best)",
    "vmaf": "VMAF goes to 100",
    "frechet_frames": "Fréchet is the distance of frames under EfficientNet-Lite0 (0 is best)",
}


def _explain(columns: Columns) -> str:
    meanings = [MEANINGS[key] for key, _, _ in columns if key in MEANINGS]
    return f" {'; '.join(meanings)}." if meanings else ""


def _figures(ratios: Mapping[str, Mapping[str, Any]], columns: Columns) -> list[list[str]]:
    def cell(values: Mapping[str, Any], key: str, digits: int) -> str:
        return f"{values[key]:.{digits}f}" if key in values else "-"  # few clips have no terciles, small ones no MS-SSIM

    return [[f"{ratio}x", *(cell(values, key, digits) for key, _, digits in columns)] for ratio, values in ratios.items()]


def _lifts(ratios: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a paragraph about the latents that lift to lower ones; nothing where none does."""
    lifts = []
    for ratio, values in ratios.items():
        for low, lift in values["lift"].items():
            lifts.append(f"{low}x from {ratio}x: {lift['latent_error']:.2f} of its variance, {lift['psnr']:.2f} dB decoded")
    return [f"Latents estimated without pixels: {'; '.join(lifts)}.", ""] if lifts else []


def _controls(ratios: Mapping[str, Mapping[str, Any]], base: int) -> list[str]:
    """Return a paragraph about the lowest level on fewer frames, in the place of each higher one; nothing for one level."""
    found = []
    for ratio, values in ratios.items():
        if control := values.get("interpolated"):
            motion = values.get("interpolated_by_motion")  # small pictures have none
            also = f", {motion['psnr']:.2f} dB along their motion" if motion else ""
            found.append(f"one frame of {int(ratio) // base}, in the place of {ratio}x: {control['psnr']:.2f} dB{also}")
    return [f"Control, the {base}x level alone with the other frames interpolated: {'; '.join(found)}.", ""] if found else []


def _stages(recipe: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    return [
        [
            stage["name"],
            f"{stage['encoder']}, {stage['decoder']}",
            "; ".join([*clip_shapes(stage, ", "), *_others(stage["extra_sources"])]),
            str(stage["steps"]),
            str(stage["batch"]),
            f"{stage['learning_rate']:g}, {stage['muon_learning_rate'] or '-'}",
            stage["loss"],
            f"{stage['seconds'] / 60:.1f}",
            where(stage["machines"]),
        ]
        for stage in recipe
        if "published" not in stage
    ]


def clip_shapes(training: Mapping[str, Any], joint: str) -> list[str]:
    """Return in words the length and size of a training's clips, in each of its buckets."""
    height, width = sides(training["size"])
    one = {"frames": training["frames"], "height": height, "width": width}
    return [
        f"{bucket['frames']} frames{joint}{bucket['height']}x{bucket['width']}"
        + (f" ({bucket['batch_size']} a process)" if bucket.get("batch_size") else "")
        for bucket in training.get("buckets") or [one]
    ]


def _origin(recipe: Sequence[Mapping[str, Any]]) -> str:
    return "".join(f"The first stage starts from {stage['published']}. " for stage in recipe if "published" in stage)


def where(machines: Sequence[str]) -> str:
    """Return the machines of a training in words."""
    return ", then ".join(machines) or "not written down"


def _others(extra_sources: Mapping[str, float]) -> list[str]:
    """Return in words what share of the steps draws from other sources, which are named by their file."""
    names = {source: "generated clips" if source == "synthetic" else Path(source).name for source in extra_sources}
    return [f"{share:.0%} of the steps {names[source]}" for source, share in extra_sources.items()]


def count_sources(table: Path, split: str) -> list[dict[str, Any]]:
    """Count the clips of each source in a CSV with the columns split, source_repo, source_commit and licence.

    Raises UserError for a file that cannot be read, where a column is missing, and where no row is of the split.
    """
    rows = list(csv.DictReader(io.StringIO(load_text(table), newline="")))
    needed = {"split", "source_repo", "source_commit", "licence"}
    if not rows or (missing := needed - rows[0].keys()):
        raise UserError(f"{table}: columns {', '.join(sorted(missing if rows else needed))} are missing")
    keys = ((row["source_repo"], row["source_commit"], row["licence"]) for row in rows if row["split"] == split)
    counted = Counter(keys).most_common()
    if not counted:
        raise UserError(f"{table}: no row has the split {split}")
    return [{"repository": r, "commit": c, "licence": licence, "clips": n} for (r, c, licence), n in counted]
