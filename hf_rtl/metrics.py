"""
Metrics per route and over all routes, from one matrix of scores over the whole evaluation set.

A metric is called `{route}/{metric}` for one route and `{metric}` for all of them. Samples are neither balanced nor
reweighted, so precision is that at the evaluation set's own prevalence.

scikit-learn is imported where it is used, since it would take a tenth of the time of `import hf_rtl`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .data.partition import check_route_ids
from .modeling.mask_bank import check_route_names


def membership_metrics(
    scores: np.ndarray,
    home_routes: np.ndarray,
    route_names: Sequence[str],
    *,
    thresholds: Sequence[float] | None = None,
) -> dict[str, float]:
    """
    One-vs-rest metrics of tickets that answer "is this mine?" (paper, section 4.1).

    | key | value |
    |---|---|
    | `{route}/balanced_accuracy`, `precision`, `recall`, `f1` | of the decision score > 0 |
    | `{route}/auroc` | of the scores |
    | `{route}/precision_at_recall_80` | see `precision_at_recall` |
    | the same without `{route}/` | mean over the routes where it is defined |
    | `worst_balanced_accuracy` | minimum over the routes where it is defined |
    | `accuracy` | fraction of samples whose home route has the highest score (the first among equals) |

    With `thresholds`, all metrics that depend on one (not `auroc` and `precision_at_recall_80`) are also given as
    `{route}/calibrated_{metric}`, `calibrated_{metric}` and `worst_calibrated_balanced_accuracy`: the decision is then
    score > threshold of the route, and the highest score is that of score − threshold.

    Undefined metrics are NaN, and left out of means and minimum: all metrics of a route without samples, and the
    balanced accuracy and `auroc` of a route with all samples. Precision is 0 where nothing is predicted positive.

    Args:
        scores (`np.ndarray`): floats `[N, K]`, the logit of every ticket for every sample.
        home_routes (`np.ndarray`): integers `[N]`, the route that each sample belongs to.
        route_names (`Sequence[str]`): K distinct names.
        thresholds (`Sequence[float]`, *optional*): K floats, from `calibrate_thresholds` on data held out of training.

    Returns:
        `dict[str, float]`: the metrics, from 0 to 1.

    Raises:
        TypeError: `scores` are not a float array or `home_routes` not an integer array.
        ValueError: shapes that do not match, scores or thresholds that are NaN or infinite, routes out of range.
    """
    route_names = check_route_names(route_names)
    home_routes = check_scores("scores", scores, "home_routes", home_routes, num_columns=len(route_names))
    from sklearn.metrics import roc_auc_score

    rankings: dict[str, list[float]] = {"auroc": [], "precision_at_recall_80": []}
    for route in range(len(route_names)):
        is_home = home_routes == route
        defined = is_home.any() and not is_home.all()
        rankings["auroc"].append(float(roc_auc_score(is_home, scores[:, route])) if defined else float("nan"))
        rankings["precision_at_recall_80"].append(precision_at_recall(scores[:, route], is_home))
    metrics = _decision_metrics(scores, home_routes, route_names, prefix="")
    metrics |= _with_means(rankings, route_names)
    if thresholds is not None:
        shifts = np.asarray(thresholds, dtype=np.float64)
        if shifts.shape != (len(route_names),) or not np.isfinite(shifts).all():
            raise ValueError(
                f"`thresholds` is {thresholds}; one finite float for each of {len(route_names)} routes is needed."
            )
        metrics |= _decision_metrics(scores, home_routes, route_names, prefix="calibrated_", thresholds=shifts)
    return metrics


def _decision_metrics(
    scores: np.ndarray,
    home_routes: np.ndarray,
    route_names: list[str],
    *,
    prefix: str,
    thresholds: np.ndarray | float = 0.0,
) -> dict[str, float]:
    # Compared, not subtracted: a difference can round to zero.
    decisions = scores > thresholds
    is_home = home_routes[:, None] == np.arange(len(route_names))
    home, accepted, found = is_home.sum(axis=0), decisions.sum(axis=0), (is_home & decisions).sum(axis=0)
    others, others_accepted = len(scores) - home, accepted - found
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN: undefined
        recall = found / home
        by_route = {
            "balanced_accuracy": ((others - others_accepted) / others + recall) / 2,
            "precision": np.where(home > 0, found / np.maximum(accepted, 1), np.nan),
            "recall": recall,
            "f1": np.where(home > 0, 2 * found / (home + accepted), np.nan),
        }
    columns = {metric: values.tolist() for metric, values in by_route.items()}

    metrics = _with_means({f"{prefix}{metric}": values for metric, values in columns.items()}, route_names)
    metrics[f"worst_{prefix}balanced_accuracy"] = _over_defined(np.min, columns["balanced_accuracy"])
    metrics[f"{prefix}accuracy"] = float(np.mean((scores - thresholds).argmax(axis=1) == home_routes))
    return metrics


def _with_means(columns: dict[str, list[float]], route_names: list[str]) -> dict[str, float]:
    """The metrics of every route, then the means over the routes where they are defined."""
    metrics = {
        f"{name}/{metric}": values[route]
        for route, name in enumerate(route_names)
        for metric, values in columns.items()
    }
    return metrics | {metric: _over_defined(np.mean, values) for metric, values in columns.items()}


def constant_tickets(scores: np.ndarray) -> list[int]:
    """
    Indices of the routes whose ticket gives every sample the same score, since its input no longer reaches its output.
    Scores are the same if they differ by at most 1e-6, or by 1e-6 of the largest magnitude if that is above 1.

    Args:
        scores (`np.ndarray`): floats `[N, K]` of at least two samples.

    Raises:
        TypeError: `scores` are not a float array.
        ValueError: `scores` are not `[N, K]`, not finite, or of fewer than two samples.
    """
    _check_matrix("scores", scores)
    if len(scores) < 2:
        raise ValueError(f"`scores` has {len(scores)} sample(s); at least 2 are needed to tell whether they differ.")
    # Logits are log odds, so one bound suits all tickets. A cut network still differs by about 1e-8 in float32.
    return np.flatnonzero(np.ptp(scores, axis=0) <= 1e-6 * np.abs(scores).max(axis=0).clip(min=1)).tolist()


def label_metrics(
    logits: np.ndarray, labels: np.ndarray, route_ids: np.ndarray, route_names: Sequence[str], *, prefix: str = ""
) -> dict[str, float]:
    """
    Top-1 accuracies of tickets that predict the task's labels (the first label among equal logits).

    | key | value |
    |---|---|
    | `{route}/accuracy` | over the route's samples; NaN if it has none |
    | `accuracy` | over all samples |
    | `mean_route_accuracy`, `worst_route_accuracy` | over the routes that have samples |

    Args:
        logits (`np.ndarray`): floats `[N, C]`.
        labels (`np.ndarray`): integers `[N]` from 0 to C - 1.
        route_ids (`np.ndarray`): integers `[N]`, the route of each sample.
        route_names (`Sequence[str]`): K distinct names.
        prefix (`str`, defaults to `""`): before the name of every metric, after the route's.

    Raises:
        TypeError: `logits` are not a float array, `labels` or `route_ids` not integer arrays.
        ValueError: shapes that do not match, logits that are NaN or infinite, labels or routes out of range.
    """
    route_names = check_route_names(route_names)
    labels = check_scores("logits", logits, "labels", labels)
    route_ids = check_route_ids(route_ids, num_routes=len(route_names))
    if len(route_ids) != len(labels):
        raise ValueError(f"`route_ids` has {len(route_ids)} entries and `labels` {len(labels)}; both need the same.")
    correct = logits.argmax(axis=1) == labels
    accuracies = _means_by_route(correct, route_ids, len(route_names))
    return {
        **{f"{name}/{prefix}accuracy": accuracy for name, accuracy in zip(route_names, accuracies, strict=True)},
        f"{prefix}accuracy": float(correct.mean()),
        f"{prefix}mean_route_accuracy": _over_defined(np.mean, accuracies),
        f"{prefix}worst_route_accuracy": _over_defined(np.min, accuracies),
    }


def router_metrics(route_scores: np.ndarray, route_ids: np.ndarray, route_names: Sequence[str]) -> dict[str, float]:
    """
    How often a router's likeliest route is the right one, and how well its scores retrieve each route's samples.

    | key | value |
    |---|---|
    | `route_accuracy` | fraction of samples whose likeliest route is their own (the first among equals) |
    | `{route}/route_recall` | the same over the route's samples; NaN if it has none |
    | `{route}/routed_precision_at_recall_80` | see `precision_at_recall`, of the route's scores |
    | `routed_precision_at_recall_80` | mean over the routes where it is defined |

    Args:
        route_scores (`np.ndarray`): floats `[N, K]`, the log probability of every route.
        route_ids (`np.ndarray`): integers `[N]`, the route of each sample.
        route_names (`Sequence[str]`): K distinct names.

    Raises:
        TypeError, ValueError: see `membership_metrics`.
    """
    route_names = check_route_names(route_names)
    route_ids = check_scores("route_scores", route_scores, "route_ids", route_ids, num_columns=len(route_names))
    correct = route_scores.argmax(axis=1) == route_ids
    recalls = _means_by_route(correct, route_ids, len(route_names))
    metrics, precisions = {"route_accuracy": float(correct.mean())}, []
    for route, name in enumerate(route_names):
        metrics[f"{name}/route_recall"] = recalls[route]
        precisions.append(precision_at_recall(route_scores[:, route], route_ids == route))
        metrics[f"{name}/routed_precision_at_recall_80"] = precisions[-1]
    metrics["routed_precision_at_recall_80"] = _over_defined(np.mean, precisions)
    return metrics


def _means_by_route(correct: np.ndarray, route_ids: np.ndarray, num_routes: int) -> list[float]:
    by_route = [correct[route_ids == route] for route in range(num_routes)]
    return [float(values.mean()) if values.size else float("nan") for values in by_route]


def precision_at_recall(scores: np.ndarray, is_home: np.ndarray, recall: float = 0.8) -> float:
    """
    The greatest precision of a decision score >= threshold, over all thresholds that find at least the fraction
    `recall` of the samples; NaN if there are none to find. It depends only on the order of the scores.

    Args:
        scores (`np.ndarray`): floats `[N]`.
        is_home (`np.ndarray`): `bool [N]`, which samples are to be found.
        recall (`float`, defaults to 0.8): above 0, at most 1.
    """
    from sklearn.metrics import precision_recall_curve

    if not is_home.any():
        return float("nan")
    precisions, recalls, _ = precision_recall_curve(is_home, scores)
    return float(precisions[recalls >= recall].max())


def calibrate_thresholds(scores: np.ndarray, home_routes: np.ndarray) -> list[float]:
    """
    The threshold of each route that maximises F1 of the decision score > threshold.

    Fit it only on a held-out part of the training set or on a calibration set: on the evaluation set the thresholds
    would be chosen with the answers known.

    The threshold is halfway between the lowest accepted score and the next lower one, rounded to `float32` so that
    storing it loses nothing. It is the lower score if the two are too close for that, and just below the lowest score
    if all are accepted. Among thresholds of equal F1 the highest is taken, which has the best precision.

    Args:
        scores (`np.ndarray`): floats `[N, K]`.
        home_routes (`np.ndarray`): integers `[N]`; every route needs a sample.

    Returns:
        `list[float]`: K thresholds.

    Raises:
        TypeError: `scores` are not a float array or `home_routes` not an integer array.
        ValueError: shapes that do not match, scores that are NaN or infinite, routes out of range or without a sample.
    """
    from sklearn.metrics import precision_recall_curve

    home_routes = check_scores("scores", scores, "home_routes", home_routes)
    thresholds = []
    for route in range(scores.shape[1]):
        is_home = home_routes == route
        num_home = int(is_home.sum())
        if num_home == 0:
            raise ValueError(f"`home_routes` has no sample of route {route}, so its threshold cannot be calibrated.")
        route_scores = scores[:, route].astype(np.float64)
        # `candidates` increase; a decision is score >= candidate. The last recall, 0, belongs to no candidate.
        _, recall, candidates = precision_recall_curve(is_home, route_scores)
        num_found = np.rint(recall[:-1] * num_home)
        num_accepted = len(route_scores) - np.searchsorted(np.sort(route_scores), candidates, side="left")
        # Computed from whole numbers, so that equal F1 are equal floats, and the choice among them is defined.
        f1 = 2 * num_found / (num_accepted + num_home)
        best = int(np.flatnonzero(f1 == f1.max())[-1])
        below = route_scores[route_scores < candidates[best]]
        thresholds.append(_threshold_between(float(below.max()) if below.size else None, float(candidates[best])))
    return thresholds


def _threshold_between(lower: float | None, upper: float) -> float:
    """A float t with lower <= t < upper."""
    if lower is None:
        return float(np.nextafter(np.float32(upper), np.float32(-np.inf)))
    middle = float(np.float32(lower / 2 + upper / 2))
    return middle if lower <= middle < upper else lower


def _over_defined(reduce: Callable[[list[float]], float], values: Sequence[float]) -> float:
    defined = [value for value in values if not np.isnan(value)]
    return float(reduce(defined)) if defined else float("nan")


def _check_matrix(name: str, matrix: np.ndarray) -> None:
    if not isinstance(matrix, np.ndarray) or matrix.dtype.kind != "f":
        kind = f"a `{matrix.dtype}` array" if isinstance(matrix, np.ndarray) else f"a `{type(matrix).__name__}`"
        raise TypeError(f"`{name}` is {kind}; a float array is needed: `tensor.float().cpu().numpy()`.")
    if matrix.ndim != 2 or matrix.size == 0:
        raise ValueError(f"`{name}` has shape {list(matrix.shape)}; [samples, columns], not empty, is needed.")
    if not np.isfinite(matrix).all():
        row, column = np.argwhere(~np.isfinite(matrix))[0]
        raise ValueError(f"`{name}` has {matrix[row, column]} at [{row}, {column}]; all values must be finite.")


def check_scores(
    name: str, matrix: np.ndarray, ids_name: str, ids: np.ndarray, *, num_columns: int | None = None
) -> np.ndarray:
    """`ids` as `int64`. Raises `TypeError` or `ValueError` unless they are ids `[N]` of columns of `matrix [N, C]`."""
    _check_matrix(name, matrix)
    if num_columns is not None and matrix.shape[1] != num_columns:
        raise ValueError(f"`{name}` has {matrix.shape[1]} columns and `route_names` {num_columns} names.")
    if not isinstance(ids, np.ndarray) or ids.dtype.kind not in "iu":
        raise TypeError(f"`{ids_name}` must be an array of integers, got {ids!r}.")
    if ids.shape != (len(matrix),):
        raise ValueError(f"`{ids_name}` has shape {list(ids.shape)} and `{name}` {list(matrix.shape)}; [N] is needed.")
    if ids.min() < 0 or ids.max() >= matrix.shape[1]:
        raise ValueError(
            f"`{ids_name}` goes from {ids.min()} to {ids.max()}; allowed are the columns of `{name}`, 0 to "
            f"{matrix.shape[1] - 1}."
        )
    return ids.astype(np.int64)
