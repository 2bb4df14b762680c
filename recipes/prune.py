"""
Find one ticket per class, or per group of classes, of an image classification data set, or per domain of a text
classification data set.

    python recipes/prune.py --config recipes/configs/digits.yaml
    python recipes/prune.py --config recipes/configs/cifar10.yaml --target_sparsity 0.5 --seed 1
    python recipes/prune.py --config recipes/configs/sentiment.yaml --dataset FOLDER --backbone FOLDER
    accelerate launch --config_file recipes/accelerate/multi_gpu.yaml recipes/prune.py --config FILE
    python -m torch.distributed.run --nproc_per_node 2 recipes/prune.py --config FILE --use_cpu

Prints the plan, then a progress bar, then a table; writes `results.json` and `curve.png` into --output_dir, with one
complete model per round beside them. A run that was interrupted continues when the same command is given again.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from hf_rtl import (
    Partition,
    RTLModelForImageClassification,
    RTLModelForSequenceClassification,
    RTLTrainer,
    RTLTrainingArguments,
)
from shared import controls as sanity
from shared import single_mask
from shared.arguments import parse, set_up
from shared.data_arguments import DataArguments
from shared.image_data import load_images
from shared.report import plan_text, plot, routes_rows, row, table, write_results
from shared.text_data import load_text


@dataclass
class ModelArguments:
    """Which backbone, and what its tickets are."""

    backbone: str = field(default="ghostnet_rtl", metadata={"help": "A timm name, a repo id or a folder."})
    norm_statistics: str = field(
        default="per_route",
        metadata={"help": "Running statistics of normalisation: per_route, or shared (the paper's)."},
    )
    prune_include: list[str] = field(default_factory=list, metadata={"help": "Patterns of further weights to prune."})
    prune_exclude: list[str] | None = field(default=None, metadata={"help": "Patterns of weights never to prune."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads; by default torch decides."})
    dense: bool = field(
        default=True,
        metadata={"help": "Also train a dense model on as much data: what any table of tickets is compared with."},
    )
    sanity: bool = field(
        default=False,
        metadata={
            "help": "Also, of images: random and layer-shuffled masks, routes shifted by one, and a dense one-vs-rest "
            "model; of texts: the other router, a single mask for all data, and a dense model."
        },
    )


def prepare_images(data: DataArguments, args: RTLTrainingArguments) -> tuple:
    """Training and test data, no processor, and what makes a model whose tickets tell the images of a class."""
    train, test = load_images(data, seed=args.seed)
    make_model = partial(
        RTLModelForImageClassification.from_backbone,
        route_names=train.label_names,
        ticket_task="membership",
        in_chans=data.num_channels,
    )
    return train, test, None, make_model


def prepare_texts(data: DataArguments, args: RTLTrainingArguments, backbone: str) -> tuple:
    """Training and test data, their tokenizer, and what makes a model whose tickets label the texts of a domain."""
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    train, test = load_text(data, tokenizer, route_column=args.route_column, seed=args.seed)
    label_names = train.features["label"].names
    make_model = partial(
        RTLModelForSequenceClassification.from_backbone,
        route_names=train.features[args.route_column].names,
        ticket_task="labels",
        id2label=dict(enumerate(label_names)),
        label2id={name: label for label, name in enumerate(label_names)},
    )
    return train, test, tokenizer, make_model


def main() -> None:
    model_arguments, data, args = parse((ModelArguments, DataArguments, RTLTrainingArguments), description=__doc__)
    set_up(model_arguments.threads)
    partition = None
    if data.text_column is None:
        train, test, processor, make_model = prepare_images(data, args)
        if train.rule is not None:
            # The labels are the groups already, here and in the test data; the rule is for data with classes.
            partition = Partition(train.labels.numpy(), train.label_names, rule=train.rule)
            args.route_column = "label"
    else:
        train, test, processor, make_model = prepare_texts(data, args, model_arguments.backbone)
    make_model = partial(
        make_model,
        model_arguments.backbone,
        seed=args.seed,
        norm_statistics=model_arguments.norm_statistics,
        prune_include=model_arguments.prune_include,
        prune_exclude=model_arguments.prune_exclude,
    )
    trainer = RTLTrainer(
        make_model(), args, train_dataset=train, partition=partition, eval_dataset=test, processing_class=processor
    )
    trainer.card_data = trainer.card_data.updated(data.on_card())
    main_process = trainer.is_world_process_zero()
    if main_process:
        text = plan_text(trainer.plan(), batch_size=args.route_batch_size, num_processes=args.world_size)
        print(text, flush=True)
    trainer.train()
    rows = [row("RTL", report["sparsity"], report) for report in trainer.rounds]
    # Before the controls, which train and evaluate with the same trainer.
    reports = list(trainer.rounds)
    extra: list[dict[str, Any]] = []
    if data.text_column is not None and (model_arguments.sanity or model_arguments.dense):
        compare = single_mask.baselines if model_arguments.sanity else single_mask.dense
        extra = compare(trainer, make_model, train, test)
    elif model_arguments.sanity:
        extra = sanity.controls(trainer, train, test, model_arguments.backbone, data)
    elif model_arguments.dense:
        extra = [sanity.dense(trainer, test, model_arguments.backbone, data)]
    rows += [row(control["method"], control["sparsity"], control) for control in extra]
    if not main_process:
        return
    output_dir = Path(args.output_dir)
    # Not in the models' folders, which are pushed: it may name a place on this machine.
    data.save(output_dir)
    print(table(rows))
    of_routes = routes_rows([{"method": "RTL", **report} for report in reports] + extra)
    if of_routes:
        print("\nAccuracy of every route", table(of_routes), sep="\n")
    for report in reports:
        report.pop("log_history", None)
    for control in extra:
        control.pop("log_history", None)
    write_results(
        output_dir / "results.json",
        data=asdict(data),
        model=asdict(model_arguments),
        training={name: value for name, value in args.to_dict().items() if not name.endswith("_dir")},
        num_processes=args.world_size,
        num_test=len(test),
        rounds=reports,
        controls=extra,
        table=rows,
        routes=of_routes,
    )
    if find_spec("matplotlib"):
        plot(output_dir / "curve.png", rows, {report["sparsity"]: report["mean_similarity"] for report in reports})


if __name__ == "__main__":
    main()
