"""The ways to obtain promag: a zip of the repository, a checkout without links, and three kinds of installation.

All are made from the working tree as git would archive it, once for all test processes.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
BIN = "Scripts" if os.name == "nt" else "bin"
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
ENVIRONMENT.pop("PYTHONPATH", None)
PIP_OPTIONS = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index")


@dataclass(frozen=True)
class Place:
    """One way to obtain promag."""

    root: Path  # promag.tokenizer.layers is root/tokenizer/layers.py
    python: Path
    folder: Path  # working directory of Python
    path: str = ""  # PYTHONPATH

    def run(self, *arguments: str | Path) -> str:
        """Run a command by this Python and return its output; raise AssertionError with its errors if it fails."""
        environment = ENVIRONMENT | ({"PYTHONPATH": self.path} if self.path else {})
        return run(self.python, *arguments, cwd=self.folder, env=environment)


def run(*command: str | Path, cwd: Path = ROOT, env: dict[str, str] = ENVIRONMENT) -> str:
    """Return the output of a command; raise AssertionError with its errors if it fails."""
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Callable[[str, Callable[[Path], None]], Path]:
    """Create a folder once for all processes of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def make_once(name: str, make: Callable[[Path], None]) -> Path:
        folder, done = base / name, base / f"{name}.done"
        with FileLock(base / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # left over from a failed call
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return make_once


@pytest.fixture(scope="session")
def archives(once) -> Path:
    """zip/, unpacked from git's archive, and checkout/, written by git with core.symlinks=false."""

    def make(folder: Path) -> None:
        if shutil.which("git") is None or not (ROOT / ".git").exists():
            pytest.skip("not a git checkout")
        index = {**ENVIRONMENT, "GIT_INDEX_FILE": str(folder / "index")}  # the working tree, committed or not
        run("git", "add", "--all", env=index)
        tree = run("git", "write-tree", env=index).strip()
        run("git", "archive", "--format=zip", "-0", "-o", folder / "promag.zip", tree)
        with zipfile.ZipFile(folder / "promag.zip") as file:
            file.extractall(folder / "zip")
        run("git", "-c", "core.symlinks=false", "checkout-index", "--all", f"--prefix={folder / 'checkout'}/", env=index)

    return once("archives", make)


@pytest.fixture(scope="session")
def installs(once, archives) -> Path:
    """target/, a folder that pip installed the tree into; wheels/; wheel/, an environment with the wheel; and in the
    unpacked zip .venv/, an environment with an editable install of it.

    The environments see the libraries that the tests run with, and no other promag.
    """

    def make(folder: Path) -> None:
        tree = archives / "zip"
        run(sys.executable, "-m", "pip", "install", *PIP_OPTIONS, "--target", folder / "target", tree)
        run(sys.executable, "-m", "pip", "wheel", *PIP_OPTIONS, "--wheel-dir", folder / "wheels", tree)
        (wheel,) = (folder / "wheels").iterdir()
        for place, what in ((folder / "wheel", [wheel]), (tree / ".venv", ["--editable", tree])):
            python = make_environment(place)
            run(sys.executable, "-m", "pip", "--python", python, "install", *PIP_OPTIONS, *what)

    return once("installs", make)


def make_environment(folder: Path) -> Path:
    """Create an empty environment that sees the libraries of this one; return its Python."""
    venv.create(folder, with_pip=False)
    libraries = Path(sysconfig.get_path("purelib"))
    python = folder / BIN / "python"
    place = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # Python searches a folder that is named here, but does not read its .pth files, for example of editable installs.
    lines = [str(libraries), *(f"import {file.stem}" for file in libraries.glob("torchvision_schemas.pth"))]
    (place / "libraries.pth").write_text("\n".join(lines), encoding="utf-8")
    return python


@pytest.fixture(scope="session")
def places(archives, installs, once) -> dict[str, Place]:
    """Every way to obtain promag, by name."""
    empty, this, wheel = once("empty", lambda folder: None), Path(sys.executable), installs / "wheel"
    (site,) = {path.parent for path in wheel.rglob("promag") if path.parent.name == "site-packages"}
    return {
        "zip": Place(archives / "zip", this, archives / "zip"),
        "checkout": Place(archives / "checkout", this, archives / "checkout"),
        "target": Place(installs / "target" / "promag", this, empty, path=str(installs / "target")),
        "wheel": Place(site / "promag", wheel / BIN / "python", empty),
        "editable": Place(archives / "zip", archives / "zip" / ".venv" / BIN / "python", empty),
    }
