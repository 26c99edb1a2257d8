"""Progress on stderr: a bar on a terminal, occasional plain lines in a file."""

import sys
import time
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 30.0  # time between two lines in a file
LINE = "{desc}: {n_fmt}/{total_fmt} {unit}s in {elapsed}, {remaining} to go{postfix}"


class ProgressBar(tqdm):
    """tqdm's bar on a terminal; otherwise one line every LINE_SECONDS and one at the end.

    Args:
        iterable: iterable to wrap; None for a bar that `update` advances.
        desc: description of the work.
        unit: name of one item, in the singular.
        options: other options of tqdm: total, initial, disable.
    """

    def __init__(self, iterable: Any = None, *, desc: str, unit: str, **options: Any):
        self.plain = not sys.stderr.isatty()
        self.line_at = time.monotonic()
        if self.plain:
            options["bar_format"] = LINE
        super().__init__(iterable, desc=desc, unit=unit, file=sys.stderr, mininterval=2, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool | None:
        """Draw the bar, or print a line if one is due."""
        if not self.plain:
            return super().display(msg, pos)
        if time.monotonic() - self.line_at >= LINE_SECONDS:
            self._print_line()
        return True

    def clear(self, *arguments: Any, **options: Any) -> None:
        """Remove the bar from the terminal; lines stay."""
        if not self.plain:
            super().clear(*arguments, **options)

    def close(self) -> None:
        """Draw the bar, or print a line, for the last time."""
        if self.disable or not self.plain:
            super().close()
            return
        self.disable = True
        self._decr_instances(self)  # pyright: ignore[reportAttributeAccessIssue] (tqdm has no stubs for it)
        if self.n != self.initial:
            self._print_line()

    def _print_line(self) -> None:
        self.line_at = time.monotonic()
        print(self, file=sys.stderr, flush=True)
