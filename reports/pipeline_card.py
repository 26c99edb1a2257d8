"""The model card of a published pipeline that was trained on generated clips."""

from collections.abc import Mapping, Sequence
from typing import Any

from promag.data.synthetic import COLOURS, MOTIONS, SHAPES
from promag.evaluation.markdown import markdown_table
from promag.evaluation.prompt_accuracy import PARTS
from promag.evaluation.synthetic_scorer import chance
from promag.tokenizer.geometry import ratio_names

from .tokenizer_card import clip_shapes, where

# the columns of the table of trainings
RECIPE = (
    "ratios",
    "generated clips",
    "drawn more often",
    "steps",
    "batch",
    "AdamW, Muon",
    "shift",
    "distilled",
    "minutes",
    "on",
)


def trained_card(
    opening: str,
    records: Sequence[Mapping[str, Any]],
    recipe: Sequence[Mapping[str, Any]],
    licence: str | None = None,
) -> str:
    """Return the card of a pipeline or of adapters trained on generated clips: how they follow prompts and were trained.

    Args:
        opening: the card that tells what it is and how it is used, as `pipeline_card` and `lora_card` return it.
        records: the lines that `promag evaluate-pipeline` records for it.
        recipe: one mapping per training, with ratios, synthetic_clips, frames, size, buckets (None for the shape
            of these), caption_weights, steps, batch (samples a step, of all processes), learning_rate, muon_learning_rate,
            ema_decay, shift, few_steps (None but for a student), seconds and machines. The first may be
            {"published": folder}: the pipeline that the others start from.
        licence: identifier of the weights' licence; None states none.
    """
    first = records[0]
    guessing = ", ".join(f"{part} {100 * value:.0f} %" for part, value in chance().items() if part != "all")
    accuracy = [[f"{r['ratio']}x", _kind(r), *(_share(r["accuracy"][part]) for part in PARTS)] for r in records]
    trainings = [
        [
            ratio_names(t["ratios"]),
            f"{t['synthetic_clips']} of {'; '.join(clip_shapes(t, ' at '))}",
            ", ".join(f"{one['words']} x{one['factor']:g}" for one in t["caption_weights"]) or "-",
            str(t["steps"]),
            str(t["batch"]),
            f"{t['learning_rate']:g}, " + (f"{t['muon_learning_rate']:g}" if t["muon_learning_rate"] else "-"),
            f"{t['shift']:g}",
            _distilled(t.get("few_steps")),
            f"{t['seconds'] / 60:.1f}",
            where(t["machines"]),
        ]
        for t in recipe
        if "published" not in t
    ]
    origin = "".join(f"The first training starts from {t['published']}. " for t in recipe if "published" in t)
    sampled = [r for r in records if "right_by_motion" in r]
    motions = [
        [f"{r['ratio']}x", _kind(r), *(" of ".join(map(str, r["right_by_motion"].get(m, (0, 0)))) for m in MOTIONS)]
        for r in sampled
    ]
    heads = ["ratio", "combinations of shape, colour and motion", *(f"{part} right" for part in PARTS)]
    return "\n".join(
        [
            opening.replace("---\n", f"---\nlicense: {licence}\n" if licence else "---\n", 1),
            "## How well it follows prompts",
            "",
            "It knows generated clips alone: one or two objects on a panning background (`a red disc moves left`, `a blue plus "
            f"and a green square cross`). Shapes: {', '.join(SHAPES)}. Colours: {', '.join(COLOURS)}. Motions: "
            f"{', '.join(MOTIONS)}. A scorer reads them back from the video.",
            "",
            markdown_table(heads, accuracy),
            "",
            f"{first['prompts']} prompts of each kind, {first['steps']} steps, guidance {first['guidance']:g}; in brackets 95 "
            f"% intervals (Wilson). Unseen combinations were never trained on. Guessing: {guessing}. "
            f"Commit {first['commit']}, {first['machine']}, torch {first['versions']['torch']}.",
            "",
            "All right, of how many prompts, by motion:",
            "",
            markdown_table(["ratio", "combinations", *MOTIONS], motions),
            "",
            "## Recipe",
            "",
            markdown_table(RECIPE, trainings),
            "",
            f"{origin}Every training starts from the one above it. Weights are moving averages. Minutes by the clock.",
            "",
        ]
    )


def _distilled(few_steps: Mapping[str, Any] | None) -> str:
    """Return what a student took over from its teacher, in words."""
    if not few_steps:
        return "-"
    guided = f"guidance {few_steps['guidance']:g}" if few_steps["guidance"] > 1 else "no guidance"
    return f"{few_steps['teacher_steps']} steps, {guided}, to {few_steps['steps']}"


def _kind(record: Mapping[str, Any]) -> str:
    if "unseen" not in record:
        return "reconstructions of unseen clips"
    return "unseen" if record["unseen"] else "trained"


def _share(value: Sequence[float]) -> str:
    return "{:.0f}% ({:.0f}%-{:.0f}%)".format(*(100 * x for x in value))
