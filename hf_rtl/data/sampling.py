"""Single-route batches in rotation (paper, section 3, Algorithm 2), and the data set that serves them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from ..modeling.checks import check_integer
from .partition import check_route_ids
from .seeds import spawned_words


# First word of a spawn key, so that the two uses of one seed never draw from the same stream.
_BATCHES, _TRANSFORMS = 0, 1
# Stands for the route of a batch whose samples every ticket scores; greater than any route's index.
ALL_ROUTES = 2**31 - 1


class RouteSample(NamedTuple):
    """
    One draw of a sample.

    Args:
        index (`int`): position in the data set.
        route (`int`): the route whose batch this draw is in; for a negative, not the sample's own. `ALL_ROUTES` where
            all tickets compete for it.
        occurrence (`int`): number of the draw in its route's stream, over all epochs.
        key (`tuple[int, ...]`, defaults to `()`): that of its sampler. (key, index, route, occurrence) does not repeat
            within a run.
    """

    index: int  # type: ignore[assignment]  # hides `tuple.index`, which is not needed
    route: int
    occurrence: int
    key: tuple[int, ...] = ()


class RouteBatchSampler(Sampler[list[RouteSample]]):
    """
    Batches of a single route each. The routes take turns, and each has the same number of batches.

    An epoch is M updates of every route, where M is the number that the largest route needs to show all its samples.
    For every update and every route in turn, `gradient_accumulation_steps` batches of that route follow each other, so
    an update never mixes routes. All batches are full: a route's samples come as one random permutation after another,
    so last batches are filled from the next permutation, and smaller routes repeat.

    For membership, a batch holds as many negatives as positives, alternating (positive, negative, positive, …). The
    negatives of a route are drawn uniformly from all samples of all other routes, anew in each epoch. None is repeated
    before all have been drawn.

    From the epoch `first_competing_epoch` on, batches hold samples of all routes, at their own prevalence, for all
    tickets to score. Such an epoch has as many batches as any other, each of `batch_size // num_routes` samples, so
    all tickets together see as many samples.

    Everything is a pure function of `seed`, `key`, epoch and route: nothing needs saving, and the global batches are
    the same for any number of processes. Rank r yields every `world_size`-th sample of a batch from the r-th on
    (for membership, every `world_size`-th pair of a positive and a negative), so all ranks work on the same route.
    The sampler must not be sharded again, as accelerate would do; `batch_size` is that of the global batch.

    Args:
        route_ids (`np.ndarray`): `int64 [N]`, the route of each sample.
        num_routes (`int`): K.
        batch_size (`int`): samples in one global batch, before accumulation; a multiple of `world_size`, and for
            membership of `2 * world_size`.
        membership (`bool`): whether half of each batch are negatives.
        seed (`int`): non-negative.
        routes (`Sequence[int]`, *optional*): the routes that take turns, in this order; defaults to all. Extraction
            passes one. Negatives come from the whole data set in any case.
        key (`tuple[int, ...]`, defaults to `()`): further entropy, such as the round and the prune event.
        gradient_accumulation_steps (`int`, defaults to 1): batches per update.
        first_competing_epoch (`int`, *optional*): see above; without it, none.
        rank (`int`, defaults to 0): this process, below `world_size`.
        world_size (`int`, defaults to 1): number of processes.

    Raises:
        TypeError: `route_ids` is not an integer array, a number not an integer, or `membership` not a `bool`.
        ValueError: a number out of range, a `batch_size` that cannot be split evenly, a route without samples, or one
            without negatives for membership.
    """

    def __init__(
        self,
        route_ids: np.ndarray,
        *,
        num_routes: int,
        batch_size: int,
        membership: bool,
        seed: int,
        routes: Sequence[int] | None = None,
        key: tuple[int, ...] = (),
        gradient_accumulation_steps: int = 1,
        first_competing_epoch: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.num_routes = check_integer("num_routes", num_routes, minimum=1)
        self.route_ids = check_route_ids(route_ids, num_routes=self.num_routes)
        self.batch_size = check_integer("batch_size", batch_size, minimum=1)
        self.membership = _check_flag("membership", membership)
        self.seed, self.key = _check_entropy(seed, key)
        self.gradient_accumulation_steps = check_integer(
            "gradient_accumulation_steps", gradient_accumulation_steps, minimum=1
        )
        self.world_size = check_integer("world_size", world_size, minimum=1)
        self.rank = check_integer("rank", rank, minimum=0)
        if self.rank >= self.world_size:
            raise ValueError(f"`rank` is {rank}; allowed are 0 to {self.world_size - 1}, below `world_size`.")
        # Samples that are never split between ranks: a positive with its negative, so every rank has half of each.
        self._unit = 2 if membership else 1
        if self.batch_size % (self._unit * self.world_size):
            reason = "a positive and a negative on each rank" if membership else "the same number on each rank"
            raise ValueError(
                f"`batch_size` is {batch_size}; with {self.world_size} process(es) it must be a multiple of "
                f"{self._unit * self.world_size}, for {reason}."
            )
        self.routes = self._check_routes(routes)
        self.first_competing_epoch = first_competing_epoch
        competing_size = self.batch_size // self.num_routes
        if first_competing_epoch is not None and (competing_size < world_size or competing_size % world_size):
            raise ValueError(
                f"`batch_size` is {batch_size}; where {self.num_routes} tickets compete, a batch has that many times "
                f"fewer samples, {competing_size}, and needs as many on each of {world_size} process(es): take a "
                f"multiple of {self.num_routes * self.world_size}."
            )
        self.epoch = 0

    def _check_routes(self, routes: Sequence[int] | None) -> list[int]:
        chosen = list(range(self.num_routes)) if routes is None else [check_integer("routes", r) for r in routes]
        if not chosen or len(set(chosen)) != len(chosen) or not all(0 <= r < self.num_routes for r in chosen):
            raise ValueError(f"`routes` is {routes}; distinct ids from 0 to {self.num_routes - 1} are needed.")
        counts = np.bincount(self.route_ids, minlength=self.num_routes)
        for route in chosen:
            if counts[route] == 0:
                raise ValueError(f"Route {route} has no samples in `route_ids`, so no batch can be made of it.")
            if self.membership and counts[route] == len(self.route_ids):
                raise ValueError(f"Route {route} has all {counts[route]} samples: membership has no negatives for it.")
        return chosen

    @property
    def num_updates_per_route(self) -> int:
        """M: updates of each route in an epoch, ceil(samples / positives per update) of the largest route."""
        positives_per_update = self.batch_size // self._unit * self.gradient_accumulation_steps
        largest = int(np.bincount(self.route_ids, minlength=self.num_routes)[self.routes].max())
        return -(-largest // positives_per_update)

    def __len__(self) -> int:
        """Batches of an epoch: updates times routes times accumulation steps."""
        return self.num_updates_per_route * len(self.routes) * self.gradient_accumulation_steps

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch (from 0) that the next iteration yields."""
        self.epoch = check_integer("epoch", epoch, minimum=0)

    def __iter__(self) -> Iterator[list[RouteSample]]:
        if self.first_competing_epoch is not None and self.epoch >= self.first_competing_epoch:
            yield from self._competing_batches()
            return
        num_updates = self.num_updates_per_route
        stream_length = num_updates * self.gradient_accumulation_steps * self.batch_size
        first_occurrence = self.epoch * stream_length
        streams = {route: self._stream(route, stream_length) for route in self.routes}
        positions = np.arange(self.batch_size).reshape(-1, self._unit)[self.rank :: self.world_size].reshape(-1)
        for update in range(num_updates):
            for route in self.routes:
                for step in range(self.gradient_accumulation_steps):
                    start = (update * self.gradient_accumulation_steps + step) * self.batch_size
                    yield [
                        RouteSample(int(streams[route][position]), route, first_occurrence + int(position), self.key)
                        for position in start + positions
                    ]

    def _competing_batches(self) -> Iterator[list[RouteSample]]:
        size = self.batch_size // self.num_routes
        length = len(self) * size
        stream = self._permutations(np.arange(len(self.route_ids)), length, self.num_routes, 0)
        for start in range(0, length, size):
            positions = range(start + self.rank, start + size, self.world_size)
            yield [
                RouteSample(int(stream[position]), ALL_ROUTES, self.epoch * length + position, self.key)
                for position in positions
            ]

    def _stream(self, route: int, length: int) -> np.ndarray:
        """The epoch's samples of `route`'s global batches one after the other, `int64 [length]`."""
        own = self.route_ids == route
        positives = self._permutations(np.flatnonzero(own), length // self._unit, route, 0)
        if not self.membership:
            return positives
        negatives = self._permutations(np.flatnonzero(~own), length // self._unit, route, 1)
        return np.stack([positives, negatives], axis=1).reshape(-1)

    def _permutations(self, pool: np.ndarray, length: int, route: int, part: int) -> np.ndarray:
        generator = np.random.default_rng(
            np.random.SeedSequence(self.seed, spawn_key=(_BATCHES, *self.key, self.epoch, route, part))
        )
        num_permutations = -(-length // len(pool))
        return np.concatenate([generator.permutation(pool) for _ in range(num_permutations)])[:length]


class Passes(Sampler[list[RouteSample]]):
    """
    The batches of `current`, which may be exchanged between two passes: so one loader, whose workers live on, serves
    all passes over a data set.

    A pass draws a number from torch's global generator, as a loader without persistent workers does. So dropout is the
    same whether workers live on or not. The loader itself needs a `generator` of its own, to draw no more.
    """

    def __init__(self, current: RouteBatchSampler) -> None:
        self.current = current

    def __iter__(self) -> Iterator[list[RouteSample]]:
        torch.empty((), dtype=torch.int64).random_()
        yield from self.current

    def __len__(self) -> int:
        return len(self.current)

    def set_epoch(self, epoch: int) -> None:
        self.current.set_epoch(epoch)


class RoutedDataset(Dataset[dict[str, Any]]):
    """
    A map-style data set of dicts, addressed by `RouteSample` instead of by position.

    An item is the base's dict with `route_ids` (`int`) added, the route of the batch. For membership, `label_column`
    is removed and `labels` (`int`) is 1 if the sample is of that route, 0 if not; in a batch of all routes, its route.

    With `seed_transforms`, the global generators of Python, NumPy and torch (CPU) are seeded from (`seed`, key,
    index, route, occurrence) before each sample is fetched. So random transforms depend on neither the order of
    fetching, nor the number of workers or processes, nor where a run was resumed. The generators' states are restored
    after the batch. Transforms with a generator of their own are not covered. Without `seed_transforms`, no generator
    is touched, and the batch is fetched in one call if the base has `__getitems__`, as `datasets.Dataset` has. This is
    faster, and correct if transforms are not random.

    Args:
        dataset (map-style data set of dicts): the base.
        route_ids (`np.ndarray`): `int64 [N]`, the route of each sample.
        membership (`bool`): whether labels are replaced as above.
        seed (`int`): non-negative.
        label_column (`str`, *optional*): the base's label column; read for membership only.
        seed_transforms (`bool`, defaults to `True`): see above.

    Raises:
        TypeError: an argument of the wrong type, an index that is not a `RouteSample`, or a base whose items are not
            dicts.
        ValueError: `route_ids` and `dataset` differ in length, or `seed` is negative.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        route_ids: np.ndarray,
        membership: bool,
        seed: int,
        label_column: str | None = None,
        seed_transforms: bool = True,
    ) -> None:
        self.dataset = dataset
        self.route_ids = check_route_ids(route_ids)
        if len(self.route_ids) != len(dataset):
            raise ValueError(
                f"`route_ids` has {len(self.route_ids)} entries and `dataset` {len(dataset)}; both need the same."
            )
        self.membership = _check_flag("membership", membership)
        self.seed = check_integer("seed", seed, minimum=0)
        self.label_column = label_column
        self.seed_transforms = _check_flag("seed_transforms", seed_transforms)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, sample: RouteSample) -> dict[str, Any]:
        return self.__getitems__([sample])[0]

    def __getitems__(self, samples: Sequence[RouteSample]) -> list[dict[str, Any]]:
        for sample in samples:
            if not isinstance(sample, RouteSample):
                raise TypeError(
                    f"Items are addressed by `RouteSample`, got {sample!r}: use a `RouteBatchSampler` as the data "
                    "loader's `batch_sampler`."
                )
        return [self._routed(item, sample) for item, sample in zip(self._fetch(samples), samples, strict=True)]

    def _fetch(self, samples: Sequence[RouteSample]) -> Sequence[Any]:
        if self.seed_transforms:
            items = []
            seeds = self._seeds(samples)
            with _generators_put_back():
                for sample, (for_python, for_numpy, for_torch) in zip(samples, seeds, strict=True):
                    random.seed(for_python)
                    np.random.seed(for_numpy % 2**32)
                    # Not `torch.manual_seed`, which would seed the accelerators too.
                    torch.default_generator.manual_seed(for_torch)
                    items.append(self.dataset[sample.index])
            return items
        return fetch(self.dataset, [sample.index for sample in samples])

    def _seeds(self, samples: Sequence[RouteSample]) -> Iterator[list[int]]:
        """Three seeds for each sample."""
        for key, group in groupby(samples, key=attrgetter("key")):
            keys = [(sample.index, sample.route, sample.occurrence) for sample in group]
            yield from spawned_words(self.seed, (_TRANSFORMS, *key), keys, 3).tolist()

    def _routed(self, item: Any, sample: RouteSample) -> dict[str, Any]:
        if not isinstance(item, Mapping):
            raise TypeError(f"`dataset[{sample.index}]` is a `{type(item).__name__}`; samples must be dicts.")
        routed = {**item, "route_ids": sample.route}
        if self.membership:
            if self.label_column is not None:
                routed.pop(self.label_column, None)
            home = int(self.route_ids[sample.index])
            routed["labels"] = home if sample.route == ALL_ROUTES else int(home == sample.route)
        return routed


def fetch(dataset: Any, indices: list[int]) -> Sequence[Any]:
    """Samples of a map-style data set, in one call if it can give several."""
    if hasattr(dataset, "__getitems__"):
        return dataset.__getitems__(indices)
    return [dataset[index] for index in indices]


@contextmanager
def _generators_put_back() -> Iterator[None]:
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


def _check_flag(name: str, value: bool) -> bool:
    # The name of a task, given as the flag, would always count as true.
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` is {value!r}; `True` or `False` is needed.")
    return value


def _check_entropy(seed: int, key: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    if not isinstance(key, tuple):
        raise TypeError(f"`key` is {key!r}, a `{type(key).__name__}`; a tuple of integers is needed, as in `(2, 0)`.")
    return check_integer("seed", seed, minimum=0), tuple(check_integer("key", word, minimum=0) for word in key)
