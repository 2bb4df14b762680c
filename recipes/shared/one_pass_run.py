"""Tickets of units, found in one pass over a trained dense network, as the run of `recipes/prune.py`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig
from transformers.hf_argparser import HfArg
from transformers.trainer_utils import TrainOutput

from hf_rtl import RTLModel, RTLTrainer, RTLTrainingArguments, find_tickets
from hf_rtl.model_card.run_record import write_run
from hf_rtl.modeling.masking import UNION
from hf_rtl.modeling.small_ticket import used_units
from hf_rtl.training.evaluation import chance_levels
from hf_rtl.training.plan import Plan, Round
from hf_rtl.training.randomness import seeded
from hf_rtl.training.run_report import describe_run, report_round
from hf_rtl.training.training_args import EXTRACTION_FIELDS, RETRAINING_FIELDS

from .arguments import BadInput, check_same
from .controls import dense_network
from .models import model_of_round
from .one_pass import balanced
from .prepare import Prepared
from .quality import Quality


@dataclass
class OnePassArguments:
    """How tickets are found in one pass."""

    one_pass: bool = HfArg(
        default=False, help="Find tickets of whole units in one pass over a trained dense network, without training."
    )
    calibration_samples: int = HfArg(default=128, help="Samples of each route on which --one_pass chooses units.")

    def __post_init__(self) -> None:
        if self.calibration_samples < 1:
            raise ValueError(f"--calibration_samples {self.calibration_samples} must be at least 1.")

    def options(self, args: RTLTrainingArguments) -> dict[str, Any]:
        """Those of `find_tickets` that say how samples are read."""
        num_batches = math.ceil(self.calibration_samples / args.route_batch_size)
        return {"batch_size": args.route_batch_size, "num_batches": num_batches, "seed": args.seed}


@dataclass
class FoundArguments(OnePassArguments):
    """What happens to tickets that are found in one pass."""

    refit: bool = HfArg(
        default=True,
        help="With --one_pass, solve the weights that read units anew for each route, by least squares: tickets are "
        "better then, and have these weights for themselves, which takes bytes.",
    )
    retrain_tickets: bool = HfArg(
        default=False,
        help="With --one_pass, retrain the tickets jointly from the trained weights, in place of a refit.",
    )

    @property
    def retrained(self) -> bool:
        """Whether joint retraining follows, as it does after rounds."""
        return self.retrain_tickets or not self.one_pass

    def in_words(self, plan: Plan) -> dict[str, Any]:
        """How the tickets of a plan are found, for the page of the run; `None` is left out."""
        number, refit = self.calibration_samples, " and a refit" if self.refit and not self.retrained else ""
        return {
            "tickets are found": f"in one pass over {number} samples of a route{refit}" if self.one_pass else None,
            "steps of the dense network": plan.retraining_steps if self.one_pass else None,
            "steps before a prune event": None if self.one_pass else max(plan.extraction_steps),
            "steps of joint retraining": plan.retraining_steps if self.retrained else None,
        }


def calibration_data(prepared: Prepared, number: int, seed: int) -> Dataset:
    """`number` training samples of each route, as tensors of equal shapes, with the name of the route as `route`."""
    train, names = prepared.inputs.train, prepared.rows.route_names
    routes = [names[route] for route in train[prepared.rows.route_column]]
    chosen = balanced(Dataset.from_dict({"index": range(len(train)), "route": routes}), number, seed)
    # Changes of images, and hidden tokens, are the same when the run goes on.
    with seeded((seed,), torch.device("cpu")):
        batch = Quality(prepared, 1).batch([train[index] for index in chosen["index"]])
    columns = {name: value.numpy() for name, value in batch.items()}
    return Dataset.from_dict({**columns, "route": chosen["route"]})


def one_pass_arguments(
    asked: FoundArguments, args: RTLTrainingArguments, prepared: Prepared, model: RTLModel, backbone: str
) -> RTLTrainingArguments:
    """
    The arguments of a trainer whose rounds choose units of trained weights, by a single event without training.

    Raises:
        BadInput: tickets do not predict labels, or the backbone is not trained any more, and has no head for these.
    """
    if prepared.rows.ticket_task != "labels":
        raise BadInput(
            "--one_pass needs tickets that predict labels: it removes units of one trained network, which has the "
            "same labels for all routes. Name the column of the routes, --route_column NAME."
        )
    if args.max_steps < 0 and not args.num_train_epochs:
        check_trained(backbone, model)
    return replace(
        args,
        prune_granularity="neuron" if args.prune_granularity == "weight" else args.prune_granularity,
        prune_criterion="activity",
        prune_batches=asked.options(args)["num_batches"],
        prune_schedule="linear",
        prune_amount=1 - 1e-9,
        extraction_steps=0,
        rewind_to_current=True,
    )


def check_directory(asked: FoundArguments, args: RTLTrainingArguments, options: dict[str, Any]) -> None:
    """Raises `BadInput` if the folder has a run of the other kind, or tickets in one pass with other arguments."""
    folder = Path(args.output_dir)
    file = folder / "one_pass.json"
    if file.exists() != asked.one_pass and (file.exists() or (folder / "run.json").exists()):
        kind = "without" if asked.one_pass else "with"
        raise BadInput(f"--output_dir {str(folder)!r} has a run {kind} --one_pass; choose another folder.")
    if asked.one_pass and args.process_index == 0:
        own = {field.name: getattr(asked, field.name) for field in fields(FoundArguments)}
        decisive = args.select_values([*EXTRACTION_FIELDS, *RETRAINING_FIELDS])
        del decisive["prune_batches"]  # follows from the samples
        check_same(file, {**own, **options, **decisive}, kind="a run")


def check_trained(backbone: str, model: RTLModel) -> None:
    """Raises `BadInput` unless a backbone that is not trained any more has the head of the task, for these labels."""
    try:
        config = AutoConfig.from_pretrained(backbone)
    except (OSError, ValueError):
        config = None
    own = type(model.backbone).__name__
    if config is None or own not in (config.architectures or []):
        raise BadInput(
            f"--num_train_epochs 0 takes --backbone {backbone!r} as it is, but it is no trained {own}: name one, or "
            "train it."
        )
    names, labels = (list(found.id2label.values()) for found in (config, model.config))
    if names != labels and not (len(names) == len(labels) and "LABEL_0" in names):
        raise BadInput(
            f"--num_train_epochs 0 takes --backbone {backbone!r} as it is, but its labels are {', '.join(names)}, and "
            f"those of the data {', '.join(labels)}."
        )


def one_pass_run(
    trainer: RTLTrainer, prepared: Prepared, asked: FoundArguments, options: dict[str, Any]
) -> tuple[RTLTrainer, list[dict[str, Any]]]:
    """
    Trains the dense network of all routes, and finds its tickets at every sparsity. What is done is read back.

    Args:
        trainer ([`RTLTrainer`]): with the data and arguments of the run; see `one_pass_arguments`.
        prepared ([`Prepared`]): what the trainer was made of.
        asked ([`FoundArguments`]): how tickets are found.
        options (`dict`): of `from_backbone`.

    Returns:
        A trainer with the `rounds`, and the report of the dense network.
    """
    args = trainer.args
    whole = RTLTrainer(
        trainer.model,
        replace(args, prune_granularity="weight", prune_criterion="magnitude", push_to_hub=False),
        **prepared.trainer_data(),
    )
    dense = dense_network(whole, prepared.make_model, **prepared.metrics())
    network = RTLModel.from_pretrained(f"{args.output_dir}/dense/{dense[0]['folder']}").extract_ticket(0)
    names = prepared.rows.route_names

    def make_model() -> RTLModel:
        model = type(trainer.model).from_backbone(network, route_names=names, ticket_task="labels", **options)
        model._unit_layers = trainer.model._unit_layers  # of the same architecture; finding them takes seconds
        return model

    if not asked.retrain_tickets:
        found_tickets(trainer, prepared, asked, make_model)
        return trainer, dense
    retrained = RTLTrainer(make_model(), args, **prepared.trainer_data())
    retrained.card_data = trainer.card_data
    retrained.train()
    return retrained, dense


def found_tickets(
    trainer: RTLTrainer, prepared: Prepared, asked: FoundArguments, make_model: Callable[[], RTLModel]
) -> None:
    """Adds the `rounds` of tickets that are not retrained to a trainer, and writes what the rounds of a run write."""
    args, directory, reports = trainer.args, trainer.run_directory, []
    data = calibration_data(prepared, asked.calibration_samples, args.seed)
    for round_ in trainer.plan().rounds:
        folder = directory.path / round_.name
        report = directory.read_report(folder) if args.process_index == 0 else None
        report = trainer.processes.from_rank_zero(report)
        if report is None:
            found = find_tickets(
                make_model(),
                data,
                sparsity=round_.sparsity,
                route_column="route",
                granularity=args.prune_granularity,
                scope=args.prune_scope,
                round_to=args.prune_round_to,
                refit=asked.refit,
                **asked.options(args),
            )
            report = saved_round(trainer_of_found(found, replace(args, push_to_hub=False), prepared), round_, folder)
        reports.append(report)
    last = trainer_of_found(model_of_round(trainer, reports[-1]), args, prepared)
    trainer.rounds = last.rounds = reports
    last.card_data = trainer.card_data
    finish(last)


def trainer_of_found(model: RTLModel, args: RTLTrainingArguments, prepared: Prepared) -> RTLTrainer:
    """A trainer that saves and evaluates. After a refit no mask covers what reads units, so it could not prune."""
    trainer = RTLTrainer(model, replace(args, prune_granularity="weight"), **prepared.trainer_data())
    trainer.args.prune_granularity = args.prune_granularity  # for what is saved beside the model
    return trainer


def saved_round(trainer: RTLTrainer, round_: Round, folder: Path) -> dict[str, Any]:
    """The report of the tickets of a trainer's model, which are saved and evaluated."""
    args, model, directory = trainer.args, trainer.model, trainer.run_directory
    run = model.training_run or {}
    with trainer.in_round(round_, num_steps_before=0):
        trainer.recalibrate()
        if args.router != "given":
            fallback = args.router_fallback or UNION
            trainer.fit_router(args.router, threshold=args.router_threshold, fallback=fallback)
        trainer.save_model(str(folder), _internal_call=True)
        metrics = trainer.evaluate()
    (found,), layers = run["rounds"], round_.layers
    tickets = {name: model.extract_ticket(name) for name in model.route_names}
    kept = {name: sum(int(used_units(ticket, layer).sum()) for layer in layers) for name, ticket in tickets.items()}
    number = sum(layer.num_units for layer in layers)
    report = report_round(model, replace(round_, layers=()), output=TrainOutput(0, 0.0, {}), seconds=0.0) | {
        "sparsity": found["sparsity"],
        "units": {"kind": layers[0].kind, "number": number, "asked": round_.kept[-1], "kept": kept},
        "metrics": metrics,
        "log_history": [],
        "surroundings": found["surroundings"],
        "one_pass": run["one_pass"],
    }
    if trainer.is_world_process_zero():
        directory.write_report(folder, directory.mark_retrained(folder, report))
    return trainer.processes.from_rank_zero(report)


def finish(trainer: RTLTrainer) -> None:
    """Saves the last model as `final/`, with a card that says how tickets were found, and pushes it if asked to."""
    model, folder = trainer.model, trainer.run_directory.final_folder
    test = trainer.eval_dataset
    tested, training = trainer.eval_partition(test), trainer.run_data.require_training().partition
    trainer.save_model(str(folder), _internal_call=True)
    if trainer.is_world_process_zero():
        run = describe_run(
            model,
            trainer.args,
            trainer.rounds,
            training=training,
            evaluations={"": tested},
            chance={"": chance_levels(model, test, tested)},
        )
        write_run(folder, {**run, "one_pass": trainer.rounds[-1]["one_pass"]})
        trainer.create_model_card()
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
