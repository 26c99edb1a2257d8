import json
import re
import xml.etree.ElementTree as ElementTree

import pytest

from promag.evaluation.growth_ablation import OURS, WIDE, curves, gains, read, table
from promag.reports.plots import plot_file
from promag.training.config import UserError


def row(variant, seed, psnr, flops, inherited=0.0, ratio=16, what="growth ablation", size=64):
    """Return a line with 100 steps in its stage, and 200 in all if it inherits; its curve rises to `psnr`."""
    before = 100 if inherited else 0
    metrics = {"psnr": psnr, "psnr_top_motion": psnr - 2, "psnr_key": psnr + 1, "psnr_between": psnr - 1, "ssim": psnr / 40}
    return {
        **{"what": what, "variant": variant, "seed": seed, "ratio": ratio, "frames": 65, "size": size, **metrics},
        **{"steps": before + 100, "flops": flops, "stage": {"steps": 100, "flops": flops - inherited}},
        **{"inherited": {"flops": inherited}, "curve": [[before + 50, 1.0, psnr - 1], [before + 100, 2.0, psnr]]},
    }


ROWS = [
    row("progressive", 0, 25.0, 3e15, inherited=1e15),
    row("progressive", 1, 26.0, 3e15, inherited=1e15),
    row("direct", 0, 24.5, 6e15),
    row("direct", 1, 24.5, 6e15),
    row("plain", 1, 22.0, 4e15),
    row("base", 0, 27.0, 1e15, ratio=4),
]


def test_gains_are_taken_on_the_seeds_that_both_have():
    lines = [re.split(r"\s*\|\s*", line.strip("| ")) for line in gains(ROWS).splitlines()]
    assert lines[0] == [
        "progressive minus", "clips", "seeds", "psnr dB", "psnr_top_motion dB", "psnr_key dB", "psnr_between dB", "ssim",
        "compute",
    ]  # fmt: skip
    assert lines[2:] == [
        ["direct", "65x64x64", "0, 1", *["+1.000 (+0.50, +1.50)"] * 4, "+0.025 (+0.01, +0.04)", "0.50x"],
        ["plain", "65x64x64", "1", "+4.000", "+4.000", "+4.000", "+4.000", "+0.100", "0.75x"],
    ]


def test_differences_of_paired_clips_have_standard_errors():
    clips = [{"psnr": 20.0 + i, "psnr_key": 21.0 + i, "motion": float(i)} for i in range(6)]
    better = [{**clip, "psnr": clip["psnr"] + gain} for clip, gain in zip(clips, (0, 0, 0, 0, 1, 3), strict=True)]
    rows = [{**row("progressive", 0, 25.0, 3e15), "per_clip": better}, {**row("direct", 0, 24.5, 6e15), "per_clip": clips}]
    cells = [cell.strip() for cell in gains(rows).splitlines()[-1].split("|")][4:8]
    assert cells == ["+0.500 ± 0.49", "+0.500 ± 1", "+0.500 ± 0", "+0.500"]  # top motion: gains of 1 and 3


def test_variants_with_a_wider_latent_are_compared_with_each_other():
    wide = [row("progressive_16_channels", 1, 28.0, 3e15), row("direct_16_channels", 1, 27.5, 6e15)]
    names = [
        [line.split("|")[1].strip() for line in gains([*ROWS, *wide], ours).splitlines()[2:]] for ours in (OURS, OURS + WIDE)
    ]
    assert names == [["direct", "plain", "progressive_16_channels"], ["direct_16_channels"]]
    assert "| +0.500 |" in gains([*ROWS, *wide], OURS + WIDE)


def test_curves_count_compute_with_and_without_the_inherited_part():
    drawn = {name: lines for name, (lines, _) in curves(ROWS).items()}
    assert drawn["65x64x64-steps"]["progressive"] == [(150, 24.0), (200, 25.0)]
    assert drawn["65x64x64-compute"]["progressive"] == [(2.0, 24.0), (3.0, 25.0)]
    assert drawn["65x64x64-compute-grown"]["progressive"] == [(1.0, 24.0), (2.0, 25.0)]
    assert drawn["65x64x64-compute"]["direct"] == drawn["65x64x64-compute-grown"]["direct"] == [(3.0, 23.5), (6.0, 24.5)]
    assert set(drawn["65x64x64-steps"]) == {"progressive", "direct", "plain"}
    assert curves(ROWS[-1:]) == {}


def test_the_newest_line_counts_and_other_lines_do_not(tmp_path):
    path = tmp_path / "growth_ablation.jsonl"
    lines = [*ROWS, row("direct", 0, 24.0, 6e15), row("direct", 0, 99.0, 1.0, what="cost")]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = read(path)
    assert [(r["variant"], r["seed"]) for r in rows] == [(r["variant"], r["seed"]) for r in ROWS]
    assert rows[2]["psnr"] == 24.0
    assert "| direct | 16x | 65x64x64 | 0, 1 | 24.25 |" in table(rows)
    with pytest.raises(UserError, match="no such file"):
        read(tmp_path / "none.jsonl")
    path.write_text(json.dumps(lines[-1]) + "\n")
    with pytest.raises(UserError, match="none of its 1 lines"):
        read(path)


def test_older_lines_of_the_experiment_are_read(tmp_path):
    path, old = tmp_path / "claim.jsonl", row("direct", 0, 24.0, 6e15, what="claim")
    old["arm"] = old.pop("variant")
    path.write_text("".join(json.dumps(line) + "\n" for line in (old, row("direct", 1, 25.0, 6e15))))
    assert "| direct | 16x | 65x64x64 | 0, 1 | 24.50 |" in table(read(path))
    path.write_text("".join(json.dumps(line) + "\n" for line in (old, row("direct", 0, 25.0, 6e15))))
    assert "| direct | 16x | 65x64x64 | 0 | 25.00 |" in table(read(path))


def test_sizes_of_clips_are_kept_apart(tmp_path):
    larger = [row("progressive", 0, 20.0, 9e15, inherited=1e15, size=128), row("direct", 0, 20.5, 18e15, size=128)]
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [*ROWS, *larger]))
    rows = read(path)
    assert len(rows) == len(ROWS) + 2
    assert "| direct | 16x | 65x64x64 | 0, 1 | 24.50 |" in table(rows)
    assert "| direct | 16x | 65x128x128 | 0 | 20.50 |" in table(rows)
    compared = [re.split(r"\s*\|\s*", line.strip("| "))[:4] for line in gains(rows).splitlines()[2:]]
    assert compared == [
        ["direct", "65x64x64", "0, 1", "+1.000 (+0.50, +1.50)"],
        ["plain", "65x64x64", "1", "+4.000"],
        ["direct", "65x128x128", "0", "-0.500"],
    ]
    drawn = {name: lines for name, (lines, _) in curves(rows).items()}
    assert drawn["65x64x64-steps"] == curves(ROWS)["65x64x64-steps"][0]
    assert drawn["65x128x128-compute"] == {"progressive": [(5.0, 19.0), (9.0, 20.0)], "direct": [(9.0, 19.5), (18.0, 20.5)]}


def test_a_plot_file_stands_alone():
    lines = {"a < b": [(0.0, 1.0), (10.0, 3.0)], "second": [(0.0, 2.0), (0.375, 2.5)], "third": [(4321.0, 7.0)]}
    root = ElementTree.fromstring(plot_file(lines, "steps", "PSNR, dB"))
    tag = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{tag}svg"
    assert len(root.findall(f"{tag}polyline")) == 3
    texts = [text.text for text in root.iter(f"{tag}text")]
    assert {"steps", "PSNR, dB", "a < b: 3.00 at 10", "second: 2.50 at 0.375", "third: 7.00 at 4,321"} <= set(texts)
    bottom = float(root.attrib["viewBox"].split()[3])
    assert max(float(text.attrib["y"]) for text in root.iter(f"{tag}text") if "y" in text.attrib) < bottom
    used = set(re.findall(r"var\(--(\w+)\)", ElementTree.tostring(root, "unicode")))
    assert all(f"--{name}:" in root.findtext(f"{tag}style", "") for name in used)
