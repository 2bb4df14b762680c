"""Reads one value per sample from a data set: a column, or the result of a function."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Subset


LABEL_COLUMNS = ("label", "labels", "fine_label")
_FEW = 64  # numbers of a sample, at most, that are kept


class KeptColumns:
    """
    Values of a few columns of data sets that are not of `datasets`, whose samples are fetched once for all of them.

    Args:
        columns (`Iterable[str]`): names of columns that are likely to be read.
    """

    def __init__(self, columns: Iterable[str]) -> None:
        self.columns = frozenset(columns)
        self._read: list[tuple[Any, dict[str, list[Any]]]] = []

    def values(self, dataset: Any, column: str) -> list[Any] | None:
        """The values of a column; `None` if they are not kept, because they are large or in a list already."""
        if isinstance(dataset, list):
            return None
        found = next((columns for other, columns in self._read if other is dataset), None)
        if found is None:
            rows = [self._few_values(dataset[index]) for index in range(len(dataset))]
            found = {name: [row[name] for row in rows] for name in rows[0] if all(name in row for row in rows)}
            self._read.append((dataset, found))
        return found.get(column)

    def _few_values(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        values = {name: _scalar(sample[name]) for name in self.columns if name in sample}
        return {name: value for name, value in values.items() if _is_small(value)}


_kept: ContextVar[KeptColumns | None] = ContextVar("_kept", default=None)


@contextmanager
def keeping(columns: KeptColumns | None) -> Iterator[None]:
    """A context in which values that are read are kept in `columns`, and read from there."""
    token = _kept.set(columns)
    try:
        yield
    finally:
        _kept.reset(token)


def _is_small(value: Any) -> bool:
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return value.ndim == 1 and len(value) <= _FEW
    if isinstance(value, (list, tuple)):
        return len(value) <= _FEW and all(isinstance(number, (int, float)) for number in value)
    return value is None or isinstance(value, (bool, int, float, str))


def read_column(dataset: Any, column: str) -> tuple[list[Any], list[str] | None]:
    """
    The values of a column, all integers from 0 or all strings, and the names of its classes, `None` if it has none.

    Only the column is read from a `datasets.Dataset`, also through torch's `Subset` and `ConcatDataset`, and its
    transforms do not run. From any other data set every sample is fetched once. The values of a `ClassLabel` column
    are names; also those of another data set that holds one in `dataset` and leaves the column as it is.

    Raises:
        TypeError: `dataset` is not a map-style data set of dicts, or a value is neither an integer nor a string.
        ValueError: an empty `dataset`, an unknown `column`, or a missing value (`None` or a negative integer).
    """
    require_column(dataset, column)
    values, class_names = _read(dataset, column)
    values = values if class_names is None else _by_name(values, class_names)
    _check_values(f"Column {column!r} has", values)
    return values, class_names


def require_column(dataset: Any, column: str, argument: str = "column") -> None:
    """Raises `ValueError` unless a data set has a column; `argument` is what the caller named it with."""
    columns = list_columns(dataset)
    if column not in columns:
        close = get_close_matches(column, columns, n=1)
        raise ValueError(
            f"`{argument}` = {column!r} is not in the data set; its columns are {', '.join(map(repr, columns))}."
            f"{f' Did you mean {close[0]!r}?' if close else ''}{about_transforms(dataset)}"
        )


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


def find_label_column(dataset: Any, argument: str = "label_column") -> str:
    """
    The only column with a usual name for labels. Raises `ValueError` if the data set has none or several; `argument`
    is what the caller can name the column with.
    """
    found = _label_columns(dataset)
    if len(found) != 1:
        raise ValueError(
            f"`{argument}` must be given: the data set has {' and '.join(map(repr, found)) or 'none'} of the usual "
            f"label columns; its columns are {', '.join(map(repr, list_columns(dataset)))}.{about_transforms(dataset)}"
        )
    return found[0]


def about_transforms(dataset: Any) -> str:
    """A sentence to end an error with, if a transform may make the column that is missing; else nothing."""
    if not has_transform(dataset):
        return ""
    return (
        " What a transform makes is not read, as it would have to run on every sample: name a column that is stored, "
        "or add one by `dataset.map`."
    )


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
    if _passes_samples_on(dataset):
        return list_columns(dataset.dataset if isinstance(dataset, Subset) else dataset.datasets[0])
    sample = dataset[0]
    if not isinstance(sample, Mapping):
        raise TypeError(f"`dataset[0]` is a `{type(sample).__name__}`; samples must be dicts with named columns.")
    return list(sample)


def check_label_column(dataset: Any) -> None:
    """Raises `ValueError` unless samples have a column that transformers' collators turn into `labels`."""
    allowed, columns = ("label", "labels", "label_ids"), list_columns(dataset)
    if not set(allowed) & set(columns) and has_transform(dataset):
        columns = list(dataset[0])
    if not set(allowed) & set(columns):
        raise ValueError(
            f"`train_dataset` has no column {' or '.join(map(repr, allowed))} for tickets of `ticket_task='labels'` "
            f"to predict; its columns are {', '.join(map(repr, columns))}. Rename one, or pass a `data_collator` that "
            "makes `labels`."
        )


def label_values(dataset: Any) -> list[Any] | None:
    """The labels of all samples, of whatever kind; `None` without a label column."""
    column = label_column(dataset)
    return None if column is None else _read(dataset, column)[0]


def single_labels(dataset: Any) -> Sequence[Any] | None:
    """The labels of a data set whose samples have one number or name each, else `None`."""
    values = label_values(dataset)
    return values if values and all(isinstance(value, (int, str)) for value in values) else None


def check_labels(dataset: Any, num_labels: int, names: Collection[str] = (), *, may_ignore: bool = False) -> None:
    """
    Raises `ValueError`, which names the first bad sample, unless all labels suit a model that predicts `num_labels` of
    a sample: all integers below `num_labels`; if there is a single one, finite numbers; or `num_labels` finite numbers
    a sample. Labels of classes may also be among their `names`. A data set may have no label column. With `may_ignore`
    a label may be -100, which losses leave out.

    Labels that a transform of `datasets` makes are not checked: it would have to run on every sample.
    """
    column = label_column(dataset)
    if column is None:
        return
    values, _ = _read(dataset, column)
    several = np.ndim(values[0]) > 0
    integers = not several and num_labels > 1
    allowed = (
        f"an integer from 0 to {num_labels - 1}" if integers else f"{num_labels} numbers" if several else "a number"
    )
    for index, value in enumerate(values):
        is_number = isinstance(value, (int, float)) and np.isfinite(value)
        if integers:
            is_integer = isinstance(value, int) and (0 <= value < num_labels or (may_ignore and value == -100))
            good = is_integer or (isinstance(value, str) and value in names)
        elif several:
            numbers = np.asarray(value)
            good = numbers.shape == (num_labels,) and numbers.dtype.kind in "biuf" and np.isfinite(numbers).all()
        else:
            # The first label of a batch would decide the type of all.
            good = is_number and isinstance(value, float) == isinstance(values[0], float)
        if not good:
            if _is_replaced(dataset, index, column, value):
                return
            way_out = "Correct the label, or filter the sample out"
            if integers and isinstance(value, str):
                texts = sorted({other for other in values if isinstance(other, str)})
                way_out = f"Name the labels, as in `from_backbone(…, id2label={dict(enumerate(texts))})`"
            elif integers and isinstance(value, int) and value >= num_labels:
                most = max(other for other in values if isinstance(other, int))
                way_out = f"Build the model with `num_labels={most + 1}`, or correct the label"
            raise ValueError(
                f"Column {column!r} has the label {value!r} at sample {index}; needed is {allowed}: the model has "
                f"`num_labels` = {num_labels}, and the label of sample 0 is {values[0]!r}. {way_out}."
            )


def has_transform(dataset: Any) -> bool:
    """Whether a transform of `datasets` makes samples of what is stored, also through torch's data sets."""
    if _passes_samples_on(dataset):
        parts = [dataset.dataset] if isinstance(dataset, Subset) else dataset.datasets
        return any(map(has_transform, parts))
    return is_hf_dataset(dataset) and dataset.format["type"] == "custom"


def _is_replaced(dataset: Any, index: int, column: str, value: Any) -> bool:
    """Whether a transform makes another label of the stored one of a sample."""
    if not has_transform(dataset):
        return False
    sample = dataset[index]
    made = [sample[name] for name in ("label", "labels", "label_ids") if name in sample]
    return any(not np.array_equal(label, value) for label in made)


def is_truth_value(value: Any) -> bool:
    """Whether a value is a single true or false, of Python, numpy or torch."""
    is_of_torch = isinstance(value, torch.Tensor) and value.ndim == 0 and value.dtype == torch.bool
    return isinstance(value, (bool, np.bool_)) or is_of_torch


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


def _passes_samples_on(dataset: Any) -> bool:
    """Whether it is one of torch's data sets that give samples of others unchanged."""
    return type(dataset).__getitem__ in (Subset.__getitem__, ConcatDataset.__getitem__)


def _read(dataset: Any, column: str) -> tuple[list[Any], list[str] | None]:
    """
    A column's values, and the names of its classes, `None` if it has none. Values of `datasets` are those without
    their format: no transform runs, and integers stay integers.
    """
    if is_hf_dataset(dataset):
        values = list(dataset.with_format(None).select_columns(column)[column][:])
        return values, getattr(dataset.features[column], "names", None)
    if _passes_samples_on(dataset):
        return _read_inner(dataset, column)
    kept = _kept.get()
    known = None if kept is None else kept.values(dataset, column)
    values = [_scalar(dataset[index][column]) for index in range(len(dataset))] if known is None else known
    inner = getattr(dataset, "dataset", None)
    if not _holds_classes(inner, column):
        return values, None
    passed_on, class_names = _read_inner(dataset, column) if isinstance(dataset, Subset) else _read(inner, column)
    # Other integers than those of the classes have another meaning.
    return values, class_names if values == passed_on else None


def _read_inner(dataset: Subset | ConcatDataset, column: str) -> tuple[list[Any], list[str] | None]:
    if isinstance(dataset, Subset):
        values, class_names = _read(dataset.dataset, column)
        return [values[index] for index in dataset.indices], class_names
    parts = [_read(part, column) for part in dataset.datasets]
    first = parts[0][1]
    if any(names != first for _, names in parts):
        # The parts number their classes differently: their names stand for them.
        parts = [(values if names is None else _by_name(values, names), names) for values, names in parts]
        first = None
    return [value for values, _ in parts for value in values], first


def _holds_classes(dataset: Any, column: str) -> bool:
    if isinstance(dataset, ConcatDataset):
        return _holds_classes(dataset.datasets[0], column)
    if is_hf_dataset(dataset):
        return column in dataset.column_names
    return _holds_classes(dataset.dataset, column) if hasattr(dataset, "dataset") else False


def _by_name(values: Sequence[Any], class_names: Sequence[str]) -> list[Any]:
    """The names of classes; missing values, `None` or negative, stay as they are."""
    return [class_names[value] if isinstance(value, int) and value >= 0 else value for value in values]


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
