"""A ticket without the units that it does not use: a stock model of smaller shapes, which its configuration says."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, default_data_collator

from .refit import can_refit, refit
from .standalone import TensorOutputs, make_example_inputs, refuse_to_save, slice_channels
from .structure import tensor_shapes
from .units import UnitLayer, find_units


logger = logging.getLogger(__name__)


@torch.no_grad()
def remove_units(
    ticket: PreTrainedModel,
    example_inputs: Mapping[str, Tensor] | None = None,
    *,
    layers: Sequence[UnitLayer] | None = None,
) -> PreTrainedModel:
    """
    A copy of a plain model without the units that nothing reads: those whose weights in all readers are zero.

    If its configuration can say the smaller shapes, as by `intermediate_size`, the copy has such a configuration: the
    library that the model is of saves and loads it. Layers that the configuration gives one size, such as the experts
    of a model, keep as many units as the largest of them needs, fused experts a multiple of 8. If it cannot, every
    layer loses all such units, and `save_pretrained` raises a `ValueError`. Outputs agree to rounding: 1e-6 relative
    in float32.

    Args:
        ticket (`PreTrainedModel`): stays as it is.
        example_inputs (`Mapping[str, Tensor]`, *optional*): arguments of a forward, two samples or more. Defaults to
            images of the configured size, or to `dummy_inputs`.
        layers (`Sequence[UnitLayer]`, *optional*): those of a network of the same structure, if they are known.

    Raises:
        ValueError: no `example_inputs`, and none can be made for this model; or its code needs the sizes that it has.
    """
    layers = find_units(ticket, example_inputs) if layers is None else layers
    used = [used_units(ticket, layer) for layer in layers]
    small = copy.deepcopy(ticket)
    config = _smaller_config(ticket, layers, used)
    if config is None:
        # Experts of one stack have one size.
        counts = {tuple(layer.places): 1 for layer in layers}
        for layer, count in zip(layers, _needed(layers, used), strict=True):
            counts[tuple(layer.places)] = max(counts[tuple(layer.places)], count)
        kept = [_at_least(mask, counts[tuple(layer.places)]) for layer, mask in zip(layers, used, strict=True)]
    else:
        said = _counts(tensor_shapes(_build(ticket, config)), tensor_shapes(ticket), layers)
        assert said is not None
        kept = [_at_least(mask, count) for mask, count in zip(used, said, strict=True)]
        small.config = config
    slice_channels(small, _kept_indices(small, layers, kept))
    _check_outputs(ticket, small, example_inputs)
    if config is None and not all(mask.all() for mask in kept):
        small.save_pretrained = small.push_to_hub = refuse_to_save
    return small


@torch.no_grad()
def refit_ticket(ticket: PreTrainedModel, dense: PreTrainedModel, data: Any, layers: Sequence[UnitLayer]) -> None:
    """
    Solves anew, in place, the weights of a ticket that read units, so that they give what all units of the network
    without masks give; see [`refit`].

    Args:
        ticket (`PreTrainedModel`): a plain model in which some units are read by zeros only.
        dense (`PreTrainedModel`): the same without masks; it changes.
        data: a map-style data set of what the model takes, or batches of it that can be read several times, such as a
            `DataLoader`.
        layers (`Sequence[UnitLayer]`): the layers of units.
    """
    names = set(inspect.signature(ticket.forward).parameters) - {"labels", "kwargs"}
    loader = data if not hasattr(data, "__getitem__") else DataLoader(data, 16, collate_fn=default_data_collator)

    def batches() -> Iterator[dict[str, Any]]:
        for batch in loader:
            yield {name: value.to(ticket.device) for name, value in batch.items() if name in names}

    refit(dense, layers, [used_units(ticket, layer) for layer in layers], batches)
    for layer in filter(partial(can_refit, ticket), layers):
        reader = layer.readers[0][0].rpartition(".")[0]
        for own, solved in zip(
            ticket.get_submodule(reader).parameters(), dense.get_submodule(reader).parameters(), strict=True
        ):
            own.copy_(solved)


def used_units(network: nn.Module, layer: UnitLayer) -> Tensor:
    """The units of a layer that any weight other than zero reads: `bool [num_units]`."""
    used = torch.zeros(layer.num_units, dtype=torch.bool)
    for name, dim in layer.readers:
        weight = network.get_parameter(name).detach()
        read = (layer.own(weight) != 0).movedim(dim, 0).flatten(1).any(1).cpu()
        used |= read[layer.places[name, dim]].any(1)
    return used


def _needed(layers: Sequence[UnitLayer], used: Sequence[Tensor]) -> list[int]:
    """How many units each layer keeps at least. Grouped products of experts take multiples of 16 bytes alone."""
    multiples = [1 if layer.expert is None else 8 for layer in layers]
    counts = [-(-int(mask.sum()) // multiple) * multiple for mask, multiple in zip(used, multiples, strict=True)]
    return [min(layer.num_units, count) for layer, count in zip(layers, counts, strict=True)]


def _at_least(used: Tensor, count: int) -> Tensor:
    """`used` with the first of the other units, so that there are `count`."""
    others = (~used).nonzero().squeeze(1)[: count - int(used.sum())]
    return used.index_fill(0, others, True)


def _kept_indices(
    network: nn.Module, layers: Sequence[UnitLayer], kept: Sequence[Tensor]
) -> dict[str, dict[int, Tensor]]:
    """What [`slice_channels`] takes. Units of several layers may lie along one dimension."""
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    left: dict[str, dict[int, Tensor]] = {}
    for layer, mask in zip(layers, kept, strict=True):
        for (name, dim), of_units in layer.places.items() if not mask.all() else ():
            shape = tensors[name].shape
            sizes = [shape[dim]] if layer.expert is None else [shape[0], shape[dim]]
            along = left.setdefault(name, {}).setdefault(dim, torch.ones(sizes, dtype=torch.bool))
            layer.own(along)[of_units[~mask].flatten()] = False
    return {
        name: {dim: along.nonzero()[:, -1].view(*along.shape[:-1], -1) for dim, along in dims.items()}
        for name, dims in left.items()
    }


# Configurations


def _smaller_config(ticket: PreTrainedModel, layers: Sequence[UnitLayer], used: Sequence[Tensor]) -> Any:
    """
    The configuration of `ticket` with as few units as it can say, no layer with fewer than it uses; `None` if it can
    say none. Each change is tried: a model of the changed configuration, without memory, has the right shapes or not.
    """
    needed = _needed(layers, used)
    shapes, config, counts = tensor_shapes(ticket), copy.deepcopy(ticket.config), [layer.num_units for layer in layers]
    found = False
    for old in sorted({layer.num_units for layer in layers}):
        new = max(need for layer, need in zip(layers, needed, strict=True) if layer.num_units == old)
        if new == old:
            continue
        for edit in _edits(ticket, old, max(new, 1)):
            trial = copy.deepcopy(config)
            try:
                edit(trial)
                built = tensor_shapes(_build(ticket, trial))
            except Exception:  # whatever a configuration or model raises that cannot have these sizes
                continue
            of_trial = _counts(built, shapes, layers)
            if of_trial and of_trial != counts and all(a >= b for a, b in zip(of_trial, needed, strict=True)):
                config, counts, found = trial, of_trial, True
    return config if found else None


def _edits(ticket: PreTrainedModel, old: int, new: int) -> Iterator[Any]:
    """Changes of a configuration that may say `new` units in place of `old`."""
    timm_model: Any = getattr(ticket, "timm_model", None)
    if timm_model is not None:
        width: Any = getattr(timm_model, "num_features", old)  # own models may lack it
        ratios = [("base_width", 64 * new // old)]
        ratios += [("mlp_ratio", (new + rest) / width) for rest in (0, 0.5)]
        for name, value in ratios:
            yield lambda config, name=name, value=value: setattr(
                config, "model_args", {**(config.model_args or {}), name: value}
            )
        return
    for path, value in _fields(ticket.config):
        if isinstance(value, int) and not isinstance(value, bool) and value == old or value is None:
            yield lambda config, path=path: _set(config, path, new)
        elif isinstance(value, (int, float)) and path[-1].endswith("ratio"):
            yield lambda config, path=path, value=value: _set(config, path, value * new / old)


def _fields(config: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The fields of a configuration, and of those in it, with the path to each."""
    inner = {name for name in config.sub_configs if getattr(config, name, None) is not None}
    for name, value in config.to_dict().items():
        if name not in inner and hasattr(config, name):
            yield (name,), value
    for name in inner:
        for path, value in _fields(getattr(config, name)):
            yield (name, *path), value


def _set(config: Any, path: tuple[str, ...], value: Any) -> None:
    *owners, name = path
    for owner in owners:
        config = getattr(config, owner)
    setattr(config, name, value)


def _build(ticket: PreTrainedModel, config: Any) -> nn.Module:
    with torch.device("meta"):
        return type(ticket)._from_config(copy.deepcopy(config))


def _counts(
    built: Mapping[str, list[int]], shapes: Mapping[str, list[int]], layers: Sequence[UnitLayer]
) -> list[int] | None:
    """The numbers of units in a model with the shapes `built`; `None` if it differs from `shapes` in anything else."""
    if built.keys() != shapes.keys():
        return None
    expected = {name: list(shape) for name, shape in shapes.items()}
    counts = []
    for layer in layers:
        # A tied weight has another name in the state.
        places = {place: indices for place, indices in layer.places.items() if place[0] in built}
        (name, dim), indices = next(iter(places.items()))
        width = indices.shape[1]
        count = layer.num_units - (shapes[name][dim] - built[name][dim]) // width
        # The experts of a stack have one size, so the first one speaks for all.
        for (name, dim), indices in places.items() if layer.expert in (None, 0) else ():
            expected[name][dim] -= (layer.num_units - count) * indices.shape[1]
        counts.append(count)
    return counts if expected == built else None


def _check_outputs(ticket: PreTrainedModel, small: nn.Module, example_inputs: Mapping[str, Tensor] | None) -> None:
    """Raises `ValueError` unless `small` runs and gives what `ticket` gives: its code may need the sizes it had."""
    inputs = make_example_inputs(ticket) if example_inputs is None else dict(example_inputs)
    inputs = {name: value.to(ticket.device) for name, value in inputs.items()}
    modes = [(model, model.training) for model in (ticket, small)]
    try:
        outputs = [list(TensorOutputs(model.eval())(**inputs)) for model, _ in modes]
        agree = all(
            torch.allclose(one.double(), other.double(), rtol=1e-3, atol=1e-3 * float(one.double().abs().max()))
            for one, other in zip(*outputs, strict=True)
        )
    except Exception as error:
        raise ValueError(
            f"{type(ticket).__name__} cannot lose units: its code needs the sizes that it has."
        ) from error
    finally:
        for model, mode in modes:
            model.train(mode)
    if not agree:
        raise ValueError(f"{type(ticket).__name__} cannot lose units: without those that nothing reads, it differs.")
