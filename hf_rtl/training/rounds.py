"""The rounds of a new or continued run: each has extraction, joint retraining, evaluation and a saved model."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import accelerate
import timm
import torch
import transformers
from torch import Tensor
from transformers.trainer_utils import TrainOutput

from ..modeling.configuration_rtl import RTLConfig
from ..modeling.files import read_tensors, write_tensors
from ..modeling.hashing import hash_tensors
from ..modeling.masking import UNION
from .callbacks import ModelCardCallback, fire_on_tickets_found, rtl_callbacks
from .extraction import Extraction
from .plan import Plan, Round
from .processes import Heartbeat
from .randomness import Stream, numerics_environment, reproducible, seeded
from .route_trainer import RouteTrainer
from .run_directory import RunDirectory
from .run_identity import run_identity
from .run_report import report_round
from .ticket_trainer import named_state


class Rounds:
    """
    The rounds of a run. Finished work is read back from the run's directory.

    Args:
        trainer ([`RouteTrainer`]): trains and evaluates.
        run_directory ([`RunDirectory`]): a directory that `open_run` has opened.
        plan ([`Plan`]): the rounds to do.
        theta0 (`dict[str, Tensor]`): θ0, from which every prune event and every joint retraining starts.
        card ([`ModelCardCallback`]): knows the environment of a joint retraining.

    Attributes:
        reports (`list[dict[str, Any]]`): one per retrained round so far.
        num_steps (`int`): total optimizer steps of these joint retrainings.
    """

    def __init__(
        self,
        trainer: RouteTrainer,
        run_directory: RunDirectory,
        plan: Plan,
        theta0: dict[str, Tensor],
        card: ModelCardCallback,
    ) -> None:
        self.trainer = trainer
        self.run_directory = run_directory
        self.plan = plan
        self.theta0 = theta0
        self.card = card
        self.reports: list[dict[str, Any]] = []
        self.num_steps = 0
        self._log_history: list[dict[str, Any]] = []

    def run(self, heartbeat: Heartbeat) -> TrainOutput:
        """Runs all rounds of the plan, unless a callback stops the run. Leaves the model of the last round."""
        plan, trainer = self.plan, self.trainer
        bank, progress = trainer.model.mask_bank, trainer.progress
        extraction = Extraction(trainer, self.run_directory, heartbeat, self.theta0, plan.extraction_steps)
        masks = [bank.pack([torch.ones(shape, dtype=torch.bool) for shape in bank.shapes])] * bank.num_routes
        output = TrainOutput(0, 0.0, {})
        previous: Round | None = None
        extra_metrics: dict[str, float] = {}
        progress.start(plan.num_steps)
        try:
            for round_ in plan.rounds:
                progress.begin_round(f"round {round_.index + 1}/{len(plan.rounds)} to {round_.sparsity:g}")
                with trainer.in_round(round_, num_steps_before=self.num_steps):
                    found = extraction.run(round_, masks)
                    new_metrics, stop = self._fire_on_tickets_found(round_, found)
                if stop and previous is not None:
                    if not previous.retrained:
                        output = self.finish(previous, masks, extra_metrics)
                    break
                previous, masks, extra_metrics = round_, found, new_metrics
                if round_.retrained:
                    output = self.finish(round_, masks, extra_metrics)
        finally:
            progress.finish()
        return output

    def finish(self, round_: Round, masks: Sequence[Sequence[Tensor]], extra_metrics: dict[str, float]) -> TrainOutput:
        """
        Retrains a round jointly, calibrates, evaluates and saves it. Reads a finished round back instead.

        Args:
            round_ ([`Round`]): the round, whose name is that of its folder.
            masks (`Sequence[Sequence[Tensor]]`): the masks of all routes, as packed rows (see `MaskBank.pack`).
            extra_metrics (`dict[str, float]`): metrics that callbacks add to the report.

        Returns:
            `TrainOutput`: the steps of all rounds so far, the round's training loss and its metrics.

        Raises:
            ValueError: the folder holds a model with other masks.
            FloatingPointError: the loss or a weight became NaN or infinite.
        """
        with self.trainer.in_round(round_, num_steps_before=self.num_steps):
            self.trainer.put_masks(masks)
            report = self._read_back(round_) or self._retrain(round_, extra_metrics)
        self.reports.append({**report, **extra_metrics})  # the saved report may lack metrics of these callbacks
        self.num_steps += report["steps"]
        self._log_history = report["log_history"]
        return TrainOutput(self.num_steps, report["train_loss"], report["metrics"])

    def _read_back(self, round_: Round) -> dict[str, Any] | None:
        """Loads the model of a finished round and returns its report; `None` if the round is not finished."""
        trainer, model = self.trainer, self.trainer.model
        folder = self.run_directory.path / round_.name
        report = self.run_directory.read_report(folder) if trainer.processes.rank == 0 else None
        report = trainer.processes.from_rank_zero(report)
        if report is None:
            return None
        if report["mask_fingerprint"] != model.mask_bank.fingerprint():
            raise ValueError(
                f"{str(folder)!r} holds a model that was retrained with other masks; move it away, or choose another "
                "`name`."
            )
        model.load_router_from_config(RTLConfig.from_pretrained(folder))
        trainer._load_from_checkpoint(str(folder))
        model.config.thresholds = report["thresholds"]
        trainer.progress.step(self.plan.retraining_steps)
        return report

    def _retrain(self, round_: Round, extra_metrics: dict[str, float]) -> dict[str, Any]:
        """Retrains, calibrates, evaluates and saves a round. Returns its report."""
        trainer, args, model = self.trainer, self.trainer.args, self.trainer.model
        folder = self.run_directory.path / round_.name
        start = time.perf_counter()
        trainer.start_from(self.theta0)
        started_from = hash_tensors(dict(named_state(model.backbone)))
        output = trainer.retrain_jointly(folder)
        # After a run continued from its last step the loss is 0, so the weights are checked too.
        if not math.isfinite(output.training_loss) or not _is_finite(model):
            raise FloatingPointError(
                f"joint retraining of {round_.name}: the loss or a weight became NaN or infinite (mean loss "
                f"{output.training_loss}); lower `learning_rate`, or check the data."
            )
        trainer.recalibrate()
        with seeded((args.seed, Stream.RECALIBRATION, round_.index), args.device):
            trainer.warn_of_lagging_statistics()
            model.config.thresholds = trainer.calibrated_thresholds()
            if args.router != "given":
                fallback = args.router_fallback or UNION
                trainer.fit_router(args.router, threshold=args.router_threshold, fallback=fallback)
        metrics = {} if trainer.eval_dataset is None else trainer.evaluate()
        if extra_metrics:
            trainer.log(dict(extra_metrics))
        trainer.save_model(str(folder), _internal_call=True)
        seconds = time.perf_counter() - start
        report = report_round(model, round_, metrics=metrics, output=output, seconds=seconds)
        report |= {
            "surroundings": self.card.environment,
            "log_history": self._log_history + trainer.state.log_history,
            "started_from": started_from,
            **extra_metrics,
        }
        if trainer.processes.rank == 0:
            report = self.run_directory.write_report(folder, report)
        return trainer.processes.from_rank_zero(report)

    def _fire_on_tickets_found(self, round_: Round, masks: Sequence[list[Tensor]]) -> tuple[dict[str, float], bool]:
        """Calls `on_tickets_found` on process 0. Returns metrics and whether to stop, the same on all processes."""
        trainer = self.trainer
        callbacks = rtl_callbacks(trainer.callback_handler.callbacks)
        answer: tuple[dict[str, float], bool] = ({}, False)
        if callbacks and trainer.processes.rank == 0:
            bank, state, control = trainer.model.mask_bank, trainer.state, trainer.control
            answer = fire_on_tickets_found(
                callbacks, round_, masks, bank, self.run_directory, trainer.args, state, control
            )
        return trainer.processes.from_rank_zero(answer)


def open_run(trainer: RouteTrainer, run_directory: RunDirectory, plan: Plan, initial: dict[str, Tensor]) -> None:
    """Checks that all processes have the same run, then starts or continues it on disk."""
    processes, device = trainer.processes, trainer.args.device
    configuration, extraction = run_identity(trainer.model, trainer.args, trainer.run_data.require_training(), initial)
    modules = {"torch": torch, "transformers": transformers, "accelerate": accelerate, "timm": timm}
    environment = {name: module.__version__ for name, module in modules.items()} | numerics_environment(device)
    environment["first_batch"] = _hash_first_batch(trainer, plan)
    processes.check_same({**configuration, **environment})
    if processes.world_size > 1:
        folders = [run_directory.path, run_directory.extraction_path]
        processes.check_shared(folders, run_directory.owner)
    if processes.rank == 0:
        run_directory.open(configuration, extraction, environment)
    processes.wait()


def _hash_first_batch(trainer: RouteTrainer, plan: Plan) -> str:
    """A hash of the first batch of extraction, after all transforms."""
    with seeded((trainer.args.seed, Stream.EXTRACTION), trainer.args.device):
        batch = next(trainer.extraction_batches(0, plan.rounds[0].first_event))
    return hash_tensors({name: value for name, value in batch.items() if isinstance(value, Tensor)})


def find_theta0(
    trainer: RouteTrainer, run_directory: RunDirectory, initial: dict[str, Tensor], heartbeat: Heartbeat
) -> dict[str, Tensor]:
    """θ0: the initial weights, or those after `rewind_to` dense steps. Raises `RuntimeError` if it cannot be read."""
    file, args = run_directory.theta0_file, trainer.args
    if trainer.processes.rank == 0:
        stored = read_tensors(file)
        if not args.rewind_to:
            if stored is None or hash_tensors(stored) != hash_tensors(initial):
                write_tensors(file, initial)
        elif stored is None:
            dense = trainer.ticket_trainer(initial)
            with reproducible(args.extraction_threads):
                dense.train(None, _dense_batches(trainer), seed=(args.seed, Stream.REWINDING))
            write_tensors(file, dict(named_state(dense.network)))
    heartbeat.meet()
    theta0 = read_tensors(file) if args.rewind_to else initial
    if theta0 is None:
        raise RuntimeError(f"process {trainer.processes.rank} cannot read {str(file)!r}, which process 0 has written.")
    return theta0


def _dense_batches(trainer: RouteTrainer) -> Iterator[dict[str, Any]]:
    """Batches for rewinding: all samples, as one route."""
    data = trainer.run_data.require_training().as_one_route()
    return islice(trainer.endless_batches(data, data.sampler((Stream.REWINDING,))), trainer.args.rewind_to)


@torch.no_grad()
def _is_finite(model: torch.nn.Module) -> bool:
    return bool(torch.stack([parameter.isfinite().all() for parameter in model.parameters()]).all())
