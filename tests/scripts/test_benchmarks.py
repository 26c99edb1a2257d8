"""The benchmarks of memory and of long films at their smallest size."""

import json

import numpy as np
import pytest
import yaml

from promag.evaluation.speed.timing import resident
from promag.scripts._memory import in_new_process, run_command
from promag.scripts.benchmarks import films, long_video, memory
from promag.training.config import UserError
from tests.scripts.conftest import preset


def test_long_video_measures_memory_and_tiles(demo_run, video_folder, tmp_path):
    tokenizer, record = str(demo_run / "tokenizer-run" / "tokenizer"), tmp_path / "long_video.jsonl"
    few = ["--ratios", "16", "--lengths", "17", "129", "--size", "32", "--chunk", "16"]
    tiles = ["--video", str(video_folder / "v0.mp4"), "--frames", "5", "--tile", "32"]
    assert long_video.main([tokenizer, *few, *tiles, "--large", "64", "2048", "--record", str(record)]) == 0
    line = json.loads(record.read_text())
    (row,), large = line["rows"], line["large"]
    assert (large["frames"], large["height"], large["width"]) == (5, 64, 2048)
    assert 100 < large["peak_mib"] < 4000
    short, long = (row["peak_bytes"][key] for key in ("17", "129"))
    assert 2**26 < short < 2**33
    assert long < 1.1 * short
    assert 20 < row["tiled_psnr"] < 100
    with pytest.raises(UserError, match="64x64: is no larger than a tile of 64"):
        long_video.main([tokenizer, *few, *tiles[:-1], "64"])
    with pytest.raises(UserError, match="chunk of 24 frames: 16x needs"):
        long_video.main([tokenizer, "--ratios", "16", "--chunk", "24"])


def test_films_are_cut_at_their_known_shots(tmp_path):
    pytest.importorskip("scenedetect")
    record = tmp_path / "films.jsonl"
    assert films.main(["--minutes", "0.4", "--height", "64", "--repeats", "2", "--record", str(record)]) == 0
    line = json.loads(record.read_text())
    assert (line["frames"], line["shots"]) == (576, 3)
    assert (line["scenes"]["clips"], line["scenes"]["of_one_whole_shot"], line["cut"]["clips"]) == (
        3,
        2,
        3,
    )  # the last is shorter
    for command in ("scenes", "cut"):
        assert 100 < line[command]["peak_mib"] < 4000
        assert 0.5 < line[command]["cpu_seconds"] < 120
    assert 0 < line["scan"]["decoding"]["milliseconds_a_frame"] < line["scan"]["scenes"]["milliseconds_a_frame"]
    assert 0 < line["read_from_cut"] < 5


def test_a_new_process_has_memory_of_its_own():
    ballast = np.ones(2**29, np.uint8)
    del ballast
    assert resident("VmHWM") > 2**29
    assert in_new_process(resident, "VmHWM") < 2**29


def test_a_command_that_fails_is_named():
    with pytest.raises(UserError, match=r"promag prepare-clips missing\.mp4 --out x\.jsonl: .*missing\.mp4"):
        run_command("prepare-clips", "missing.mp4", "--out", "x.jsonl")


@pytest.mark.parametrize("name", ["tiny", "diffusion/tiny"])
def test_presets_are_measured_under_either_spelling(name, tmp_path):
    values = preset("diffusion/tiny")
    values["model"] |= {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
    values["data"] |= {"size": 16, "frames": 17}
    (tmp_path / "diffusion").mkdir()
    (tmp_path / "diffusion" / "tiny.yaml").write_text(yaml.safe_dump(values))
    record = tmp_path / "memory.jsonl"
    memory.main([str(tmp_path / "diffusion" / "tiny.yaml"), "--text-width", "16", "--real", name, "--record", str(record)])
    (row,) = json.loads(record.read_text())["rows"]
    assert row["preset"] == "tiny"
    assert [clip["measured"] for clip in row["clips"]] == [True, True]


def test_presets_to_measure_are_among_those_given():
    with pytest.raises(UserError, match="--real smal, base: use one of the presets diffusion/tiny, diffusion/small"):
        memory.main(["diffusion/tiny", "diffusion/small", "--real", "tiny", "smal", "base"])
    with pytest.raises(UserError, match="preset diffusion/wan: model null: a configuration with a transformer of its own"):
        memory.main(["diffusion/wan"])
