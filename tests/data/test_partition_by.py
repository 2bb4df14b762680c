"""Routes read from every kind of column, and everything that is refused."""

import logging

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Subset, random_split

from hf_rtl.data.columns import list_columns
from hf_rtl.data.partition_by import partition_by_column, partition_by_function, partition_by_label
from hf_rtl.data.route_data import find_partition
from hf_rtl.data.rules import ByColumn
from tests.data.small_data import DictDataset, both_kinds, hf_dataset, make


@both_kinds
def test_integers_are_route_ids(kind):
    dataset = make({"scene": [2, 0, 1, 0, 2, 1]}, kind)
    partition = partition_by_column(dataset, "scene")
    assert partition.route_ids.tolist() == [2, 0, 1, 0, 2, 1]
    assert partition.route_names == ["0", "1", "2"]
    named = partition_by_column(dataset, "scene", route_names=["x", "y", "z"])
    assert named.route_ids.tolist() == [2, 0, 1, 0, 2, 1]
    assert named.route_names == ["x", "y", "z"]
    more = partition_by_column(dataset, "scene", route_names=["x", "y", "z", "unseen"], allow_empty=True)
    assert more.counts.tolist() == [2, 2, 2, 0]
    with pytest.raises(ValueError, match="'scene' has 2; allowed are the ids 0 to 1 of the routes 'x', 'y'"):
        partition_by_column(dataset, "scene", route_names=["x", "y"])


@both_kinds
def test_strings_are_sorted_or_looked_up(kind):
    dataset = make({"scene": ["street", "park", "street", "park"]}, kind)
    partition = partition_by_column(dataset, "scene")
    assert partition.route_ids.tolist() == [1, 0, 1, 0]
    assert partition.route_names == ["park", "street"]
    fitted = partition_by_column(dataset, "scene", route_names=["street", "metro", "park"], allow_empty=True)
    assert fitted.route_ids.tolist() == [0, 2, 0, 2]
    assert fitted.counts.tolist() == [2, 0, 2]
    with pytest.raises(ValueError, match="Route 'metro' has no samples"):
        partition_by_column(dataset, "scene", route_names=["street", "metro", "park"])
    with pytest.raises(ValueError, match="'scene' has 'park'; `route_names` allows 'street', 'metro'"):
        partition_by_column(dataset, "scene", route_names=["street", "metro"], allow_empty=True)


@both_kinds
def test_all_values_that_are_no_routes_are_named(kind):
    values = [f"ward {number}" for number in range(8)] * 2
    for dataset in (make({"ward": values}, kind), hf_dataset({"ward": [0, 1] * 8}, ward=["ward 0", "ward 1"])):
        with pytest.raises(ValueError, match="Column 'ward' has 'ward 1'.*; `route_names` allows 'ward 0'") as refused:
            find_partition(dataset, route_column="ward", route_names=["ward 0", "x"], ticket_task="labels")
    assert "'ward 1';" in str(refused.value)
    with pytest.raises(ValueError, match="'ward 3', 'ward 4', 'ward 5', 'ward 6', 'ward 7'; `route"):
        partition_by_column(make({"ward": values}, kind), "ward", route_names=["ward 0", "ward 1", "ward 2"])
    with pytest.raises(ValueError, match="'ward 1', 'ward 2', 'ward 3', 'ward 4', 'ward 5' and 2 more; `route"):
        partition_by_column(make({"ward": values}, kind), "ward", route_names=["ward 0"])


def test_tensors_and_numpy_scalars_count_as_their_values():
    assert partition_by_column(DictDataset(r=torch.tensor([1, 0, 1, 0])), "r").route_ids.tolist() == [1, 0, 1, 0]
    assert partition_by_column(DictDataset(r=np.array(["b", "a", "b", "a"])), "r").route_names == ["a", "b"]
    assert partition_by_column([{"r": 0}, {"r": 0}], "r").counts.tolist() == [2]
    with pytest.raises(TypeError, match="a `Tensor`, at sample 0"):
        partition_by_column(DictDataset(r=torch.zeros(4, 2, dtype=torch.long)), "r")


def test_class_labels_go_by_name():
    dataset = hf_dataset({"label": [0, 1, 1, 0]}, label=["zebra", "ant"])
    partition = partition_by_column(dataset, "label")
    assert partition.route_ids.tolist() == [0, 1, 1, 0]
    assert partition.route_names == ["zebra", "ant"]
    # A fitted model keeps its ids, although this split numbers the classes the other way round.
    fitted = partition_by_column(dataset, "label", route_names=["ant", "zebra"])
    assert fitted.route_ids.tolist() == [1, 0, 0, 1]
    with pytest.raises(ValueError, match="'label' has 'zebra'; `route_names` allows 'ant', 'bee'"):
        partition_by_column(dataset, "label", route_names=["ant", "bee"])
    with pytest.raises(ValueError, match="Route 'bee' has no samples"):
        partition_by_column(hf_dataset({"label": [0, 0]}, label=["ant", "bee"]), "label")


class Holding(torch.utils.data.Dataset):
    """Holds another data set, as those that add transforms do."""

    def __init__(self, dataset, change=lambda label: label):
        self.dataset = dataset
        self.change = change

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        sample = self.dataset[index]
        return {**sample, "label": self.change(sample["label"])}


class Augmented(Subset):
    """A subset with samples of its own making."""

    def __getitem__(self, index):
        return {**super().__getitem__(index), "x": 0}

    def __getitems__(self, indices):
        return [self[index] for index in indices]


def test_class_labels_go_by_name_through_data_sets_that_hold_others():
    names, order = ["owl", "cat", "dog"], [5, 0, 3, 4]
    base = hf_dataset({"label": [0, 1, 2, 2, 1, 0], "x": [0] * 6}, label=names)
    other = hf_dataset({"label": [0, 1, 2, 0], "x": [0] * 4}, label=["dog", "owl", "cat"])  # other numbers, same names
    routes = ["cat", "dog", "owl"]
    expected = [routes.index(names[base[i]["label"]]) for i in range(6)]
    chosen = [expected[i] for i in order]
    first, second = random_split(base, [4, 2], generator=torch.Generator().manual_seed(0))
    for dataset, route_ids in (
        (Subset(base, order), chosen),
        (Subset(base, torch.tensor(order)), chosen),
        (Subset(Subset(base, [4, 3, 0, 5]), [3, 2, 1, 0]), chosen),
        (ConcatDataset([first, second]), [expected[i] for i in [*first.indices, *second.indices]]),
        (ConcatDataset([base, other]), [*expected, 1, 2, 0, 1]),
        (Holding(base), expected),
        (Holding(Subset(base, order)), chosen),
        (Augmented(base, order), chosen),
    ):
        partition = partition_by_label(dataset, route_names=routes, allow_empty=True)
        assert partition.route_ids.tolist() == route_ids
    assert partition_by_label(Subset(base, range(6))).route_names == names
    # Labels that are not those of the held data set keep their own meaning.
    changed = partition_by_label(Holding(base, change=lambda label: 2 - label), route_names=routes)
    assert changed.route_ids.tolist() == [2, 1, 0, 0, 1, 2]


def test_a_subset_is_read_without_its_transforms():
    base = hf_dataset({"label": [0, 1, 0, 1]}, label=["cat", "dog"])
    base.set_transform(lambda batch: {"pixels": 1 / 0})
    assert list_columns(Subset(base, [0, 1])) == list_columns(ConcatDataset([base])) == ["label"]
    assert partition_by_label(Subset(base, [1, 2, 0, 3])).route_ids.tolist() == [1, 0, 0, 1]


def test_a_column_is_read_without_the_transform_and_format():
    def transform(batch):
        raise AssertionError("the transform ran")

    dataset = hf_dataset({"route": [1, 0, 1, 0], "x": [1, 2, 3, 4]})
    for formatted in (
        dataset.with_transform(transform),
        dataset.with_format("torch"),
        dataset.with_format("numpy", columns=["x"]),
        dataset.select([0, 1, 2, 3]),
    ):
        assert partition_by_column(formatted, "route").route_ids.tolist() == [1, 0, 1, 0]
    assert partition_by_column(dataset.select([3, 2, 1, 0]), "route").route_ids.tolist() == [0, 1, 0, 1]


@both_kinds
@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([0, 1, None, 1], ValueError, "'r' has None at sample 2"),
        ([None, 0, 0, 0], ValueError, "'r' has None at sample 0"),
        (["a", None, "a", "a"], ValueError, "'r' has None at sample 1"),
        ([0, 1, 1, -1], ValueError, "'r' has -1 at sample 3"),
        ([0.0, 1.0, 1.0, 0.0], TypeError, "'r' has 0.0, a `float`, at sample 0"),
        ([True, False, True, False], TypeError, "'r' has True, a `bool`"),
        ([[0], [1], [0], [1]], TypeError, "a `list`, at sample 0"),
        ([1, 1, 1, 1], ValueError, "Route '0' has no samples"),
        ([0, 0, 3, 3], ValueError, "Route '1' has no samples"),
        ([0, 0, 1, 10**12], ValueError, "'r' has 1000000000000 among 4 samples"),
    ],
)
def test_refused_values(kind, values, error, message):
    with pytest.raises(error, match=message):
        partition_by_column(make({"r": values}, kind), "r")


def test_missing_class_labels_are_refused():
    with pytest.raises(ValueError, match="'label' has -1 at sample 1"):
        partition_by_label(hf_dataset({"label": [0, -1, 0]}, label=["a"]))
    with pytest.raises(ValueError, match="'label' has None at sample 1"):
        partition_by_label(hf_dataset({"label": [0, None, 0]}, label=["a"]))


def test_mixed_values_are_refused():
    with pytest.raises(TypeError, match="'r' has '1', a `str`, at sample 1"):
        partition_by_column(DictDataset(r=[0, "1", 0]), "r")


@both_kinds
def test_unknown_column_lists_the_columns(kind):
    with pytest.raises(
        ValueError, match="`column` = 'scene' is not in the data set; its columns are 'image', 'label'"
    ):
        partition_by_column(make({"image": [0, 1], "label": [0, 0]}, kind), "scene")


def test_refused_data_sets():
    split = hf_dataset({"label": [0, 0]})
    with pytest.raises(
        TypeError, match=r"`DatasetDict` of 'train', 'test'; pass one split, as in `dataset\['train'\]`"
    ):
        partition_by_label(datasets.DatasetDict(train=split, test=split))
    with pytest.raises(TypeError, match="`IterableDataset`; a map-style data set"):
        partition_by_label(split.to_iterable_dataset())

    class Stream(torch.utils.data.IterableDataset):
        def __len__(self):
            return 2

        def __iter__(self):
            return iter([])

    with pytest.raises(TypeError, match="`Stream`; a map-style data set"):
        partition_by_label(Stream())
    with pytest.raises(TypeError, match=r"`dataset\[0\]` is a `tuple`"):
        partition_by_label(torch.utils.data.TensorDataset(torch.zeros(2)))
    with pytest.raises(ValueError, match="`dataset` is empty"):
        partition_by_label(hf_dataset({"label": []}))


@both_kinds
@pytest.mark.parametrize("name", ["label", "labels", "fine_label"])
def test_the_label_column_is_found(kind, name):
    dataset = make({"image": [9, 9, 9, 9], name: [0, 1, 1, 0], "coarse_label": [0, 0, 0, 0]}, kind)
    assert partition_by_label(dataset).route_ids.tolist() == [0, 1, 1, 0]
    assert partition_by_label(dataset, "coarse_label").counts.tolist() == [4]
    assert partition_by_label(dataset, route_names=["a", "b"]).route_names == ["a", "b"]


def test_no_label_column_or_two_are_refused():
    with pytest.raises(ValueError, match="`label_column` must be given: the data set has none .* columns are 'class'"):
        partition_by_label(DictDataset(**{"class": [0, 0]}))
    with pytest.raises(ValueError, match="has 'label' and 'labels' of"):
        partition_by_label(DictDataset(label=[0, 0], labels=[0, 0]))


@both_kinds
def test_a_function_of_a_sample(kind):
    dataset = make({"text": ["aa", "b", "cc", "d", "ee"], "x": [1, 2, 3, 4, 5]}, kind)
    by_name = partition_by_function(dataset, lambda sample: "long" if len(sample["text"]) > 1 else "brief")
    assert by_name.route_names == ["brief", "long"]
    assert by_name.route_ids.tolist() == [1, 0, 1, 0, 1]
    assert by_name.rule is None
    by_number = partition_by_function(dataset, lambda sample: np.int64(sample["x"] % 2), route_names=["even", "odd"])
    assert by_number.route_names == ["even", "odd"]
    assert by_number.route_ids.tolist() == [1, 0, 1, 0, 1]
    later = partition_by_function(
        make({"x": [7]}, kind), lambda sample: "b", route_names=["a", "b", "c"], allow_empty=True
    )
    assert later.route_ids.tolist() == [1]


def test_samples_of_a_function_need_not_be_dicts():
    dataset = torch.utils.data.TensorDataset(torch.tensor([1.0, -1.0, 2.0, -2.0]))
    assert partition_by_function(dataset, lambda sample: int(sample[0] > 0)).route_ids.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda sample: None, ValueError, "`function` gives None at sample 0"),
        (lambda sample: -sample["x"], ValueError, "`function` gives -1 at sample 1"),
        (lambda sample: sample["x"] / 2, TypeError, "`function` gives 0.0, a `float`, at sample 0"),
        (lambda sample: sample["x"] > 1, TypeError, "`function` gives False, a `bool`, at sample 0"),
        (lambda sample: str(sample["x"]), ValueError, "Route '0' has a single sample"),
    ],
)
def test_what_a_function_must_not_give(function, error, message):
    with pytest.raises(error, match=message):
        partition_by_function(DictDataset(x=[0, 1, 2]), function)


def test_a_function_must_give_known_routes():
    with pytest.raises(ValueError, match="`function` gives 'c'; `route_names` allows 'a', 'b'"):
        partition_by_function(DictDataset(x=["a", "b", "c"]), lambda sample: sample["x"], route_names=["a", "b"])
    with pytest.raises(ValueError, match="`dataset` is empty"):
        partition_by_function([], str)
    with pytest.raises(TypeError, match="`dataset` is a `generator`"):
        partition_by_function((sample for sample in [1, 2]), str)


@both_kinds
def test_the_rule_of_a_column_assigns_new_data(kind):
    rule = partition_by_column(make({"scene": ["street", "park", "street", "park"]}, kind), "scene").rule
    assert rule == ByColumn("scene", ["park", "street"])
    later = rule.assign(make({"scene": ["street"]}, kind))
    assert later.route_ids.tolist() == [1]
    assert later.route_names == ["park", "street"]
    assert later.rule is rule
    with pytest.raises(ValueError, match="Column 'scene' has 'metro'; `route_names` allows 'park', 'street'"):
        rule.assign(make({"scene": ["street", "metro"]}, kind))
    with pytest.raises(ValueError, match="Route 'park' has no samples"):
        rule.assign(make({"scene": ["street", "street"]}, kind), allow_empty=False)


def test_the_rule_of_labels_goes_by_name():
    rule = partition_by_label(hf_dataset({"label": [0, 1, 1, 0]}, label=["zebra", "ant"])).rule
    assert rule == ByColumn("label", ["zebra", "ant"])
    assert rule.assign(hf_dataset({"label": [0, 1]}, label=["ant", "zebra"])).route_ids.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("counts", "tiny"),
    [
        ([9, 10, 30], ["'0' (9)"]),
        ([10, 10, 10], []),
        ([1000, 50, 49], []),  # a tenth of an even share is 36.6
        ([1000, 35, 37], ["'1' (35)"]),  # … 35.7
        ([2000, 60, 3, 70], ["'2' (3)"]),
        ([2, 2], ["'0' (2)", "'1' (2)"]),
    ],
)
def test_tiny_routes_are_warned_of(counts, tiny, caplog):
    dataset = DictDataset(r=np.repeat(np.arange(len(counts)), counts))
    with caplog.at_level(logging.WARNING, logger="hf_rtl"):
        partition_by_column(dataset, "r")
    warned = [record.getMessage() for record in caplog.records]
    assert [f"an even share: {', '.join(tiny)}. A ticket" in message for message in warned] == [True] * bool(tiny)
    caplog.clear()
    partition_by_column(dataset, "r", allow_empty=True)
    assert not caplog.records
