"""The tables of a run and its results file."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from tabulate import tabulate

from hf_rtl import RTLTrainingArguments
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
    """The line of a report in tables. A report is one of `RTLTrainer.rounds`, or any dict with `metrics`."""
    metrics = without_prefix(report["metrics"])
    columns = _LABELS_COLUMNS if "worst_route_accuracy" in metrics else _MEMBERSHIP_COLUMNS
    line: dict[str, Any] = {"method": method, "sparsity": sparsity}
    line.update({title: metrics[key] for title, key in columns.items() if key in metrics})
    emptied = report.get("emptied_layers")
    units = report.get("units")
    line["units kept"] = None if units is None else mean(units["kept"].values()) / units["number"]
    line["union"] = report.get("union")
    line["bytes"] = report["footprint"]["total_bytes"] if "footprint" in report else None
    line["emptied layers"] = None if emptied is None else max(map(len, emptied.values()), default=0)
    line["constant tickets"] = None if "constant_tickets" not in metrics else int(metrics["constant_tickets"])
    return line


def method_rows(rounds: list[dict[str, Any]], controls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of tickets after every round, then those of controls, each with its `method`."""
    return [row(report.get("method", "RTL"), report["sparsity"], report) for report in rounds + controls]


def routes_rows(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of every route's accuracy, for tickets that predict labels; with a router, a second line of that."""
    lines = []
    for report in reports:
        metrics = without_prefix(report["metrics"])
        for suffix, metric in (("", "/accuracy"), (", inferred", "/inferred_accuracy")):
            figures = {name.removesuffix(metric): value for name, value in metrics.items() if name.endswith(metric)}
            if figures:
                lines.append({"method": report["method"] + suffix, "sparsity": report["sparsity"], **figures})
    return lines


def without_prefix(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of an evaluation, without the `eval_` before their names."""
    return {name.removeprefix("eval_"): value for name, value in metrics.items()}


def table(rows: list[dict[str, Any]], *, style: str = "simple") -> str:
    """The rows as text, without empty columns. `style`: a `tablefmt` of `tabulate`, such as `"github"`."""
    filled = [title for line in rows for title, value in line.items() if value is not None]
    titles = list(dict.fromkeys([title for title in rows[0] if title in filled] + filled))
    cells = [[cell(title, line.get(title)) for title in titles] for line in rows]
    return tabulate(cells, headers=titles, tablefmt=style, disable_numparse=True)


def print_tables(tables: Mapping[str, list[dict[str, Any]]]) -> None:
    """Prints the tables that have lines, each under its name."""
    for name, lines in tables.items():
        if lines:
            print(name.replace("_", " "), table(lines), sep="\n", end="\n\n")


def over_seeds(tables: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """
    The lines of runs that differ in the seed alone. Floats become their mean, followed by ± and the sample standard
    deviation of several runs. Integers are counts: their mean is rounded. A cell missing or NaN in a run is None.
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
    """A value as text in tables."""
    if value is None:
        return ""
    if title == "sparsity":
        return f"{100 * value:.3g}%"
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def plan_text(
    plan: Any, *, batch_size: int, num_processes: int, one_pass: int | None = None, retrained: bool = True
) -> str:
    """
    The plan of a run as text.

    Args:
        plan ([`Plan`]): the rounds, and how many steps they take.
        batch_size (`int`), num_processes (`int`): samples of a step, and processes.
        one_pass (`int`, *optional*): samples of each route, if tickets are found in one pass over a trained network.
        retrained (`bool`): whether joint retraining follows.
    """
    sizes = ", ".join(f"{name} {size:,}" for name, size in plan.route_sizes.items())
    events = "; ".join(f"{round_.sparsity:.0%} after {len(round_.kept)} prune events" for round_ in plan.rounds)
    lines = {
        "routes": f"{len(plan.route_sizes)}: {sizes} training samples",
        "prunable": f"{plan.num_weights:,} weights",
        "rounds": f"{len(plan.rounds)}: {events}",
        "extraction": f"{max(plan.extraction_steps)} steps of {batch_size} samples per route and event, at most",
        "retraining": f"{plan.retraining_steps:,} steps of {batch_size} samples, routes in turn",
        "trainings": f"{plan.num_trainings:,}, of {plan.num_steps:,} steps in all",
        "processes": str(num_processes),
    }
    if one_pass is not None:
        layers = plan.rounds[0].layers
        units = f"{sum(layer.num_units for layer in layers):,} {layers[0].kind}s in {len(layers)} layers"
        lines["rounds"] = (
            f"{len(plan.rounds)}: {', '.join(f'{round_.sparsity:.0%}' for round_ in plan.rounds)} of {units}"
        )
        lines["extraction"] = f"one pass over at most {one_pass:,} samples of each route, after a dense training"
        lines["trainings"] = f"dense, of {plan.retraining_steps:,} steps of {batch_size} samples of all routes"
        if not retrained:
            del lines["retraining"]
    return "\n".join(f"{name:12}{text}" for name, text in lines.items())


def training_record(args: RTLTrainingArguments) -> dict[str, Any]:
    """The arguments of a training for results, without folders, which are paths on this machine."""
    return {name: value for name, value in args.to_dict().items() if not name.endswith("_dir")}


def command_line() -> str:
    """The command that runs, as it can be typed again."""
    return shlex.join(["python", Path(sys.argv[0]).as_posix(), *sys.argv[1:]])


def write_results(file: Path, **content: Any) -> None:
    """Writes `content` as JSON, with the command, and the versions of Python and packages."""
    packages = ("torch", "transformers", "accelerate", "timm", "hf_rtl")
    environment = {
        "command": command_line(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    write_json(file, {**environment, **content})
