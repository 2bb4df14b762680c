"""The table at the end of a run: every route at every sparsity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tabulate import tabulate

from .run_report import without_times


_MOST = 20  # routes that a table shows
# The metric of a route that a table shows -> its summaries over routes.
_SUMMARIES = {
    "balanced_accuracy": {"mean": "balanced_accuracy", "worst": "worst_balanced_accuracy"},
    "accuracy": {"mean": "mean_route_accuracy", "worst": "worst_route_accuracy"},
}


def result_table(
    reports: Sequence[Mapping[str, Any]],
    route_names: Sequence[str],
    *,
    prefix: str = "eval_",
    chance: Mapping[str, float] | None = None,
) -> str:
    """
    The metrics of a run as text: a line per route and a column per sparsity. The routes of membership tickets have
    balanced accuracies, those of tickets for labels accuracies. In all other cases a line is a metric. A round to
    sparsity 0 is the dense model, and its column says so.

    Args:
        reports (`Sequence[Mapping[str, Any]]`): reports of rounds, as in `RTLTrainer.rounds`.
        route_names (`Sequence[str]`): the routes. If there are more than 20, only the worst ones of the last round
            are shown.
        prefix (`str`, defaults to `"eval_"`): the prefix of the metrics of the evaluation set.
        chance (`Mapping[str, float]`, *optional*): route -> the figure that needs no model, for another column.
    """
    columns = [without_times(report["metrics"]) for report in reports]
    headers = [_sparsity(report) for report in reports]
    metric = next((name for name in _SUMMARIES if f"{prefix}{route_names[0]}/{name}" in columns[-1]), None)
    if metric is None:
        names = [name for name, value in columns[-1].items() if isinstance(value, float) and name != "epoch"]
        return _text(["at sparsity", *headers], [[name, *(found.get(name) for found in columns)] for name in names])

    last = {name: columns[-1][f"{prefix}{name}/{metric}"] for name in route_names}
    shown = list(route_names)
    if len(shown) > _MOST:
        shown = sorted(shown, key=lambda name: (np.isnan(last[name]), last[name]))[:_MOST]
    rows = {name: f"{name}/{metric}" for name in shown} | _SUMMARIES[metric]
    lines: list[list[Any]] = [
        [title, *(found.get(f"{prefix}{name}") for found in columns)] for title, name in rows.items()
    ]
    title = [f"{metric.replace('_', ' ')} at sparsity"]
    if chance is not None:
        by_chance = {**chance, "mean": float(np.nanmean(list(chance.values())))}
        lines = [[line[0], by_chance.get(line[0]), *line[1:]] for line in lines]
        title.append("by chance")
    if len(route_names) > _MOST:
        lines.insert(_MOST, [f"({len(route_names) - _MOST} better routes)"])
    return _text([*title, *headers], lines)


def _sparsity(report: Mapping[str, Any]) -> str:
    """The sparsity of a round; where units were removed, also their share, over all tickets."""
    if not report["sparsity"]:
        return "0% (dense)"
    share, units = f"{100 * report['sparsity']:.4g}%", report.get("units")
    if units is None:
        return share
    removed = 1 - float(np.mean(list(units["kept"].values()))) / units["number"]
    return f"{100 * removed:.4g}% of {units['kind']}s ({share} of weights)"


def _text(headers: list[str], lines: list[list[Any]]) -> str:
    return tabulate(lines, headers=headers, floatfmt=".3f", missingval="")
