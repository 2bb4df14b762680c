"""Data sets of a few columns, and the nearest centres by an explicit loop."""

import math

import datasets
import numpy as np
import pytest
import torch


class DictDataset(torch.utils.data.Dataset):
    def __init__(self, **columns):
        self.columns = columns

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index):
        return {name: values[index] for name, values in self.columns.items()}


def hf_dataset(columns, **class_names):
    dataset = datasets.Dataset.from_dict(columns)
    for name, names in class_names.items():
        dataset = dataset.cast_column(name, datasets.ClassLabel(names=names))
    return dataset


def make(columns, kind):
    return hf_dataset(columns) if kind == "datasets" else DictDataset(**columns)


both_kinds = pytest.mark.parametrize("kind", ["datasets", "torch"])


def nearest(features, centres):
    """The nearest centre of each sample by an explicit loop; the first of equally near ones."""
    routes = []
    for sample in np.asarray(features, dtype=np.float64).tolist():
        distances = [math.dist(sample, centre) for centre in centres.tolist()]
        routes.append(distances.index(min(distances)))
    return routes
