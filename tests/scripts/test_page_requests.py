"""Hostile requests beside legal ones to the page: every one gets a clear answer, and nothing is written elsewhere."""

from collections import Counter

import pytest

from promag.evaluation.sampling_cost import Pace
from promag.reports.uploads import UploadLimits
from promag.reports.web_app import AppBackend
from promag.scripts.reliability.page import REFUSED, SHOWN, requests, visit
from tests.scripts.test_app import served
from tests.tiny_pipeline import make_pipeline


def test_every_request_gets_a_clear_answer(tmp_path, monkeypatch):
    pytest.importorskip("gradio_client")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    (tmp_path / "given").mkdir()
    asked = requests(tmp_path / "given", tmp_path / "outside", 56, seed=0, largest=False)
    hostile = [request for request in asked if not request.legal][::2]
    assert len({request.kind for request in hostile}) > 10
    legal = list({request.kind: request for request in asked if request.legal}.values())
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    pipe = make_pipeline(height=32, width=32, num_frames=33)
    blocks, address = served(AppBackend(pipe.vae, pipe, Pace(), UploadLimits()))
    try:
        answers = visit(address, hostile + legal, clients=4)
    finally:
        blocks.close()
    assert [f"{one.request.kind}: {one.reason}" for one in answers if one.reason] == []
    assert Counter(one.result for one in answers) == {REFUSED: len(hostile), SHOWN: len(legal)}
    after = {path for path in tmp_path.rglob("*") if path.is_file() and tmp_path / "uploads" not in path.parents}
    assert after == before
