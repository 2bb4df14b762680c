"""What is measured of tickets: on samples of their own routes, and where nobody tells the route."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.trainer_utils import EvalPrediction

from ..metrics import constant_tickets, label_metrics, membership_metrics, router_metrics
from ..modeling.checks import check_choice
from ..modeling.masking import UNION
from ..modeling.modeling_rtl import (
    RTLModel,
    RTLModelForAudioClassification,
    RTLModelForImageClassification,
    RTLModelForSequenceClassification,
)
from ..modeling.routers import ROUTER_CLASSES, ScoreRouter
from .router_fitting import evidence_of_each


ONE_PREDICTION_PER_SAMPLE = (
    RTLModelForImageClassification,
    RTLModelForAudioClassification,
    RTLModelForSequenceClassification,
)


def routed_outputs(model: RTLModel, inputs: dict[str, Any], logits: Tensor) -> dict[str, Tensor]:
    """
    What comes out for inputs whose route is not given; for tickets that predict labels, also what their union says.

    Args:
        model ([`RTLModel`]): in evaluation mode.
        inputs (`dict[str, Any]`): a batch, without labels and routes.
        logits (`Tensor`): those of the same batch that have come out already.

    Returns:
        `route_ids` and `route_scores` if the model has a router; `union_logits`, and with a router `logits`, of
        tickets for labels.
    """
    outputs: dict[str, Tensor] = {}
    membership = model.config.ticket_task == "membership"
    if not membership:
        outputs["union_logits"] = model(**inputs, route_ids=UNION).logits
    if model.router is not None:
        # Membership tickets have all scored.
        scored = membership and isinstance(model.router, ScoreRouter)
        decision = model.decide(logits.float() if scored else evidence_of_each(model.router, model, inputs))
        outputs["route_ids"], outputs["route_scores"] = decision.route_ids, decision.route_scores
        if not membership:
            outputs["logits"] = model(**inputs, route_ids=decision.route_ids).logits
    return outputs


def ticket_metrics(
    model: RTLModel, prediction: EvalPrediction, routed: Sequence[Mapping[str, Tensor]], route_ids: np.ndarray
) -> dict[str, float]:
    """
    The metrics of `hf_rtl.metrics` for the model's task, and with a router those of its decisions.

    Args:
        prediction (`EvalPrediction`): of the whole data set, each sample through the ticket of its route.
        routed: what `routed_outputs` gave for its batches.
        route_ids (`np.ndarray`): `int64 [N]`, the route of each sample.
    """
    outputs = {name: torch.cat([batch[name] for batch in routed]).float().cpu().numpy() for name in routed[0]}
    if model.config.ticket_task == "membership":
        return _membership_metrics(model, prediction, outputs)
    scores, labels = prediction.predictions, prediction.label_ids
    answers = {"": scores, "union_": outputs["union_logits"]}
    if model.router is not None:
        answers["inferred_"] = outputs["logits"]
    metrics: dict[str, float] = {}
    # How good numbers to regress are, or several labels a sample, the loss says.
    if labels.ndim == 1 and labels.dtype.kind in "iu" and scores.shape[1] > 1:
        for prefix, logits in answers.items():
            metrics |= label_metrics(logits, labels, route_ids, model.route_names, prefix=prefix)
    if model.router is not None:
        metrics |= router_metrics(outputs["route_scores"], route_ids, model.route_names)
        metrics["fallback_fraction"] = float((outputs["route_ids"] != outputs["route_scores"].argmax(axis=1)).mean())
    return metrics


def _membership_metrics(
    model: RTLModel, prediction: EvalPrediction, outputs: Mapping[str, np.ndarray]
) -> dict[str, float]:
    scores, home_routes = prediction.predictions, prediction.label_ids
    metrics = membership_metrics(scores, home_routes, model.route_names, thresholds=model.config.thresholds)
    if model.router is not None:
        metrics |= router_metrics(outputs["route_scores"], home_routes, model.route_names)
    return {**metrics, "constant_tickets": float(len(constant_tickets(scores)))}


def check_router(name: str, model: RTLModel, calibration_dataset: Any) -> None:
    """Raises `ValueError` unless a router of this name can be fitted."""
    check_choice("router", name, ROUTER_CLASSES)
    if name == "entropy" and model.config.ticket_task == "membership":
        raise ValueError("`router` = 'entropy' suits tickets for labels; for membership use 'score'.")
    if name == "entropy" and model.config.num_labels == 1:
        raise ValueError("`router` = 'entropy' compares several labels, and these tickets have one; use 'centroid'.")
    if name != "centroid" and not isinstance(model, ONE_PREDICTION_PER_SAMPLE):
        raise ValueError(
            f"`router` = {name!r} reads one prediction a sample, which {type(model).__name__} does not give; use "
            "'centroid'."
        )
    if calibration_dataset is None:
        raise ValueError(
            f"`router` = {name!r} is fitted on data that no ticket was trained on: set `calibration_fraction`, as "
            "`RTLTrainingArguments(calibration_fraction=0.1, …)`, or pass a `calibration_dataset`."
        )
