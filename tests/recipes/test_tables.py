"""The tables of recipes."""

from __future__ import annotations

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
