"""The page from end to end in a headless Chromium, with a tiny tokenizer and pipeline of random weights."""
# ruff: noqa: RUF001 (the page is set with ×)

import re
import socket

import pytest

from promag.data.video import write_video
from promag.evaluation.sampling_cost import Pace, measure_pace
from promag.reports.uploads import UploadLimits
from promag.reports.web_app import AppBackend, build_app
from promag.scripts import app
from promag.tokenizer.tiny_decoder import TinyDecoder
from promag.training.config import UserError
from tests.browser import console_errors, until
from tests.data.test_video import drifting
from tests.tiny_pipeline import make_pipeline

LIMITS = UploadLimits(megabytes=0.2, seconds=2.0, frames=40, side=100)


@pytest.fixture(scope="module")
def asked_hosts():
    """Names and addresses that this process looks up while the page is served."""
    hosts, look_up = set(), socket.getaddrinfo

    def recorded(host, *rest, **more):
        hosts.add(str(host))
        return look_up(host, *rest, **more)

    socket.getaddrinfo = recorded
    yield hosts
    socket.getaddrinfo = look_up


def served(backend):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    blocks, options = build_app(backend)
    _, address, _ = blocks.launch(server_name="127.0.0.1", server_port=port, **options)
    return blocks, address


@pytest.fixture(scope="module")
def address(asked_hosts):
    pipe = make_pipeline(height=32, width=32, num_frames=33)
    blocks, address = served(AppBackend(pipe.vae, pipe, measure_pace(pipe, "fp32", lambda line: None), LIMITS))
    yield address
    blocks.close()


@pytest.fixture
def page(browser, address):
    browser.get(address)
    return browser


def wait(browser, selector, text=""):
    """Wait for the first element of a CSS selector that contains `text` and return it."""
    parts = "[...document.querySelectorAll(arguments[0])]"
    return until(browser, f"{parts}.find(part => part.textContent.includes(arguments[1]))", selector, text)


def text_of(browser, selector, text):
    """Wait until the first element of a CSS selector that contains `text` shows it, and return its visible text."""
    return until(browser, lambda driver: text in (shown := wait(driver, selector, text).text) and shown)


def click(browser, selector, text=""):
    """Wait until the first element of a CSS selector that contains `text` can be clicked, and click it."""
    until(browser, lambda driver: wait(driver, selector, text).click() or True)


def upload(browser, path):
    """Remove the previous upload, and upload a file."""
    from selenium.webdriver.common.by import By

    for clear in browser.find_elements(By.CSS_SELECTOR, "#file button[aria-label=Clear]"):
        browser.execute_script("arguments[0].click()", clear)  # works even if a message covers it
    until(browser, lambda driver: wait(driver, "#file input[type=file]").send_keys(str(path)) or True)


def upload_and_compare(browser, path):
    upload(browser, path)
    wait(browser, "#file", path.stem)
    click(browser, "#compare")


def test_a_prompt_becomes_a_video_at_the_chosen_budget(page, asked_hosts):
    assert "expectations for this machine, from 2 steps at the start" in text_of(page, "#costs", "Tokens")
    assert text_of(page, "#costs .chosen", "16×").split()[:5] == ["16×", "3", "48", "3.0×", "fewer"]
    click(page, "#budget label", "4×")
    wait(page, "#costs .chosen", "144")
    until(page, lambda driver: wait(driver, "#prompt textarea").send_keys("a red disc moves left") or True)
    click(page, "#make")
    facts = text_of(page, "#video figure", "Measured")
    assert "a red disc moves left" in facts
    assert "4×, 144 tokens, 33 frames at 8 a second, seed 0." in facts
    assert re.search(r"Measured: text [\d.]+ s, denoising [\d.]+ s, decoding [\d.]+ s, together [\d.]+ s", facts)
    wait(page, "#costs", "the last video")
    assert until(page, film_of("#video video")) == pytest.approx([33 / 8, 256, 256], abs=0.01)
    assert console_errors(page) == []
    loaded = page.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert {name.split("/")[2] for name in loaded if not name.startswith(("data:", "blob:"))} == {
        page.current_url.split("/")[2]
    }
    assert asked_hosts <= {"127.0.0.1", "localhost"}


def film_of(selector):
    """Return an expression of the duration, width and height of a video whose header has been read."""
    film = f"document.querySelector({selector!r})"
    return f"{film}.readyState > 0 && [{film}.duration, {film}.videoWidth, {film}.videoHeight]"


def test_an_uploaded_video_plays_beside_its_reconstructions(page, tmp_path):
    write_video(tmp_path / "clip.mp4", drifting(17, 64, 64), 10)
    click(page, "button[role=tab]", "Reconstruct")
    upload_and_compare(page, tmp_path / "clip.mp4")
    shown = text_of(page, "#comparison .viewer", "dB this frame")
    assert shown.startswith("clip.mp4\n17 frames of 64x64 at 10 a second, processed at 64x64\noriginal")
    assert until(page, film_of("#comparison video")) == pytest.approx([1.7, 4 * 256 + 3 * 4, 256], abs=0.01)
    assert len(page.find_elements("css selector", "#comparison polyline")) == 3
    page.execute_script("document.querySelector('.viewer').viewer.seek(8)")
    wait(page, "#comparison .where", "frame 9 of 17, 0.80 s")
    tile = text_of(page, "#comparison .tile", "4×")
    assert re.search(r"[\d.]+ frames/s\n[\d.]+ dB clip · [\d.]+ dB this frame$", tile)
    assert float(wait(page, "#comparison .head").get_attribute("x1")) == 500
    canvas = "document.querySelector('#comparison canvas')"
    page.execute_script("document.querySelector('.viewer').viewer.seek(12)")
    drawn = f"{canvas}.getContext('2d').getImageData(0, 0, 64, 64).data.some(value => value !== 0 && value !== 255)"
    until(page, drawn)
    click(page, "#comparison .play", "Play")
    wait(page, "#comparison .play", "Pause")
    assert console_errors(page) == []


def errors_beside_refusals(browser):
    """Return console errors except one of Gradio's: it requests the progress of an upload that it has refused."""
    own = ("upload_progress", "Response", "Invalid file type")
    return [error for error in console_errors(browser) if not any(word in error for word in own)]


def test_files_beyond_the_limits_are_refused_with_what_is_legal(page, tmp_path):
    (tmp_path / "large.mp4").write_bytes(bytes(300_000))
    write_video(tmp_path / "long.mp4", drifting(41, 32, 32), 30)
    (tmp_path / "broken.mp4").write_bytes(b"no video at all")
    click(page, "button[role=tab]", "Reconstruct")
    for name, message in (
        ("long.mp4", "long.mp4: 1.3 s and 41 frames; at most 2 s and 40 frames are accepted"),
        ("broken.mp4", "broken.mp4: cannot be read as a video"),
    ):
        upload_and_compare(page, tmp_path / name)
        assert text_of(page, "#comparison [role=alert]", name).startswith(message)
    upload(page, tmp_path / "large.mp4")
    wait(page, ".toast-body", 'exceed the maximum allowed size of 204.8 Kb: "large.mp4"')
    (tmp_path / "notes.txt").write_text("no video")
    upload(page, tmp_path / "notes.txt")
    wait(page, ".toast-body", "Invalid file type: notes.txt. Only .mp4, .m4v, .mov, ")
    assert errors_beside_refusals(page) == []


def test_without_a_pipeline_the_page_says_how_to_make_one(browser, tokenizer):
    blocks, address = served(AppBackend(tokenizer, None, Pace(), LIMITS))
    browser.get(address)
    wait(browser, "#compare")
    click(browser, "button[role=tab]", "Text to video")
    assert text_of(browser, ".promag.note pre", "--pipeline checkpoints/tiny-video")
    assert errors_beside_refusals(browser) == []  # errors of the previous page may arrive late
    blocks.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to show: give --tokenizer FOLDER, --pipeline FOLDER or both"),
        (["--tokenizer", "nowhere"], r"tokenizer nowhere: no config\.json there"),
        (["--tokenizer", "nowhere", "--tiny-decoder"], "--tiny-decoder: decodes sampled videos; give --pipeline FOLDER"),
        (["--pipeline", "nowhere"], r"pipeline nowhere: no model_index\.json there"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        app.main(arguments)


def test_a_tiny_decoder_of_other_latents_is_refused_before_anything_is_timed(tmp_path, capsys):
    make_pipeline(height=32, width=32).save_pretrained(tmp_path / "pipeline")
    TinyDecoder().save_pretrained(tmp_path / "tiny")
    call = ["--pipeline", str(tmp_path / "pipeline"), "--tiny-decoder"]
    with pytest.raises(UserError, match="--tiny-decoder: enable_tiny_decoder: this pipeline was made without one"):
        app.main(call)
    with pytest.raises(UserError, match=r"--tiny-decoder .*tiny: tiny decoder: "):
        app.main([*call, str(tmp_path / "tiny")])
    assert capsys.readouterr().out == ""


def test_a_port_in_use_is_one_line_before_a_model_is_loaded():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: cannot be served there") as error:
            app.main(["--tokenizer", "nowhere", "--port", str(port)])
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="--port 70000: 0 to 65535 are legal"):
        app.main(["--tokenizer", "nowhere", "--port", "70000"])
