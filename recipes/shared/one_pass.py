"""Tickets found in one pass beside what they must beat: quality, time and weights per call, and bytes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_rtl import RTLModel, find_tickets
from hf_rtl.modeling.small_ticket import used_units
from hf_rtl.modeling.units import find_units


DENSE, ONE, UNION, RANDOM = "dense", "one mask", "one mask at the union's density", "random tickets"
TICKETS, OTHER = "tickets", "another route's tickets"
ONE_REFIT, EACH_REFIT = "one mask + refit", "one mask, refit per route"
TICKETS_REFIT = "tickets + refit"
METHODS = [DENSE, ONE, UNION, RANDOM, OTHER, TICKETS, ONE_REFIT, EACH_REFIT, TICKETS_REFIT]


@dataclass
class Served:
    """What a method answers with: a plain model per route, and the bytes of all that is stored."""

    models: list[PreTrainedModel]
    stored_bytes: int


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
        yield DENSE, Served([self.network] * len(names), _bytes(self.network))
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
        return Served([small] * len(self.route_names), _bytes(small))

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
        return Served(models, _bytes(models[0]) + (len(models) - 1) * own_bytes)


def compare(
    serving: Iterator[tuple[str, Served]],
    route_names: Sequence[str],
    quality: Callable[[PreTrainedModel, str], float],
    inputs: Mapping[str, Tensor],
    sparsity: float,
) -> list[dict[str, Any]]:
    """
    A report for each method: quality of every route, milliseconds of a call, active weights, stored bytes.

    Args:
        serving: from `OnePass.serve`.
        route_names (`Sequence[str]`): the routes.
        quality (`Callable`): (model, route) -> a figure on test data.
        inputs (`Mapping[str, Tensor]`): a batch to time.
        sparsity (`float`): goes into the reports.
    """
    found = list(serving)
    times = _times({method: served.models[0] for method, served in found}, inputs)
    return [
        {
            "method": method,
            "sparsity": sparsity,
            "quality": {name: quality(model, name) for name, model in zip(route_names, served.models, strict=True)},
            "ms": times[method],
            "active": sum(parameter.numel() for parameter in served.models[0].parameters()),
            "bytes": served.stored_bytes,
        }
        for method, served in found
    ]


@torch.no_grad()
def _times(models: Mapping[str, nn.Module], inputs: Mapping[str, Tensor], repeats: int = 15) -> dict[str, float]:
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
    served: Served, route_names: Sequence[str], quality: Callable[[PreTrainedModel, str], float]
) -> np.ndarray:
    """`[K, K]`: the quality of the ticket of each row on the data of each column."""
    return np.array([[quality(model, name) for name in route_names] for model in served.models])


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


def _bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in {id(p): p for p in model.parameters()}.values())
