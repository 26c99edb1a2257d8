"""Run the tests with the lowest or the newest versions of all dependencies that pyproject.toml allows.

python -m promag.scripts.reliability.versions lowest --record docs/results/reliability.jsonl

The versions are chosen by uv, which must be on the PATH, and installed into a folder that is removed afterwards. `--pin` holds
packages whose lowest version cannot be had for this machine, such as torch where only one build for CPUs is there.
"""

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from promag.scripts._options import check_writable, share
from promag.training.command_line import Parser, run_main
from promag.training.config import UserError
from promag.training.run import append_result

RESOLUTIONS = {"lowest": "lowest-direct", "newest": "highest"}


def main(argv: Sequence[str]) -> int:
    """Print the versions and the tests' closing line; return 1 where a test failed."""
    parser = Parser(__doc__)
    parser.add_argument("which", choices=list(RESOLUTIONS), help="versions to install, of those that pyproject.toml allows")
    parser.add_argument("--pin", nargs="*", default=[], metavar="NAME==VERSION", help="versions to hold")
    parser.add_argument("--pytest", nargs="*", default=["-n", "2"], metavar="OPTION", help="options of pytest")
    share(parser, "--record", "--note")
    arguments = parser.parse_args(argv)
    check_writable("--record", arguments.record, appended=True)
    if not (Path("pyproject.toml").is_file() and Path("tests").is_dir()):
        raise UserError("start this in the root of a checkout, where pyproject.toml and tests lie")
    if shutil.which("uv") is None:
        raise UserError("uv is not on the PATH: pip install uv")
    with tempfile.TemporaryDirectory() as folder:
        python = install(Path(folder), arguments.which, arguments.pin)
        versions = installed(python)
        print(", ".join(f"{name} {version}" for name, version in versions.items()))
        started = time.perf_counter()
        command = [str(python), "-m", "pytest", *arguments.pytest]
        run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        seconds = time.perf_counter() - started
    print(run.stdout[-3000:])
    counts = {name: int(count) for count, name in re.findall(r"(\d+) (passed|failed|skipped|error)", run.stdout[-500:])}
    if arguments.record:
        figures = {"resolution": arguments.which, "pinned": arguments.pin, **counts, "seconds": round(seconds)}
        line = {"what": "dependencies", **figures, "installed": versions, "note": arguments.note}
        append_result(arguments.record, line)
    return 0 if run.returncode == 0 else 1


def install(folder: Path, which: str, pins: Sequence[str]) -> Path:
    """Install the checkout with its tests' dependencies into a new environment in `folder`; return its Python."""
    python = folder / "venv" / "bin" / "python"
    (folder / "pins.txt").write_text("\n".join(pins), encoding="utf-8")
    _call(["uv", "venv", "--quiet", "--seed", str(folder / "venv")])
    options = ["--quiet", "--python", str(python), "--resolution", RESOLUTIONS[which], "--constraint", str(folder / "pins.txt")]
    _call(["uv", "pip", "install", *options, "--editable", ".[dev]"])
    _call([str(python), ".ci/torchvision_schemas.py"])
    return python


def installed(python: Path) -> dict[str, str]:
    """Return the versions of the packages that pyproject.toml names."""
    listed = json.loads(_call(["uv", "pip", "list", "--quiet", "--format", "json", "--python", str(python)]))
    text = Path("pyproject.toml").read_text(encoding="utf-8")
    named = {name.lower().replace("_", "-") for name in re.findall(r'"([A-Za-z_][\w-]*)\[?[^"]*[=<>]', text)}
    return {row["name"]: row["version"] for row in listed if row["name"] in named}


def _call(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command[:4])} ...: {done.stderr.strip()[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    raise SystemExit(run_main(main))
