"""Let pyright and editors find the subpackages: link the rooms of the repository to .venv/typing/promag.

Python itself needs no links: the editable install maps `promag.tokenizer` to tokenizer/, and so on (pyproject.toml). Static
tools do not follow that mapping.
"""

import sys
import tomllib
from pathlib import Path

root = Path(__file__).resolve().parent.parent
rooms = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
folder = Path(sys.prefix) / "typing" / "promag"
folder.mkdir(parents=True, exist_ok=True)
places = {package.split(".")[1]: root / place for package, place in rooms.items() if package.count(".") == 1}
for name, place in {**places, "__init__.py": root / "promag" / "__init__.py"}.items():
    link = folder / name
    link.unlink(missing_ok=True)
    link.symlink_to(place)
