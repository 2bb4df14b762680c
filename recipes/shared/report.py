"""Tables, the results file and the plot of a pruning run."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from tabulate import tabulate

from hf_rtl.modeling.files import write_json


# Column title -> key in the metrics.
_MEMBERSHIP_COLUMNS = {
    "bal. acc.": "balanced_accuracy",
    "precision": "precision",
    "recall": "recall",
    "F1": "f1",
    "AUROC": "auroc",
    "K-way acc.": "accuracy",
    "worst b.a.": "worst_balanced_accuracy",
    "cal. b.a.": "calibrated_balanced_accuracy",
    "cal. prec.": "calibrated_precision",
    "cal. F1": "calibrated_f1",
    "prec. at recall .8": "precision_at_recall_80",
    "router: K-way acc.": "route_accuracy",
    "router: prec. at recall .8": "routed_precision_at_recall_80",
}
_LABELS_COLUMNS = {
    "accuracy": "accuracy",
    "inferred acc.": "inferred_accuracy",
    "route acc.": "route_accuracy",
    "worst route": "worst_route_accuracy",
    "inferred worst": "inferred_worst_route_accuracy",
    "union acc.": "union_accuracy",
    "union worst": "union_worst_route_accuracy",
}


def row(method: str, sparsity: float | None, report: dict[str, Any]) -> dict[str, Any]:
    """One line of the table from a report of `RTLTrainer.rounds`, or any dict with `metrics`."""
    metrics = _without_prefix(report["metrics"])
    columns = _LABELS_COLUMNS if "worst_route_accuracy" in metrics else _MEMBERSHIP_COLUMNS
    line: dict[str, Any] = {"method": method, "sparsity": sparsity}
    line.update({title: metrics[key] for title, key in columns.items() if key in metrics})
    emptied = report.get("emptied_layers")
    line["union"] = report.get("union")
    line["bytes"] = report["footprint"]["total_bytes"] if "footprint" in report else None
    line["emptied layers"] = None if emptied is None else max(map(len, emptied.values()), default=0)
    line["constant tickets"] = None if "constant_tickets" not in metrics else int(metrics["constant_tickets"])
    return line


def routes_rows(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The accuracy of every route of tickets that predict labels; with a router, also in a line of its own."""
    lines = []
    for report in reports:
        metrics = _without_prefix(report["metrics"])
        for suffix, metric in (("", "/accuracy"), (", inferred", "/inferred_accuracy")):
            figures = {name.removesuffix(metric): value for name, value in metrics.items() if name.endswith(metric)}
            if figures:
                lines.append({"method": report["method"] + suffix, "sparsity": report["sparsity"], **figures})
    return lines


def _without_prefix(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("eval_"): value for name, value in metrics.items()}


def table(rows: list[dict[str, Any]], *, style: str = "simple") -> str:
    """The rows as text; columns that no row fills are left out. `style` as of `tabulate`, as `"github"`."""
    filled = [title for line in rows for title, value in line.items() if value is not None]
    titles = list(dict.fromkeys([title for title in rows[0] if title in filled] + filled))
    cells = [[cell(title, line.get(title)) for title in titles] for line in rows]
    return tabulate(cells, headers=titles, tablefmt=style, disable_numparse=True)


def over_seeds(tables: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """
    The lines of runs that differ in the seed alone: of numbers the mean, and of several runs the sample standard
    deviation after ±. Integers, which are counts, are rounded means. What one run lacks, or has as NaN, is left out.
    """
    lines = []
    for same in zip(*tables, strict=True):
        line = {"method": same[0]["method"], "sparsity": same[0]["sparsity"]}
        for title in same[0]:
            values = [other[title] for other in same]
            if title in line:
                continue
            if any(value is None or value != value for value in values):
                line[title] = None
            elif isinstance(values[0], float):
                spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
                line[title] = f"{mean(values):.3f}{spread}"
            else:
                line[title] = round(mean(values))
        lines.append(line)
    return lines


def cell(title: str, value: Any) -> str:
    """A value as tables show it."""
    if value is None:
        return ""
    if title == "sparsity":
        return f"{100 * value:.3g}%"
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def plan_text(plan: Any, *, batch_size: int, num_processes: int) -> str:
    """What a run is going to do, for people."""
    sizes = ", ".join(f"{name} {size:,}" for name, size in plan.route_sizes.items())
    events = "; ".join(f"{round_.sparsity:.0%} after {len(round_.kept)} prune events" for round_ in plan.rounds)
    return "\n".join(
        (
            f"routes      {len(plan.route_sizes)}: {sizes} training samples",
            f"prunable    {plan.num_weights:,} weights",
            f"rounds      {len(plan.rounds)}: {events}",
            f"extraction  {max(plan.extraction_steps)} steps of {batch_size} samples per route and event, at most",
            f"retraining  {plan.retraining_steps:,} steps of {batch_size} samples, routes in turn",
            f"trainings   {plan.num_trainings:,}, of {plan.num_steps:,} steps in all",
            f"processes   {num_processes}",
        )
    )


def write_results(file: Path, **content: Any) -> None:
    """`content` with the command and the versions that made it."""
    packages = ("torch", "transformers", "accelerate", "timm", "hf_rtl")
    environment = {
        "command": shlex.join(["python", Path(sys.argv[0]).as_posix(), *sys.argv[1:]]),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    write_json(file, {**environment, **content})


def plot(file: Path, rows: list[dict[str, Any]], similarities: dict[float, float]) -> None:
    """Balanced accuracy (of labels, accuracy) of every method and mean similarity of the tickets, against sparsity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (upper, lower) = pyplot.subplots(2, 1, sharex=True, figsize=(6, 6), height_ratios=(3, 2))
    title = "bal. acc." if "bal. acc." in rows[0] else "accuracy"
    methods = list(dict.fromkeys(line["method"] for line in rows))
    for method, marker in zip(methods, "osD^vX*", strict=False):
        points = [(line["sparsity"], line[title]) for line in rows if line["method"] == method]
        known = [(100 * sparsity, value) for sparsity, value in points if sparsity is not None]
        if known:
            upper.plot(*zip(*known, strict=True), marker=marker, label=method)
        for sparsity, value in points:
            if sparsity is None:
                upper.axhline(value, linestyle="--", color="grey", label=method)
    upper.set_ylabel("balanced accuracy" if title == "bal. acc." else "accuracy")
    upper.legend(fontsize="small")
    lower.plot([100 * sparsity for sparsity in similarities], list(similarities.values()), marker="o", color="black")
    lower.set_ylabel("mean Jaccard similarity")
    lower.set_xlabel("sparsity of a ticket (%)")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def plot_methods(file: Path, tables: Sequence[list[dict[str, Any]]], titles: Sequence[str]) -> None:
    """
    Columns of the tables of several seeds against sparsity, a panel each: means, with the sample standard deviation
    as bars. What is not pruned is a horizontal line.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, all_axes = pyplot.subplots(len(titles), 1, sharex=True, figsize=(7, 3 * len(titles)), squeeze=False)
    methods = list(dict.fromkeys(line["method"] for line in tables[0]))
    # Told apart in grey too: ten markers, and colours that the colour-blind can tell.
    colours = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"]
    for axes, title in zip(all_axes[:, 0], titles, strict=True):
        for number, (method, marker) in enumerate(zip(methods, "osD^vX*Pp<", strict=False)):
            points: dict[float, list[float]] = {}
            for line in (line for lines in tables for line in lines if line["method"] == method):
                if line.get(title) is not None:
                    points.setdefault(line["sparsity"], []).append(line[title])
            style = {"color": colours[number % len(colours)], "label": method, "linewidth": 1.2}
            means = {sparsity: mean(values) for sparsity, values in points.items()}
            if list(means) == [0.0]:
                axes.axhline(means[0.0], linestyle="--", **style)
            elif means:
                bars = [stdev(values) if len(values) > 1 else 0.0 for values in points.values()]
                percent = [100 * sparsity + 0.25 * (number - len(methods) / 2) for sparsity in means]
                line_style = "-" if number < len(colours) else "-."
                axes.errorbar(
                    percent, list(means.values()), bars, marker=marker, markersize=5, linestyle=line_style, **style
                )
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
    all_axes[-1, 0].set_xlabel("sparsity of a ticket (%)")
    handles, labels = all_axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=4, fontsize="small", frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.28 / len(titles)))
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
