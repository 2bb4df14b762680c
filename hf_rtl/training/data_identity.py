"""What data are known by: their number, and hashes of all routes and labels and of the features of a few samples."""

from __future__ import annotations

import bisect
import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from ..data.columns import has_transform, is_hf_dataset, keeping, label_column, label_values
from ..data.partition import Partition
from ..data.route_data import EvaluationData
from ..modeling.hashing import hash_tensors
from .randomness import Stream, seeded


_NUM_HASHED = 64
# Makes a function that makes a batch of samples, which shares no state with others.
MakeCollate = Callable[[], Callable[[list], dict]]


def identify_data(
    dataset: Any,
    partition: Partition,
    device: torch.device,
    *,
    membership: bool,
    make_collate: MakeCollate | None = None,
) -> dict[str, Any]:
    """
    The identity of a data set, as JSON values. The global generators keep their states.

    Args:
        dataset (map-style data set of dicts): the samples.
        partition ([`Partition`]): their routes.
        device (`torch.device`): the device whose generator is kept too.
        membership (`bool`): whether routes take the place of labels, which then decide nothing.
        make_collate (`Callable`, *optional*): makes a function that makes a batch of samples. With it, features are
            those that are stored, without the transforms of `datasets`, and columns that change no batch are left out.

    Returns:
        `num_samples`, `routes`, `labels` (`None` without a label column), and `features` (of 64 samples at equal
        distances); with `make_collate` also `stored`, the features of all columns. A hash is `None` if the values are
        random or of a type that cannot be hashed.
    """
    with seeded((0, Stream.READING), device):  # without column names it reads a sample
        column = label_column(dataset)

    read_stored = stored_samples(dataset)

    def features(index: int) -> dict[str, Any]:
        sample = dataset[index] if make_collate is None else read_stored(index)
        return {name: value for name, value in sample.items() if name != column}

    def label(index: int) -> Any:
        return read_stored(index)[column]

    labels = None
    # Random transforms may change labels too.
    if column is not None and not membership and _hash_samples(label, len(dataset), device) is not None:
        with seeded((0, Stream.READING), device):
            # Masks of images are many and large: those of a few samples stand for all.
            first = label(0)
            are_large = isinstance(first, Mapping) or np.ndim(first) > 1
            if are_large:
                labels = _hash_samples(label, len(dataset), device)
            else:
                labels = hash_values(_current_labels(dataset, label))
    routes = hash_tensors({"route_ids": torch.from_numpy(partition.route_ids)})
    found = {"num_samples": len(dataset), "routes": routes, "labels": labels}
    if make_collate is None:
        return {**found, "features": _hash_samples(features, len(dataset), device)}
    with seeded((0, Stream.READING), device):
        columns = list(features(0))
    unused = _unused_columns(columns, dataset, partition, device, membership=membership, make_collate=make_collate)

    def both(index: int) -> dict[str, Any]:
        sample = features(index)
        return {"stored": sample, "features": {name: sample[name] for name in sample if name not in unused}}

    return {**found, **_hash_parts(both, len(dataset), device)}


def stored_samples(dataset: Any) -> Callable[[int], Any]:
    """Reads a sample of a data set by its index, of `datasets` as it is stored, without transforms and formats."""
    if isinstance(dataset, Subset):
        read = stored_samples(dataset.dataset)
        return lambda index: read(dataset.indices[index])
    if isinstance(dataset, ConcatDataset):
        reads, ends = list(map(stored_samples, dataset.datasets)), dataset.cumulative_sizes

        def read_part(index: int) -> Any:
            part = bisect.bisect_right(ends, index)
            return reads[part](index - [0, *ends][part])

        return read_part
    if is_hf_dataset(dataset):
        rows = dataset.with_format("arrow")
        return lambda index: rows[index].to_pylist()[0]
    return dataset.__getitem__


def _current_labels(dataset: Any, label: Callable[[int], Any]) -> Any:
    """The labels of all samples, as kept, unless some have changed in place since they were read."""
    values = label_values(dataset)
    assert values is not None
    indices = _hashed_indices(len(dataset))
    if all(np.array_equal(values[index], label(index)) for index in indices):
        return values
    with keeping(None):
        return label_values(dataset)


def _unused_columns(
    columns: Sequence[str],
    dataset: Any,
    partition: Partition,
    device: torch.device,
    *,
    membership: bool,
    make_collate: MakeCollate,
) -> list[str]:
    """
    The columns without which batches of the hashed samples are the same, so that no transform or collator reads them,
    and no model. None are known if these batches cannot be made or hashed.
    """
    indices = _hashed_indices(len(dataset))

    def read(view: Any) -> list[dict[str, Any]]:
        samples = EvaluationData(view, partition, membership=membership)
        with seeded((0, Stream.READING), device):
            return [samples[index] for index in indices]

    def hash_batches(samples: Sequence[dict[str, Any]]) -> str | None:
        routes: dict[int, list[dict[str, Any]]] = {}  # samples of several routes may differ in size
        for index, sample in zip(indices, samples, strict=True):
            routes.setdefault(int(partition.route_ids[index]), []).append(sample)
        collate = make_collate()
        with seeded((1, Stream.READING), device):
            return hash_values([dict(collate(group)) for group in routes.values()])

    def is_unused(name: str) -> bool:
        with contextlib.suppress(Exception):  # whatever code of the caller raises without its column
            if has_transform(dataset):
                return hash_batches(read(_without(dataset, name))) == whole
            return hash_batches([{key: s[key] for key in s if key != name} for s in samples]) == whole
        return False

    with contextlib.suppress(Exception):  # of a collator that needs other batches
        samples = read(dataset)
        whole = hash_batches(samples)
        return [] if whole is None else [name for name in columns if is_unused(name)]
    return []


def _without(dataset: Any, column: str) -> Any:
    """A data set without a column of those of `datasets` in it."""
    if isinstance(dataset, Subset):
        return Subset(_without(dataset.dataset, column), dataset.indices)
    if isinstance(dataset, ConcatDataset):
        return ConcatDataset([_without(part, column) for part in dataset.datasets])
    return dataset.remove_columns(column) if is_hf_dataset(dataset) and column in dataset.column_names else dataset


def _hash_samples(read: Callable[[int], Any], num_samples: int, device: torch.device) -> str | None:
    """A hash of some samples; `None` if two readings differ, or a value cannot be hashed."""
    return _hash_parts(lambda index: {"": read(index)}, num_samples, device)[""]


def _hash_parts(read: Callable[[int], dict[str, Any]], num_samples: int, device: torch.device) -> dict[str, Any]:
    """The same for each part of the samples, by its name."""
    found = []
    for reading in range(2):
        with seeded((reading, Stream.READING), device):
            samples = [read(index) for index in _hashed_indices(num_samples)]
        found.append({name: hash_values([sample[name] for sample in samples]) for name in samples[0]})
    return {name: value if value == found[1][name] else None for name, value in found[0].items()}


def _hashed_indices(num_samples: int) -> list[int]:
    return np.unique(np.linspace(0, num_samples - 1, _NUM_HASHED).astype(int)).tolist()


def hash_values(values: Any) -> str | None:
    """SHA-256 over nested numbers, texts, bytes and arrays; `None` if a value is something else."""
    digest = hashlib.sha256()
    try:
        _add(digest, values)
    except (OSError, TypeError):
        return None
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, Mapping) and value.keys() == {"bytes", "path"}:
        # An image or a sound of `datasets`; the file may lie elsewhere next time.
        value = Path(value["path"]).read_bytes() if value["bytes"] is None else value["bytes"]
    if isinstance(value, Mapping):
        for name in sorted(value):
            _add(digest, name)
            _add(digest, value[name])
    elif value is None or isinstance(value, (str, bytes)):
        content = value if isinstance(value, bytes) else repr(value).encode()
        digest.update(f"{type(value).__name__} {len(content)}:".encode() + content)
    elif isinstance(value, Tensor):
        digest.update(hash_tensors({"": value}).encode())
    elif (array := _as_numbers(value)) is not None:
        digest.update(f"{array.dtype} {array.shape}:".encode() + array.tobytes())
    elif isinstance(value, (list, tuple)):
        digest.update(f"list {len(value)}:".encode())
        for inner in value:
            _add(digest, inner)
    else:
        raise TypeError(f"a {type(value).__name__} cannot be hashed.")


def _as_numbers(value: Any) -> np.ndarray | None:
    """Numbers, nested or not, as one array, which is hashed much faster than its parts; `None` for anything else."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):  # for example a ragged list
        return None
    return array if array.dtype.kind in "biufc" else None
