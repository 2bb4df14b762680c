"""Tickets in one pass: each keeps the units or weights of a trained model that do most on the data of its route."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import PartialState
from tabulate import tabulate
from torch import Tensor
from transformers import DataCollatorWithPadding, default_data_collator
from transformers.trainer_utils import RemoveColumnsCollator

from ..data.partition import Partition
from ..data.route_data import find_partition
from ..get_model import get_rtl_model, say
from ..modeling.checks import check_choice, check_integer
from ..modeling.modeling_rtl import RTLModel
from ..modeling.units import GRANULARITIES, UnitLayer
from ..pruning import check_sparsity
from .one_pass import Calibration, Search
from .randomness import seeded
from .ranking import reasons_to_stay
from .run_report import describe_search


CRITERIA = ("activity", "magnitude", "random")


def find_tickets(
    model: Any,
    dataset: Any,
    *,
    sparsity: float,
    route_column: str | None = None,
    granularity: str = "neuron",
    criterion: str = "activity",
    scope: str | None = None,
    round_to: int = 8,
    refit: bool | Sequence[str] = False,
    ridge: float = 1e-2,
    num_batches: int = 8,
    batch_size: int = 16,
    data_collator: Callable[[list], dict[str, Any]] | None = None,
    processing_class: Any = None,
    example_inputs: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    **options: Any,
) -> RTLModel:
    """
    Finds a ticket per route of a trained model in one pass over a few batches of each route, without training.

    Args:
        model: a trained model, a repo id, a folder or a timm name, as for [`get_rtl_model`]; or an [`RTLModel`], whose
            tickets become smaller. A built model is wrapped, and not copied. With `refit` a new [`RTLModel`] around
            the same backbone is made in any case, without router and thresholds.
        dataset (map-style data set of dicts): samples of all routes, with what the model takes.
        sparsity (`float`): the share of units, or of prunable weights, that is removed from each ticket.
        route_column (`str`, *optional*): the column with the route of a sample; see [`get_rtl_model`].
        granularity (`str`, defaults to `"neuron"`): what is removed: whole `"neuron"`s of feed-forward blocks and of
            fused experts, each of which is a layer, whole `"channel"`s between convolutions, or single weights,
            `"weight"`; see [`find_units`].
        criterion (`str`, defaults to `"activity"`): `"activity"` on the data, see [`unit_activity`] and
            [`weight_activity`]; `"magnitude"`: the norm of all weights of a unit, or of a weight; or `"random"`, to
            compare with.
        scope (`str`, *optional*): what is ranked together, see [`prune_units`] and [`prune`]. Defaults to `"layer"`
            for units, to `"row"` for the activity and `"global"` for the magnitude of weights.
        round_to (`int`, defaults to 8): layers keep a multiple of this number of units.
        refit (`bool` or `Sequence[str]`, defaults to `False`): whether the weights that read units are solved anew for
            each route, or for the routes of these names, see [`refit`]. They become private parameters of the routes.
            Those of experts stay as they are.
        ridge (`float`, defaults to 0.01): see [`refit`].
        num_batches (`int`, defaults to 8), batch_size (`int`, defaults to 16): samples of each route; at most all.
        data_collator (`Callable`, *optional*): makes a batch of samples. By default pads with the tokenizer
            `processing_class`, or else stacks.
        processing_class (*optional*): the tokenizer.
        example_inputs (`Mapping[str, Tensor]`, *optional*): arguments of a forward, for [`find_units`].
        seed (`int`, defaults to 0): which samples are drawn.
        **options: the same as for [`get_rtl_model`].

    Returns:
        [`RTLModel`]: in evaluation mode. With several processes all find the same tickets, also for another number of
        processes. Its `training_run`, from which its card is written, has in `rounds` one report like that of a round.

    Raises:
        TypeError, ValueError: a route without samples, a granularity that the model does not have, activities that are
            not finite, or what `get_rtl_model` and `prune_units` refuse. A routed model has not changed then.

    Example:
        >>> model = find_tickets(language_model, dataset, route_column="language", sparsity=0.5, refit=True)
        >>> model.extract_ticket("fr", small=True).save_pretrained("french")
    """
    sparsity = check_sparsity(sparsity)
    check_choice("granularity", granularity, GRANULARITIES)
    check_choice("criterion", criterion, CRITERIA)
    for name, value in (("num_batches", num_batches), ("batch_size", batch_size)):
        check_integer(name, value, minimum=1)
    if refit and granularity == "weight":
        raise ValueError("`refit` is for units: use `granularity='neuron'`, or leave it out.")
    routed, partition = _routed(model, dataset, route_column, options)
    refitted = _refitted_routes(refit, routed.route_names)
    collate = _collator(routed, data_collator, processing_class)
    data = Calibration(dataset, partition, collate, num_batches, batch_size, seed)
    data.check()
    search = Search(routed, data, example_inputs)
    with seeded((seed, 0), routed.device):
        if granularity == "weight":
            scope = scope or ("row" if criterion == "activity" else "global")
            masks = [search.prune_weights(route, sparsity, criterion, scope) for route in search.routes()]
        else:
            layers = search.unit_layers(granularity)
            kept = [
                search.prune_units(route, layers, criterion, sparsity, scope=scope or "layer", round_to=round_to)
                for route in search.routes()
            ]
            masks = [search.mask_of_units(route, layers, units) for route, units in enumerate(kept)]
            if refitted:
                routed = search.refitted(layers, kept, masks, refitted, ridge)
    if not refitted:
        for route, mask in enumerate(masks):
            routed.mask_bank[route] = mask
    routed.partition_rule = partition.rule
    one_pass = {"granularity": granularity, "criterion": criterion, "sparsity": sparsity, "refit": refitted}
    one_pass["num_samples"] = num_batches * batch_size
    processes = PartialState().num_processes
    routed.training_run = describe_search(routed, partition, one_pass, seed=seed, num_processes=processes)
    if granularity != "weight":
        say(_report(routed, layers, kept, sparsity))
        for reason in reasons_to_stay(search.model, granularity, example_inputs):
            say(f"Some units stay in all tickets: {reason}.")
    return routed.eval()


def _routed(
    model: Any, dataset: Any, route_column: str | None, options: Mapping[str, Any]
) -> tuple[RTLModel, Partition]:
    """The routed model of a search, and the routes of its samples."""
    routed = model
    if not isinstance(model, RTLModel):
        routed = get_rtl_model(model, dataset, route_column=route_column, **options)
    if route_column is None and routed.partition_rule is not None:
        partition = routed.partition_rule.assign(dataset)
    else:
        task = routed.config.ticket_task
        partition = find_partition(
            dataset, route_column=route_column, route_names=routed.route_names, ticket_task=task, allow_empty=True
        )
    return routed, partition


def _refitted_routes(refit: bool | Sequence[str], names: Sequence[str]) -> list[str]:
    """The names of the routes to refit."""
    chosen = (list(names) if refit else []) if isinstance(refit, bool) else list(refit)
    if isinstance(refit, str) or not set(chosen) <= set(names):
        raise ValueError(
            f"`refit` is {refit!r}; allowed are True, False, or a list of names of {', '.join(map(repr, names))}."
        )
    return chosen


def _collator(
    model: RTLModel, collate: Callable[[list], dict] | None, processing_class: Any
) -> Callable[[list], dict]:
    """What makes a batch, without columns that the backbone does not take and labels that it does not need."""
    if collate is None:
        collate = default_data_collator if processing_class is None else DataCollatorWithPadding(processing_class)
    names = set(inspect.signature(model.backbone.forward).parameters)
    if not model.backbone.config.is_encoder_decoder:
        names -= {"labels"}
    return RemoveColumnsCollator(collate, names - {"kwargs"})


def _report(model: RTLModel, layers: Sequence[UnitLayer], kept: Sequence[Sequence[Tensor]], sparsity: float) -> str:
    """What was asked, and what the tickets have: units, prunable weights and parameters that were removed."""
    num_units = sum(layer.num_units for layer in layers)
    sizes = {name: parameter.shape for name, parameter in model.backbone.named_parameters()}
    total = sum(shape.numel() for shape in sizes.values())
    density = model.mask_bank.density().tolist()
    rows = []
    for route, name in enumerate(model.route_names):
        shares = {weight: 1.0 for weight in sizes}
        for layer, units in zip(layers, kept[route], strict=True):
            for weight, _ in layer.places:
                if weight in shares:
                    share = float(units.double().mean())
                    if layer.expert is None:
                        shares[weight] *= share
                    else:
                        shares[weight] -= (1 - share) / sizes[weight][0]
        removed = 1 - sum(int(units.sum()) for units in kept[route]) / num_units
        left = sum(share * sizes[weight].numel() for weight, share in shares.items())
        rows.append([name, f"{removed:.1%}", f"{1 - density[route]:.1%}", f"{1 - left / total:.1%}"])
    headers = [f"removed (asked: {sparsity:.1%} of units)", "units", "prunable weights", "all parameters"]
    units = torch.stack([torch.cat(list(of_route)) for of_route in kept]).double()
    both = units @ units.T
    alike = both / (units.sum(1)[:, None] + units.sum(1) - both)
    table = tabulate(rows, headers=headers, colalign=("left", "right", "right", "right"))
    shared = f"At least one ticket keeps {float(units.amax(0).mean()):.1%} of the units"
    if len(units) > 1:
        pairs = alike[~torch.eye(len(units), dtype=torch.bool)]
        shared += f"; mean Jaccard similarity of two tickets {float(pairs.mean()):.3f}"
    return f"{table}\n{shared}."
