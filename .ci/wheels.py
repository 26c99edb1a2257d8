"""Download the wheels that a machine with PyTorch alone needs for `make gpu`: what this environment has, without PyTorch.

python .ci/wheels.py FOLDER [--python VERSION] [--have FILE]

They are the core dependencies of pyproject.toml and pytest with all that these need, at the versions installed here, for Linux
on x86-64. Packages that come with PyTorch are left out, numpy excepted, and those that FILE names, what `pip list
--format=freeze` prints on that machine; check that their versions suit pyproject.toml. Needs a network.
"""

import argparse
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ["pytest", "hypothesis"]
LEFT_OUT = {
    "torch",
    "torchvision",
    "sympy",
    "mpmath",
    "networkx",
    "setuptools",
    "hf-xet",
}  # PyTorch's own, or without use offline


def name_of(requirement: str) -> str:
    """Return the normalised name of a requirement; "" where it is for another platform or an extra."""
    name, _, marker = requirement.partition(";")
    if "extra ==" in marker or "win32" in marker.replace('sys_platform != "win32"', "") or "python_version <" in marker:
        return ""
    return re.sub(r"[-_.]+", "-", re.split(r"[\s\[<>=!~(;@]", name.strip())[0]).lower()


def closure(names: list[str], have: set[str]) -> dict[str, str]:
    """Return the installed version of each package that is not in `have`, and of all that they require here."""
    versions: dict[str, str] = {}
    todo = list(names)
    while todo:
        name = todo.pop()
        if not name or name in have or name in versions:
            continue
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue  # for another platform, or optional
        todo += map(name_of, requires(name) or [])
    return versions


def main() -> None:
    """Download the wheels, and print how large they are together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="version of Python there")
    parser.add_argument("--have", type=Path, help="file with the names of packages that are there")
    arguments = parser.parse_args()
    folder, lines = arguments.folder, arguments.have.read_text(encoding="utf-8").splitlines() if arguments.have else []
    have = LEFT_OUT | set(map(name_of, lines))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = closure([*map(name_of, project["dependencies"]), *TOOLS], have)
    target = ["--dest", str(folder), "--no-deps", "--only-binary", ":all:", "--python-version", arguments.python]
    platforms = [f"--platform={name}" for name in ("manylinux2014_x86_64", "manylinux_2_28_x86_64", "linux_x86_64")]
    pins = [f"{name}=={number}" for name, number in sorted(wanted.items())]
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", *target, *platforms, *pins], check=True)
    wheels = list(folder.glob("*.whl"))
    print(f"{folder}: {len(wheels)} wheels, {sum(wheel.stat().st_size for wheel in wheels) / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
