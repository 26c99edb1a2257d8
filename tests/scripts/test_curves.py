"""`promag curves` draws and compares the curves of trainings."""

import json

import pytest

from promag.scripts import curves
from promag.training.config import UserError


def test_curves_draws_the_logged_metrics(demo_run, tmp_path):
    stage, out = demo_run / "tokenizer-run" / "4x", tmp_path / "curve.svg"
    logged = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in logged if "loss" in record]
    curves.main(["plot", f"ours={stage}", "--keys", "loss", "--out", str(out)])
    assert f"ours: {losses[-1]:.3g} at 2" in out.read_text()  # below 1
    curves.main(["plot", f"ours={stage}", "--keys", "loss", "l1", "--out", str(out), "--mean-over", "2"])
    assert f"ours loss: {sum(losses) / 2:.3g} at 2" in out.read_text()
    assert "ours l1: " in out.read_text()
    for stages, keys, message in (
        ("ours", "loss", "ours: NAME=FOLDER is needed"),
        (f"ours={tmp_path}", "loss", r"has no metrics\.jsonl"),
        (f"ours={stage}", "lpips", "no metric 'lpips'; use one of clips, gradient_norm, "),
    ):
        with pytest.raises(UserError, match=message):
            curves.main(["plot", stages, "--keys", keys, "--out", str(out)])


def test_curves_finds_the_largest_difference(tmp_path, capsys):
    record, losses_of = tmp_path / "training.jsonl", {"one": [1.0, 0.5, 0.25], "two": [1.0, 0.5, 0.2501]}
    for name, losses in losses_of.items():
        (tmp_path / name / "16x").mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text(f"output_dir: {name}\nseed: 0\n")
        lines = [json.dumps({"step": i + 1, "loss": loss}) for i, loss in enumerate(losses)]
        (tmp_path / name / "16x" / "metrics.jsonl").write_text("\n".join(lines))
    stages = [f"{name}={tmp_path / name / '16x'}" for name in losses_of]
    curves.main(["diff", *stages, "--keys", "loss", "--record", str(record)])
    assert "loss: at most 0.0004 apart, relatively, over 3 logged steps" in capsys.readouterr().out
    line = json.loads(record.read_text())
    assert line["relative_difference"]["loss"] == pytest.approx(1e-4 / 0.2501)
    assert line["curves"]["loss"]["two"] == [[1, 1.0], [2, 0.5], [3, 0.2501]]
    with pytest.raises(UserError, match="there are two stages named one"):
        curves.main(["diff", stages[0], stages[0], "--keys", "loss"])
    (tmp_path / "two" / "16x" / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0}))
    with pytest.raises(UserError, match="curves of 3 and 1 points"):
        curves.main(["diff", *stages, "--keys", "loss"])
