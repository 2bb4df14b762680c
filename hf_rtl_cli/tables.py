"""Text for people: tables that fit the terminal, bars, and numbers to be read."""

from __future__ import annotations

import math
import shutil
import textwrap
from collections.abc import Sequence

from tabulate import tabulate
from wcwidth import wcswidth


CUT, FULL, PARTLY, EMPTY = "…", "█", "▒", "░"
# What stands for them where the output's encoding lacks them, replaced in this order.
_PLAIN = {f"{CUT} and": "... and", CUT: "~", FULL: "#", PARTLY: "=", EMPTY: "-"}


def terminal_width() -> int:
    """Columns to write in: those of the terminal, within 60 and 160; 80 if there is none."""
    return min(max(shutil.get_terminal_size().columns, 60), 160)


def encodable(text: str, encoding: str) -> str:
    """`text` as `encoding` can say it: plain characters for blocks that it lacks, escapes for all else."""
    try:
        text.encode(encoding)
        return text
    except UnicodeEncodeError:
        for character, plain in _PLAIN.items():
            text = text.replace(character, plain)
        return text.encode(encoding, "backslashreplace").decode(encoding)


def printable(name: str) -> str:
    """A name out of somebody's file, where nothing is left that would move the cursor or end the line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def shortened(text: str, width: int, *, keep_start: bool = True) -> str:
    """`text` in at most `width` columns, without its middle or, unless `keep_start`, without its start."""
    if wcswidth(text) <= width:
        return text
    head = _fitting(text, (width - 1) // 2 if keep_start else 0)
    tail = _fitting(text[::-1], width - 1 - wcswidth(head))[::-1]
    return f"{head}{CUT}{tail}"


def wrapped(text: str) -> str:
    """A paragraph in lines that fit the terminal."""
    return textwrap.fill(text, terminal_width())


def listing(
    title: str, headers: Sequence[str], rows: Sequence[Sequence[str]], num_hidden: int, *, note: str = ""
) -> str:
    """A table under its title, and how many lines are hidden, with a `note` on these. The ends of names are kept."""
    return "\n".join([wrapped(title), table(headers, rows, keep_start=False), *more(num_hidden, note)])


def table(
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    width: int | None = None,
    keep_start: bool = True,
    num_words: int = 1,
) -> str:
    """
    Rows under their headers: the first `num_words` columns and those without a header to the left, the others,
    numbers, to the right. If all is wider than `width`, by default the terminal, the first column is shortened, as
    `shortened` does with `keep_start`.
    """
    width = width or terminal_width()
    lines = [list(headers), *map(list, rows)]
    widths = [max(map(wcswidth, column)) for column in zip(*lines, strict=True)]
    widths[0] = min(widths[0], max(8, width - sum(widths[1:]) - 2 * len(widths[1:])))
    for line in lines:
        line[0] = shortened(line[0], widths[0], keep_start=keep_start)
    lines.insert(1, ["-" * size for size in widths])
    aligned = ["right" if number >= num_words and header else "left" for number, header in enumerate(headers)]
    # The headers are a row like the others: `tabulate` makes a column two wider than a header of its own.
    return tabulate(lines, tablefmt="plain", colalign=aligned, disable_numparse=True)


def key_values(values: dict[str, str]) -> str:
    """A line for each, the values one under the other."""
    return tabulate(values.items(), tablefmt="plain", disable_numparse=True)


def bar(low: float, high: float, size: int) -> str:
    """`size` columns that stand for 0 to 1: full up to `low`, half full up to `high`. Only 0 and 1 look as these."""
    full, partly = _cells(low, size), _cells(high, size)
    return FULL * full + PARTLY * (partly - full) + EMPTY * (size - partly)


def fraction(value: float | None, digits: int = 3) -> str:
    """A number up to 1, where none above 0 looks like 0 and none below 1 like 1; a dash for what is undefined."""
    if value is None:
        return "-"
    smallest = 10**-digits
    if value > 0 == round(value, digits):
        return f"<{smallest:.{digits}f}".replace("0.", ".")
    if value < 1 == round(value, digits):
        return f">{1 - smallest:.{digits}f}".replace("0.", ".")
    return f"{value:.{digits}f}"


def more(num_hidden: int, note: str = "") -> list[str]:
    """The line under a list that is cut, if it is."""
    return [f"{CUT} and {num_hidden:,} more{note}; --all shows them"] if num_hidden > 0 else []


def _fitting(text: str, width: int) -> str:
    """The longest start of `text` in `width` columns."""
    for end in range(len(text)):
        if wcswidth(text[: end + 1]) > width:
            return text[:end]
    return text


def _cells(value: float, size: int) -> int:
    return min(max(math.ceil(value), round(value * size)), size - 1 if value < 1 else size)
