"""The text of a model card, made from given fields, the record of the run, and the model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import Tensor

from ..modeling.files import json_values
from ..modeling.footprint import FOOTPRINT_FORMS
from ..modeling.modeling_rtl import RTLModel
from . import markdown


_TEMPLATE = Path(__file__).with_name("template.md")
_MAX_COMPARED = 12  # most routes for which a table shows all pairs
# Tasks whose pipeline of transformers works with tickets: name of the pipeline's variable in the card, and its input.
_PIPELINES = {
    "image-classification": ("classifier", "image.png"),
    "audio-classification": ("classifier", "sound.wav"),
    "text-classification": ("classifier", "A sentence."),
    "text-generation": ("generator", "Once upon a time"),
}

_DECISIONS = {"balanced_accuracy": "bal. acc.", "precision": "precision", "recall": "recall", "f1": "F1"}
# The metrics of a route in tables, in this order; those of other names follow.
_COLUMNS = {
    "membership": {
        **_DECISIONS,
        "auroc": "AUROC",
        "precision_at_recall_80": "prec. at recall .8",
        "route_recall": "routes found",
        "routed_precision_at_recall_80": "router: prec. at recall .8",
    },
    "labels": {
        "accuracy": "accuracy",
        "inferred_accuracy": "acc., route inferred",
        "union_accuracy": "acc. of the union",
        "route_recall": "routes found",
        "routed_precision_at_recall_80": "router: prec. at recall .8",
    },
}
# The metrics in the metadata: over all routes, and of the worst route. Those of every route are in tables alone, so
# that the metadata are as long for a hundred routes as for two.
_RESULTS = {
    "membership": (
        *("balanced_accuracy", "worst_balanced_accuracy"),
        *("calibrated_balanced_accuracy", "worst_calibrated_balanced_accuracy"),
        *("auroc", "worst_auroc", "accuracy", "route_accuracy"),
    ),
    "labels": (
        *("accuracy", "mean_route_accuracy", "worst_route_accuracy"),
        *("inferred_mean_route_accuracy", "inferred_worst_route_accuracy"),
        *("union_mean_route_accuracy", "union_worst_route_accuracy", "route_accuracy"),
    ),
}
# The metrics in the table of rounds.
_ROUND_COLUMNS = {
    "membership": {
        "balanced_accuracy": "bal. acc.",
        "calibrated_balanced_accuracy": "cal. bal. acc.",
        "accuracy": "highest-score acc.",
        "loss": "evaluation loss",
    },
    "labels": {
        "accuracy": "accuracy",
        "worst_route_accuracy": "worst route",
        "inferred_accuracy": "acc., route inferred",
        "route_accuracy": "route acc.",
        "union_accuracy": "acc. of the union",
        "loss": "evaluation loss",
    },
}


def render_page(
    model: RTLModel,
    given: Mapping[str, Any],
    run: Mapping[str, Any] | None,
    *,
    similarity: Tensor,
    pipeline_tag: str | None,
    title: str | None = None,
    picture: str | None = None,
    with_code: bool = False,
    with_arguments: bool = False,
    rule: str | None = None,
) -> str:
    """
    The generated part of a card.

    Args:
        model ([`RTLModel`]): the model of the card.
        given (`Mapping[str, Any]`): fields of `RTLCardData`, `None` where a field is not given.
        run (`Mapping[str, Any]`, *optional*): the result of `run_report.describe_run`; `None` if it is unknown.
        similarity (`Tensor`): `[K, K]`, Jaccard similarity of the model's masks.
        pipeline_tag (`str`, *optional*): the Hub's name of the task.
        title (`str`, *optional*): title to write; `None` if the file has one.
        picture (`str`, *optional*): name of the file with the heatmap, beside the card.
        with_code (`bool`): whether the model is saved with its code.
        with_arguments (`bool`): whether a file beside the card holds all arguments of the run.
        rule (`str`, *optional*): description of the rule that assigns new data, if a file beside the card holds one.
    """
    bank = model.mask_bank
    is_membership = model.config.ticket_task == "membership"
    evaluations = run["evaluations"] if run else []
    last = [evaluation["rounds"][-1] for evaluation in evaluations]
    return _template().render(
        given=given,
        title=title,
        model_id=given["model_id"] or "path/to/this/folder",
        model_class=type(model).__name__,
        auto_class=model.backbone_class.__name__,
        with_code=with_code,
        with_arguments=with_arguments,
        rule=rule,
        backbone=backbone_name(model),
        is_timm=model.config.backbone_config.model_type == "timm_wrapper",
        is_membership=is_membership,
        route_names=model.route_names,
        generates=model.can_generate(),
        pipeline=(pipeline_tag, *_PIPELINES[pipeline_tag]) if pipeline_tag in _PIPELINES else None,
        routes_table=_routes_table(model, run),
        evaluations=_evaluations(model, run) if run else [],
        with_chance=any(evaluation.get("chance") for evaluation in evaluations),
        constant_tickets=max((int(metrics.get("constant_tickets") or 0) for metrics in last), default=0),
        shared=_shared(model, similarity),
        similarity_table=_similarity_table(model, similarity) if 1 < model.num_routes <= _MAX_COMPARED else None,
        picture=picture,
        footprint_table=_footprint_table(model),
        num_parameters=sum(parameter.numel() for parameter in model.backbone.parameters()),
        bank=bank,
        config=model.config,
        emptied=_emptied(model),
        run=run,
        one_pass=run.get("one_pass") if run else None,
        ranked=_ranked(run["arguments"]) if run else None,
        rounds_table=_rounds_table(model, run) if run else None,
        arguments_table=_arguments_table(run) if run and run["arguments"] else None,
        surroundings=_environments(run["rounds"]) if run else [],
    )


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(text=markdown.text, percent=markdown.percent, number=markdown.number)
    environment.filters.update(code=lambda name: json.dumps(name, ensure_ascii=False), fenced=markdown.fenced)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))


def backbone_name(model: RTLModel) -> str:
    """The name of the architecture in timm, else the class of the network."""
    config = model.config.backbone_config
    return config.architecture if config.model_type == "timm_wrapper" else type(model.backbone).__name__


# Tables


def _routes_table(model: RTLModel, run: Mapping[str, Any] | None) -> str:
    """A row per route, with its metrics if there is one evaluation set only; then a row for all routes."""
    bank, evaluations = model.mask_bank, run["evaluations"] if run else []
    density = bank.density()
    columns = {
        "": [*map(str, range(model.num_routes)), ""],
        **_names_column(model),
        "kept weights": [*(f"{count:,}" for count in bank.count().tolist()), ""],
        "density": list(map(markdown.percent, [*density.tolist(), float(density.mean())])),
    }
    if run:
        columns["training samples"] = _sample_cells(model, run["num_training_samples"])
    if len(evaluations) == 1:
        columns["test samples"] = _sample_cells(model, evaluations[0]["num_samples"])
        columns |= _measured_columns(model, evaluations[0])
    return _table_of_columns(columns, num_left=2)


def _evaluations(model: RTLModel, run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each evaluation set its name, tables that the table of routes does not cover, and all other metrics."""
    thresholds = [*(f"{threshold:.3f}" for threshold in run["thresholds"] or []), ""]
    pages = []
    for evaluation in run["evaluations"]:
        by_route, overall = _last(model, evaluation)
        columns = _measured(model, by_route)
        calibrated = {f"calibrated_{metric}": title for metric, title in columns.items()}
        calibrated = {metric: title for metric, title in calibrated.items() if metric in overall}
        tables = {}
        if len(run["evaluations"]) > 1 and columns:
            first = {"test samples": [*_sample_cells(model, evaluation["num_samples"])[:-1], ""]}
            tables["plain"] = {**first, **_measured_columns(model, evaluation)}
        if calibrated:
            tables["calibrated"] = {"threshold": thresholds, **_metric_columns(model, by_route, overall, calibrated)}
        in_tables = {*columns, *calibrated, *_NO_METRICS}
        rest = {
            describe_metric(name, ticket_task=model.config.ticket_task, overall=True)[1]: value
            for name, value in overall.items()
            if name not in in_tables
        }
        texts = {kind: _table_of_columns({**_names_column(model), **table}) for kind, table in tables.items()}
        pages.append({"name": evaluation["name"], "tables": texts, "rest": rest})
    return pages


def _table_of_columns(columns: Mapping[str, Sequence[str]], *, num_left: int = 1) -> str:
    return markdown.table(list(columns), list(zip(*columns.values(), strict=True)), num_left=num_left)


def _names_column(model: RTLModel) -> dict[str, list[str]]:
    return {"route": [*map(markdown.text, model.route_names), "**all routes**"]}


def _sample_cells(model: RTLModel, counts: Mapping[str, int]) -> list[str]:
    """The number of samples of every route, then of all."""
    return [f"{count:,}" for count in [*(counts[name] for name in model.route_names), sum(counts.values())]]


def _metric_columns(
    model: RTLModel, by_route: Mapping[str, Mapping], overall: Mapping[str, Any], titles: Mapping[str, str]
) -> dict[str, list[str]]:
    """Title -> the metric of every route, then of all routes, for the metrics in `titles`."""
    rows = [*(by_route.get(name, {}) for name in model.route_names), overall]
    return {title: [markdown.number(row.get(metric)) for row in rows] for metric, title in titles.items()}


def _measured_columns(model: RTLModel, evaluation: Mapping[str, Any]) -> dict[str, list[str]]:
    """Title -> the metric of every route, then of all routes; after the accuracy what is reached by chance."""
    by_route, overall = _last(model, evaluation)
    columns = _metric_columns(model, by_route, overall, _measured(model, by_route))
    first, chance = next(iter(columns), None), evaluation.get("chance")  # the runs of before have no chance levels
    if chance is None or first not in ("bal. acc.", "accuracy"):
        return columns
    counts = evaluation["num_samples"]
    mean = sum(level * counts[name] for name, level in chance.items() if level is not None) / sum(counts.values())
    by_chance = [markdown.number(level) for level in [*(chance[name] for name in model.route_names), mean]]
    return {first: columns.pop(first), "by chance": by_chance, **columns}


def _similarity_table(model: RTLModel, similarity: Tensor) -> str:
    names = [markdown.text(name, limit=16) for name in model.route_names]
    matrix = json_values(similarity.tolist())
    rows = [
        [name, *("1" if row == column else markdown.number(value) for column, value in enumerate(matrix[row]))]
        for row, name in enumerate(names)
    ]
    return markdown.table(["", *names], rows)


def _footprint_table(model: RTLModel) -> str:
    footprint = model.footprint()
    whole = footprint["independent_full_bytes"]
    rows = [
        [
            words.format(model.num_routes),
            f"{footprint[form]:,}",
            markdown.size(footprint[form]),
            markdown.percent(footprint[form] / whole),
        ]
        for form, words in FOOTPRINT_FORMS.items()
    ]
    return markdown.table(["", "bytes", "", f"of {model.num_routes} plain networks"], rows)


def _ranked(arguments: Mapping[str, Any]) -> str:
    """What prune events rank by; the arguments are those that differ from the defaults."""
    criterion, granularity = (
        arguments.get("prune_criterion", "magnitude"),
        arguments.get("prune_granularity", "weight"),
    )
    when = "before any training" if arguments.get("extraction_steps") == 0 else "after training on its\nroute alone"
    return f"{markdown.text(criterion)} of its {markdown.text(granularity)}s {when}"


def _rounds_table(model: RTLModel, run: Mapping[str, Any]) -> str:
    """A row per round: kept weights, similarity of the tickets, metrics and steps."""
    evaluations = run["evaluations"]
    columns = {
        (number, metric): f"{title} ({markdown.text(evaluation['name'])})" if evaluation["name"] else title
        for number, evaluation in enumerate(evaluations)
        for metric, title in _ROUND_COLUMNS[model.config.ticket_task].items()
        if metric in evaluation["rounds"][-1]
    }
    rows, of_units = [], any("units" in report for report in run["rounds"])
    for index, report in enumerate(run["rounds"]):
        kept = report["kept"].values()
        rows.append(
            [
                str(report["round"]),
                markdown.percent(report["sparsity"]),
                *([_units(report["units"])] if of_units else []),
                markdown.span(kept),
                f"{report['union']:,}",
                markdown.number(report["mean_similarity"]),
                *(markdown.number(evaluations[number]["rounds"][index].get(metric)) for number, metric in columns),
                f"{report['steps']:,}",
            ]
        )
    units = ["units per ticket"] if of_units else []
    titles = ["round", "sparsity", *units, "kept per ticket", "union", "similarity", *columns.values(), "steps"]
    return markdown.table(titles, rows)


def _units(units: Mapping[str, Any]) -> str:
    return (
        f"{markdown.span(units['kept'].values())} of {units['number']:,} {units['kind']}s (asked: {units['asked']:,})"
    )


def _arguments_table(run: Mapping[str, Any]) -> str:
    rows = [[f"`{name}`", _value(value), _value(run["defaults"][name])] for name, value in run["arguments"].items()]
    return markdown.table(["argument", "value", "default"], rows, num_left=3)


def _value(value: Any) -> str:
    return markdown.text(json.dumps(value, ensure_ascii=False), limit=200)


# Facts for the text


def _last(model: RTLModel, evaluation: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """The metrics of the last round, whose model the card describes: those of each route, and those of all routes."""
    return split_metrics(evaluation["rounds"][-1], model.route_names)


def _measured(model: RTLModel, by_route: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The columns of a table of metrics: those that at least one route has, without a calibrated threshold."""
    found = dict.fromkeys(metric for metrics in by_route.values() for metric in metrics)
    known = _COLUMNS[model.config.ticket_task]
    columns = {metric: title for metric, title in known.items() if metric in found}
    others = [name for name in found if name not in known and name != "loss" and not name.startswith("calibrated_")]
    return columns | {name: markdown.text(name) for name in others}


def _shared(model: RTLModel, similarity: Tensor) -> dict[str, float]:
    """Counts of shared weights, and mean similarities over all pairs of tickets with any weight."""
    bank = model.mask_bank
    pairs = ~torch.eye(bank.num_routes, dtype=torch.bool)
    return {
        "union": bank.union_count(),
        "core": bank.core_count(),
        "similarity": float(similarity[pairs].nanmean()),
        "chance": float(bank.chance_similarity().cpu()[pairs].nanmean()),
    }


def _emptied(model: RTLModel) -> dict[str, int]:
    """Name of a prunable weight -> number of tickets that keep nothing of it, if there are any."""
    num_tickets = (model.mask_bank.count(per_layer=True) == 0).sum(1).tolist()
    names = model.mask_bank.weight_names
    return {name: number for name, number in zip(names, num_tickets, strict=True) if number}


def _environments(rounds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The different environments of the rounds: one, if all rounds ran in the same environment."""
    different: list[dict[str, Any]] = []
    for report in rounds:
        if report["surroundings"] not in different:
            different.append(report["surroundings"])
    return different


# Name in `metrics.py` -> id (that of hf.co/metrics, if it is listed there), and title.
_NAMES = {
    "balanced_accuracy": ("balanced_accuracy", "Balanced accuracy"),
    "precision": ("precision", "Precision"),
    "recall": ("recall", "Recall"),
    "f1": ("f1", "F1"),
    "auroc": ("roc_auc", "AUROC"),
    "precision_at_recall_80": ("precision", "Precision at recall 0.8"),
}
_WITHOUT_THRESHOLD = {"auroc", "precision_at_recall_80"}
# Accuracies: of scores compared between tickets, and of labels with one label per sample.
_ACCURACIES = {
    ("membership", "accuracy"): "Accuracy of the ticket with the highest score",
    ("membership", "calibrated_accuracy"): "Accuracy of the ticket whose score is highest above its threshold",
    ("labels", "accuracy"): "Accuracy, each sample through the ticket of its route",
    ("labels", "mean_route_accuracy"): "Accuracy, mean over routes",
    ("labels", "worst_route_accuracy"): "Accuracy, worst route",
    ("labels", "inferred_accuracy"): "Accuracy, the router choosing the ticket",
    ("labels", "inferred_mean_route_accuracy"): "Accuracy, the router choosing the ticket, mean over routes",
    ("labels", "inferred_worst_route_accuracy"): "Accuracy, the router choosing the ticket, worst route",
    ("labels", "union_accuracy"): "Accuracy of the union of all tickets",
    ("labels", "union_mean_route_accuracy"): "Accuracy of the union of all tickets, mean over routes",
    ("labels", "union_worst_route_accuracy"): "Accuracy of the union of all tickets, worst route",
}
# Metrics of a router, for both tasks.
_ROUTER_METRICS = {
    "route_accuracy": ("accuracy", "Accuracy of the router: samples whose likeliest route is theirs"),
    "route_recall": ("recall", "Recall of the router"),
    "routed_precision_at_recall_80": ("precision", "Precision of the router's score at recall 0.8"),
    "fallback_fraction": ("fallback_fraction", "Samples that the router was too unsure of, sent to the fallback"),
}
_NO_METRICS = ("loss", "constant_tickets")
HUB_METRICS = {"accuracy", "precision", "recall", "f1", "roc_auc"}


def split_metrics(
    metrics: Mapping[str, Any], route_names: Sequence[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Route -> its metrics, and the metrics over all routes. Names come from `metrics.py` or from the user."""
    by_route: dict[str, dict[str, Any]] = {name: {} for name in route_names}
    overall = {}
    for name, value in metrics.items():
        route, _, metric = name.rpartition("/")
        if route in by_route:
            by_route[route][metric] = value
        else:
            overall[name] = value
    return {route: found for route, found in by_route.items() if found}, overall


def list_results(metrics: Mapping[str, Any], route_names: Sequence[str], *, ticket_task: str) -> dict[str, float]:
    """The metrics for the metadata: those of `_RESULTS`, and the user's own over all routes."""
    by_route, overall = split_metrics(metrics, route_names)
    if ticket_task == "membership":
        measured = [values["auroc"] for values in by_route.values() if values.get("auroc") is not None]
        overall["worst_auroc"] = min(measured, default=None)
    ours = {name: overall.get(name) for name in _RESULTS[ticket_task]}
    own = {
        name: value
        for name, value in overall.items()
        if name not in _NO_METRICS and describe_metric(name, ticket_task=ticket_task, overall=True)[1] == name
    }
    return {name: value for name, value in {**ours, **own}.items() if value is not None}


def describe_metric(name: str, *, ticket_task: str, overall: bool) -> tuple[str, str]:
    """The id and title of a metric of a route, or of all routes if `overall`; its name twice if it is unknown."""
    if (ticket_task, name) in _ACCURACIES:
        return "accuracy", _ACCURACIES[ticket_task, name]
    if name in _ROUTER_METRICS:
        return _ROUTER_METRICS[name]
    plain = name.removeprefix("worst_").removeprefix("calibrated_")
    if ticket_task != "membership" or plain not in _NAMES:
        return name, name
    kind, words = _NAMES[plain]
    if plain not in _WITHOUT_THRESHOLD:
        words += ", calibrated threshold" if "calibrated_" in name else ", score > 0"
    if overall:
        words += ", worst route" if name.startswith("worst_") else ", mean over routes"
    return kind, words
