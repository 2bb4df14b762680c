"""Metrics of tickets: on samples of their own routes, and on samples whose route is not given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.trainer_utils import EvalPrediction

from ..data.columns import single_labels
from ..data.partition import Partition
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
from .router_fitting import sample_evidence


SINGLE_PREDICTION_CLASSES = (
    RTLModelForImageClassification,
    RTLModelForAudioClassification,
    RTLModelForSequenceClassification,
)


def routed_outputs(model: RTLModel, inputs: dict[str, Any], logits: Tensor) -> dict[str, Tensor]:
    """
    The outputs for inputs whose route is not given; for tickets that predict labels, also those of their union.

    Args:
        model ([`RTLModel`]): in evaluation mode.
        inputs (`dict[str, Any]`): a batch, without labels and routes.
        logits (`Tensor`): the model's logits for the same batch.

    Returns:
        `route_ids` and `route_scores` if the model has a router. Tickets for labels also give `union_logits`, and with
        a router `logits`, those of the route that it chooses.
    """
    outputs: dict[str, Tensor] = {}
    membership = model.config.ticket_task == "membership"
    if not membership:
        outputs["union_logits"] = model(**inputs, route_ids=UNION).logits
    if model.router is not None:
        # With membership tickets `logits` are the scores of all tickets.
        scored = membership and isinstance(model.router, ScoreRouter)
        decision = model.decide(logits.float() if scored else sample_evidence(model.router, model, inputs))
        outputs["route_ids"], outputs["route_scores"] = decision.route_ids, decision.route_scores
        if not membership:
            outputs["logits"] = model(**inputs, route_ids=decision.route_ids).logits
    return outputs


@torch.no_grad()
def mean_ticket_loss(trainer: Any, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """
    The mean over all membership tickets of a loss that training takes of a single ticket.

    Args:
        trainer ([`RouteTrainer`]): its `compute_loss` is called once for every route.
        model (`nn.Module`): its model, as accelerate has wrapped it.
        inputs (`dict[str, Any]`): a batch with home routes as `labels`.
    """
    inputs = trainer._prepare_inputs(inputs)
    num_items = trainer._get_num_items_in_batch([inputs], trainer.args.device)
    losses = []
    for route in range(trainer.model.num_routes):
        own = {**inputs, "labels": trainer.model.ticket_labels((inputs["labels"] == route).long())}
        with trainer.model.route_context(route), trainer.compute_loss_context_manager():
            losses.append(trainer.compute_loss(model, own, num_items_in_batch=num_items).float())
    return torch.stack(losses).mean()


def ticket_metrics(
    model: RTLModel, prediction: EvalPrediction, routed: Sequence[Mapping[str, Tensor]], route_ids: np.ndarray
) -> dict[str, float]:
    """
    The metrics of `hf_rtl.metrics` for the model's task, and those of the router's decisions if there is a router.

    Args:
        prediction (`EvalPrediction`): for the whole data set, each sample through the ticket of its route.
        routed: the results of `routed_outputs` for its batches.
        route_ids (`np.ndarray`): `int64 [N]`, the route of each sample.
    """
    outputs = {name: torch.cat([batch[name] for batch in routed]).float().cpu().numpy() for name in routed[0]}
    scores, labels = join_batches(prediction.predictions), join_batches(prediction.label_ids)
    if model.config.ticket_task == "membership":
        return _membership_metrics(model, scores, labels, outputs)
    answers = {"": scores, "union_": outputs["union_logits"]}
    if model.router is not None:
        answers["inferred_"] = outputs["logits"]
    metrics: dict[str, float] = {}
    # Regression and multi-label tasks have no label metrics here; their loss is their metric.
    if labels.ndim == 1 and labels.dtype.kind in "iu" and scores.shape[1] > 1:
        for prefix, logits in answers.items():
            metrics |= label_metrics(logits, labels, route_ids, model.route_names, prefix=prefix)
    if model.router is not None:
        metrics |= router_metrics(outputs["route_scores"], route_ids, model.route_names)
        metrics["fallback_fraction"] = float((outputs["route_ids"] != outputs["route_scores"].argmax(axis=1)).mean())
    return metrics


def chance_levels(model: RTLModel, dataset: Any, partition: Partition) -> dict[str, float] | None:
    """
    Route -> what its ticket reaches without reading its input: a balanced accuracy of 0.5, or for labels the share of
    the commonest label among the route's samples. `None` where a sample has no single label that is a class.
    """
    if model.config.ticket_task == "membership":
        return dict.fromkeys(model.route_names, 0.5)
    labels = single_labels(dataset)
    if labels is None or model.config.num_labels == 1:
        return None
    levels = {}
    for route, name in enumerate(model.route_names):
        _, counts = np.unique(np.asarray(labels)[partition.route_ids == route], return_counts=True)
        levels[name] = float(counts.max() / counts.sum()) if counts.size else float("nan")
    return levels


def join_batches(values: Any) -> Any:
    """The arrays of an evaluation as one: with `eval_do_concat_batches=False`, `Trainer` gives one for each batch."""
    return np.concatenate(values) if isinstance(values, list) else values


def _membership_metrics(
    model: RTLModel, scores: np.ndarray, home_routes: np.ndarray, outputs: Mapping[str, np.ndarray]
) -> dict[str, float]:
    metrics = membership_metrics(scores, home_routes, model.route_names, thresholds=model.config.thresholds)
    if model.router is not None:
        metrics |= router_metrics(outputs["route_scores"], home_routes, model.route_names)
    # A single sample cannot show whether a ticket's score is always the same.
    num_constant = float(len(constant_tickets(scores))) if len(scores) > 1 else float("nan")
    return {**metrics, "constant_tickets": num_constant}


def check_router(name: str, model: RTLModel, calibration_dataset: Any) -> None:
    """Raises `ValueError` unless a router of this name can be fitted to the model."""
    check_choice("router", name, ROUTER_CLASSES)
    if name == "entropy" and model.config.ticket_task == "membership":
        raise ValueError("`router` = 'entropy' suits tickets for labels; for membership use 'score'.")
    if name == "entropy" and model.config.num_labels == 1:
        raise ValueError("`router` = 'entropy' compares several labels, and these tickets have one; use 'centroid'.")
    if name != "centroid" and not isinstance(model, SINGLE_PREDICTION_CLASSES):
        raise ValueError(
            f"`router` = {name!r} reads one prediction a sample, which {type(model).__name__} does not give; use "
            "'centroid'."
        )
    if calibration_dataset is None:
        raise ValueError(
            f"`router` = {name!r} is fitted on data that no ticket was trained on: set `calibration_fraction`, for "
            "example `RTLTrainingArguments(calibration_fraction=0.1, …)`, or pass a `calibration_dataset`."
        )
