"""A rehearsal, before any work: all that comes after extraction is tried, on copies and on a few samples."""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from numbers import Number
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState
from transformers.trainer_utils import TrainOutput

from ..data.columns import is_hf_dataset, single_labels
from ..data.partition import Partition
from ..model_card.card import check_card
from ..modeling.masking import UNION
from .callbacks import ModelCardCallback
from .evaluation_identity import evaluation_sets
from .extraction import scoring_batches
from .plan import Round
from .prune_rule import PruneRule
from .randomness import Stream, seeded
from .route_trainer import RouteTrainer
from .run_report import describe_run, report_round


logger = logging.getLogger(__name__)

_MOST = 64  # pairs of a route and a label to try; a sample of every route is tried in any case
_ACCELERATOR_STATE = ("_models", "_optimizers", "_schedulers", "_dataloaders", "step")


def rehearse(trainer: RouteTrainer, round_: Round) -> None:
    """
    Tries how prune events measure, how a joint retraining begins, and what a round ends with: evaluation and its
    metrics, logging, report and card. All processes must call it. Nothing changes: no weight, buffer, setting,
    generator, callback or file.

    An own `compute_metrics` that fails on a few samples is given all: only those may suffice for it.

    Raises:
        Exception: whatever the run would raise after extraction.
    """
    trial, args = replace(round_, name="rehearsal"), trainer.args
    with _failures_logged(), seeded((args.seed, Stream.REHEARSAL), args.device), _on_copies(trainer):
        with trainer.in_round(trial, num_steps_before=0):
            _try_activity(trainer)
            _begin_retraining(trainer, Path(args.output_dir) / trial.name)
            metrics = {} if trainer.eval_dataset is None else _evaluate(trainer)
            _try_calibration_data(trainer)
        if trainer.processes.rank == 0:
            _write_nowhere(trainer, trial, metrics)


@contextlib.contextmanager
def _failures_logged() -> Iterator[None]:
    try:
        yield
    except Exception:
        logger.error("what comes after extraction was tried on a few samples, and failed; nothing has been written.")
        raise


@_failures_logged()
def check_columns(trainer: RouteTrainer) -> None:
    """
    Raises `TypeError`, with the names, if the samples of a data set have no column that the backbone takes. With
    `remove_unused_columns=False` nothing is known: a collator may make inputs of any column.
    """
    if not trainer.args.remove_unused_columns:
        return
    backbone = trainer.model.backbone
    parameters = inspect.signature(backbone.forward).parameters.values()
    named = [each.name for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
    no_inputs = {"label", "labels", "label_ids", "route_ids", "return_dict", *(trainer.args.label_names or ())}
    inputs = [name for name in named if name not in no_inputs]
    trainer._set_signature_columns_if_needed()  # its caller may have set others
    kept = set(trainer._signature_columns or ()) - no_inputs
    data = {"train_dataset": trainer.run_data.require_training().dataset}
    data |= {
        f"eval_dataset[{name!r}]" if name else "eval_dataset": each for name, each in evaluation_sets(trainer).items()
    }
    if trainer.run_data.calibration_dataset is not None:
        data["calibration_dataset"] = trainer.run_data.calibration_dataset
    for argument, dataset in data.items():
        with seeded((trainer.args.seed, Stream.READING), trainer.args.device):
            columns = list(dataset[0])
        if not set(columns) & kept:
            raise TypeError(
                f"the samples of `{argument}` have the columns {', '.join(map(repr, columns))}, but the forward of "
                f"{type(backbone).__name__} takes {', '.join(map(repr, inputs))}, so it would get no input. Rename "
                f"the column of the features, as by `dataset.rename_column('image', {backbone.main_input_name!r})`, "
                "or set `remove_unused_columns=False` if your `data_collator` makes inputs of other columns."
            )


@contextlib.contextmanager
def _on_copies(trainer: RouteTrainer) -> Iterator[None]:
    """
    The trainer works on copies of all that it changes. Early stopping takes part, which checks arguments; other
    callbacks do not, since they may write. Afterwards the trainer is as before.
    """
    kept, accelerator = dict(trainer.__dict__), trainer.accelerator
    kept_by_accelerator = {name: getattr(accelerator, name) for name in _ACCELERATOR_STATE}
    trainer.model = trainer.model_wrapped = copy.deepcopy(trainer.model)
    for name in ("args", "control", "callback_handler", "run_data", "_memory_tracker"):
        setattr(trainer, name, copy.copy(kept[name]))
    trainer.state = TrainerState()
    callbacks = trainer.callback_handler.callbacks
    stops_early = any(isinstance(callback, EarlyStoppingCallback) for callback in callbacks)
    trainer.callback_handler.callbacks = [EarlyStoppingCallback()] if stops_early else []
    try:
        yield
    finally:
        trainer.__dict__.clear()
        trainer.__dict__.update(kept)
        accelerator.__dict__.update(kept_by_accelerator)


def _try_activity(trainer: RouteTrainer) -> None:
    """Measures the activity that prune events rank by, of the initial weights on a batch of the first route."""
    if trainer.args.prune_criterion == "activity":
        inputs = trainer.ticket_inputs(next(scoring_batches(trainer, 0, 0)))
        rule, autocast = PruneRule.of(trainer.model, trainer.args), trainer.compute_loss_context_manager()
        with trainer.model.route_context(0):
            rule.measure(trainer.model.backbone, [inputs], autocast)


class _BegunError(Exception):
    pass


class _StopAtBegin(TrainerCallback):
    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        raise _BegunError


def _begin_retraining(trainer: RouteTrainer, folder: Path) -> None:
    """Prepares a joint retraining up to its first step: checkpointing, noise, optimizer, schedule, early stopping."""
    trainer.add_callback(_StopAtBegin())
    with contextlib.suppress(_BegunError):
        trainer.retrain_jointly(folder)
    trainer.remove_callback(_StopAtBegin)


class _MetricsError(Exception):
    """Metrics fail, for the reason that is the cause of this error. A larger number of samples may have them."""


def _evaluate(trainer: RouteTrainer) -> dict[str, Any]:
    """
    The metrics of a few samples; if own metrics or methods fail on these, those of all. Methods that fail on all too
    are warned of only: they may read what training has left.
    """
    all_samples, compute = trainer.eval_dataset, trainer.compute_metrics
    has_own_metrics = compute not in (None, trainer.compute_ticket_metrics)
    # Methods may fail on one process alone, and the others would wait for it.
    has_own_methods = not type(trainer).__module__.startswith(f"{__package__}.") and trainer.args.world_size == 1
    few = {name: _few(trainer, dataset) for name, dataset in evaluation_sets(trainer).items()}
    attempts = [few if isinstance(all_samples, dict) else few[""]]
    failure: Exception | None = None
    for samples in [*attempts, all_samples] if has_own_metrics or has_own_methods else attempts:
        trainer.eval_dataset = samples
        if has_own_metrics:
            trainer.compute_metrics = _watched(compute)
        try:
            metrics = trainer.evaluate()
            _check_best_metric(trainer, metrics)
            return metrics
        except _MetricsError as error:  # on all processes alike: metrics are of the samples of all
            failure = error
        except Exception as error:
            if not has_own_methods:
                raise
            failure = error
    if isinstance(failure, _MetricsError):
        raise failure.__cause__ or failure
    logger.warning(
        f"the evaluation of {type(trainer).__name__} could not be tried before training ({failure!r}). If it fails "
        "after it, no step is lost: the model is saved before."
    )
    return {}


def _watched(compute: Any) -> Any:
    """A copy of own metrics, which may count what they see, whose errors are told from others."""
    with contextlib.suppress(Exception):  # whatever cannot be copied
        compute = copy.deepcopy(compute)

    def compute_metrics(*args: Any, **kwargs: Any) -> Any:
        try:
            metrics = compute(*args, **kwargs)
            if kwargs.get("compute_result", True):
                _check_metrics(metrics)
            return metrics
        except Exception as error:
            raise _MetricsError from error

    return compute_metrics


def _check_metrics(metrics: Any) -> None:
    """Raises `TypeError` unless own metrics are a dict, without arrays and lists."""
    if not isinstance(metrics, dict):
        raise TypeError(
            f"`compute_metrics` gives {metrics!r}, a {type(metrics).__name__}; a dict of numbers by their names is "
            "needed, such as {'accuracy': 0.9}."
        )
    for name, value in metrics.items():
        is_number = isinstance(value, torch.Tensor) and value.numel() == 1  # which `Trainer` takes for one
        if isinstance(value, (np.ndarray, torch.Tensor, list, tuple)) and not is_number:
            raise TypeError(
                f"`compute_metrics` gives {value!r}, a {type(value).__name__}, for {name!r}; a metric is a number: "
                f"give `value.item()` of a single one, or each of several a name, such as '{name}_0'."
            )


def _check_best_metric(trainer: RouteTrainer, metrics: dict[str, Any]) -> None:
    if trainer.args.eval_strategy != "no":
        try:
            trainer._determine_best_metric(metrics, trial=None)
        except KeyError as error:
            raise _MetricsError from error


def _few(trainer: RouteTrainer, dataset: Any) -> Any:
    """
    A few samples of an evaluation set: two of every pair of a route and a label, or of `_MOST` pairs, among them those
    with unusual labels.
    """
    partition = trainer.eval_partition(dataset)
    route_ids, labels = partition.route_ids.tolist(), [None] * len(partition.route_ids)
    if trainer.model.config.ticket_task == "labels":
        labels = [_comparable(label) for label in single_labels(dataset) or labels]
    pairs: dict[tuple[int, Any], list[int]] = {}
    for index, pair in enumerate(zip(route_ids, labels, strict=True)):
        pairs.setdefault(pair, []).append(index)
    # Numbers come last, in their order, so the smallest and the largest are always among the chosen.
    ordered = sorted(pairs, key=lambda pair: (isinstance(pair[1], Number), _sort_key(pair[1]), pair[0]))
    chosen = [ordered[position] for position in np.unique(np.linspace(0, len(ordered) - 1, _MOST).astype(int))]
    chosen += {route: (route, label) for route, label in reversed(ordered)}.values()
    return _rows(trainer, dataset, partition, [index for pair in chosen for index in pairs[pair][:2]])


def _comparable(label: Any) -> Any:
    """A label that is a number or a text; other labels, such as those of tokens, are not told apart."""
    return label if label is None or isinstance(label, (Number, str)) else ""


def _sort_key(label: Any) -> Any:
    return label if isinstance(label, Number) else str(label)


def _rows(trainer: RouteTrainer, dataset: Any, partition: Partition, indices: list[int]) -> Any:
    """Some rows of a data set; of one of `datasets`, another of `datasets`."""
    chosen = sorted(set(indices))
    rows = dataset.select(chosen) if is_hf_dataset(dataset) else Subset(dataset, chosen)
    part = replace(partition, route_ids=partition.route_ids[chosen], allow_empty=True)
    trainer.run_data.remember(rows, part)
    return rows


@torch.no_grad()
def _try_calibration_data(trainer: RouteTrainer) -> None:
    """Runs the model on a sample of every route of the data that thresholds and router are fitted on."""
    dataset = trainer.run_data.calibration_dataset
    if dataset is not None:
        partition = trainer.eval_partition(dataset)
        trainer.model.eval()
        firsts = np.unique(partition.route_ids, return_index=True)[1].tolist()
        for inputs, _ in trainer.batches_with_routes(_rows(trainer, dataset, partition, firsts)):
            trainer.model(**inputs, route_ids=UNION)


def _write_nowhere(trainer: RouteTrainer, trial: Round, metrics: dict[str, Any]) -> None:
    """Makes the report and the card that these metrics would be in."""
    model, args, card = trainer.model, trainer.args, ModelCardCallback()
    card.on_train_begin(args, trainer.state, trainer.control)
    report = report_round(model, trial, output=TrainOutput(0, 0.0, {}), seconds=0.0)
    report |= {"metrics": metrics, "surroundings": card.environment}
    json.dumps(report)
    training = trainer.run_data.require_training().partition
    evaluations = {name: trainer.eval_partition(dataset) for name, dataset in evaluation_sets(trainer).items()}
    check_card(model, describe_run(model, args, [report], training=training, evaluations=evaluations))
