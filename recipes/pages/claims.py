"""
Render docs/claims.md, the paper's claims beside what was measured, from a template and the results of the cards.

    PYTHONPATH=recipes python -m pages.claims

In claims_template.md, `{cifar10_methods[decisions][per route 75%][bal. acc.]}` stands for a cell: that of the column
`bal. acc.` in the line of `per route` at 75 %, in the table `decisions` of model_cards/cifar10_methods.md.
"""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

from shared.report import cell

from .card import MODEL_CARDS, is_table


TEMPLATE = Path(__file__).with_name("claims_template.md")
CLAIMS = MODEL_CARDS.parent / "docs" / "claims.md"
# The columns whose cells name a line, in the order in which they are joined.
LABELS = (
    *("scope", "seed", "what", "image", "method", "RTL minus", "densities of", "masks", "planted", "of all positions"),
    *("sparsity", "learning rate"),
)


def main() -> None:
    CLAIMS.write_text(render())


def render() -> str:
    """The text of docs/claims.md."""
    template = TEMPLATE.read_text()
    fields = [name for _, name, _, _ in string.Formatter().parse(template) if name]
    cards = sorted({field.partition("[")[0] for field in fields})
    return template.format(**{card: card_tables(card) for card in cards})


def card_tables(card: str) -> dict[str, Any]:
    """The results of a card, in which every table is a mapping: name of a line -> column -> cell as shown."""
    results = json.loads((MODEL_CARDS / f"{card}-results.json").read_text())
    return {name: named_lines(value) if is_table(value) else value for name, value in results.items()}


def named_lines(table: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Name -> line. A name joins the cells of LABELS by spaces. Lines that share a name are left out."""
    shown = [{title: cell(title, value) for title, value in line.items()} for line in table]
    names = [" ".join(line[title] for title in LABELS if line.get(title)) for line in shown]
    return {name: line for name, line in zip(names, shown, strict=True) if names.count(name) == 1}


if __name__ == "__main__":
    main()
