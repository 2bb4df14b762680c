"""Evaluation of the tickets of a model, and the fitting of what decides by their outputs: thresholds and routers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction

from ..data.partition import Partition
from ..data.route_data import EvaluationData, RouteData, find_partition
from ..metrics import calibrate_thresholds, constant_tickets, label_metrics, membership_metrics, router_metrics
from ..modeling.masking import UNION
from ..modeling.modeling_rtl import (
    RTLModel,
    RTLModelForAudioClassification,
    RTLModelForImageClassification,
    RTLModelForSequenceClassification,
)
from ..modeling.routers import ROUTER_CLASSES, ScoreRouter
from .router_fitting import Batches, evidence_of_each, fit_router
from .training_args import RTLTrainingArguments


ONE_PREDICTION_PER_SAMPLE = (
    RTLModelForImageClassification,
    RTLModelForAudioClassification,
    RTLModelForSequenceClassification,
)


class TicketEvaluator(Trainer):
    """
    The part of a trainer that evaluates, and that needs no training: every ticket on samples of its own route, and
    what comes out when nobody tells the route. [`JointTrainer`] adds training, and sets what is declared here.
    """

    model: RTLModel
    args: RTLTrainingArguments
    route_data: RouteData | None
    calibration_dataset: Any
    _signature_columns: list[str] | None
    # Of the training data, if it was given.
    _given_partition: Partition | None
    # (data set, partition) of what is evaluated time and again: reading a column can mean fetching every sample.
    _partitions: list[tuple[Any, Partition]]
    # Of the data set that is being evaluated: its partition, and what came out without a given route.
    _evaluated: Partition
    _routed: list[dict[str, Tensor]]

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("evaluation needs an `eval_dataset`.")
        self._evaluated = self._partition_of(dataset)
        membership = self.model.config.ticket_task == "membership"
        samples = EvaluationData(dataset, self._evaluated, membership=membership)
        loader = DataLoader(
            samples, batch_size=self.args.eval_batch_size, collate_fn=self._collate(), **self._loader_arguments()
        )
        return self.accelerator.prepare(loader)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        self._routed = []
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """As `Trainer`'s; keeps what the metrics of routers need beside its outputs, of all processes."""
        output = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if self.compute_metrics == self.compute_ticket_metrics and not prediction_loss_only:
            given = ("labels", "route_ids")
            inputs = {name: value for name, value in self._prepare_inputs(inputs).items() if name not in given}
            with torch.no_grad(), self.compute_loss_context_manager():
                self._routed.append(self.accelerator.gather_for_metrics(self._routed_outputs(inputs, output[1])))
        return output

    def _routed_outputs(self, inputs: dict[str, Any], logits: Tensor) -> dict[str, Tensor]:
        """
        What comes out for inputs whose route is not given; of tickets for labels, also of their union. `logits` are
        those that have come out already.
        """
        model, outputs = self.model, {}
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

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        return self.get_eval_dataloader(test_dataset)

    def _partition_of(self, dataset: Any) -> Partition:
        known = (partition for other, partition in self._partitions if other is dataset)
        return next(known, None) or self._find_partition(self.model, self.args, dataset)

    def _find_partition(
        self, model: RTLModel, args: RTLTrainingArguments, dataset: Any, allow_empty: bool = True
    ) -> Partition:
        """The partition of a data set to evaluate on, which may have samples of some routes only."""
        return find_partition(
            dataset,
            route_column=args.route_column,
            route_names=model.route_names,
            ticket_task=str(model.config.ticket_task),
            allow_empty=allow_empty,
            training=self._given_partition,
        )

    def compute_ticket_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """The metrics of `hf_rtl.metrics` for the model's task, and with a router those of its decisions."""
        scores, model = prediction.predictions, self.model
        names = list(self._routed[0])
        routed = {name: torch.cat([batch[name] for batch in self._routed]).float().cpu().numpy() for name in names}
        if model.config.ticket_task == "membership":
            home_routes = prediction.label_ids
            metrics = membership_metrics(scores, home_routes, model.route_names, thresholds=model.config.thresholds)
            if model.router is not None:
                metrics |= router_metrics(routed["route_scores"], home_routes, model.route_names)
            return {**metrics, "constant_tickets": float(len(constant_tickets(scores)))}
        labels, route_ids = prediction.label_ids, self._evaluated.route_ids
        answers = {"": scores, "union_": routed["union_logits"]}
        if model.router is not None:
            answers["inferred_"] = routed["logits"]
        metrics = {}
        # Of numbers to regress, or several labels a sample, the loss says how good they are.
        if labels.ndim == 1 and labels.dtype.kind in "iu" and scores.shape[1] > 1:
            for prefix, logits in answers.items():
                metrics |= label_metrics(logits, labels, route_ids, model.route_names, prefix=prefix)
        if model.router is not None:
            metrics |= router_metrics(routed["route_scores"], route_ids, model.route_names)
            metrics["fallback_fraction"] = float((routed["route_ids"] != routed["route_scores"].argmax(axis=1)).mean())
        return metrics

    def _calibrated_thresholds(self) -> list[float] | None:
        if self.calibration_dataset is None or self.model.config.ticket_task != "membership":
            return None
        loader = self.get_eval_dataloader(self.calibration_dataset)
        output = self.evaluation_loop(loader, description="Calibration", prediction_loss_only=False)
        return calibrate_thresholds(output.predictions, output.label_ids)

    def fit_router(self, name: str, *, threshold: float = 0.0, fallback: int | str = UNION) -> None:
        """
        Fits a router and gives it to the model: for inputs that come without a route. `train()` does so after every
        joint retraining if `args.router` names one.

        Its scales and offsets are fitted on `calibration_dataset` or on the part of the training data that was held
        out of training, and what else it learns on the training data; never on `eval_dataset`.

        Args:
            name (`str`): `"score"`, `"centroid"` or `"entropy"`; see `routers.py`.
            threshold, fallback: as of [`RTLModel.set_router`].

        Raises:
            ValueError: an unknown name, one that does not suit the task, no data that was held out, or, without
                `args.allow_disconnected`, evidence that is the same for all samples.
        """
        check_router(name, self.model, self.calibration_dataset)
        self.model.eval()
        training, held_out = (
            self._batches_with_routes(data) for data in (self._require_data().dataset, self.calibration_dataset)
        )
        router = fit_router(
            name,
            self.model,
            training,
            held_out,
            gather=self.accelerator.gather_for_metrics,
            # A user who goes on with tickets that are cut through does so to the end of the run.
            allow_constant=self.args.allow_disconnected,
        )
        for buffer in router.buffers():
            buffer.copy_(broadcast(buffer.clone()))  # all have fitted it, maybe on devices that round differently
        self.model.set_router(router, threshold=threshold, fallback=fallback)

    def _batches_with_routes(self, dataset: Any) -> Batches:
        """The inputs of a data set without labels, each batch with the routes of its samples."""
        for batch in self.get_eval_dataloader(dataset):
            inputs = self._prepare_inputs(batch)
            labels, route_ids = inputs.pop("labels", None), inputs.pop("route_ids", None)
            with self.compute_loss_context_manager():
                yield inputs, labels if route_ids is None else route_ids

    def _require_data(self) -> RouteData:
        if self.route_data is None:
            raise ValueError("training needs a `train_dataset`.")
        return self.route_data

    def _set_signature_columns_if_needed(self) -> None:
        """As `Trainer`'s, whose choice of columns looks at `forward`: ours takes whatever the backbone's does."""
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            of_backbone = inspect.signature(self.model.backbone.forward).parameters
            self._signature_columns = [*(self._signature_columns or []), *of_backbone]

    def _collate(self) -> Callable[[list], dict]:
        return self._get_collator_with_removed_columns(self.data_collator)

    def _loader_arguments(self) -> dict[str, Any]:
        return {
            "num_workers": self.args.dataloader_num_workers,
            "pin_memory": self.args.dataloader_pin_memory and self.args.device.type != "cpu",
            "prefetch_factor": self.args.dataloader_prefetch_factor,
        }


def check_router(name: str, model: RTLModel, calibration_dataset: Any) -> None:
    """Raises `ValueError` unless a router of this name can be fitted."""
    if name not in ROUTER_CLASSES:
        raise ValueError(f"`router` must be one of {', '.join(map(repr, ROUTER_CLASSES))}, got {name!r}.")
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
