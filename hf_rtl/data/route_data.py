"""The training data of a run: which samples each route has, and the loaders of both phases."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from .columns import LABEL_COLUMNS, find_label_column, is_truth_value, label_column, require_column
from .partition import Partition, Rule
from .partition_by import partition_by_column
from .rules import ByColumn, ByGroups
from .sampling import Passes, RouteBatchSampler, RoutedDataset, fetch


def find_partition(
    dataset: Any,
    *,
    route_column: str | None,
    route_names: Sequence[str],
    ticket_task: str,
    allow_empty: bool = False,
    training: Partition | None = None,
) -> Partition:
    """
    The partition of a data set by `route_column`. Without a column, all samples are of the route if there is only one;
    else the rule of `training` applies, the partition of the training data; else the label column.

    Raises:
        TypeError, ValueError: what `partition_by_column` refuses; without a `route_column`, `labels` tickets, or a
            `training` partition whose rule reads no column or is for other routes.
    """
    if route_column is not None:
        require_column(dataset, route_column, "route_column")
        return partition_by_column(dataset, route_column, route_names=route_names, allow_empty=allow_empty)
    if len(route_names) == 1:
        return Partition(np.zeros(len(dataset), dtype=np.int64), list(route_names), allow_empty)
    if training is not None:
        return _column_rule(training, route_names).assign(dataset, allow_empty=allow_empty)
    if ticket_task == "labels":
        raise ValueError(
            "`route_column` is missing: tickets of `ticket_task='labels'` predict the label, so another column must "
            "say the route, as in `RTLTrainingArguments(route_column='domain', …)`; or pass a `partition` with "
            "`train_dataset`."
        )
    column = find_label_column(dataset, "route_column")
    return partition_by_column(dataset, column, route_names=route_names, allow_empty=allow_empty)


def route_columns(route_column: str | None, ticket_task: str, training: Partition | None) -> Sequence[str]:
    """The columns of which one says the route, for the arguments of `find_partition`; none if no column does."""
    if route_column is not None:
        return [route_column]
    if training is not None:
        return [training.rule.column] if isinstance(training.rule, (ByColumn, ByGroups)) else []
    return LABEL_COLUMNS if ticket_task == "membership" else []


def _column_rule(training: Partition, route_names: Sequence[str]) -> Rule:
    """The rule of the training data's partition, for other data sets."""
    rule, otherwise = training.rule, "put their route ids into a column, and name it: `route_column='route'`."
    if not isinstance(rule, (ByColumn, ByGroups)):
        what = "has no rule" if rule is None else "has a rule that reads features"
        raise ValueError(f"the `partition` of `train_dataset` {what}, so it cannot assign other data: {otherwise}")
    if rule.route_names != list(route_names):
        raise ValueError(
            f"the rule of `partition` is for other routes, {', '.join(map(repr, rule.route_names))}, than the model "
            f"has now, {', '.join(map(repr, route_names))}, so it cannot assign other data: {otherwise}"
        )
    return rule


def check_partition(partition: Partition, dataset: Any, route_names: Sequence[str]) -> Partition:
    """
    `partition` with `allow_empty=False`: training needs two samples of every route.

    Raises:
        TypeError: it is not a `Partition`.
        ValueError: no `dataset`, other routes than the model's, another length, or a route with too few samples.
    """
    if not isinstance(partition, Partition):
        raise TypeError(
            f"`partition` must be a Partition, got {type(partition).__name__}; make one from an array of integers: "
            "`Partition(route_ids, route_names)`."
        )
    if dataset is None:
        raise ValueError("`partition` belongs to a `train_dataset`, which is missing; pass both, or neither.")
    if partition.route_names != list(route_names):
        raise ValueError(
            f"`partition` has the routes {', '.join(map(repr, partition.route_names))}, but the model "
            f"{', '.join(map(repr, route_names))}; both need the same in the same order: make the model with "
            "`route_names=partition.route_names`."
        )
    if len(partition.route_ids) != len(dataset):
        raise ValueError(
            f"`partition` has {len(partition.route_ids)} samples, but `train_dataset` {len(dataset)}; it must say the "
            "route of each, in their order."
        )
    return replace(partition, allow_empty=False)


@dataclass(eq=False)
class RouteData:
    """
    A data set with its partition, and the single-route batches made of it.

    Args:
        dataset (map-style data set of dicts): the samples.
        partition ([`Partition`]): the route of each.
        membership (`bool`): whether labels become "is it this route's?".
        seed (`int`): of all batches.
        batch_size (`int`): samples of a batch over all processes.
        seed_transforms (`bool`): see [`RoutedDataset`].
    """

    dataset: Any
    partition: Partition
    _: KW_ONLY
    membership: bool
    seed: int
    batch_size: int
    seed_transforms: bool

    def __post_init__(self) -> None:
        # Read once: it may fetch a sample, whose random transforms move the global generators on.
        self._label_column = label_column(self.dataset) if self.membership else None

    def sampler(self, key: tuple[int, ...], **kwargs: Any) -> RouteBatchSampler:
        """Batches keyed by `key`; for the other arguments see `RouteBatchSampler`."""
        return RouteBatchSampler(
            self.partition.route_ids,
            num_routes=len(self.partition.route_names),
            batch_size=self.batch_size,
            membership=self.membership,
            seed=self.seed,
            key=key,
            **kwargs,
        )

    def loader(self, sampler: RouteBatchSampler, collate: Callable[[list], dict], **kwargs: Any) -> DataLoader:
        """
        A loader whose batches carry their route as a plain `int` under `route`. `kwargs` go to `DataLoader`. With
        `persistent_workers` its `batch_sampler` is a [`Passes`].
        """
        dataset = RoutedDataset(
            self.dataset,
            route_ids=self.partition.route_ids,
            membership=self.membership,
            seed=self.seed,
            label_column=self._label_column,
            seed_transforms=self.seed_transforms,
        )
        batches: Any = sampler
        if kwargs.get("persistent_workers"):
            batches, kwargs["generator"] = Passes(sampler), torch.Generator()
        return DataLoader(dataset, batch_sampler=batches, collate_fn=partial(collate_route, collate), **kwargs)

    def endless_batches(
        self, sampler: RouteBatchSampler, collate: Callable[[list], dict], **kwargs: Any
    ) -> Iterator[dict[str, Any]]:
        """The batches of one epoch after the other, without end. Workers live on from epoch to epoch."""
        return repeat(self.loader(sampler, collate, **kwargs, persistent_workers=kwargs.get("num_workers", 0) > 0))

    def as_one_route(self) -> RouteData:
        """The same samples, all of one route and with their own labels."""
        joined = copy.copy(self)
        joined.partition = Partition(np.zeros_like(self.partition.route_ids), ["all"])
        return joined

    def hold_out(self, fraction: float, seed: int) -> tuple[RouteData, RouteData]:
        """
        Splits off `fraction` of every route, drawn by `seed`: the data that is left, and the part held out. Raises
        `ValueError` if a route has too few samples for that.
        """
        generator = np.random.default_rng(seed)
        held_out: list[int] = []
        for route, name in enumerate(self.partition.route_names):
            own = generator.permutation(np.flatnonzero(self.partition.route_ids == route))
            count = round(fraction * len(own))
            if count < 1 or len(own) - count < 2:
                raise ValueError(
                    f"`calibration_fraction` = {fraction} leaves {count} of the {len(own)} samples of route {name!r} "
                    f"to calibrate on and {len(own) - count} to train on; at least 1 and 2 are needed. Change it, or "
                    "pass a `calibration_dataset`."
                )
            held_out.extend(own[:count].tolist())
        kept = np.setdiff1d(np.arange(len(self.dataset)), held_out)
        return self._rows(kept), self._rows(np.sort(held_out), allow_empty=True)

    def _rows(self, indices: np.ndarray, *, allow_empty: bool = False) -> RouteData:
        part = copy.copy(self)
        part.dataset = Subset(self.dataset, indices.tolist())
        route_ids = self.partition.route_ids[indices]
        part.partition = replace(self.partition, route_ids=route_ids, allow_empty=allow_empty)
        return part


def repeat(loader: DataLoader) -> Iterator[dict[str, Any]]:
    """The batches of one epoch of a loader after the other, without end."""
    for epoch in itertools.count():
        loader.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
        yield from loader


class EvaluationData(Dataset[dict[str, Any]]):
    """
    A data set in its own order, each sample with what evaluation needs: for `membership` its home route as `labels`,
    else its route as `route_ids`. Without a `partition`, samples have no route, and for `membership` no label.
    """

    def __init__(self, dataset: Any, partition: Partition | None, *, membership: bool) -> None:
        self.dataset = dataset
        self.partition = partition
        self.membership = membership
        self._replaced = {label_column(dataset), "labels", "label_ids"} if membership else set()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._with_route(self.dataset[index], index)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        samples = fetch(self.dataset, list(indices))
        return [self._with_route(sample, index) for sample, index in zip(samples, indices, strict=True)]

    def _with_route(self, sample: Mapping[str, Any], index: int) -> dict[str, Any]:
        kept = {name: value for name, value in sample.items() if name not in self._replaced}
        if self.partition is None:
            return kept
        return {**kept, "labels" if self.membership else "route_ids": int(self.partition.route_ids[index])}


_LABELS = ("label", "labels", "label_ids")  # names that collators of transformers read


def collate_classes(
    collate: Callable[[list], dict], label2id: Mapping[str, int], samples: list[Mapping[str, Any]]
) -> dict[str, Any]:
    """Collates samples whose labels may be truth values or names, as the integers that losses of classes need."""
    return collate(
        [{name: _as_integer(name, value, label2id) for name, value in sample.items()} for sample in samples]
    )


def _as_integer(name: str, value: Any, label2id: Mapping[str, int]) -> Any:
    if name in _LABELS and isinstance(value, str):
        return label2id[value]
    return int(value) if name in _LABELS and is_truth_value(value) else value


def collate_route(collate: Callable[[list], dict], samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Collates the samples of one route; the route becomes a plain `int`, which needs no device synchronisation."""
    (route,) = {sample["route_ids"] for sample in samples}
    batch = collate([{k: v for k, v in sample.items() if k != "route_ids"} for sample in samples])
    return {**batch, "route": route}
