"""`RTLTrainer`: rounds of ticket extraction and joint retraining on the Hugging Face `Trainer`."""

from __future__ import annotations

import copy
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import timm
import torch
import transformers
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim.optimizer import Optimizer
from torch.utils.data import DataLoader
from transformers import ProgressCallback, Trainer, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalPrediction, TrainOutput

from .extraction import TicketTrainer, deal_out, named_state, seeded
from .masking import UNION
from .metrics import calibrate_thresholds, constant_tickets, label_metrics, membership_metrics
from .modeling_rtl import (
    RTLModel,
    RTLModelForAudioClassification,
    RTLModelForImageClassification,
    RTLModelForSequenceClassification,
)
from .optim import MaskedAdamW, MaskedSGD, mask_updates
from .partition import Partition
from .plan import Plan, Round, make_rounds
from .progress import RunProgress
from .pruning import emptied_layers, prune, round_schedule
from .route_data import EvaluationData, RouteData, Rows, columns_of, find_partition, label_column
from .run_directory import RunDirectory, hash_tensors, read_tensors, write_json, write_tensors
from .sampling import RouteBatchSampler
from .training_args import EXTRACTION_FIELDS, RETRAINING_FIELDS, RTLTrainingArguments


logger = logging.getLogger(__name__)

# First word of the keys that random streams are made of, so that no two uses share a stream.
_EXTRACTION, _RETRAINING, _REWINDING, _RECALIBRATION = range(4)

_ONE_LABEL_PER_SAMPLE = (
    RTLModelForImageClassification,
    RTLModelForAudioClassification,
    RTLModelForSequenceClassification,
)


class RTLTrainer(Trainer):
    """
    Finds one ticket per route and retrains them jointly (paper, Algorithms 1 and 2), on the Hugging Face `Trainer`.

    `train()` runs the rounds of `args.target_sparsity`. A round extracts every route's ticket, rewinds, retrains all
    tickets jointly over shared weights in the Trainer's own loop, evaluates, and saves a complete model; the last one
    is also in `final/`. Every round starts from the same initial weights: of extraction only the masks survive. Called
    again, also in a new process, it continues an interrupted run in `args.output_dir`.

    Args:
        model ([`RTLModel`]): its backbone's weights are θ0.
        args ([`RTLTrainingArguments`]): see there.
        train_dataset (map-style data set of dicts, *optional*): its `args.route_column`, by default the label, says
            the route of a sample.
        eval_dataset (map-style data set, or a dict of them, *optional*): evaluated whole, at its own prevalence.
        calibration_dataset (map-style data set, *optional*): thresholds of membership tickets are calibrated on it;
            alternatively on `args.calibration_fraction` of the training data, which is then not trained on.
        compute_metrics (`Callable`, *optional*): instead of `hf_rtl.metrics`. For `membership` the predictions are the
            score matrix `[N, K]` and the labels the home routes `[N]`.
        **kwargs: as of `Trainer`. Not `optimizers` or `model_init`: every round starts from θ0 with a fresh optimizer.

    Raises:
        TypeError, ValueError: data, arguments and model do not fit each other. Nothing has been written then.
    """

    model: RTLModel
    args: RTLTrainingArguments
    optimizer: Any

    def __init__(
        self,
        model: RTLModel,
        args: RTLTrainingArguments,
        *,
        train_dataset: Any = None,
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
        self.route_data: RouteData | None = None
        self.calibration_dataset = calibration_dataset
        # (data set, partition) of what is evaluated time and again: reading a column can mean fetching every sample.
        self._partitions: list[tuple[Any, Partition]] = []
        if train_dataset is not None:
            partition = find_partition(
                train_dataset,
                route_column=args.route_column,
                route_names=model.route_names,
                ticket_task=model.config.ticket_task,
            )
            if not membership and isinstance(model, _ONE_LABEL_PER_SAMPLE) and kwargs.get("data_collator") is None:
                _check_label_column(columns_of(train_dataset))
            partition.check(model.config.ticket_task, None if membership else _labels(model, train_dataset))
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
            self.route_data.sampler((), world_size=args.world_size)
        # Now rather than after hours of training: whether evaluation and calibration can find their routes.
        evaluated = list(eval_dataset.values()) if isinstance(eval_dataset, dict) else [eval_dataset]
        for dataset in (*evaluated, calibration_dataset):
            if dataset is not None:
                self._partitions.append((dataset, self._find_partition(model, args, dataset)))
        if compute_metrics is None and isinstance(model, _ONE_LABEL_PER_SAMPLE):
            compute_metrics = self._compute_metrics
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            compute_metrics=compute_metrics,
            **kwargs,
        )
        self.remove_callback(ProgressCallback)
        self.progress = RunProgress(show=args.local_process_index == 0 and not args.disable_tqdm)
        self.add_callback(self.progress)
        self.run_directory = RunDirectory(args.output_dir, args.extraction_dir)
        # One report per retrained round: sparsity, folder, counts, similarity, emptied layers, metrics.
        self.rounds: list[dict[str, Any]] = []
        self._round: Round | None = None
        self._steps_before = 0
        self._log_before: list[dict[str, Any]] = []
        self._warned_of_emptied_layers = False
        # What `train()` first found in the model: called again, also after it broke off, it starts from the same.
        self._initial: dict[str, Tensor] | None = None
        self._initial_scaler = None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()
        # Of the data set that is being evaluated.
        self._evaluated: Partition

    # The run

    def plan(self) -> Plan:
        """What `train()` is going to do. Raises `ValueError` if targets and model do not fit."""
        data = self._require_data()
        num_weights = self.model.mask_bank.num_weights
        schedule = round_schedule(
            num_weights,
            self.args.target_sparsity,
            schedule=self.args.prune_schedule,
            amount=self.args.prune_amount,
        )
        accumulation = self.args.gradient_accumulation_steps
        sampler = data.sampler((), gradient_accumulation_steps=accumulation, world_size=self.args.world_size)
        retraining_steps = self.args.max_steps
        if retraining_steps < 0:
            retraining_steps = math.ceil(self.args.num_train_epochs * (len(sampler) // accumulation))
        sizes = data.partition.counts.tolist()
        return Plan(
            make_rounds(schedule, self.args.target_sparsity, retrain_every_round=self.args.retrain_every_round),
            num_weights=num_weights,
            route_sizes=dict(zip(self.model.route_names, sizes, strict=True)),
            extraction_steps=[self._extraction_steps(route) for route in range(self.model.num_routes)],
            retraining_steps=retraining_steps,
        )

    def train(self, resume_from_checkpoint: bool | None = None, **kwargs: Any) -> TrainOutput:
        """
        Runs all rounds, starting or continuing the run in `args.output_dir`.

        Args:
            resume_from_checkpoint (`bool`, *optional*): `True` insists that there is a run to continue; otherwise one
                is continued if it is there.

        Returns:
            `TrainOutput`: steps of all rounds, the last round's training loss, and its metrics.

        Raises:
            ValueError: the directory holds a run of another configuration, or there is none to continue.
            FloatingPointError: a loss became NaN or infinite, or a ticket was cut from its input.
        """
        if isinstance(resume_from_checkpoint, (str, Path)):
            raise ValueError(
                f"`resume_from_checkpoint` = {str(resume_from_checkpoint)!r} must be True or None: a run is continued "
                "as a whole, in `output_dir`."
            )
        if resume_from_checkpoint and not (self.run_directory.path / "run.json").exists():
            raise ValueError(f"`resume_from_checkpoint` is set, but {self.args.output_dir!r} holds no run.")
        plan = self.plan()
        if self._initial is None:
            state = named_state(self.model.backbone)
            self._initial = {name: tensor.detach().cpu().clone() for name, tensor in state}
        initial = self._initial
        self._open_run(initial)
        self.rounds, self._steps_before, self._log_before = [], 0, []
        self.progress.start(plan.num_steps)
        output = TrainOutput(0, 0.0, {})
        try:
            theta0 = self._theta0(initial)
            full = [torch.ones(shape, dtype=torch.bool) for shape in self.model.mask_bank.shapes]
            masks = [full] * self.model.num_routes
            for round_ in plan.rounds:
                self._round = round_
                self.progress.begin_round(f"round {round_.index + 1}/{len(plan.rounds)} to {round_.sparsity:g}")
                masks = self._extract(round_, masks, theta0, plan)
                if round_.retrained:
                    self._put_masks(masks)
                    output = self._finish_round(round_, theta0, plan)
        finally:
            self._round = None
            self.progress.finish()
        self.save_model(str(self.run_directory.final_folder), _internal_call=True)
        if self.args.push_to_hub:
            self.push_to_hub()
        return output

    def retrain(self, masks: Sequence[Sequence[Tensor]], *, like: str, name: str) -> dict[str, Any]:
        """
        Joint retraining alone, of given masks, after `train()`: for controls such as random or shuffled masks.

        Args:
            masks (`Sequence[Sequence[Tensor]]`): one mask per route, as of `MaskBank`.
            like (`str`): folder of the round whose batches are used again, as `"round-01-sparsity-0.25"`.
            name (`str`): folder inside `output_dir` that the model is saved in.

        Returns:
            A report as those in `rounds`, which it is not added to. Afterwards the model holds the given masks.
        """
        plan = self.plan()
        original = next((round_ for round_ in plan.rounds if round_.name == like), None)
        theta0 = read_tensors(self.run_directory.theta0_file)
        if original is None or theta0 is None:
            raise ValueError(
                f"`like` = {like!r} is no round of the run in {self.args.output_dir!r}; run `train()` first."
            )
        before = self.rounds, self._steps_before, self._log_before
        self.rounds, self._steps_before, self._log_before = [], 0, []
        self.progress.start(plan.retraining_steps)
        self.progress.begin_round(name)
        try:
            self._round = replace(original, name=name)
            self._put_masks(masks)
            self._finish_round(self._round, theta0, plan)
            return self.rounds[0]
        finally:
            self.rounds, self._steps_before, self._log_before = before
            self._round = None
            self.progress.finish()

    def _open_run(self, initial: dict[str, Tensor]) -> None:
        data = self._require_data()
        model = self.model.config.to_dict()
        for name in ("mask_fingerprint", "thresholds", "transformers_version", "hf_rtl_version", "architectures"):
            model.pop(name, None)
        routes = hash_tensors({"route_ids": torch.from_numpy(data.partition.route_ids)})
        inputs = {"initial_weights": hash_tensors(initial), "route_ids": routes, "seed": data.seed}
        extraction = {**self.args.values_of(EXTRACTION_FIELDS), **inputs, "ticket_task": self.model.config.ticket_task}
        extraction |= {"prunable": model["prunable"], "backbone_config": model["backbone_config"]}
        modules = {"torch": torch, "transformers": transformers, "accelerate": accelerate, "timm": timm}
        if self.args.process_index == 0:
            self.run_directory.open(
                {**extraction, **self.args.values_of(RETRAINING_FIELDS), "model": model},
                extraction,
                {name: module.__version__ for name, module in modules.items()},
            )
        self.accelerator.wait_for_everyone()

    def _theta0(self, initial: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights that everything starts from: the initial ones, or those after `rewind_to` dense steps."""
        file = self.run_directory.theta0_file
        theta0 = read_tensors(file)
        if theta0 is None:
            theta0 = initial
            if self.args.rewind_to:
                trainer = self._ticket_trainer(initial)
                with self._extraction_threads():
                    trainer.train(None, self._dense_batches(), seed=(self.args.seed, _REWINDING))
                theta0 = {name: tensor.detach().cpu().clone() for name, tensor in named_state(trainer.network)}
            if self.args.process_index == 0:
                write_tensors(file, theta0)
            self.accelerator.wait_for_everyone()
            if self.args.rewind_to:
                # The same on all processes, also where they round differently.
                theta0 = read_tensors(file) or theta0
        return theta0

    # Extraction

    def _extract(
        self, round_: Round, masks: list[list[Tensor]], theta0: dict[str, Tensor], plan: Plan
    ) -> list[list[Tensor]]:
        """The masks of all routes at the end of a round. What is on disk is not done again."""
        if not round_.kept:
            return masks
        mine = deal_out(len(masks), self.args.process_index, self.args.world_size)
        trainer: TicketTrainer | None = None
        reference = [theta0[name] for name in self.model.mask_bank.weight_names]
        with self._extraction_threads():
            for route in mine:
                mask = masks[route]
                for offset, num_kept in enumerate(round_.kept):
                    event = round_.first_event + offset
                    name = self.model.route_names[route]
                    self.progress.begin_route(name, offset + 1, len(round_.kept))
                    pruned = self.run_directory.load_masks(event, route, self.model.mask_bank.shapes)
                    if pruned is None:
                        trainer = trainer or self._ticket_trainer(theta0)
                        pruned = self._extract_one(trainer, route, event, mask, num_kept, reference)
                        self.run_directory.save_masks(event, route, pruned, started_from=trainer.started_from)
                    else:
                        self.progress.step(plan.extraction_steps[route])
                    mask = pruned
        self.accelerator.wait_for_everyone()
        last = round_.first_event + len(round_.kept) - 1
        loaded = [
            self.run_directory.load_masks(last, route, self.model.mask_bank.shapes) for route in range(len(masks))
        ]
        missing = [self.model.route_names[route] for route, mask in enumerate(loaded) if mask is None]
        if missing:
            raise RuntimeError(
                f"the masks of {', '.join(missing)} are missing in {str(self.run_directory.extraction_path)!r} after "
                "extraction; with several machines it must be on a disk that all of them share."
            )
        return [mask for mask in loaded if mask is not None]

    def _extract_one(
        self,
        trainer: TicketTrainer,
        route: int,
        event: int,
        mask: list[Tensor],
        num_kept: int,
        reference: list[Tensor],
    ) -> list[Tensor]:
        """One prune event of one route: train from m ⊙ θ0, remove the smallest weights."""
        name = self.model.route_names[route]
        last_batch: dict[str, Any] = {}

        def batches() -> Iterator[dict[str, Any]]:
            for batch in self._extraction_batches(route, event):
                last_batch.update(batch)
                yield batch

        try:
            weights = trainer.train(
                mask, batches(), seed=(self.args.seed, _EXTRACTION, event, route), on_step=self.progress.step
            )
        except FloatingPointError as error:
            raise FloatingPointError(f"extraction of route {name!r}, prune event {event}: {error}") from None
        pruned = prune(weights, mask, num_kept=num_kept, scope=self.args.prune_scope, reference=reference)
        if not self.args.allow_disconnected and trainer.is_disconnected(pruned, self._inputs_of(last_batch)):
            raise FloatingPointError(
                f"pruning to {num_kept:,} weights has cut the output of ticket {name!r} from its input. Lower "
                "`target_sparsity`, use `prune_scope='layer'`, or set `allow_disconnected=True` to go on."
            )
        return pruned

    def _ticket_trainer(self, theta0: dict[str, Tensor]) -> TicketTrainer:
        return TicketTrainer(
            network=copy.deepcopy(self.model.backbone).to(self.args.device),
            theta0=theta0,
            weight_names=self.model.mask_bank.weight_names,
            make_optimizer=self._plain_optimizer,
            compute_loss=lambda network, batch: self.compute_loss(network, self._inputs_of(batch)),
            autocast=self.compute_loss_context_manager,
            max_grad_norm=self.args.max_grad_norm,
            fp16=self.args.fp16,
        )

    def _extraction_steps(self, route: int) -> int:
        if self.args.extraction_steps is not None:
            return self.args.extraction_steps
        updates = self._require_data().sampler((), routes=[route]).num_updates_per_route
        return max(1, round(self.args.extraction_epochs * updates))

    def _extraction_batches(self, route: int, event: int) -> Iterator[dict[str, Any]]:
        sampler = self._require_data().sampler((_EXTRACTION, event), routes=[route])
        return islice(self._endless(self._require_data(), sampler), self._extraction_steps(route))

    def _dense_batches(self) -> Iterator[dict[str, Any]]:
        """Batches over all samples as if they were one route, for rewinding."""
        data = copy.copy(self._require_data())
        data.partition = Partition(np.zeros_like(data.partition.route_ids), ["all"])
        return islice(self._endless(data, data.sampler((_REWINDING,))), self.args.rewind_to)

    def _endless(self, data: RouteData, sampler: RouteBatchSampler) -> Iterator[dict[str, Any]]:
        loader = data.loader(sampler, self._collate(), **self._loader_arguments())
        epoch = 0
        while True:
            sampler.set_epoch(epoch)
            yield from loader
            epoch += 1

    def _inputs_of(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch as the plain backbone takes it."""
        batch = self._prepare_inputs({name: value for name, value in batch.items() if name != "route"})
        if self._require_data().membership:
            batch["labels"] = self.model.ticket_labels(batch["labels"])
        return batch

    @contextmanager
    def _extraction_threads(self) -> Iterator[None]:
        before = torch.get_num_threads()
        if self.args.extraction_threads is not None:
            torch.set_num_threads(self.args.extraction_threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def _put_masks(self, masks: Sequence[Sequence[Tensor]]) -> None:
        for route, mask in enumerate(masks):
            self.model.mask_bank[route] = mask
        fingerprints = gather_object([self.model.mask_bank.fingerprint()])
        if len(set(fingerprints)) > 1:
            raise RuntimeError(f"processes disagree on the masks: {[name[:16] for name in fingerprints]}.")
        emptied = self._emptied_layers()
        if emptied and not self._warned_of_emptied_layers:
            self._warned_of_emptied_layers = True
            name, layers = next(iter(emptied.items()))
            logger.warning(
                f"pruning has emptied whole layers, of ticket {name!r} for one: {', '.join(layers)}. See "
                "`prune_scope='layer'`, or the reports of the rounds for all of them."
            )

    def _emptied_layers(self) -> dict[str, list[str]]:
        bank = self.model.mask_bank
        emptied = {name: emptied_layers(bank[name]) for name in bank.route_names}
        return {name: [bank.weight_names[layer] for layer in layers] for name, layers in emptied.items() if layers}

    # Joint retraining

    def _finish_round(self, round_: Round, theta0: dict[str, Tensor], plan: Plan) -> TrainOutput:
        """Joint retraining, calibration, evaluation and saving of a round; only read back if that is done already."""
        folder = self.run_directory.path / round_.name
        file = folder / "round.json"
        if file.exists():
            report = json.loads(file.read_text())
            if report["mask_fingerprint"] != self.model.mask_bank.fingerprint():
                raise ValueError(
                    f"{str(folder)!r} holds a model that was retrained with other masks; move it away, or choose "
                    "another `name`."
                )
            self._load_from_checkpoint(str(folder))
            self.model.config.thresholds = report["thresholds"]
            self.progress.step(plan.retraining_steps)
        else:
            start = time.perf_counter()
            self._start_from(theta0)
            started_from = hash_tensors(dict(named_state(self.model.backbone)))
            output = self._retrain(folder)
            if not math.isfinite(output.training_loss):
                raise FloatingPointError(
                    f"joint retraining of {round_.name}: the loss became {output.training_loss}; lower "
                    "`learning_rate`, or check the data."
                )
            # Training data may have random transforms: they are the same wherever the run was continued.
            with seeded((self.args.seed, _RECALIBRATION, round_.index), self.args.device):
                self._recalibrate_union()
                self.model.config.thresholds = self._calibrated_thresholds()
            metrics = {} if self.eval_dataset is None else self.evaluate()
            self.save_model(str(folder), _internal_call=True)
            report = self._report(round_, metrics, output, time.perf_counter() - start)
            report["started_from"] = started_from
            if self.args.process_index == 0:
                write_json(file, report)
            self.accelerator.wait_for_everyone()
        self.rounds.append(report)
        self._steps_before += report["steps"]
        self._log_before = report["log_history"]
        return TrainOutput(self._steps_before, report["train_loss"], report["metrics"])

    @torch.no_grad()
    def _start_from(self, theta0: dict[str, Tensor]) -> None:
        """Sets every parameter, buffer and statistics row to θ0; forgets thresholds, which fitted other weights."""
        self.model.config.thresholds = None
        for name, tensor in named_state(self.model.backbone):
            tensor.copy_(theta0[name])
        if self.model.norm_statistics is not None:
            self.model.norm_statistics.reset(self.model.backbone)

    def _retrain(self, folder: Path) -> TrainOutput:
        """Algorithm 2 in the Trainer's own loop, with a fresh optimizer, schedule and scaler."""
        self.optimizer = self.lr_scheduler = None
        self.model_wrapped = self.model
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(self._initial_scaler)
        set_seed(_seed_of(self.args.seed, _RETRAINING, self._current_round.index))
        with self._output_dir(folder):
            return super().train(resume_from_checkpoint=_last_whole_checkpoint(folder))

    def get_train_dataloader(self) -> DataLoader:
        data = self._require_data()
        sampler = self._retraining_sampler(self._current_round.index)
        loader = data.loader(sampler, self._collate(), **self._loader_arguments())
        # The sampler gives every rank its share of each batch already; accelerate is only to move tensors.
        return prepare_data_loader(
            loader, device=self.args.device, num_processes=1, process_index=0, put_on_device=True
        )

    def retraining_batches(self, round_index: int) -> Iterator[dict[str, Any]]:
        """The batches of a round's joint retraining, on the device, for controls that are to see the same data."""
        sampler = self._retraining_sampler(round_index)
        batches = self._endless(self._require_data(), sampler)
        num_batches = self.plan().retraining_steps * self.args.gradient_accumulation_steps
        return (self._prepare_inputs(batch) for batch in islice(batches, num_batches))

    def _retraining_sampler(self, round_index: int) -> RouteBatchSampler:
        return self._require_data().sampler(
            (_RETRAINING, round_index),
            gradient_accumulation_steps=self.args.gradient_accumulation_steps,
            rank=self.args.process_index,
            world_size=self.args.world_size,
        )

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        route = inputs.pop("route")
        model.train()
        # With accumulation all batches of an update are of one route; a step that the scaler skipped is forgotten.
        self.model.routes_since_update.clear()
        with self.model.route_context(route):
            return super().training_step(model, inputs, num_items_in_batch)

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
        named = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
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
            np.random.default_rng([data.seed, _RECALIBRATION, self._current_round.index]),
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

    # Evaluation

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("evaluation needs an `eval_dataset`.")
        known = (partition for other, partition in self._partitions if other is dataset)
        self._evaluated = next(known, None) or self._find_partition(self.model, self.args, dataset)
        membership = self.model.config.ticket_task == "membership"
        samples = EvaluationData(dataset, self._evaluated, membership=membership)
        loader = DataLoader(
            samples, batch_size=self.args.eval_batch_size, collate_fn=self._collate(), **self._loader_arguments()
        )
        return self.accelerator.prepare(loader)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        return self.get_eval_dataloader(test_dataset)

    @staticmethod
    def _find_partition(model: RTLModel, args: RTLTrainingArguments, dataset: Any) -> Partition:
        """The partition of a data set to evaluate on, which need not have samples of all routes."""
        return find_partition(
            dataset,
            route_column=args.route_column,
            route_names=model.route_names,
            ticket_task=str(model.config.ticket_task),
            allow_empty=True,
        )

    def _compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        scores = prediction.predictions
        if self.model.config.ticket_task == "membership":
            metrics = membership_metrics(
                scores, prediction.label_ids, self.model.route_names, thresholds=self.model.config.thresholds
            )
            return {**metrics, "constant_tickets": float(len(constant_tickets(scores)))}
        return label_metrics(scores, prediction.label_ids, self._evaluated.route_ids, self.model.route_names)

    def _calibrated_thresholds(self) -> list[float] | None:
        if self.calibration_dataset is None or self.model.config.ticket_task != "membership":
            return None
        loader = self.get_eval_dataloader(self.calibration_dataset)
        output = self.evaluation_loop(loader, description="Calibration", prediction_loss_only=False)
        return calibrate_thresholds(output.predictions, output.label_ids)

    def _report(self, round_: Round, metrics: dict[str, float], output: TrainOutput, seconds: float) -> dict[str, Any]:
        bank = self.model.mask_bank
        similarity = bank.similarity()
        others = similarity.masked_select(~torch.eye(bank.num_routes, dtype=torch.bool, device=similarity.device))
        return {
            "round": round_.index + 1,
            "sparsity": round_.sparsity,
            "folder": round_.name,
            "kept": dict(zip(bank.route_names, bank.count().tolist(), strict=True)),
            "union": bank.union_count(),
            "core": bank.core_count(),
            "footprint": self.model.footprint(),
            "mean_similarity": float(others.mean()) if len(others) else None,
            "emptied_layers": self._emptied_layers(),
            "mask_fingerprint": bank.fingerprint(),
            "thresholds": self.model.config.thresholds,
            "metrics": metrics,
            "train_loss": output.training_loss,
            "steps": output.global_step,
            "seconds": seconds,
            "log_history": self._log_before + self.state.log_history,
        }

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

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.push_to_hub`, of `final/` alone."""
        if self.hub_model_id is None:
            self.init_hf_repo(token=kwargs.get("token"))
        with self._output_dir(self.run_directory.final_folder):
            return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: what is pushed is `final/` alone, when all rounds are done."""

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict=state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            # Trainer pickles its arguments; a model's folder is to hold safetensors and JSON only.
            (folder / "training_args.bin").unlink(missing_ok=True)
            arguments = self.args.to_dict()
            write_json(folder / "training_args.json", {k: v for k, v in arguments.items() if not k.endswith("_dir")})

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

    def _require_data(self) -> RouteData:
        if self.route_data is None:
            raise ValueError("training needs a `train_dataset`.")
        return self.route_data

    def _collate(self) -> Callable[[list], dict]:
        return self._get_collator_with_removed_columns(self.data_collator)

    def _loader_arguments(self) -> dict[str, Any]:
        return {
            "num_workers": self.args.dataloader_num_workers,
            "pin_memory": self.args.dataloader_pin_memory and self.args.device.type != "cpu",
            "prefetch_factor": self.args.dataloader_prefetch_factor,
        }


def _check_label_column(columns: Sequence[str]) -> None:
    # What transformers' own collators make `labels` of.
    allowed = ("label", "labels", "label_ids")
    if not set(allowed) & set(columns):
        raise ValueError(
            f"`train_dataset` has no column {' or '.join(map(repr, allowed))} for tickets of `ticket_task='labels'` "
            f"to predict; its columns are {', '.join(map(repr, columns))}. Rename one, or pass a `data_collator` that "
            "makes `labels`."
        )


def _labels(model: RTLModel, dataset: Any) -> Sequence[Any] | None:
    """The labels of a data set with one label per sample, else `None`."""
    column = label_column(dataset)
    if not isinstance(model, _ONE_LABEL_PER_SAMPLE) or column is None:
        return None
    if hasattr(dataset, "with_format"):
        values = list(dataset.with_format(None)[column])
    else:
        values = [dataset[index][column] for index in range(len(dataset))]
    values = [value.item() if getattr(value, "ndim", None) == 0 else value for value in values]
    # Of numbers to regress, or several labels a sample, there is nothing to check.
    return values if all(isinstance(value, (int, str)) for value in values) else None


def _last_whole_checkpoint(folder: Path) -> str | None:
    """The latest of a folder's Trainer checkpoints that was written to its end."""
    checkpoints = sorted(folder.glob("checkpoint-[0-9]*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    for checkpoint in checkpoints:
        try:
            json.loads((checkpoint / TRAINER_STATE_NAME).read_text())  # Trainer writes it last
            return str(checkpoint)
        except (OSError, json.JSONDecodeError):
            logger.warning(f"{str(checkpoint)!r} is cut short and left out: the run broke off while writing it.")
    return None


def _seed_of(*words: int) -> int:
    """A seed for `set_seed`, below 2**32."""
    return int(np.random.SeedSequence(list(words)).generate_state(1)[0])
