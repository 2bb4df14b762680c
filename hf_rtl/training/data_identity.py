"""What data are known by: their number, and hashes of all routes and labels and of the features of a few samples."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from ..data.columns import is_hf_dataset, label_column, label_values
from ..data.partition import Partition
from ..modeling.hashing import hash_tensors
from .randomness import Stream, seeded


_NUM_HASHED = 64


def identify_data(
    dataset: Any, partition: Partition, device: torch.device, *, membership: bool, raw: bool
) -> dict[str, Any]:
    """
    The identity of a data set, as JSON values. The global generators keep their states.

    Args:
        dataset (map-style data set of dicts): the samples.
        partition ([`Partition`]): their routes.
        device (`torch.device`): the device whose generator is kept too.
        membership (`bool`): whether routes take the place of labels, which then decide nothing.
        raw (`bool`): whether features are read without the transforms of `datasets`.

    Returns:
        `num_samples`, `routes`, `labels` (`None` without a label column), and `features` (of 64 samples at equal
        distances). A hash is `None` if the values are random or of a type that cannot be hashed.
    """
    with seeded((0, Stream.READING), device):  # without column names it reads a sample
        column = label_column(dataset)

    def features(index: int) -> Any:
        sample = read_raw(dataset, index) if raw else dataset[index]
        return {name: value for name, value in sample.items() if name != column}

    def label(index: int) -> Any:
        return read_raw(dataset, index)[column]

    hashed, labels = _hash_samples(features, len(dataset), device), None
    # Random transforms may change labels too.
    if column is not None and not membership and _hash_samples(label, len(dataset), device) is not None:
        with seeded((0, Stream.READING), device):
            # Masks of images are many and large: those of a few samples stand for all.
            first = label(0)
            are_large = isinstance(first, Mapping) or np.ndim(first) > 1
            labels = _hash_samples(label, len(dataset), device) if are_large else hash_values(label_values(dataset))
    routes = hash_tensors({"route_ids": torch.from_numpy(partition.route_ids)})
    return {"num_samples": len(dataset), "routes": routes, "labels": labels, "features": hashed}


def read_raw(dataset: Any, index: int) -> Any:
    """A sample of a data set, of `datasets` as it is stored, without transforms and formats."""
    if isinstance(dataset, Subset):
        return read_raw(dataset.dataset, dataset.indices[index])
    if isinstance(dataset, ConcatDataset):
        part = next(number for number, end in enumerate(dataset.cumulative_sizes) if index < end)
        return read_raw(dataset.datasets[part], index - ([0, *dataset.cumulative_sizes])[part])
    return dataset.with_format("arrow")[index].to_pylist()[0] if is_hf_dataset(dataset) else dataset[index]


def _hash_samples(read: Callable[[int], Any], num_samples: int, device: torch.device) -> str | None:
    """A hash of some samples; `None` if two readings differ, or a value cannot be hashed."""
    indices = np.unique(np.linspace(0, num_samples - 1, _NUM_HASHED).astype(int)).tolist()
    found = []
    for reading in range(2):
        with seeded((reading, Stream.READING), device):
            found.append(hash_values([read(index) for index in indices]))
    return found[0] if found[0] == found[1] else None


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
