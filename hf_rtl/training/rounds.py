"""The rounds of a new or continued run: each has extraction, joint retraining, evaluation and a saved model."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import Any

import accelerate
import timm
import torch
import transformers
from torch import Tensor
from transformers.trainer_utils import TrainOutput

from ..data.columns import keeping
from ..modeling.configuration_rtl import RTLConfig
from ..modeling.files import read_tensors, write_tensors
from ..modeling.hashing import hash_tensors
from ..modeling.masking import UNION
from .callbacks import ModelCardCallback, fire_on_tickets_found, rtl_callbacks
from .evaluation_identity import identify_calibration, identify_evaluation, is_known
from .extraction import Extraction, scoring_batches
from .plan import Plan, Round
from .processes import Heartbeat
from .randomness import Stream, numerics_environment, reproducible, seeded
from .rehearsal import check_columns, rehearse
from .route_trainer import RouteTrainer
from .run_directory import REPORT_FILE, RunDirectory
from .run_identity import run_identity
from .run_report import report_round, without_times
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
        if trainer.processes.rank == 0:
            self._say_what_is_done()
        progress.start(plan.num_steps)
        try:
            for round_ in plan.rounds:
                goal = f"{100 * round_.sparsity:.4g}%" + (f" of {round_.layers[0].kind}s" if round_.layers else "")
                progress.begin_round(f"round {round_.index + 1}/{len(plan.rounds)} to {goal}")
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

    def _say_what_is_done(self) -> None:
        """Says how much of the run is on disk, if anything is."""
        plan, directory = self.plan, self.run_directory
        num_masks = len(plan.route_sizes) * plan.num_events
        num_found = sum(
            directory.mask_file(event, route).exists()
            for event in range(plan.num_events)
            for route in range(len(plan.route_sizes))
        )
        retrained = [round_ for round_ in plan.rounds if round_.retrained]
        num_finished = sum((directory.path / round_.name / REPORT_FILE).exists() for round_ in retrained)
        if num_found or num_finished:
            self.trainer.progress.say(
                f"the run in {str(directory.path)!r} goes on: {num_found} of {num_masks} masks are found, "
                f"{num_finished} of {len(retrained)} joint retrainings are finished"
            )

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
            report = self._evaluate(round_, self._read_back(round_) or self._retrain(round_), extra_metrics)
        self.reports.append({**report, **extra_metrics})  # the saved report may lack metrics of these callbacks
        self.num_steps += report["steps"]
        self._log_history = report["log_history"]
        return TrainOutput(self.num_steps, report["train_loss"], report["metrics"])

    def _read_back(self, round_: Round) -> dict[str, Any] | None:
        """Loads the model of a round that was retrained before, and returns its report; `None` if it was not."""
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
        # As after a training; otherwise `Trainer` adds the time of it to the metrics.
        if not trainer.accelerator._models:
            trainer.accelerator.prepare_model(model, evaluation_mode=True)
        # An evaluation is logged at the last step of the round.
        trainer.state.global_step, trainer.state.epoch = report["steps"], report["log_history"][-1].get("epoch")
        trainer.progress.step(self.plan.retraining_steps)
        return report

    def _retrain(self, round_: Round) -> dict[str, Any]:
        """Retrains, calibrates and saves a round. Returns its report, without metrics."""
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
        trainer.save_model(str(folder), _internal_call=True)
        seconds = time.perf_counter() - start
        report = report_round(model, round_, output=output, seconds=seconds)
        report |= {
            "surroundings": self.card.environment,
            "log_history": self._log_history + trainer.state.log_history,
            "started_from": started_from,
        }
        if trainer.processes.rank == 0:
            report = self.run_directory.mark_retrained(folder, report)
        return trainer.processes.from_rank_zero(report)

    def _evaluate(self, round_: Round, report: dict[str, Any], extra_metrics: dict[str, float]) -> dict[str, Any]:
        """
        Evaluates the model of a round, unless the metrics in `report` are shown to be of the same evaluation data.
        Returns the completed report, which is written if its figures are new.
        """
        trainer, is_first, num_logged = self.trainer, report["metrics"] is None, len(self.trainer.state.log_history)
        known, data = is_known(report, self._evaluated_data), self._evaluated_data
        if not is_first and (known or trainer.eval_dataset is None):
            return report
        metrics = {}
        if trainer.eval_dataset is not None:
            with seeded((trainer.args.seed, Stream.EVALUATION, round_.index), trainer.args.device):
                metrics = trainer.evaluate()
        if is_first and extra_metrics:
            trainer.log(dict(extra_metrics))
        completed = {**report, "metrics": metrics, "evaluation": data}
        completed["log_history"] = report["log_history"] + trainer.state.log_history[num_logged:]
        completed |= extra_metrics if is_first else {}
        same_figures = not is_first and without_times(metrics) == without_times(report["metrics"])
        if same_figures and report.get("evaluation", data) == data:
            return {**report, "evaluation": data}
        if trainer.processes.rank == 0:
            self.run_directory.write_report(self.run_directory.path / round_.name, completed)
        return trainer.processes.from_rank_zero(completed)

    @cached_property
    def _evaluated_data(self) -> dict[str, Any]:
        """The identity of the evaluation data, the same on all processes."""
        with keeping(self.trainer.run_data.kept_columns):
            return self.trainer.processes.from_rank_zero(identify_evaluation(self.trainer))

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
    """
    Checks that all processes have the same run, rehearses the end of a round, and starts or continues the run on disk.
    """
    processes, device = trainer.processes, trainer.args.device
    check_columns(trainer)
    batch = _first_batch(trainer, plan)
    with keeping(trainer.run_data.kept_columns):
        configuration, extraction = run_identity(
            trainer.given_config or trainer.model.config.to_dict(),
            trainer.args,
            trainer.run_data.require_training(),
            initial,
            make_collate=trainer.collate_alone,
            labels=batch.get("labels"),
            calibration_data=identify_calibration(trainer),
        )
    modules = {"torch": torch, "transformers": transformers, "accelerate": accelerate, "timm": timm}
    environment = {name: module.__version__ for name, module in modules.items()} | numerics_environment(device)
    environment["first_batch"] = hash_tensors({name: batch[name] for name in batch if isinstance(batch[name], Tensor)})
    processes.check_same({**configuration, **environment})
    if processes.rank == 0:
        run_directory.check(configuration, extraction)
    with keeping(trainer.run_data.kept_columns):
        rehearse(trainer, plan.rounds[0])
    if processes.world_size > 1:
        folders = [run_directory.path, run_directory.extraction_path]
        processes.check_shared(folders, run_directory.owner)
    if processes.rank == 0:
        run_directory.open(configuration, extraction, environment)
    processes.wait()


def _first_batch(trainer: RouteTrainer, plan: Plan) -> dict[str, Any]:
    """The first batch of extraction, after all transforms."""
    with seeded((trainer.args.seed, Stream.EXTRACTION), trainer.args.device):
        event = plan.rounds[0].first_event
        trains = plan.extraction_steps[0] > 0
        return next(trainer.extraction_batches(0, event) if trains else scoring_batches(trainer, 0, event))


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
