"""Running statistics of normalisation layers, a row per route. Knows modules that track them, but no masks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .route_rows import RouteRows


# In the order in which torch's norms register them. The first two are floats, the last counts batches.
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def tracked_buffers(backbone: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """
    Every (module, buffer name) that holds running statistics, in the order of `backbone.modules()`.

    A layer has them if it has a running mean or variance and a `momentum` to move it by, whatever its class: torch's
    batch and instance norms, timm's EvoNorm and others. Frozen batch norms have no momentum.
    """
    for module in backbone.modules():
        names = [name for name in _STATISTICS if module._buffers.get(name) is not None]
        if names and hasattr(module, "momentum"):
            yield from ((module, name) for name in names)


def tracking_layers(backbone: nn.Module) -> list[Any]:
    """The layers that keep running statistics."""
    return list(dict.fromkeys(module for module, _ in tracked_buffers(backbone)))


class NormStatistics(RouteRows):
    """
    Running mean, variance and batch count of every tracking layer, per route.

    Buffers `s0000, s0001, …` of shape `[num_routes + 1, *shape]`, in the order of `tracked_buffers`: means and
    variances are `float32` and are never cast with the model, counts are `int64`. Row `num_routes`, also reached as
    -1, belongs to the union of all tickets. At first every row repeats the backbone's own statistics.

    While bound, the layers read and write a route's row in place, through a view; their own buffers do not change.
    """

    def __init__(self, backbone: nn.Module, num_routes: int) -> None:
        super().__init__()
        self.num_routes = num_routes
        for index, (module, name) in enumerate(tracked_buffers(backbone)):
            values = module.get_buffer(name)
            values = values.float() if values.is_floating_point() else values
            rows = values.detach().expand(num_routes + 1, *values.shape).clone()
            self.register_buffer(f"s{index:04d}", rows)

    @property
    def rows(self) -> list[Tensor]:
        return list(self._buffers.values())  # type: ignore[arg-type]

    def reset(self, backbone: nn.Module) -> None:
        """Fills every row with the backbone's own statistics."""
        for rows, (module, name) in zip(self.rows, tracked_buffers(backbone), strict=True):
            rows.copy_(module.get_buffer(name).expand_as(rows))

    def insert(self, row: Sequence[Tensor]) -> None:
        """Adds a route, after the others and before the union. `row`: one tensor per buffer, of its rows' shape."""
        parts = zip(list(self._buffers), self.rows, row, strict=True)
        self._buffers.update({name: torch.cat([old[:-1], new[None].to(old), old[-1:]]) for name, old, new in parts})
        self.num_routes += 1

    def drop_route(self, route: int) -> None:
        super().drop_route(route)
        self.num_routes -= 1

    def row(self, route: int) -> list[Tensor]:
        """The row of `route` (-1: the union's): one tensor per buffer, a view."""
        return [rows[route] for rows in self.rows]

    def extra_repr(self) -> str:
        return f"num_routes={self.num_routes}, num_buffers={len(self._buffers)}"


class BoundStatistics:
    """
    A row of statistics in place of the running buffers of layers, at `places` from `tracked_buffers`, until `release`;
    without `statistics`, as in models that share them, the layers' own buffers.

    A layer of another floating point type than its row works on a cast copy, which is written back on release.
    """

    def __init__(self, places: Sequence[tuple[nn.Module, str]], statistics: NormStatistics | None, route: int) -> None:
        self._locations = places
        self._originals: list[Any] = [module._buffers[name] for module, name in places]
        self._rows = self._originals if statistics is None else statistics.row(route)
        self._bound = [row.to(own.dtype) for row, own in zip(self._rows, self._originals, strict=True)]
        self._put(self._bound)

    def detach_from_layers(self) -> None:
        """Lets the layers write into copies: a recomputed forward must not count twice (gradient checkpointing)."""
        self._put([tensor.clone() for tensor in self._bound])

    def attach_to_layers(self) -> None:
        self._put(self._bound)

    def release(self) -> None:
        for (module, _), row, bound in zip(self._locations, self._rows, self._bound, strict=True):
            if bound.dtype != row.dtype and module.training:
                row.copy_(bound)
        self._put(self._originals)

    def _put(self, tensors: list[Tensor]) -> None:
        for (module, name), tensor in zip(self._locations, tensors, strict=True):
            module._buffers[name] = tensor
