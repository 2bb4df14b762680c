"""`RTLTrainer`: rounds of ticket extraction and joint retraining on the Hugging Face `Trainer`."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import accelerate
import timm
import torch
import transformers
from torch import Tensor
from transformers.trainer_utils import EvalPrediction, TrainOutput

from ..data.partition import Partition
from ..model_card.card import CARD, RTLCardData, write_card
from ..model_card.run_record import write_run
from ..modeling.configuration_rtl import RTLConfig
from ..modeling.files import read_tensors, write_bytes, write_tensors
from ..modeling.hashing import hash_tensors
from ..modeling.hub import MODEL_FILES, branch_head, commit_folder, read_card
from ..modeling.masking import UNION
from ..modeling.modeling_rtl import RTLModel
from ..pruning import emptied_layers, round_schedule
from .callbacks import ModelCardCallback, listeners, tell_of_tickets
from .extraction import Extraction
from .plan import Plan, Round, make_rounds
from .processes import Lifeline
from .randomness import Stream, reproducible, seeded, surroundings
from .route_adding import RouteAddingTrainer
from .run_directory import RunDirectory
from .run_report import describe_run
from .ticket_trainer import named_state
from .training_args import EXTRACTION_FIELDS, RETRAINING_FIELDS, RTLTrainingArguments


logger = logging.getLogger(__name__)

# Of a model's configuration: what training changes, and who wrote it.
_NOT_OF_A_RUN = (
    "mask_fingerprint",
    "base",
    "thresholds",
    "router",
    "router_features",
    "router_threshold",
    "router_fallback",
    "transformers_version",
    "hf_rtl_version",
    "format_version",
    "architectures",
)


class RTLTrainer(RouteAddingTrainer):
    """
    Finds one ticket per route and retrains them jointly (paper, Algorithms 1 and 2), on the Hugging Face `Trainer`.

    `train()` runs the rounds of `args.target_sparsity`. A round extracts every route's ticket, rewinds, retrains all
    tickets jointly over shared weights in the Trainer's own loop, evaluates, and saves a complete model; the last one
    is also in `final/`. Every round starts from the same initial weights: of extraction only the masks survive. Called
    again, also in a new process, it continues an interrupted run in `args.output_dir`. The rule of the training data's
    partition, if it has one, is written beside every model; [`load_rule`] reads it.

    Args:
        model ([`RTLModel`]): its backbone's weights are θ0.
        args ([`RTLTrainingArguments`]): see there.
        train_dataset (map-style data set of dicts, *optional*): its `args.route_column`, by default the label, says
            the route of a sample, unless `partition` does, or there is a single route (plain magnitude pruning).
        partition ([`Partition`], *optional*): the routes of `train_dataset`, those of the model in their order. Other
            data have theirs from `args.route_column`, or if that is not set from the partition's rule, which must read
            a column then.
        eval_dataset (map-style data set, or a dict of them, *optional*): evaluated whole, at its own prevalence.
        calibration_dataset (map-style data set, *optional*): thresholds of membership tickets are calibrated on it;
            alternatively on `args.calibration_fraction` of the training data, which is then not trained on.
        compute_metrics (`Callable`, *optional*): instead of `hf_rtl.metrics`. For `membership` the predictions are the
            score matrix `[N, K]` and the labels the home routes `[N]`.
        **kwargs: as of `Trainer`. Not `optimizers` or `model_init`: every round starts from θ0 with a fresh optimizer.

    Raises:
        TypeError, ValueError: data, arguments and model do not fit each other. Nothing has been written then.
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
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            partition=partition,
            eval_dataset=eval_dataset,
            calibration_dataset=calibration_dataset,
            compute_metrics=compute_metrics,
            **kwargs,
        )
        self.run_directory = RunDirectory(args.output_dir, args.extraction_dir)
        # One report per retrained round: sparsity, folder, counts, similarity, emptied layers, metrics.
        self.rounds: list[dict[str, Any]] = []
        self._log_before: list[dict[str, Any]] = []
        self._warned_of_emptied_layers = False
        # What only its author can say of the model, as `license`; on its card, also on the one that `train()` pushes.
        self.card_data = RTLCardData()
        self._card_callback = ModelCardCallback()
        self.add_callback(self._card_callback)
        # What `train()` first found in the model: called again, also after it broke off, it starts from the same.
        self._initial: dict[str, Tensor] | None = None

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
            OSError: something cannot be written. What is finished stays; the same command continues.
            RuntimeError: out of memory, or the processes of the run do not agree.
            SystemExit: another process of the run has failed, and said why.
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
        with Lifeline(self.args.process_index, self.args.world_size) as lifeline, self._explained_failures():
            output = self._run(plan, self._initial, lifeline)
        if self.args.push_to_hub:
            self.push_to_hub()
        return output

    def _run(self, plan: Plan, initial: dict[str, Tensor], lifeline: Lifeline) -> TrainOutput:
        self._open_run(plan, initial)
        theta0 = self._theta0(initial, lifeline)
        self.rounds, self._steps_before, self._log_before = [], 0, []
        self.progress.start(plan.num_steps)
        output = TrainOutput(0, 0.0, {})
        try:
            extraction = self._extraction(plan, theta0, lifeline)
            full = [torch.ones(shape, dtype=torch.bool) for shape in self.model.mask_bank.shapes]
            masks = [full] * self.model.num_routes
            previous: Round | None = None
            figures: dict[str, float] = {}
            for round_ in plan.rounds:
                self._round = round_
                self.progress.begin_round(f"round {round_.index + 1}/{len(plan.rounds)} to {round_.sparsity:g}")
                found = extraction.run(round_, masks)
                new_figures, stop = self._tell_callbacks(round_, found)
                if stop and previous is not None:
                    if not previous.retrained:
                        output = self._finish_round(previous, masks, theta0, plan, figures)
                    break
                previous, masks, figures = round_, found, new_figures
                if round_.retrained:
                    output = self._finish_round(round_, masks, theta0, plan, figures)
        finally:
            self._round = None
            self.progress.finish()
        self.save_model(str(self.run_directory.final_folder), _internal_call=True)
        self.model.partition_rule = self._require_data().partition.rule
        if self.is_world_process_zero():
            self.model.training_run = self._describe_run()
            write_run(self.run_directory.final_folder, self.model.training_run)
        self.create_model_card()
        return output

    def _tell_callbacks(self, round_: Round, masks: Sequence[list[Tensor]]) -> tuple[dict[str, float], bool]:
        """`on_tickets_found`: the figures that callbacks give, and whether one asks to stop; the same everywhere."""
        callbacks = listeners(self.callback_handler.callbacks)
        answer: tuple[dict[str, float], bool] = ({}, False)
        if callbacks and self.processes.rank == 0:
            bank, directory = self.model.mask_bank, self.run_directory
            answer = tell_of_tickets(callbacks, round_, masks, bank, directory, self.args, self.state, self.control)
        return self.processes.of_first(answer)

    def _describe_run(self) -> dict[str, Any]:
        data = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        partitions = {name: self._partition_of(dataset) for name, dataset in data.items() if dataset is not None}
        return describe_run(
            self.model,
            self.args,
            self.rounds,
            num_training_samples=self._num_samples(self._require_data().partition),
            num_evaluation_samples={name: self._num_samples(partition) for name, partition in partitions.items()},
        )

    def _num_samples(self, partition: Partition) -> dict[str, int]:
        return dict(zip(self.model.route_names, partition.counts.tolist(), strict=True))

    def create_model_card(
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | None = None,
        dataset_args: str | None = None,
        *,
        remote: bytes | None = None,
        **given: Any,
    ) -> None:
        """
        Writes the card of `final/`, with a picture beside it; see [`write_card`]. `train()` does so at its end.

        Args:
            finetuned_from, tasks, dataset_tags, dataset, dataset_args: `Trainer`'s names for `base_model`,
                `pipeline_tag`, `datasets`, `dataset_name` and `dataset_config`.
            remote: as of [`write_card`].
            language, license, tags, model_name, **given: fields of [`RTLCardData`]; kept in `card_data`.

        Raises:
            TypeError: an unknown field, or a value of another type.
            ValueError: the run has not ended.
        """
        named = {
            "language": language,
            "license": license,
            "tags": tags or self.model.model_tags,
            "model_name": model_name,
            "base_model": finetuned_from,
            "pipeline_tag": tasks,
            "datasets": dataset_tags,
            "dataset_name": dataset,
            "dataset_config": dataset_args,
        }
        given = {name: value for name, value in {**named, **given}.items() if value is not None}
        self.card_data = self.card_data.updated(given)
        if self.is_world_process_zero():
            write_card(self._final_folder(), remote=remote, **self.card_data.given())

    def _final_folder(self) -> Path:
        folder = self.run_directory.final_folder
        if not (folder / "config.json").exists():
            raise ValueError(f"{self.args.output_dir!r} has no final model yet; run `train()` to its end first.")
        return folder

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
            with Lifeline(self.args.process_index, self.args.world_size), self._explained_failures():
                self._finish_round(replace(original, name=name), masks, theta0, plan, {})
                return self.rounds[0]
        finally:
            self.rounds, self._steps_before, self._log_before = before
            self._round = None
            self.progress.finish()

    def _open_run(self, plan: Plan, initial: dict[str, Tensor]) -> None:
        """Starts or continues the run on disk, once it is sure that all processes mean the same run."""
        data = self._require_data()
        model = self.model.config.to_dict()
        for name in _NOT_OF_A_RUN:
            model.pop(name, None)
        routes = hash_tensors({"route_ids": torch.from_numpy(data.partition.route_ids)})
        inputs = {"initial_weights": hash_tensors(initial), "route_ids": routes, "seed": data.seed}
        inputs["mixed_precision"] = self.args.mixed_precision  # `accelerate launch` can set it too
        extraction = {**self.args.values_of(EXTRACTION_FIELDS), **inputs, "ticket_task": self.model.config.ticket_task}
        extraction |= {"prunable": model["prunable"], "backbone_config": model["backbone_config"]}
        configuration = {**extraction, **self.args.values_of(RETRAINING_FIELDS), "model": model}
        modules = {"torch": torch, "transformers": transformers, "accelerate": accelerate, "timm": timm}
        around = {name: module.__version__ for name, module in modules.items()} | surroundings(self.args.device)
        around["first_batch"] = self._hash_of_first_batch(plan)
        self.processes.check_same({**configuration, **around})
        if self.processes.world_size > 1:
            folders = [self.run_directory.path, self.run_directory.extraction_path]
            self.processes.check_shared(folders, self.run_directory.owner)
        if self.processes.rank == 0:
            self.run_directory.open(configuration, extraction, around)
        self.processes.wait()

    def _hash_of_first_batch(self, plan: Plan) -> str:
        """Of what extraction begins with, after all transforms."""
        event = plan.rounds[0].first_event
        with seeded((self.args.seed, Stream.EXTRACTION), self.args.device):
            batch = next(self._extraction_batches(0, event))
        return hash_tensors({name: value for name, value in batch.items() if isinstance(value, Tensor)})

    def _theta0(self, initial: dict[str, Tensor], lifeline: Lifeline) -> dict[str, Tensor]:
        """The weights that everything starts from: the initial ones, or those after `rewind_to` dense steps."""
        file = self.run_directory.theta0_file
        if self.processes.rank == 0:
            stored = read_tensors(file)
            if not self.args.rewind_to:
                if stored is None or hash_tensors(stored) != hash_tensors(initial):
                    write_tensors(file, initial)
            elif stored is None:
                trainer = self._ticket_trainer(initial)
                with reproducible(self.args.extraction_threads):
                    trainer.train(None, self._dense_batches(), seed=(self.args.seed, Stream.REWINDING))
                write_tensors(file, dict(named_state(trainer.network)))
        lifeline.meet()
        theta0 = read_tensors(file) if self.args.rewind_to else initial
        if theta0 is None:
            raise RuntimeError(
                f"process {self.processes.rank} cannot read {str(file)!r}, which process 0 has written."
            )
        return theta0

    def push_to_hub(
        self,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        *,
        parent_commit: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        As `Trainer.push_to_hub`, of `final/` as the run left it and of nothing else, in one commit. Its model card
        keeps what was written by hand into the one on the Hub, or into the one in `final/`.

        With `args.push_to_hub`, `train()` does so at its end, for the `hub_strategy` "end" and "every_save" alike.

        Args:
            parent_commit (`str`, *optional*): as of [`RTLModel.push_to_hub`].
            **kwargs: to `create_model_card`.

        Raises:
            ValueError: the run has not ended, so there is nothing to push; or both cards were changed by hand.
            HfHubHTTPError, RuntimeError: the Hub refuses the push, or an upload, and no branch has changed then.
        """
        folder = self._final_folder()
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        if not self.is_world_process_zero():
            return None
        token = self.args.hub_token if token is None else token
        revision = self.args.hub_revision if revision is None else revision
        head = branch_head(self.hub_model_id, revision, token=token)
        card = folder / CARD
        before = card.read_bytes() if card.exists() else b""
        remote = read_card(self.hub_model_id, head, token=token)
        self.create_model_card(**{"model_id": self.hub_model_id, "remote": remote, **kwargs})
        try:
            return commit_folder(
                folder,
                self.hub_model_id,
                outdated=MODEL_FILES,
                parent_commit=parent_commit or head,
                revision=revision,
                token=token,
                commit_message=commit_message or "End of training",
                run_as_future=not blocking,
            )
        except BaseException:
            if before:  # which does not say that it was pushed
                write_bytes(card, before)
            raise

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """As `Trainer.init_hf_repo`. Raises `ValueError` where checkpoints are to be pushed, before anything is."""
        if self.args.push_to_hub and self.args.hub_strategy in ("checkpoint", "all_checkpoints"):
            raise ValueError(
                f"`hub_strategy` = {self.args.hub_strategy.value!r} is not supported: checkpoints hold pickled files, "
                "and a run continues from its whole folder only. What is pushed is the final model; use 'end'."
            )
        super().init_hf_repo(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: what is pushed is `final/` alone, when all rounds are done."""

    # Extraction

    def _extraction(self, plan: Plan, theta0: dict[str, Tensor], lifeline: Lifeline) -> Extraction:
        return Extraction(
            run_directory=self.run_directory,
            processes=self.processes,
            lifeline=lifeline,
            bank=self.model.mask_bank,
            theta0=theta0,
            make_ticket_trainer=lambda: self._ticket_trainer(theta0),
            batches=self._extraction_batches,
            inputs_of=self._inputs_of,
            num_steps=plan.extraction_steps,
            args=self.args,
            progress=self.progress,
        )

    def _dense_batches(self) -> Iterator[dict[str, Any]]:
        """Batches over all samples as if they were one route, for rewinding."""
        data = self._require_data().as_one_route()
        return islice(self._endless(data, data.sampler((Stream.REWINDING,))), self.args.rewind_to)

    def _put_masks(self, masks: Sequence[Sequence[Tensor]]) -> None:
        for route, mask in enumerate(masks):
            self.model.mask_bank[route] = mask
        self.processes.check_same({"mask_fingerprint": self.model.mask_bank.fingerprint()})
        emptied = self._emptied_layers()
        if emptied and not self._warned_of_emptied_layers and self.processes.rank == 0:
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

    # A round's joint retraining

    def _finish_round(
        self,
        round_: Round,
        masks: Sequence[Sequence[Tensor]],
        theta0: dict[str, Tensor],
        plan: Plan,
        figures: dict[str, float],
    ) -> TrainOutput:
        """Joint retraining, calibration, evaluation and saving of a round; only read back if that is done already."""
        self._round = round_
        self._put_masks(masks)
        folder = self.run_directory.path / round_.name
        report = self.processes.of_first(self.run_directory.read_report(folder) if self.processes.rank == 0 else None)
        if report is not None:
            if report["mask_fingerprint"] != self.model.mask_bank.fingerprint():
                raise ValueError(
                    f"{str(folder)!r} holds a model that was retrained with other masks; move it away, or choose "
                    "another `name`."
                )
            self.model.take_router_of(RTLConfig.from_pretrained(folder))
            self._load_from_checkpoint(str(folder))
            self.model.config.thresholds = report["thresholds"]
            self.progress.step(plan.retraining_steps)
        else:
            start = time.perf_counter()
            self._start_from(theta0)
            started_from = hash_tensors(dict(named_state(self.model.backbone)))
            output = self._retrain(folder)
            # The loss alone does not tell if the run was continued from its last step.
            if not math.isfinite(output.training_loss) or not self._is_finite():
                raise FloatingPointError(
                    f"joint retraining of {round_.name}: the loss or a weight became NaN or infinite (mean loss "
                    f"{output.training_loss}); lower `learning_rate`, or check the data."
                )
            # Training data may have random transforms: they are the same wherever the run was continued.
            with seeded((self.args.seed, Stream.RECALIBRATION, round_.index), self.args.device):
                self._recalibrate_union()
                self.model.config.thresholds = self._calibrated_thresholds()
                if self.args.router != "given":
                    fallback = self.args.router_fallback or UNION
                    self.fit_router(self.args.router, threshold=self.args.router_threshold, fallback=fallback)
            metrics = {} if self.eval_dataset is None else self.evaluate()
            if figures:
                self.log(dict(figures))
            self.save_model(str(folder), _internal_call=True)
            report = self._report(round_, metrics, output, time.perf_counter() - start)
            report |= {"started_from": started_from, **figures}
            if self.processes.rank == 0:
                report = self.run_directory.write_report(folder, report)
            report = self.processes.of_first(report)
        self.rounds.append({**report, **figures})  # a round that is read back may have been without these callbacks
        self._steps_before += report["steps"]
        self._log_before = report["log_history"]
        return TrainOutput(self._steps_before, report["train_loss"], report["metrics"])

    @torch.no_grad()
    def _is_finite(self) -> bool:
        return bool(torch.stack([parameter.isfinite().all() for parameter in self.model.parameters()]).all())

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
            "surroundings": self._card_callback.surroundings,
            "log_history": self._log_before + self.state.log_history,
        }
