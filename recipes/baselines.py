"""
Compare tickets with their baselines on the same images: which class does an image have, if its route is not given?

    python recipes/baselines.py --config recipes/configs/cifar10_baselines.yaml
    python recipes/baselines.py --config recipes/configs/digits.yaml --seeds 0 --methods shared "IMP single"

The methods, each for every seed and sparsity:

- `dense`: one network for all classes, a logit per class, not pruned;
- `IMP single`: that network with one mask of the tickets' density, found by iterative magnitude pruning;
- `IMP single, union`: that network with one mask as dense as the union of the tickets of `per route`;
- `one-vs-rest`: the masks of `IMP single`; a logit per class, each trained on balanced batches as tickets are;
- `IMP multiple`: a separate network per class, with the mask and the batches of the class's ticket;
- `random masks`, `layer-shuffled masks`: masks of the same densities in place of the tickets of `per route`;
- `shared`: the paper's membership tickets, with shared statistics of normalisation;
- `per route`: tickets with their own statistics, and a router that compares calibrated scores;
- `competing`: the same, but in the last --competing_epochs all tickets compete for the same samples.

All methods start from the same initial weights. Their retraining sees equally many samples, counting every pass of a
sample through a network. All kinds of tickets share one extraction. The command prints tables of means and standard
deviations over the seeds, writes them with all reports into `results.json` in --output_dir, and draws `curves.png`.
Repeated, it continues an interrupted run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.hf_argparser import HfArg
from transformers.trainer_utils import EvalPrediction

from hf_rtl import RTLModelForImageClassification, RTLTrainer, RTLTrainingArguments
from hf_rtl.metrics import membership_metrics
from shared.arguments import chosen_methods, parse, run_main, set_up
from shared.controls import CONTROL_MASKS, with_other_masks
from shared.data_arguments import DataArguments
from shared.image_data import channels_last, load_images
from shared.methods import DENSE, MULTIPLE, SINGLE, SINGLE_UNION, SeedRuns, independent_costs
from shared.models import membership_model, tickets_of_round
from shared.plain_networks import independent_metrics, one_vs_rest
from shared.report import over_seeds, print_tables, row, training_record, write_results


ONE_VS_REST = "one-vs-rest"
SHARED, PER_ROUTE, COMPETING = "shared", "per route", "competing"
# Tickets -> their normalisation statistics.
TICKETS = {SHARED: "shared", PER_ROUTE: "per_route", COMPETING: "per_route"}
METHODS = [DENSE, SINGLE, SINGLE_UNION, ONE_VS_REST, MULTIPLE, *CONTROL_MASKS, *TICKETS]
# Metrics that differ where the highest logit decides: exactly one class is predicted, never none or two.
DECIDED = ("balanced_accuracy", "precision", "recall", "f1", "worst_balanced_accuracy")


# Columns of metrics without a threshold, of costs, and of cut networks (in all tables). The others show decisions.
RANKING = ("K-way acc.", "router: K-way acc.", "prec. at recall .8", "router: prec. at recall .8", "AUROC")
CUT = ("emptied layers", "constant tickets")
COSTS = (
    *("union", "bytes", "trainings", "samples in extraction", "samples in retraining", "kFLOPs an image"),
    "minutes of retraining",
)


@dataclass
class ComparisonArguments:
    """What is compared."""

    backbone: str = HfArg(default="ghostnet_rtl", help="A timm name, a repo id or a folder.")
    seeds: list[int] = HfArg(default_factory=lambda: [0, 1, 2], help="For weights, data and batches.")
    methods: list[str] = HfArg(default_factory=lambda: list(METHODS), help="Methods to run.")
    threads: int | None = HfArg(default=None, help="CPU threads; by default torch decides.")


def main() -> None:
    comparison, data, args = parse((ComparisonArguments, DataArguments, RTLTrainingArguments), description=__doc__)
    methods = chosen_methods(comparison.methods, METHODS)
    set_up(comparison.threads)
    reports = [ImageRuns(comparison, data, args, seed).all_reports(methods) for seed in comparison.seeds]
    lines_of_seeds = [[report_line(report) for report in of_seed] for of_seed in reports]
    tables = split(over_seeds(lines_of_seeds))
    print_tables(tables)
    pictures = []
    if find_spec("matplotlib"):
        from shared.plots import draw_methods

        pictures.append("curves.png")
        draw_methods(lines_of_seeds, ["bal. acc.", "K-way acc.", "AUROC"], Path(args.output_dir) / pictures[0])
    write_results(
        Path(args.output_dir) / "results.json",
        pictures=pictures,
        data={**asdict(data), "dataset": Path(data.dataset).name},
        comparison=asdict(comparison),
        training=training_record(args),
        **tables,
        runs=dict(zip(comparison.seeds, reports, strict=True)),
    )


class ImageRuns(SeedRuns):
    """The runs of one seed, below `output_dir/seed-N`."""

    tickets = PER_ROUTE

    def __init__(
        self, comparison: ComparisonArguments, data: DataArguments, args: RTLTrainingArguments, seed: int
    ) -> None:
        folder = Path(args.output_dir) / f"seed-{seed}"
        super().__init__(folder, replace(args, seed=seed, router="score", extraction_dir=str(folder / "extraction")))
        self.backbone = comparison.backbone
        self.train, self.test = load_images(data, seed=seed)
        self.data = {"train_dataset": self.train, "eval_dataset": self.test, "data_collator": channels_last}

    def trainer(self, method: str) -> RTLTrainer:
        if method in TICKETS:
            competing = self.args.competing_epochs if method == COMPETING else 0
            return self._ticket_trainer(self.arguments(method, competing_epochs=competing), TICKETS[method])
        return self._single_trainer(method)

    def _ticket_trainer(self, args: RTLTrainingArguments, norm_statistics: str) -> RTLTrainer:
        """One membership ticket per class."""
        model = membership_model(self.backbone, self.train, seed=args.seed, norm_statistics=norm_statistics)
        return RTLTrainer(model, args, **self.data)

    def _single_trainer(self, method: str) -> RTLTrainer:
        """The trainer with a single route, which is iterative magnitude pruning of one network for all classes."""
        sparsities = self.sparsities(method)
        plan = self._ticket_trainer(replace(self.args, competing_epochs=0), "shared").plan()
        model = RTLModelForImageClassification.from_backbone(
            self.backbone,
            route_names=["all"],
            ticket_task="labels",
            num_labels=len(self.train.label_names),
            seed=self.args.seed,
            in_chans=self.train.num_channels,
        )
        args = self.arguments(
            method,
            router="given",
            competing_epochs=0,
            extraction_dir=None,
            target_sparsity=sparsities,
            max_steps=plan.retraining_steps,
        )
        return RTLTrainer(
            model,
            args,
            **self.data,
            compute_metrics=lambda prediction: logit_metrics(prediction, self.train.label_names),
        )

    def reports(self, method: str) -> Iterator[dict[str, Any]]:
        """The reports of every round, or of the networks that take the place of its tickets."""
        if method in (*TICKETS, DENSE, SINGLE, SINGLE_UNION):
            yield from self._run_reports(method)
            return
        for index, report in enumerate(list(self._run_reports(PER_ROUTE))):
            if method in CONTROL_MASKS:
                yield self._control_report(method, report)
            elif method == MULTIPLE:
                yield self._independent_report(index, report)
            else:
                yield self._one_vs_rest_report(index, report)

    def _run_reports(self, method: str) -> Iterator[dict[str, Any]]:
        """The reports of a run, with two more costs: floating point operations, and minutes of retraining."""
        trainer = self.trained(method)
        for report in super().reports(method):
            further = {
                "kFLOPs an image": round(trainer.model.num_routes * forward_flops(trainer) / 1e3),
                "minutes of retraining": report["seconds"] / 60,
            }
            yield {**report, "costs": {**report["costs"], **further}}

    def _control_report(self, method: str, report: dict[str, Any]) -> dict[str, Any]:
        """The report of other masks of the tickets' densities, retrained as the tickets of a round were."""
        trainer = self.trained(PER_ROUTE)
        control = with_other_masks(trainer, report, tickets_of_round(trainer, report), method)
        spent = {"trainings": 1, "samples in extraction": 0, "minutes of retraining": control["seconds"] / 60}
        return {
            **{name: value for name, value in control.items() if name not in self.left_out},
            "at": report["at"],
            "costs": {**report["costs"], **spent},
        }

    def _independent_report(self, index: int, report: dict[str, Any]) -> dict[str, Any]:
        """The report of a network per class, with the masks of the tickets of a round."""
        trainer = self.trained(PER_ROUTE)
        tickets = tickets_of_round(trainer, report)
        found = self._timed(MULTIPLE, report["at"], lambda: independent_metrics(trainer, tickets, round_index=index))
        networks = independent_costs(report, **{"minutes of retraining": found["seconds"] / 60})
        return {"metrics": found["metrics"], "at": report["at"], "kept": report["kept"], **networks}

    def _one_vs_rest_report(self, index: int, report: dict[str, Any]) -> dict[str, Any]:
        """The report of one network with the mask of `IMP single`, retrained on the batches of a round's tickets."""
        single = list(self._run_reports(SINGLE))[index]
        (masks,) = tickets_of_round(self.trained(SINGLE), single)
        trainer = self.trained(PER_ROUTE)
        found = self._timed(
            ONE_VS_REST,
            report["at"],
            lambda: one_vs_rest(
                trainer, self.backbone, round_index=index, masks=masks, in_chans=self.train.num_channels
            ),
        )
        return {
            "metrics": found["metrics"],
            "at": report["at"],
            "kept": report["kept"],
            "union": single["union"],
            "footprint": {"total_bytes": single["footprint"]["total_bytes"]},
            "emptied_layers": single["emptied_layers"],
            "costs": {**single["costs"], "minutes of retraining": found["seconds"] / 60},
        }

    def _timed(self, method: str, at: float, measure: Callable[[], dict[str, float]]) -> dict[str, Any]:
        """The `metrics` that `measure` returns and the `seconds` it took; read back if they were measured before."""

        def measure_with_time() -> dict[str, Any]:
            start = time.perf_counter()
            metrics = measure()
            return {"metrics": metrics, "seconds": time.perf_counter() - start}

        return self.measured(method, at, measure_with_time)


def logit_metrics(prediction: EvalPrediction, names: Sequence[str]) -> dict[str, float]:
    """
    The metrics of tickets, for a network with a logit per class. The class with the highest logit is predicted, as the
    paper scores its single model. Metrics without a threshold rank samples by logarithms of probabilities.
    """
    logits, labels = torch.from_numpy(prediction.predictions).double(), prediction.label_ids
    first, second = logits.topk(2, dim=1).values.T
    margins = logits - torch.where(logits == first[:, None], second[:, None], first[:, None])
    decided = membership_metrics(margins.numpy(), labels, names)
    metrics = membership_metrics(logits.log_softmax(dim=1).numpy(), labels, names)
    return {**metrics, **{name: value for name, value in decided.items() if name.rsplit("/")[-1] in DECIDED}}


def report_line(report: dict[str, Any]) -> dict[str, Any]:
    """The line of a report, with the columns of all tables."""
    return {**row(report["method"], report["at"], report), **report["costs"]}


def split(lines: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The lines by sparsity, as three tables: how well samples are ranked, the decisions, and the costs."""
    lines = sorted(lines, key=lambda line: line["sparsity"])
    titles = {"figures": RANKING, "costs": COSTS}
    titles["decisions"] = [title for line in lines for title in line if title not in (*RANKING, *COSTS, *CUT)]
    return {
        name: [{title: line.get(title) for title in ("method", "sparsity", *titles[name], *CUT)} for line in lines]
        for name in ("figures", "decisions", "costs")
    }


@torch.no_grad()
def forward_flops(trainer: RTLTrainer) -> int:
    """Floating point operations of one dense forward for one image; zero weights count too."""
    pixel_values = trainer.eval_dataset[0]["pixel_values"][None].to(trainer.args.device)
    with FlopCounterMode(display=False) as counter:
        trainer.model.eval()(pixel_values=pixel_values, route_ids=0)
    return counter.get_total_flops()


if __name__ == "__main__":
    run_main(main)
