# ruff: noqa: RUF001 (the page is set with ×, – and −)
import base64
import dataclasses
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from promag.data.video import read_frames
from promag.reports.demo_report import BudgetRow, Progress, ReconstructionClip, Report, SampleClip, write_report
from promag.reports.plots import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, _log_ticks, _ticks, line_plot, marked_plot
from tests.browser import console_errors, until

COLOURS = {"original": (200, 40, 40), 4: (40, 180, 40), 8: (40, 40, 200), 16: (220, 220, 60)}
NASTY = "</title><script>alert(1)</script> {x} \"'&<img src=http://example.org/a onerror=alert(2)>"


class Page(HTMLParser):
    """The elements with their attributes, the text, and the rows of tables as lists of cell texts."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.text, self.lines, self._in_cell = [], "", [], False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.lines.append([])
        if tag in ("td", "th"):
            self.lines[-1].append("")
            self._in_cell = True
        if tag == "small" and self._in_cell:
            self.lines[-1][-1] += " | "

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data):
        self.text += data
        if self._in_cell:
            self.lines[-1][-1] += data

    def line(self, label):
        return next(cells[1:] for cells in self.lines if cells[0].split(" |")[0] == label)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def solid(colour, frames=5, size=32):
    return np.broadcast_to(np.array(colour, np.uint8), (frames, size, size, 3)).copy()


def reconstruction(**changes):
    by_ratio = {r: solid(COLOURS[r]) for r in (16, 4, 8)}
    clip = ReconstructionClip("clip-1", "a red square", 8.0, solid(COLOURS["original"]), by_ratio, {4: 24.314, 16: 22.9})
    return dataclasses.replace(clip, **changes)


def sample(**changes):
    by_ratio = {r: solid(COLOURS[r], frames=7) for r in (4, 16)}
    read = {4: ("red disc moves left", True), 16: ("blue disc moves left", False)}
    return dataclasses.replace(SampleClip("red disc moves left", 8.0, by_ratio, read), **changes)


ROWS = [
    BudgetRow(
        4, 9, 1296, 0.0351562, 24.314, 2.1, 25.0, 0.7812, 0.8421, 9.87, 12.61, 0.61234,
        {"colour": (0.91, 0.81, 0.96), "all": (0.42, 0.3, 0.55)}, {"shape": (0.97, 0.83, 0.99)},
    ),
    BudgetRow(
        8, 5, 720, 0.0195, 23.72, 2.0, 24.9, 0.764, missing={"sampling_seconds": "no model at 8", "accuracy": "none"}
    ),
    BudgetRow(
        16, 3, 432, 0.0117, 22.9, 1.9, 25.0, 0.742, 0.241, 2.9, 3.72, 0.644,
        {"colour": (0.62, 0.5, 0.71), "all": (0.33, 0.22, 0.46)},
    ),
]  # fmt: skip


def report(**changes):
    whole = Report(
        title="Grown",
        summary=["It works.", "It is cheap."],
        rows=ROWS,
        chance={"colour": 1 / 6, "all": 0.005},
        reconstructions=[reconstruction()],
        samples=[sample()],
        curves={"PSNR, dB/4×": [(0, 12.0), (1000, 24.0)], "PSNR, dB/8×": [(1000, 22.0), (1300, 23.5)], "alone": [(0, 3.0)]},
        facts={"Commit": "abc", "Machine": "2 cores"},
    )
    return dataclasses.replace(whole, **changes)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return folder, Page(write_report(folder, report()))


def test_the_page_requests_nothing_from_elsewhere(written):
    folder, page = written
    sources = [v for _, attributes in page.elements for k, v in attributes.items() if k in ("src", "href", "poster")]
    assert len(sources) == 3
    assert all(source.startswith("data:") for source in sources)
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|url\(|@import", html)
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")
    assert len(html) < 100_000


def test_no_temporary_files_are_left(written):
    folder, _ = written
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert names == {"report.html", "report.json", "videos/reconstruction-01.mp4", "videos/sample-01.mp4"}


@pytest.mark.parametrize(
    ("name", "columns", "frames"), [("reconstruction-01", ["original", 4, 8, 16], 5), ("sample-01", [4, 16], 7)]
)
def test_videos_hold_their_columns_in_order(written, tmp_path, name, columns, frames):
    folder, page = written
    embedded = page.all("video")[name == "sample-01"]
    mp4 = base64.b64decode(embedded["src"].removeprefix("data:video/mp4;base64,"))
    assert mp4 == (folder / "videos" / f"{name}.mp4").read_bytes()
    (tmp_path / "clip.mp4").write_bytes(mp4)
    pixels = read_frames(tmp_path / "clip.mp4", range(frames)).astype(int)
    # 32 pixels are enlarged to 128, with 4 grey ones between columns.
    width = len(columns) * 128 + (len(columns) - 1) * 4
    assert pixels.shape == (frames, 128, width, 3)
    assert (embedded["width"], embedded["height"]) == (str(width), "128")
    for i, column in enumerate(columns):
        assert np.abs(pixels[:, 64, i * 132 + 64] - COLOURS[column]).max() <= 8
    assert np.abs(pixels[:, 64, 129:131] - 128).max() <= 24
    with pytest.raises(ValueError, match=str(frames)):
        read_frames(tmp_path / "clip.mp4", [frames])


def test_labels_and_notes_stand_in_the_order_of_the_columns(written):
    _, page = written
    assert "original4×8×16×" in page.text
    assert "PSNR24.31 dB–22.90 dB" in page.text  # 8x was not measured on this clip
    assert "✓ red disc moves left✗ blue disc moves left" in page.text
    strips = [a["style"] for a in page.all("div") if a.get("class") == "strip"]
    assert strips == ["--columns:4;--gap:0.7634%", "--columns:2;--gap:1.5385%"]
    assert [v["aria-label"] for v in page.all("video")] == [
        "clip-1: original, 4×, 8×, 16×, side by side",
        "red disc moves left: 4×, 16×, side by side",
    ]


def test_the_table_holds_the_figures(written):
    _, page = written
    assert page.lines[0] == ["Temporal compression", "4×", "8×", "16×"]
    assert page.line("Latent frames") == ["9", "5 | 1.8× fewer", "3 | 3.0× fewer"]
    assert page.line("Tokens") == ["1,296", "720 | 1.8× fewer", "432 | 3.0× fewer"]
    assert page.line("Latent values per pixel") == ["0.0352", "0.0195 | 1.8× fewer", "0.0117 | 3.0× fewer"]
    assert page.line("PSNR (dB), ± deviation between clips") == [
        "★ 24.31 | ± 2.10",
        "23.72 | ± 2.00 | −0.59",
        "22.90 | ± 1.90 | −1.41",
    ]
    # Two are equal: none is best.
    assert page.line("PSNR of first frames (dB)") == ["25.00", "24.90 | −0.10", "25.00 | the same"]
    assert page.line("SSIM") == ["★ 0.781", "0.764 | −0.017", "0.742 | −0.039"]
    assert page.line("Training step (s)") == ["0.842", "–", "★ 0.241 | 3.5× faster"]
    assert page.line("Denoising a video (s)") == ["9.87", "–", "★ 2.90 | 3.4× faster"]
    assert page.line("Sampling a video, decoding included (s)") == ["12.6", "–", "★ 3.72 | 3.4× faster"]
    assert page.line("Validation loss (each in its own latent space)") == ["0.612", "–", "0.644"]
    assert page.line("Commit") == ["abc"]


def test_an_accuracy_is_best_only_where_intervals_do_not_overlap(written):
    _, page = written
    assert page.line("colour") == ["★ 91 | 81 to 96", "–", "62 | 50 to 71"]
    assert page.line("shape") == ["97 | 83 to 99", "–", "–"]
    assert page.line("all") == ["42 | 30 to 55", "–", "33 | 22 to 46"]
    assert [c[0] for c in page.lines if "chance" in c[0]] == ["colour | chance 17", "all | chance 0.50"]


def test_figures_not_measured_have_a_reason(written):
    _, page = written
    titles = [a["title"] for a in page.all("abbr")]
    assert titles == [
        "not measured",  # training step
        "not measured",  # denoising
        "not measured: no model at 8",
        "not measured",  # loss
        "not measured: none",
        "not measured: none",
        "not measured",  # what is readable at 8
        "not measured",  # and at 16
        "not measured",  # PSNR of the clip
    ]
    assert "– not measured (8×: no model at 8; 8×: none)." in page.text


def test_a_slower_first_row_and_missing_baseline(tmp_path):
    rows = [BudgetRow(4, sampling_seconds=2.0), BudgetRow(8, sampling_seconds=5.0, psnr=20.0), BudgetRow(16, tokens=1)]
    page = Page(write_report(tmp_path, report(rows=rows)))
    assert page.line("Sampling a video, decoding included (s)") == ["★ 2.00", "5.00 | 2.5× slower", "–"]
    assert page.line("PSNR (dB), ± deviation between clips") == ["–", "20.00", "–"]
    assert page.line("Tokens") == ["–", "–", "1"]


def test_the_json_holds_the_same_figures(written):
    folder, _ = written
    report_json = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    given = report()
    for row, expected in zip(report_json["rows"], given.rows, strict=True):
        accuracy = {k: tuple(v) for k, v in (row["accuracy"] or {}).items()} or None
        readable = {k: tuple(v) for k, v in (row["readable"] or {}).items()} or None
        assert BudgetRow(**{**row, "accuracy": accuracy, "readable": readable}) == expected
    assert report_json["chance"] == given.chance
    assert {k: [tuple(p) for p in v] for k, v in report_json["curves"].items()} == given.curves
    assert (report_json["title"], report_json["summary"], report_json["facts"]) == (given.title, given.summary, given.facts)
    assert report_json["reconstructions"] == [
        {
            "name": "clip-1",
            "caption": "a red square",
            "fps": 8.0,
            "psnr": {"4": 24.314, "16": 22.9},
            "frames": 5,
            "height": 32,
            "width": 32,
            "video": "videos/reconstruction-01.mp4",
            "columns": ["original", "4×", "8×", "16×"],
        }
    ]
    assert report_json["samples"][0]["read"] == {"4": ["red disc moves left", True], "16": ["blue disc moves left", False]}


def test_hostile_text_stays_text(written, tmp_path):
    row = BudgetRow(4, accuracy={NASTY: (0.5, 0.4, 0.6)}, missing={"psnr": NASTY})
    page = Page(
        write_report(
            tmp_path,
            Report(
                title=NASTY,
                summary=[NASTY],
                rows=[row],
                chance=None,
                reconstructions=[reconstruction(name=NASTY, caption=NASTY)],
                samples=[sample(prompt=NASTY, read={4: (NASTY, False)})],
                curves={NASTY.replace("/", "") + "/" + NASTY.replace("/", ""): [(0, 1.0)]},
                facts={NASTY: NASTY},
            ),
        )
    )
    # Title (twice), summary, reason, accuracy, name, caption, prompt, what was read, fact (twice).
    assert page.text.count(NASTY) == 11
    # The page has the same kinds of elements and attributes as one with harmless text.
    kinds = {(tag, name) for tag, attributes in page.elements for name in [None, *attributes]}
    tame = {(tag, name) for tag, attributes in written[1].elements for name in [None, *attributes]}
    assert kinds <= tame
    assert len(page.all("script")) == 1


def test_sections_without_content_are_left_out(tmp_path):
    empty = Report("Empty", [], [], None, [], [sample(read=None)], {}, {})
    page = Page(write_report(tmp_path, empty))
    assert re.findall(r"Token budgets|Reconstructions|Samples|Training curves|measured", page.text) == ["Samples"]
    assert "scorer" not in page.text
    assert len(page.all("button")) == 1
    page = Page(write_report(tmp_path, dataclasses.replace(empty, samples=[])))
    assert page.all("button") == []


def test_a_page_grows_while_a_run_proceeds(tmp_path):
    """The first page has only the clips of the shipped checkpoints; a clip that is shown again is not encoded again."""
    clips = (sample(), reconstruction())
    shipped: dict = {"shipped": clips[:1], "shipped_reconstructions": clips[1:]}
    early = Report("A run", **shipped)
    page = Page(write_report(tmp_path, early, Progress("1/3 tokenizer, 4x", 0.125, 400.0, 20)))
    assert "Training is going on. 1/3 tokenizer, 4x12 %, about 7 minutes to go." in page.text.replace("\n", "")
    assert "Still to come: token budgets, reconstructions, samples." in page.text
    assert page.all("progress")[0]["value"] == "0.125"
    assert page.all("body")[0]["data-reload"] == "20"
    assert len(page.all("video")) == 2
    figures = json.loads((tmp_path / "report.json").read_text())
    assert figures["progress"] == {"stage": "1/3 tokenizer, 4x", "fraction": 0.125, "seconds_left": 400.0, "reload_seconds": 20}
    assert figures["shipped_reconstructions"][0]["video"] == "videos/shipped-reconstruction-01.mp4"
    assert (tmp_path / "videos/shipped-reconstruction-01.mp4").read_bytes() == early.shipped_reconstructions[0].film.mp4

    films = [clip.film for clip in clips]
    page = Page(write_report(tmp_path, report(**shipped), Progress("3/3 samples", 1.0)))
    assert "3/3 samples100 %." in page.text.replace("\n", "")
    assert "Still to come" not in page.text
    assert len(page.all("video")) == 4
    assert all(clip.film is film for clip, film in zip(clips, films, strict=True))

    page = Page(write_report(tmp_path, report(**shipped)))
    assert "Training is going on" not in page.text
    assert "data-reload" not in page.all("body")[0]


@pytest.mark.parametrize("wrong", [{"fraction": 1.5}, {"seconds_left": -1.0}, {"reload_seconds": 0}])
def test_an_impossible_progress_is_refused(wrong):
    with pytest.raises(ValueError, match="fraction from 0 to 1"):
        Progress(**{"stage": "tokenizer", "fraction": 0.5, **wrong})


def test_a_running_page_reloads_itself_unless_its_videos_are_paused(browser, tmp_path):
    clips = {"shipped": [sample()]}
    path = write_report(tmp_path, Report("A run", **clips), Progress("tokenizer", 0.1, reload_seconds=1))
    browser.get(path.as_uri())
    write_report(tmp_path, Report("A run", **clips), Progress("samples", 0.9, reload_seconds=1))
    until(browser, "document.querySelector('.running').textContent.includes('samples')")
    # In one script, so that no reload comes between the videos that play and the click.
    playing = "const videos = [...document.querySelectorAll('video')], play = document.querySelector('.controls .play')"
    pressed = "if (videos.length && videos.every(video => !video.paused)) { play.click(); return true }"
    until(browser, f"(() => {{ {playing}; {pressed} }})()")
    assert browser.execute_script("return document.querySelector('video').paused && document.body.dataset.paused") == "yes"
    browser.execute_script("window.seconds = 0; setInterval(() => window.seconds++, 1000)")
    until(browser, "window.seconds >= 3")  # a reloaded page has no such count
    assert console_errors(browser) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"by_ratio": {4: solid((0, 0, 0)), 16: solid((0, 0, 0), frames=4)}}, r"16× is uint8 \(4, 32, 32, 3\)"),
        ({"by_ratio": {4: solid((0, 0, 0)).astype(np.float32)}, "psnr": {}}, "4× is float32"),
        ({"original": solid((0, 0, 0))[..., 0], "by_ratio": {}, "psnr": {}}, r"original is uint8 \(5, 32, 32\)"),
        ({"psnr": {4: 20.0, 32: 19.0}}, r"figures at \[32\] without videos"),
        ({"psnr": {4: math.inf}}, "reconstructions.0.psnr.4 is inf"),
    ],
)
def test_a_wrong_clip_is_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path / "new", report(reconstructions=[reconstruction(**changes)]))
    assert not (tmp_path / "new").exists()


def test_a_clip_without_videos_and_a_curve_without_points_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there is none"):
        write_report(tmp_path / "new", report(samples=[sample(by_ratio={}, read=None)]))
    with pytest.raises(ValueError, match="'8×' has no points"):
        write_report(tmp_path / "new", report(curves={"growth/8×": []}))
    assert not (tmp_path / "new").exists()


def test_a_reason_for_an_unknown_figure_is_refused():
    with pytest.raises(ValueError, match=r"missing=\['speed'\].*train_step_seconds"):
        BudgetRow(4, missing={"speed": "typing error"})


def test_a_plot_for_each_group_of_curves(written):
    _, page = written
    assert [a["aria-label"] for a in page.all("svg") if "aria-label" in a] == [
        "PSNR, dB by training step: 4× ends with 24.00 at 1,000; 8× ends with 23.50 at 1,300",
        "value by training step: alone ends with 3.00 at 0",
    ]


def test_lines_are_drawn_to_scale():
    svg = line_plot({"a": [(0, 10.0), (500, 15.0), (1000, 20.0)], "b": [(1000, 10.0)]}, "step", "dB")
    first, second = re.findall(r'<polyline [^>]*points="([^"]*)"', svg)
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    middle = f"{(LEFT + right) / 2},{(TOP + bottom) / 2}"
    assert first == f"{LEFT}.0,{bottom}.0 {middle} {right}.0,{TOP}.0"
    assert second == f"{right}.0,{bottom}.0"
    ticks = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert ticks == ["10", "12", "14", "16", "18", "20", "0", "200", "400", "600", "800", "1,000", "step", "dB"]


@example(0.0, 0.3, 3)
@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(3, 5))
def test_ticks_are_round_even_and_enclose(low, span, count):
    high = low + span
    ticks = _ticks(low, high, count)
    step = ticks[1] - ticks[0]
    assert ticks[0] <= low + 1e-6 * step
    assert ticks[-1] >= high - 1e-6 * step
    assert np.allclose(np.diff(ticks), step, rtol=1e-4)
    assert count <= len(ticks) - 1 <= 2.5 * count + 2
    assert f"{step:.0e}"[0] in "125"


def test_a_plot_distinguishes_measured_points_from_others():
    svg = marked_plot({"4x": [(17, 1.0, True), (33, 2.0, True), (65, 4.0, False)]}, "frames", "seconds", log=True)
    assert svg.count('class="open"') == 1
    assert svg.count('class="line guess"') == 1
    assert svg.count("<circle") == 3
    # On logarithmic axes a line through powers is straight: equal steps for equal factors.
    xs, ys = zip(*((float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)), strict=True)
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.2)
    assert (xs[1] - xs[0]) / (xs[2] - xs[1]) == pytest.approx(math.log(33 / 17) / math.log(65 / 33), rel=0.01)


@given(st.floats(1e-3, 1e4), st.floats(1.01, 1e6))
def test_logarithmic_ticks_enclose_what_is_drawn(low, factor):
    ticks = _log_ticks(low, low * factor)
    assert len(ticks) >= 2
    assert ticks[0] <= low * (1 + 1e-6)
    assert ticks[-1] >= low * factor * (1 - 1e-6)


def test_a_plot_refuses_values_that_its_axes_cannot_show():
    with pytest.raises(ValueError, match="0 points"):
        marked_plot({"4x": []}, "frames", "seconds")
    with pytest.raises(ValueError, match="above 0 on logarithmic axes"):
        marked_plot({"4x": [(0, 1.0, True)]}, "frames", "seconds", log=True)
