"""How new data gets its routes: by a column, by groups of labels, by the nearest centre; saving and loading rules."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RemoteEntryNotFoundError
from torch import Tensor

from ..modeling.files import read_json, read_tensors, write_json, write_tensors
from ..modeling.mask_bank import check_route_names
from .columns import read_column
from .partition import Partition, Rule, routes_of_values


logger = logging.getLogger(__name__)

RULE_FILE = "partition.json"
TENSORS_FILE = "partition.safetensors"
CONFIG_FILE = "config.json"  # of the model in the same folder
BLOCK_SIZE = 2**22  # numbers that are compared with a centre at a time


@dataclass(frozen=True)
class ByColumn(Rule):
    """
    The value of a column is the route, as for [`partition_by_column`].

    Args:
        column (`str`): the column's name.
        route_names (`list[str]`): the names that the values must be among.

    Raises:
        ValueError: `column` is not a name, or `route_names` are not.
    """

    kind = "column"
    column: str
    route_names: list[str]

    def __post_init__(self) -> None:
        check_column_name(self.column)
        object.__setattr__(self, "route_names", check_route_names(self.route_names))

    def assign(self, data: Any, *, allow_empty: bool = True) -> Partition:
        """`data` is a data set with the column. Raises as [`partition_by_column`]."""
        values, _ = read_column(data, self.column)
        route_ids, _ = routes_of_values(f"Column {self.column!r} has", values, self.route_names)
        return Partition(route_ids, self.route_names, allow_empty, rule=self)

    def describe(self) -> str:
        return f"what its column {self.column!r} says"


@dataclass(frozen=True)
class ByGroups(Rule):
    """
    A group of labels is a route, and a column holds the label.

    Args:
        column (`str`): the column's name.
        groups (`Mapping[str, list[str]]`): the labels of each route, in the order of the routes. Integers are read as
            strings: a column of integers without class names has the labels `"0"`, `"1"`, ….

    Raises:
        ValueError: `column` is not a name, a group is not a list of labels or is empty, or a label is repeated.
    """

    kind = "groups"
    column: str
    groups: Mapping[str, list[str]]

    def __post_init__(self) -> None:
        check_column_name(self.column)
        object.__setattr__(self, "groups", _check_groups(self.groups))

    @property
    def route_names(self) -> list[str]:
        return list(self.groups)

    def assign(self, data: Any, *, allow_empty: bool = True) -> Partition:
        """
        The partition of a data set with the column.

        Raises:
            TypeError, ValueError: what [`partition_by_column`] refuses; labels that are in no group.
        """
        return self.assign_labels(read_column(data, self.column)[0], allow_empty=allow_empty)

    def assign_labels(self, labels: Sequence[str | int], *, allow_empty: bool = True) -> Partition:
        """The partition of samples with these labels, `[N]`. Raises as `assign`."""
        names = [str(label) for label in labels]
        routes = {label: route for route, group in enumerate(self.groups.values()) for label in group}
        unknown = sorted(set(names) - routes.keys())
        if unknown:
            raise ValueError(
                f"Column {self.column!r} has {', '.join(map(repr, unknown))}, which no group has; labels of "
                f"`groups` are {', '.join(map(repr, routes))}."
            )
        route_ids = np.array([routes[name] for name in names], dtype=np.int64)
        return Partition(route_ids, self.route_names, allow_empty, rule=self)

    def describe(self) -> str:
        return f"the group of the label in its column {self.column!r}"


@dataclass(frozen=True, eq=False)
class ByCentres(Rule):
    """
    The nearest centre, by Euclidean distance, is the route; among equally near ones the first.

    Args:
        centres (`Tensor`): `float64 [K, D]`.
        route_names (`list[str]`): K distinct names.

    Raises:
        TypeError: `centres` is not a tensor.
        ValueError: `centres` are of another type or shape, or not finite; bad `route_names`.
    """

    kind = "centres"
    centres: Tensor
    route_names: list[str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "route_names", check_route_names(self.route_names))
        if not isinstance(self.centres, Tensor):
            raise TypeError(f"`centres` is `{type(self.centres).__name__}`; a tensor, `float64 [K, D]`, is needed.")
        shape = list(self.centres.shape)
        if self.centres.dtype != torch.float64 or len(shape) != 2 or shape[0] != len(self.route_names) or not shape[1]:
            raise ValueError(
                f"`centres` is `{self.centres.dtype}` {shape}; `torch.float64` [{len(self.route_names)}, D] is "
                "needed, a row for each of `route_names`."
            )
        if not self.centres.isfinite().all():
            raise ValueError("`centres` has NaN or infinite values; they must be finite.")

    def assign(self, data: Any, *, allow_empty: bool = True) -> Partition:
        """
        The partition of features, `float [N, D]`: an array or a tensor. A row's route does not depend on other rows.

        Raises:
            TypeError, ValueError: `data` are no such features, or have NaN or infinite values.
        """
        features = check_features("data", data)
        centres = self.centres.numpy()
        if features.shape[1] != centres.shape[1]:
            raise ValueError(f"`data` has shape {list(features.shape)}; [N, {centres.shape[1]}] is needed.")
        rows = max(1, BLOCK_SIZE // centres.shape[1])
        blocks = [features[start : start + rows] for start in range(0, len(features), rows)]
        route_ids = np.concatenate([_nearest(block, centres) for block in blocks])
        return Partition(route_ids, self.route_names, allow_empty, rule=self)

    def describe(self) -> str:
        return "the nearest of {} centres to its {} features".format(*self.centres.shape)


def check_column_name(column: Any) -> None:
    """Raises `ValueError` unless `column` is a non-empty string."""
    if not isinstance(column, str) or not column:
        raise ValueError(f"`column` is {column!r}; a column's name is needed.")


def check_features(name: str, features: Any) -> np.ndarray:
    """
    `features` as an array, `float [N, D]`. `name` is what an error calls them.

    Raises:
        TypeError: they are not an array or a tensor of floats.
        ValueError: they are of another shape, empty, or not finite.
    """
    if isinstance(features, Tensor):
        features = features.detach().cpu()
        features = (features.float() if features.dtype == torch.bfloat16 else features).numpy()
    if not isinstance(features, np.ndarray) or features.dtype.kind != "f":
        kind = f"a `{features.dtype}` array" if isinstance(features, np.ndarray) else f"`{type(features).__name__}`"
        raise TypeError(f"`{name}` is {kind}; an array or a tensor of floats [N, D] is needed.")
    if features.ndim != 2 or features.size == 0:
        raise ValueError(f"`{name}` has shape {list(features.shape)}; [N, D] with N, D >= 1 is needed.")
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if bad.size:
        raise ValueError(f"`{name}` has NaN or infinite values at sample {bad[0]}; all must be finite.")
    return features


def save_rule(folder: str | Path, rule: Rule) -> None:
    """Writes `rule` into `folder`, replacing another: `partition.json`, with tensors in `partition.safetensors`."""
    folder = Path(folder)
    # Tensors are written before the file that needs them, and old ones are removed after it.
    if rule.tensors():
        write_tensors(folder / TENSORS_FILE, rule.tensors())
    write_json(folder / RULE_FILE, rule.to_dict())
    if not rule.tensors():
        (folder / TENSORS_FILE).unlink(missing_ok=True)


def load_rule(
    name_or_path: str | Path,
    route_names: Sequence[str] | None = None,
    *,
    revision: str | None = None,
    token: bool | str | None = None,
) -> Rule:
    """
    The rule that `RTLTrainer` or `save_rule` wrote into a folder, or that was pushed to the Hub.

    Args:
        name_or_path (`str` or `Path`): a folder, or a repository on the Hub; then all files are of one commit.
        route_names (`Sequence[str]`, *optional*): the routes, in their order, that the rule must be for. By default
            those of the model in the same folder, if there is one.
        revision, token: see `from_pretrained`.

    Raises:
        FileNotFoundError: there is no `partition.json`.
        ValueError: the files are damaged, or hold an unknown kind of rule, or a rule for other routes.
        HfHubHTTPError: the Hub has no such repository, or not for this `token`.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        folder = _downloaded(folder.as_posix(), revision, token)
    rule = _read_rule(folder, folder)
    if route_names is None and (folder / CONFIG_FILE).exists():
        route_names = _read_json(folder / CONFIG_FILE).get("route_names")
    if route_names is not None:
        _check_routes(rule, list(route_names), folder)
    return rule


def _read_rule(folder: Path, shown: Path) -> Rule:
    """The rule in a folder, whatever the routes of the model; errors call the folder `shown`."""
    if not (folder / RULE_FILE).exists():
        raise FileNotFoundError(f"{str(shown)!r} holds no rule: it has no {RULE_FILE}, which `save_rule` writes.")
    values = _read_json(folder / RULE_FILE, shown / RULE_FILE)
    try:
        return rule_from_dict(values, (_has_tensors(values) and read_tensors(folder / TENSORS_FILE)) or {})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{shown / RULE_FILE}: {error}") from error


def _check_routes(rule: Rule, route_names: list[str], shown: Path) -> None:
    if rule.route_names != route_names:
        raise ValueError(
            f"{shown / RULE_FILE} is a rule for other routes, {', '.join(map(repr, rule.route_names))}, than those of "
            f"the model, {', '.join(map(repr, route_names))}; make a partition into these routes, and save its rule."
        )


def remove_unfitting_rule(folder: Path, route_names: Sequence[str]) -> None:
    """Removes the rule in a folder, with a warning, if it is damaged or for other routes."""
    _keep_fitting_rule(folder, route_names, folder)


def follow_routes(folder: Path, route_names: Sequence[str], *, shown: Path) -> None:
    """
    Brings the rule in a folder up to date with routes that were dropped or added. It follows the order of the routes.
    A rule that also has other routes stays for when these come back; [`load_rule`] refuses it until then. One that
    lacks a route is removed, with a warning. Warnings call the folder `shown`.
    """
    try:
        rule = _read_rule(folder, shown)
    except (FileNotFoundError, ValueError):
        rule = None
    if rule is not None and set(rule.route_names) > set(route_names):
        others = [name for name in rule.route_names if name not in route_names]
        logger.warning(
            f"the rule of the partition, {shown / RULE_FILE}, stays for when {', '.join(map(repr, others))} are added "
            "again; `load_rule` refuses it until then."
        )
        return
    if rule is not None and set(rule.route_names) == set(route_names) and rule.route_names != list(route_names):
        save_rule(folder, _reordered(rule, route_names))
    _keep_fitting_rule(folder, route_names, shown)


def _keep_fitting_rule(folder: Path, route_names: Sequence[str], shown: Path) -> None:
    try:
        _check_routes(_read_rule(folder, shown), list(route_names), shown)
    except FileNotFoundError:
        return
    except ValueError as error:
        logger.warning(f"the rule of the partition is left out: {error}")
        remove_rule(folder)


def _reordered(rule: Rule, route_names: Sequence[str]) -> Rule:
    """The rule for the same routes in another order."""
    if isinstance(rule, ByCentres):
        return ByCentres(rule.centres[[rule.route_names.index(name) for name in route_names]], list(route_names))
    assert isinstance(rule, (ByColumn, ByGroups))
    # Not a `ByColumn`: integers without class names would be the routes at other positions than before.
    groups = rule.groups if isinstance(rule, ByGroups) else {name: [name] for name in rule.route_names}
    return ByGroups(rule.column, {name: groups[name] for name in route_names})


def replace_rule(folder: Path, rule: Rule | None, route_names: Sequence[str]) -> None:
    """Writes a rule into a folder; without one, or with one for other routes, removes that of an earlier save."""
    if rule is None:
        remove_rule(folder)
    else:
        save_rule(folder, rule)
        remove_unfitting_rule(folder, route_names)


def remove_rule(folder: Path) -> None:
    for name in (RULE_FILE, TENSORS_FILE):
        (folder / name).unlink(missing_ok=True)


def _downloaded(repo_id: str, revision: str | None, token: bool | str | None) -> Path:
    """The folder of a commit in the cache, with its rule and, if it has a model, the configuration."""
    try:
        file = Path(hf_hub_download(repo_id, RULE_FILE, revision=revision, token=token))
    except RemoteEntryNotFoundError:
        raise FileNotFoundError(
            f"{repo_id!r} holds no rule: it has no {RULE_FILE}, which `RTLTrainer` pushes with a model."
        ) from None
    for name in [CONFIG_FILE, *([TENSORS_FILE] if _has_tensors(_read_json(file)) else [])]:
        with contextlib.suppress(EntryNotFoundError):
            hf_hub_download(repo_id, name, revision=file.parent.name, token=token)
    return file.parent


def _has_tensors(values: Any) -> bool:
    return isinstance(values, Mapping) and values.get("kind") == ByCentres.kind


def _read_json(file: Path, shown: Path | None = None) -> Any:
    try:
        return read_json(file)
    except ValueError as error:
        raise ValueError(f"{shown or file} is damaged: {error}.") from error


def rule_from_dict(values: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> Rule:
    """
    The rule with these `to_dict()` and `tensors()`.

    Raises:
        ValueError: an unknown kind of rule, or other values or tensors than it has.
    """
    kinds: dict[str, type[Rule]] = {cls.kind: cls for cls in (ByColumn, ByGroups, ByCentres)}
    kind = values.get("kind") if isinstance(values, Mapping) else None
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"the rule's `kind` is {kind!r}; known are {', '.join(map(repr, kinds))}.")
    given = {name: value for name, value in values.items() if name != "kind"} | dict(tensors or {})
    needed = [field.name for field in fields(kinds[kind])]  # type: ignore[arg-type]
    if given.keys() != set(needed):
        raise ValueError(
            f"a rule of `kind` {kind!r} has {', '.join(map(repr, needed))}; got {', '.join(map(repr, given))}."
        )
    return kinds[kind](**given)


def _nearest(features: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Index of the nearest centre for each row, `int64 [N]`."""
    # Each row is summed by itself, since the rounding of a matrix product depends on the number of rows.
    rows = np.ascontiguousarray(features, dtype=np.float64)
    distances = np.stack([np.square(rows - centre).sum(axis=1) for centre in centres], axis=1)
    return distances.argmin(axis=1)


def _check_groups(groups: Any) -> dict[str, list[str]]:
    if not isinstance(groups, Mapping):
        raise ValueError(f"`groups` is a `{type(groups).__name__}`; a mapping from route names to labels is needed.")
    check_route_names(list(groups))
    checked: dict[str, list[str]] = {}
    label_routes: dict[str, str] = {}
    for route, labels in groups.items():
        if isinstance(labels, str) or not isinstance(labels, Sequence) or not labels:
            raise ValueError(f"`groups` has {labels!r} for {route!r}; a list of labels is needed, of at least one.")
        for label in labels:
            if not isinstance(label, (str, int)) or isinstance(label, bool):
                raise ValueError(
                    f"`groups` has {label!r}, a `{type(label).__name__}`, in {route!r}; labels are strings, in quotes "
                    "where YAML would read them as something else."
                )
            if str(label) in label_routes:
                raise ValueError(
                    f"`groups` has {str(label)!r} in {label_routes[str(label)]!r} and again in {route!r}; a label "
                    "belongs to exactly one group, once."
                )
            label_routes[str(label)] = route
        checked[route] = [str(label) for label in labels]
    return checked
