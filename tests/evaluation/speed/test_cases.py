import time

import pytest
import torch

from promag.evaluation.speed.cases import Group, Job, is_recorded, measure
from promag.evaluation.speed.ceilings import Ceilings

CPU = torch.device("cpu")
LIMITS = Ceilings({"fp32": 0.5, "bf16": 2.0}, {"fp32": 0.25, "bf16": 1.0}, 10.0, 900.0)


def sleeping(seconds, **job):
    return Job(lambda: time.sleep(seconds), **job)


def group(jobs, settings, **options):
    return Group("train", settings, lambda: jobs, memory=False, **options)


def test_a_line_has_shares_of_the_limit_and_ratios_by_clip_to_the_first_of_its_part():
    jobs = [sleeping(0.02, count=2, gflop=4.0), sleeping(0.01, gflop=1.0), sleeping(0.02, count=8, facts={"tokens": 5})]
    settings = [{"part": "a", "ratio": r, "precision": "bf16"} for r in (4, 8, 16)]
    settings[1]["part"] = "b"
    one, other, more = measure(group(jobs, settings, limit="product"), CPU, 3, LIMITS)
    assert one["share_of_limit"] == pytest.approx(4.0 / one["seconds"] / 1000 / 2.0)
    assert 0.02 <= one["quartiles"][0] <= one["seconds"] <= one["quartiles"][1]
    assert (one["rounds"], one["what"], one["suite"]) == (3, "speed", "train")
    assert "speedup" not in one
    assert "speedup" not in other
    assert more["baseline"] == {"ratio": 4}
    assert more["speedup"] == pytest.approx(4 * one["seconds"] / more["seconds"])
    assert more["tokens"] == 5
    assert "gflop" not in more
    assert one["ceilings"]["decoder_frames_per_second"] == 900


def test_a_case_that_fails_leaves_the_others_as_they_are():
    def fail():
        raise ValueError("too\nlarge")

    settings = [{"part": "a", "ratio": r, "precision": "fp32"} for r in (4, 16)]
    failed, good = measure(group([Job(fail), sleeping(0.001)], settings), CPU, 1, LIMITS)
    assert failed["error"] == "ValueError: too large"
    assert "seconds" not in failed
    assert good["seconds"] > 0
    assert "speedup" not in good  # there is nothing to compare with

    def unbuildable():
        raise RuntimeError("no memory")

    lines = measure(Group("train", settings, unbuildable), CPU, 1, LIMITS)
    assert [line["error"] for line in lines] == ["RuntimeError: no memory"] * 2


def test_after_a_time_no_case_is_begun_and_rounds_end_early_but_one_is_measured():
    jobs, settings = [sleeping(0.001), Job(pytest.fail)], [{"part": "a"}, {"part": "b"}]
    (line,) = measure(group(jobs, settings), CPU, 50, LIMITS, until=time.perf_counter() - 1)
    assert (line["rounds"], line["settings"]) == (1, {"part": "a"})


def test_only_all_cases_of_the_same_commit_machine_and_device_are_recorded():
    where = {"commit": "abc", "machine": "m", "threads": 2}
    wanted = group([], [{"part": "a", "shape": [1, 2]}, {"part": "b"}])
    lines = [{"what": "speed", "suite": "train", "device": "cpu", "settings": s, **where} for s in wanted.settings]
    assert is_recorded(wanted, "cpu", lines, where)
    assert is_recorded(wanted, "cpu", [*lines, {"what": "cost", "rows": []}], where)
    assert not is_recorded(wanted, "cuda", lines, where)
    assert not is_recorded(wanted, "cpu", lines[:1], where)
    failed = {**lines[1], "error": "OutOfMemoryError: no memory"}
    assert not is_recorded(wanted, "cpu", [lines[0], failed], where)
    assert is_recorded(wanted, "cpu", [lines[0], failed, lines[1]], where)
    assert not is_recorded(wanted, "cpu", lines, {**where, "commit": "abd"})
    for commit in ("unknown", "abc+changes"):
        same = [{**line, "commit": commit} for line in lines]
        assert not is_recorded(wanted, "cpu", same, {**where, "commit": commit})
