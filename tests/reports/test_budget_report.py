"""The page of token budgets, in a real browser if one is installed."""

import base64
import json
import re
from dataclasses import replace
from html import unescape

import numpy as np
import pytest
import torch

from promag.data.datasets import SyntheticDataset
from promag.data.video import read_frames
from promag.evaluation.adaptive_budget import adaptive_figures
from promag.evaluation.budgets import ORIGINAL, compare_reconstructions, own_budgets
from promag.reports.budget_report import COLUMNS, BudgetReport, generation_lines, reconstruction_lines, write_budget_page
from promag.reports.side_by_side import GAP, enlargement
from promag.tokenizer.autoencoder import AutoencoderKLProMAG
from tests.browser import console_errors, until
from tests.conftest import TINY

FRAMES, SIZE = 17, 32


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A comparison on three generated clips; the tokenizer reconstructs block means, at 4x for every frame."""
    torch.manual_seed(0)
    tokenizer = AutoencoderKLProMAG(**TINY).eval()
    tokenizer.init_from_block_means()
    tokenizer.grow()
    tokenizer.grow()
    clips = SyntheticDataset("eval", 3, FRAMES, SIZE)
    budgets = own_budgets(tokenizer)
    results, facts = compare_reconstructions(budgets, clips, tmp_path_factory.mktemp("videos"))
    figures = {b.name: {**b.facts(FRAMES, SIZE, SIZE), "reconstruction": results[b.name]} for b in budgets}
    adaptive = adaptive_figures(budgets, results, facts, clips, (FRAMES, SIZE, SIZE), 17, 15.0)
    curves = {"Training step, s": {name: [(17, 1.0, True), (33, 2.0, False)] for name in figures}}
    return BudgetReport("</title><script>alert(1)</script>", figures, list(figures), facts, adaptive, curves)


@pytest.fixture(scope="module")
def page(report, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    assert write_budget_page(path, report) == 3
    return path


def player_data(text):
    return json.loads(unescape(re.search(r"data-player='([^']*)'", text)[1]))


def test_the_page_is_one_offline_file_with_the_worst_clips_first(page, report):
    text = page.read_text()
    assert "<script>alert(1)" not in text
    assert not re.search(r"""(src|href)=["']?(?!data:)[\w./]+""", text.split("<script")[0])
    assert "default-src 'none'" in text
    shown = player_data(text)["clips"]
    last = [clip["psnr"]["16x"] for clip in shown]
    assert last == sorted(last)
    assert {clip["name"] for clip in shown} == {clip.name for clip in report.clips}


def test_the_films_show_the_measured_videos(page, report, tmp_path):
    """The figures beside a film follow from its tiles, except for the film's compression."""
    text = page.read_text()
    shown = player_data(text)["clips"]
    film = tmp_path / "film.mp4"
    film.write_bytes(base64.b64decode(re.search(r'class="film-data" value="([^"]*)"', text)[1]))
    pixels = read_frames(film, range(FRAMES)).astype(float)
    side = SIZE * enlargement(SIZE)
    tiles = [pixels[:, :side, i * (side + GAP) : i * (side + GAP) + side] for i in range(COLUMNS)]
    for name, tile in zip(("4x", "8x", "16x"), tiles[1:], strict=True):
        measured = -10 * np.log10(np.square((tile - tiles[0]) / 255).mean())
        assert measured == pytest.approx(shown[0]["psnr"][name], abs=0.3)


def test_fewer_clips_are_shown_where_the_page_would_grow_too_large(report, tmp_path, monkeypatch):
    size = write_size(report, tmp_path)
    monkeypatch.setattr("promag.reports.budget_report.LIMIT", size - 1000)
    assert write_budget_page(tmp_path / "small.html", report) == 2
    text = (tmp_path / "small.html").read_text()
    assert "The 2 worst of 3 clips are shown" in text
    assert len(text.encode()) < size - 1000


def test_tokens_are_compared_at_one_patch_size(report, tmp_path):
    """Here a latent at 16x has as many values as one at 8x, as two latents a position give."""
    budgets = {name: {**budget, "latent_values": 1} for name, budget in report.budgets.items()}
    path = tmp_path / "page.html"
    write_budget_page(path, replace(report, budgets=budgets))
    assert "Tokens are of patches of 1x2x2. 16x has 2.5 times fewer tokens than 4x" in path.read_text()
    budgets["8x"] |= {"tokens": {"1x1x1": 48, "1x2x2": None}}
    write_budget_page(path, replace(report, budgets=budgets))
    text = path.read_text()
    assert "Tokens are of patches of 1x1x1. 16x has 2.5 times fewer" in text
    for label in ("4x \u00b7 80 tokens", "8x \u00b7 48 tokens", "16x \u00b7 32 tokens", "tokens of a clip, patch 1x1x1"):
        assert label in text


def test_a_metric_without_a_value_is_named_with_the_reason(report):
    def labels(*weights):
        (lines,) = reconstruction_lines(report.budgets, weights).values()
        return [line.label for line in lines if line.label.startswith(("LPIPS", "FVD"))]

    assert labels() == ["LPIPS (no weights given)", "FVD (no weights given)"]
    assert labels("fvd") == ["LPIPS (no weights given)", "FVD (needs at least 2 videos)"]  # as of one clip
    row = {"steps": 1, "guidance": 1.0, "sampling_seconds": 1.0, "fvd": None, "clip_similarity": 0.2}
    row["accuracy"] = dict.fromkeys(("colour", "motion", "shape", "all"), (0.5, 0.1, 0.9))
    (lines,) = generation_lines({"one": row}, ["fvd", "clip_similarity"]).values()
    assert [line.label for line in lines][-3:-1] == ["CLIP similarity", "FVD (needs at least 2 videos)"]


def write_size(report, folder):
    write_budget_page(folder / "whole.html", report)
    return (folder / "whole.html").stat().st_size


# -- in a browser ----------------------------------------------------------------------------------------------------


PICTURE = """[...document.querySelectorAll('canvas')[arguments[0]].getContext('2d').getImageData(0, 0, 32, 32).data]"""


def picture(browser, tile):
    return np.array(browser.execute_script(f"return {PICTURE}", tile)).reshape(SIZE, SIZE, 4)[..., :3]


VIEWER = "document.querySelector('.viewer').viewer"


@pytest.fixture
def opened(browser, page):
    browser.get(page.as_uri())
    until(browser, f"{VIEWER}.film.readyState >= 2")
    return browser


def press(browser, name):
    browser.find_element("css selector", f".viewer .{name}").click()


def go_to(browser, frame):
    """Seek, and wait until the player, whose listener precedes this one, has drawn the frame in every tile."""
    browser.execute_script(f"""
        window.drawn = false;
        const film = {VIEWER}.film;
        film.addEventListener("seeked", () => {{ window.drawn = !film.seeking; }});
        {VIEWER}.seek({frame});
    """)
    until(browser, f"window.drawn && {VIEWER}.film.paused")
    until(browser, f"document.querySelector('.where').textContent.startsWith('frame {frame + 1} of')")


def test_it_plays_and_pauses(opened):
    until(opened, f"{VIEWER}.film.currentTime > 0 && !{VIEWER}.film.paused")
    until(opened, "document.querySelector('.viewer .play').textContent === 'Pause'")
    press(opened, "play")
    until(opened, f"{VIEWER}.film.paused && document.querySelector('.play').textContent === 'Play'")
    assert console_errors(opened) == []


def test_scrubbing_shows_the_exact_frame_in_every_tile(opened, report):
    index = opened.execute_script(f"return {VIEWER}.clips[{VIEWER}.shown.clip].name")
    clip = next(clip for clip in report.clips if clip.name == index)
    names = [ORIGINAL, *report.budgets]
    for frame in (0, 11, 16, 5):
        go_to(opened, frame)
        for tile, name in enumerate(names):
            wanted = np.load(clip.videos[name]).astype(float)
            errors = [np.abs(picture(opened, tile) - other).mean() for other in wanted]
            assert errors[frame] < 6
            if tile == 0:  # reconstructions of random weights may look alike from frame to frame
                assert int(np.argmin(errors)) == frame
    assert console_errors(opened) == []


def test_stepping_by_keys_and_by_buttons(opened):
    from selenium.webdriver.common.keys import Keys

    go_to(opened, 3)
    press(opened, "forward")
    until(opened, f"{VIEWER}.shown.frame === 4")
    opened.find_element("tag name", "body").send_keys(Keys.ARROW_LEFT)
    until(opened, f"{VIEWER}.shown.frame === 3")
    opened.find_element("tag name", "body").send_keys("n")
    until(opened, "document.querySelectorAll('.clips tbody tr')[1].classList.contains('chosen')")
    assert console_errors(opened) == []


def test_the_error_map_is_dark_where_nothing_is_wrong(opened):
    go_to(opened, 8)
    plain = [picture(opened, tile) for tile in range(4)]
    press(opened, "error")
    assert opened.find_element("class name", "heat").is_displayed()
    assert np.array_equal(picture(opened, 0), plain[0])
    for tile in (1, 2, 3):
        error = np.abs(plain[tile] - plain[0]).mean(2)
        brightness = picture(opened, tile).sum(2)
        assert np.corrcoef(np.minimum(error * 4, 255).ravel(), brightness.ravel())[0, 1] > 0.9
    press(opened, "original")
    assert picture(opened, 2).max() <= 4  # the original against itself
    press(opened, "original")
    press(opened, "error")
    assert np.array_equal(picture(opened, 1), plain[1])
    assert console_errors(opened) == []


def test_zoom_is_one_for_all_tiles(opened):
    press(opened, "zoom-in")
    press(opened, "zoom-in")
    shapes = opened.execute_script("return [...document.querySelectorAll('canvas')].map(c => getComputedStyle(c).transform)")
    assert len(set(shapes)) == 1
    assert shapes[0].startswith("matrix(2.25")
    press(opened, "zoom-reset")
    assert opened.execute_script("return getComputedStyle(document.querySelector('canvas')).transform").startswith("matrix(1,")


def test_a_heading_sorts(opened):
    read = "[...document.querySelectorAll('.clips tbody tr')].map(row => Number(row.cells[2].dataset.value))"
    head = opened.find_elements("css selector", ".clips thead th")[2]
    head.find_element("tag name", "button").click()
    motion = opened.execute_script(f"return {read}")
    assert motion == sorted(motion)
    assert head.get_attribute("aria-sort") == "ascending"
    head.find_element("tag name", "button").click()
    assert opened.execute_script(f"return {read}") == sorted(motion, reverse=True)


def test_clips_sort_by_number_and_losses_are_positive(opened):
    names = "[...document.querySelectorAll('.clips tbody tr')].map(row => row.cells[1].textContent.trim())"
    opened.execute_script(
        "document.querySelectorAll('.clips tbody tr').forEach((row, i) => {"
        "row.cells[1].textContent = row.cells[1].dataset.value = ['10 b', '2 a', '0 c'][i]; })"
    )
    opened.find_elements("css selector", ".clips thead th")[1].find_element("tag name", "button").click()
    assert opened.execute_script(f"return {names}") == ["0 c", "2 a", "10 b"]
    lost = opened.execute_script(
        "const heads = [...document.querySelectorAll('.clips thead th')].map(head => head.textContent.trim());"
        "const column = heads.findIndex(text => text.startsWith('lost by 16x (dB)'));"
        "return [...document.querySelectorAll('.clips tbody tr')].map(row => Number(row.cells[column].dataset.value))"
    )
    assert len(lost) == 3
    assert min(lost) > 0


@pytest.mark.parametrize("by", ["clip", "segment"])
def test_the_slider_shows_the_computed_figures(opened, report, by):
    opened.execute_script(f"document.querySelector('[name=by][value={by}]').click()")
    for row in report.adaptive[f"sweep_by_{by}"]:
        opened.execute_script(
            f"const aim = document.querySelector('.aim'); aim.min = 0; aim.value = {row['target']};"
            "document.querySelector('.target').update()"
        )
        outcome = opened.find_element("class name", "outcome").text
        assert outcome.startswith(", ".join(f"{count} at {name}" for name, count in row["parts"].items()))
        compared = f"{abs(100 * row['saved']):.1f} % {'more' if row['saved'] < 0 else 'fewer'} than {row['fixed']} everywhere"
        fixed = f"({row['fixed_tokens']:,} tokens, worst case {row['fixed_worst']:.2f} dB)"
        assert f"{row['tokens']:,} tokens, {compared} {fixed}. Worst case {row['worst']:.2f} dB" in outcome


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling_in_either_scheme(opened, scheme):
    feature = [{"name": "prefers-color-scheme", "value": scheme}]
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": feature})
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        until(opened, f"document.documentElement.clientWidth === 390 && matchMedia('(prefers-color-scheme: {scheme})').matches")
        assert opened.execute_script("return document.documentElement.scrollWidth") <= 390
        tops = opened.execute_script("return [...document.querySelectorAll('.tile')].map(t => t.getBoundingClientRect().top)")
        assert len(set(tops)) == 2  # four tiles in two rows
        colour = opened.execute_script("return getComputedStyle(document.body).backgroundColor")
        brightness = sum(map(int, re.findall(r"\d+", colour)[:3]))
        assert brightness < 150 if scheme == "dark" else brightness > 600
    finally:
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert console_errors(opened) == []
