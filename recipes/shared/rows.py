"""The samples of a run with their labels and routes, before they become tensors: what is asked of which data."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from datasets import Audio, ClassLabel, Dataset, Image, List, Value

from hf_rtl import ByGroups, partition_by_groups
from hf_rtl.data.partition import Rule

from .arguments import BadInput
from .data_arguments import DataArguments
from .read_data import read, require_columns


LABEL, ROUTE, GROUP = "label", "route", "group"
_LANGUAGE_MODELS = ("causal", "masked", "seq2seq")
_LABEL_COLUMNS = ("label", "labels")
WORD_LABELS = ("tags", "ner_tags", "labels", "label")
_MEDIA: dict[str, Any] = {"image": Image, "audio": Audio}


@dataclass
class Rows:
    """
    Training and test samples, of which nothing is decoded or tokenised.

    Args:
        train, test (`Dataset`): the column `input_column`; `label` with the names in `label_names`, unless there are
            none; and `route_column` with the names in `route_names`, which may be `label`.
        task (`str`), ticket_task (`str`): as in [`DataArguments`], never `None`.
        input_column (`str`), route_column (`str`): columns.
        label_names, route_names (`list[str]`): names in the order of their ids.
        rule ([`ByGroups`], *optional*): the groups of classes that are the routes.
    """

    train: Dataset
    test: Dataset
    task: str
    ticket_task: str
    input_column: str
    route_column: str
    label_names: list[str]
    route_names: list[str]
    rule: Rule | None = None


def load_rows(arguments: DataArguments, *, route_column: str | None, seed: int) -> Rows:
    """
    Reads the data, finds what the arguments leave open, and draws the samples.

    Raises:
        BadInput: the data cannot be read, do not say the task or the routes, or lack a column; labels do not suit
            `class_bounds`; a test sample has a label or route that training data lack.
    """
    train, test = read(arguments)
    held_out = test is None
    input_column, task = find_task(arguments, train)
    classified = task not in (*_LANGUAGE_MODELS, "token")
    label_column = find_label(arguments, train, route_column) if classified else None
    named = {"input_column": input_column, "label_column": label_column, "route_column": route_column}
    for data in (train, *([] if test is None else [test])):
        require_columns(arguments, data, {name: column for name, column in named.items() if column})
    if route_column is None and arguments.cluster_routes is None and label_column is None:
        raise BadInput(
            f"the data do not say the route of a sample; name a column, --route_column NAME, of "
            f"{', '.join(train.column_names)}; or find routes, as by --cluster_routes 4."
        )
    if route_column == LABEL != label_column:
        raise BadInput("the column 'label' has the routes and not the labels, which get this name; rename it.")
    parts = [_as_media(data, input_column, task, arguments.dataset) for data in (train, train if held_out else test)]
    rows = Rows(*parts, task, "", input_column, LABEL, [], [])
    if label_column is not None:
        rows = _with_labels(rows, label_column, arguments)
    rows = _with_routes(rows, route_column, label_column, arguments)
    by_label = rows.route_column == LABEL or rows.rule is not None or label_column == route_column
    rows.ticket_task = arguments.ticket_task or ("membership" if classified and by_label else "labels")
    if task in _MEDIA:
        kept = {input_column, rows.route_column, LABEL} & {*rows.train.column_names}
        rows.train, rows.test = (data.select_columns(sorted(kept)) for data in (rows.train, rows.test))
    if held_out:
        rows = _split(rows, arguments.test_fraction, seed)
    return _drawn(rows, arguments, seed)


def find_task(arguments: DataArguments, data: Dataset) -> tuple[str, str]:
    """The input column and the task: those given, or else the only ones that the columns admit."""
    column, task = arguments.input_column, arguments.task
    kinds = {name: _kind(feature) for name, feature in data.features.items()}
    if column is None:
        media = [name for name, kind in kinds.items() if kind in _MEDIA and task in (None, kind)]
        known = (*WORD_LABELS, arguments.label_column)
        words = [name for name, kind in kinds.items() if kind == "token" == (task or kind) and name not in known]
        texts = [name for name in ("text", "sentence", "content") if kinds.get(name) == "text" and task != "token"]
        found = media or words or texts[:1]
        if len(found) != 1:
            raise BadInput(
                f"which column holds the samples? The data have {', '.join(data.column_names)}; name it with "
                "--input_column, and files that it has the paths of with --task image or audio."
            )
        column = found[0]
    require_columns(arguments, data, {"input_column": column})
    kind = kinds[column]
    if task is not None:
        if kind in _MEDIA and kind != task:
            raise BadInput(f"column {column!r} has {kind} files, which --task {task} cannot use; see --input_column.")
        return column, task
    if kind != "text":
        return column, kind
    if arguments.label_column is None and not any(name in kinds for name in _LABEL_COLUMNS):
        raise BadInput(
            f"texts without a column 'label' admit several tasks: --task causal, masked or seq2seq; or name the "
            f"classes, --label_column NAME, of {', '.join(data.column_names)}."
        )
    return column, "text"


def _kind(feature: object) -> str:
    """The task that a column admits, for text the first of several."""
    if isinstance(feature, (Image, Audio)):
        return "image" if isinstance(feature, Image) else "audio"
    return "token" if isinstance(feature, List) and _is_text(feature.feature) else "text"


def _as_media(data: Dataset, column: str, task: str, dataset: str) -> Dataset:
    """Bytes and paths of images or sounds become a column of these. Paths may be relative to the data."""
    if task not in _MEDIA or isinstance(data.features[column], _MEDIA[task]):
        return data
    if _is_text(data.features[column]):
        place = Path(dataset).expanduser()
        folder = place if place.is_dir() else place.parent
        paths = [path and str(folder / path) for path in data[column]]
        data = data.remove_columns(column).add_column(column, paths)
    return data.cast_column(column, _MEDIA[task](decode=False))


def find_label(arguments: DataArguments, data: Dataset, route_column: str | None) -> str | None:
    """The label column: the one given, `label`, `labels`, or the only other column of classes; else the route's."""
    if arguments.label_column is not None:
        return arguments.label_column
    known = [name for name in _LABEL_COLUMNS if name in data.column_names]
    classes = [name for name, feature in data.features.items() if isinstance(feature, ClassLabel)]
    others = [name for name in classes if name != route_column]
    if known or len(others) == 1:
        return (known or others)[0]
    return route_column


def _with_labels(rows: Rows, column: str, arguments: DataArguments) -> Rows:
    values = [_labels(data, column, arguments) for data in (rows.train, rows.test)]
    names = arguments.class_names or class_names(rows.train, column)
    rows.train, rows.test = (
        with_classes(data, LABEL, of_data, names, column)
        for data, of_data in zip((rows.train, rows.test), values, strict=True)
    )
    rows.label_names = names
    return rows


def _with_routes(rows: Rows, column: str | None, label_column: str | None, arguments: DataArguments) -> Rows:
    """The rows with their routes: of groups of labels, of a column, or the labels themselves."""
    if arguments.route_groups is not None:
        if label_column is None:
            raise BadInput("--route_groups are groups of classes, and the data have none; name --label_column.")
        names = [[rows.label_names[label] for label in data[LABEL]] for data in (rows.train, rows.test)]
        partition = partition_by_groups([{LABEL: name} for name in names[0]], arguments.route_groups)
        # The rule reads the column of the data as they were given.
        rule = replace(cast(ByGroups, partition.rule), column=label_column)
        test_ids = rule.assign_labels(names[1]).route_ids
        rows.train = _with_column(rows.train, GROUP, partition.route_ids.tolist(), partition.route_names)
        rows.test = _with_column(rows.test, GROUP, test_ids.tolist(), partition.route_names)
        rows.rule, rows.route_column, rows.route_names = rule, GROUP, partition.route_names
        return rows
    if arguments.cluster_routes is not None:
        parts = (rows.train, rows.test)
        rows.train, rows.test = (part.remove_columns({ROUTE} & {*part.column_names}) for part in parts)
        rows.route_column = ROUTE
        return rows
    if column is not None:
        names = class_names(rows.train, column)
        values = [sample_names(data, column) for data in (rows.train, rows.test)]
        rows.train = with_classes(rows.train, column, values[0], names, column)
        rows.test = with_classes(rows.test, column, values[1], names, column)
        rows.route_column, rows.route_names = column, names
        return rows
    rows.route_names = rows.label_names
    return rows


def _split(rows: Rows, fraction: float, seed: int) -> Rows:
    """Holds out a part of every pair of route and label for testing, of pairs with more than one sample."""
    if not 0 < fraction < 1:
        raise BadInput(f"--test_fraction must be between 0 and 1, got {fraction}.")
    # In an order, since every process must draw the same.
    known = dict.fromkeys([LABEL] * bool(rows.label_names) + [rows.route_column] * bool(rows.route_names))
    cells = np.stack(
        [np.asarray(rows.train[name]) for name in known] or [np.zeros(len(rows.train), dtype=int)], axis=1
    )
    generator = np.random.default_rng([seed, 1])
    held_out = []
    for cell in np.unique(cells, axis=0):
        members = generator.permutation(np.flatnonzero((cells == cell).all(axis=1)))
        number = min(len(members) - 1, max(1, round(fraction * len(members))))
        held_out.extend(members[:number].tolist())
    if not held_out:
        raise BadInput("there is no test split, and no route has two samples of a label, to hold one out.")
    kept = np.setdiff1d(np.arange(len(rows.train)), held_out)
    rows.train, rows.test = rows.train.select(kept), rows.train.select(np.sort(held_out))
    return rows


def _drawn(rows: Rows, arguments: DataArguments, seed: int) -> Rows:
    """
    At most `max_train_samples` and `max_test_samples`. Training samples of labels tickets are equally many of each
    route, so that a model of all routes sees the same mixture as tickets, which take turns. Test samples keep the
    frequencies of their routes.
    """
    generator = np.random.default_rng(seed)
    limit = arguments.max_train_samples
    if rows.ticket_task == "membership" or not rows.route_names:
        chosen = generator.permutation(len(rows.train))[:limit]
        generator = np.random.default_rng(seed)
    elif limit is None:
        chosen = np.arange(len(rows.train))
    else:
        routes = np.asarray(rows.train[rows.route_column])
        found = np.unique(routes)
        shares = [generator.permutation(np.flatnonzero(routes == route))[: limit // len(found)] for route in found]
        chosen = np.concatenate(shares)
    rows.train = rows.train.select(np.sort(chosen))
    rows.test = rows.test.select(np.sort(generator.permutation(len(rows.test))[: arguments.max_test_samples]))
    if not len(rows.train) or not len(rows.test):
        raise BadInput("--max_train_samples or --max_test_samples leaves no sample; training needs one of each route.")
    return rows


def _labels(data: Dataset, column: str, arguments: DataArguments) -> list[str]:
    """The name of each sample's class."""
    bounds, names = arguments.class_bounds, arguments.class_names
    if not bounds:
        return sample_names(data, column)
    if len(names) != len(bounds) + 1 or sorted(set(bounds)) != bounds:
        raise BadInput(f"--class_bounds {bounds} must ascend and need {len(bounds) + 1} --class_names; got {names}.")
    values = np.asarray(data[column])
    if values.dtype.kind not in "fiu" or not np.isfinite(values).all():
        raise BadInput(f"column {column!r} must have finite numbers, which --class_bounds cut into classes.")
    return [names[index] for index in np.digitize(values, bounds)]


def sample_names(data: Dataset, column: str) -> list[str]:
    """The value of each sample in `column` as a string, by name if the column is a `ClassLabel`."""
    feature = data.features[column]
    values = data[column][:]
    missing = next((index for index, value in enumerate(values) if value is None or value == ""), None)
    if missing is not None:
        raise BadInput(f"column {column!r} has no value at sample {missing}; remove such rows, or fill them.")
    if isinstance(feature, ClassLabel):
        return feature.int2str(values)
    wrong = next((value for value in values if isinstance(value, float) and not value.is_integer()), None)
    if wrong is not None or not isinstance(feature, Value):
        raise BadInput(
            f"column {column!r} has {values[0] if wrong is None else wrong!r}, which is no name of a class or route; "
            "--class_bounds cuts labels that are numbers into classes."
        )
    return [str(int(value) if isinstance(value, float) else value) for value in values]


def class_names(data: Dataset, column: str) -> list[str]:
    """The names of a column of classes; those of other columns are their sorted values, whole numbers by size."""
    feature = data.features[column]
    if isinstance(feature, ClassLabel):
        return feature.names
    names = sorted(set(sample_names(data, column)))
    return sorted(names, key=int) if all(re.fullmatch(r"-?[0-9]+", name) for name in names) else names


def with_classes(data: Dataset, column: str, values: Sequence[str], names: list[str], source: str) -> Dataset:
    """The data with the names `values` as classes of `column`. Raises `BadInput` for a value that is no name."""
    known = {name: index for index, name in enumerate(names)}
    unknown = next((value for value in values if value not in known), None)
    if unknown is not None:
        raise BadInput(
            f"column {source!r} of the test data has {unknown!r}; the training data have "
            f"{', '.join(map(repr, names))}."
        )
    return _with_column(data, column, [known[value] for value in values], names)


def _with_column(data: Dataset, column: str, ids: list[int], names: list[str]) -> Dataset:
    kept = data.remove_columns(column) if column in data.column_names else data
    return kept.add_column(column, ids, feature=ClassLabel(names=names))


def _is_text(feature: object) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")
