"""The methods that `Trainer` calls: loaders of single-route batches, masked steps, evaluation through tickets."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer
from torch.utils.data import DataLoader
from transformers import ProgressCallback, Trainer, set_seed
from transformers.integrations.neftune import deactivate_neftune
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, TrainOutput, rotate_checkpoints

from ..data.partition import Partition
from ..data.route_data import EvaluationData, RouteData, collate_classes
from ..data.rules import replace_rule
from ..data.sampling import ALL_ROUTES, RouteBatchSampler
from ..metrics import calibrate_thresholds
from ..modeling.files import write_json
from ..modeling.masking import UNION
from ..modeling.modeling_rtl import RTLModel
from ..modeling.norm_statistics import tracking_layers
from .evaluation import check_router, mean_ticket_loss, routed_outputs, ticket_metrics
from .failures import explain_failures
from .loaders import Loaders
from .optim import masked_optimizer
from .pending_evaluation import evaluate_if_pending, kept_if_it_fails, remove_pending
from .plan import Round
from .processes import Processes
from .progress import RunProgress, keep_log_of_tensorboard, keep_routes_out_of_notebooks
from .randomness import Stream, derive_seed, seeded
from .recalibration import recalibrate_tickets, warn_of_lagging_statistics
from .router_fitting import Batches, fit_router
from .run_data import RunData, has_default_metrics, predicts_single_labels
from .run_directory import best_checkpoint, last_usable_checkpoint, mark_complete
from .run_report import emptied_by_route
from .running_statistics import average_over_processes, prepare_for_ddp, running_statistics
from .ticket_trainer import TicketTrainer, change_for_training, named_state
from .training_args import RTLTrainingArguments


logger = logging.getLogger(__name__)


class RouteTrainer(Trainer):
    """
    The part of [`RTLTrainer`] that transformers' training and evaluation loops call, on any number of processes:
    batches of one route, masked updates, statistics per route, every ticket evaluated on samples of its own route.
    It also makes the trainers of single tickets, which use the same data, loss and optimizer.

    Args:
        model ([`RTLModel`]), args ([`RTLTrainingArguments`]): the model and arguments that `run_data` was made with.
        run_data ([`RunData`]): the data sets with their routes.
        **kwargs: the same as for `Trainer`.
    """

    model: RTLModel
    args: RTLTrainingArguments
    optimizer: Any
    _signature_columns: list[str] | None
    has_own_evaluation = False  # whether functions of the caller take part in evaluation

    def __init__(self, model: RTLModel, args: RTLTrainingArguments, *, run_data: RunData, **kwargs: Any) -> None:
        self.run_data = run_data
        # The model's configuration at the first call of `train()`; calls of a model may change it.
        self.given_config: dict[str, Any] | None = None
        if has_default_metrics(model, kwargs.get("compute_metrics")):
            kwargs["compute_metrics"] = self.compute_ticket_metrics
        if args.competing_epochs and self._has_own_loss(kwargs.get("compute_loss_func")):
            raise ValueError(
                "`competing_epochs` has a loss of its own, the cross-entropy between the scores of all tickets; leave "
                "it at 0, or leave out `compute_loss_func` and your `compute_loss`."
            )
        with explain_failures(args.output_dir, batch_size=args.route_batch_size):  # `Trainer` creates the folder
            super().__init__(model=model, args=args, **kwargs)
        self.processes = Processes(self.accelerator)
        # In a notebook `Trainer` has another callback, which shows losses and metrics, and stays.
        replaced = self.pop_callback(ProgressCallback)
        show = args.process_index == 0 and not args.disable_tqdm
        self.progress = RunProgress(model.route_names, show=show, prints_logs=replaced is not None)
        if self.progress.show:
            self.add_callback(self.progress)
        keep_routes_out_of_notebooks(self.callback_handler.callbacks, self.progress)
        keep_log_of_tensorboard(self.callback_handler.callbacks, args.output_dir)
        # The current round, and the number of steps of the rounds before it, for the log.
        self.current_round: Round | None = None
        self._steps_before = 0
        self._warned_of_emptied_layers = False
        # Whether the current batch has samples of all routes.
        self._is_competing = False
        # Whether the joint retraining continues from a checkpoint, and the best checkpoint at that step.
        self._is_continued = False
        self._best_before: Path | None = None
        # Whether it has begun with the evaluation that a checkpoint lacked.
        self._is_evaluated = False
        # The partition of the data set that is being evaluated, if it has one, and the outputs without a given route.
        self._evaluated: Partition | None = None
        self._routed: list[dict[str, Tensor]] = []
        # Outputs that evaluation during `train()` leaves out.
        self._ignored_keys: list[str] | None = None
        self.loaders = Loaders(args, self.accelerator, self.collate)
        self._initial_scaler = None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()

    def explained_failures(self) -> AbstractContextManager:
        """A context that explains what to do about a full disk or exhausted memory."""
        return explain_failures(self.args.output_dir, batch_size=self.args.route_batch_size)

    # One joint retraining (paper, Algorithm 2)

    @contextmanager
    def in_round(self, round_: Round, *, num_steps_before: int) -> Iterator[None]:
        """
        A context that sets the current round: its index is part of the key of the batches, its number is logged, and
        logged steps count from `num_steps_before`.
        """
        before = self.current_round
        self.current_round, self._steps_before = round_, num_steps_before
        try:
            yield
        finally:
            self.current_round = before  # `_steps_before` stays, for the log of an evaluation after the round

    def put_masks(self, masks: Sequence[Sequence[Tensor]]) -> None:
        """
        Sets the model's masks of all routes, packed rows that are the same on all processes. Warns once of layers
        without weights.
        """
        for route, packed in enumerate(masks):
            self.model.mask_bank.set_packed(route, packed)
        self.processes.check_same({"mask_fingerprint": self.model.mask_bank.fingerprint()})
        emptied = emptied_by_route(self.model)
        if emptied and not self._warned_of_emptied_layers and self.processes.rank == 0:
            self._warned_of_emptied_layers = True
            name, layers = next(iter(emptied.items()))
            logger.warning(
                f"pruning has emptied whole layers, for example of ticket {name!r}: {', '.join(layers)}. The reports "
                "of the rounds list all of them; consider `prune_scope='layer'`."
            )

    @torch.no_grad()
    def start_from(self, theta0: dict[str, Tensor]) -> None:
        """Sets every parameter, buffer, private row and statistics row to θ0; removes thresholds and router."""
        self.model.config.thresholds = None
        self.model.set_router(None)
        for name, tensor in named_state(self.model.backbone):
            tensor.copy_(theta0[name])
        if self.model.norm_statistics is not None:
            self.model.norm_statistics.reset(self.model.backbone)
        self.model.private_parameters.reset(self.model.backbone)

    def retrain_jointly(self, folder: Path) -> TrainOutput:
        """Trains all tickets with a fresh optimizer, schedule and scaler, or continues a checkpoint in `folder`."""
        self.optimizer = self.lr_scheduler = None
        self.model_wrapped = self.model
        self.model.was_trained = True
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(self._initial_scaler)
        set_seed(derive_seed(self.args.seed, Stream.RETRAINING, self._require_round().index))
        prepare_for_ddp(self.model)
        checkpoint = None
        if self.processes.rank == 0:
            checkpoint = last_usable_checkpoint(folder, world_size=self.processes.world_size)
        checkpoint = self.processes.from_rank_zero(checkpoint)
        self._is_continued = checkpoint is not None
        self._best_before = None if checkpoint is None else best_checkpoint(checkpoint)
        if checkpoint is not None:
            self.progress.say(f"joint retraining of {folder.name} goes on from {checkpoint.name}")
        with self._output_dir(folder), self._embedding_noise_removed():
            output = super().train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            # A training continued from its last checkpoint saves none, but a killed run may have left older ones.
            self._delete_old_checkpoints()
            if self.processes.rank == 0:
                remove_pending(folder)
        return output

    def _require_round(self) -> Round:
        if self.current_round is None:
            raise RuntimeError("batches are made inside `train()` only.")
        return self.current_round

    def recalibrate(self) -> None:
        """See [`recalibrate_tickets`]."""
        recalibrate_tickets(self, self._require_round().index)

    def warn_of_lagging_statistics(self) -> None:
        """See the function of that name."""
        warn_of_lagging_statistics(self, self._require_round().index)

    def calibrated_thresholds(self) -> list[float] | None:
        """Thresholds of membership tickets, from calibration data; `None` without calibration data or such tickets."""
        if self.run_data.calibration_dataset is None or self.model.config.ticket_task != "membership":
            return None
        self.model.eval()
        with torch.no_grad():
            pairs = [
                self.accelerator.gather_for_metrics((self.model(**inputs).logits, home_routes))
                for inputs, home_routes in self.batches_with_routes(self.run_data.calibration_dataset)
            ]
        scores, home_routes = (torch.cat(tensors).cpu() for tensors in zip(*pairs, strict=True))
        return calibrate_thresholds(scores.float().numpy(), home_routes.numpy())

    def fit_router(self, name: str, *, threshold: float = 0.0, fallback: int | str = UNION) -> None:
        """
        Fits a router, which chooses the route of inputs that come without one, and sets it in the model. `train()`
        does so after every joint retraining if `args.router` names a router.

        Scales and offsets are fitted on `calibration_dataset`, or on the part of the training data that is held out of
        training; the means of `"centroid"` on the training data. `eval_dataset` is never used.

        Args:
            name (`str`): `"score"`, `"centroid"` or `"entropy"`; see `routers.py`.
            threshold, fallback: the same as for [`RTLModel.set_router`].

        Raises:
            ValueError: the name is unknown or does not suit the task, there is no calibration data, or, without
                `args.allow_disconnected`, the evidence is the same for all samples.
        """
        check_router(name, self.model, self.run_data.calibration_dataset)
        self.model.eval()
        data = self.run_data
        training = self.batches_with_routes(data.require_training().dataset)
        held_out = self.batches_with_routes(data.calibration_dataset)
        router = fit_router(
            name,
            self.model,
            training,
            held_out,
            gather=self.accelerator.gather_for_metrics,
            # A run that allows disconnected tickets must not fail at its router.
            allow_constant=self.args.allow_disconnected,
        )
        for buffer in router.buffers():
            buffer.copy_(broadcast(buffer.clone()))  # devices may round differently
        self.model.set_router(router, threshold=threshold, fallback=fallback)

    def batches_with_routes(self, dataset: Any) -> Batches:
        """Yields the batches of a data set without labels, each with the routes of its samples."""
        for batch in self.get_eval_dataloader(dataset):
            inputs = self._prepare_inputs(batch)
            labels, route_ids = inputs.pop("labels", None), inputs.pop("route_ids", None)
            with self.compute_loss_context_manager():
                yield inputs, labels if route_ids is None else route_ids

    # Trainings of single tickets (paper, Algorithm 1)

    def ticket_trainer(
        self, theta0: dict[str, Tensor], network: nn.Module | None = None, frozen: Sequence[Tensor] | None = None
    ) -> TicketTrainer:
        """
        A trainer of one ticket at a time, with the loss, optimizer and precision of this trainer.

        Args:
            theta0 (`dict[str, Tensor]`): every parameter and buffer that training starts from, by name.
            network (`nn.Module`, *optional*): the network to train; by default a copy of the backbone.
            frozen (`Sequence[Tensor]`, *optional*): the same as for [`TicketTrainer`].
        """
        if network is None:
            network = copy.deepcopy(self.model.backbone).to(self.args.device)
            private = self.model.private_parameters
            for own, rows in zip(private.own(network), private.rows, strict=True):
                own.requires_grad_(rows.requires_grad)
        change_for_training(network, self.args)
        return TicketTrainer(
            network=network,
            theta0=theta0,
            weight_names=self.model.mask_bank.weight_names,
            make_optimizer=self.plain_optimizer,
            compute_loss=self.ticket_loss,
            autocast=self.compute_loss_context_manager,
            prepare=self.ticket_inputs,
            frozen=frozen,
            max_grad_norm=self.args.max_grad_norm,
            fp16=self.args.mixed_precision == "fp16",
        )

    def extraction_steps(self, route: int, data: RouteData | None = None) -> int:
        """Steps of the training of a route before each prune event; `data` defaults to that of the run."""
        if self.args.extraction_steps is not None:
            return self.args.extraction_steps
        data = self.run_data.require_training() if data is None else data
        updates = data.sampler((), routes=[route]).num_updates_per_route
        return max(1, round(self.args.extraction_epochs * updates))

    def extraction_batches(self, route: int, event: int, data: RouteData | None = None) -> Iterator[dict[str, Any]]:
        """The batches of the training of a route before a prune event."""
        data = self.run_data.require_training() if data is None else data
        sampler = data.sampler((Stream.EXTRACTION, event), routes=[route])
        return islice(self.endless_batches(data, sampler), self.extraction_steps(route, data))

    def endless_batches(self, data: RouteData, sampler: RouteBatchSampler) -> Iterator[dict[str, Any]]:
        """
        Endless batches, epoch after epoch, not yet on the device. Those of the run's training data may end when others
        are asked for.
        """
        return self.loaders.endless_batches(data, sampler, shared=data is self.run_data.training)

    def ticket_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The inputs of the plain backbone for a single-route batch, on the device."""
        inputs = self._prepare_inputs({name: value for name, value in batch.items() if name != "route"})
        if self.model.config.ticket_task == "membership":
            inputs["labels"] = self.model.ticket_labels(inputs["labels"])
        return inputs

    def ticket_loss(self, network: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The loss of the plain backbone in a training of a single ticket, of which other processes know nothing."""
        average, self.args.average_tokens_across_devices = self.args.average_tokens_across_devices, False
        try:
            num_items = self._get_num_items_in_batch([inputs], self.args.device)
            return self.compute_loss(network, inputs, num_items_in_batch=num_items)
        finally:
            self.args.average_tokens_across_devices = average

    def plain_optimizer(self, network: nn.Module) -> Optimizer:
        """A fresh optimizer, chosen by the arguments, for a network without masks."""
        optimizer_class, kwargs = self._optimizer_class_and_arguments()
        if optimizer_class in (torch.optim.AdamW, torch.optim.SGD):
            kwargs.setdefault("fused", not kwargs.get("foreach"))
        return optimizer_class(self.parameter_groups(network), **kwargs)

    def _optimizer_class_and_arguments(self) -> tuple[Any, dict[str, Any]]:
        optimizer_class, kwargs = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args)
        return optimizer_class, dict(kwargs)

    # Loaders

    def get_train_dataloader(self) -> DataLoader:
        data = self.run_data.require_training()
        sampler = self.retraining_sampler(
            self._require_round().index, rank=self.args.process_index, world_size=self.args.world_size
        )
        return self.loaders.training(data, sampler)

    def retraining_sampler(self, round_index: int, **part: int) -> RouteBatchSampler:
        """The batches of a joint retraining; `part` is the `rank` and `world_size` of one process of several."""
        accumulation = self.args.gradient_accumulation_steps
        key = (Stream.RETRAINING, round_index)
        competing = self.args.competing_epochs
        first = int(self.args.num_train_epochs) - competing if competing else None
        return self.run_data.require_training().sampler(
            key, gradient_accumulation_steps=accumulation, first_competing_epoch=first, **part
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The same as in `Trainer`, with the route of each sample. Raises `ValueError` without a data set."""
        name = eval_dataset if isinstance(eval_dataset, str) else ""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        dataset = self.eval_dataset[name] if name else dataset
        if dataset is None:
            raise ValueError("evaluation needs an `eval_dataset`.")
        self._evaluated = self.eval_partition(dataset)
        samples = EvaluationData(dataset, self._evaluated, membership=self.model.config.ticket_task == "membership")
        # As in `Trainer`, only the evaluation sets of the trainer keep their workers.
        return self.loaders.evaluation(samples, name if name or dataset is self.eval_dataset else None)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """
        The same as `get_eval_dataloader`. A data set without routes is read as it is if the model needs none: all
        membership tickets score every sample, and a router decides for tickets that predict labels.
        """
        membership = self.model.config.ticket_task == "membership"
        if self.run_data.has_routes(self.model, self.args, test_dataset) or not (membership or self.model.router):
            return self.get_eval_dataloader(test_dataset)
        self._evaluated = None
        return self.loaders.evaluation(EvaluationData(test_dataset, None, membership=membership))

    def eval_partition(self, dataset: Any) -> Partition:
        """The routes of the samples of a data set to evaluate on."""
        return self.run_data.eval_partition(self.model, self.args, dataset)

    def _set_signature_columns_if_needed(self) -> None:
        """Adds the columns that the backbone takes: `Trainer` reads only the signature of the wrapper's `forward`."""
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            backbone_columns = inspect.signature(self.model.backbone.forward).parameters
            self._signature_columns = [*(self._signature_columns or []), *backbone_columns]

    def collate(self) -> Callable[[list], dict]:
        """The function that makes a batch of samples, without columns that the backbone does not take."""
        collate = self._get_collator_with_removed_columns(self.data_collator)
        are_classes = predicts_single_labels(self.model) and self.model.config.num_labels > 1
        takes_integers = are_classes and not self._has_own_loss(self.compute_loss_func)
        return partial(collate_classes, collate, self.model.config.label2id) if takes_integers else collate

    def collate_alone(self) -> Callable[[list], dict]:
        """`collate` with a copy of the collator, which may draw or count. The model that it may hold is not copied."""
        return copy.deepcopy(self.collate(), {id(self.model): self.model})

    @contextmanager
    def workers_ended(self) -> Iterator[None]:
        """A context at whose end persistent workers end. Python's collector of cycles would wait for them forever."""
        try:
            yield
        finally:
            self.loaders.forget()
            self.callback_handler.train_dataloader = self.callback_handler.eval_dataloader = None

    # Steps

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        route = inputs.pop("route")
        if not self.model.training:
            model.train()  # `Trainer` does so in every step, but inside the context
        # All accumulated batches of an update are of one route, so only routes of a skipped step are forgotten here.
        self.model.routes_since_update.clear()
        if route == ALL_ROUTES:
            self._is_competing = True
            try:
                return super().training_step(model, inputs, num_items_in_batch)
            finally:
                self._is_competing = False
        if self.model.config.ticket_task == "membership":
            # In the form that extraction has them in, which a loss of the user's then gets in both phases.
            inputs["labels"] = self.model.ticket_labels(inputs["labels"])
        with self.model.route_context(route):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients and self.accelerator.num_processes > 1:
            average_over_processes(running_statistics(self.model, route), self.accelerator)
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """
        The same as in `Trainer`. Where tickets compete, the loss is the cross-entropy between their scores and the
        home routes. Then norm layers use the running statistics of each ticket and do not update them: such batches
        have too few samples of a route for statistics of their own.
        """
        if not self._is_competing:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        for layer in tracking_layers(self.model.backbone):
            layer.eval()
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        scores = outputs.logits.to(torch.promote_types(outputs.logits.dtype, torch.float32))
        loss = nn.functional.cross_entropy(scores, inputs["labels"])
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        if self.optimizer is None:
            groups = self.parameter_groups(self.model)
            optimizer_class, kwargs = self._optimizer_class_and_arguments()
            self.optimizer = masked_optimizer(optimizer_class, groups, kwargs, self.model)
        return self.optimizer

    def parameter_groups(self, network: nn.Module) -> list[dict[str, Any]]:
        """Two groups of trained parameters, with and without weight decay, split in the same way as in `Trainer`."""
        decayed = set(self.get_decay_parameter_names(network))
        # For private rows the name of the parameter they belong to decides; their own names say nothing.
        private = self.model.private_parameters
        row_names = {id(rows): f"backbone.{name}" for rows, name in zip(private.rows, private.names, strict=True)}
        named = [
            (row_names.get(id(parameter), name), parameter)
            for name, parameter in network.named_parameters()
            if parameter.requires_grad
        ]
        return [
            {"params": [p for name, p in named if name in decayed], "weight_decay": self.args.weight_decay},
            {"params": [p for name, p in named if name not in decayed], "weight_decay": 0.0},
        ]

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager:
        """The autocast that accelerate gives the model, so that extraction and recalibration use the same dtypes."""
        return self.accelerator.autocast()

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # Without clipping, Trainer computes the norm for its log only, which costs a pass over all gradients.
        return grad_norm if grad_norm is None else super()._get_grad_norm(model, grad_norm=grad_norm)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        # Trainer's estimate counts all parameters in every step, and ignores masks.
        return 0

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        output = super()._init_training_state(*args, **kwargs)
        if self._best_before is not None:
            self.state.best_model_checkpoint = str(self._best_before)  # its path now, if the run was moved
        return output

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        self._is_evaluated = evaluate_if_pending(self, prepared[0])
        return prepared

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Continued from its last step, Trainer would train one more step before it checks whether to stop.
        saved = self.state.stateful_callbacks["TrainerControl"]["args"] if self._is_continued else {}
        if self.state.global_step >= self.state.max_steps or saved.get("should_training_stop"):
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    # Evaluation

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """
        Evaluates within a joint retraining, with the statistics that a model saved now should have. The generators are
        left as they were, so when it is evaluated decides no weight.
        """
        if self._is_evaluated and kwargs.get("skip_scheduler"):
            return {}  # `eval_on_start`, of the weights that were just evaluated
        self.recalibrate()
        # A checkpoint that is kept must have the generators of training, so `seeded` ends first.
        with (
            kept_if_it_fails(self),
            seeded((self.args.seed, Stream.EVALUATION, self.state.global_step), self.args.device),
        ):
            return super()._evaluate(*args, **kwargs)

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
        """
        The same as in `Trainer`; also keeps the outputs of all processes that router metrics need. A loss of the user
        is the mean over all membership tickets, each asked about every sample.
        """
        ignore_keys = self._ignored_keys if ignore_keys is None else ignore_keys
        one_by_one = self.model.config.ticket_task == "membership" and self._has_own_loss(self.compute_loss_func)
        if one_by_one and "labels" in inputs:
            unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
            _, scores, _ = super().prediction_step(model, unlabelled, prediction_loss_only, ignore_keys)
            labels = None if prediction_loss_only else inputs["labels"]
            output = mean_ticket_loss(self, model, inputs), scores, labels
        else:
            output = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        has_metrics = self.compute_metrics == self.compute_ticket_metrics and self._evaluated is not None
        if has_metrics and output[2] is not None:
            given = ("labels", "route_ids")
            inputs = {name: value for name, value in self._prepare_inputs(inputs).items() if name not in given}
            with torch.no_grad(), self.compute_loss_context_manager():
                routed = routed_outputs(self.model, inputs, output[1])
                routed = self.accelerator.gather_for_metrics(routed)
            keep_on_device = self.args.eval_accumulation_steps is None
            self._routed.append(routed if keep_on_device else {name: rows.cpu() for name, rows in routed.items()})
        return output

    def _has_own_loss(self, compute_loss_func: Any) -> bool:
        return compute_loss_func is not None or type(self).compute_loss is not RouteTrainer.compute_loss

    def compute_ticket_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """The metrics of `hf_rtl.metrics` for the model's task and, if it has a router, for the router's decisions."""
        if self._evaluated is None:
            return {}
        return ticket_metrics(self.model, prediction, self._routed, self._evaluated.route_ids)

    # Logs and files

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The same as in `Trainer`, with steps counted over all rounds, and with the number of the round."""
        if self.current_round is not None:
            logs["round"] = self.current_round.index + 1
        self.state.global_step += self._steps_before
        try:
            super().log(logs, *args, **kwargs)
        finally:
            self.state.global_step -= self._steps_before

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """The same as in `Trainer`, but older checkpoints are deleted only after this one is marked complete."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit
        self.processes.wait()
        if self.processes.rank == 0:
            checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            mark_complete(checkpoint, world_size=self.processes.world_size)
        self._delete_old_checkpoints()

    def _delete_old_checkpoints(self) -> None:
        if self.processes.rank == 0:
            limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
            rotate_checkpoints(self.args.output_dir, save_total_limit=limit, best_model_checkpoint=best)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict=state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            # Trainer pickles its arguments, but a model's folder must hold safetensors and JSON only.
            (folder / "training_args.bin").unlink(missing_ok=True)
            arguments = self.args.to_dict()
            write_json(folder / "training_args.json", {k: v for k, v in arguments.items() if not k.endswith("_dir")})
            if self.run_data.training is not None:
                replace_rule(folder, self.run_data.training.partition.rule, self.model.route_names)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        tied = set(self.model.all_tied_weights_keys)
        missing = [name for name in load_result.missing_keys if name not in tied]
        if missing or load_result.unexpected_keys:
            raise ValueError(
                f"a checkpoint does not fit the model: {len(missing)} tensors missing {missing[:3]}, "
                f"{len(load_result.unexpected_keys)} unknown {load_result.unexpected_keys[:3]}."
            )

    @contextmanager
    def _embedding_noise_removed(self) -> Iterator[None]:
        """A context that takes the noise of NEFTune out of the model if an error left it there."""
        try:
            yield
        finally:
            hook = self.__dict__.pop("neftune_hook_handle", None)
            if self.is_in_train and hook is not None:
                deactivate_neftune(self.model, hook)
            self.is_in_train: bool = False

    @contextmanager
    def _output_dir(self, folder: Path) -> Iterator[None]:
        before, self.args.output_dir = self.args.output_dir, str(folder)
        try:
            yield
        finally:
            self.args.output_dir = before
