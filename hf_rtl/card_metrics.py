"""Metrics as model cards name and sort them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


# Name in `metrics.py` -> id, as on hf.co/metrics where it has one, and words.
_NAMES = {
    "balanced_accuracy": ("balanced_accuracy", "Balanced accuracy"),
    "precision": ("precision", "Precision"),
    "recall": ("recall", "Recall"),
    "f1": ("f1", "F1"),
    "auroc": ("roc_auc", "AUROC"),
    "precision_at_recall_80": ("precision", "Precision at recall 0.8"),
}
_OF_NO_THRESHOLD = {"auroc", "precision_at_recall_80"}
# Of one label per sample, and of scores compared between tickets.
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
# Of a router, whatever the task.
_OF_ROUTERS = {
    "route_accuracy": ("accuracy", "Accuracy of the router: samples whose likeliest route is theirs"),
    "route_recall": ("recall", "Recall of the router"),
    "routed_precision_at_recall_80": ("precision", "Precision of the router's score at recall 0.8"),
    "fallback_fraction": ("fallback_fraction", "Samples that the router was too unsure of, sent to the fallback"),
}
METRICS_OF_THE_HUB = {"accuracy", "precision", "recall", "f1", "roc_auc"}


def split_metrics(
    metrics: Mapping[str, Any], route_names: Sequence[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Route -> its metrics, and those over all routes. Names of metrics are as of `metrics.py`, or somebody's own."""
    of_routes: dict[str, dict[str, Any]] = {name: {} for name in route_names}
    of_all = {}
    for name, value in metrics.items():
        route, _, metric = name.rpartition("/")
        if route in of_routes:
            of_routes[route][metric] = value
        else:
            of_all[name] = value
    return {route: found for route, found in of_routes.items() if found}, of_all


def describe_metric(name: str, *, ticket_task: str, of_all: bool) -> tuple[str, str]:
    """The id and the words of a metric of a route or `of_all` routes; its own name for one that we do not know."""
    if (ticket_task, name) in _ACCURACIES:
        return "accuracy", _ACCURACIES[ticket_task, name]
    if name in _OF_ROUTERS:
        return _OF_ROUTERS[name]
    plain = name.removeprefix("worst_").removeprefix("calibrated_")
    if ticket_task != "membership" or plain not in _NAMES:
        return name, name
    kind, words = _NAMES[plain]
    if plain not in _OF_NO_THRESHOLD:
        words += ", calibrated threshold" if "calibrated_" in name else ", score > 0"
    if of_all:
        words += ", worst route" if name.startswith("worst_") else ", mean over routes"
    return kind, words
