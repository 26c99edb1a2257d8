"""The actions of the page's buttons, read from the HTML that they return."""
# ruff: noqa: RUF001 (the page is set with ×)

import asyncio
import base64
import json
import re
from html import unescape

import numpy as np
import pytest

from promag.data.video import read_frames, write_video
from promag.evaluation.sampling_cost import Pace, SamplingCost
from promag.pipelines.sampling import SampleRequest, Seconds, make_videos
from promag.reports import page
from promag.reports.uploads import UploadLimits
from promag.reports.web_app import AppBackend, build_app, import_gradio
from tests.data.test_video import drifting
from tests.tiny_pipeline import make_pipeline

LIMITS = UploadLimits(megabytes=1.0, seconds=4.0, frames=40, side=100)
SETTINGS = {"ratio": 4, "frames": 17, "steps": 2, "guidance": 2.0}


def test_addresses_are_not_fetched():
    gr = import_gradio()
    for block in (gr.File(), gr.Textbox()):
        with pytest.raises(gr.Error, match=r"http://127\.0\.0\.1:9/a\.mp4: this page takes uploaded files, no addresses"):
            asyncio.run(block.async_move_resource_to_block_cache("http://127.0.0.1:9/a.mp4"))


def silent(done, total):
    pass


@pytest.fixture(scope="module")
def backend():
    pipe = make_pipeline(height=32, width=32, num_frames=33)
    return AppBackend(pipe.vae, pipe, Pace(), LIMITS)


def played(html, folder):
    """Write the video in a piece of HTML to a file and return its path."""
    data = re.search(r'(?:src="data:video/mp4;base64,|class="film-data" value=")([^"]+)"', html)
    assert data
    (folder / "played.mp4").write_bytes(base64.b64decode(data[1]))
    return folder / "played.mp4"


def player_data(html):
    return json.loads(unescape(re.search(r"data-player='([^']*)'", html)[1]))  # pyright: ignore[reportOptionalSubscript]


def test_costs_show_tokens_and_measured_figures(backend):
    fresh = AppBackend(backend.tokenizer, backend.pipe, Pace(), LIMITS)
    assert fresh.lengths == [17, 33]
    html = fresh.costs(16, 33, 2, 2.0)
    rows = re.findall(
        r"<tr( class=\"chosen\")?><th scope=\"row\">(\d+)×</th><td>(\d+)</td><td>(\d+)(.*?)</td>.*?<td>([^<]*)</td></tr>", html
    )
    assert [(bool(chosen), *rest) for chosen, *rest in rows] == [
        (False, "4", "9", "144", "", "–"),
        (True, "16", "3", "48", "<small>3.0× fewer</small>", "–"),
    ]
    assert "No time was measured yet" in html
    fresh.pace.learn(SamplingCost(16, 33, 3, 48, 1e6), Seconds(0.0, 1e-9, 7.0), "2 steps at the start")
    html = fresh.costs(16, 33, 2, 2.0)
    assert "<td>7.0 s</td>" in html
    assert "expectations for this machine, from 2 steps at the start" in html


def test_a_sampled_video_is_the_pipelines(backend, tmp_path):
    progress = []
    html = backend.sample("a <red> disc", "", **SETTINGS, seed=3, on_progress=lambda *count: progress.append(count))
    assert progress == [(1, 2), (2, 2)]
    assert "a &lt;red&gt; disc" in html
    options = {"num_frames": 17, "temporal_ratio": 4, "num_inference_steps": 2, "guidance_scale": 2.0}
    ((expected, _),) = make_videos(backend.pipe, [SampleRequest("a <red> disc", 3)], **options)
    shown = read_frames(played(html, tmp_path), range(17))
    assert shown.shape == (17, 256, 256, 3)
    assert np.abs(shown[:, 4::8, 4::8].astype(int) - expected[0]).mean() < 12  # random colours after H.264
    assert "80 tokens" in html
    assert re.search(r"Measured: text [\d.]+ s, denoising [\d.]+ s, decoding [\d.]+ s, together", html)
    assert "from the last video" in backend.costs(4, 17, 2, 2.0)


def test_sampling_mistakes_are_messages(backend):
    for change, message in (
        ({"seed": None}, "seed None: 0 to"),
        ({"seed": -1}, "seed -1: 0 to"),
        ({"frames": 18}, "18 frames"),
    ):
        html = backend.sample("a", "", **{**SETTINGS, "seed": 0, **change}, on_progress=silent)
        assert 'role="alert"' in html
        assert message in html


def test_a_comparison_plays_in_sync_with_its_plot(backend, tmp_path):
    write_video(tmp_path / "clip.mp4", drifting(20, 40, 64), 10, crf=5)
    progress = []
    html = backend.compare(str(tmp_path / "clip.mp4"), 32, on_progress=lambda *count: progress.append(count))
    assert progress == [(20, 20)]
    player = player_data(html)
    (clip,) = player["clips"]
    assert clip["name"] == "clip.mp4"
    assert clip["caption"] == "20 frames of 64x40 at 10 a second, processed at 48x32"
    psnr = clip["per_frame"]
    assert {name: len(values) for name, values in psnr.items()} == {"4×": 20, "8×": 20, "16×": 20}
    means = {name: -10 * np.log10(np.mean([10 ** (-x / 10) for x in values])) for name, values in psnr.items()}
    assert clip["psnr"] == pytest.approx(means, abs=0.02)
    assert player["layout"] == {"height": 32, "width": 48, "scale": 5, "columns": 4, "gap": 4}
    assert re.findall(r'<figure class="tile" data-label="([^"]*)"', html) == ["original", "4×", "8×", "16×"]
    assert len(re.findall(r"<span>[\d.]+ frames/s</span>", html)) == 3
    shown = read_frames(played(html, tmp_path), range(20)).astype(float)
    assert shown.shape == (20, 5 * 32, 4 * 5 * 48 + 3 * 4, 3)
    original = shown[:, :, :240]
    error = np.square((original - shown[:, :, 244:484]) / 255).mean((1, 2, 3))
    assert np.abs(-10 * np.log10(error) - psnr["4×"]).mean() < 1  # after H.264


def test_a_video_of_one_frame_is_compared(backend, tmp_path):
    write_video(tmp_path / "one.mp4", drifting(1, 40, 64), 10)
    (clip,) = player_data(backend.compare(str(tmp_path / "one.mp4"), 32, silent))["clips"]
    assert clip["caption"] == "1 frame of 64x40 at 10 a second, processed at 48x32"
    assert clip["psnr"] == pytest.approx({name: value for name, (value,) in clip["per_frame"].items()}, abs=0.01)


def test_uploads_beyond_the_limits_are_messages(backend, tmp_path):
    write_video(tmp_path / "long.mp4", drifting(41, 40, 64), 10)
    (tmp_path / "a<b>.txt").write_text("no video")
    for path, message in (
        (None, "no video was given"),
        (tmp_path / "long.mp4", "long.mp4: 4.0 s and 41 frames; at most 4 s and 40 frames are accepted"),
        (tmp_path / "a<b>.txt", "a&lt;b&gt;.txt: cannot be read as a video"),
    ):
        html = backend.compare(path and str(path), 32, silent)
        assert html.startswith('<div class="promag error" role="alert">')
        assert message in html


def test_nothing_on_the_page_comes_from_elsewhere(backend):
    _, options = build_app(backend)
    templates = "".join(page.asset(name) for name in ("app.html", "parts.html"))
    assert not re.search(r"https?:|@import|url\(", templates + options["head"])
