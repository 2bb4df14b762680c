"""Tickets that are kept in memory, ready to answer, for evaluation without gradients."""

from __future__ import annotations

import contextlib
import operator
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor

from .checks import check_choice
from .configuration_rtl import COMPUTE
from .mask_bank import integer_dtype
from .masking import mask_weight, ordinary_tensors
from .prunable import parameter_at


# A table of a module, which holds its attributes or its buffers, with a key and the value that a ticket has there.
Place = tuple[dict[str, Any], str, Any]

# How many elements of each tensor are compared with those of the call before.
NUM_PROBES = 4

_ABSENT = object()

_VERSION, _REQUIRES_GRAD = operator.attrgetter("_version"), operator.attrgetter("requires_grad")


@dataclass
class CachedTicket:
    """
    What stands in the layers of a backbone while a ticket answers.

    Args:
        places (`list[Place]`): where, and what.
        own (`list[Tensor]`): the tensors among that which belong to this ticket alone.
        masked (`list[Tensor]`): those of them that are masked weights of full size, in the order of the mask bank.
    """

    places: list[Place]
    own: list[Tensor]
    masked: list[Tensor] = field(default_factory=list)
    counts: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.counts = self._counts()

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the context the layers are those of the ticket."""
        before = [table.get(key, _ABSENT) for table, key, _ in self.places]
        try:
            for table, key, value in self.places:
                table[key] = value
            yield
        finally:
            for (table, key, _), value in zip(self.places, before, strict=True):
                if value is _ABSENT:
                    del table[key]
                else:
                    table[key] = value

    def is_intact(self) -> bool:
        """Whether nobody has changed the tensors of this ticket, as code may do while they are in place."""
        return self.counts == self._counts()

    def num_bytes(self) -> int:
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in self.own}
        return sum(storages.values())

    def _counts(self) -> list[int]:
        return [tensor._version for tensor in self.own]


class TicketCache:
    """
    The tickets that answered last: as many as fit into `mask_cache_bytes` of the configuration, at least one.

    Each call compares what tickets are made of with what it was: modules, parameters, masks, rows of private
    parameters and of statistics. It compares which tensors they are, where their memory is, and torch's count of
    changes in place. On CPUs it also compares a few elements, since torch does not count changes of `weight.data`.
    """

    def __init__(self) -> None:
        self.tickets: OrderedDict[int, CachedTicket] = OrderedDict()
        self._sources: _Sources | None = None

    def get(self, model: Any, route: int) -> CachedTicket | None:
        """
        The ticket of `route`, an index or -1 for the union; `None` where weights are offloaded. The caller holds the
        lock of the model's active route, and has located the weights.

        Raises:
            ValueError: `compute` of the configuration is unknown, or `"small"`, and the units of the backbone cannot
                be found.
        """
        sources, spare = _Sources(model), None
        if self._sources is None or not self._sources.are_still(sources):
            check_choice("compute", model.config.compute, COMPUTE)
            spare = next(iter(self.tickets.values()), None)
            self.clear()
            if sources.are_offloaded():
                return None
            model.masker.check_shapes()
            sources.watch(model.masker.tree.statistics())
            self._sources = sources
        ticket = self.tickets.get(route)
        if ticket is None or not ticket.is_intact():
            ticket = self._make(model, route, spare or self._make_room(model))
            self.tickets[route] = ticket
        self.tickets.move_to_end(route)
        return ticket

    def clear(self) -> None:
        """Frees all tickets."""
        self.tickets.clear()
        self._sources = None

    def num_bytes(self) -> int:
        return sum(ticket.num_bytes() for ticket in self.tickets.values())

    def _make_room(self, model: Any) -> CachedTicket | None:
        """Drops the tickets that answered longest ago until another one fits. Returns the last one dropped."""
        one, dropped = sum(weight.nbytes for weight in model.masker.weights), None
        while self.tickets and self.num_bytes() + one > model.config.mask_cache_bytes:
            dropped = self.tickets.popitem(last=False)[1]
        return dropped

    def _make(self, model: Any, route: int, spare: CachedTicket | None) -> CachedTicket:
        with ordinary_tensors(), torch.no_grad():
            if model.config.compute == "small":
                return _small_ticket(model, route)
            return _full_ticket(model, route, [] if spare is None else spare.masked)

    def __reduce__(self):
        # Copies and pickles of a model start without tickets.
        return TicketCache, ()


class _Sources:
    """What the tickets of `model` are made of, at this moment."""

    def __init__(self, model: Any) -> None:
        tree, private = model.masker.tree, model.private_parameters
        self.others = [tree, model.config.compute]
        self.masks = model.mask_bank.packed
        self.statistics = [] if model.norm_statistics is None else model.norm_statistics.rows
        if model.config.compute == "small":
            self.copied = [*tree.parameters(), *tree.statistics(), *private.rows, *self.statistics]
        else:
            own = map(parameter_at, private.places(tree.named_modules))
            self.copied = [*model.masker.located_weights, *own, *private.rows]
        # None of these is freed while it is compared with others, so that none gets its memory.
        self.tensors = [*self.masks, *self.statistics, *self.copied]
        self.counts = _count_changes(self.copied, self.masks)

    def watch(self, statistics: Sequence[Tensor]) -> None:
        """
        Takes note of some elements, so that this object can tell later whether others are equal to it. `statistics`:
        the layers' own.
        """
        # Rows of the same type are not copied: views of them stand in the layers.
        pairs = zip(self.statistics, statistics, strict=True) if self.statistics else ()
        self.cast = [rows for rows, own in pairs if rows.dtype != own.dtype]
        self.cast_counts = _count_changes(self.cast, [])
        with ordinary_tensors():
            self.probes = [_probe(tensor) for tensor in self.copied if tensor.is_cpu and _is_dense(tensor)]
        self.found = self._look()

    def are_still(self, others: _Sources) -> bool:
        """Whether `others`, of the same model, are what this object has taken note of, and have not changed."""
        return (
            self.counts is not None
            and self.cast_counts is not None
            and self.counts == others.counts
            and self.others == others.others
            and len(self.tensors) == len(others.tensors)
            and all(map(operator.is_, self.tensors, others.tensors))
            and self.cast_counts == _count_changes(self.cast, [])
            and self.found == self._look()
        )

    def are_offloaded(self) -> bool:
        return any(tensor.is_meta for tensor in self.tensors)

    def _look(self) -> bytes:
        return numpy.concatenate(self.probes).tobytes() if self.probes else b""


def _count_changes(copied: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Any] | None:
    """What torch counts, and where memory is; `None` if that cannot be known."""
    try:
        # As `tensor._version for …`, without the time that Python's loops take when their code is not in its cache.
        return [
            *map(_VERSION, copied),
            *map(Tensor.data_ptr, copied),
            *map(_REQUIRES_GRAD, copied),
            *map(_VERSION, masks),
        ]
    except RuntimeError:  # inference tensors count nothing
        return None


def _full_ticket(model: Any, route: int, spare: Sequence[Tensor]) -> CachedTicket:
    """The ticket with zeros in its weights, as `extract_ticket` makes it, in the memory of `spare` if that fits."""
    masker, bank = model.masker, model.mask_bank
    places: list[Place] = []
    masked = []
    for index, (weight, rows) in enumerate(zip(masker.weights, bank.packed, strict=True)):
        memory = spare[index] if index < len(spare) and _layout(spare[index]) == _layout(weight) else None
        masked.append(mask_weight(rows, route, weight, memory))
        places += [(module.__dict__, attribute, masked[-1]) for module, attribute in masker.places[index]]
    own: list[Any] = list(masked)
    for module, attribute, row in model.private_parameters.stand_ins(masker.tree.named_modules, route, lambda: None):
        places.append((module.__dict__, attribute, row))
        own.append(row)
    if model.norm_statistics is not None:
        found = zip(
            masker.tree.tracked_buffers, masker.tree.statistics(), model.norm_statistics.row(route), strict=True
        )
        for (module, name), statistics, row in found:
            # Counts of batches matter in training alone.
            if row.is_floating_point():
                value = row.to(statistics.dtype)
                places.append((module._buffers, name, value))
                own += [value] if value is not row else []
    return CachedTicket(places, own, masked)


def _small_ticket(model: Any, route: int) -> CachedTicket:
    """The ticket without the units that it does not use, as `extract_ticket(…, small=True)` makes it."""
    small = model.make_small_ticket(route)
    masker, private = model.masker, model.private_parameters
    replaced = {(id(module), attribute) for places in masker.places for module, attribute in places}
    replaced |= {(id(module), attribute) for module, attribute in private.places(masker.tree.named_modules)}
    tracked = set() if model.norm_statistics is None else {id(module) for module, _ in masker.tree.tracked_buffers}
    places: list[Place] = []
    own = []
    for module, other in zip(masker.tree.named_modules.values(), small.modules(), strict=True):
        attributes = module.__dict__
        for key, value in other.__dict__.items():
            if isinstance(value, int) and attributes.get(key) != value:
                places.append((attributes, key, value))
        for key, parameter in other._parameters.items():
            if parameter is not None and (
                (id(module), key) in replaced or parameter.shape != module._parameters[key].shape
            ):
                places.append((attributes, key, parameter.detach().requires_grad_(parameter.requires_grad)))
                own.append(places[-1][2])
        for key, buffer in other._buffers.items():
            if buffer is not None and (id(module) in tracked or buffer.shape != module._buffers[key].shape):
                places.append((module._buffers, key, buffer))
                own.append(buffer)
    return CachedTicket(places, own)


def _layout(tensor: Tensor) -> tuple:
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride()


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements of a tensor fill their memory from its beginning, as those of parameters do."""
    return tensor.untyped_storage().nbytes() >= (tensor.storage_offset() + tensor.numel()) * tensor.itemsize


def _probe(tensor: Tensor) -> Any:
    """A view of some elements of a dense tensor, as integers, since NaN equals nothing."""
    step = tensor.numel() // NUM_PROBES | 1  # odd, so that not all lie in one column
    bits = tensor.detach()
    if tensor.is_floating_point():
        bits = bits.view(integer_dtype(tensor.dtype))
    return bits.as_strided((-(-tensor.numel() // step),), (step,)).numpy()
