"""
Find one ticket per class, or per group of classes, of an image classification data set, or per domain of a text
classification data set.

    python recipes/prune.py --config recipes/configs/digits.yaml
    python recipes/prune.py --config recipes/configs/cifar10.yaml --target_sparsity 0.5 --seed 1
    python recipes/prune.py --config recipes/configs/sentiment.yaml --dataset FOLDER --backbone FOLDER
    accelerate launch --config_file recipes/accelerate/multi_gpu.yaml recipes/prune.py --config FILE
    python -m torch.distributed.run --nproc_per_node 2 recipes/prune.py --config FILE --use_cpu

The command prints the plan, a progress bar and a table. It writes `results.json`, `curve.png` and a complete model per
round into --output_dir. Run the same command again to continue an interrupted run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.hf_argparser import HfArg

from hf_rtl import Partition, RTLModel, RTLModelForSequenceClassification, RTLTrainer, RTLTrainingArguments
from shared.arguments import parse, run_main, set_up
from shared.controls import dense_image_network, dense_text_network, image_controls, text_controls
from shared.data_arguments import DataArguments
from shared.image_data import load_images
from shared.models import membership_model
from shared.report import plan_text, routes_rows, row, table, training_record, write_results
from shared.text_data import load_text


@dataclass
class ModelArguments:
    """The backbone, and what tickets mask and share."""

    backbone: str = HfArg(default="ghostnet_rtl", help="A timm name, a repo id or a folder.")
    norm_statistics: str = HfArg(
        default="per_route", help="Running statistics of normalisation: per_route, or shared (the paper's)."
    )
    prune_include: list[str] = HfArg(default_factory=list, help="Patterns of more weights to prune.")
    prune_exclude: list[str] | None = HfArg(default=None, help="Patterns of weights never to prune.")
    threads: int | None = HfArg(default=None, help="CPU threads; by default torch decides.")
    dense: bool = HfArg(
        default=True, help="Also train a dense model on equally many samples, to compare the tickets with."
    )
    sanity: bool = HfArg(
        default=False,
        help="Also run the controls. For images: random and layer-shuffled masks, routes shifted by one, and a "
        "dense one-vs-rest model. For texts: the other router, a single mask for all data, and a dense model.",
    )


@dataclass
class Task:
    """
    The data and the model of a run, and the baselines of its tickets.

    Args:
        data (`dict`): the arguments of the trainer for its data.
        make_model (`Callable`): makes a model for these data, with the same initial weights at every call.
        controls (`Callable`): makes the reports of the controls of --sanity from a trainer after its run.
        dense (`Callable`): makes the report of a dense model alone from a trainer after its run.
    """

    data: dict[str, Any]
    make_model: Callable[..., RTLModel]
    controls: Callable[[RTLTrainer], list[dict[str, Any]]]
    dense: Callable[[RTLTrainer], list[dict[str, Any]]]


def main() -> None:
    model_arguments, data, args = parse((ModelArguments, DataArguments, RTLTrainingArguments), description=__doc__)
    set_up(model_arguments.threads)
    prepare = prepare_images if data.text_column is None else prepare_texts
    task = prepare(model_arguments, data, args)
    trainer = RTLTrainer(task.make_model(), args, **task.data)
    trainer.card_data = trainer.card_data.updated(data.on_card())
    main_process = trainer.is_world_process_zero()
    if main_process:
        text = plan_text(trainer.plan(), batch_size=args.route_batch_size, num_processes=args.world_size)
        print(text, flush=True)
    trainer.train()
    # A copy, since the controls train and evaluate with the same trainer.
    rounds = list(trainer.rounds)
    controls: list[dict[str, Any]] = []
    if model_arguments.sanity:
        controls = task.controls(trainer)
    elif model_arguments.dense:
        controls = task.dense(trainer)
    if main_process:
        # Not in the folders of models, since these are pushed and the file may name a folder of this machine.
        data.save(args.output_dir)
        report(trainer, rounds, controls, model_arguments, data)


def prepare_images(model: ModelArguments, data: DataArguments, args: RTLTrainingArguments) -> Task:
    """The task of images: a ticket per class or group of classes, which tells its images from all others."""
    train, test = load_images(data, seed=args.seed)
    partition = None
    if train.rule is not None:
        # The labels of `train` and `test` are already the groups; the rule assigns new data, which have classes.
        partition = Partition(train.labels.numpy(), train.label_names, rule=train.rule)
        args.route_column = "label"
    make_model = partial(membership_model, model.backbone, train, **model_options(model, args))
    return Task(
        {"train_dataset": train, "eval_dataset": test, "partition": partition},
        make_model,
        controls=partial(image_controls, backbone=model.backbone),
        dense=partial(dense_image_network, backbone=model.backbone),
    )


def prepare_texts(model: ModelArguments, data: DataArguments, args: RTLTrainingArguments) -> Task:
    """The task of texts: a ticket per domain, which classifies the texts of its domain."""
    tokenizer = AutoTokenizer.from_pretrained(model.backbone)
    train, test = load_text(data, tokenizer, route_column=args.route_column, seed=args.seed)
    label_names = train.features["label"].names
    make_model = partial(
        RTLModelForSequenceClassification.from_backbone,
        model.backbone,
        route_names=train.features[args.route_column].names,
        ticket_task="labels",
        id2label=dict(enumerate(label_names)),
        label2id={name: label for label, name in enumerate(label_names)},
        **model_options(model, args),
    )
    return Task(
        {"train_dataset": train, "eval_dataset": test, "processing_class": tokenizer},
        make_model,
        controls=partial(text_controls, make_model=make_model),
        dense=partial(dense_text_network, make_model=make_model),
    )


def model_options(model: ModelArguments, args: RTLTrainingArguments) -> dict[str, Any]:
    """The options of the command line that models of images and of texts share."""
    return {
        "seed": args.seed,
        "norm_statistics": model.norm_statistics,
        "prune_include": model.prune_include,
        "prune_exclude": model.prune_exclude,
    }


def report(
    trainer: RTLTrainer, rounds: list[dict], controls: list[dict], model: ModelArguments, data: DataArguments
) -> None:
    """Prints the tables, and writes `results.json` and `curve.png`."""
    args, output_dir = trainer.args, Path(trainer.args.output_dir)
    rows = [row("RTL", found["sparsity"], found) for found in rounds]
    rows += [row(control["method"], control["sparsity"], control) for control in controls]
    print(table(rows))
    by_route = routes_rows([{"method": "RTL", **found} for found in rounds] + controls)
    if by_route:
        print("\nAccuracy of every route", table(by_route), sep="\n")
    for found in rounds + controls:
        found.pop("log_history", None)
    write_results(
        output_dir / "results.json",
        data=asdict(data),
        model=asdict(model),
        training=training_record(args),
        num_processes=args.world_size,
        num_test=len(trainer.eval_dataset),
        rounds=rounds,
        controls=controls,
        table=rows,
        routes=by_route,
    )
    if find_spec("matplotlib"):
        from shared.plots import draw_rounds

        similarities = {found["sparsity"]: found["mean_similarity"] for found in rounds}
        draw_rounds(rows, similarities, output_dir / "curve.png")


if __name__ == "__main__":
    run_main(main)
