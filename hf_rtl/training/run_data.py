"""The data sets of a run with their routes, and checks that data, arguments and model fit each other."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import str_to_bool
from torch.optim.optimizer import Optimizer
from transformers import Trainer

from ..data.columns import (
    LABEL_COLUMNS,
    KeptColumns,
    check_label_column,
    check_labels,
    keeping,
    list_columns,
    single_labels,
)
from ..data.partition import Partition
from ..data.route_data import RouteData, check_partition, find_partition, route_columns
from ..data.rules import ByColumn, ByGroups
from ..modeling.modeling_rtl import RTLModel
from ..modeling.offloading import refuse_offloaded
from .evaluation import SINGLE_PREDICTION_CLASSES, check_router
from .training_args import RTLTrainingArguments


logger = logging.getLogger(__name__)


class RunData:
    """
    The data sets of a run, with the route of every sample.

    Args:
        model ([`RTLModel`]), args ([`RTLTrainingArguments`]): the model and arguments of the run.
        train_dataset, partition, eval_dataset, calibration_dataset: the same as for [`RTLTrainer`].
        has_collator (`bool`): whether a collator of the caller makes the `labels` of a batch, in its own way.
        has_own_loss (`bool`): whether a loss of the caller reads them, which says itself what they may be.

    Attributes:
        training ([`RouteData`], *optional*): the data that tickets are trained on, without the held-out samples.
        calibration_dataset (*optional*): the given one, or the samples held out of the training data.

    Raises:
        TypeError, ValueError: data, arguments and model do not fit each other. Nothing is written.
    """

    def __init__(
        self,
        model: RTLModel,
        args: RTLTrainingArguments,
        *,
        train_dataset: Any = None,
        partition: Partition | None = None,
        eval_dataset: Any = None,
        calibration_dataset: Any = None,
        has_collator: bool = False,
        has_own_loss: bool = False,
    ) -> None:
        self.training: RouteData | None = None
        if partition is None and args.route_column is None and train_dataset is not None:
            rule = model.partition_rule
            if isinstance(rule, (ByColumn, ByGroups)) and rule.column in list_columns(train_dataset):
                partition = rule.assign(train_dataset)
        self.calibration_dataset = calibration_dataset
        # If `args` name no column, the rule of this partition assigns other data too.
        self._given_partition = partition
        # (data set, partition) pairs, remembered because reading a column may fetch every sample.
        self._partitions: list[tuple[Any, Partition]] = []
        if partition is not None:
            partition = check_partition(partition, train_dataset, model.route_names)
        names = route_columns(args.route_column, str(model.config.ticket_task), partition)
        # Routes and labels, which are read several times.
        self.kept_columns = KeptColumns([*names, *LABEL_COLUMNS])
        with keeping(self.kept_columns):
            if train_dataset is not None:
                if partition is None:
                    partition = self._find_partition(model, args, train_dataset, allow_empty=False)
                _check_labels(model, train_dataset, partition, has_collator, has_own_loss)
                self.training = route_data(model, args, train_dataset, partition)
                if args.calibration_fraction:
                    if calibration_dataset is not None:
                        raise ValueError(
                            "`calibration_dataset` and `calibration_fraction` are both given; choose one."
                        )
                    self.training, held_out = self.training.hold_out(args.calibration_fraction, args.seed)
                    self.calibration_dataset = held_out.dataset
                    self.remember(held_out.dataset, held_out.partition)
                _check_batches(args, self.training)
            _check_competition(model, args)
            if args.router != "given":
                check_router(args.router, model, self.calibration_dataset)
                if args.router_fallback is not None:
                    model.route_index(args.router_fallback)
            # Evaluation and calibration data without routes must fail here, not after hours of training.
            evaluated = list(eval_dataset.values()) if isinstance(eval_dataset, dict) else [eval_dataset]
            for dataset in (*evaluated, calibration_dataset):
                if dataset is not None:
                    if predicts_single_labels(model) and not (has_collator or has_own_loss):
                        check_labels(dataset, model.config.num_labels, model.config.label2id)
                    # Thresholds and routers are fitted for every route.
                    allow_empty = dataset is not calibration_dataset
                    self.remember(dataset, self._find_partition(model, args, dataset, allow_empty))

    def __copy__(self) -> RunData:
        """A copy that remembers further partitions by itself."""
        other = object.__new__(RunData)
        vars(other).update(vars(self), _partitions=list(self._partitions))
        return other

    def remember(self, dataset: Any, partition: Partition) -> None:
        """Remembers the partition of a data set to evaluate on."""
        self._partitions.append((dataset, partition))

    def eval_partition(self, model: RTLModel, args: RTLTrainingArguments, dataset: Any) -> Partition:
        """The partition of a data set to evaluate on. Routes may be empty."""
        known = (partition for other, partition in self._partitions if other is dataset)
        return next(known, None) or self._find_partition(model, args, dataset)

    def has_routes(self, model: RTLModel, args: RTLTrainingArguments, dataset: Any) -> bool:
        """Whether a data set has a column that says the route of a sample, or needs none."""
        names = route_columns(args.route_column, str(model.config.ticket_task), self._given_partition)
        known = any(other is dataset for other, _ in self._partitions)
        return known or model.num_routes == 1 or not set(names).isdisjoint(list_columns(dataset))

    def require_training(self) -> RouteData:
        """The training data. Raises `ValueError` if there is none."""
        if self.training is None:
            raise ValueError("training needs a `train_dataset`.")
        return self.training

    def _find_partition(
        self, model: RTLModel, args: RTLTrainingArguments, dataset: Any, allow_empty: bool = True
    ) -> Partition:
        return find_partition(
            dataset,
            route_column=args.route_column,
            route_names=model.route_names,
            ticket_task=str(model.config.ticket_task),
            allow_empty=allow_empty,
            training=self._given_partition,
        )


def route_data(model: RTLModel, args: RTLTrainingArguments, dataset: Any, partition: Partition) -> RouteData:
    """A data set to train on, with the batch size and seeds of the arguments."""
    return RouteData(
        dataset,
        partition,
        membership=model.config.ticket_task == "membership",
        seed=args.seed if args.data_seed is None else args.data_seed,
        batch_size=args.route_batch_size,
        seed_transforms=args.seed_transforms,
    )


def check_arguments(model: RTLModel, args: RTLTrainingArguments, given: Mapping[str, Any]) -> None:
    """
    Checks that `args` and the other arguments of the trainer, `given`, fit the model and the machine.

    Raises:
        TypeError, ValueError: they do not fit.
        RuntimeError: the model is offloaded.
    """
    if not isinstance(model, RTLModel):
        raise TypeError(f"`model` must be an RTLModel, got {type(model).__name__}; make one with `from_backbone`.")
    if not isinstance(args, RTLTrainingArguments):
        raise TypeError(
            f"`args` must be RTLTrainingArguments, got {type(args).__name__}; it takes the arguments of "
            "`TrainingArguments`, and more."
        )
    refuse_offloaded(model, "a trainer")
    for name in ("optimizers", "model_init"):
        if given.get(name) not in (None, (None, None)):
            raise ValueError(f"`{name}` is not supported: every round makes a fresh optimizer on the same θ0.")
    if model.config.ticket_task == "membership" and args.rewind_to:
        raise ValueError(
            f"`rewind_to` = {args.rewind_to} trains one dense network on all data, but the head of membership "
            "tickets answers 'is this mine?', which has no meaning for all data at once; leave it at 0."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"one process sees {args.n_gpu} GPUs, so `Trainer` would use `nn.DataParallel`, whose replicas know no "
            f"masks. Launch one process per GPU with `torchrun --nproc_per_node={args.n_gpu}`, or set "
            "CUDA_VISIBLE_DEVICES=0."
        )
    _check_parallelism(args)
    _check_connected(args)
    _check_metrics(model, args, given)
    _check_optimizer(args, given.get("optimizer_cls_and_kwargs"))
    if args.gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise ValueError(f"`gradient_checkpointing` is not supported by the backbone, {_backbone_name(model)}.")
    if args.neftune_noise_alpha is not None and not _has_embedding(model):
        raise ValueError(
            f"`neftune_noise_alpha` = {args.neftune_noise_alpha} adds noise to an embedding layer, which the backbone "
            f"({_backbone_name(model)}) lacks; leave it out."
        )


def _backbone_name(model: RTLModel) -> str:
    return type(model.backbone).__name__


def _has_embedding(model: RTLModel) -> bool:
    try:
        return isinstance(model.get_input_embeddings(), torch.nn.Embedding)
    except NotImplementedError:  # transformers' answer for models without one
        return False


def has_default_metrics(model: RTLModel, compute_metrics: Any) -> bool:
    """Whether evaluation shows the metrics of `hf_rtl.metrics`."""
    return compute_metrics is None and isinstance(model, SINGLE_PREDICTION_CLASSES)


def _check_metrics(model: RTLModel, args: RTLTrainingArguments, given: Mapping[str, Any]) -> None:
    """Raises `ValueError` if the default metrics would not get what they need."""
    if not has_default_metrics(model, given.get("compute_metrics")):
        return
    reasons = {
        "preprocess_logits_for_metrics": given.get("preprocess_logits_for_metrics") and "read the logits themselves",
        "batch_eval_metrics": args.batch_eval_metrics and "are those of a whole data set",
        "label_names": "labels" not in (args.label_names or ["labels"]) and "read the input 'labels'",
    }
    for name, reason in reasons.items():
        if reason:
            raise ValueError(f"`{name}` needs `compute_metrics` of yours: the metrics of hf_rtl {reason}.")


def _check_optimizer(args: RTLTrainingArguments, own: tuple[Any, dict[str, Any]] | None) -> None:
    """Raises `ValueError` unless both phases can make the optimizer, with every argument that is given for it."""
    optimizer_class, kwargs = own or Trainer.get_optimizer_cls_and_kwargs(args)
    source = (
        f"`optim` = {str(args.to_dict()['optim'])!r}"
        if own is None
        else f"`optimizer_cls_and_kwargs` of {optimizer_class}"
    )
    if (
        not isinstance(optimizer_class, type)
        or not issubclass(optimizer_class, Optimizer)
        or ({"params", "model"} & kwargs.keys())
    ):
        raise ValueError(f"{source} is not supported: it makes parameter groups of its own, which cannot be masked.")
    if callable(getattr(optimizer_class, "train", None)):
        raise ValueError(f"{source} is not supported: it has other weights in training than in evaluation.")
    if "weight_decay" in kwargs:
        raise ValueError(f"{source} has a `weight_decay`, which the argument of that name replaces; set that one.")
    parts = args.optim_args.split(",") if args.optim_args else []
    for index, part in enumerate(parts):
        fewer = copy.copy(args)
        fewer.optim_args = ",".join(parts[:index] + parts[index + 1 :])
        if own is not None or Trainer.get_optimizer_cls_and_kwargs(fewer)[1] == kwargs:
            raise ValueError(f"`optim_args` has {part.strip()!r}, which has no effect on {source}; leave it out.")


def check_trainable(model: RTLModel, args: RTLTrainingArguments) -> None:
    """
    Logs a warning with figures if prunable weights are frozen.

    Raises:
        ValueError: all parameters are frozen.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "no parameter of the model wants a gradient (`requires_grad`), so nothing can be trained; set "
            "`model.backbone.requires_grad_(True)`."
        )
    weights = model.masker.weights
    num_frozen = sum(weight.numel() for weight in weights if not weight.requires_grad)
    if num_frozen and args.process_index == 0:
        total = model.mask_bank.num_weights
        logger.warning(
            f"{num_frozen:,} of {total:,} prunable weights ({num_frozen / total:.0%}) are frozen. Training does not "
            "move them, so they are ranked by their initial magnitude, and every ticket keeps the same largest ones. "
            "Set `requires_grad_(True)` on them before the trainer is made, or leave them out of "
            "pruning with `prune_exclude`."
        )


def _check_parallelism(args: RTLTrainingArguments) -> None:
    """Raises `ValueError` if the arguments, or those of `accelerate launch`, would split weights over devices."""
    given = {"FSDP": args.fsdp, "DEEPSPEED": args.deepspeed, "PARALLELISM_CONFIG": args.parallelism_config}
    for name in (*given, "MEGATRON_LM"):
        if given.get(name) or str_to_bool(os.environ.get(f"ACCELERATE_USE_{name}", "false")):
            raise ValueError(
                f"{name} is not supported: it splits weights over devices, but masks and the masked optimizer step "
                "need whole weights. Use data parallelism, for example `accelerate launch --multi_gpu`, and "
                "`gradient_checkpointing`, `bf16` or a smaller `route_batch_size` to save memory."
            )


def _check_connected(args: RTLTrainingArguments) -> None:
    """Raises `ValueError` if a launcher started several processes that are not connected."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > args.world_size:
        raise ValueError(
            f"a launcher has started {started} processes, but they are not connected: each would do the whole run, in "
            "the same folder. On CPUs, set `use_cpu=True` in the arguments (for a recipe, add --use_cpu)."
        )


def predicts_single_labels(model: RTLModel) -> bool:
    """Whether the tickets predict one label, or one set of numbers, a sample."""
    return model.config.ticket_task == "labels" and isinstance(model, SINGLE_PREDICTION_CLASSES)


def _check_labels(model: RTLModel, dataset: Any, partition: Partition, has_collator: bool, has_own_loss: bool) -> None:
    """Raises `ValueError` unless the partition and the labels of training data suit the task of the tickets."""
    labels = None
    if predicts_single_labels(model):
        if not has_collator:
            check_label_column(dataset)
        labels = single_labels(dataset)
    partition.check(model.config.ticket_task, labels)
    if predicts_single_labels(model) and not (has_collator or has_own_loss):
        check_labels(dataset, model.config.num_labels, model.config.label2id, may_ignore=True)


def _check_batches(args: RTLTrainingArguments, data: RouteData) -> None:
    """Raises `ValueError` unless batches can be divided among the processes."""
    unit = (2 if data.membership else 1) * args.world_size
    if args.route_batch_size % unit:
        each = "a positive and a negative" if data.membership else "a sample"
        raise ValueError(
            f"`route_batch_size` = {args.route_batch_size} must be a multiple of {unit}: {each} for each of "
            f"{args.world_size} process(es)."
        )
    first = 0 if args.competing_epochs else None
    data.sampler((), world_size=args.world_size, first_competing_epoch=first)


def _check_competition(model: RTLModel, args: RTLTrainingArguments) -> None:
    if args.competing_epochs and model.config.ticket_task != "membership":
        raise ValueError(
            f"`competing_epochs` = {args.competing_epochs} compares the scores of membership tickets, but these "
            "tickets predict labels; leave it at 0."
        )
