"""
Render docs/benchmarks.md and its picture from a template and model_cards/benchmarks-results.json.

    PYTHONPATH=recipes python -m pages.benchmarks

The results are those of a whole run of the benchmarks, `make bench`. Every number of the page comes from them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hf_rtl.plots import save_png
from shared.report import table

from .card import MODEL_CARDS, is_table, keep_picture


RESULTS = MODEL_CARDS / "benchmarks-results.json"
TEMPLATE = Path(__file__).with_name("benchmarks_template.md")
PAGE = MODEL_CARDS.parent / "docs" / "benchmarks.md"
PICTURE = MODEL_CARDS / "benchmarks-ratios.png"


def main() -> None:
    results = json.loads(RESULTS.read_text())
    PAGE.write_text(render(results))
    draw(results["figures"], PICTURE)


def render(results: dict[str, Any]) -> str:
    """The text of docs/benchmarks.md."""
    texts = {name: table(lines, style="github") for name, lines in results.items() if is_table(lines)}
    parts: dict[str, list[dict[str, Any]]] = {}
    for line in results["figures"]:
        parts.setdefault(line["part"], []).append({title: cell for title, cell in line.items() if title != "part"})
    aims = [line for line in results["figures"] if line["aim"] is not None]
    missed = [line["figure"] for line in aims if line["result"] == "missed"]
    return TEMPLATE.read_text().format(
        **{**results, **texts},
        parts={part: table(lines, style="github") for part, lines in parts.items()},
        num_aims=len(aims),
        num_met=len(aims) - len(missed),
        missed="; ".join(missed) or "none",
    )


def draw(figures: list[dict[str, Any]], file: Path) -> None:
    """Draws a bar for each ratio that has an aim, which is a line across it. Bars of missed aims are hatched."""
    lines = [line for line in figures if line["aim"] is not None and line["ratio"] is not None]
    picture = Figure(figsize=(9, 1 + 0.24 * len(lines)))
    axes = picture.subplots()
    for place, line in enumerate(lines):
        met = line["result"] == "met"
        axes.barh(
            place, line["ratio"], color="0.75" if met else "white", edgecolor="0.25", hatch="" if met else "////"
        )
        axes.vlines(line["aim"], place - 0.45, place + 0.45, color="black", linewidth=2.5)
    axes.set_yticks(range(len(lines)), [f"{line['figure']} / {line['against']}" for line in lines], fontsize="x-small")
    axes.invert_yaxis()
    axes.set_xlabel("ratio to the rival\nthe line is the aim, hatched bars miss it", fontsize="small")
    axes.margins(y=0.02)
    axes.grid(axis="x", alpha=0.3)
    picture.tight_layout()
    save_png(picture, file)
    keep_picture(file, file)


if __name__ == "__main__":
    main()
