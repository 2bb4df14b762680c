"""Pieces of Markdown that show their arguments literally."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from ..modeling.footprint import human_bytes


UNKNOWN = "–"
_SPACE = "\N{NO-BREAK SPACE}"


def text(value: str, *, limit: int = 40) -> str:
    """`value` on one line, escaped so that no Markdown, HTML or mathematics is read; cut to `limit` characters."""
    line = " ".join(value.split()) or repr(value)
    if len(line) > limit:
        line = f"{line[: limit - 1]}…"
    return re.sub(r"([\\`*_\[\]<>|~$&])", r"\\\1", line)


def table(titles: Sequence[str], rows: Sequence[Sequence[str]], *, num_left: int = 1) -> str:
    """A table of Markdown cells. The first `num_left` columns are aligned left, the others right."""
    marks = [":---" if column < num_left else "---:" for column in range(len(titles))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (titles, marks, *rows))


def fenced(code: str, language: str) -> str:
    """A fenced block of `code`, which may itself contain a fence."""
    longest = max(map(len, re.findall(r"`{3,}", code)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{code.strip()}\n{fence}"


def number(value: float | None) -> str:
    """A number with three decimals, for a metric or a loss."""
    return UNKNOWN if value is None else f"{value:.3f}"


def span(counts: Collection[int]) -> str:
    """One count, or the least and the greatest of several."""
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def percent(fraction: float) -> str:
    """A fraction in percent, with one decimal; below 1 % with two significant digits."""
    figure = f"{100 * fraction:.1f}" if fraction >= 0.01 or fraction == 0 else f"{100 * fraction:.2g}"
    return f"{figure}{_SPACE}%"


def size(num_bytes: int) -> str:
    """Bytes in readable units, powers of 1000."""
    return human_bytes(num_bytes).replace(" ", _SPACE)
