"""Partitions of a data set into routes: which sample belongs to which route, read from a column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .mask_bank import check_route_names


LABEL_COLUMNS = ("label", "labels", "fine_label")
TICKET_TASKS = ("membership", "labels")


@dataclass(frozen=True, eq=False)
class Partition:
    """
    The route of every sample (PAPER.md section 1: K disjoint subsets of the training data).

    Args:
        route_ids (`np.ndarray`): `int64 [N]`, the route of each sample, from 0 to K - 1.
        route_names (`list[str]`): K distinct names.
        allow_empty (`bool`, defaults to `False`): whether a route may have no sample, or a single one; for evaluation
            data, which need not hold all the routes of a model. A route to be trained needs two samples.

    Raises:
        TypeError: `route_ids` is not an array of integers.
        ValueError: `route_ids` is not one-dimensional, is empty or out of range, a route has fewer than two samples,
            or a name is empty or there twice.
    """

    route_ids: np.ndarray
    route_names: list[str]
    allow_empty: bool = False

    def __post_init__(self) -> None:
        route_names = check_route_names(self.route_names)
        object.__setattr__(self, "route_names", route_names)
        object.__setattr__(self, "route_ids", check_route_ids(self.route_ids, num_routes=len(route_names)))
        if self.allow_empty:
            return
        for name, count in zip(self.route_names, self.counts, strict=True):
            if count < 2:
                raise ValueError(
                    f"Route {name!r} has {'no samples' if count == 0 else 'a single sample'}; every route needs at "
                    "least 2. Leave the route out, or pass `allow_empty=True` for data that is only evaluated on."
                )

    @property
    def counts(self) -> np.ndarray:
        """Number of samples per route, `int64 [K]`."""
        return np.bincount(self.route_ids, minlength=len(self.route_names))

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
        if ticket_task not in TICKET_TASKS:
            raise ValueError(f"`ticket_task` is {ticket_task!r}; allowed are {', '.join(map(repr, TICKET_TASKS))}.")
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


def partition_by_column(
    dataset: Any, column: str, *, route_names: Sequence[str] | None = None, allow_empty: bool = False
) -> Partition:
    """
    The partition that a column of a data set spells out.

    | column | without `route_names` | with `route_names` |
    |---|---|---|
    | `ClassLabel` | its classes, in its order | each class by its name |
    | strings | the distinct values, sorted | each value by its name |
    | integers | route ids; the names are `"0"`, `"1"`, … | route ids |

    Pass the `route_names` of a fitted model, and `allow_empty=True`, for evaluation data: each route keeps its id.

    Args:
        dataset (`datasets.Dataset` or a map-style data set of dicts): a single split. Of a `datasets.Dataset` only the
            column is read, and its transforms do not run; of any other, every sample is fetched once.
        column (`str`): the column's name.
        route_names (`Sequence[str]`, *optional*): the names that the values must be among.
        allow_empty (`bool`, defaults to `False`): as for `Partition`.

    Raises:
        TypeError: `dataset` is not a map-style data set of dicts, or a value is neither an integer nor a string.
        ValueError: an unknown `column`, a missing value (`None` or a negative integer), a value outside `route_names`,
            or what `Partition` refuses.
    """
    if route_names is not None:
        route_names = check_route_names(route_names)
    columns = _columns(dataset)
    if column not in columns:
        raise ValueError(
            f"`column` {column!r} is not in the data set; its columns are {', '.join(map(repr, columns))}."
        )

    class_names: list[str] | None = None
    if _is_hf_dataset(dataset):
        # Without the format a user's transform does not run, and integers with gaps do not turn into floats.
        values = list(dataset.with_format(None).select_columns(column)[column][:])
        class_names = getattr(dataset.features[column], "names", None)
    else:
        values = [_scalar(dataset[index][column]) for index in range(len(dataset))]
    _check_values(column, values)

    if class_names is not None:
        values = [class_names[value] for value in values]
        known = route_names or class_names
    elif isinstance(values[0], str):
        known = route_names or sorted(set(values))
    else:
        return Partition(*_integer_routes(column, values, route_names), allow_empty=allow_empty)

    ids = {name: route for route, name in enumerate(known)}
    unknown = next((value for value in values if value not in ids), None)
    if unknown is not None:
        raise ValueError(f"Column {column!r} has {unknown!r}; `route_names` allows {', '.join(map(repr, known))}.")
    route_ids = np.array([ids[value] for value in values], dtype=np.int64)
    return Partition(route_ids, list(known), allow_empty=allow_empty)


def partition_by_label(
    dataset: Any,
    label_column: str | None = None,
    *,
    route_names: Sequence[str] | None = None,
    allow_empty: bool = False,
) -> Partition:
    """
    `partition_by_column` on the label column: one route per class.

    Args:
        dataset, route_names, allow_empty: as for `partition_by_column`.
        label_column (`str`, *optional*): defaults to the data set's `label`, `labels` or `fine_label`.

    Raises:
        TypeError, ValueError: as `partition_by_column`; also when the data set has none of the three columns, or
            several of them.
    """
    if label_column is None:
        columns = _columns(dataset)
        found = [name for name in LABEL_COLUMNS if name in columns]
        if len(found) != 1:
            raise ValueError(
                f"`label_column` must be given: the data set has {' and '.join(map(repr, found)) or 'none'} of the "
                f"usual label columns; its columns are {', '.join(map(repr, columns))}."
            )
        label_column = found[0]
    return partition_by_column(dataset, label_column, route_names=route_names, allow_empty=allow_empty)


def _is_hf_dataset(dataset: Any) -> bool:
    """Told by its attributes, because `datasets` need not be installed."""
    return hasattr(dataset, "features") and hasattr(dataset, "select_columns")


def _columns(dataset: Any) -> list[str]:
    if isinstance(dataset, Mapping):
        raise TypeError(
            f"`dataset` is a `{type(dataset).__name__}` of {', '.join(map(repr, dataset))}; pass one split, as in "
            f"`dataset[{next(iter(dataset), 'train')!r}]`."
        )
    if (
        isinstance(dataset, torch.utils.data.IterableDataset)
        or not hasattr(dataset, "__len__")
        or not hasattr(dataset, "__getitem__")
    ):
        raise TypeError(
            f"`dataset` is a `{type(dataset).__name__}`; a map-style data set with a length is needed, since a "
            "partition assigns every sample to a route."
        )
    if len(dataset) == 0:
        raise ValueError("`dataset` is empty; a partition needs samples.")
    if _is_hf_dataset(dataset):
        return list(dataset.column_names)
    sample = dataset[0]
    if not isinstance(sample, Mapping):
        raise TypeError(f"`dataset[0]` is a `{type(sample).__name__}`; samples must be dicts with named columns.")
    return list(sample)


def _scalar(value: Any) -> Any:
    if isinstance(value, (np.generic, np.ndarray, torch.Tensor)) and value.ndim == 0:
        return value.item()
    return value


def _check_values(column: str, values: list[Any]) -> None:
    for index, value in enumerate(values):
        if value is None or (isinstance(value, int) and value < 0):
            raise ValueError(
                f"Column {column!r} has {value} at sample {index}, which is no route. Every sample needs one: filter "
                "such samples out first."
            )
        if type(value) is not type(values[0]) or not isinstance(value, (int, str)) or isinstance(value, bool):
            raise TypeError(
                f"Column {column!r} has {value!r}, a `{type(value).__name__}`, at sample {index}; a route column "
                "holds either integers or strings."
            )


def _integer_routes(column: str, values: list[int], route_names: list[str] | None) -> tuple[np.ndarray, list[str]]:
    largest = max(values)
    if route_names is None:
        # Checked before any name is made: a column of time stamps would ask for billions of them.
        if largest >= len(values):
            raise ValueError(
                f"Column {column!r} has {largest} among {len(values)} samples; integers are route ids, from 0 up with "
                "none left out. Cast other numbers to strings to make each distinct value a route."
            )
        route_names = [str(route) for route in range(largest + 1)]
    elif largest >= len(route_names):
        raise ValueError(
            f"Column {column!r} has {largest}; allowed are the ids 0 to {len(route_names) - 1} of the routes "
            f"{', '.join(map(repr, route_names))}."
        )
    return np.array(values, dtype=np.int64), route_names
