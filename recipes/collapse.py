"""
At which sparsity do tickets collapse, and does the similarity of their masks show it, without false alarms?

    python recipes/collapse.py --config recipes/configs/digits_collapse.yaml
    python recipes/collapse.py --config recipes/configs/cifar10_collapse.yaml --dataset FOLDER --class_similarity FILE

The command prunes, retrains and evaluates class tickets at every --target_sparsity, in a run for each scope of
--scopes and each seed. Then it analyses the masks:

- alarms and falls: where the detector of hf_rtl.analysis gives an alarm for a ticket, and where the ticket's balanced
  accuracy falls. A fall starts where accuracy stays more than 0.05 below its mean up to 50 % sparsity;
- false alarms: the detector's alarms on random and on layer-shuffled masks with the densities of the runs;
- planted collapses: the detector's alarms on the runs' masks, of which from 70 % sparsity on a part of all positions
  is made equal in all tickets (up) or shuffled within its layer (down);
- with --class_similarity, how the similarity of tickets follows that of their classes, by depth and sparsity.

The command prints tables, writes them into `results.json` in --output_dir, and draws pictures of every run. Repeated,
it continues an interrupted run.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.hf_argparser import HfArg

from hf_rtl import MaskBank, RTLTrainer, RTLTrainingArguments
from hf_rtl.analysis import Change, detect_collapse, ticket_similarity
from hf_rtl.class_similarity import load_class_similarity
from hf_rtl.pruning import random_masks, shuffled_masks
from shared.arguments import parse, run_main, set_up
from shared.data_arguments import DataArguments
from shared.image_data import load_images
from shared.models import membership_model
from shared.plots import draw_points
from shared.points import Point, alignment, ordering, point_line, points_of_run, route_values
from shared.report import over_seeds, print_tables, training_record, write_results


METRIC = "balanced_accuracy"
# Fixed before the runs: about twice the standard deviation of a ticket's balanced accuracy over CIFAR-10 seeds.
LEAST_FALL = 0.05
MILD_SPARSITY = 0.5
PLANTED_FROM = 0.7
PLANTED_PARTS = (0.1, 0.25, 0.5, 1.0)
TOLERANCE = 1e-3  # Whole numbers of weights meet a sparsity only nearly.


@dataclass
class CollapseArguments:
    """Which runs are analysed."""

    backbone: str = HfArg(default="ghostnet_rtl", help="A timm name, a repo id or a folder.")
    scopes: list[str] = HfArg(
        default_factory=lambda: ["global", "layer"], help="Scopes of magnitude pruning to compare."
    )
    seeds: list[int] = HfArg(default_factory=lambda: [0, 1, 2], help="For weights, data and batches.")
    num_random_runs: int = HfArg(default=20, help="Number of random runs, and of layer-shuffled runs, for each scope.")
    class_similarity: str | None = HfArg(
        default=None, help="csv file of the similarity of the classes, or `dict` folder of WordNet."
    )
    threads: int | None = HfArg(default=None, help="CPU threads; by default torch decides.")


@dataclass
class Run:
    """
    The result of a scope and a seed. `values` are METRIC of every route at every point, `[points, K]`; NaN where masks
    were not retrained. The detector reads these masks too.
    """

    scope: str
    seed: int
    points: list[Point]
    values: np.ndarray
    changes: dict[str, Change]

    @property
    def names(self) -> list[str]:
        return self.points[0].bank.route_names

    @property
    def sparsities(self) -> list[float]:
        return [point.similarity.sparsity for point in self.points]


def main() -> None:
    collapse, data, args = parse((CollapseArguments, DataArguments, RTLTrainingArguments), description=__doc__)
    set_up(collapse.threads)
    # These arguments are checked here, since a failure after hours of training would waste them.
    if min(args.target_sparsity) > MILD_SPARSITY:
        raise SystemExit(
            f"--target_sparsity starts at {min(args.target_sparsity)}. A fall is relative to sparsities up to "
            f"{MILD_SPARSITY}; add one of these."
        )
    classes, classes_file = None, collapse.class_similarity
    if classes_file is not None:
        train, _ = load_images(data, seed=collapse.seeds[0])
        classes = load_class_similarity(classes_file, train.label_names)
    output_dir = Path(args.output_dir)
    runs = [make_run(collapse, data, args, scope, seed) for scope in collapse.scopes for seed in collapse.seeds]
    tables = {
        "summary": [summary(scope, [run for run in runs if run.scope == scope]) for scope in collapse.scopes],
        "figures": over_scopes(runs, collapse.scopes, points_rows),
        "routes": [row for run in runs for row in route_rows(run)],
        "false_alarms": [row for run in firsts(runs) for row in false_alarms(run, collapse.num_random_runs)],
        "planted": planted_rows(runs),
    }
    if classes is not None:
        tables["alignment"] = over_scopes(runs, collapse.scopes, lambda run: alignment_rows(run, classes))
    print_tables(tables)
    pictures = []
    for run in runs:
        at = min(range(len(run.points)), key=lambda index: abs(run.sparsities[index] - PLANTED_FROM))
        bank, name = run.points[at].bank, f"{run.scope}-seed-{run.seed}"
        order = ordering(run.points[at].similarity.jaccard if classes is None else classes)
        folder = output_dir / name / "analysis"
        draw_points(run.points, list(run.values), run.changes, METRIC, bank, classes, order, folder)
        if run in firsts(runs):
            pictures.append(f"{name}-curves.png")
            shutil.copy(folder / "curves.png", output_dir / pictures[-1])
    write_results(
        output_dir / "results.json",
        data={**asdict(data), "dataset": Path(data.dataset).name},
        # The name alone, since a path would show a folder of this machine.
        collapse={**asdict(collapse), "class_similarity": classes_file and Path(classes_file).name},
        training=training_record(args),
        pictures=pictures,
        **tables,
    )


def make_run(
    collapse: CollapseArguments, data: DataArguments, args: RTLTrainingArguments, scope: str, seed: int
) -> Run:
    """The run of a scope and a seed, trained here or read back."""
    folder = Path(args.output_dir) / f"{scope}-seed-{seed}"
    args = replace(args, output_dir=str(folder), prune_scope=scope, seed=seed)
    train, test = load_images(data, seed=seed)
    model = membership_model(collapse.backbone, train, seed=seed)
    trainer = RTLTrainer(model, args, train_dataset=train, eval_dataset=test)
    trainer.train()
    points = points_of_run(folder, None)
    values = np.stack([route_values(point, METRIC) for point in points])
    return Run(scope, seed, points, values, detect_collapse([point.similarity for point in points]))


def firsts(runs: Sequence[Run]) -> list[Run]:
    """The first run of every scope."""
    return list({run.scope: run for run in reversed(runs)}.values())[::-1]


def over_scopes(
    runs: Sequence[Run], scopes: Sequence[str], rows: Callable[[Run], list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """The rows of all runs of a scope, as means over its seeds."""
    return [row for scope in scopes for row in over_seeds([rows(run) for run in runs if run.scope == scope])]


def points_rows(run: Run) -> list[dict[str, Any]]:
    """A line for each sparsity whose masks were retrained."""
    rows = []
    for point, values in zip(run.points, run.values, strict=True):
        if point.report is None:
            continue
        of_point = point_line(point, values)
        rows.append(
            {
                "method": run.scope,
                "sparsity": round(point.similarity.sparsity, 4),
                "bal. acc.": of_point["accuracy"],
                "worst": float(np.min(values)),
                **{title: of_point[title] for title in ("similarity", "chance", "excess")},
                "emptied layers": of_point["emptied"],
                "constant tickets": int(point.report["metrics"]["eval_constant_tickets"]),
            }
        )
    return rows


def fall(sparsities: Sequence[float], values: np.ndarray) -> float | None:
    """
    The sparsity from which on `values` (`[points]`, NaN if not measured) stay more than `LEAST_FALL` below their mean
    up to `MILD_SPARSITY`; `None` if the last value is not below. There must be a value up to `MILD_SPARSITY`.
    """
    known = ~np.isnan(values)
    clock, values = np.array(sparsities)[known], values[known]
    mild = values[clock <= MILD_SPARSITY + TOLERANCE].mean()
    last_high = int(np.flatnonzero(mild - values <= LEAST_FALL)[-1])
    return float(clock[last_high + 1]) if last_high + 1 < len(clock) else None


def route_rows(run: Run) -> list[dict[str, Any]]:
    """A line of alarms and a line of falls, with a column for each route."""
    alarms: dict[str, Any] = {"scope": run.scope, "seed": run.seed, "what": "alarm"}
    falls: dict[str, Any] = {**alarms, "what": "fall"}
    for route, name in enumerate(run.names):
        change, fallen = run.changes.get(name), fall(run.sparsities, run.values[:, route])
        alarms[name] = "none" if change is None else f"{change.sparsity:.1%} {change.direction}"
        falls[name] = "none" if fallen is None else f"{fallen:.1%}"
    return [alarms, falls]


def summary(scope: str, runs: Sequence[Run]) -> dict[str, Any]:
    """Counts of alarms and falls over the routes and seeds of a scope, alone and together."""
    pairs = [
        (run.changes[name].sparsity if name in run.changes else None, fall(run.sparsities, run.values[:, route]))
        for run in runs
        for route, name in enumerate(run.names)
    ]
    alarms = [alarm for alarm, _ in pairs if alarm is not None]
    falls = [fallen for _, fallen in pairs if fallen is not None]
    both = [(alarm, fallen) for alarm, fallen in pairs if alarm is not None and fallen is not None]
    return {
        "scope": scope,
        "tickets": len(pairs),
        "alarms": len(alarms),
        "median alarm at": f"{median(alarms):.1%}" if alarms else None,
        "falls": len(falls),
        "median fall at": f"{median(falls):.1%}" if falls else None,
        "alarm before fall": sum(alarm < fallen for alarm, fallen in both),
        "at the fall": sum(alarm == fallen for alarm, fallen in both),
        "after it": sum(alarm > fallen for alarm, fallen in both),
        "fall without alarm": len(falls) - len(both),
        "alarm without fall": len(alarms) - len(both),
    }


def false_alarms(run: Run, num_runs: int) -> Iterator[dict[str, Any]]:
    """Counts of alarms on meaningless masks: those with the densities of `run` over all layers or in each."""
    for name, control in (("random", random_masks), ("layer-shuffled", shuffled_masks)):
        alarms = []
        for number in range(num_runs):
            # The same seeds at every sparsity nest random masks, as pruning nests its masks.
            banks = [drawn_masks(point.bank, control, first_seed=number * len(run.names)) for point in run.points]
            alarms.append(len(detect_collapse([ticket_similarity(bank) for bank in banks])))
        yield {
            "densities of": f"{run.scope}, seed {run.seed}",
            "masks": name,
            "runs": num_runs,
            "runs with an alarm": sum(count > 0 for count in alarms),
            "tickets": num_runs * len(run.names),
            "tickets with an alarm": sum(alarms),
        }


def drawn_masks(bank: MaskBank, control: Callable[..., list[Tensor]], *, first_seed: int) -> MaskBank:
    """The masks that `control` makes of those in `bank`, each by a seed of its own."""
    masks = {
        name: control(bank[name], generator=torch.Generator().manual_seed(seed))
        for seed, name in enumerate(bank.route_names, start=first_seed)
    }
    return MaskBank.from_masks(bank.weight_names, masks)


def planted_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """How many planted collapses are found, over all runs that reach `PLANTED_FROM`, by direction and part."""
    runs = [run for run in runs if run.sparsities[-1] >= PLANTED_FROM - TOLERANCE]
    rows = []
    for direction, part in product(("up", "down"), PLANTED_PARTS):
        found = [when for run in runs for when in planted(run, direction, part)]
        rows.append(
            {
                "planted": direction,
                "of all positions": f"{part:.0%}",
                "tickets": len(found),
                "found at once": found.count("at once"),
                "found later": found.count("later"),
                "alarm before": found.count("before"),
            }
        )
    return rows


def planted(run: Run, direction: str, part: float) -> list[str | None]:
    """When the detector finds a collapse planted from `PLANTED_FROM` on, for every ticket; `None` if never."""
    first = next(index for index, sparsity in enumerate(run.sparsities) if sparsity >= PLANTED_FROM - TOLERANCE)
    points = [point.similarity for point in run.points[:first]]
    for point in run.points[first:]:
        chosen = chosen_positions(point.bank[0], part, seed=run.seed)
        shuffled = None if direction == "up" else drawn_masks(point.bank, shuffled_masks, first_seed=1)
        masks = {}
        for name in run.names:
            others = point.bank[0] if shuffled is None else shuffled[name]
            masks[name] = list(map(torch.where, chosen, others, point.bank[name]))
        points.append(ticket_similarity(MaskBank.from_masks(point.bank.weight_names, masks)))
    changes = detect_collapse(points)
    when: list[str | None] = []
    for name in run.names:
        change = changes.get(name)
        if change is None:
            when.append(None)
        elif change.point < first:
            when.append("before")
        else:
            when.append("at once" if change.point == first and change.direction == direction else "later")
    return when


def chosen_positions(masks: Sequence[Tensor], part: float, *, seed: int) -> list[Tensor]:
    """Random positions of weights, as `bool` tensors; in each layer about `part` of all."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(mask.shape, generator=generator) < part for mask in masks]


def alignment_rows(run: Run, classes: np.ndarray) -> list[dict[str, Any]]:
    """Spearman's correlation with the similarity of classes by sparsity and depth, and the p-value over all layers."""
    rows = []
    for point in run.points:
        found = alignment(point.bank, classes, 9999, 0)
        rows.append(
            {
                "method": run.scope,
                "sparsity": round(point.similarity.sparsity, 4),
                **{depth: of_depth["rho"] for depth, of_depth in found.items()},
                "p, all": found["all"]["p_value"],
            }
        )
    return rows


if __name__ == "__main__":
    run_main(main)
