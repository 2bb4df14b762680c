"""What data are known by: numbers, routes, labels and features as they are stored, not as transforms make them."""

from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset

from hf_rtl.data.partition import Partition
from hf_rtl.training.data_identity import hash_values, identify_data
from tests.training.small_runs import DOMAINS, Images, make_labels_trainer


NUMBER = 70


def columns(change=None):
    """A few columns of samples, of which `change` = (name, index, value) changes one value."""
    made = {
        "features": [[float(index), 0.5] for index in range(NUMBER)],
        "text": [f"text {index}" for index in range(NUMBER)],
        "label": [index % 3 for index in range(NUMBER)],
    }
    if change is not None:
        name, index, value = change
        made[name][index] = value
    return made


def as_list(change=None):
    made = columns(change)
    return [dict(zip(made, values, strict=True)) for values in zip(*made.values(), strict=True)]


def as_hf(change=None):
    return datasets.Dataset.from_dict(columns(change))


class Transformed(Dataset):
    """Samples with random noise, as of a random transform."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        sample = self.samples[index]
        return {**sample, "features": torch.tensor(sample["features"]) + torch.randn(2)}


def identify(data, *, collate=None, membership=False, raw=True, routes=None):
    routes = [index % 2 for index in range(len(data))] if routes is None else routes
    partition = Partition(np.array(routes), ["even", "odd"], allow_empty=True)
    before = torch.get_rng_state()
    make_collate = (lambda: collate) if raw else None
    found = identify_data(data, partition, torch.device("cpu"), membership=membership, make_collate=make_collate)
    assert torch.equal(torch.get_rng_state(), before)
    # For files of earlier versions; without a collator nothing is known of batches, and it is the same.
    stored = found.pop("stored", None)
    assert collate is not None or not raw or stored == found["features"]
    return found


def as_transformed(change=None):
    def transform(batch):
        return {**batch, "features": [torch.tensor(row) + torch.rand(2) for row in batch["features"]]}

    return as_hf(change).with_transform(transform)


def as_concatenated(change=None):
    data = as_transformed(change)
    return ConcatDataset([Subset(data, range(30)), data.select(range(30, NUMBER))])


@pytest.mark.slow
@pytest.mark.parametrize("make", [as_list, as_hf, as_transformed, as_concatenated])
def test_columns_that_change_no_batch_are_left_out(make):
    def collate(samples):
        return {"features": torch.stack([torch.as_tensor(sample["features"]) for sample in samples])}

    known = identify(make(), collate=collate)
    assert identify(make(("text", 0, "another")), collate=collate) == known
    assert identify(make(("features", 0, [0.25, 0.5])), collate=collate)["features"] != known["features"]
    if make is as_hf:
        assert identify(make().remove_columns("text"), collate=collate) == known
    both = identify(make(), collate=lambda samples: {**collate(samples), "text": [s["text"] for s in samples]})
    assert both["features"] != known["features"]


@pytest.mark.slow
@pytest.mark.parametrize("make", [as_list, as_hf])
def test_each_part_of_the_identity_follows_the_data(make):
    known = identify(make())
    assert known["num_samples"] == NUMBER and all(len(known[name]) == 64 for name in ("routes", "labels", "features"))
    assert identify(make()) == known
    for change, named in (
        (("features", 0, [0.25, 0.5]), "features"),
        (("text", NUMBER - 1, "another"), "features"),
        (("label", 5, 0), "labels"),  # of a sample whose features are not read
    ):
        changed = identify(make(change))
        assert [name for name in known if changed[name] != known[name]] == [named]
    moved = identify(make(), routes=[1 - index % 2 for index in range(NUMBER)])
    assert [name for name in known if moved[name] != known[name]] == ["routes"]
    assert identify(make(), membership=True) == {**known, "labels": None}


def test_features_are_read_without_the_transforms_of_datasets():
    data, known = as_hf(), identify(as_hf())

    def transform(batch):
        return {"noise": torch.randn(len(batch["label"]), 2)}

    views = [data.with_transform(transform), data.with_format("torch"), data.with_format("numpy", columns=["label"])]
    views.append(Subset(data.with_transform(transform), range(NUMBER)))
    views.append(ConcatDataset([data.select(range(30)).with_transform(transform), data.select(range(30, NUMBER))]))
    for view in views:
        assert identify(view, membership=True)["features"] == known["features"]


def test_values_that_are_random_are_left_out():
    known = identify(as_list())
    assert identify(Transformed(as_list())) == {**known, "features": None}
    assert (
        identify(as_hf().with_transform(lambda batch: {**batch, "x": torch.randn(1)}), raw=False)["features"] is None
    )

    class RandomLabels(Transformed):
        def __getitem__(self, index):
            return {**self.samples[index], "label": float(torch.rand(()))}

    assert identify(RandomLabels(as_list())) == {**known, "labels": None}


class Begun(Exception):
    pass


def test_samples_are_fetched_once_for_routes_and_labels(tmp_path, monkeypatch):
    def stop(*arguments):
        raise Begun

    train, evaluate = Images(400, columns=DOMAINS), Images(300, seed=1, columns=DOMAINS)
    made = make_labels_trainer(tmp_path, train=train, evaluate=evaluate)
    monkeypatch.setattr("hf_rtl.training.trainer.find_theta0", stop)
    for _ in range(2):
        with pytest.raises(Begun):
            made.train()
    for data in (train, evaluate):
        fetched = Counter(data.fetched)
        assert len(fetched) == len(data) and np.median(list(fetched.values())) == 1
    for sample in train.samples:  # in place
        sample["labels"] = 1 - sample["labels"]
    with pytest.raises(ValueError, match="data.labels"):
        made.train()


def test_images_are_known_by_their_content_wherever_they_lie(tmp_path):
    def data(folder, colour=0):
        folder.mkdir()
        for index in range(2):
            Image.new("RGB", (4, 4), (index, colour, 0)).save(folder / f"{index}.png")
        made = datasets.Dataset.from_dict({"image": [str(folder / f"{index}.png") for index in range(2)]})
        return made.cast_column("image", datasets.Image())

    known = identify(data(tmp_path / "a"), membership=True)
    assert identify(data(tmp_path / "b"), membership=True) == known
    changed = identify(data(tmp_path / "c", colour=7), membership=True)
    assert known["features"] is not None and changed["features"] not in (None, known["features"])


def test_nested_values_are_told_apart():
    image = Image.new("L", (2, 2))
    values = [None, "None", b"None", 1, 1.0, True, [1, 2], [1.0, 2.0], [[1], [2]], [[1], [2, 3]], ["a", "b"], ["ab"]]
    values += [{"a": 1}, {"b": 1}, torch.ones(2), torch.ones(2, 1), torch.ones(2, dtype=torch.bfloat16), image, [None]]
    hashed = [hash_values(value) for value in values]
    assert None not in hashed and len(set(hashed)) == len(hashed)
    assert hash_values({"a": 1, "b": [2]}) == hash_values({"b": [2], "a": 1})
    assert hash_values([object()]) is None and hash_values({"bytes": None, "path": "missing.png"}) is None
