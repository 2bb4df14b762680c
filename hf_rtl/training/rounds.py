"""The rounds of a run, started or continued: extraction, joint retraining, evaluation, and a saved model for each."""

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
    The rounds of a run. What is done already is read back from the run's directory.

    Args:
        trainer ([`RouteTrainer`]): trains and evaluates.
        run_directory ([`RunDirectory`]): opened, see `open_run`.
        plan ([`Plan`]): what there is to do.
        theta0 (`dict[str, Tensor]`): what every prune event and every joint retraining starts from.
        card ([`ModelCardCallback`]): knows where a joint retraining ran.

    Attributes:
        reports (`list[dict[str, Any]]`): one per retrained round so far.
        num_steps (`int`): optimizer steps of their joint retrainings.
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
        """Runs all rounds of the plan, or up to one at which a callback asks to stop. The last one is in the model."""
        plan, trainer = self.plan, self.trainer
        bank, progress = trainer.model.mask_bank, trainer.progress
        extraction = Extraction(trainer, self.run_directory, heartbeat, self.theta0, plan.extraction_steps)
        masks = [bank.pack([torch.ones(shape, dtype=torch.bool) for shape in bank.shapes])] * bank.num_routes
        output = TrainOutput(0, 0.0, {})
        previous: Round | None = None
        figures: dict[str, float] = {}
        progress.start(plan.num_steps)
        try:
            for round_ in plan.rounds:
                progress.begin_round(f"round {round_.index + 1}/{len(plan.rounds)} to {round_.sparsity:g}")
                with trainer.in_round(round_, num_steps_before=self.num_steps):
                    found = extraction.run(round_, masks)
                    new_figures, stop = self._fire_on_tickets_found(round_, found)
                if stop and previous is not None:
                    if not previous.retrained:
                        output = self.finish(previous, masks, figures)
                    break
                previous, masks, figures = round_, found, new_figures
                if round_.retrained:
                    output = self.finish(round_, masks, figures)
        finally:
            progress.finish()
        return output

    def finish(self, round_: Round, masks: Sequence[Sequence[Tensor]], figures: dict[str, float]) -> TrainOutput:
        """
        Joint retraining, calibration, evaluation and saving of a round; only read back if that is done already.

        Args:
            round_ ([`Round`]): its name is that of the folder.
            masks (`Sequence[Sequence[Tensor]]`): of all routes, as packed rows (see `MaskBank.pack`).
            figures (`dict[str, float]`): what callbacks add to its report.

        Returns:
            `TrainOutput`: the steps of all rounds so far, the round's training loss and its metrics.
        """
        with self.trainer.in_round(round_, num_steps_before=self.num_steps):
            self.trainer.put_masks(masks)
            report = self._read_back(round_) or self._retrain(round_, figures)
        self.reports.append({**report, **figures})  # a round that is read back may have been without these callbacks
        self.num_steps += report["steps"]
        self._log_history = report["log_history"]
        return TrainOutput(self.num_steps, report["train_loss"], report["metrics"])

    def _read_back(self, round_: Round) -> dict[str, Any] | None:
        """The report of a finished round, whose model is loaded; `None` if it is not finished."""
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

    def _retrain(self, round_: Round, figures: dict[str, float]) -> dict[str, Any]:
        """Trains, fits, evaluates and saves a round. Gives its report."""
        trainer, args, model = self.trainer, self.trainer.args, self.trainer.model
        folder = self.run_directory.path / round_.name
        start = time.perf_counter()
        trainer.start_from(self.theta0)
        started_from = hash_tensors(dict(named_state(model.backbone)))
        output = trainer.retrain_jointly(folder)
        # The loss alone does not tell if the run was continued from its last step.
        if not math.isfinite(output.training_loss) or not _is_finite(model):
            raise FloatingPointError(
                f"joint retraining of {round_.name}: the loss or a weight became NaN or infinite (mean loss "
                f"{output.training_loss}); lower `learning_rate`, or check the data."
            )
        # Training data may have random transforms: they are the same wherever the run was continued.
        with seeded((args.seed, Stream.RECALIBRATION, round_.index), args.device):
            trainer.recalibrate_union()
            model.config.thresholds = trainer.calibrated_thresholds()
            if args.router != "given":
                fallback = args.router_fallback or UNION
                trainer.fit_router(args.router, threshold=args.router_threshold, fallback=fallback)
        metrics = {} if trainer.eval_dataset is None else trainer.evaluate()
        if figures:
            trainer.log(dict(figures))
        trainer.save_model(str(folder), _internal_call=True)
        seconds = time.perf_counter() - start
        report = report_round(model, round_, metrics=metrics, output=output, seconds=seconds)
        report |= {
            "surroundings": self.card.surroundings,
            "log_history": self._log_history + trainer.state.log_history,
            "started_from": started_from,
            **figures,
        }
        if trainer.processes.rank == 0:
            report = self.run_directory.write_report(folder, report)
        return trainer.processes.from_rank_zero(report)

    def _fire_on_tickets_found(self, round_: Round, masks: Sequence[list[Tensor]]) -> tuple[dict[str, float], bool]:
        """`on_tickets_found`: the figures that callbacks give, and whether one asks to stop; the same everywhere."""
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
    """Starts or continues the run on disk, once it is sure that all processes mean the same run."""
    processes, device = trainer.processes, trainer.args.device
    configuration, extraction = run_identity(trainer.model, trainer.args, trainer.run_data.require_training(), initial)
    modules = {"torch": torch, "transformers": transformers, "accelerate": accelerate, "timm": timm}
    around = {name: module.__version__ for name, module in modules.items()} | numerics_environment(device)
    around["first_batch"] = _hash_of_first_batch(trainer, plan)
    processes.check_same({**configuration, **around})
    if processes.world_size > 1:
        folders = [run_directory.path, run_directory.extraction_path]
        processes.check_shared(folders, run_directory.owner)
    if processes.rank == 0:
        run_directory.open(configuration, extraction, around)
    processes.wait()


def _hash_of_first_batch(trainer: RouteTrainer, plan: Plan) -> str:
    """A hash of what extraction begins with, after all transforms."""
    with seeded((trainer.args.seed, Stream.EXTRACTION), trainer.args.device):
        batch = next(trainer.extraction_batches(0, plan.rounds[0].first_event))
    return hash_tensors({name: value for name, value in batch.items() if isinstance(value, Tensor)})


def find_theta0(
    trainer: RouteTrainer, run_directory: RunDirectory, initial: dict[str, Tensor], heartbeat: Heartbeat
) -> dict[str, Tensor]:
    """The weights that everything starts from: the initial ones, or those after `rewind_to` dense steps."""
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
    """Batches over all samples as if they were one route, for rewinding."""
    data = trainer.run_data.require_training().as_one_route()
    return islice(trainer.endless_batches(data, data.sampler((Stream.REWINDING,))), trainer.args.rewind_to)


@torch.no_grad()
def _is_finite(model: torch.nn.Module) -> bool:
    return bool(torch.stack([parameter.isfinite().all() for parameter in model.parameters()]).all())
