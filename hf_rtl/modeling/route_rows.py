"""Buffers with a row per route."""

from __future__ import annotations

import torch
from torch import nn


class RouteRows(nn.Module):
    """A module whose buffers have a row per route, and keep their types when the model is cast."""

    def drop_route(self, route: int) -> None:
        """Removes the row of a route; later ones move up by one."""
        for name, rows in list(self.named_buffers()):
            setattr(self, name, torch.cat([rows[:route], rows[route + 1 :]]))

    def _apply(self, fn, recurse: bool = True):
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, rows in before.items():
            if self.get_buffer(name).dtype != rows.dtype:
                setattr(self, name, rows.to(self.get_buffer(name).device))
        return self
