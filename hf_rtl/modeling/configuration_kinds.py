"""What the fields of a saved configuration may hold, where nothing else would notice another kind of value."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any


def check_kinds(saved: Mapping[str, Any]) -> None:
    """Raises `ValueError` if a field of a saved configuration is of another kind than any version has written."""
    for kind, (holds, names) in _KINDS.items():
        for name in names:
            if saved.get(name) is not None and not holds(saved[name]):
                raise ValueError(f"`{name}` in `config.json` must be {kind}, got {shortened(saved[name])}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _is_list_of(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (list, tuple)) and all(map(holds, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


# What fields of a saved configuration are, of which nothing else checks it.
_KINDS: dict[str, tuple[Callable[[Any], bool], tuple[str, ...]]] = {
    "a string": (_is_text, ("mask_fingerprint", "hf_rtl_version", "router_fallback", "dtype", "compute")),
    "a list of strings": (
        _is_list_of(_is_text),
        ("architectures", "private_parameters", "prune_include", "prune_exclude", "added_routes"),
    ),
    "a number": (_is_number, ("router_threshold",)),
    "a list of numbers": (_is_list_of(_is_number), ("thresholds",)),
    "a number from 0": (lambda value: type(value) is int and value >= 0, ("mask_cache_bytes", "router_features")),
    "a dict": (lambda value: isinstance(value, dict), ("base", "compact", "id2label", "label2id")),
}


def shortened(value: Any) -> str:
    """`value` as Python writes it, or the beginning of that."""
    text = repr(value)
    return text if len(text) < 200 else f"{text[:200]}…"
