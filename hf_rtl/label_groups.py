"""Partitions by groups of labels, which a mapping or a file gives."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from .columns import find_label_column, read_column
from .partition import Partition
from .partition_rules import ByGroups


def partition_by_groups(
    dataset: Any, groups: Mapping[str, list[str]] | str | os.PathLike, label_column: str | None = None
) -> Partition:
    """
    The partition by groups of labels; its `rule` is a [`ByGroups`], which assigns evaluation data.

    Args:
        dataset (`datasets.Dataset` or a map-style data set of dicts): training data, as for `partition_by_column`.
        groups (`Mapping[str, list[str]]` or a path): the labels of each route, as a mapping or as a JSON or YAML
            file of one. Labels are class names; integers stand for their digits where the column has no class names.
        label_column (`str`, *optional*): defaults to the data set's `label`, `labels` or `fine_label`.

    Raises:
        TypeError: what `partition_by_column` refuses.
        ValueError: a label of the data is in no group or in several, a group has a label that no sample has, `groups`
            is not such a mapping, or what `partition_by_column` refuses.
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
    What is in a `.json`, `.yaml` or `.yml` file.

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
