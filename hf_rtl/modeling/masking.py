"""Puts masked weights temporarily in place of a backbone's prunable parameters."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .mask_bank import MaskBank, fold, integer_dtype, unpack, unpack_as_integers
from .module_tree import ModuleTree
from .norm_statistics import BoundStatistics
from .offloading import StandIn
from .prunable import parameter_at, refuse_unmaskable


# The index of the union of all tickets, in place of a route's.
UNION = -1


class WeightMasker:
    """
    Applies masks of a bank to the prunable weights of a backbone.

    While applied, every module that holds a prunable weight sees where(mask, weight, 0) under the weight's attribute,
    tied places included. The parameters themselves stay registered and untouched, and receive masked gradients.

    Masks are used as integers of the weight's size with all bits set where kept: the bitwise AND equals `where` to the
    bit (a pruned infinity becomes 0, not NaN) and is several times faster on CPUs.

    Args:
        backbone (`nn.Module`): holds the weights that `bank` names.
        bank (`MaskBank`): the masks.
        cache_bytes (`int`): bound on unpacked masks kept; those of the latest route are always kept.

    Raises:
        ValueError: a weight of the bank is missing in the backbone or has another shape.
    """

    def __init__(self, backbone: nn.Module, bank: MaskBank, *, cache_bytes: int) -> None:
        self.backbone = backbone
        self.bank = bank
        self.cache_bytes = cache_bytes
        self.places: list[list[tuple[nn.Module, str]]] = []
        self.tree: ModuleTree
        self.located_weights: list[nn.Parameter]
        try:
            self._find()
        except ValueError as error:
            raise ValueError(f"`prunable` does not fit the backbone: {error}") from error
        # Routes that a gradient has flowed through since the last optimizer step, for the masked update (`optim.py`).
        self.routes_since_update: set[int] = set()
        self.cache: OrderedDict[tuple[int, ...], list[Tensor]] = OrderedDict()
        self._cache_key: tuple = ()
        self._copies: list[Tensor] = []

    @property
    def weights(self) -> list[nn.Parameter]:
        """The prunable parameters, in the bank's order."""
        return [parameter_at(places[0]) for places in self.places]

    def masks(self, routes: Sequence[int]) -> list[Tensor]:
        """Union of the masks of `routes` (`UNION`: of all), as integers of the weights' sizes, on their device."""
        weights = self.weights
        cache_key = (
            self.bank.num_changes,
            *((weight.device, weight.dtype) for weight in weights),
            *((0 if rows.is_inference() else rows._version, rows.data_ptr()) for rows in self.bank.packed),
        )
        if cache_key != self._cache_key:
            self.cache.clear()
            self._cache_key = cache_key
        key = tuple(sorted(set(routes)))
        if key not in self.cache:
            self._make_room()
            # Even if the first call is in inference mode: training uses them later.
            with ordinary_tensors():
                self.cache[key] = [
                    unpack_as_integers(row.to(weight.device), weight.shape, weight.dtype)
                    for row, weight in zip(self.bank.packed_union(None if UNION in key else key), weights, strict=True)
                ]
        self.cache.move_to_end(key)
        return self.cache[key]

    def apply(self, route: int, *, fresh: bool) -> Sequence[Tensor]:
        """
        The masked weights of `route`, without memory where the weights are offloaded.

        Args:
            route (`int`): index of a route, or `UNION`.
            fresh (`bool`): whether to allocate new tensors, so that graphs of several routes can live at once, rather
                than overwrite the persistent copy.
        """
        self.check_shapes()
        weights = self.located_weights
        masks, on_backward = self.masks([route]), partial(self.routes_since_update.add, route)
        # After a write in inference mode, a backward that still needs the overwritten values would not raise.
        with ordinary_tensors():
            copies = [torch.empty_like(weight) for weight in weights] if fresh else self._persistent(weights)
            return like_parameters(MaskWeights.apply(masks, copies, on_backward, *weights), weights)

    @torch.no_grad()
    def apply_mean(self) -> list[Tensor]:
        """
        Every weight times the fraction of routes that keep it. The products require gradients. Masks are unpacked one
        at a time.
        """
        means = []
        for rows, shape, weight in zip(self.bank.packed, self.bank.shapes, self.weights, strict=True):
            kept = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
            for row in rows:
                kept += unpack(row.to(weight.device), shape)
            means.append(torch.where(kept > 0, weight * (kept / len(rows)), 0).requires_grad_())
        return means

    @torch.no_grad()
    def along_masks(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """
        For each route, `float32 [num_routes]`, the sum of gradient times weight over its kept weights: the derivative
        with respect to the coefficient of its mask. A weight without a gradient adds nothing. Masks are unpacked one
        at a time.
        """
        sums = torch.zeros(self.bank.num_routes, device=self.weights[0].device)
        for rows, weight, gradient in zip(self.bank.packed, self.weights, gradients, strict=True):
            if gradient is not None:
                products = (gradient * weight).float()
                for route, row in enumerate(rows):
                    sums[route] += products[unpack(row.to(weight.device), weight.shape)].sum()
        return sums

    def stand_ins(self, masked: Sequence[Tensor], route: int) -> list[StandIn]:
        """What puts the `masked` weights of `route` into the layers, by `offloading.standing_in`."""
        return [
            (module, attribute, partial(mask_weight, rows, route) if weight.is_meta else weight)
            for places, weight, rows in zip(self.places, masked, self.bank.packed, strict=True)
            for module, attribute in places
        ]

    def cached_bytes(self) -> int:
        return sum(mask.nbytes for masks in self.cache.values() for mask in masks)

    def forget(self) -> None:
        """Frees the unpacked masks and the masked copy."""
        self.cache.clear()
        self._copies = []

    def locate(self) -> None:
        """
        Finds every (module, attribute) that holds a weight of the bank, in the bank's order, if modules or parameters
        were replaced since the last time. Loading a model, for one, ties weights after this object is made.

        Raises:
            ValueError: a weight is missing, has another shape, or is no ordinary tensor.
        """
        if not self.tree.is_current():
            self._find()

    def check_shapes(self) -> None:
        """Raises `ValueError` if a weight has got another shape since it was located."""
        if [weight.shape for weight in self.located_weights] != self.bank.shapes:
            self._find()

    def _find(self) -> None:
        tree = ModuleTree(self.backbone)
        aliases = tree.aliases
        for name, shape in zip(self.bank.weight_names, self.bank.shapes, strict=True):
            if name not in aliases:
                _refuse_replaced(self.backbone, name)
            weight = None if name not in aliases else parameter_at(aliases[name][0])
            if weight is not None:
                refuse_unmaskable(name, weight)
            if weight is None or weight.shape != shape:
                there = "no such weight" if weight is None else tuple(weight.shape)
                raise ValueError(
                    f"the masks are for another backbone: they cover {name} of shape {tuple(shape)}, but "
                    f"{type(self.backbone).__name__} has {there}."
                )
        found = [aliases[name] for name in self.bank.weight_names]
        # A tied weight that accelerate offloads becomes another tensor at each of its places.
        self.places = [
            max(new, old, key=len) if parameter_at(new[0]).is_meta else new
            for new, old in zip(found, self.places or found, strict=True)
        ]
        self.tree = tree
        self.located_weights = self.weights

    def _persistent(self, weights: Sequence[Tensor]) -> list[Tensor]:
        layouts = [(weight.dtype, weight.device, weight.stride()) for weight in weights]
        if layouts != [(copy.dtype, copy.device, copy.stride()) for copy in self._copies]:
            self._copies = [torch.empty_like(weight, requires_grad=False) for weight in weights]
        return self._copies

    def _make_room(self) -> None:
        one = sum(weight.nbytes for weight in self.weights)
        while self.cache and self.cached_bytes() + one > self.cache_bytes:
            self.cache.popitem(last=False)


def _refuse_replaced(backbone: nn.Module, name: str) -> None:
    """Raises `ValueError` if the layer that had the weight `name` is still there, without it."""
    layer = dict(backbone.named_modules()).get(name.rpartition(".")[0])
    if layer is not None:
        raise ValueError(
            f"{name} cannot be masked, as {type(layer).__module__}.{type(layer).__name__} has no such weight: the "
            "layer was quantised, parametrised or replaced after wrapping. Do that to a ticket instead, a plain model "
            "that `model.extract_ticket(route)` makes before."
        )


def mask_weight(rows: Tensor, route: int, weight: Tensor, memory: Tensor | None = None) -> Tensor:
    """
    `weight` with zeros where the mask of `route`, among its packed `rows`, has none; no gradient flows into it. It may
    take the `memory` of a tensor of the same layout.
    """
    with ordinary_tensors(), torch.no_grad():
        row = fold(rows, torch.bitwise_or) if route == UNION else rows[route]
        mask = unpack_as_integers(row.to(weight.device), weight.shape, weight.dtype)
        # Another tensor object, since autocast knows by that what it has cast.
        copy = torch.empty_like(weight, requires_grad=False) if memory is None else memory.detach()
        torch.bitwise_and(weight.view(mask.dtype), mask, out=copy.view(mask.dtype))
        return copy.requires_grad_(weight.requires_grad)


class MaskWeights(torch.autograd.Function):
    """Masks weights into given tensors, and their gradients in place."""

    @staticmethod
    def forward(
        ctx, masks: list[Tensor], copies: list[Tensor], on_backward: Callable[[], None], *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.masks = masks
        ctx.on_backward = on_backward
        ctx.set_materialize_grads(False)
        for mask, copy, weight in zip(masks, copies, weights, strict=True):
            torch.bitwise_and(weight.view(mask.dtype), mask, out=copy.view(mask.dtype))
        # The outputs share storage and version counter with the copies: a backward through a graph whose masked
        # weights have been overwritten meanwhile raises instead of giving wrong gradients.
        outputs = tuple(copy.detach() for copy in copies)
        frozen = (output for output, weight in zip(outputs, weights, strict=True) if not weight.requires_grad)
        ctx.mark_non_differentiable(*frozen)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.on_backward()
        # Two weights that are added have one gradient tensor in common.
        shared = Counter(gradient.data_ptr() for gradient in gradients if gradient is not None)
        masked = (
            None
            if gradient is None
            else and_masks(gradient.clone() if shared[gradient.data_ptr()] > 1 else gradient, mask)
            for gradient, mask in zip(gradients, ctx.masks, strict=True)
        )
        return None, None, None, *masked


@contextlib.contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Makes no inference tensors, in inference mode either, and records a graph only where one is recorded outside."""
    records = torch.is_grad_enabled()  # which leaving inference mode turns on
    with torch.inference_mode(False), torch.set_grad_enabled(records):
        yield


def like_parameters(tensors: Sequence[Tensor], parameters: Sequence[Tensor]) -> Sequence[Tensor]:
    """
    `tensors`, which stand in for `parameters`, requiring a gradient where those do, also where none is recorded: by
    that `torch.matmul` chooses its kernel, and so its rounding.
    """
    if not torch.is_grad_enabled():
        for tensor, parameter in zip(tensors, parameters, strict=True):
            tensor.requires_grad_(parameter.requires_grad)
    return tensors


def and_masks(values: Tensor, mask: Tensor) -> Tensor:
    """
    `values` with zeros where the integer `mask` has no bits set. The memory of `values` is reused if it is contiguous
    and no view, so only the returned tensor may be used.
    """
    mask = mask.to(integer_dtype(values.dtype))
    bits = values.view(mask.dtype)
    if values.is_contiguous() and values._base is None:
        bits.bitwise_and_(mask)
        return values
    return torch.bitwise_and(bits, mask).view(values.dtype)


class ActiveRoute:
    """The route that a model's context has in place, and the lock that guards it. Copies start without a route."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._route: int | None = None
        self.statistics: BoundStatistics

    @property
    def held(self) -> bool:
        """Whether any thread is inside a context."""
        return self._route is not None

    @property
    @torch.compiler.disable
    def route(self) -> int | None:
        """The route of this thread's context."""
        return self._route if self._owner == threading.get_ident() else None

    @contextlib.contextmanager
    def hold(self, route: int, *, wait: bool) -> Iterator[None]:
        """Raises `RuntimeError` if this thread holds a route; without `wait`, also if another thread does."""
        if self.route is not None:
            raise RuntimeError(
                f"route_context({route}) inside the active route_context({self.route}); leave that first."
            )
        if not self._lock.acquire(blocking=wait):
            raise RuntimeError(f"another thread is training route {self._route} of this model; train in one thread.")
        self._owner, self._route = threading.get_ident(), route
        try:
            yield
        finally:
            self._owner = self._route = None
            self._lock.release()

    def __reduce__(self):
        return ActiveRoute, ()
