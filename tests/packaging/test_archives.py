"""However promag was obtained, each module comes from one real file, both checkpoints load and sample the same video."""

import json
import os
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from promag import ProMAGPipeline
from promag.tokenizer.config import TokenizerConfig
from promag.training.config import build, load_yaml, plain
from tests.packaging.conftest import ROOT, run

ROOMS = sorted(init.parent.name for init in ROOT.glob("*/__init__.py") if init.parent.name not in ("promag", "tests"))
PROBE = """
import importlib, json, pkgutil, sys
import numpy, torch, promag
from promag import AutoencoderKLProMAG, ProMAGPipeline

checkpoints, out, *rooms = sys.argv[1:]
tokenizer = AutoencoderKLProMAG.from_pretrained(checkpoints + "/tiny")
pipe = ProMAGPipeline.from_pretrained(checkpoints + "/tiny-video")
noise = torch.Generator().manual_seed(0)
numpy.save(out, pipe("a red disc moves left", num_frames=17, num_inference_steps=2, generator=noise).frames[0])

import promag.tokenizer.layers as absolute
from promag.tokenizer import growth, layers
for room in rooms:
    for module in pkgutil.iter_modules(importlib.import_module(f"promag.{room}").__path__):
        importlib.import_module(f"promag.{room}.{module.name}")
modules = {name: module for name, module in sys.modules.items() if getattr(module, "__file__", None)}
print(json.dumps({
    "one module": absolute is layers is sys.modules[growth.CausalConv3d.__module__],
    "one class": AutoencoderKLProMAG is type(pipe.vae) is type(tokenizer),
    "code": layers.CausalConv3d.forward.__code__.co_filename,
    "files": {name: module.__file__ for name, module in modules.items() if name.startswith("promag.")},
    "files of modules": [module.__file__ for module in {id(module): module for module in modules.values()}.values()],
}))
"""
# Run code in a process for each place, forked from one that has imported the libraries: importing them takes seconds.
FORKS = """
import json, os, sys
import diffusers.training_utils, numpy, peft, torch, transformers.modeling_utils

code, *places = json.loads(sys.argv[1])
assert "promag" not in sys.modules
for folder, path, output, arguments in places:
    if not (child := os.fork()):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 1)
        os.chdir(folder)  # sys.path begins with "", as after python -c
        sys.path[1:1] = path  # as PYTHONPATH
        sys.argv = ["-c", *arguments]
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, folder
"""


@pytest.fixture(scope="session")
def expected_video() -> np.ndarray:
    pipe = ProMAGPipeline.from_pretrained(ROOT / "checkpoints" / "tiny-video")
    noise = torch.Generator().manual_seed(0)
    return pipe("a red disc moves left", num_frames=17, num_inference_steps=2, generator=noise).frames[0]


@pytest.fixture
def probed(name, places, archives, once) -> Path:
    """In this folder are NAME.out, what PROBE printed in a place, and NAME.npy, the video that it sampled."""
    checkpoints = str(archives / "checkout" / "checkpoints")
    alike = {other: place for other, place in places.items() if place.python == Path(sys.executable) and hasattr(os, "fork")}

    def fork(folder: Path) -> None:
        given = []
        for other, place in alike.items():
            path, output, video = [place.path] if place.path else [], folder / f"{other}.out", folder / f"{other}.npy"
            given.append([str(place.folder), path, str(output), [checkpoints, str(video)]])
        run(sys.executable, "-c", FORKS, json.dumps([PROBE, *given]), cwd=folder)

    def start(folder: Path) -> None:
        # Importing every module takes seconds: once with the subpackages at the top and once inside the package is enough.
        printed = places[name].run("-c", PROBE, checkpoints, folder / f"{name}.npy", *ROOMS)
        (folder / f"{name}.out").write_text(printed, encoding="utf-8")

    return once("probed", fork) if name in alike else once(f"probed-{name}", start)


@pytest.mark.parametrize("name", ["zip", "checkout", "target", "wheel", "editable"])
def test_promag_imports_real_files_loads_both_checkpoints_and_samples(name, places, probed, expected_video):
    place, rooms = places[name], ROOMS if name in ("editable", "wheel") else []
    report = json.loads((probed / f"{name}.out").read_text(encoding="utf-8").splitlines()[-1])
    video = np.load(probed / f"{name}.npy")
    assert video.shape == (17, 64, 64, 3)
    assert np.abs(video - expected_video).max() < 1e-3
    assert (report["one module"], report["one class"]) == (True, True)
    layers = str(place.root / "tokenizer" / "layers.py")
    assert report["code"] == report["files"]["promag.tokenizer.layers"] == layers  # where a debugger's breakpoint binds
    assert {f"promag.{room}" for room in rooms} <= report["files"].keys()
    assert all(Path(file).is_relative_to(place.root) for file in report["files"].values())
    assert all(Path(file).resolve() == Path(file) for file in report["files"].values())
    counts = Counter(file for file in report["files of modules"] if Path(file).is_relative_to(place.root))
    assert set(counts.values()) == {1}


def test_the_wheel_contains_all_subpackages_and_nothing_else(archives, installs):
    (wheel,) = (installs / "wheels").iterdir()
    kinds = (".py", ".yaml", ".css", ".js", ".html", ".md")
    rooms = [init.parent for init in (archives / "checkout").glob("*/__init__.py") if init.parent.name != "tests"]
    files = [file for room in rooms for file in room.rglob("*") if file.suffix in kinds or file.name == "py.typed"]
    names = {file.relative_to(archives / "checkout").as_posix() for file in files}
    packaged = zipfile.ZipFile(wheel).namelist()
    assert {name for name in packaged if ".dist-info/" not in name} == {
        f"promag/{name.removeprefix('promag/')}" for name in names
    }
    assert {"promag/py.typed", "promag/cli.py", "promag/configs/tokenizer/tiny.yaml", "promag/scripts/sample.py"} <= {*packaged}
    assert not [name for name in packaged if "/tests/" in name or name.endswith(".safetensors")]


def test_an_archive_and_a_checkout_without_links_are_alike(archives):
    listed = [
        {file.relative_to(archives / name).as_posix(): file.stat().st_size for file in (archives / name).rglob("*.*")}
        for name in ("zip", "checkout")
    ]
    assert not [file for file in (archives / "checkout").rglob("*") if file.is_symlink()]
    assert listed[1].items() <= listed[0].items()  # an editable install leaves files in the other


def test_the_wheels_command_works_outside_a_checkout(places):
    place = places["wheel"]
    program = place.python.parent / "promag"
    assert "  sample " in run(program, "--help", cwd=place.folder)
    assert run(program, "prepare-clips", "--help", cwd=place.folder).startswith("usage: promag prepare-clips ")
    printed = yaml.safe_load(run(program, "train-tokenizer", "--config", "tokenizer/tiny", "--print-config", cwd=place.folder))
    assert printed["model"] == plain(build(TokenizerConfig, load_yaml(ROOT / "configs/tokenizer/tiny.yaml"), "tiny"))["model"]
    assert place.run("-m", "promag", "--version") == "promag 0.1.0\n"
    assert run(program, "--version", cwd=place.folder) == "promag 0.1.0\n"
