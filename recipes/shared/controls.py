"""The controls of `recipes/prune.py`: reports that show whether the results of a run come from its tickets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.trainer_utils import EvalPrediction

from hf_rtl import RTLModel, RTLTrainer
from hf_rtl.metrics import label_metrics, membership_metrics
from hf_rtl.pruning import random_masks, shuffled_masks

from .models import model_of_round, tickets_of_round
from .plain_networks import one_vs_rest


# Name of a control -> the function that makes masks of a ticket's densities.
CONTROL_MASKS = {"random masks": random_masks, "layer-shuffled masks": shuffled_masks}


def membership_controls(trainer: RTLTrainer, backbone: str, **options: Any) -> list[dict[str, Any]]:
    """
    Reports of the controls of a finished run, each with its `method`. Every round has three: the tickets with routes
    shifted by one, each answering for its neighbour, and random and layer-shuffled masks of the tickets' densities,
    retrained as tickets. The last report is of a dense one-vs-rest model, with a logit per route, on the same batches.
    """
    reports = []
    for report in trainer.rounds:
        reports.append(_shifted(trainer, report))
        tickets = tickets_of_round(trainer, report)
        for method in CONTROL_MASKS:
            reports.append({"method": method, **with_other_masks(trainer, report, tickets, method)})
    return reports + dense_one_vs_rest(trainer, backbone, **options)


def dense_one_vs_rest(trainer: RTLTrainer, backbone: str, **options: Any) -> list[dict[str, Any]]:
    """The report of a dense one-vs-rest model alone, trained on the batches of the first round."""
    metrics = one_vs_rest(trainer, backbone, **options)
    return [{"method": "dense one-vs-rest", "sparsity": None, "metrics": metrics}]


def with_other_masks(
    trainer: RTLTrainer, report: dict[str, Any], tickets: Sequence[Sequence[Tensor]], method: str
) -> dict[str, Any]:
    """The report of a round that was retrained with the masks of a control in `CONTROL_MASKS`."""
    masks = [
        CONTROL_MASKS[method](mask, generator=torch.Generator().manual_seed(trainer.args.seed * 1000 + route))
        for route, mask in enumerate(tickets)
    ]
    name = f"{method.replace(' ', '-')}-sparsity-{report['sparsity']:g}"
    return trainer.retrain(masks, like=report["folder"], name=name)


def _shifted(trainer: RTLTrainer, report: dict[str, Any]) -> dict[str, Any]:
    """The report of a round in which ticket k scores for route k + 1."""
    model = model_of_round(trainer, report)
    scores, homes = predictions(trainer, model)
    metrics = membership_metrics(np.roll(scores, 1, axis=1), homes, model.route_names)
    return {"method": "routes shifted by one", "sparsity": report["sparsity"], "metrics": metrics}


def predictions(trainer: RTLTrainer, model: RTLModel) -> tuple[np.ndarray, np.ndarray]:
    """
    The scores of all tickets `[N, K]` and the route of every sample `[N]`; of tickets for labels, the logits `[N, C]`
    of every sample's ticket and the labels `[N]`.
    """
    before, trainer.model = trainer.model, model.to(trainer.args.device)
    try:
        loader = trainer.get_eval_dataloader()
        output = trainer.evaluation_loop(loader, description="Scores", prediction_loss_only=False)
    finally:
        trainer.model = before
    return output.predictions, output.label_ids


def labels_controls(trainer: RTLTrainer, make_model: Callable[..., RTLModel], **metrics: Any) -> list[dict[str, Any]]:
    """
    Reports of the controls of a finished run, each with its `method`: the last round with the other router; for every
    round, a single mask for all data, of the tickets' density; and a dense model.

    Args:
        trainer ([`RTLTrainer`]): a trainer after `train()`. Its model keeps the other router.
        make_model (`Callable`): makes the model with given `route_names`, with the same initial weights at every call.
        **metrics: `compute_metrics` and `preprocess_logits_for_metrics` of the trainer, if it was given any.
    """
    reports = []
    # Scores and centroids of tickets are compared for tasks with one prediction a sample.
    if trainer.args.router != "given" and not metrics:
        router = "score" if trainer.args.router == "centroid" else "centroid"
        trainer.fit_router(router)
        reports.append({**trainer.rounds[-1], "method": f"RTL, router {router}", "metrics": trainer.evaluate()})
    sparsities = sorted({0.0, *trainer.args.target_sparsity})
    return reports + _single_mask(trainer, make_model, "single-mask", sparsities, metrics)


def dense_network(trainer: RTLTrainer, make_model: Callable[..., RTLModel], **metrics: Any) -> list[dict[str, Any]]:
    """The report of a dense model alone; see `labels_controls`."""
    return _single_mask(trainer, make_model, "dense", [0.0], metrics)


def _single_mask(
    trainer: RTLTrainer,
    make_model: Callable[..., RTLModel],
    folder: str,
    sparsities: list[float],
    metrics: dict[str, Any],
) -> list[dict[str, Any]]:
    """
    Reports of iterative magnitude pruning: the same trainer and data with a single route, which has as many samples in
    extraction and in retraining as all tickets together. The round at sparsity 0 trains a dense model.
    """
    args, plan = trainer.args, trainer.plan()
    # Without routes, the trainer would not measure every route by itself.
    route_ids = trainer.eval_partition(trainer.eval_dataset).route_ids
    measure = partial(_label_metrics, route_ids=route_ids, names=trainer.model.route_names)
    single = RTLTrainer(
        make_model(route_names=["all"]),
        replace(
            args,
            output_dir=f"{args.output_dir}/{folder}",
            push_to_hub=False,
            target_sparsity=sparsities,
            extraction_steps=sum(plan.extraction_steps),
            # Without steps, `num_train_epochs` is 0.
            max_steps=plan.retraining_steps or -1,
            router="given",
            route_column=None,
        ),
        train_dataset=trainer.train_dataset,
        eval_dataset=trainer.eval_dataset,
        **(metrics or {"compute_metrics": measure}),
        data_collator=trainer.data_collator,
        processing_class=trainer.processing_class,
    )
    single.train()
    return [{**report, "method": "single mask" if report["sparsity"] else "dense"} for report in single.rounds]


def _label_metrics(output: EvalPrediction, *, route_ids: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    return label_metrics(output.predictions, output.label_ids, route_ids, names)
