"""Let torchvision be imported beside a CPU-only torch: `make setup` runs this file in the environment it has made.

PyPI has torchvision for Linux in CUDA builds alone. Beside a CPU-only torch their compiled operators do not load, and then
`import torchvision` fails as it describes two of them, and with it open_clip, timm and parts of transformers. Run as a script,
this file copies itself into the environment where that is so, with a .pth file that imports it at every start; imported, it
declares both operators when torchvision is about to describe them. They still cannot be called.
"""

import sys
from typing import Any

MISSING = "operator torchvision::nms does not exist"
DESCRIBED = "torchvision._meta_registrations"
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
NAME = "torchvision_schemas"
KEPT: list[Any] = []  # what torch declares is forgotten with the object that declared it


class BeforeTorchvision:
    """Import hook that finds nothing; it only declares the operators in time, where the compiled ones are absent."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Act on the one name that matters, once."""
        if name != DESCRIBED:
            return
        sys.meta_path.remove(self)  # pyright: ignore[reportArgumentType]
        import torch

        if not hasattr(torch.ops.torchvision, "nms"):
            KEPT.append(torch.library.Library("torchvision", "FRAGMENT"))
            for schema in SCHEMAS:
                KEPT[0].define(schema)


def repair() -> None:
    """Install the hook where it is needed; ends with torchvision's own error where something else is wrong with it."""
    if MISSING not in import_error():
        return
    import sysconfig
    from pathlib import Path

    place = Path(sysconfig.get_path("purelib"))
    (place / f"{NAME}.py").write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    (place / f"{NAME}.pth").write_text(f"import {NAME}\n", encoding="utf-8")
    if error := import_error():
        sys.exit(f"torchvision cannot be imported: {error}")
    print("torchvision is a CUDA build beside a CPU-only torch: its operators are declared at import, not usable")


def import_error() -> str:
    """Return what importing torchvision says in a process of its own; empty where it works or is not installed."""
    # Modules are imported where they are needed: this file is loaded whenever the environment's Python starts.
    import subprocess

    code = "import importlib.util as u; u.find_spec('torchvision') and __import__('torchvision')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return done.stderr if done.returncode else ""


if __name__ == "__main__":
    repair()
else:
    sys.meta_path.insert(0, BeforeTorchvision())  # pyright: ignore[reportArgumentType]
