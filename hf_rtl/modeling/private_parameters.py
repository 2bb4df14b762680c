"""Parameters that no mask covers and of which every route has its own copy: a row per route."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .mask_bank import integer_dtype
from .masking import UNION, like_parameters, ordinary_tensors
from .offloading import StandIn
from .prunable import alias_names, heads, matching_patterns, parameter_aliases, parameter_at, refuse_unmatched


def select_private(backbone: nn.Module, patterns: Sequence[str], prunable: Sequence[str]) -> list[str]:
    """
    Names of the parameters that any of the `fnmatch` `patterns` matches, in the order of the backbone's modules.

    Args:
        backbone (`nn.Module`): holds the parameters.
        patterns (`Sequence[str]`): of whole names, such as `"*.bias"`.
        prunable (`Sequence[str]`): names of the weights that masks cover.

    Raises:
        ValueError: a pattern that matches nothing, a weight that masks cover, or a tied parameter.
    """
    places = parameter_aliases(backbone)
    module_names = {id(module): name for name, module in backbone.named_modules()}
    names = {name: alias_names(locations, module_names) for name, locations in places.items()}
    matching = {name: matching_patterns(names[name], patterns) for name in places}
    chosen = [name for name in places if matching[name]]
    for name in chosen:
        pattern = min(matching[name])
        if name in prunable:
            raise ValueError(
                f"`private_parameters` has the pattern {pattern!r}, which matches {name!r}: masks cover that weight, "
                "so that every route has its own part of it already. Narrow the pattern, or leave the weight out of "
                "the masks with `prune_exclude`."
            )
        if len(places[name]) > 1:
            raise ValueError(
                f"`private_parameters` has the pattern {pattern!r}, which matches {name!r}: that parameter is tied, "
                f"it is also {', '.join(map(repr, names[name][1:]))}, and a tied parameter cannot be private."
            )
    free = [name for name in places if name not in prunable]
    some = f"{', '.join(map(repr, free[:3])) or 'none'}{', …' if len(free) > 3 else ''}"
    what = f"parameter of {type(backbone).__name__}; those that no mask covers are {some}"
    refuse_unmatched("private_parameters", patterns, set().union(*matching.values()), what)
    return chosen


def norms_biases_and_head(backbone: nn.Module, prunable: Sequence[str]) -> list[str]:
    """
    Names of the parameters that a ticket may have for itself: those of one dimension, which are biases and the scales
    of norms, and those of the head. Prunable weights and tied parameters are left out.
    """
    head = {id(module) for part in heads(backbone) for module in part.modules()}
    return [
        name
        for name, places in parameter_aliases(backbone).items()
        if len(places) == 1 and name not in prunable and (parameter_at(places[0]).ndim < 2 or id(places[0][0]) in head)
    ]


class PrivateParameters(nn.Module):
    """
    The rows of a backbone's private parameters.

    Parameters `p0000, p0001, …` of shape `[num_routes, *shape]`, in the order of the backbone's modules; at first
    every row repeats the backbone's own parameter. All routes share one parameter, since DDP needs a gradient for each
    parameter in every step. Route -1, the union of all tickets, has no row: it uses the mean of the rows.

    While bound, the layers see a copy of a row under the parameter's attribute, and the row gets the gradient. The
    backbone's own parameters stay registered, but frozen: rows start from them.

    Args:
        backbone (`nn.Module`): holds the parameters.
        names (`Sequence[str]`): names of the private parameters, from `select_private`.
        num_routes (`int`): K.
    """

    def __init__(self, backbone: nn.Module, names: Sequence[str], num_routes: int) -> None:
        super().__init__()
        self.num_routes = num_routes
        self.names: list[str] = []
        self.extend(backbone, names)

    @property
    def rows(self) -> list[nn.Parameter]:
        return list(self._parameters.values())  # type: ignore[arg-type]

    def own(self, backbone: nn.Module) -> list[nn.Parameter]:
        """The backbone's own parameters of these names. `ValueError` if a module was replaced by another in size."""
        return self._own(self.places(dict(backbone.named_modules())))

    def _own(self, places: Sequence[tuple[nn.Module, str]]) -> list[nn.Parameter]:
        found = [module._parameters.get(attribute) for module, attribute in places]
        for name, own, rows in zip(self.names, found, self.rows, strict=True):
            if own is None or own.shape != rows.shape[1:]:
                _refuse_replaced(name, rows, "no such parameter" if own is None else tuple(own.shape))
        return found  # type: ignore[return-value]

    def row(self, route: int) -> list[Tensor]:
        """The row of `route` (-1: the mean of all rows): one tensor per parameter, of its shape."""
        return [_route_row(rows, route) for rows in self.rows]

    def masks(self, routes: Sequence[int]) -> list[Tensor]:
        """Masks of the rows of `routes` (-1: all): integers of the rows' shapes, with all bits set in these rows."""
        masks = [torch.zeros_like(rows, dtype=integer_dtype(rows.dtype)) for rows in self.rows]
        for mask in masks:
            for route in range(self.num_routes) if UNION in routes else routes:
                mask[route] = -1
        return masks

    def extend(self, backbone: nn.Module, names: Sequence[str]) -> None:
        """Makes more parameters private; every route starts from the backbone's own."""
        known = dict(zip(self.names, self.rows, strict=True))
        places = parameter_aliases(backbone)
        for name in names:
            if name not in known:
                own = parameter_at(places[name][0])
                known[name] = _as_rows([own.detach()] * self.num_routes, own.requires_grad)
        self.names = [name for name in places if name in known]
        self._replace([known[name] for name in self.names])
        self.freeze(backbone)

    def freeze(self, backbone: nn.Module) -> None:
        """Turns off the gradients of the backbone's own parameters, since no route reads them."""
        for own in self.own(backbone):
            own.requires_grad_(False)

    @torch.no_grad()
    def reset(self, backbone: nn.Module) -> None:
        """Fills every row with the backbone's own parameter."""
        for rows, own in zip(self.rows, self.own(backbone), strict=True):
            rows.copy_(own.expand_as(rows))

    def insert(self, backbone: nn.Module, row: Mapping[str, Tensor]) -> None:
        """Adds a route after the others. `row`: name -> tensor; where it has none, the backbone's own is taken."""
        new = [row.get(name, own) for name, own in zip(self.names, self.own(backbone), strict=True)]
        self.num_routes += 1
        parts = zip(self.rows, new, strict=True)
        self._replace(
            [_as_rows([*rows.detach(), added.detach().to(rows)], rows.requires_grad) for rows, added in parts]
        )

    def drop(self, route: int) -> None:
        """Removes the row of a route."""
        self.num_routes -= 1
        kept = ([*rows.detach()[:route], *rows.detach()[route + 1 :]] for rows in self.rows)
        self._replace([_as_rows(part, rows.requires_grad) for part, rows in zip(kept, self.rows, strict=True)])

    def stand_ins(self, modules: Mapping[str, nn.Module], route: int, on_backward: Callable[[], Any]) -> list[StandIn]:
        """
        What puts the row of `route` into the layers among the `modules` of the backbone, by `offloading.standing_in`.
        A gradient of the row calls `on_backward`.
        """
        if not self.names:
            return []
        places = self.places(modules)
        own = self._own(places)
        # Called as a module, so that accelerate's hooks bring rows that are offloaded.
        bound = self(partial(_TakeRows.apply, route, own, on_backward))
        return [
            (module, attribute, partial(_on_device, row) if parameter.is_meta else row)
            for (module, attribute), parameter, row in zip(places, own, bound, strict=True)
        ]

    def forward(self, take: Callable[..., Sequence[Tensor]]) -> Sequence[Tensor]:
        """What `take` makes of the rows: a tensor for each parameter."""
        with ordinary_tensors():
            return like_parameters(take(*self.rows), self.rows)

    def places(self, modules: Mapping[str, nn.Module]) -> list[tuple[nn.Module, str]]:
        """The module and attribute of each parameter, among the `modules` of the backbone by name."""
        places = []
        for name, rows in zip(self.names, self.rows, strict=True):
            prefix, _, attribute = name.rpartition(".")
            if prefix not in modules:
                _refuse_replaced(name, rows, "no such module")
            places.append((modules[prefix], attribute))
        return places

    def _replace(self, rows: Sequence[nn.Parameter]) -> None:
        self._parameters.clear()
        for index, parameter in enumerate(rows):
            self.register_parameter(f"p{index:04d}", parameter)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        # A memory format such as `channels_last` is for a single parameter, not for stacked rows.
        return super()._apply(
            lambda rows: fn(rows) if rows.ndim < 4 else torch.stack([fn(row) for row in rows]), recurse
        )

    def extra_repr(self) -> str:
        return f"num_routes={self.num_routes}, names={self.names}"


def _refuse_replaced(name: str, rows: Tensor, there: Any) -> NoReturn:
    raise ValueError(
        f"every route has its own copy of {name!r} of shape {tuple(rows.shape[1:])}, but the backbone has {there}: a "
        "module was replaced after wrapping. Replace it before, as by `from_backbone(name, num_labels=…)` or "
        "`from_backbone(model, …)`, or put the former module back."
    )


def _on_device(row: Tensor, own: Tensor) -> Tensor:
    return row.to(own.device)


def _as_rows(parts: Sequence[Tensor], requires_grad: bool) -> nn.Parameter:
    return nn.Parameter(torch.stack(list(parts)), requires_grad=requires_grad)


def _route_row(rows: Tensor, route: int) -> Tensor:
    if route != UNION:
        return rows[route]
    # Not `rows.mean(0)`, which rounds: the mean of equal rows might be another value.
    return rows[0] + (rows - rows[0]).mean(0)


class _TakeRows(torch.autograd.Function):
    """A route's row of each parameter, in memory laid out as the backbone's `own`; gradients go to that row."""

    @staticmethod
    def forward(
        ctx, route: int, own: list[Tensor], on_backward: Callable[[], Any], *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.route, ctx.num_routes, ctx.on_backward = route, len(parameters[0]), on_backward
        ctx.set_materialize_grads(False)
        taken = [_route_row(rows, route) for rows in parameters]
        # Copies, since a single row may be unaligned, and kernels round differently on unaligned memory.
        return tuple(
            torch.empty_like(row if like.is_meta else like).copy_(row) for row, like in zip(taken, own, strict=True)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.on_backward()
        return None, None, None, *(None if gradient is None else _in_rows(gradient, ctx) for gradient in gradients)


def _in_rows(gradient: Tensor, ctx: Any) -> Tensor:
    if ctx.route == UNION:
        return (gradient / ctx.num_routes).expand(ctx.num_routes, *gradient.shape).contiguous()
    rows = gradient.new_zeros(ctx.num_routes, *gradient.shape)
    rows[ctx.route] = gradient
    return rows
