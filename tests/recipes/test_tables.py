"""The tables of recipes, and pictures of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from shared import plots
from shared.report import over_seeds


def test_tables_are_summarised_over_seeds() -> None:
    tables = [
        [{"method": "shared", "sparsity": 0.5, "K-way acc.": accuracy, "union": union, "cal. b.a.": None}]
        for accuracy, union in ((0.5, 10), (0.7, 21))
    ]
    # (0.7 - 0.5) / √2, with one degree of freedom.
    summary = {"method": "shared", "sparsity": 0.5, "K-way acc.": "0.600 ± 0.141", "union": 16, "cal. b.a.": None}
    assert over_seeds(tables) == [summary]
    assert over_seeds(tables[:1])[0]["K-way acc."] == "0.500"
    # For example, a correlation over equal tickets is NaN.
    tables[1][0]["K-way acc."] = float("nan")
    assert over_seeds(tables) == [{**summary, "K-way acc.": None}]


def methods_at(*sparsities: float, unpruned: float | None) -> list[dict[str, Any]]:
    """A line for each of eleven methods at every sparsity, and one for a model that is not pruned."""
    names = [f"method {number}" for number in range(11)]
    lines = [{"method": name, "sparsity": at, "bal. acc.": 0.75} for name in names for at in sparsities]
    return [*lines, {"method": "dense", "sparsity": unpruned, "bal. acc.": 0.9}]


def test_methods_at_one_sparsity_are_drawn_as_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = []
    monkeypatch.setattr(plots, "draw_table", lambda columns, file, title: tables.append(columns))
    plots.draw_rounds(methods_at(0.5, unpruned=None), {0.5: 0.25}, tmp_path / "a.png")
    plots.draw_methods([methods_at(0.5, unpruned=0.0)], ["bal. acc."], tmp_path / "a.png")
    assert [table["sparsity"] for table in tables] == [["50%"] * 11 + [""], ["50%"] * 11 + ["0%"]]
    assert tables[0]["mean similarity"] == ["0.250", *[""] * 11]
    assert all(table["bal. acc."] == ["0.750"] * 11 + ["0.900"] for table in tables)


def test_twelve_methods_have_a_colour_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    plots.draw_rounds(methods_at(0.5, 0.75, unpruned=None), {0.5: 0.25, 0.75: 0.2}, tmp_path / "a.png")
    plots.draw_methods([methods_at(0.5, 0.75, unpruned=0.0)], ["bal. acc."], tmp_path / "a.png")
    for figure in figures:
        assert len({curve.get_color() for curve in figure.axes[0].lines}) == 12
