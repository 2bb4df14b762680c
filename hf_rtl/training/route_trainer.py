"""Joint retraining of all tickets (paper, Algorithm 2) in the loop of the Hugging Face `Trainer`."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import broadcast, str_to_bool
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer
from torch.utils.data import DataLoader
from transformers import ProgressCallback, set_seed
from transformers.trainer_utils import EvalPrediction, TrainOutput, rotate_checkpoints

from ..data.columns import check_label_column, columns_of, single_labels
from ..data.partition import Partition, Rule
from ..data.route_data import EvaluationData, RouteData, Rows, check_partition
from ..data.rules import remove_rule, remove_unfitting_rule, save_rule
from ..data.sampling import ALL_ROUTES, RouteBatchSampler
from ..modeling.files import write_json
from ..modeling.image_processing import savable_processor
from ..modeling.masking import UNION
from ..modeling.modeling_rtl import RTLModel
from ..modeling.norm_statistics import tracked_buffers
from .callbacks import RunProgress
from .evaluation import ONE_PREDICTION_PER_SAMPLE, TicketEvaluator, check_router
from .failures import explain_failures
from .optim import MaskedAdamW, MaskedSGD, mask_updates
from .plan import Round
from .processes import Processes
from .randomness import Stream, seed_of
from .run_directory import best_checkpoint, last_usable_checkpoint, seal
from .ticket_trainer import named_state
from .training_args import RTLTrainingArguments


logger = logging.getLogger(__name__)


class JointTrainer(TicketEvaluator):
    """
    Trains and evaluates the tickets of a model jointly, over any number of processes: batches of one route, masked
    updates, statistics per route. [`RTLTrainer`] adds the search for the tickets, and has the documentation.

    A training belongs to a [`Round`], whose index keys its batches; which one is set by `RTLTrainer`.
    """

    optimizer: Any

    def __init__(
        self,
        model: RTLModel,
        args: RTLTrainingArguments,
        *,
        train_dataset: Any = None,
        partition: Partition | None = None,
        eval_dataset: Any = None,
        calibration_dataset: Any = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(model, RTLModel):
            raise TypeError(f"`model` must be an RTLModel, got {type(model).__name__}; make one with `from_backbone`.")
        if not isinstance(args, RTLTrainingArguments):
            raise TypeError(f"`args` must be RTLTrainingArguments, got {type(args).__name__}.")
        for name in ("optimizers", "model_init"):
            if kwargs.get(name) not in (None, (None, None)):
                raise ValueError(f"`{name}` is not supported: every round makes a fresh optimizer on the same θ0.")
        membership = model.config.ticket_task == "membership"
        if membership and args.rewind_to:
            raise ValueError(
                f"`rewind_to` = {args.rewind_to} trains one dense network on all data, but the head of membership "
                "tickets asks 'is this mine?', which is no question to all data; leave it at 0."
            )
        if args.n_gpu > 1:
            raise ValueError(
                f"one process sees {args.n_gpu} GPUs, and `Trainer` would spread `nn.DataParallel` over them, whose "
                f"replicas know no masks. Launch a process per GPU, `torchrun --nproc_per_node={args.n_gpu}`, or set "
                "CUDA_VISIBLE_DEVICES=0."
            )
        if kwargs.get("processing_class") is not None:
            kwargs["processing_class"] = savable_processor(kwargs["processing_class"])
        _check_parallelism(args)
        _check_connected(args)
        self.route_data: RouteData | None = None
        self.calibration_dataset = calibration_dataset
        self._partitions = []
        self._given_partition = partition
        if partition is not None:
            partition = check_partition(partition, train_dataset, model.route_names)
        if train_dataset is not None:
            if partition is None:
                partition = self._find_partition(model, args, train_dataset, allow_empty=False)
            labels = None
            if not membership and isinstance(model, ONE_PREDICTION_PER_SAMPLE):
                labels = single_labels(train_dataset)
                if kwargs.get("data_collator") is None:
                    check_label_column(columns_of(train_dataset))
            partition.check(model.config.ticket_task, labels)
            self.route_data = RouteData(
                train_dataset,
                partition,
                membership=membership,
                seed=args.seed if args.data_seed is None else args.data_seed,
                batch_size=args.route_batch_size,
                seed_transforms=args.seed_transforms,
            )
            if args.calibration_fraction:
                if calibration_dataset is not None:
                    raise ValueError("`calibration_dataset` and `calibration_fraction` are both given; choose one.")
                self.route_data, held_out = self.route_data.hold_out(args.calibration_fraction, args.seed)
                self.calibration_dataset = held_out.dataset
                self._partitions.append((held_out.dataset, held_out.partition))
            unit = (2 if membership else 1) * args.world_size
            if args.route_batch_size % unit:
                each = "a positive and a negative" if membership else "a sample"
                raise ValueError(
                    f"`route_batch_size` = {args.route_batch_size} must be a multiple of {unit}: {each} for each of "
                    f"{args.world_size} process(es)."
                )
            first = 0 if args.competing_epochs else None
            self.route_data.sampler((), world_size=args.world_size, first_competing_epoch=first)
        if args.competing_epochs and not membership:
            raise ValueError(
                f"`competing_epochs` = {args.competing_epochs} compares the scores of membership tickets, and these "
                "are tickets for labels; leave it at 0."
            )
        if args.router != "given":
            check_router(args.router, model, self.calibration_dataset)
            if args.router_fallback is not None:
                model.route_index(args.router_fallback)
        # Now rather than after hours of training: whether evaluation and calibration can find their routes.
        evaluated = list(eval_dataset.values()) if isinstance(eval_dataset, dict) else [eval_dataset]
        for dataset in (*evaluated, calibration_dataset):
            if dataset is not None:
                # Thresholds and routers are fitted for every route.
                allow_empty = dataset is not calibration_dataset
                self._partitions.append((dataset, self._find_partition(model, args, dataset, allow_empty)))
        if compute_metrics is None and isinstance(model, ONE_PREDICTION_PER_SAMPLE):
            compute_metrics = self.compute_ticket_metrics
        with explain_failures(args.output_dir, batch_size=args.route_batch_size):  # it makes the folder
            super().__init__(
                model=model,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                compute_metrics=compute_metrics,
                **kwargs,
            )
        self.processes = Processes(self.accelerator)
        self.remove_callback(ProgressCallback)
        self.progress = RunProgress(show=args.process_index == 0 and not args.disable_tqdm)
        self.add_callback(self.progress)
        self._round: Round | None = None
        # Whether the batch in hand is of all routes.
        self._is_competing = False
        # Whether the joint retraining goes on from a checkpoint, and which was the best by then.
        self._is_continued = False
        self._best_before: Path | None = None
        # Of the rounds before this one, for the log.
        self._steps_before = 0
        self._initial_scaler = None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()

    # Training

    @torch.no_grad()
    def _start_from(self, theta0: dict[str, Tensor]) -> None:
        """Sets every parameter, buffer, private and statistics row to θ0; forgets what was fitted to others."""
        self.model.config.thresholds = None
        self.model.set_router(None)
        for name, tensor in named_state(self.model.backbone):
            tensor.copy_(theta0[name])
        if self.model.norm_statistics is not None:
            self.model.norm_statistics.reset(self.model.backbone)
        self.model.private_parameters.reset(self.model.backbone)

    def _retrain(self, folder: Path) -> TrainOutput:
        """Algorithm 2 in the Trainer's own loop, with a fresh optimizer, schedule and scaler."""
        self.optimizer = self.lr_scheduler = None
        self.model_wrapped = self.model
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(self._initial_scaler)
        set_seed(seed_of(self.args.seed, Stream.RETRAINING, self._current_round.index))
        # Masks never change here, and statistics are averaged: DDP need not send process 0's in every step.
        statistics = {id(module.get_buffer(name)) for module, name in tracked_buffers(self.model.backbone)}
        kept_in_step = [
            name
            for name, buffer in self.model.named_buffers()
            if id(buffer) in statistics or name.startswith(("mask_bank.", "norm_statistics."))
        ]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.model, kept_in_step)
        checkpoint = None
        if self.processes.rank == 0:
            checkpoint = last_usable_checkpoint(folder, world_size=self.processes.world_size)
        checkpoint = self.processes.of_first(checkpoint)
        self._is_continued = checkpoint is not None
        self._best_before = None if checkpoint is None else best_checkpoint(checkpoint)
        with self._output_dir(folder):
            output = super().train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            # Continued from its last checkpoint, a training saves none, but a kill may have left older ones.
            self._delete_old_checkpoints()
        return output

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        output = super()._init_training_state(*args, **kwargs)
        if self._best_before is not None:
            self.state.best_model_checkpoint = str(self._best_before)  # where it is now, if the run was moved
        return output

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Continued from its last step, Trainer would train one more before it looks whether it is to stop.
        saved = self.state.stateful_callbacks["TrainerControl"]["args"] if self._is_continued else {}
        if self.state.global_step >= self.state.max_steps or saved.get("should_training_stop"):
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        data = self._require_data()
        sampler = self._retraining_sampler(
            self._current_round.index, rank=self.args.process_index, world_size=self.args.world_size
        )
        loader = data.loader(sampler, self._collate(), **self._loader_arguments())
        # The sampler gives every rank its share of each batch already; accelerate is only to move tensors.
        return prepare_data_loader(
            loader, device=self.args.device, num_processes=1, process_index=0, put_on_device=True
        )

    def retraining_batches(self, round_index: int) -> Iterator[dict[str, Any]]:
        """
        The batches of a round's joint retraining, on the device, for controls that are to see the same data: whole
        ones, also on one of several processes.
        """
        sampler = self._retraining_sampler(round_index)
        batches = self._endless(self._require_data(), sampler)
        num_batches = self.plan().retraining_steps * self.args.gradient_accumulation_steps
        return (self._prepare_inputs(batch) for batch in islice(batches, num_batches))

    def _retraining_sampler(self, round_index: int, **part: int) -> RouteBatchSampler:
        accumulation = self.args.gradient_accumulation_steps
        key = (Stream.RETRAINING, round_index)
        competing = self.args.competing_epochs
        first = int(self.args.num_train_epochs) - competing if competing else None
        return self._require_data().sampler(
            key, gradient_accumulation_steps=accumulation, first_competing_epoch=first, **part
        )

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        route = inputs.pop("route")
        model.train()
        # With accumulation all batches of an update are of one route; a step that the scaler skipped is forgotten.
        self.model.routes_since_update.clear()
        if route == ALL_ROUTES:
            self._is_competing = True
            loss = super().training_step(model, inputs, num_items_in_batch)
            self._is_competing = False
            return loss
        with self.model.route_context(route):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._average_statistics(route)
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """
        As `Trainer`'s; where tickets compete, the cross-entropy between their scores and the home routes. Then the
        running statistics of each ticket normalise, and stay as they are: those of a batch that is so much smaller
        would be too uncertain.
        """
        if not self._is_competing:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        for module in self.model.backbone.modules():
            if isinstance(module, _NormBase):
                module.eval()
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        scores = outputs.logits.to(torch.promote_types(outputs.logits.dtype, torch.float32))
        loss = nn.functional.cross_entropy(scores, inputs["labels"])
        return (loss, outputs) if return_outputs else loss

    def _average_statistics(self, route: int) -> None:
        """
        Keeps running statistics the same on all processes: their mean, after every update. They obey a linear
        recurrence, so this is the recurrence on the mean of what the batches of the processes gave.
        """
        if self.processes.world_size == 1:
            return
        rows = self._statistics(route)
        if rows:
            mean = self.accelerator.reduce(torch.cat([row.reshape(-1).float() for row in rows]), "mean")
            parts = mean.split([row.numel() for row in rows])
            torch._foreach_copy_(rows, [part.view_as(row) for part, row in zip(parts, rows, strict=True)])

    def _statistics(self, route: int) -> list[Tensor]:
        """Running means and variances of a route, to be written in place."""
        if self.model.norm_statistics is None:
            rows = [module.get_buffer(name) for module, name in tracked_buffers(self.model.backbone)]
        else:
            rows = [rows[route] for rows in self.model.norm_statistics.rows]
        return [row for row in rows if row.is_floating_point()]

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        if self.optimizer is None:
            groups = self._parameter_groups(self.model)
            own = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, self.model)
            optimizer_class, kwargs = own[0], dict(own[1])
            kwargs.pop("fused", None)
            if optimizer_class is torch.optim.AdamW:
                self.optimizer = MaskedAdamW(groups, self.model, **kwargs)
            elif optimizer_class is torch.optim.SGD and not kwargs.pop("dampening", 0):
                self.optimizer = MaskedSGD(groups, self.model, **kwargs)
            else:
                self.optimizer = mask_updates(optimizer_class(groups, **own[1]), self.model)
        return self.optimizer

    def _plain_optimizer(self, network: nn.Module) -> Optimizer:
        optimizer_class, kwargs = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args)
        kwargs = dict(kwargs)
        if optimizer_class in (torch.optim.AdamW, torch.optim.SGD):
            kwargs["fused"] = True
        return optimizer_class(self._parameter_groups(network), **kwargs)

    def _parameter_groups(self, network: nn.Module) -> list[dict[str, Any]]:
        """Trained parameters with and without weight decay, as `Trainer` splits them."""
        decayed = set(self.get_decay_parameter_names(network))
        # Of rows of private parameters what they are rows of decides: their own names tell nothing.
        private = self.model.private_parameters
        rows_of = {id(rows): f"backbone.{name}" for rows, name in zip(private.rows, private.names, strict=True)}
        named = [
            (rows_of.get(id(parameter), name), parameter)
            for name, parameter in network.named_parameters()
            if parameter.requires_grad
        ]
        return [
            {"params": [p for name, p in named if name in decayed], "weight_decay": self.args.weight_decay},
            {"params": [p for name, p in named if name not in decayed], "weight_decay": 0.0},
        ]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # Without clipping, the norm that Trainer would compute for its log alone costs a pass over all gradients.
        return grad_norm if grad_norm is None else super()._get_grad_norm(model, grad_norm=grad_norm)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        # Trainer's estimate counts all parameters anew in every step, and knows nothing of masks.
        return 0

    @torch.no_grad()
    def _recalibrate_union(self) -> None:
        """Takes the union's statistics row anew: the plain average over batches of samples of all routes."""
        if self.model.norm_statistics is None:
            return
        data = self._require_data()
        norms = [module for module in self.model.backbone.modules() if isinstance(module, _NormBase)]
        if not norms:
            return
        size, generator = (
            data.batch_size,
            np.random.default_rng([data.seed, Stream.RECALIBRATION, self._current_round.index]),
        )
        order = generator.permutation(len(data.dataset))[: self.args.recalibration_batches * size]
        samples = EvaluationData(data.dataset, data.partition, membership=data.membership)
        rows = Rows(samples, order.tolist())
        loader = DataLoader(rows, batch_size=size, collate_fn=self._collate(), drop_last=len(order) > size)
        momenta = [module.momentum for module in norms]
        self.model.eval()
        try:
            with self.model.route_context(UNION):
                for module in norms:
                    module.reset_running_stats()
                    module.train()
                    module.momentum = None  # torch's word for a cumulative average
                for batch in loader:
                    inputs = {name: value for name, value in batch.items() if name not in ("labels", "route_ids")}
                    with self.compute_loss_context_manager():
                        self.model(**self._prepare_inputs(inputs))
        finally:
            for module, momentum in zip(norms, momenta, strict=True):
                module.momentum = momentum
            self.model.eval()
        for row in self._statistics(UNION):
            row.copy_(broadcast(row.clone()))  # all have computed it, maybe on devices that round differently

    def _explained_failures(self) -> AbstractContextManager:
        return explain_failures(self.args.output_dir, batch_size=self.args.route_batch_size)

    # What Trainer calls

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager:
        """As accelerate autocasts the model: extraction and recalibration compute in the same types."""
        return self.accelerator.autocast()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As `Trainer.log`; steps count over all rounds, and the round is logged along."""
        if self._round is not None:
            logs["round"] = self._round.index + 1
        self.state.global_step += self._steps_before
        try:
            super().log(logs, *args, **kwargs)
        finally:
            self.state.global_step -= self._steps_before

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """As `Trainer`'s; older ones are deleted only once this one is known to be whole."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit
        self.processes.wait()
        if self.processes.rank == 0:
            checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            seal(checkpoint, world_size=self.processes.world_size)
        self._delete_old_checkpoints()

    def _delete_old_checkpoints(self) -> None:
        if self.processes.rank == 0:
            limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
            rotate_checkpoints(self.args.output_dir, save_total_limit=limit, best_model_checkpoint=best)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict=state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            # Trainer pickles its arguments; a model's folder is to hold safetensors and JSON only.
            (folder / "training_args.bin").unlink(missing_ok=True)
            arguments = self.args.to_dict()
            write_json(folder / "training_args.json", {k: v for k, v in arguments.items() if not k.endswith("_dir")})
            if self.route_data is not None:
                self._save_rule(folder, self.route_data.partition.rule)

    def _save_rule(self, folder: Path, rule: Rule | None) -> None:
        """Beside the model; where a rule does not fit, or there is none, also none of an earlier save is left."""
        if rule is None:
            remove_rule(folder)
        else:
            save_rule(folder, rule)
            remove_unfitting_rule(folder, self.model.route_names)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        tied = set(self.model.all_tied_weights_keys)
        missing = [name for name in load_result.missing_keys if name not in tied]
        if missing or load_result.unexpected_keys:
            raise ValueError(
                f"a checkpoint does not fit the model: {len(missing)} tensors missing {missing[:3]}, "
                f"{len(load_result.unexpected_keys)} unknown {load_result.unexpected_keys[:3]}."
            )

    @property
    def _current_round(self) -> Round:
        if self._round is None:
            raise RuntimeError("batches are made inside `train()` only.")
        return self._round

    @contextmanager
    def _output_dir(self, folder: Path) -> Iterator[None]:
        before, self.args.output_dir = self.args.output_dir, str(folder)
        try:
            yield
        finally:
            self.args.output_dir = before


def _check_parallelism(args: RTLTrainingArguments) -> None:
    """Raises `ValueError` where weights are to be split, by arguments or by what `accelerate launch` was told."""
    given = {"FSDP": args.fsdp, "DEEPSPEED": args.deepspeed, "PARALLELISM_CONFIG": args.parallelism_config}
    for name in (*given, "MEGATRON_LM"):
        if given.get(name) or str_to_bool(os.environ.get(f"ACCELERATE_USE_{name}", "false")):
            raise ValueError(
                f"{name} is not supported: it splits weights over the devices, but a mask covers a whole one, and so "
                "does the masked optimizer step. Use data parallelism, as `accelerate launch --multi_gpu` gives, with "
                "`gradient_checkpointing`, `bf16` or a smaller `route_batch_size` if memory is short."
            )


def _check_connected(args: RTLTrainingArguments) -> None:
    """Raises `ValueError` if a launcher started several processes that know nothing of each other."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > args.world_size:
        raise ValueError(
            f"a launcher has started {started} processes, but they are not connected: each would do the whole run, in "
            "the same folder. On CPUs, set `use_cpu=True` in the arguments (for a recipe, add --use_cpu)."
        )
