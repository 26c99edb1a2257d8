"""Damage at random, drawn from a seed: files are read alike in every way or refused in words, within limits of memory."""

import pytest

from promag.scripts.reliability.corpus import Case, picture
from promag.scripts.reliability.fuzz_videos import read_damaged
from promag.scripts.reliability.videos import in_child
from tests.data.test_kinds import X264, encode, packed, video

FILES = 40
ENCODINGS = {
    "h264.mp4": (X264, "yuv420p"),
    "h264.mkv": (X264, "yuv420p"),
    "h264.ts": (X264, "yuv420p"),
    "vp8.webm": (("libvpx", {"crf": "10", "b": "2M", "deadline": "realtime", "cpu-used": "8"}), "yuv420p"),
    "mpeg4.avi": (("mpeg4", {"bf": "2"}), "yuv420p"),
    "wmv2.wmv": (("wmv2", {}), "yuv420p"),
    "png.mov": (("png", {}), "rgb24"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, pixels = tmp_path_factory.mktemp("whole"), picture(8, 32, 48)
    for name, (codec, pixel_format) in ENCODINGS.items():
        frames = packed(pixels, pixel_format) if pixel_format == "rgb24" else video(pixels, pixel_format)
        encode(folder / name, frames, codec)
    return {name: (folder / name).read_bytes() for name in ENCODINGS}


def test_damaged_files_are_read_alike_or_refused(files, tmp_path):
    cases = {name: Case(name, "damaged", False) for name in files}
    outcomes = []
    for outcome, _ in read_damaged(files, cases, tmp_path, None, seed=17):
        outcomes.append(outcome)
        if len(outcomes) == FILES:
            break
    bad = [f"{o.case.kind}: {o.result}, {o.reason}" for o in outcomes if o.result not in ("read", "refused")]
    assert not bad
    assert {o.result for o in outcomes} == {"read", "refused"}


def test_a_child_is_limited_in_memory():
    answer, _ = in_child(lambda: len(bytearray(2**31)), address_space=2**30)
    assert "MemoryError" in str(answer)
    assert in_child(lambda: 42)[0] == 42
