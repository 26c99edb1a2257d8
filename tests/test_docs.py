"""Every command, Python block, preset and link of README.md and docs is run, or parsed by what would run it."""

import functools
import importlib
import json
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image

from promag import ProMAGPipeline, TinyDecoder
from promag.cli import GROUPS, list_commands
from promag.data.synthetic import clip as generate_clip
from promag.data.video import write_video
from promag.diffusion.config import DiffusionConfig
from promag.tokenizer.config import TokenizerConfig
from promag.training.command_line import Parser
from promag.training.config import build, complete, load_yaml
from tests.data.test_scenes import moving
from tests.diffusion.test_text import OPEN_CLIP, write_openclip
from tests.pipelines.conftest import like, pipe  # noqa: F401 (a fixture)

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
# Programs that are not ours. The promag commands that they start (`-m promag ...`) are parsed; else this gives the reason.
OTHER_PROGRAMS = {
    "pip": "needs a network; tests/packaging installs the project from its archives",
    "git": "needs a network",
    "tensorboard": "serves until it is stopped",
}


def blocks(page: Path, language: str) -> list[str]:
    """Return the blocks of a language, without the indentation of a surrounding list."""
    matches = FENCE.findall(page.read_text())
    return [re.sub(rf"^{indent}", "", text, flags=re.MULTILINE) for indent, name, text in matches if name == language]


def commands(page: Path) -> list[list[str]]:
    """Return the words of each shell line, and of each code span that starts with promag or make."""
    lines = [line for block in blocks(page, "") for line in block.replace("\\\n", " ").splitlines()]
    spans = re.findall(r"`([^`]+)`", FENCE.sub("", page.read_text()))
    lines += [" ".join(span.split()) for span in spans if re.match(r"(promag|make|python|torchrun) ", span)]
    return [words for line in lines if (words := shlex.split(line.partition(" > ")[0], comments=True))]


class StopAfterParsingError(Exception):
    """A command line was parsed without error."""


@pytest.fixture
def parse(monkeypatch, tmp_path):
    """Parse the words of a command by its own parser and configuration, without running it."""
    for name in ("parse_args", "parse_with_config"):
        original = getattr(Parser, name)

        @functools.wraps(original)
        def read(self, *args, original=original, **options):
            original(self, *args, **options)
            raise StopAfterParsingError

        monkeypatch.setattr(Parser, name, read)
    (tmp_path / "my.yaml").write_text((ROOT / "configs/diffusion/tiny.yaml").read_text())
    monkeypatch.chdir(tmp_path)

    def run(words: list[str]) -> None:
        package = "promag.scripts"
        if words[0] in GROUPS:
            package, words = GROUPS[words[0]][0], words[1:]
        known = list_commands(package)
        assert words[0] in known, f"no command {words[0]}"
        if words[1:] in ([], ["..."]):
            return  # the page only mentions the command
        with pytest.raises((StopAfterParsingError, SystemExit)) as stop:
            importlib.import_module(f"{package}.{known[words[0]].stem}").main(words[1:])
        assert stop.type is StopAfterParsingError or stop.value.code == 0  # --help and --print-config end with 0

    return run


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_is_parsed_by_its_own_parser(page, parse):
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    variables = set(re.findall(r"^(\w+) [?:]=", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in commands(page):
        while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        if words[0] in ("torchrun", "accelerate"):
            words = words[words.index("-m") + 1 :]
        match words:
            case ["promag", *rest]:
                parse(rest)
            case ["make", target, *given]:
                assert target in targets, words
                assert {word.partition("=")[0] for word in given} <= variables, words
            case ["python", "-m", module, *rest] if module.startswith("promag."):
                with pytest.raises(StopAfterParsingError):
                    importlib.import_module(module).main(rest)
            case ["python", script, *_]:
                assert (ROOT / script).is_file(), words
            case [program, *_]:
                assert program in OTHER_PROGRAMS, f"{page.name}: {shlex.join(words)} is run by no test"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_yaml_block_is_a_legal_configuration(page):
    for block in blocks(page, "yaml"):
        given = yaml.safe_load(block)
        kind, preset = (TokenizerConfig, "tokenizer/tiny") if "stages" in given else (DiffusionConfig, "diffusion/tiny")
        values = load_yaml(preset)
        for key, value in given.items():  # a block shows some keys of a section; the preset has the others
            section = values.get(key)
            values[key] = {**section, **value} if isinstance(section, dict) and isinstance(value, dict) else value
        build(kind, complete(kind, values), page.name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_and_anchor_of_a_page_resolves(page):
    text = FENCE.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", FENCE.sub("", file.read_text()), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, target


def test_every_page_stands_in_the_index_and_every_block_has_a_known_language():
    index = (ROOT / "docs/README.md").read_text()
    for page in PAGES[1:]:
        if page != ROOT / "docs/README.md":
            assert f"({page.relative_to(ROOT / 'docs')})" in index, page
    for page in PAGES:
        assert {language for _, language, _ in FENCE.findall(page.read_text())} <= {"", "python", "yaml", "text"}, page


@pytest.fixture
def folder(pipe, tmp_path, monkeypatch):  # noqa: F811
    """A folder with the paths that the pages name: tiny pipelines, adapters, the checkpoints and a CLIP model."""
    own = like(pipe)
    own.save_pretrained(tmp_path / "runs/discs/pipeline")
    own.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    ProMAGPipeline.save_lora_weights(tmp_path / "runs/c/lora", get_peft_model_state_dict(own.transformer))
    os.symlink(ROOT / "checkpoints", tmp_path / "checkpoints")
    write_video(tmp_path / "video.mp4", generate_clip(0, "train", 17, 32)[0], 8)
    TinyDecoder(width=8, layers=1).save_pretrained(tmp_path / "runs/tiny-decoder/tiny_decoder")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_blocks(page: str, names: dict, pipeline: str = "checkpoints/tiny-video") -> dict:
    """Run the Python blocks of a page in order, on the given pipeline; without a GPU, only compile those that need one."""
    for number, block in enumerate(blocks(ROOT / page, "python")):
        code = compile(block.replace("checkpoints/tiny-video", pipeline), f"block {number} of {page}", "exec")
        if not block.startswith("# needs a GPU") or torch.cuda.is_available():
            exec(code, names)
    return names


def test_the_blocks_of_the_pipelines_page_run(folder):
    assert len(blocks(ROOT / "docs/reference/pipeline.md", "python")) == 15
    names = run_blocks("docs/reference/pipeline.md", {}, pipeline="runs/discs/pipeline")
    assert (folder / "disc.mp4").stat().st_size > 0
    assert names["cheap"].shape == names["close"].shape == (1, 33, 16, 24, 3)
    options = {"latents": names["noise"], "num_frames": 33, "num_inference_steps": 30, "output_type": "pt"}
    expected = names["pipe"]("a red disc moves left", **options).frames
    assert torch.allclose(names["own"], expected, atol=1e-3)


def test_the_blocks_of_the_tokenizers_page_run(folder):
    chunks = torch.rand(1, 3, 33, 32, 32).split([17, 16], dim=2)
    names = run_blocks("docs/reference/tokenizer.md", {"chunks": chunks})
    clip = names["clip"]
    assert clip.min() >= -1
    assert clip.max() <= 1
    assert names["video"].shape == names["result"].sample.shape == clip.shape == (1, 3, 17, 32, 32)
    whole = names["tokenizer"].encode(torch.cat(chunks, 2), temporal_ratio=16).latent_dist.mode()
    assert torch.allclose(names["posterior"].mode(), whole[:, :, 2:], atol=1e-4)
    assert names["preview"].shape == clip.shape


def test_the_blocks_about_conditioning_frames_and_adapters_run(folder, pipe):  # noqa: F811
    own = like(pipe)
    own.set_progress_bar_config(disable=True)
    asked = []

    def sample(prompt, **options):
        asked.append(options)
        return own(prompt, **options, num_frames=33, num_inference_steps=1)

    given = {"picture": Image.new("RGB", (24, 16)), "frames": torch.zeros(17, 3, 16, 24)}
    sample.load_lora_weights = own.load_lora_weights
    run_blocks("docs/how-to/train-text-to-video.md", {"pipe": sample, **given})
    assert [next(iter(options)) for options in asked] == ["image", "video", "attention_kwargs"]


def test_the_score_of_the_sampling_page_runs(folder):
    clip = write_openclip(folder / "clip", OPEN_CLIP)
    (block,) = blocks(ROOT / "docs/how-to/sample.md", "python")
    names = {"video": np.zeros((3, 32, 32, 3), np.uint8)}
    exec(block.replace('"path/to/clip"', f'"open_clip:local-dir:{clip}"').replace("\nscore(", "\nresult = score("), names)
    assert -1 <= names["result"] <= 1


def test_the_blocks_of_the_readme_run(folder):
    names = run_blocks("README.md", {})
    assert names["frames"].shape == (33, 64, 64, 3)
    assert names["latent"].shape == (1, 16, 5, 8, 8)


def test_the_block_that_needs_published_weights_compiles():
    (block,) = blocks(ROOT / "docs/existing_models.md", "python")
    compile(block, "the block of docs/existing_models.md", "exec")


def test_no_page_has_python_that_no_test_runs():
    run = {"README.md", "docs/reference/pipeline.md", "docs/reference/tokenizer.md", "docs/how-to/sample.md"}
    run |= {"docs/how-to/train-text-to-video.md", "docs/existing_models.md"}
    assert {str(page.relative_to(ROOT)) for page in PAGES if blocks(page, "python")} <= run


def test_the_commands_that_prepare_clips_run(tmp_path, monkeypatch):
    pytest.importorskip("scenedetect", reason="the extra scenes is not installed")
    monkeypatch.chdir(tmp_path)
    rows = ["file,caption,split"]
    Path("folder").mkdir()
    for number, split in enumerate(("train", "train", "eval")):
        write_video(f"folder/{number}.mp4", generate_clip(number, "train", 5, 32)[0], 8)
        rows.append(f"folder/{number}.mp4,a moving shape,{split}")
    Path("videos.csv").write_text("\n".join(rows))
    Path("films.tsv").write_text("\n".join(rows).replace(",", "\t").replace("file\tcaption", "clip\tlong_text"))
    write_video("films/film.mp4", np.concatenate([moving(50, 1), moving(44, 2)]), 20)
    ran = []
    for words in commands(ROOT / "docs/how-to/prepare-clips.md"):
        if words[0] == "promag" and "--out" in words and words[:3] != ["promag", "shards", "index"]:
            importlib.import_module(f"promag.scripts.{words[1].replace('-', '_')}").main(words[2:])
            ran.append(words[1])
    assert ran == [*["prepare-clips"] * 4, "shards", *["prepare-clips"] * 3]
    assert len(Path("clips-eval.jsonl").read_text().splitlines()) == 1
    (shard,) = (json.loads(line) for line in Path("shards/shards.jsonl").read_text().splitlines())
    assert shard["samples"] == 3
