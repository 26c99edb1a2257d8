"""The import law: each subpackage imports only itself and those named before it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# The one place that knows the order; setup.py, pyright and the editors' modules take the folders as they find them.
SUBPACKAGES = ("configs", "training", "data", "tokenizer", "diffusion", "pipelines", "evaluation", "reports", "demo", "scripts")
FILES = [path for name in SUBPACKAGES for path in sorted((ROOT / name).rglob("*.py"))]


def subpackage_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


def imports(path: Path) -> set[str]:
    """Return the absolute dotted names that a file imports anywhere; relative imports become promag.*."""
    package = ["promag", *path.relative_to(ROOT).parent.parts]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def test_every_subpackage_has_its_place_in_the_order():
    folders = {init.parent.name for init in ROOT.glob("*/__init__.py")} - {"promag", "tests"}
    assert folders == set(SUBPACKAGES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_subpackages_import_only_those_below_them(path):
    imported = {name.split(".")[1] for name in imports(path) if name.startswith("promag.")} & set(SUBPACKAGES)
    assert imported <= set(SUBPACKAGES[: SUBPACKAGES.index(subpackage_of(path)) + 1])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_subpackages_are_imported_by_the_packages_name(path):
    assert not set(SUBPACKAGES) & {name.split(".")[0] for name in imports(path)}


def test_diffusion_imports_only_geometry_from_the_tokenizer():
    for path in sorted((ROOT / "diffusion").glob("*.py")):
        taken = {n for n in imports(path) if n.startswith("promag.tokenizer")}
        assert all(name in ("promag.tokenizer",) or name.startswith("promag.tokenizer.geometry") for name in taken), path


def test_only_the_video_subpackage_imports_a_decoder():
    users = [path for path in FILES if {"av", "decord"} & {name.split(".")[0] for name in imports(path)}]
    assert {str(p.parent.relative_to(ROOT)) for p in users} == {"data/video"}


def test_only_multi_process_modules_import_accelerate():
    users = {f"{p.parent.name}/{p.name}" for p in FILES if "accelerate" in {n.split(".")[0] for n in imports(p)}}
    engine = {f"training/{name}.py" for name in ("loop", "processes", "sending", "skipping")}
    assert users <= engine | {"tokenizer/train.py", "diffusion/train.py", "diffusion/validation.py"}


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_importing_promag_is_light_and_public_names_are_loaded_on_first_use_and_registered_with_diffusers():
    code = (
        "import sys, promag; print('torch' in sys.modules, 'diffusers' in sys.modules)\n"
        "promag.write_video; print('diffusers' in sys.modules)\n"
        "import diffusers; print(all(getattr(diffusers, n) is getattr(promag, n) for n in promag._CLASSES))\n"
        "print(*(getattr(promag, n).__name__ for n in promag.__all__))"
    )
    light, first, registered, names = run_python(code).splitlines()
    assert (light, first, registered) == ("False False", "False", "True")
    assert {"load_pipeline", "load_tokenizer", "sample_flow", "sample_videos", "write_video", "ProMAGPipeline"} <= {
        *names.split()
    }


def test_promag_after_diffusers_registers_too():
    code = "import diffusers, promag; print(diffusers.TinyDecoder is promag.TinyDecoder)"
    assert run_python(code).split() == ["True"]


def test_git_has_no_symbolic_links():
    listed = subprocess.run(["git", "ls-files", "-s"], capture_output=True, text=True, cwd=ROOT)
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert not [line for line in listed.stdout.splitlines() if line.startswith("120000")]
