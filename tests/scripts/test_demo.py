import json
import os
import shutil

import pytest

from promag.demo.config import DemoConfig
from promag.demo.figures import sample_shipped
from promag.pipelines.sampling import load_pipeline, sample_videos
from promag.scripts.demo import index_videos, main
from promag.training.command_line import parse_config
from promag.training.config import UserError
from tests.scripts.conftest import DEMO, SMALLEST
from tests.tiny_pipeline import make_pipeline


def test_the_demo_writes_a_report_figures_and_videos(demo_run):
    page = (demo_run / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    figures = json.loads((demo_run / "report.json").read_text())
    rows = {row["ratio"]: row for row in figures["rows"]}
    assert [rows[r]["latent_frames"] for r in (4, 8, 16)] == [5, 3, 2]
    assert [rows[r]["tokens"] for r in (4, 8, 16)] == [20, 12, 8]
    assert all(5 < rows[r]["psnr"] < 60 for r in (4, 8, 16))
    for name in ("train_step_seconds", "denoising_seconds", "sampling_seconds"):
        assert rows[4][name] > 0
        assert rows[16][name] > 0
    assert rows[8]["train_step_seconds"] is None
    assert set(rows[16]["accuracy"]) == {"colour", "motion"}
    assert len(list((demo_run / "videos").glob("sample-*.mp4"))) == 2
    recorded = json.loads((demo_run / "results.jsonl").read_text())
    assert recorded["rows"] == figures["rows"]
    assert {"commit", "machine", "versions"} <= recorded.keys()
    assert recorded["seed"] == 0
    assert recorded["seconds"] > 0
    assert recorded["config"]["diffusion"]["steps"] == 2
    assert page.index("Samples of the trained pipeline") < page.index("<h2>Reconstructions")
    assert [clip["columns"] for clip in figures["shipped"]] == [["16×"], ["16×"]]  # noqa: RUF001
    assert all((demo_run / clip["video"]).stat().st_size > 0 for clip in figures["shipped"])
    assert [clip["columns"] for clip in figures["shipped_reconstructions"]] == [["original", "4×", "8×", "16×"]] * 2  # noqa: RUF001


def test_the_shipped_pipeline_is_sampled_as_it_states(tmp_path):
    make_pipeline(height=32, width=32, num_inference_steps=3, guidance_scale=1.0).save_pretrained(tmp_path)
    config = parse_config(DemoConfig, [*DEMO, "--shipped", str(tmp_path), "--precision", "fp32"], "")
    samples, _ = sample_shipped(config)
    prompts = [sample.prompt for sample in samples]
    pipe = load_pipeline(tmp_path)
    for sample, video in zip(samples, sample_videos(pipe, prompts, 3, 1.0, "fp32", name=None), strict=True):
        assert (sample.by_ratio[16] == video).all()


def test_where_the_shipped_pipeline_is_absent_the_log_and_the_page_state_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [
        "--config",
        "demo",
        *SMALLEST,
        "--output-dir",
        "run",
        "--shipped",
        "checkpoints/tiny-video",
        "--run.stop-after",
        "1",
    ]
    assert main(words) == 0
    absent = (
        "checkpoints/tiny-video is not in this folder; a checkout of the project has it, and --shipped FOLDER names another"
    )
    assert f"first samples are left out: {absent}\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "report.json").read_text())["facts"] == {"Samples of the trained pipeline": absent}
    assert absent in (tmp_path / "run" / "report.html").read_text()
    with pytest.raises(UserError, match=r"pipeline nowhere: no model_index\.json there"):
        main(["--config", "demo", *SMALLEST, "--output-dir", "other", "--shipped", "nowhere"])


def test_a_second_call_reuses_trained_models_and_logs_it(demo_run, tmp_path, capsys):
    run = shutil.copytree(demo_run, tmp_path / "run")  # the call writes its report anew, and other tests read the first one
    weights = run / "video" / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors"
    before = weights.stat().st_mtime_ns
    assert main([*DEMO, "--output-dir", str(run)]) == 0
    output = capsys.readouterr().out
    assert "4x: already trained" in output
    assert "continues at step 2 of 2" in output
    assert weights.stat().st_mtime_ns == before
    assert f"report: {run / 'report.html'}" in output


def test_real_videos_train_without_a_scorer(video_folder, tmp_path):
    assert main([*DEMO, "--output-dir", str(tmp_path), "--videos", str(video_folder)]) == 0
    figures = json.loads((tmp_path / "report.json").read_text())
    assert figures["chance"] is None
    assert figures["rows"][0]["accuracy"] is None
    assert "real videos have no scorer" in (tmp_path / "report.html").read_text()
    held = (tmp_path / "clips" / "eval.jsonl").read_text().splitlines()
    trained = (tmp_path / "clips" / "train.jsonl").read_text().splitlines()
    assert (len(held), len(trained)) == (1, 3)
    assert not {json.loads(x)["sha256"] for x in held} & {json.loads(x)["sha256"] for x in trained}


def test_indices_of_other_settings_are_refused(video_folder, tmp_path):
    def index(videos, *change):
        return index_videos(
            parse_config(DemoConfig, [*DEMO, "--output-dir", str(tmp_path), "--videos", str(videos), *change], "")
        )

    first = index(video_folder)
    assert (
        index(os.path.relpath(video_folder))
        == first
        == (str(tmp_path / "clips/train.jsonl"), str(tmp_path / "clips/eval.jsonl"))
    )
    message = rf"videos is '{video_folder}' there, '{tmp_path}' now\), .* use another --output-dir, or delete {tmp_path}$"
    with pytest.raises(UserError, match=message):
        index(tmp_path)
    for option, value, there in (("frames", "33", 17), ("validation_fraction", "0.5", 0.1)):
        with pytest.raises(UserError, match=rf"\({option} is {there} there, {value} now\)"):
            index(video_folder, f"--{option}", value)
    (tmp_path / "clips" / "settings.json").unlink()  # as an earlier version left them
    with pytest.raises(UserError, match="an earlier version indexed them and did not record from which videos"):
        index(video_folder)


def test_mistakes_are_named(video_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no such file or folder"):
        main([*DEMO, "--output-dir", str(tmp_path / "a"), "--videos", str(tmp_path / "none")])
    with pytest.raises(UserError, match="holds no video"):
        main([*DEMO, "--output-dir", str(tmp_path / "a"), "--videos", str(tmp_path / "empty")])
    with pytest.raises(UserError, match="0 of 4 have 33 frames; at least 2 are needed"):
        main([*DEMO, "--output-dir", str(tmp_path / "a"), "--videos", str(video_folder), "--frames", "33"])
    with pytest.raises(UserError, match=r"ratios \(4, 5\): choose among the stages' 4, 8, 16"):
        main([*DEMO, "--output-dir", str(tmp_path / "a"), "--ratios", "[4, 5]"])
    with pytest.raises(UserError, match=r"20 frames: 16x needs 1 \+ 16k; use 17 or 33"):
        main([*DEMO, "--output-dir", str(tmp_path / "a"), "--frames", "20"])
