"""Tickets found in one pass beside what they must beat: quality, time and weights per call, bytes; their tables."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_rtl import RTLModel, find_tickets
from hf_rtl.modeling.files import write_json
from hf_rtl.modeling.small_ticket import used_units
from hf_rtl.modeling.units import find_units

from .report import over_seeds, print_tables, write_results


DENSE, ONE, UNION = "dense", "one mask", "one mask at the union's density"
TICKETS, OTHER, RANDOM = "tickets", "another route's tickets", "random tickets"
ONE_REFIT, EACH_REFIT = "one mask + refit", "one mask, refit per route"
TICKETS_REFIT = "tickets + refit"
METHODS = [DENSE, ONE, UNION, RANDOM, OTHER, TICKETS, ONE_REFIT, EACH_REFIT, TICKETS_REFIT]


@dataclass
class Served:
    """
    What a method answers with.

    Args:
        models (`list[PreTrainedModel]`): a plain model per route.
        stored_bytes (`int`): the bytes of all that is stored.
        each_alone (`bool`, defaults to `False`): whether each of several logits, one per route, decides by itself. By
            default the highest decides.
    """

    models: list[PreTrainedModel]
    stored_bytes: int
    each_alone: bool = False


@dataclass
class OnePass:
    """
    All methods at one sparsity, from one trained model. The masks of all have the same criterion and number of units.

    Args:
        network (`PreTrainedModel`): the trained model.
        data (`Dataset`): calibration samples, equally many of every route, with the column `route`.
        route_names (`Sequence[str]`): the routes.
        sparsity (`float`): the share of units that is removed.
        options (`Mapping`): for `find_tickets`, such as `granularity`, `num_batches` and `batch_size`.
    """

    network: PreTrainedModel
    data: Dataset
    route_names: Sequence[str]
    sparsity: float
    options: Mapping[str, Any]

    def serve(self) -> Iterator[tuple[str, Served]]:
        """Every method with its models, in the order of `METHODS`."""
        names = self.route_names
        yield DENSE, Served([self.network] * len(names), num_bytes(self.network))
        tickets = self.find(self.data)
        pool = self.data.remove_columns("route").add_column("route", ["all"] * len(self.data))
        num_batches = self.options["num_batches"] * len(names)
        one = self.find(pool, num_batches=num_batches)
        yield ONE, self._alone(one)
        yield UNION, self._alone(self.find(pool, num_batches=num_batches, sparsity=1 - share_of_units(tickets)))
        yield RANDOM, self._routed(self.find(self.data, criterion="random"))
        own = self._routed(tickets)
        yield OTHER, Served([*own.models[1:], own.models[0]], own.stored_bytes)
        yield TICKETS, own
        yield ONE_REFIT, self._alone(self.find(pool, num_batches=num_batches, refit=True))
        yield EACH_REFIT, self._refitted_alone(one)
        yield TICKETS_REFIT, self._routed(self.find(self.data, refit=True))

    def find(self, data: Dataset, **options: Any) -> RTLModel:
        given = {"sparsity": self.sparsity, "route_column": "route", **self.options, **options}
        return find_tickets(self.network, data, **given)

    def _alone(self, model: RTLModel) -> Served:
        small = model.extract_ticket(0, small=True)
        return Served([small] * len(self.route_names), num_bytes(small))

    def _routed(self, model: RTLModel) -> Served:
        small = [model.extract_ticket(name, small=True) for name in self.route_names]
        return Served(small, model.footprint()["compact_bytes"])

    def _refitted_alone(self, model: RTLModel) -> Served:
        """One mask, whose readers are solved for each route by itself."""
        models = []
        for name in self.route_names:
            own = self.data.filter(lambda sample, name=name: sample["route"] == name).remove_columns("route")
            models.append(model.extract_ticket(0, small=True, refit=own.with_format("torch")))
        same = [torch.equal(*pair) for pair in zip(models[0].parameters(), models[-1].parameters(), strict=True)]
        own_bytes = sum(
            parameter.nbytes for parameter, equal in zip(models[0].parameters(), same, strict=True) if not equal
        )
        return Served(models, num_bytes(models[0]) + (len(models) - 1) * own_bytes)


def compare(
    serving: Sequence[tuple[str, Served]],
    route_names: Sequence[str],
    quality: Callable[[PreTrainedModel, str], dict[str, float]],
    inputs: Mapping[str, Tensor],
    sparsity: float,
) -> list[dict[str, Any]]:
    """
    A report for each method: quality of every route, milliseconds of a call, active weights, stored bytes.

    Args:
        serving: from `OnePass.serve`.
        route_names (`Sequence[str]`): the routes.
        quality (`Callable`): (model, route) -> figures on test data, by name.
        inputs (`Mapping[str, Tensor]`): a batch to time.
        sparsity (`float`): goes into the reports.
    """
    times = call_times({method: served.models[0] for method, served in serving}, inputs)
    return [
        {
            "method": method,
            "sparsity": sparsity,
            "quality": {name: quality(model, name) for name, model in zip(route_names, served.models, strict=True)},
            "ms": times[method],
            "faster": times[DENSE] / times[method],
            "active": sum(parameter.numel() for parameter in served.models[0].parameters()),
            "bytes": served.stored_bytes,
        }
        for method, served in serving
    ]


@torch.no_grad()
def call_times(models: Mapping[str, nn.Module], inputs: Mapping[str, Tensor], repeats: int = 15) -> dict[str, float]:
    """The median milliseconds of a call of each model; the models are called in turn."""
    found: dict[str, list[float]] = {method: [] for method in models}
    for _ in range(repeats):
        for method, model in models.items():
            model.eval()
            start = time.perf_counter()
            model(**inputs)
            found[method].append(1000 * (time.perf_counter() - start))
    return {method: median(values) for method, values in found.items()}


def ticket_against_data(
    served: Served,
    route_names: Sequence[str],
    quality: Callable[[PreTrainedModel, str], dict[str, float]],
    figure: str,
) -> np.ndarray:
    """`[K, K]`: the figure of the ticket of each row on the data of each column."""
    return np.array([[quality(model, name)[figure] for name in route_names] for model in served.models])


def middle(sparsity: Sequence[float]) -> float:
    """The sparsity of pictures and costs."""
    return sparsity[len(sparsity) // 2]


def balanced(data: Dataset, number: int, seed: int) -> Dataset:
    """`number` samples of each value of the column `route`, drawn by `seed`."""
    values = np.array(data["route"])
    generator = np.random.default_rng(seed)
    parts = [
        data.select(np.sort(generator.permutation(np.flatnonzero(values == value))[:number]))
        for value in sorted(set(values.tolist()))
    ]
    return concatenate_datasets(parts)


def share_of_units(model: RTLModel) -> float:
    """The share of the prunable units that at least one ticket keeps."""
    union, covered = model.extract_ticket(-1), set(model.mask_bank.weight_names)
    layers = [layer for layer in find_units(union) if all(name in covered for name, _ in layer.readers)]
    return float(torch.cat([used_units(union, layer) for layer in layers]).double().mean())


def num_bytes(model: nn.Module) -> int:
    """The bytes of all parameters, of shared ones once."""
    return sum(tensor.nbytes for tensor in {id(p): p for p in model.parameters()}.values())


# Tables


def average(report: Mapping[str, Any], figure: str) -> float:
    """The mean of a figure over the routes that have it."""
    return mean(of_route[figure] for of_route in report["quality"].values() if figure in of_route)


def tables_of(
    reports: Sequence[Mapping[str, Any]], seeds: Sequence[int], figures: Mapping[str, Callable[[Any], float]]
) -> dict[str, list[dict[str, Any]]]:
    """
    Means and spreads over seeds: the table of methods, and that of the paired differences between methods.

    Args:
        reports: from `compare`, each with its `seed`.
        seeds (`Sequence[int]`): the seeds.
        figures (`Mapping[str, Callable]`): name of a figure -> `min` or `max`, which finds the worst route.
    """
    by_seed = [[report for report in reports if report["seed"] == seed] for seed in seeds]
    first, worst = next(iter(figures.items()))
    lines = [
        [
            {
                "method": report["method"],
                "sparsity": report["sparsity"],
                **{figure: average(report, figure) for figure in figures},
                f"worst {first}": worst(of_route[first] for of_route in report["quality"].values()),
                "times as fast": report["faster"],
                "active weights": report["active"],
                "stored bytes": report["bytes"],
            }
            for report in of_seed
        ]
        for of_seed in by_seed
    ]
    found = {(report["seed"], report["sparsity"], report["method"]): report for report in reports}
    differences = []
    for method, rival in ((TICKETS, ONE), (TICKETS_REFIT, ONE_REFIT), (TICKETS_REFIT, EACH_REFIT)):
        for sparsity in sorted({report["sparsity"] for report in reports}):
            line: dict[str, Any] = {"method": f"{method} − {rival}", "sparsity": sparsity}
            for figure in figures:
                paired = [
                    average(found[seed, sparsity, method], figure) - average(found[seed, sparsity, rival], figure)
                    for seed in seeds
                ]
                spread = stdev(paired) if len(paired) > 1 else math.nan
                line[figure] = f"{mean(paired):+.3f} ± {spread:.3f}"
                line[f"{figure}: difference / spread"] = f"{abs(mean(paired)) / spread:.1f}" if spread > 0 else None
            differences.append(line)
    return {"figures": over_seeds(lines), "differences": differences}


@torch.no_grad()
def costs(
    network: PreTrainedModel, data: Dataset, sparsity: float, options: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """What finding the tickets of all routes takes: seconds, and the ratio to a pass of the network over `data`."""
    samples = data.remove_columns("route").with_format("torch")
    starts = range(0, len(samples), options["batch_size"])
    start = time.perf_counter()
    for first in starts:
        network(**samples[first : first + options["batch_size"]])
    dense = time.perf_counter() - start
    lines = []
    for method, refit in ((TICKETS, False), (TICKETS_REFIT, True)):
        start = time.perf_counter()
        find_tickets(network, data, sparsity=sparsity, route_column="route", refit=refit, **options)
        seconds = time.perf_counter() - start
        lines.append({"method": method, "sparsity": sparsity, "seconds": seconds, "dense passes": seconds / dense})
    return lines


def of_seeds(
    output_dir: Path, seeds: Sequence[int], given: Mapping[str, Any], compared: Callable[[int], dict[str, Any]]
) -> list[dict[str, Any]]:
    """The result of each seed: read from `seed-N.json` of `output_dir` if it is of what was `given`, else made."""
    results = []
    for seed in seeds:
        file = output_dir / f"seed-{seed}.json"
        identity = json.loads(
            json.dumps({**given, "arguments": {**given["arguments"], "seeds": seed, "threads": None}})
        )
        saved = json.loads(file.read_text()) if file.exists() else {}
        if saved.get("identity") != identity:
            saved = {"identity": identity, **compared(seed)}
            write_json(file, saved)
        results.append(saved)
    return results


def finish(
    output_dir: Path,
    seeds: Sequence[int],
    results: Sequence[Mapping[str, Any]],
    figures: Mapping[str, Callable[[Any], float]],
    **content: Any,
) -> None:
    """
    Prints the tables and writes them into `results.json` of `output_dir`, with `content`; see `tables_of`.

    Args:
        results: for each seed its `reports`, from `compare`, and its `costs`.
    """
    reports = [
        {"seed": seed, **report} for seed, result in zip(seeds, results, strict=True) for report in result["reports"]
    ]
    tables = {**tables_of(reports, seeds, figures), "costs": over_seeds([result["costs"] for result in results])}
    print()
    print_tables(tables)
    write_results(output_dir / "results.json", **content, **tables, reports=reports)
