"""Checks of single arguments: each error names the argument, the given value and what is allowed."""

from __future__ import annotations

import numbers
from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path
from typing import Any


def check_choice(name: str, value: Any, allowed: Collection[str]) -> None:
    """Raises `ValueError` unless `value` is among the allowed names."""
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}, got {value!r}.")


def check_integer(name: str, value: Any, *, minimum: int | None = None) -> int:
    """`value` as an `int`. Raises `TypeError` for another type, also `bool`, and `ValueError` below `minimum`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"`{name}` must be an int, got {value!r}, a `{type(value).__name__}`.")
    if minimum is not None and value < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}, got {value}.")
    return int(value)


def check_number(name: str, value: Any) -> float:
    """`value` as a `float`. Raises `TypeError` unless it is a real number, and for `bool`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` must be a number, got {value!r}, a `{type(value).__name__}`.")
    return float(value)


def folders_beside(name: str) -> str:
    """What lies beside a folder that is not there, for an error; "" if the name can be that of a repository alone."""
    path = Path(name).expanduser()
    if path.exists() or len(path.parts) < 2 or not path.parent.is_dir():
        return ""
    beside = sorted(other.name for other in path.parent.iterdir())
    close = get_close_matches(path.name, beside, n=3) or beside[:3]
    return f"{name!r} is no folder; {str(path.parent)!r} has {', '.join(map(repr, close)) or 'nothing in it'}"
