"""Who imports whom: scripts -> reports -> evaluation -> pipelines -> {diffusion, tokenizer} -> data -> training."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "training": set(),
    "data": {"training"},
    "tokenizer": {"training", "data"},
    "diffusion": {"training", "data", "tokenizer"},
    "pipelines": {"training", "data", "tokenizer", "diffusion"},
    "evaluation": {"training", "data", "tokenizer", "diffusion", "pipelines"},
    "reports": {"training", "data", "tokenizer", "diffusion", "pipelines", "evaluation"},
}
FILES = [path for package in MAY_IMPORT for path in sorted((ROOT / package).glob("*.py"))]


def imports(path: Path) -> set[str]:
    """Absolute dotted names of all that a file imports, wherever in the file; relative ones become promag.*."""
    package = f"promag.{path.parent.name}"
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) + 1 - node.level]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_packages_import_only_what_lies_below_them(path):
    package = path.parent.name
    own = {name.split(".")[1] for name in imports(path) if name.startswith("promag.") and name.count(".")}
    assert own <= MAY_IMPORT[package] | {package}
    assert "scripts" not in own


def test_diffusion_takes_frame_arithmetic_alone_from_the_tokenizer():
    for path in sorted((ROOT / "diffusion").glob("*.py")):
        taken = {n for n in imports(path) if n.startswith("promag.tokenizer")}
        assert all(name in ("promag.tokenizer",) or name.startswith("promag.tokenizer.geometry") for name in taken), path


def test_only_the_video_module_imports_a_decoder():
    users = [p for p in [*FILES, *(ROOT / "scripts").rglob("*.py")] if {"av", "decord"} & {n.split(".")[0] for n in imports(p)}]
    assert [p.name for p in users] == ["video.py"]


def test_only_training_and_the_training_loops_import_accelerate():
    users = {f"{p.parent.name}/{p.name}" for p in FILES if "accelerate" in {n.split(".")[0] for n in imports(p)}}
    assert users <= {"training/loop.py", "tokenizer/train.py", "diffusion/train.py"}


def test_scripts_use_the_public_package_name():
    for path in sorted((ROOT / "scripts").rglob("*.py")):
        assert not {*MAY_IMPORT} & {n.split(".")[0] for n in imports(path)}, path


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_importing_promag_is_light_and_makes_the_classes_known_to_diffusers():
    code = (
        "import sys, promag; print('torch' in sys.modules, 'diffusers' in sys.modules)\n"
        "import diffusers; print(all(getattr(diffusers, n) is getattr(promag, n) for n in promag.__all__))"
    )
    assert run_python(code).split() == ["False", "False", "True"]


def test_promag_after_diffusers_registers_too():
    code = "import diffusers, promag; print(diffusers.ProMAGPipeline is promag.ProMAGPipeline)"
    assert run_python(code).split() == ["True"]


def test_no_link_lies_in_git():
    listed = subprocess.run(["git", "ls-files", "-s"], capture_output=True, text=True, cwd=ROOT)
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert not [line for line in listed.stdout.splitlines() if line.startswith("120000")]
