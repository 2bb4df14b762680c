"""What the tickets of a routed model keep, decided in one pass over a few batches of each route."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm

from ..data.partition import Partition
from ..data.sampling import fetch
from ..modeling.modeling_rtl import RTLModel
from ..modeling.refit import can_refit, without_refit
from ..modeling.refit import refit as refit_units
from ..modeling.units import UnitLayer
from ..pruning import prune_units
from .activity import Sums, add_up, input_squares
from .ranking import (
    prune_weights,
    readers,
    surviving_units,
    unit_scores,
    units_to_prune,
    weight_scores,
    without_units,
)


@dataclass(frozen=True)
class Calibration:
    """A few batches of every route, the same at every reading, and dealt out whole to the processes."""

    dataset: Any
    partition: Partition
    collate: Callable[[list], dict[str, Any]]
    num_batches: int
    batch_size: int
    seed: int

    def check(self) -> None:
        counts = self.partition.counts.tolist()
        empty = [name for name, count in zip(self.partition.route_names, counts, strict=True) if not count]
        if empty:
            raise ValueError(f"the data have no sample of {', '.join(map(repr, empty))}; every route needs some.")

    def batches(self, route: int, device: torch.device) -> Iterator[dict[str, Any]]:
        """This process's batches of a route, on the device."""
        state = PartialState()
        own = np.flatnonzero(self.partition.route_ids == route)
        chosen = np.random.default_rng([self.seed, route]).permutation(own)[: self.num_batches * self.batch_size]
        starts = range(0, len(chosen), self.batch_size)
        for start in starts[state.process_index :: state.num_processes]:
            samples = fetch(self.dataset, chosen[start : start + self.batch_size].tolist())
            batch = self.collate(list(samples))
            yield {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def gather_in_order(own: list[Any]) -> list[Any]:
    """What the processes made of their batches, in the order of the batches."""
    state = PartialState()
    if state.num_processes == 1:
        return own
    parts = gather_object([own])
    return [parts[index % len(parts)][index // len(parts)] for index in range(sum(map(len, parts)))]


class Search:
    """What the tickets of a routed model keep."""

    def __init__(self, model: RTLModel, data: Calibration, example_inputs: Mapping[str, Tensor] | None) -> None:
        self.model = model
        self.data = data
        self.example_inputs = example_inputs
        self.bank = model.mask_bank
        self._generators: dict[int, torch.Generator] = {}

    def routes(self) -> Iterable[int]:
        shown = PartialState().is_main_process and logging.getLogger("hf_rtl").isEnabledFor(logging.WARNING)
        return tqdm(range(self.bank.num_routes), unit="route", disable=None if shown else True, leave=False)

    # Units

    def unit_layers(self, granularity: str) -> list[UnitLayer]:
        return units_to_prune(self.model, granularity, self.example_inputs)

    def prune_units(
        self, route: int, layers: Sequence[UnitLayer], criterion: str, sparsity: float, **options: Any
    ) -> list[Tensor]:
        """The units that the ticket of a route keeps, `bool` per layer; see `pruning.prune_units`."""
        return prune_units(
            self._unit_scores(route, layers, criterion),
            surviving_units(self._masks(route), layers),
            sparsity=sparsity,
            names=[layer.name for layer in layers],
            **options,
        )

    def _unit_scores(self, route: int, layers: Sequence[UnitLayer], criterion: str) -> list[Tensor]:
        if criterion == "random":
            return [self._draw(route, (layer.num_units,)) for layer in layers]
        weights, sums = self._masked_weights(route), None
        if criterion == "activity":
            sums = self._activity(route, readers(layers), per_weight=False)
        return unit_scores(weights, layers, sums)

    def mask_of_units(self, route: int, layers: Sequence[UnitLayer], kept: Sequence[Tensor]) -> list[Tensor]:
        """The mask of a route without all weights of the units that are not kept."""
        return list(without_units(self._masks(route), layers, kept).values())

    def refitted(
        self,
        layers: Sequence[UnitLayer],
        kept: Sequence[Sequence[Tensor]],
        masks: Sequence[Sequence[Tensor]],
        chosen: Sequence[str],
        ridge: float,
    ) -> RTLModel:
        """Another model around the same backbone, whose routes have readers of their own, solved anew for `chosen`."""
        model, config = self.model, self.model.config
        backbone = model.backbone
        readers = [name for layer in layers if can_refit(backbone, layer) for name, _ in layer.readers]
        biases = [f"{name.rpartition('.')[0]}.bias" for name in readers]
        own = [*readers, *(name for name in biases if name in dict(backbone.named_parameters()))]
        refitted = type(model).from_backbone(
            backbone,
            route_names=model.route_names,
            ticket_task=config.ticket_task,
            norm_statistics=config.norm_statistics,
            private_parameters=[*config.private_parameters, *own],
            prune_include=config.prune_include,
            prune_exclude=[*config.prune_exclude, *readers],
        )
        refitted._unit_layers = model._unit_layers  # of the same backbone
        if model.norm_statistics is not None and refitted.norm_statistics is not None:
            refitted.norm_statistics.load_state_dict(model.norm_statistics.state_dict())
        gather = gather_in_order if PartialState().num_processes > 1 else None
        for route in self.routes():
            found = dict(zip(self.bank.weight_names, masks[route], strict=True))
            refitted.mask_bank[route] = [found[name] for name in refitted.mask_bank.weight_names]
            ticket = model.extract_ticket(route)
            batches = partial(self.data.batches, route, model.device)
            if model.route_names[route] in chosen:
                refit_units(ticket, layers, kept[route], batches, ridge=ridge, gather=gather)
            else:
                without_refit(ticket, layers, kept[route])
            private = refitted.private_parameters
            with torch.no_grad():
                for name, rows in zip(private.names, private.rows, strict=True):
                    rows[route].copy_(ticket.get_parameter(name))
        return refitted

    # Weights

    def prune_weights(self, route: int, sparsity: float, criterion: str, scope: str) -> list[Tensor]:
        weights, backbone = self._masked_weights(route), self.model.backbone
        masks = [mask.to(self.model.device) for mask in self.bank[route]]
        scores = None
        if criterion == "random":
            scores = [self._draw(route, weight.shape).to(weight.device) for weight in weights.values()]
        if criterion == "activity":
            scores = weight_scores(backbone, weights, self._activity(route, list(weights), per_weight=True))
        num_kept = self.bank.num_weights - round(sparsity * self.bank.num_weights)
        found = prune_weights(backbone, weights, masks, num_kept=num_kept, scope=scope, scores=scores)
        return [mask.cpu() for mask in found]

    # Measurements

    def _draw(self, route: int, shape: Sequence[int]) -> Tensor:
        """Random scores; those of a layer follow on those of the layer before it."""
        if route not in self._generators:
            (seed,) = np.random.SeedSequence([self.data.seed, route]).generate_state(1).tolist()
            self._generators[route] = torch.Generator().manual_seed(seed)
        return torch.rand(shape, generator=self._generators[route], dtype=torch.float64)

    def _masks(self, route: int) -> dict[str, Tensor]:
        return dict(zip(self.bank.weight_names, self.bank[route], strict=True))

    @torch.no_grad()
    def _masked_weights(self, route: int) -> dict[str, Tensor]:
        parts = zip(self.bank.weight_names, self.model.masker.weights, self.bank[route], strict=True)
        return {name: torch.where(mask.to(weight.device), weight.detach(), 0) for name, weight, mask in parts}

    def _activity(self, route: int, weight_names: Sequence[str], *, per_weight: bool) -> Sums:
        model = self.model
        batches = self.data.batches(route, model.device)
        with torch.no_grad(), model.route_context(route):
            own = input_squares(model.backbone, weight_names, batches, per_weight=per_weight)
        return add_up(gather_in_order(own))
