"""What units and weights are ranked by, and the masks of those that stay: one implementation for all searches."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..modeling.experts import are_fused, unknown_experts
from ..modeling.mask_bank import MaskBank
from ..modeling.modeling_rtl import RTLModel
from ..modeling.units import UnitLayer
from ..pruning import prune, unit_activity, weight_activity
from .activity import Sums


logger = logging.getLogger(__name__)


# Units


def units_to_prune(
    model: RTLModel,
    granularity: str,
    example_inputs: Mapping[str, Tensor] | None = None,
    *,
    argument: str = "granularity",
) -> list[UnitLayer]:
    """
    The layers of units whose readers all have masks. The log names the others. Raises `ValueError` if there are
    none; it names the `argument` that gave the granularity.
    """
    found = [layer for layer in model.unit_layers(example_inputs) if layer.kind == granularity]
    covered = set(model.mask_bank.weight_names)
    layers = [layer for layer in found if all(name in covered for name, _ in layer.readers)]
    reasons = reasons_to_stay(model, granularity, example_inputs)
    if not layers:
        raise ValueError(
            f"{type(model.backbone).__name__} has no {granularity} that can be pruned"
            + (f": {'; '.join(reasons)}." if reasons else f"; choose another `{argument}`.")
        )
    for reason in reasons:
        logger.info("Some units are not prunable: %s", reason)
    return layers


def reasons_to_stay(
    model: RTLModel, granularity: str, example_inputs: Mapping[str, Tensor] | None = None
) -> list[str]:
    """Why some units are not prunable, with the names of their layers; none if all are."""
    covered = set(model.mask_bank.weight_names)
    left = [
        f"{layer.name} (read by {layer.readers[0][0]})"
        for layer in model.unit_layers(example_inputs)
        if layer.kind == granularity and not all(name in covered for name, _ in layer.readers)
    ]
    reasons = [f"no mask covers what reads {', '.join(left)}"] if left else []
    unknown = unknown_experts(model.backbone) if granularity == "neuron" else []
    if unknown:
        reasons.append(f"it is not known how the experts compute that hold {', '.join(unknown)}")
    return reasons


def readers(layers: Sequence[UnitLayer]) -> list[str]:
    """Names of the weights that read units, each once."""
    return list(dict.fromkeys(name for layer in layers for name, _ in layer.readers))


def surviving_units(masks: Mapping[str, Tensor], layers: Sequence[UnitLayer]) -> list[Tensor]:
    """The units of which masks keep a weight that reads them: `bool [num_units]` per layer."""
    return [
        torch.stack(
            [_by_unit(layer.own(masks[name]), dim, layer.places[name, dim]).any(1) for name, dim in layer.readers]
        ).any(0)
        for layer in layers
    ]


def unit_scores(weights: Mapping[str, Tensor], layers: Sequence[UnitLayer], sums: Sums | None = None) -> list[Tensor]:
    """
    The score of every unit, `float64 [num_units]` per layer: its activity, by the sums of the squared inputs of its
    readers; without sums its magnitude, the squared norm of all its weights. `weights` are masked.
    """
    if sums is None:
        return [
            torch.stack(
                [
                    _by_unit(layer.own(weights[name]), dim, units).double().square().sum(1)
                    for (name, dim), units in layer.places.items()
                    if name in weights
                ]
            ).sum(0)
            for layer in layers
        ]
    return [
        unit_activity(
            [layer.own(sums[name][0] / sums[name][1])[layer.places[name, dim]] for name, dim in layer.readers],
            [layer.own(weights[name]).cpu().movedim(dim, 0)[layer.places[name, dim]] for name, dim in layer.readers],
        )
        for layer in layers
    ]


def count_units(bank: MaskBank, layers: Sequence[UnitLayer]) -> list[int]:
    """The number of units that survive in the masks of each route."""
    masks = [dict(zip(bank.weight_names, bank[route], strict=True)) for route in range(bank.num_routes)]
    return [sum(int(units.sum()) for units in surviving_units(each, layers)) for each in masks]


def without_units(
    masks: Mapping[str, Tensor], layers: Sequence[UnitLayer], kept: Sequence[Tensor]
) -> dict[str, Tensor]:
    """The masks without all weights of the units that are not kept, on the CPU."""
    found = {name: mask.cpu().clone() for name, mask in masks.items()}
    for layer, units in zip(layers, kept, strict=True):
        for (name, dim), places in layer.places.items():
            if name in found:
                layer.own(found[name]).index_fill_(dim, places[~units].flatten(), False)
    return found


def _by_unit(tensor: Tensor, dim: int, units: Tensor) -> Tensor:
    """The elements of a tensor that belong to each unit along `dim`: `[num_units, n]`."""
    return tensor.movedim(dim, 0)[units.to(tensor.device)].flatten(1).cpu()


# Weights


def weight_scores(network: nn.Module, weights: Mapping[str, Tensor], sums: Sums) -> list[Tensor]:
    """The activity of every weight, by the sums of the squared inputs that it multiplies. `weights` are masked."""
    scores = []
    for name, weight in weights.items():
        layer = _layer(network, name)
        # Experts are what the groups of a convolution are: each multiplies inputs of its own.
        squares = sums[name][0].flatten() if are_fused(layer) else sums[name][0]
        found = weight_activity(_as_rows(layer, weight.cpu()), squares)
        scores.append(_from_rows(layer, found).to(weight.device))
    return scores


def prune_weights(
    network: nn.Module,
    weights: Mapping[str, Tensor],
    masks: Sequence[Tensor],
    *,
    scope: str,
    scores: Sequence[Tensor] | None = None,
    **options: Any,
) -> list[Tensor]:
    """[`prune`], where a row is what an output of a layer multiplies, of whichever layout, and of each expert."""
    if scope != "row":
        return prune(list(weights.values()), masks, scope=scope, scores=scores, **options)
    layers = [_layer(network, name) for name in weights]

    def turned(tensors: Iterable[Tensor]) -> list[Tensor]:
        return [_as_rows(layer, tensor) for layer, tensor in zip(layers, tensors, strict=True)]

    given = None if scores is None else turned(scores)
    found = prune(turned(weights.values()), turned(masks), scope=scope, scores=given, **options)
    return [_from_rows(layer, mask) for layer, mask in zip(layers, found, strict=True)]


def _layer(network: nn.Module, name: str) -> Any:
    return network.get_submodule(name.rpartition(".")[0])


def _as_rows(layer: Any, tensor: Tensor) -> Tensor:
    """The weight of a layer with its outputs along the first dimension, those of fused experts below one another."""
    if isinstance(layer, Conv1D):
        return tensor.T
    if are_fused(layer):
        return (tensor.mT if layer.is_transposed else tensor).flatten(0, 1)
    return tensor


def _from_rows(layer: Any, rows: Tensor) -> Tensor:
    """The weight that [`_as_rows`] turned."""
    if isinstance(layer, Conv1D):
        return rows.T
    if are_fused(layer):
        stack = rows.view(len(layer.down_proj), -1, rows.shape[1])
        return stack.mT if layer.is_transposed else stack
    return rows
