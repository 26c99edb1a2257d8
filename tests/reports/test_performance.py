"""The page of performance is what the recorded lines give, and its tables say what they mean."""

from pathlib import Path

import pytest

from promag.reports.performance import fill, measured_mfu, speed_lines
from promag.scripts.benchmarks.report import main
from promag.training.config import UserError
from promag.training.files import read_json_lines

ROOT = Path(__file__).resolve().parents[2]
ORIGIN = {"commit": "abc", "machine": "2 cores, any", "versions": {"torch": "2.13"}, "threads": 2}


def line(suite="train", seconds=2.0, **changes):
    own = {
        "part": "train step",
        "model": "tiny",
        "ratio": 4,
        "shape": [8, 3, 65, 64, 64],
        "precision": "fp32",
        "compiled": False,
    }
    settings = {**own, **changes.pop("settings", {})}
    ceilings = {"product_tflops": {"fp32": 0.15}, "convolution_tflops": {"fp32": 0.2}, "copy_gb_per_second": 20.0}
    case = {"what": "speed", "suite": suite, "device": "cpu", "settings": settings, "seconds": seconds, "count": 8}
    return {**case, "quartiles": [seconds, seconds], "ceilings": ceilings, **ORIGIN, **changes}


def rows(page):
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in page.splitlines() if row.startswith("| ")]


def table(name, lines):
    return fill(f"before\n<!-- {name} -->\nold\n<!-- end of {name} -->\nafter\n", lines)


def test_the_committed_page_equals_what_the_recorded_lines_give(tmp_path):
    page = (ROOT / "docs/performance.md").read_text()
    copy = tmp_path / "performance.md"
    copy.write_text(page)
    assert main([*map(str, sorted((ROOT / "docs/results").glob("*.jsonl"))), "--out", str(copy)]) == 0
    made = copy.read_text()
    assert made == page, "promag benchmark report docs/results/*.jsonl --out docs/performance.md"


def test_prose_stays_and_the_newest_line_of_a_case_counts():
    lines = [
        line(seconds=4.0),
        line(seconds=2.0),
        line(seconds=1.0, machine="another"),
        line(error="no memory", settings={"ratio": 8}),
        line(error="no memory"),  # later than a figure of the same case, which stands
    ]
    assert [case["seconds"] for case in speed_lines(lines)] == [2.0, 1.0]
    page = table("training", lines)
    assert page.startswith("before\n<!-- training -->\n2 cores, any, PyTorch 2.13, 2 threads (commit abc):\n")
    assert page.endswith("<!-- end of training -->\nafter\n")
    assert "old" not in page
    assert "another, PyTorch 2.13 (commit abc):" in page
    assert table("training", [line(error="no memory")]).splitlines()[2] == "No line has been recorded yet."


def test_older_lines_of_the_transformer_are_read_and_replaced_by_newer_ones():
    old = {"what": "cost", "parameters": 4219808, "frames": 65, "height": 64, "width": 64, "matmul_tflops": 0.3, **ORIGIN}
    old |= {"protocol": "bf16 autocast, batch 16: gradients"}
    row = {"ratio": 16, "tokens": 80, "gradient_seconds": 0.4, "train_step_seconds": 0.5, "train_step_speedup": 2.5}
    old["rows"] = [{**row, "train_step_mfu": 0.25}]
    gradients, step = speed_lines([old])
    assert step["settings"] == {**line()["settings"], "ratio": 16, "shape": [16, 3, 65, 64, 64], "precision": "bf16"}
    assert (step["tokens"], step["share_of_limit"], step["speedup"]) == (1280, 0.25, 2.5)
    assert gradients["suite"] == "transformer"
    newer = line(seconds=0.1, settings=step["settings"])
    assert [case["seconds"] for case in speed_lines([old, newer])] == [0.4, 0.1]
    heads, _, cells = rows(table("training", [old, {**newer, "speedup": 2.0}]))
    assert dict(zip(heads, cells, strict=True)) == {
        "preset": "tiny, 64x64",
        "precision": "bf16",
        "ratio": "16x",
        "clips": "16",
        "gradients, s": "0.4",
        "whole step, s": "0.1",
        "clips/s": "160",
        "times as fast as the first ratio": "2.00",
    }


def test_a_step_on_a_gpu_has_the_seconds_of_its_kernels():
    on_cpu, on_gpu = ({**line(), "device": device, "operator_seconds": 0.25} for device in ("cpu", "cuda"))
    assert "of it kernels, s" not in rows(table("training", [on_cpu]))[0]
    heads, _, cells = rows(table("training", [on_gpu]))
    assert cells[heads.index("of it kernels, s")] == "0.25"


def test_gradients_and_whole_steps_have_their_own_columns():
    gradients = [line("transformer", 0.5, settings={"part": "gradients", "model": name}) for name in ("tiny", "small")]
    heads, _, whole, alone = rows(table("training", [*gradients, line(seconds=2.0, speedup=3.0)]))
    first, faster = heads.index("gradients, s"), heads.index("times as fast as the first ratio")
    assert heads[first : first + 3] == ["gradients, s", "whole step, s", "clips/s"]
    assert (whole[0], *whole[first : first + 3], whole[faster]) == ("tiny, 64x64", "0.5", "2", "4", "3.00")
    assert (alone[0], *alone[first : first + 3], alone[faster]) == ("small, 64x64", "0.5", "", "", "")
    assert "whole step, s" not in rows(table("training", gradients))[0]


def test_a_tokenizer_stands_beside_the_published_one_of_the_same_clip():
    facts = {"latent_shape": [1, 16, 5, 16, 16], "parameters": 10**6, "gflop": 100.0, "peak_mib": 50.0, "count": 17}
    cases = []
    for model, share, seconds in (("small", 0.5, 1.0), ("Wan 2.1", 0.25, 6.0)):
        for part in ("encode", "decode"):
            settings = {"part": part, "model": model, "shape": [1, 3, 17, 128, 128]}
            shares = {"operator_shares": {"convolutions": 0.8 if part == "encode" else 0.9}} if model == "small" else {}
            cases.append(line("tokenizer", seconds, settings=settings, share_of_limit=share, **shares, **facts))
    cases.append(line("tokenizer", 1.0, settings={"part": "encode", "model": "alone"}, **facts))  # without its decoding
    heads, _, ours, peer = rows(table("tokenizer", cases))
    assert dict(zip(heads, ours, strict=True))["times as fast as Wan 2.1"] == "6.00"
    assert dict(zip(heads, peer, strict=True))["times as fast as Wan 2.1"] == "1.00"
    assert ours[heads.index("encode, frames/s")] == "17"
    assert ours[heads.index("GFLOP, both")] == "200"
    assert ours.count("50%") == 2
    assert [ours[i] for i, head in enumerate(heads) if head == "in convolutions"] == ["80%", "90%"]


def test_limits_denoising_sampling_and_data_have_their_rows():
    _, _, *limits = rows(table("limits", [line()]))
    assert limits == [
        ["2 cores, any", "products in fp32, TFLOP/s", "0.15"],
        ["2 cores, any", "convolutions in fp32, TFLOP/s", "0.2"],
        ["2 cores, any", "copies, GB/s", "20"],
    ]
    denoising = line("transformer", 0.8, settings={"part": "denoising"}, count=16, speedup=3.0)
    assert rows(table("denoising", [denoising]))[2] == ["tiny, 65x64x64", "fp32", "4x", "8", "50", "3.00"]
    sampled = line("sampling", 3.0, settings={"part": "4 steps", "steps": 4, "model": "p", "decoder": "tiny"}, count=1)
    assert rows(table("sampling", [sampled]))[2] == ["p", "fp32", "4", "tiny", "4x", "3"]
    for overlap, how in ((False, "tiny, in a row"), (True, "tiny, in a row, overlapped")):
        row = {**sampled, "settings": {**sampled["settings"], "overlap": overlap}}
        assert rows(table("sampling", [row]))[2][3] == how
    loaded = line("data", 0.5, settings={"part": "loading", "reader": "loader", "workers": 2}, count=100, speedup=0.5)
    assert rows(table("data", [loaded]))[2] == ["loading, loader", "2", "200", "0.50"]
    cached = {"part": "caching", "file": "256p", "step": "cache", "workers": 2}
    cached = line("data", 0.5, settings=cached, count=100, encoder_idle_in_each_round=[0.5, 0.01, 0.02])
    assert rows(table("data", [cached]))[2] == ["caching, 256p, cache", "2", "200", "2%"]
    held = {"part": "memory", "file": "64p", "step": "caching", "clips": 2000}
    held = line("data", 0.5, settings=held, count=100, resident_mib_after_each_round=[300, 310, 305])
    assert rows(table("data", [held]))[2][-1] == "300 to 305 after 6,000"
    level = line("train", 0.5, settings={"stage": "8x", "model": "tokenizer tiny"}, share_of_limit=0.4, peak_mib=9.0)
    assert rows(table("tokenizer training", [level]))[2] == [
        "tokenizer tiny", "4x", "65x64x64", "fp32", "8", "0.5", "16", "40%", "9"
    ]  # fmt: skip


def test_what_the_scale_on_paper_stands_on_is_a_measured_line():
    cases = speed_lines(read_json_lines(ROOT / "docs/results/gpu.jsonl"))
    peak, mfu = measured_mfu(cases, 4)
    assert 700 < peak < 800
    assert 0.3 < mfu < 0.6
    with pytest.raises(UserError, match="no line has the gradients of base at 8x on NVIDIA H100 80GB HBM3, compiled"):
        measured_mfu(cases, 8)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match="table 'speeds': use one of limits, tokenizer, "):
        table("speeds", [])
    with pytest.raises(UserError, match=r"missing\.jsonl: is no file"):
        main([str(tmp_path / "missing.jsonl"), "--out", str(tmp_path / "page.md")])
