"""What tickets that predict labels must be compared with before their table is believed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from datasets import Dataset

from hf_rtl import RTLModel, RTLTrainer
from hf_rtl.metrics import label_metrics


def baselines(
    trainer: RTLTrainer, make_model: Callable[..., RTLModel], train: Dataset, test: Dataset
) -> list[dict[str, Any]]:
    """
    Reports with a `method` beside those of a finished run: its last round with the other router, and for every round
    a single mask for all data, of the tickets' density; also a dense model.

    Args:
        trainer ([`RTLTrainer`]): after `train()`. Its model is left with the other router.
        make_model (`Callable`): makes the model with given `route_names`, from the same initial weights each time.
        train, test (`Dataset`): the data of the run.
    """
    reports = []
    if trainer.args.router != "given":
        router = "score" if trainer.args.router == "centroid" else "centroid"
        trainer.fit_router(router)
        reports.append({**trainer.rounds[-1], "method": f"RTL, router {router}", "metrics": trainer.evaluate()})
    sparsities = sorted({0.0, *trainer.args.target_sparsity})
    return reports + _single_mask(trainer, make_model, train, test, "single-mask", sparsities)


def dense(
    trainer: RTLTrainer, make_model: Callable[..., RTLModel], train: Dataset, test: Dataset
) -> list[dict[str, Any]]:
    """The report of a dense model alone; see `baselines`."""
    return _single_mask(trainer, make_model, train, test, "dense", [0.0])


def _single_mask(
    trainer: RTLTrainer,
    make_model: Callable[..., RTLModel],
    train: Dataset,
    test: Dataset,
    folder: str,
    sparsities: list[float],
) -> list[dict[str, Any]]:
    """
    The rounds of iterative magnitude pruning, the same trainer on the same data as one route, with as many samples in
    extraction and in retraining as all tickets have together. Its round at sparsity 0 prunes nothing: a dense model.
    """
    args, plan, names = trainer.args, trainer.plan(), trainer.model.route_names
    route_ids = np.array(test[args.route_column])
    single = RTLTrainer(
        make_model(route_names=["all"]),
        replace(
            args,
            output_dir=f"{args.output_dir}/{folder}",
            target_sparsity=sparsities,
            extraction_steps=sum(plan.extraction_steps),
            max_steps=plan.retraining_steps,
            router="given",
            route_column=None,
        ),
        train_dataset=train,
        eval_dataset=test,
        compute_metrics=lambda output: label_metrics(output.predictions, output.label_ids, route_ids, names),
        processing_class=trainer.processing_class,
    )
    single.train()
    return [{**report, "method": "single mask" if report["sparsity"] else "dense"} for report in single.rounds]
