"""Partitions of a data set by a column, its labels, a function, or groups of labels."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..modeling.mask_bank import check_route_names
from .columns import find_label_column, read_column, read_function
from .partition import Partition, Rule, routes_of_values
from .rules import ByColumn, ByGroups


def partition_by_column(
    dataset: Any, column: str, *, route_names: Sequence[str] | None = None, allow_empty: bool = False
) -> Partition:
    """
    The partition by the values of a column; its `rule` is a [`ByColumn`].

    | column | without `route_names` | with `route_names` |
    |---|---|---|
    | `ClassLabel` | its classes, in its order | each class by its name |
    | strings | the distinct values, sorted | each value by its name |
    | integers | route ids; the names are `"0"`, `"1"`, … | route ids |

    Pass the `route_names` of a fitted model, and `allow_empty=True`, for evaluation data: each route keeps its id.

    Args:
        dataset (`datasets.Dataset` or a map-style data set of dicts): a single split. Only the column is read from a
            `datasets.Dataset`, and its transforms do not run; from any other, every sample is fetched once.
        column (`str`): the column's name.
        route_names (`Sequence[str]`, *optional*): the names that the values must be among.
        allow_empty (`bool`, defaults to `False`): as for `Partition`. If false, tiny routes cause a warning.

    Raises:
        TypeError: `dataset` is not a map-style data set of dicts, or a value is neither an integer nor a string.
        ValueError: an unknown `column`, a missing value (`None` or a negative integer), a value outside `route_names`,
            or what `Partition` refuses.
    """
    if route_names is not None:
        route_names = check_route_names(route_names)
    values, class_names = read_column(dataset, column)
    route_ids, names = routes_of_values(f"Column {column!r} has", values, route_names or class_names)
    return _partition(route_ids, names, allow_empty, ByColumn(column, names))


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
        label_column = find_label_column(dataset)
    return partition_by_column(dataset, label_column, route_names=route_names, allow_empty=allow_empty)


def partition_by_function(
    dataset: Any,
    function: Callable[[Any], int | str],
    *,
    route_names: Sequence[str] | None = None,
    allow_empty: bool = False,
) -> Partition:
    """
    The partition by the value of a function for each sample.

    It has no `rule`, since code is not saved: call this again, with the `route_names` of the first partition, for new
    data.

    Args:
        dataset (map-style data set): every sample is fetched once, as the data set gives it, transforms included.
        function (`Callable`): from a sample to its route, an integer or a string, read as the values of a column are.
        route_names, allow_empty: as for `partition_by_column`.

    Raises:
        TypeError, ValueError: as `partition_by_column`.
    """
    if route_names is not None:
        route_names = check_route_names(route_names)
    route_ids, names = routes_of_values("`function` gives", read_function(dataset, function), route_names)
    return _partition(route_ids, names, allow_empty, None)


def partition_by_groups(
    dataset: Any, groups: Mapping[str, list[str]] | str | os.PathLike, label_column: str | None = None
) -> Partition:
    """
    The partition by groups of labels; its `rule` is a [`ByGroups`], which assigns evaluation data.

    Args:
        dataset (`datasets.Dataset` or a map-style data set of dicts): training data, as for `partition_by_column`.
        groups (`Mapping[str, list[str]]` or a path): the labels of each route, as a mapping or as a JSON or YAML
            file of one. Labels are class names; if the column has none, they are its integers as strings.
        label_column (`str`, *optional*): defaults to the data set's `label`, `labels` or `fine_label`.

    Raises:
        TypeError: what `partition_by_column` refuses.
        ValueError: a label of the data is in no group or in several, a group has a label that no sample has, `groups`
            is not a mapping of this form, or what `partition_by_column` refuses.
    """
    column = find_label_column(dataset) if label_column is None else label_column
    rule = ByGroups(column, read_groups(groups) if isinstance(groups, (str, os.PathLike)) else groups)
    labels = [str(value) for value in read_column(dataset, column)[0]]
    seen = sorted(set(labels))
    unseen = [label for group in rule.groups.values() for label in group if label not in seen]
    if unseen:
        raise ValueError(
            f"`groups` has {', '.join(map(repr, unseen))}, which no sample has; labels of column {column!r} are "
            f"{', '.join(map(repr, seen))}."
        )
    partition = rule.assign_labels(labels, allow_empty=False)
    partition.warn_of_tiny_routes()
    return partition


def read_groups(file: str | os.PathLike) -> Any:
    """
    The content of a `.json`, `.yaml` or `.yml` file.

    Raises:
        ValueError: another ending, or a file that is not of that format.
    """
    path = Path(file)
    readers: dict[str, Callable[[str], Any]] = {".json": json.loads, ".yaml": yaml.safe_load, ".yml": yaml.safe_load}
    if path.suffix not in readers:
        raise ValueError(f"`groups` is {str(file)!r}; a file that ends in {', '.join(readers)} is needed.")
    try:
        return readers[path.suffix](path.read_text())
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"`groups` is {str(file)!r}, which cannot be read: {error}") from error


def _partition(route_ids: np.ndarray, route_names: list[str], allow_empty: bool, rule: Rule | None) -> Partition:
    partition = Partition(route_ids, route_names, allow_empty, rule)
    if not allow_empty:
        partition.warn_of_tiny_routes()
    return partition
