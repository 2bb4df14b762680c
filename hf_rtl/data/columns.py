"""Reads one value per sample from a data set: a column, or the result of a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch


LABEL_COLUMNS = ("label", "labels", "fine_label")


def read_column(dataset: Any, column: str) -> tuple[list[Any], list[str] | None]:
    """
    The values of a column, all integers from 0 or all strings, and the names of its classes, `None` if it has none.

    Only the column is read from a `datasets.Dataset`, and its transforms do not run. From any other data set every
    sample is fetched once. The values of a `ClassLabel` column are names.

    Raises:
        TypeError: `dataset` is not a map-style data set of dicts, or a value is neither an integer nor a string.
        ValueError: an empty `dataset`, an unknown `column`, or a missing value (`None` or a negative integer).
    """
    columns = list_columns(dataset)
    if column not in columns:
        raise ValueError(
            f"`column` {column!r} is not in the data set; its columns are {', '.join(map(repr, columns))}."
        )
    values = _values(dataset, column)
    class_names = getattr(dataset.features[column], "names", None) if is_hf_dataset(dataset) else None
    _check_values(f"Column {column!r} has", values)
    return (values, None) if class_names is None else ([class_names[value] for value in values], class_names)


def read_function(dataset: Any, function: Callable[[Any], int | str]) -> list[Any]:
    """
    The value of `function` for each sample, all integers from 0 or all strings.

    Raises:
        TypeError: `dataset` is not a map-style data set, or a value is neither an integer nor a string.
        ValueError: an empty `dataset`, or a missing value (`None` or a negative integer).
    """
    _check_dataset(dataset)
    values = [_scalar(function(dataset[index])) for index in range(len(dataset))]
    _check_values("`function` gives", values)
    return values


def find_label_column(dataset: Any) -> str:
    """The only column with a usual name for labels. Raises `ValueError` if the data set has none or several."""
    found = _label_columns(dataset)
    if len(found) != 1:
        raise ValueError(
            f"`label_column` must be given: the data set has {' and '.join(map(repr, found)) or 'none'} of the usual "
            f"label columns; its columns are {', '.join(map(repr, list_columns(dataset)))}."
        )
    return found[0]


def label_column(dataset: Any) -> str | None:
    """The data set's label column, by the first usual name that it has; `None` without any."""
    return next(iter(_label_columns(dataset)), None)


def _label_columns(dataset: Any) -> list[str]:
    columns = list_columns(dataset)
    return [name for name in LABEL_COLUMNS if name in columns]


def list_columns(dataset: Any) -> list[str]:
    """
    The names of a data set's columns. Without `column_names`, they are read from its first sample.

    Raises:
        TypeError: `dataset` is not a map-style data set of dicts.
        ValueError: an empty `dataset`.
    """
    _check_dataset(dataset)
    names = getattr(dataset, "column_names", None)
    if names is not None:
        return list(names)
    sample = dataset[0]
    if not isinstance(sample, Mapping):
        raise TypeError(f"`dataset[0]` is a `{type(sample).__name__}`; samples must be dicts with named columns.")
    return list(sample)


def check_label_column(columns: Sequence[str]) -> None:
    """Raises `ValueError` unless one of `columns` is a column that transformers' collators turn into `labels`."""
    allowed = ("label", "labels", "label_ids")
    if not set(allowed) & set(columns):
        raise ValueError(
            f"`train_dataset` has no column {' or '.join(map(repr, allowed))} for tickets of `ticket_task='labels'` "
            f"to predict; its columns are {', '.join(map(repr, columns))}. Rename one, or pass a `data_collator` that "
            "makes `labels`."
        )


def label_values(dataset: Any) -> list[Any] | None:
    """The labels of all samples, of whatever kind; `None` without a label column."""
    column = label_column(dataset)
    return None if column is None else _values(dataset, column)


def single_labels(dataset: Any) -> Sequence[Any] | None:
    """The labels of a data set whose samples have one number or name each, else `None`."""
    values = label_values(dataset)
    # Labels for regression, or several labels per sample, are not checked.
    return values if values and all(isinstance(value, (int, str)) for value in values) else None


def is_hf_dataset(dataset: Any) -> bool:
    """Recognises it by its attributes, because `datasets` need not be installed."""
    return hasattr(dataset, "features") and hasattr(dataset, "select_columns")


def _check_dataset(dataset: Any) -> None:
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


def _values(dataset: Any, column: str) -> list[Any]:
    """A column's values, those of `datasets` without their format: no transform runs, and integers stay integers."""
    if is_hf_dataset(dataset):
        return list(dataset.with_format(None).select_columns(column)[column][:])
    return [_scalar(dataset[index][column]) for index in range(len(dataset))]


def _scalar(value: Any) -> Any:
    if isinstance(value, (np.generic, np.ndarray, torch.Tensor)) and value.ndim == 0:
        return value.item()
    return value


def _check_values(source: str, values: list[Any]) -> None:
    for index, value in enumerate(values):
        if value is None or (isinstance(value, int) and value < 0):
            raise ValueError(
                f"{source} {value} at sample {index}, which is no route. Every sample needs a route: filter "
                "such samples out first."
            )
        if type(value) is not type(values[0]) or not isinstance(value, (int, str)) or isinstance(value, bool):
            raise TypeError(
                f"{source} {value!r}, a `{type(value).__name__}`, at sample {index}; routes are "
                "given by integers or by strings."
            )
