"""Text classification data, tokenised once, from parquet files or the Hub."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset

from .data_arguments import DataArguments, read_splits


def load_text(
    arguments: DataArguments, tokenizer: Any, *, route_column: str | None, seed: int
) -> tuple[Dataset, Dataset]:
    """
    The training and the test texts: the columns of `tokenizer`, the class as `label`, and the route as `route_column`,
    both `ClassLabel` with the names of the training data.

    Each route has an equal share of `max_train_samples`, so that a model of all routes sees the same mixture as
    tickets, which take turns. Test texts keep the frequencies of their routes.

    Raises:
        ValueError: there is no `route_column`, a column is missing, a text is empty, labels do not suit
            `class_bounds`, or test data have a class or route that training data lack.
    """
    if route_column is None:
        raise ValueError("texts need --route_column NAME: the column of their domains, which are the routes.")
    columns = {name: getattr(arguments, name) for name in ("text_column", "label_column")}
    train, test = read_splits(arguments, {**columns, "route_column": route_column})
    generator = np.random.default_rng(seed)
    train = train.select(_as_many_of_each(_sample_names(train, route_column), arguments.max_train_samples, generator))
    test = test.select(np.sort(generator.permutation(len(test))[: arguments.max_test_samples]))
    labels = [_labels(split, arguments) for split in (train, test)]
    label_names = arguments.class_names or _class_names(train, arguments.label_column)
    route_names = _class_names(train, route_column)
    return tuple(
        Dataset.from_dict(
            {
                **tokenizer(_texts(split, arguments.text_column), truncation=True, max_length=arguments.max_length),
                "label": _ids(of_split, label_names, arguments.label_column),
                route_column: _ids(_sample_names(split, route_column), route_names, route_column),
            }
        )
        .cast_column("label", ClassLabel(names=label_names))
        .cast_column(route_column, ClassLabel(names=route_names))
        for split, of_split in zip((train, test), labels, strict=True)
    )


def _as_many_of_each(routes: list[str], limit: int | None, generator: np.random.Generator) -> np.ndarray:
    """Positions of `limit` samples, equally many of each route; without a limit, of all samples."""
    if limit is None:
        return np.arange(len(routes))
    names, route_ids = np.unique(routes, return_inverse=True)
    shares = [generator.permutation(np.flatnonzero(route_ids == route)) for route in range(len(names))]
    return np.sort(np.concatenate([share[: limit // len(names)] for share in shares]))


def _texts(data: Dataset, column: str) -> list[str]:
    texts = list(data[column])
    for index, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(
                f"column {column!r} has {text!r} at sample {index}, which is no text; remove rows without a text."
            )
    return texts


def _labels(data: Dataset, arguments: DataArguments) -> list[str]:
    """The name of each sample's class."""
    column, bounds, names = arguments.label_column, arguments.class_bounds, arguments.class_names
    if not bounds:
        return _sample_names(data, column)
    if len(names) != len(bounds) + 1 or sorted(set(bounds)) != bounds:
        raise ValueError(f"--class_bounds {bounds} must ascend and need {len(bounds) + 1} --class_names; got {names}.")
    values = np.asarray(data[column])
    if values.dtype.kind not in "fiu" or not np.isfinite(values).all():
        raise ValueError(f"column {column!r} must have finite numbers, which --class_bounds cut into classes.")
    return [names[index] for index in np.digitize(values, bounds)]


def _sample_names(data: Dataset, column: str) -> list[str]:
    """The value of each sample in `column` as a string, by name if the column is a `ClassLabel`."""
    feature = data.features[column]
    return feature.int2str(data[column][:]) if isinstance(feature, ClassLabel) else list(map(str, data[column]))


def _class_names(data: Dataset, column: str) -> list[str]:
    feature = data.features[column]
    return feature.names if isinstance(feature, ClassLabel) else sorted(set(_sample_names(data, column)))


def _ids(values: list[str], names: list[str], column: str) -> list[int]:
    unknown = next((value for value in values if value not in names), None)
    if unknown is not None:
        raise ValueError(
            f"column {column!r} of the test data has {unknown!r}; the training data have "
            f"{', '.join(map(repr, names))}."
        )
    return [names.index(value) for value in values]
