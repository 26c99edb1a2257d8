"""Let pyright and editors find promag's subpackages: write .venv/typing/promag, a module there for each one of the rooms.

Python needs none of it: promag/__init__.py finds `promag.tokenizer` in tokenizer/. Static tools do not follow that. Each module
written here, promag/tokenizer/geometry.py for example, imports all names of the real one, here tokenizer.geometry: "go to
definition" then leads to the real file, where a link in its place would lead to the link. `make lint` writes them anew.
"""

import shutil
import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
folder = Path(sys.prefix) / "typing"
shutil.rmtree(folder, ignore_errors=True)
rooms = [init.parent for init in root.glob("*/__init__.py") if init.parent.name not in ("promag", "tests")]
for path in (path for room in rooms for path in room.rglob("*.py")):
    place = path.relative_to(root)
    module = ".".join(part for part in place.with_suffix("").parts if part != "__init__")
    (folder / "promag" / place).parent.mkdir(parents=True, exist_ok=True)
    (folder / "promag" / place).write_text(f"from {module} import *\n", encoding="utf-8")
(folder / "promag" / "__init__.py").touch()
