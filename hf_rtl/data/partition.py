"""The partition of a data set into routes: the route of every sample, and the rule behind it."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from tabulate import tabulate
from torch import Tensor

from ..modeling.checks import check_choice
from ..modeling.configuration_rtl import TICKET_TASKS
from ..modeling.mask_bank import check_route_names


logger = logging.getLogger(__name__)

# A route with fewer samples is tiny: a tenth of them, held out for calibration, would not be one sample.
TINY_ROUTE = 10
# So is a route with less than this fraction of an even share, N / K.
TINY_SHARE = 0.1


class Rule(ABC):
    """
    How new data gets its routes. A sample's route does not depend on other samples.

    Subclasses are frozen dataclasses of JSON-able values and tensors. `kind` names the class in files.
    """

    kind: ClassVar[str]
    route_names: list[str]

    @abstractmethod
    def assign(self, data: Any, *, allow_empty: bool = True) -> Partition:
        """The partition of new data; unless `allow_empty`, it must have two samples of every route."""

    @abstractmethod
    def describe(self) -> str:
        """What a sample's route is, to end the sentence "A sample's route is …"."""

    def to_dict(self) -> dict[str, Any]:
        """The `kind` and all fields except tensors, JSON-able."""
        fields = {name: value for name, value in vars(self).items() if not isinstance(value, Tensor)}
        return {"kind": self.kind, **fields}

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are tensors."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


@dataclass(frozen=True, eq=False)
class Partition:
    """
    The route of every sample (paper, section 1: K disjoint subsets of the training data).

    Args:
        route_ids (`np.ndarray`): `int64 [N]`, the route of each sample, from 0 to K - 1.
        route_names (`list[str]`): K distinct names.
        allow_empty (`bool`, defaults to `False`): whether a route may have no sample, or a single one; for evaluation
            data, which need not hold all the routes of a model. A route to be trained needs two samples.
        rule (`Rule`, *optional*): what assigns routes to new data in the same way.

    Raises:
        TypeError: `route_ids` is not an array of integers.
        ValueError: `route_ids` is not one-dimensional, is empty or out of range, a route has fewer than two samples,
            or a name is empty or repeated.
    """

    route_ids: np.ndarray
    route_names: list[str]
    allow_empty: bool = False
    rule: Rule | None = None

    def __post_init__(self) -> None:
        route_names = check_route_names(self.route_names)
        object.__setattr__(self, "route_names", route_names)
        object.__setattr__(self, "route_ids", check_route_ids(self.route_ids, num_routes=len(route_names)))
        if self.allow_empty:
            return
        for name, count in self._named_counts():
            if count < 2:
                raise ValueError(
                    f"Route {name!r} has {'no samples' if count == 0 else 'a single sample'}; every route needs at "
                    "least 2. Leave the route out, or pass `allow_empty=True` for data that is only for evaluation."
                )

    @property
    def counts(self) -> np.ndarray:
        """Number of samples per route, `int64 [K]`."""
        return np.bincount(self.route_ids, minlength=len(self.route_names))

    def report(self) -> str:
        """A table of the routes: name, number of samples, share of all samples."""
        total = len(self.route_ids)
        rows = [(name, f"{count:,}", f"{count / total:.1%}") for name, count in self._named_counts()]
        rows.append(("all", f"{total:,}", "100.0%"))
        aligned = ("left", "right", "right")
        return tabulate(rows, ("route", "samples", "share"), "plain", colalign=aligned, disable_numparse=True)

    def warn_of_tiny_routes(self) -> None:
        """Logs a warning that names routes of fewer than 10 samples, or of less than a tenth of an even share."""
        enough = max(TINY_ROUTE, TINY_SHARE * len(self.route_ids) / len(self.route_names))
        tiny = [f"{name!r} ({count})" for name, count in self._named_counts() if count < enough]
        if tiny:
            logger.warning(
                "Tiny routes, of fewer than %d samples or less than a tenth of an even share: %s. A ticket learns "
                "little from so few; join them with other routes.",
                TINY_ROUTE,
                ", ".join(tiny),
            )

    def _named_counts(self) -> list[tuple[str, int]]:
        return list(zip(self.route_names, self.counts.tolist(), strict=True))

    def check(self, ticket_task: str, labels: Sequence[Any] | np.ndarray | None = None) -> None:
        """
        Raises unless the partition can train tickets for `ticket_task`.

        Args:
            ticket_task (`str`): `"membership"` needs two routes, since the other routes are the negatives; `"labels"`
                needs every route to have more than one distinct label, since a ticket learns nothing from one.
            labels (`Sequence` or `np.ndarray`, *optional*): the label of each sample, `[N]`, integers or strings, for
                `"labels"`; without them (tokens, regions, signals) the labels are not checked.

        Raises:
            ValueError: an unknown `ticket_task`, `labels` of another shape, or data that does not suit the task.
        """
        check_choice("ticket_task", ticket_task, TICKET_TASKS)
        if ticket_task == "membership":
            if len(self.route_names) < 2:
                raise ValueError(
                    f"`ticket_task` 'membership' needs at least 2 routes, the others being the negatives of each; got "
                    f"only {self.route_names[0]!r}."
                )
        elif labels is not None:
            label_array = np.asarray(labels)
            if label_array.shape != self.route_ids.shape:
                raise ValueError(
                    f"`labels` has shape {list(label_array.shape)}; one label per sample is needed, "
                    f"{list(self.route_ids.shape)}."
                )
            for route, name in enumerate(self.route_names):
                distinct = np.unique(label_array[self.route_ids == route])
                if len(distinct) == 1:
                    raise ValueError(
                        f"Route {name!r} has the single label {distinct.tolist()[0]!r}, so a ticket of `ticket_task` "
                        "'labels' has nothing to tell apart. Use `ticket_task='membership'` where routes are classes."
                    )


def check_route_ids(route_ids: np.ndarray, *, num_routes: int | None = None) -> np.ndarray:
    """
    `route_ids` as `int64 [N]`.

    Raises `TypeError` or `ValueError` unless they are N >= 1 integers from 0 to `num_routes - 1` (without it, to any).
    """
    if not isinstance(route_ids, np.ndarray) or route_ids.dtype.kind not in "iu":
        kind = f"a `{route_ids.dtype}` array" if isinstance(route_ids, np.ndarray) else f"`{type(route_ids).__name__}`"
        raise TypeError(f"`route_ids` is {kind}; an `int64` array is needed: `np.array(route_ids, dtype=np.int64)`.")
    if route_ids.ndim != 1 or route_ids.size == 0:
        raise ValueError(f"`route_ids` has shape {list(route_ids.shape)}; [N] with at least 1 sample is needed.")
    outside = np.flatnonzero((route_ids < 0) | (num_routes is not None and route_ids >= num_routes))
    if outside.size:
        allowed = "ids from 0" if num_routes is None else f"0 to {num_routes - 1}"
        raise ValueError(f"`route_ids` has {route_ids[outside[0]]} at sample {outside[0]}; allowed are {allowed}.")
    return route_ids.astype(np.int64)


def routes_of_values(source: str, values: list[Any], route_names: list[str] | None) -> tuple[np.ndarray, list[str]]:
    """The route ids of values, and the routes' names, which are `route_names` if given. `ValueError` for others."""
    if isinstance(values[0], int):
        return _integer_routes(source, values, route_names)
    known = route_names or sorted(set(values))
    ids = {name: route for route, name in enumerate(known)}
    unknown = sorted(set(values) - ids.keys())
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        named = ", ".join(map(repr, unknown[:5]))
        raise ValueError(f"{source} {named}{more}; `route_names` allows {', '.join(map(repr, known))}.")
    return np.array([ids[value] for value in values], dtype=np.int64), known


def _integer_routes(source: str, values: list[int], route_names: list[str] | None) -> tuple[np.ndarray, list[str]]:
    largest = max(values)
    if route_names is None:
        # Checked before any name is made: a column of time stamps would need billions of them.
        if largest >= len(values):
            raise ValueError(
                f"{source} {largest} among {len(values)} samples; integers are route ids, from 0 up with "
                "none left out. Cast other numbers to strings to make each distinct value a route."
            )
        route_names = [str(route) for route in range(largest + 1)]
    elif largest >= len(route_names):
        raise ValueError(
            f"{source} {largest}; allowed are the ids 0 to {len(route_names) - 1} of the routes "
            f"{', '.join(map(repr, route_names))}."
        )
    return np.array(values, dtype=np.int64), route_names
