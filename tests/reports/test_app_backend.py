"""What the page's buttons do, read from the HTML they give."""
# ruff: noqa: RUF001 (the page is set with ×)

import base64
import json
import re
from html import unescape

import numpy as np
import pytest

from promag.data.video import read_frames, write_video
from promag.evaluation.sampling_cost import Pace, SamplingCost
from promag.pipelines.sampling import Order, Seconds, make_videos
from promag.reports import app_html as page
from promag.reports.app_backend import Studio
from promag.reports.uploads import UploadLimits
from tests.data.test_video import drifting
from tests.tiny_pipeline import make_pipeline

LIMITS = UploadLimits(megabytes=1.0, seconds=4.0, frames=40, side=100)
SETTINGS = {"ratio": 4, "frames": 17, "steps": 2, "guidance": 2.0}


def silent(done, total):
    pass


@pytest.fixture(scope="module")
def studio():
    pipe = make_pipeline(height=32, width=32, num_frames=33)
    return Studio(pipe.vae, pipe, Pace(), LIMITS)


def played(html, folder):
    """Write the video of some HTML, and return the file."""
    data = re.search(r'src="data:video/mp4;base64,([^"]+)"', html)
    assert data
    (folder / "played.mp4").write_bytes(base64.b64decode(data[1]))
    return folder / "played.mp4"


def test_costs_show_tokens_and_what_is_measured(studio):
    fresh = Studio(studio.tokenizer, studio.pipe, Pace(), LIMITS)
    assert fresh.lengths == [17, 33]
    html = fresh.costs(16, 33, 2, 2.0)
    rows = re.findall(
        r"<tr( class=chosen)?><th scope=\"row\">(\d+)×</th><td>(\d+)</td><td>(\d+)(.*?)</td>.*?<td>([^<]*)</td></tr>", html
    )
    assert [(bool(chosen), *rest) for chosen, *rest in rows] == [
        (False, "4", "9", "144", "", "–"),
        (True, "16", "3", "48", " <small>3.0× fewer</small>", "–"),
    ]
    assert "No time was measured yet" in html
    fresh.pace.learn(SamplingCost(16, 33, 3, 48, 1e6), Seconds(0.0, 1e-9, 7.0), "2 steps at the start")
    html = fresh.costs(16, 33, 2, 2.0)
    assert "<td>7.0 s</td>" in html
    assert "expectations for this machine, from 2 steps at the start" in html


def test_a_sampled_video_is_the_pipelines(studio, tmp_path):
    told = []
    html = studio.sample("a <red> disc", "", **SETTINGS, seed=3, told=lambda *count: told.append(count))
    assert told == [(1, 2), (2, 2)]
    assert "a &lt;red&gt; disc" in html
    how = {"num_frames": 17, "temporal_ratio": 4, "num_inference_steps": 2, "guidance_scale": 2.0}
    ((expected, _),) = make_videos(studio.pipe, [Order("a <red> disc", 3)], **how)
    shown = read_frames(played(html, tmp_path), range(17))
    assert shown.shape == (17, 256, 256, 3)
    assert np.abs(shown[:, 4::8, 4::8].astype(int) - expected[0]).mean() < 12  # random colours after H.264
    assert "80 tokens" in html
    assert re.search(r"Measured: text [\d.]+ s, denoising [\d.]+ s, decoding [\d.]+ s, together", html)
    assert "from the last video" in studio.costs(4, 17, 2, 2.0)


def test_sampling_mistakes_are_messages(studio):
    for change, message in (
        ({"seed": None}, "seed None: 0 to"),
        ({"seed": -1}, "seed -1: 0 to"),
        ({"frames": 18}, "18 frames"),
    ):
        html = studio.sample("a", "", **{**SETTINGS, "seed": 0, **change}, told=silent)
        assert 'role="alert"' in html
        assert message in html


def test_a_comparison_plays_in_step_with_its_plot(studio, tmp_path):
    write_video(tmp_path / "clip.mp4", drifting(20, 40, 64), 10, crf=5)
    told = []
    html = studio.compare(str(tmp_path / "clip.mp4"), 32, told=lambda *count: told.append(count))
    assert told == [(20, 20)]
    assert "clip.mp4: 20 frames of 64x40 at 10 a second, worked on at 48x32" in html
    psnr = json.loads(unescape(re.search(r'data-psnr="([^"]*)"', html)[1]))  # pyright: ignore[reportOptionalSubscript]
    assert {name: len(values) for name, values in psnr.items()} == {"4×": 20, "8×": 20, "16×": 20}
    means = [-10 * np.log10(np.mean([10 ** (-x / 10) for x in values])) for values in psnr.values()]
    assert [float(x) for x in re.findall(r"<b>([\d.]+) dB</b>", html)] == pytest.approx(means, abs=0.02)
    assert html.count("<polyline") == 3
    shown = read_frames(played(html, tmp_path), range(20)).astype(float)
    assert shown.shape == (20, 5 * 32, 4 * 5 * 48 + 3 * 4, 3)
    original = shown[:, :, :240]
    error = np.square((original - shown[:, :, 244:484]) / 255).mean((1, 2, 3))
    assert np.abs(-10 * np.log10(error) - psnr["4×"]).mean() < 1  # after H.264


def test_an_image_of_a_video_has_no_plot(studio, tmp_path):
    write_video(tmp_path / "one.mp4", drifting(1, 40, 64), 10)
    html = studio.compare(str(tmp_path / "one.mp4"), 32, silent)
    assert "<polyline" not in html
    assert html.count("dB</b>") == 3


def test_uploads_beyond_the_limits_are_messages(studio, tmp_path):
    write_video(tmp_path / "long.mp4", drifting(41, 40, 64), 10)
    (tmp_path / "a<b>.txt").write_text("no video")
    for path, message in (
        (None, "no video was given"),
        (tmp_path / "long.mp4", "long.mp4: 4.0 s and 41 frames; at most 4 s and 40 frames are accepted"),
        (tmp_path / "a<b>.txt", "a&lt;b&gt;.txt: not an accepted kind of video"),
    ):
        html = studio.compare(path and str(path), 32, silent)
        assert html.startswith('<div class="promag error" role="alert">')
        assert message in html


def test_nothing_on_the_page_comes_from_elsewhere():
    assert "http" not in page.STYLE + page.SCRIPT + page.CONTROLS + page.NO_PIPELINE
