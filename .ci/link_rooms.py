"""Let pyright and editors find the subpackages: link the rooms of the repository to .venv/typing/promag.

Python itself needs no links: promag/__init__.py finds `promag.tokenizer` in tokenizer/, and so on. Static tools do not follow
that.
"""

import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
folder = Path(sys.prefix) / "typing" / "promag"
folder.mkdir(parents=True, exist_ok=True)
rooms = [init.parent for init in root.glob("*/__init__.py") if init.parent.name not in ("promag", "tests")]
for place in [*rooms, *(root / "promag").glob("*.py")]:
    name = place.name
    link = folder / name
    link.unlink(missing_ok=True)
    link.symlink_to(place)
