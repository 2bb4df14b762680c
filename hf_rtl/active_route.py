"""Which route a model has in place, and the lock that guards it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

from .norm_statistics import BoundStatistics


class ActiveRoute:
    """Which route a model's context has in place, and the lock that guards it. Copies start free."""

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

    def __deepcopy__(self, memo: dict[int, Any]) -> ActiveRoute:
        return ActiveRoute()

    def __reduce__(self):
        return ActiveRoute, ()
