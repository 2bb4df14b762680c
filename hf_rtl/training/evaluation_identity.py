"""What the figures of an evaluation are of: a stored model is evaluated again unless they are shown to be the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .data_identity import identify_data
from .route_trainer import RouteTrainer


_ARGUMENTS = ("per_device_eval_batch_size", "prediction_loss_only", "label_names")


def identify_evaluation(trainer: RouteTrainer) -> dict[str, Any]:
    """
    The identity of an evaluation as JSON values: `data`, name of an evaluation set, `""` for a single one -> its
    identity; `arguments`; and `own_code`, whether functions of the caller take part, of which nothing is known.
    """
    membership = trainer.model.config.ticket_task == "membership"
    return {
        "data": {
            name: identify_data(dataset, trainer.eval_partition(dataset), trainer.args.device, membership=membership)
            for name, dataset in evaluation_sets(trainer).items()
        },
        "arguments": trainer.args.select_values(_ARGUMENTS),
        "own_code": trainer.has_own_evaluation or not type(trainer).__module__.startswith(f"{__package__}."),
    }


def evaluation_sets(trainer: RouteTrainer) -> dict[str, Any]:
    """Name of an evaluation set, `""` for a single one -> the set."""
    given = trainer.eval_dataset
    sets = given if isinstance(given, dict) else {"": given}
    return {name: dataset for name, dataset in sets.items() if dataset is not None}


def is_known(report: Mapping[str, Any], evaluation: Mapping[str, Any]) -> bool:
    """Whether the figures of a report are those that the evaluation with this identity would give."""
    is_certain = not evaluation["own_code"] and all(data["features"] for data in evaluation["data"].values())
    return is_certain and report.get("evaluation") == evaluation


def identify_calibration(trainer: RouteTrainer) -> dict[str, Any] | None:
    """The identity of data that a run fits thresholds or a router on, if they are no part of the training data."""
    args, dataset = trainer.args, trainer.run_data.calibration_dataset
    are_used = trainer.model.config.ticket_task == "membership" or args.router != "given"
    if dataset is None or args.calibration_fraction or not are_used:
        return None
    partition = trainer.eval_partition(dataset)
    return identify_data(dataset, partition, args.device, membership=True, make_collate=trainer.collate_alone)
