"""
Tickets against what they must be compared with, on the same data: which class is it, when nobody tells the route?

    python recipes/baselines.py --config recipes/configs/cifar10_baselines.yaml
    python recipes/baselines.py --config recipes/configs/digits.yaml --seeds 0 --methods shared "IMP single"

The methods, each for every seed and sparsity:

- `dense`: one network for all classes, a logit per class, not pruned;
- `IMP single`: the same with one mask, of the tickets' density, by iterative magnitude pruning;
- `IMP single, union`: with one mask of the density that the union of the tickets of `per route` has;
- `one-vs-rest`: the masks of `IMP single`; a logit per class, each trained on balanced batches as tickets are;
- `IMP multiple`: a network per class that shares nothing, under the mask of the class's ticket, on its batches;
- `random masks`, `layer-shuffled masks`: in the place of the tickets of `per route`, of the same densities;
- `shared`: the paper's, membership tickets with shared statistics;
- `per route`: with statistics of their own, and a router that compares calibrated scores;
- `competing`: those, and in the last --competing_epochs all tickets compete for the same samples.

All start from the same initial weights, and retraining sees equally many samples, counted each time that one passes
through a network. Extraction is shared by all kinds of tickets. Prints tables of means and standard deviations over
the seeds, writes them with all reports into `results.json` in --output_dir, and draws `curves.png`. Given again, the
command continues where it was interrupted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.trainer_utils import EvalPrediction

from hf_rtl import RTLModelForImageClassification, RTLTrainer, RTLTrainingArguments
from hf_rtl.metrics import membership_metrics
from hf_rtl.modeling.files import write_json
from shared.arguments import chosen_methods, parse, set_up
from shared.controls import CONTROL_MASKS, independent_models, model_of_round, one_vs_rest, with_other_masks
from shared.data_arguments import DataArguments
from shared.image_data import channels_last, load_images
from shared.report import over_seeds, plot_methods, row, table, write_results


DENSE, SINGLE, SINGLE_UNION = "dense", "IMP single", "IMP single, union"
ONE_VS_REST, MULTIPLE = "one-vs-rest", "IMP multiple"
# Tickets -> their normalisation statistics.
TICKETS = {"shared": "shared", "per route": "per_route", "competing": "per_route"}
METHODS = [DENSE, SINGLE, SINGLE_UNION, ONE_VS_REST, MULTIPLE, *CONTROL_MASKS, *TICKETS]
# What a decision for the highest score changes: with a logit per class it is never "none of them", nor two.
DECIDED = ("balanced_accuracy", "precision", "recall", "f1", "worst_balanced_accuracy")


# Columns that need no threshold, and those of what was spent; the others are of decisions. Whether pruning has cut a
# network is said in all tables.
RANKING = ("K-way acc.", "router: K-way acc.", "prec. at recall .8", "router: prec. at recall .8", "AUROC")
CUT = ("emptied layers", "constant tickets")
COSTS = (
    *("union", "bytes", "trainings", "samples in extraction", "samples in retraining", "kFLOPs an image"),
    "minutes of retraining",
)


@dataclass
class ComparisonArguments:
    """What is compared."""

    backbone: str = field(default="ghostnet_rtl", metadata={"help": "A timm name, a repo id or a folder."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Of weights, data and batches."})
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "Some of the above."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads; by default torch decides."})


def main() -> None:
    comparison, data, args = parse((ComparisonArguments, DataArguments, RTLTrainingArguments), description=__doc__)
    methods = chosen_methods(comparison.methods, METHODS)
    set_up(comparison.threads)
    runs = []
    for number in comparison.seeds:
        seed = Seed(comparison, data, args, number)
        runs.append([(method, report) for method in methods for report in seed.reports(method)])
    lines_of_seeds = [[line_of(method, report) for method, report in run] for run in runs]
    tables = split(over_seeds(lines_of_seeds))
    for lines in tables.values():
        print(table(lines), end="\n\n")
    pictures = []
    if find_spec("matplotlib"):
        pictures.append("curves.png")
        plot_methods(Path(args.output_dir) / pictures[0], lines_of_seeds, ["bal. acc.", "K-way acc.", "AUROC"])
    write_results(
        Path(args.output_dir) / "results.json",
        pictures=pictures,
        data={**asdict(data), "dataset": Path(data.dataset).name},
        comparison=asdict(comparison),
        training={name: value for name, value in args.to_dict().items() if not name.endswith("_dir")},
        **tables,
        runs={
            number: [{"method": method, **report} for method, report in run]
            for number, run in zip(comparison.seeds, runs, strict=True)
        },
    )


class Seed:
    """The runs of one seed, below `output_dir/seed-N`, each trained when it is first asked for."""

    def __init__(
        self, comparison: ComparisonArguments, data: DataArguments, args: RTLTrainingArguments, seed: int
    ) -> None:
        self.backbone, self.data = comparison.backbone, data
        self.folder = Path(args.output_dir) / f"seed-{seed}"
        self.args = replace(args, seed=seed, router="score", extraction_dir=str(self.folder / "extraction"))
        self.train, self.test = load_images(data, seed=seed)

    def reports(self, method: str) -> Iterator[dict[str, Any]]:
        """Of every round of a method, with `at`, the sparsity of the tickets that it is to be compared with."""
        if method == DENSE:
            yield from self._of_trainer(self._single(method, [0.0]), [0.0])
        elif method == SINGLE:
            yield from self._of_trainer(self.imp_single, self.args.target_sparsity)
        elif method == SINGLE_UNION:
            weights = self.per_route.model.mask_bank.num_weights
            sparsities = [1 - report["union"] / weights for report in self.per_route.rounds]
            yield from self._of_trainer(self._single(method, sparsities), self.args.target_sparsity)
        elif method == "per route":
            yield from self._of_trainer(self.per_route, self.args.target_sparsity)
        elif method in TICKETS:
            yield from self._of_trainer(self._tickets(method), self.args.target_sparsity)
        else:
            for index, report in enumerate(self.per_route.rounds):
                yield self._of_round(method, index, report)

    @cached_property
    def per_route(self) -> RTLTrainer:
        return self._tickets("per route")

    @cached_property
    def imp_single(self) -> RTLTrainer:
        return self._single(SINGLE, self.args.target_sparsity)

    def _arguments(self, method: str, **changed: Any) -> RTLTrainingArguments:
        folder = self.folder / method.replace(",", "").replace(" ", "-")
        return replace(self.args, output_dir=str(folder), **changed)

    def _tickets(self, method: str) -> RTLTrainer:
        """One membership ticket per class."""
        competing = self.args.competing_epochs if method == "competing" else 0
        trainer = self._ticket_trainer(self._arguments(method, competing_epochs=competing), TICKETS[method])
        trainer.train()
        return trainer

    def _ticket_trainer(self, args: RTLTrainingArguments, norm_statistics: str) -> RTLTrainer:
        model = RTLModelForImageClassification.from_backbone(
            self.backbone,
            route_names=self.train.label_names,
            ticket_task="membership",
            seed=args.seed,
            norm_statistics=norm_statistics,
            in_chans=self.train.images.shape[1],
        )
        data = {"train_dataset": self.train, "eval_dataset": self.test, "data_collator": channels_last}
        return RTLTrainer(model, args, **data)

    def _single(self, method: str, sparsities: Sequence[float]) -> RTLTrainer:
        """Iterative magnitude pruning of one network for all classes: the same trainer, with a single route."""
        changed = {"router": "given", "competing_epochs": 0, "extraction_dir": None}
        args = self._arguments(method, **changed, target_sparsity=list(sparsities))
        steps = self._ticket_trainer(replace(self.args, competing_epochs=0), "shared").plan().retraining_steps
        model = RTLModelForImageClassification.from_backbone(
            self.backbone,
            route_names=["all"],
            ticket_task="labels",
            num_labels=len(self.train.label_names),
            seed=args.seed,
            in_chans=self.train.images.shape[1],
        )
        trainer = RTLTrainer(
            model,
            replace(args, max_steps=steps),
            data_collator=channels_last,
            train_dataset=self.train,
            eval_dataset=self.test,
            compute_metrics=lambda prediction: of_logits(prediction, self.train.label_names),
        )
        trainer.train()
        return trainer

    def _of_trainer(self, trainer: RTLTrainer, at: Sequence[float]) -> Iterator[dict[str, Any]]:
        """The reports of a run, with what was spent until the end of each round."""
        plan = trainer.plan()
        num_routes, events = trainer.model.num_routes, 0
        for report, round_, tickets_at in zip(trainer.rounds, plan.rounds, at, strict=True):
            events += len(round_.kept)
            yield {
                **{name: value for name, value in report.items() if name != "log_history"},
                "at": tickets_at,
                "costs": {
                    "trainings": events * num_routes + 1,
                    "samples in extraction": events * sum(plan.extraction_steps) * self.args.route_batch_size,
                    "samples in retraining": plan.retraining_steps * self.args.route_batch_size,
                    "kFLOPs an image": round(num_routes * forward_flops(trainer) / 1e3),
                    "minutes of retraining": report["seconds"] / 60,
                },
            }

    def _of_round(self, method: str, index: int, report: dict[str, Any]) -> dict[str, Any]:
        """The report of what takes the place of the tickets of a round."""
        trainer, at = self.per_route, self.args.target_sparsity[index]
        tickets_model = model_of_round(trainer, report)
        tickets = [tickets_model.mask_bank[route] for route in range(tickets_model.num_routes)]
        of_tickets = list(self._of_trainer(trainer, self.args.target_sparsity))[index]
        if method in CONTROL_MASKS:
            control = with_other_masks(trainer, report, tickets, method)
            costs = {"trainings": 1, "samples in extraction": 0, "minutes of retraining": control["seconds"] / 60}
            control = {name: value for name, value in control.items() if name != "log_history"}
            return {**control, "at": at, "costs": {**of_tickets["costs"], **costs}}
        if method == MULTIPLE:
            result = self._kept(method, at, lambda: independent_models(trainer, self.test, tickets, round_index=index))
            num_kept, trainings = sum(report["kept"].values()), of_tickets["costs"]["trainings"] - 1 + len(tickets)
            num_bytes = report["footprint"]["independent_bytes"]
            costs, emptied = {**of_tickets["costs"], "trainings": trainings}, report["emptied_layers"]
        else:
            of_single = list(self._of_trainer(self.imp_single, self.args.target_sparsity))[index]
            masks = model_of_round(self.imp_single, of_single).mask_bank[0]
            result = self._kept(
                method,
                at,
                lambda: one_vs_rest(trainer, self.test, self.backbone, self.data, round_index=index, masks=masks),
            )
            num_kept, costs, emptied = of_single["union"], of_single["costs"], of_single["emptied_layers"]
            num_bytes = of_single["footprint"]["total_bytes"]
        return {
            "metrics": result["metrics"],
            "at": at,
            "kept": report["kept"],
            "union": num_kept,
            "footprint": {"total_bytes": num_bytes},
            "emptied_layers": emptied,
            "costs": {**costs, "minutes of retraining": result["seconds"] / 60},
        }

    def _kept(self, method: str, at: float, measure: Callable[[], dict[str, float]]) -> dict[str, Any]:
        """Metrics that `measure` gives, and its time; from disk if it was done already."""
        file = self.folder / method.replace(" ", "-") / f"sparsity-{at:g}.json"
        if not file.exists():
            start = time.perf_counter()
            metrics = measure()
            file.parent.mkdir(exist_ok=True)
            write_json(file, {"metrics": metrics, "seconds": time.perf_counter() - start})
        return json.loads(file.read_text())


def of_logits(prediction: EvalPrediction, names: Sequence[str]) -> dict[str, float]:
    """
    Of a network with a logit per class the same figures as of tickets. A class is predicted where its logit is the
    highest, as the paper scores its single model; curves are of the logarithms of probabilities.
    """
    logits, labels = torch.from_numpy(prediction.predictions).double(), prediction.label_ids
    first, second = logits.topk(2, dim=1).values.T
    margins = logits - torch.where(logits == first[:, None], second[:, None], first[:, None])
    decided = membership_metrics(margins.numpy(), labels, names)
    metrics = membership_metrics(logits.log_softmax(dim=1).numpy(), labels, names)
    return {**metrics, **{name: value for name, value in decided.items() if name.rsplit("/")[-1] in DECIDED}}


def line_of(method: str, report: dict[str, Any]) -> dict[str, Any]:
    """All of a report that the tables show."""
    return {**row(method, report["at"], report), **report["costs"]}


def split(lines: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The lines by sparsity, as three tables: how well samples are ranked, what is decided, and what it costs."""
    lines = sorted(lines, key=lambda line: line["sparsity"])
    titles = {"figures": RANKING, "costs": COSTS}
    titles["decisions"] = [title for line in lines for title in line if title not in (*RANKING, *COSTS, *CUT)]
    return {
        name: [{title: line.get(title) for title in ("method", "sparsity", *titles[name], *CUT)} for line in lines]
        for name in ("figures", "decisions", "costs")
    }


@torch.no_grad()
def forward_flops(trainer: RTLTrainer) -> int:
    """Floating point operations of one dense forward for one image; zeros in the weights save none."""
    pixel_values = trainer.eval_dataset[0]["pixel_values"][None].to(trainer.args.device)
    with FlopCounterMode(display=False) as counter:
        trainer.model.eval()(pixel_values=pixel_values, route_ids=0)
    return counter.get_total_flops()


if __name__ == "__main__":
    main()
