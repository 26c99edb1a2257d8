"""A case that must end in the right answer or in a ValueError of one line that names what was wrong, and its outcome."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

ANSWERED, REFUSED = "answered", "refused"


@dataclass(frozen=True)
class Case:
    """A call, its description, and the texts of which a refusal's message must contain one."""

    what: str
    call: Callable[[], Any]
    names: tuple[str, ...]


def outcome(case: Case) -> str:
    """Run a case; return ANSWERED, REFUSED, or a description of what is wrong with its result or error."""
    try:
        result = case.call()
    except (ValueError, OSError) as error:
        message = str(error)
        if isinstance(error, UnicodeError) or "\n" in message.strip():
            return f"{type(error).__name__}: {message!r} is not one plain line"
        if not any(_plain(name) in _plain(message) for name in case.names):
            return f"{type(error).__name__}: {message!r} names none of {case.names}"
        return REFUSED
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}: {error}"
    return ANSWERED if all(map(_finite, _leaves(result))) else "the result holds NaN or infinite values"


def _plain(text: str) -> str:
    return text.replace("_", " ").lower()


def _leaves(result: Any) -> list[Any]:
    if isinstance(result, dict):
        result = list(result.values())
    return [leaf for part in result for leaf in _leaves(part)] if isinstance(result, list | tuple) else [result]


def _finite(leaf: Any) -> bool:
    if isinstance(leaf, Tensor):
        return bool(leaf.isfinite().all())
    if isinstance(leaf, np.ndarray):
        return bool(np.isfinite(leaf).all())
    return not isinstance(leaf, float) or math.isfinite(leaf)
