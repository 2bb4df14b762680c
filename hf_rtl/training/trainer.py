"""`RTLTrainer`: rounds of ticket extraction and joint retraining on the Hugging Face `Trainer`."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.trainer_utils import EvalPrediction, TrainOutput, align_special_tokens

from ..data.columns import is_hf_dataset, keeping, label_column
from ..data.partition import Partition
from ..model_card.card import RTLCardData, write_card
from ..model_card.run_record import write_run
from ..modeling.files import read_tensors, write_bytes
from ..modeling.hub import CARD_FILE, MODEL_FILES, branch_head, commit_folder, read_card
from ..modeling.image_processing import savable_processor, warn_of_unfitting_processor
from ..modeling.modeling_rtl import RTLModel
from .callbacks import ModelCardCallback
from .evaluation import chance_levels
from .evaluation_identity import evaluation_sets
from .plan import Plan, make_rounds
from .processes import Heartbeat
from .progress import one_log, without_other_bars
from .prune_rule import PruneRule
from .result_table import result_table
from .rounds import Rounds, find_theta0, open_run
from .route_adding import add_route
from .route_trainer import RouteTrainer
from .run_data import RunData, check_arguments, check_trainable, predicts_single_labels
from .run_directory import RunDirectory
from .run_report import describe_run
from .ticket_trainer import named_state
from .training_args import RTLTrainingArguments


# Functions of the caller that take part in evaluation.
_EVALUATION_FUNCTIONS = ("preprocess_logits_for_metrics", "compute_loss_func", "data_collator")


logger = logging.getLogger(__name__)


class RTLTrainer(RouteTrainer):
    """
    Finds one ticket per route and retrains all tickets jointly (paper, Algorithms 1 and 2), on the `Trainer`.

    `train()` runs the rounds of `args.target_sparsity`. A round extracts every route's ticket, rewinds, retrains all
    tickets jointly over shared weights in the Trainer's own loop, evaluates, and saves a complete model; the last
    model is also in `final/`. Every round starts from the same θ0, so extraction passes on only masks. A second call,
    also in a new process, continues an interrupted run in `args.output_dir`. If the partition of the training data has
    a rule, it is written beside every model; [`load_rule`] reads it.

    Args:
        model ([`RTLModel`]): the model to train. The weights of its backbone are θ0.
        args ([`RTLTrainingArguments`]): the arguments of the run.
        train_dataset (map-style data set of dicts, *optional*): its column `args.route_column`, by default the label,
            gives the route of a sample, unless `partition` does or there is a single route (magnitude pruning).
        partition ([`Partition`], *optional*): the routes of `train_dataset`, which must be those of the model, in the
            same order. Other data sets get routes from `args.route_column`, or else from the partition's rule, which
            must then read a column.
        eval_dataset (map-style data set, or a dict of them, *optional*): evaluated completely, without resampling.
        calibration_dataset (map-style data set, *optional*): data to calibrate thresholds of membership tickets and to
            fit a router on. `args.calibration_fraction` instead holds out a part of the training data for this.
        compute_metrics (`Callable`, *optional*): replaces `hf_rtl.metrics`. For `membership` the predictions are the
            score matrix `[N, K]` and the labels the home routes `[N]`.
        **kwargs: the same as for `Trainer`, without `optimizers` and `model_init`: each round makes a fresh optimizer.

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
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        check_arguments(model, args, {**kwargs, "compute_metrics": compute_metrics})
        if train_dataset is not None:
            check_trainable(model, args)
            PruneRule.of(model, args)  # raises before anything is written
        if kwargs.get("processing_class") is not None:
            kwargs["processing_class"] = savable_processor(kwargs["processing_class"])
            warn_of_unfitting_processor(kwargs["processing_class"], model.backbone, model.backbone_class)
        run_data = RunData(
            model,
            args,
            train_dataset=train_dataset,
            partition=partition,
            eval_dataset=eval_dataset,
            calibration_dataset=calibration_dataset,
            # Collators of transformers take labels as they are.
            has_own_loss=self._has_own_loss(kwargs.get("compute_loss_func")),
            has_collator=not getattr(kwargs.get("data_collator"), "__module__", "transformers.").startswith(
                "transformers."
            ),
        )
        super().__init__(
            model,
            args,
            run_data=run_data,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            compute_metrics=compute_metrics,
            **kwargs,
        )
        self._name_labels(train_dataset)
        own = (compute_metrics, *(kwargs.get(name) for name in _EVALUATION_FUNCTIONS))
        self.has_own_evaluation = any(function is not None for function in own)
        self.run_directory = RunDirectory(args.output_dir, args.extraction_dir)
        # One report per retrained round: sparsity, folder, counts, similarity, emptied layers, metrics.
        self.rounds: list[dict[str, Any]] = []
        # Facts that only the author knows, such as `license`, for the card that `train()` writes and pushes.
        self.card_data = RTLCardData()
        self._card_callback = ModelCardCallback()
        self.add_callback(self._card_callback)
        # The weights at the first call of `train()`; later calls, also after an error, start from the same weights.
        self._initial: dict[str, Tensor] | None = None

    def _name_labels(self, dataset: Any) -> None:
        """Names the model's labels as the `ClassLabel` column of the data does, unless they have names."""
        config = self.model.config
        unnamed = {index: f"LABEL_{index}" for index in range(config.num_labels)}
        if is_hf_dataset(dataset) and predicts_single_labels(self.model) and config.id2label == unnamed:
            column = label_column(dataset)
            names = getattr(dataset.features.get(column), "names", [])
            if len(names) == config.num_labels:
                config.id2label = dict(enumerate(names))
                config.label2id = {name: index for index, name in enumerate(names)}
                self.progress.say(f"labels are named as in column {column!r}: {', '.join(names)}")

    def plan(self) -> Plan:
        """The plan of `train()`. Raises `ValueError` if sparsities and model do not fit, or data are missing."""
        data = self.run_data.require_training()
        rule, targets = PruneRule.of(self.model, self.args), self.args.target_sparsity
        accumulation = self.args.gradient_accumulation_steps
        sampler = data.sampler((), gradient_accumulation_steps=accumulation, world_size=self.args.world_size)
        retraining_steps = self.args.max_steps
        if retraining_steps < 0:
            retraining_steps = math.ceil(self.args.num_train_epochs * (len(sampler) // accumulation))
        sizes = data.partition.counts.tolist()
        return Plan(
            make_rounds(
                rule.schedule(targets),
                targets,
                retrain_every_round=self.args.retrain_every_round,
                layers=rule.layers,
            ),
            num_weights=rule.num_weights,
            route_sizes=dict(zip(self.model.route_names, sizes, strict=True)),
            extraction_steps=[self.extraction_steps(route) for route in range(self.model.num_routes)],
            retraining_steps=retraining_steps,
        )

    def train(
        self, resume_from_checkpoint: bool | None = None, *, ignore_keys_for_eval: list[str] | None = None
    ) -> TrainOutput:
        """
        Runs all rounds, starting or continuing the run in `args.output_dir`.

        Args:
            resume_from_checkpoint (`bool`, *optional*): `True` requires a run to continue. By default a run is
                continued if there is one.
            ignore_keys_for_eval (`list[str]`, *optional*): outputs of the model that evaluation leaves out of its
                predictions.

        Returns:
            `TrainOutput`: steps of all rounds, the last round's training loss, and its metrics.

        Raises:
            ValueError: the directory holds a run of another configuration, or no run to continue.
            FloatingPointError: a loss became NaN or infinite, or pruning cut a ticket's output from its input.
            OSError: a file cannot be written. Finished work is kept; the same command continues the run.
            RuntimeError, MemoryError: out of memory, or the processes of the run do not agree.
            SystemExit: another process of the run has failed, and has logged the cause.
        """
        if isinstance(resume_from_checkpoint, (str, Path)):
            raise ValueError(
                f"`resume_from_checkpoint` = {str(resume_from_checkpoint)!r} must be True or None: a run is continued "
                "as a whole, in `output_dir`."
            )
        if resume_from_checkpoint and not (self.run_directory.path / "run.json").exists():
            raise ValueError(f"`resume_from_checkpoint` is set, but {self.args.output_dir!r} holds no run.")
        plan = self.plan()
        self._ignored_keys = ignore_keys_for_eval
        self._align_tokens()
        self.model.check_savable()
        if self._initial is None:
            self._refuse_trained_model()
            state = named_state(self.model.backbone)
            self._initial = {name: tensor.detach().cpu().clone() for name, tensor in state}
            self.given_config = self.model.config.to_dict()
        beating = Heartbeat(self.args.process_index, self.args.world_size)
        try:
            logs = one_log(self.callback_handler.callbacks)
            with beating as heartbeat, self.explained_failures(), self.workers_ended(), without_other_bars(), logs:
                open_run(self, self.run_directory, plan, self._initial)
                theta0 = find_theta0(self, self.run_directory, self._initial, heartbeat)
                rounds = Rounds(self, self.run_directory, plan, theta0, self._card_callback)
                self.rounds = rounds.reports
                output = rounds.run(heartbeat)
                self._save_final()
        except KeyboardInterrupt:
            # The frames of torch would be a hundred lines, and say nothing to the user.
            raise KeyboardInterrupt(
                f"the run in {self.args.output_dir!r} was stopped. What is finished is kept: call `train()` again, or "
                "run the same command again, to go on."
            ) from None
        self._say_results()
        if self.args.push_to_hub:
            self.push_to_hub()
        return output

    def _refuse_trained_model(self) -> None:
        """Raises `ValueError` if the weights of the model are no θ0: all rounds would start from trained weights."""
        model = self.model
        is_trained = model.was_trained or int(model.mask_bank.count().min()) < model.mask_bank.num_weights
        if is_trained and not self.args.rewind_to_current:
            raise ValueError(
                "the model was trained, or holds tickets, so its weights are not the initial ones that every round "
                "starts from. Build it anew with `from_backbone`, as for the first run; or set "
                "`rewind_to_current=True` if these weights are meant as θ0 of another run."
            )

    def _say_results(self) -> None:
        """Prints a table of every route at every sparsity for each evaluation set, and where the model is."""
        for name, chance in self._chance().items() if self.progress.show else ():
            prefix = f"eval_{name}_" if name else "eval_"
            text = result_table(self.rounds, self.model.route_names, prefix=prefix, chance=chance)
            self.progress.say(f"\n{name}\n{text}" if name else f"\n{text}")
        self.progress.say(
            f"\nthe model with its {self.model.num_routes} tickets is in {str(self.run_directory.final_folder)!r}"
        )

    def _chance(self) -> dict[str, dict[str, float] | None]:
        """Name of an evaluation set -> its `chance_levels`."""
        sets = evaluation_sets(self).items()
        with keeping(self.run_data.kept_columns):
            return {name: chance_levels(self.model, data, self.eval_partition(data)) for name, data in sets}

    def _align_tokens(self) -> None:
        """Sets the tokenizer's special tokens in the model, as `Trainer` does before its first step."""
        if isinstance(self.processing_class, (PreTrainedTokenizerBase, ProcessorMixin)):
            align_special_tokens(self.model, self.processing_class)

    def _save_final(self) -> None:
        """Saves the last round's model once more, with the record of the run and a card."""
        data = self.run_data.require_training()
        self.save_model(str(self.run_directory.final_folder), _internal_call=True)
        self.model.partition_rule = data.partition.rule
        if self.is_world_process_zero():
            self.model.training_run = describe_run(
                self.model,
                self.args,
                self.rounds,
                training=data.partition,
                evaluations={name: self.eval_partition(part) for name, part in evaluation_sets(self).items()},
                chance=self._chance(),
            )
            write_run(self.run_directory.final_folder, self.model.training_run)
        try:
            self.create_model_card()
        except (LookupError, TypeError, ValueError):
            logger.exception(
                f"the model in {str(self.run_directory.final_folder)!r} is complete, but its card could not be "
                "written. `trainer.create_model_card()` and `hf-rtl card` try again."
            )

    def retrain(self, masks: Sequence[Sequence[Tensor]], *, like: str, name: str) -> dict[str, Any]:
        """
        Retrains given masks jointly after `train()`, without extraction: for controls, such as random masks.

        Args:
            masks (`Sequence[Sequence[Tensor]]`): one mask per route, each a list of `bool` tensors as in `MaskBank`.
            like (`str`): folder of the round whose batches are used again, for example `"round-01-sparsity-0.25"`.
            name (`str`): folder inside `output_dir` to save the model in.

        Returns:
            A report like those in `rounds`, but not added to them. Afterwards the model holds the given masks.

        Raises:
            ValueError: `like` is no round of the run, or `name` holds a model with other masks.
        """
        plan = self.plan()
        original = next((round_ for round_ in plan.rounds if round_.name == like), None)
        theta0 = read_tensors(self.run_directory.theta0_file)
        if original is None or theta0 is None:
            raise ValueError(
                f"`like` = {like!r} is no round of the run in {self.args.output_dir!r}; run `train()` first."
            )
        rounds = Rounds(self, self.run_directory, plan, theta0, self._card_callback)
        self.progress.start(plan.retraining_steps)
        self.progress.begin_round(name)
        try:
            beating = Heartbeat(self.args.process_index, self.args.world_size)
            with beating, self.explained_failures(), self.workers_ended():
                packed = [self.model.mask_bank.pack(mask) for mask in masks]
                rounds.finish(replace(original, name=name), packed, {})
        finally:
            self.progress.finish()
        return rounds.reports[0]

    def add_route(self, name: str, dataset: Any, *, calibration_dataset: Any = None) -> dict[str, Any]:
        """
        Finds a ticket for new data, and adds it to the model in memory as its last route.

        Everything that other tickets read is frozen: the weights in the union of their masks, and all shared
        parameters. The new ticket may read these. It trains the weights that no other ticket keeps, its row of
        statistics, and its own copies of norms, biases and head, which become private (see `make_private`). Outputs of
        the other tickets do not change by a bit. The union, route -1, includes the new ticket and keeps its
        statistics. Every training starts from the current weights, and the union's private parameters and statistics.

        The prune events of `args` lead to the last value of `target_sparsity`; then the ticket is retrained alone, for
        `num_train_epochs` or `max_steps` of single batches, and its running statistics are taken anew from
        `recalibration_batches` of them. Every process does all of it. Nothing is written: call
        `save_pretrained`, or `save_tickets(folder, [name])` for owners of the earlier model.

        Args:
            name (`str`): name of the new route.
            dataset (map-style data set of dicts): samples of this route, with the columns of `train_dataset`. For
                `membership` the negatives are samples of `train_dataset`; `labels` needs no `train_dataset`.
            calibration_dataset (map-style data set of dicts, *optional*): held-out samples of this route, if the
                trainer has a `calibration_dataset`; with `args.calibration_fraction` a part of `dataset` is held out
                instead. They are used to fit the router again, and to calibrate the threshold of a membership ticket.
                Without them the router is removed, with a warning, and the threshold is 0.

        Returns:
            A dict: `route`, the name; `kept`, the number of weights of the ticket; `added`, the number of weights that
            no other ticket keeps; `changed_decisions`, for each old route the fraction of its held-out samples that
            the new router sends elsewhere, or `None` if no router was fitted.

        Raises:
            TypeError, ValueError: the name is taken, the data do not suit, or all tickets share running statistics.
            FloatingPointError: a loss became NaN or infinite, or pruning cut the ticket's output from its input.

        These errors leave the model unchanged. An error of the new router comes after the ticket has been added.
        """
        self._align_tokens()
        self.model.check_savable()
        return add_route(self, name, dataset, calibration_dataset=calibration_dataset)

    def retraining_batches(self, round_index: int) -> Iterator[dict[str, Any]]:
        """
        The batches of a round's joint retraining, on the device, for controls that train on the same data. Each
        process of several gets whole batches.
        """
        sampler = self.retraining_sampler(round_index)
        data = self.run_data.require_training()
        # A loader of their own: the caller may read them slowly, beside other batches.
        batches = self.loaders.endless_batches(data, sampler)
        num_batches = self.plan().retraining_steps * self.args.gradient_accumulation_steps
        return (self._prepare_inputs(batch) for batch in islice(batches, num_batches))

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
        Writes the card of `final/`, with a picture beside it; see [`write_card`]. `train()` does this at its end.

        Args:
            finetuned_from, tasks, dataset_tags, dataset, dataset_args: `Trainer`'s names for `base_model`,
                `pipeline_tag`, `datasets`, `dataset_name` and `dataset_config`.
            remote: the same as for [`write_card`].
            language, license, tags, model_name, **given: fields of [`RTLCardData`], which are kept in `card_data`.

        Raises:
            TypeError: a field is unknown, or a value has a wrong type.
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
        Pushes `final/`, and no other folder, in one commit. The arguments are the same as for `Trainer.push_to_hub`.
        The model card keeps text that was written by hand on the Hub or in `final/`.

        With `args.push_to_hub`, `train()` does this at its end, whether `hub_strategy` is "end" or "every_save".

        Args:
            parent_commit (`str`, *optional*): the same as for [`RTLModel.push_to_hub`].
            **kwargs: arguments of `create_model_card`.

        Raises:
            ValueError: the run has not ended, so there is nothing to push; or both cards were changed by hand.
            HfHubHTTPError, RuntimeError: the Hub refuses the push or an upload. No branch has changed.
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
        card = folder / CARD_FILE
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
            if before:  # the earlier card does not claim a push
                write_bytes(card, before)
            raise

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """The same as in `Trainer`. Raises `ValueError` if `hub_strategy` pushes checkpoints, before any push."""
        if self.args.push_to_hub and self.args.hub_strategy in ("checkpoint", "all_checkpoints"):
            raise ValueError(
                f"`hub_strategy` = {self.args.hub_strategy.value!r} is not supported: checkpoints hold pickled files, "
                "and a run continues from its whole folder only. To push the final model, use 'end'."
            )
        super().init_hf_repo(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Does nothing: only `final/` is pushed, after all rounds."""
