"""`promag sample` with a pipeline of random weights: its files, its output, and users' mistakes."""

import json
import re
import shlex
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image

from promag.data.video import decode_strictly, read_frames
from promag.pipelines.build import SavedLora
from promag.scripts import sample
from promag.tokenizer.tiny_training import tiny_decoder_for
from promag.training.config import UserError
from tests.conftest import make_tokenizer
from tests.diffusion.test_text import OPEN_CLIP, write_openclip
from tests.tiny_pipeline import make_pipeline

FEW = ["--steps", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("sample") / "pipeline"
    make_pipeline(height=32, width=32).save_pretrained(place)
    return str(place)


def test_every_prompt_at_every_seed_is_written_and_printed(folder, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\ufeffa blue square grows\r\n\r\n", encoding="utf-8")
    asked = ["--prompt", "a red disc moves left", "--prompt-file", str(tmp_path / "prompts.txt"), "--seed", "3", "7"]
    overviews = ["--grid", str(tmp_path / "grid.mp4"), "--contact-sheet", str(tmp_path / "new" / "sheet.png")]
    sample.main([folder, *asked, *FEW, *overviews, "--crf", "5", "--batch-size", "3", "--out", str(tmp_path / "v.mp4")])
    lines = capsys.readouterr().out.splitlines()
    wanted = [(p, s) for p in ("a red disc moves left", "a blue square grows") for s in (3, 7)]
    for i, (prompt, seed) in enumerate(wanted):
        assert lines[i] == f"{tmp_path}/v-0{i}.mp4: {prompt!r}, seed {seed}, 17 frames at 8 fps, crf 5"
        assert decode_strictly(tmp_path / f"v-0{i}.mp4").frames == 17
    assert lines[4].startswith(f"{tmp_path}/grid.mp4: 4 videos of 17 frames of 32x32, 2 in a row")
    facts = decode_strictly(tmp_path / "grid.mp4")
    assert (facts.frames, facts.height, facts.width, facts.fps) == (17, 68, 68, 8)
    videos = [read_frames(tmp_path / f"v-0{i}.mp4", range(17)).astype(int) for i in range(4)]
    shown = read_frames(tmp_path / "grid.mp4", range(17)).astype(int)
    assert np.abs(shown[:, 36:, 36:] - videos[3]).mean() < 5  # two encodings of random pixels
    assert lines[5].startswith(f"{tmp_path}/new/sheet.png: frames of 4 videos")
    assert Image.open(tmp_path / "new" / "sheet.png").width > 8 * 32 * 3
    seconds = [float(x) for x in re.findall(r"([\d.]+) s\b", lines[6])]
    assert re.match(
        r"4 videos of .* at 16x, 2 steps with guidance 4 on cpu: text .* s, denoising .* s, decoding .* s, together", lines[6]
    )
    assert seconds[3] == pytest.approx(sum(seconds[:3]), abs=0.02)
    assert lines[7] == "not measured for want of weights: CLIP similarity (--clip)"


def test_a_seeds_video_does_not_depend_on_other_videos(folder, tmp_path):
    others = ["--prompt", "a", "--prompt", "a red disc moves left", "--seed", "1", "2", "--batch-size", "2", "--overlap"]
    sample.main([folder, *others, *FEW, "--out", str(tmp_path / "v.mp4")])
    alone = ["--prompt", "a red disc moves left", "--seed", "2"]
    sample.main([folder, *alone, *FEW, "--out", str(tmp_path / "alone.mp4")])
    among, single = (read_frames(tmp_path / name, range(17)).astype(int) for name in ("v-03.mp4", "alone.mp4"))
    assert np.abs(among - single).mean() < 0.2
    assert np.abs(read_frames(tmp_path / "v-02.mp4", range(17)).astype(int) - single).mean() > 2


def test_a_tiny_decoder_decodes(folder, tmp_path):
    call = [folder, "--prompt", "a red disc moves left", *FEW]
    tiny = tmp_path / "tiny"
    tiny_decoder_for(make_tokenizer(), width=8, layers=1).save_pretrained(tiny)
    sample.main([*call, "--out", str(tmp_path / "whole.mp4")])
    sample.main([*call, "--tiny-decoder", str(tiny), "--out", str(tmp_path / "tiny.mp4")])
    whole, small = (read_frames(tmp_path / name, range(17)).astype(int) for name in ("whole.mp4", "tiny.mp4"))
    assert whole.shape == small.shape
    assert np.abs(whole - small).mean() > 2
    with pytest.raises(UserError, match="--tiny-decoder: enable_tiny_decoder: this pipeline was made without one"):
        sample.main([*call, "--out", str(tmp_path / "no.mp4"), "--tiny-decoder"])
    assert not (tmp_path / "no.mp4").exists()


def test_without_an_overview_no_video_is_kept(folder, tmp_path, monkeypatch):
    alive, made, write = [], [], sample.write

    def watched(path, video, *arguments):
        alive.append(sum(earlier() is not None for earlier in made))
        made.append(weakref.ref(video))
        return write(path, video, *arguments)

    monkeypatch.setattr(sample, "write", watched)
    seeds = ["--seed", "0", "1", "2", "3"]
    sample.main([folder, "--prompt", "a", "--frames", "1", "--steps", "1", *seeds, "--out", str(tmp_path / "v.gif")])
    assert len(made) == 4
    assert max(alive) <= 1


def test_adapters_change_the_video(folder, tmp_path):
    pipe = make_pipeline()
    torch.manual_seed(0)
    pipe.transformer.add_adapter(LoraConfig(r=4, lora_alpha=40.0, target_modules=["to_q", "to_v"], init_lora_weights=False))
    SavedLora(pipe.transformer).save_pretrained(tmp_path / "lora")
    call = [folder, "--prompt", "a red disc moves left", *FEW]
    sample.main([*call, "--out", str(tmp_path / "without.mp4")])
    sample.main([*call, "--lora", str(tmp_path / "lora"), "--out", str(tmp_path / "with.mp4")])
    one, other = (read_frames(tmp_path / f"{name}.mp4", range(17)).astype(int) for name in ("without", "with"))
    assert np.abs(one - other).mean() > 0.5
    with pytest.raises(UserError, match=r"--lora .*nowhere: no adapters there; give the folder `lora` of"):
        sample.main([*call, "--lora", str(tmp_path / "nowhere"), "--out", str(tmp_path / "no.mp4")])


def test_a_gif_at_another_budget_and_size(folder, tmp_path, capsys):
    out = tmp_path / "v.GIF"
    size = ["--height", "24", "--width", "32", "--frames", "9", "--ratio", "4", "--fps", "10"]
    sample.main([folder, "--prompt", "a", *FEW, *size, "--out", str(out), "--precision", "bf16"])
    with Image.open(out) as picture:
        assert (picture.n_frames, picture.size, picture.info["duration"]) == (9, (32, 24), 100)
    output = capsys.readouterr().out
    assert f"{out}: 'a', seed 0, 9 frames at 10 fps, 256 colours a frame" in output
    assert "1 video of 9 frames of 32x24 at 4x" in output


def test_upper_case_extensions_work_and_a_cut_prompt_is_named(folder, tmp_path, capsys, caplog):
    prompt = " ".join(["a red disc moves left"] * 20)
    overviews = ["--grid", str(tmp_path / "grid.MP4"), "--contact-sheet", str(tmp_path / "sheet.PNG")]
    sample.main([folder, "--prompt", prompt, *FEW, *overviews, "--out", str(tmp_path / "v.Mp4"), "--crf", "5"])
    assert "17 frames at 8 fps, crf 5" in capsys.readouterr().out
    assert [decode_strictly(tmp_path / name).frames for name in ("v.Mp4", "grid.MP4")] == [17, 17]
    assert Image.open(tmp_path / "sheet.PNG").format == "PNG"
    assert re.search(r"prompt 'a red .* is longer than the text encoder's \d+ tokens: '.*moves left' is cut off", caplog.text)


def test_a_draft_is_refined(folder, tmp_path, capsys):
    """A higher strength gives a result further from the draft."""
    asked = [folder, "--prompt", "a", *FEW, "--ratio", "4"]
    strengths = ("0", "0.5", "0.9")
    for strength in strengths:
        drafted = ["--draft-ratio", "16", "--draft-steps", "3", "--denoise-strength", strength]
        sample.main([*asked, *drafted, "--steps", "10", "--out", str(tmp_path / f"{strength}.mp4")])
        assert "17 frames of 32x32 at 4x, drafted at 16x, 10 steps with guidance 4 on cpu" in capsys.readouterr().out
    draft, half, most = (read_frames(tmp_path / f"{s}.mp4", range(17)).astype(int) for s in strengths)
    assert 2 < np.abs(half - draft).mean() < np.abs(most - draft).mean()
    for option, value in (("--draft-steps", "3"), ("--denoise-strength", "0.5")):
        with pytest.raises(UserError, match=f"{option} {value}: name the ratio of the draft"):
            sample.main([*asked, option, value, "--out", str(tmp_path / "v.mp4")])
    with pytest.raises(UserError, match=r"draft at 4x .* for a video at 4x: a higher ratio"):
        sample.main([*asked, "--draft-ratio", "4", "--out", str(tmp_path / "v.mp4")])


def test_guidance_and_a_negative_prompt_change_the_video(folder, tmp_path):
    videos = []
    for name, change in {
        "plain": [],
        "other": ["--negative-prompt", "a blue square grows"],
        "more": ["--guidance", "9"],
        "same": [],
    }.items():
        out = tmp_path / f"{name}.mp4"
        sample.main([folder, "--prompt", "a red disc moves left", *FEW, *change, "--out", str(out)])
        videos.append(read_frames(out, range(17)).astype(int))
    assert np.array_equal(videos[0], videos[3])
    assert min(np.abs(videos[0] - videos[i]).mean() for i in (1, 2)) > 0.5


def test_clip_similarity_is_printed_for_each_video(folder, tmp_path, capsys):
    clip = write_openclip(tmp_path / "clip", OPEN_CLIP)
    prompts = ["--prompt", "a red disc moves left", "--prompt", "a blue square grows"]
    sample.main([folder, *prompts, *FEW, "--clip", f"open_clip:local-dir:{clip}", "--out", str(tmp_path / "v.mp4")])
    output = capsys.readouterr().out
    similarities = [float(x) for x in re.findall(r"crf 18, CLIP similarity (-?[\d.]+)", output)]
    assert len(similarities) == 2
    mean = re.search(r"mean CLIP similarity (-?[\d.]+) by open_clip:local-dir", output)
    assert mean
    assert float(mean[1]) == pytest.approx(np.mean(similarities), abs=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--prompt": None}, "no prompts: give --prompt TEXT"),
        ({"--prompt-file": "nowhere.txt"}, r"--prompt-file nowhere\.txt: cannot be read: No such file"),
        ({"--out": "v.avi"}, r"--out v\.avi: a file that ends in \.mp4 or \.gif is needed"),
        ({"--grid": "v.png"}, r"--grid v\.png: a file that ends in \.mp4 or \.gif is needed"),
        ({"--contact-sheet": "v.jpg"}, r"--contact-sheet v\.jpg: a file that ends in \.png is needed"),
        ({"--out": "/dev/null/v.mp4"}, r"--out /dev/null/v\.mp4: cannot be written: "),
        ({"--crf": "60"}, r"--crf 60: 1 \(best\) to 51 are legal"),
        ({"--crf": "20", "--out": "v.gif"}, "--crf 20: a GIF has no such quality"),
        ({"--crf": "20", "--out": "v.GIF"}, "--crf 20: a GIF has no such quality"),
        ({"--fps": "60", "--out": "v.GIF"}, "60 fps: a GIF has at most 50"),
        ({"--fps": "0"}, "--fps 0: must be above 0"),
        ({"--steps": "0"}, "--steps 0: at least 1 is needed"),
        ({"--frames": "0"}, "--frames 0: at least 1 is needed"),
        ({"--frames": "20"}, r"20 frames: 16x needs 1 \+ 16k; use 17 or 33"),
        ({"--height": "20"}, "height 20: needs a multiple of 8; use 16 or 24"),
        ({"--ratio": "8"}, "temporal_ratio 8: the transformer was trained at 4x, 16x"),
        ({"--batch-size": "0"}, "--batch-size 0: at least 1 is needed"),
        ({"--seed": "-1"}, "--seed -1: 0 to"),
        ({"--out": f"{'a' * 250}.mp4"}, r"--out a+\.mp4: cannot be written: File name too long"),
        ({"--attention": "xformers"}, "attention: xformers does not work on cpu: .*xformers"),
        ({"--clip-weights": "a.bin"}, r"--clip-weights a\.bin: name the model they belong to"),
        ({"--clip": "nowhere"}, r"clip nowhere: no config\.json there"),
        ({"--video": "nowhere.mp4"}, r"nowhere\.mp4: No such file"),
    ],
)
def test_mistakes_are_named_in_one_line_before_anything_is_written(folder, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    options = {"--prompt": "a", "--out": "v.mp4", "--steps": "1", **change}
    with pytest.raises(UserError, match=message) as error:
        sample.main([folder, *(f"{name}={value}" for name, value in options.items() if value is not None)])
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_pipeline_is_one_line(folder, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "ProMAGPipeline"}))
    with pytest.raises(UserError, match="cannot be loaded") as error:
        sample.main([str(tmp_path), "--prompt", "a", "--out", str(tmp_path / "v.mp4")])
    assert "\n" not in str(error.value)


def test_the_commands_of_the_docs_run(folder, tmp_path, monkeypatch):
    text = Path("docs/how-to/sample.md").read_text().replace("\\\n", " ")
    text = text.replace("checkpoints/tiny-video", folder).replace("PIPELINE", folder)
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a red disc\na blue square\n")
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("promag sample ")]
    # Conditioning frames, tiny decoders and CLIP are tested above; tests/test_docs.py parses these lines.
    sampling = [words[2:] for words in commands if not {"--image", "--video", "--clip", "--tiny-decoder"} & set(words)]
    for words in sampling:
        sample.main([*words, "--steps", "1"])
    assert (len(commands), len(sampling)) == (9, 4)
    numbered = [f"videos/v-0{i}.mp4" for i in range(6)]
    assert sorted(str(path) for path in Path().rglob("*.*")) == sorted(
        ["disc.mp4", "plus.gif", "prompts.txt", "refined.mp4", "videos/grid.mp4", "videos/sheet.png", *numbered]
    )
