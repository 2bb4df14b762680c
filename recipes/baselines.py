"""
Tickets against single masks on the same data: which class is it, when nobody tells the route?

    python recipes/baselines.py --config recipes/configs/cifar10_baselines.yaml
    python recipes/baselines.py --config recipes/configs/digits.yaml --seeds 0 --methods shared "IMP single"

The methods, each for every seed and sparsity:

- `shared`: the paper's, membership tickets with shared statistics;
- `per route`: with statistics of their own, and a router that compares calibrated scores;
- `competing`: those, and in the last --competing_epochs all tickets compete for the same samples;
- `IMP single`: one mask for all classes at the tickets' density, in a network with a logit per class;
- `IMP single, union`: the same at the density of the union of the tickets that `per route` finds.

All start from the same initial weights, and retraining sees equally many samples, counted each time that one passes
through a network. Extraction is shared by the three kinds of tickets. Prints a table of means and standard deviations
over the seeds, and writes it with all reports into `results.json` in --output_dir. Given again, the command continues
where it was interrupted.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
import transformers
from arguments import parse
from data_arguments import DataArguments
from image_data import ImageTensors, channels_last, load_images
from report import table, write_results
from torch.utils.flop_counter import FlopCounterMode
from transformers.trainer_utils import EvalPrediction

from hf_rtl import RTLModelForImageClassification, RTLTrainer, RTLTrainingArguments
from hf_rtl.metrics import precision_at_recall


# Tickets -> their normalisation statistics.
TICKETS = {"shared": "shared", "per route": "per_route", "competing": "per_route"}
SINGLE, SINGLE_UNION = "IMP single", "IMP single, union"
METHODS = [*TICKETS, SINGLE, SINGLE_UNION]
# Column title -> key in the metrics.
MEASURED = {
    "K-way acc.": "eval_accuracy",
    "calibrated acc.": "eval_route_accuracy",
    "prec. at recall .8": "eval_precision_at_recall_80",
    "calibrated prec. at recall .8": "eval_routed_precision_at_recall_80",
}


@dataclass
class ComparisonArguments:
    """What is compared."""

    backbone: str = field(default="ghostnet_rtl", metadata={"help": "A timm name, a repo id or a folder."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Of weights, data and batches."})
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "Some of the above."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads; by default torch decides."})


class OneRoute(ImageTensors):
    """The same images, all of the route `all`; their class is the label that its ticket predicts."""

    column_names = ["pixel_values", "label", "route"]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return [{**sample, "route": "all"} for sample in super().__getitems__(indices)]


def main() -> None:
    comparison, data, args = parse((ComparisonArguments, DataArguments, RTLTrainingArguments), description=__doc__)
    unknown = [method for method in comparison.methods if method not in METHODS]
    if unknown:
        raise SystemExit(f"--methods has {unknown[0]!r}; allowed are {', '.join(map(repr, METHODS))}.")
    transformers.utils.logging.disable_progress_bar()
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    if comparison.threads is not None:
        torch.set_num_threads(comparison.threads)
    lines = [line for seed in comparison.seeds for line in of_seed(comparison, data, args, seed)]
    summary = summarise(lines)
    print(table(summary))
    write_results(
        Path(args.output_dir) / "results.json",
        data={**asdict(data), "dataset": Path(data.dataset).name},
        comparison=asdict(comparison),
        training={name: value for name, value in args.to_dict().items() if not name.endswith("_dir")},
        figures=summary,
        runs=lines,
    )


def of_seed(
    comparison: ComparisonArguments, data: DataArguments, args: RTLTrainingArguments, seed: int
) -> Iterator[dict[str, Any]]:
    """A line of results for every method and sparsity, of the runs below `output_dir/seed-N`."""
    folder = Path(args.output_dir) / f"seed-{seed}"
    splits = load_images(data, seed=seed)
    num_classes = len(splits[0].label_names)
    args = replace(args, seed=seed, router="score", extraction_dir=str(folder / "extraction"))
    methods = [
        method
        for method in METHODS
        if method in comparison.methods or (method == "per route" and SINGLE_UNION in comparison.methods)
    ]
    unions: list[float] = []
    for method in methods:
        own = {"output_dir": str(folder / method.replace(",", "").replace(" ", "-"))}
        if method in TICKETS:
            competing = args.competing_epochs if method == "competing" else 0
            trainer = tickets(comparison, splits, replace(args, **own, competing_epochs=competing), TICKETS[method])
        else:
            own |= {"router": "given", "competing_epochs": 0, "extraction_dir": None, "route_column": "route"}
            own |= {"target_sparsity": unions if method == SINGLE_UNION else args.target_sparsity}
            planned = tickets(comparison, splits, replace(args, output_dir=own["output_dir"]), "shared").plan()
            trainer = single(comparison, splits, replace(args, **own, max_steps=planned.retraining_steps))
        trainer.train()
        if method == "per route":
            unions = [1 - report["union"] / trainer.model.mask_bank.num_weights for report in trainer.rounds]
        if method in comparison.methods:
            yield from report_lines(method, seed, trainer, args.target_sparsity, num_classes)


def tickets(
    comparison: ComparisonArguments,
    splits: tuple[ImageTensors, ImageTensors],
    args: RTLTrainingArguments,
    norm_statistics: str,
) -> RTLTrainer:
    """One membership ticket per class."""
    train, test = splits
    model = RTLModelForImageClassification.from_backbone(
        comparison.backbone,
        route_names=train.label_names,
        ticket_task="membership",
        seed=args.seed,
        norm_statistics=norm_statistics,
        in_chans=train.images.shape[1],
    )
    return RTLTrainer(model, args, data_collator=channels_last, train_dataset=train, eval_dataset=test)


def single(
    comparison: ComparisonArguments, splits: tuple[ImageTensors, ImageTensors], args: RTLTrainingArguments
) -> RTLTrainer:
    """Iterative magnitude pruning of one network for all classes: the same trainer, with a single route."""
    train, test = (
        OneRoute(split.images, split.labels, split.label_names, mean=split.mean, std=split.std) for split in splits
    )
    model = RTLModelForImageClassification.from_backbone(
        comparison.backbone,
        route_names=["all"],
        ticket_task="labels",
        num_labels=len(train.label_names),
        seed=args.seed,
        in_chans=train.images.shape[1],
    )
    return RTLTrainer(
        model, args, data_collator=channels_last, train_dataset=train, eval_dataset=test, compute_metrics=of_logits
    )


def of_logits(prediction: EvalPrediction) -> dict[str, float]:
    """Of a network with a logit per class what the tables show of tickets."""
    logits, labels = torch.from_numpy(prediction.predictions).double(), prediction.label_ids
    scores = logits.log_softmax(dim=1).numpy()
    precisions = [precision_at_recall(scores[:, label], labels == label) for label in range(scores.shape[1])]
    return {
        "accuracy": float((scores.argmax(axis=1) == labels).mean()),
        "precision_at_recall_80": float(np.mean(precisions)),
    }


def report_lines(
    method: str, seed: int, trainer: RTLTrainer, at: Sequence[float], num_classes: int
) -> Iterator[dict[str, Any]]:
    """A line for every round. `at`: the sparsity of the tickets that it is to be compared with."""
    plan, model = trainer.plan(), trainer.model
    num_forwards = num_classes if method in TICKETS else 1
    flops = num_forwards * forward_flops(trainer)
    events = 0
    for report, round_, tickets_at in zip(trainer.rounds, plan.rounds, at, strict=True):
        events += len(round_.kept)
        yield {
            "method": method,
            "at": tickets_at,
            "seed": seed,
            **{title: report["metrics"].get(key) for title, key in MEASURED.items()},
            "density": next(iter(report["kept"].values())) / model.mask_bank.num_weights,
            "union": report["union"],
            "bytes": report["footprint"]["total_bytes"],
            "samples in extraction": events * sum(plan.extraction_steps) * trainer.args.route_batch_size,
            "samples in retraining": plan.retraining_steps * trainer.args.route_batch_size,
            "MFLOPs an image": flops / 1e6,
            "emptied layers": max(map(len, report["emptied_layers"].values()), default=0),
            "minutes of retraining": report["seconds"] / 60,
        }


@torch.no_grad()
def forward_flops(trainer: RTLTrainer) -> int:
    """Floating point operations of one dense forward for one image; zeros in the weights save none."""
    pixel_values = trainer.eval_dataset[0]["pixel_values"][None].to(trainer.args.device)
    with FlopCounterMode(display=False) as counter:
        trainer.model.eval()(pixel_values=pixel_values, route_ids=0)
    return counter.get_total_flops()


def summarise(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the seeds, of what is measured with the sample standard deviation: a line per method and sparsity."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["method"], line["at"]), []).append(line)
    summary = []
    for (method, at), group in sorted(groups.items(), key=lambda item: (item[0][1], METHODS.index(item[0][0]))):
        columns: dict[str, Any] = {"method": method, "sparsity": at, "seeds": len(group)}
        for title in group[0]:
            values = [line[title] for line in group]
            if title in ("method", "at", "seed") or None in values:
                continue
            spread = f" ± {stdev(values):.3f}" if title in MEASURED and len(values) > 1 else ""
            columns[title] = f"{mean(values):.3f}{spread}" if title in MEASURED else round(mean(values), 3)
        summary.append(columns)
    return summary


if __name__ == "__main__":
    main()
