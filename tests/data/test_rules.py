"""Rules that assign new data by groups of labels and by nearest centres, and what is saved of any rule."""

import json

import numpy as np
import pytest
import torch

from hf_rtl.data.partition_by import partition_by_groups
from hf_rtl.data.rules import (
    ByCentres,
    ByColumn,
    ByGroups,
    load_rule,
    remove_unfitting_rule,
    rule_from_dict,
    save_rule,
)
from tests.data.small_data import DictDataset, both_kinds, hf_dataset, make, nearest


GROUPS = {"fruit": ["pear", "apple"], "flower": ["rose", "lily", "iris"]}
LABELS = ["rose", "apple", "pear", "iris", "lily", "rose", "apple"]
ROUTES = [1, 0, 0, 1, 1, 1, 0]


@both_kinds
def test_groups_of_strings(kind):
    partition = partition_by_groups(make({"label": LABELS}, kind), GROUPS)
    assert partition.route_ids.tolist() == ROUTES
    assert partition.route_names == ["fruit", "flower"]
    assert partition.rule == ByGroups("label", GROUPS)
    assert partition_by_groups(make({"label": LABELS}, kind), dict(reversed(GROUPS.items()))).counts.tolist() == [4, 3]


@both_kinds
def test_groups_of_integers_go_by_their_digits(kind):
    dataset = make({"label": [0, 3, 1, 0, 3, 1], "kind": [1] * 6}, kind)
    partition = partition_by_groups(dataset, {"a": [3, "0"], "b": ["1"]}, "label")
    assert partition.route_ids.tolist() == [0, 0, 1, 0, 0, 1]
    assert partition.rule.groups == {"a": ["3", "0"], "b": ["1"]}


def test_groups_of_class_labels_go_by_name():
    dataset = hf_dataset({"fine_label": [0, 1, 2, 1, 0, 2]}, fine_label=["rose", "pear", "apple"])
    partition = partition_by_groups(dataset, {"fruit": ["apple", "pear"], "flower": ["rose"]})
    assert partition.route_ids.tolist() == [1, 0, 0, 0, 1, 0]
    # Other data may number the classes in another order, and have classes without samples.
    later = hf_dataset({"fine_label": [0, 1]}, fine_label=["apple", "rose", "kiwi"])
    assert partition.rule.assign(later).route_ids.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("groups.json", json.dumps(GROUPS)),
        ("groups.yaml", "fruit: [pear, apple]\nflower:\n- rose\n- lily\n- 'iris'\n"),
        ("groups.yml", "fruit: [pear, apple]\nflower: [rose, lily, iris]\n"),
    ],
)
def test_groups_of_a_file(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    for file in (tmp_path / name, str(tmp_path / name)):
        assert partition_by_groups(DictDataset(label=LABELS), file).rule == ByGroups("label", GROUPS)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("groups.txt", "", r"`groups` is '.*groups.txt'; a file that ends in .json, .yaml, .yml is needed"),
        ("groups.json", "{", "`groups` is '.*groups.json', which cannot be read: Expecting"),
        ("groups.yaml", "a: [", "`groups` is '.*groups.yaml', which cannot be read: while parsing"),
        ("groups.yaml", "", "`groups` is a `NoneType`; a mapping"),
        (
            "groups.yaml",
            "fruit: [pear, no]",
            "`groups` has False, a `bool`, in 'fruit'; labels are strings, in quotes",
        ),
        ("groups.json", '{"fruit": [1.5]}', "`groups` has 1.5, a `float`, in 'fruit'"),
    ],
)
def test_refused_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        partition_by_groups(DictDataset(label=LABELS), tmp_path / name)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([["rose"], ["apple"]], "`groups` is a `list`; a mapping"),
        ({}, "`route_names` is empty"),
        ({1: ["rose"]}, "`route_names` must be a list of non-empty strings"),
        ({"fruit": "pear"}, "`groups` has 'pear' for 'fruit'; a list"),
        ({**GROUPS, "none": []}, r"`groups` has \[\] for 'none'; a list of labels is needed, of at least one"),
        (
            {**GROUPS, "red": ["rose"]},
            "`groups` has 'rose' in 'flower' and again in 'red'; a label belongs to exactly",
        ),
        ({**GROUPS, "red": ["x", "x"]}, "`groups` has 'x' in 'red' and again in 'red'"),
        ({**GROUPS, "red": [1, "1"]}, "`groups` has '1' in 'red' and again in 'red'"),
        (
            {**GROUPS, "tree": ["oak", "elm"]},
            "`groups` has 'oak', 'elm', which no sample has; labels .* are 'apple', ",
        ),
        (
            {"fruit": ["pear"], "flower": ["rose", "lily"]},
            "Column 'label' has 'apple', 'iris', which no group has; labels of `groups` are 'pear', 'rose', 'lily'",
        ),
        ({"pear": ["pear"], "others": ["rose", "lily", "iris", "apple"]}, "Route 'pear' has a single sample"),
    ],
)
def test_refused_groups(groups, message):
    with pytest.raises(ValueError, match=message):
        partition_by_groups(DictDataset(label=LABELS), groups)


def test_a_class_without_samples_is_unseen():
    dataset = hf_dataset({"label": [0, 0, 1, 1]}, label=["rose", "apple", "pear"])
    with pytest.raises(ValueError, match="`groups` has 'pear', which no sample has"):
        partition_by_groups(dataset, {"fruit": ["apple", "pear"], "flower": ["rose"]})


def test_labels_that_training_never_saw_are_named():
    rule = partition_by_groups(DictDataset(label=LABELS), GROUPS).rule
    assert rule.assign(DictDataset(label=["iris"])).route_ids.tolist() == [1]
    with pytest.raises(ValueError, match="Column 'label' has 'kiwi', 'plum', which no group has"):
        rule.assign(DictDataset(label=["rose", "plum", "kiwi", "plum"]))
    with pytest.raises(ValueError, match="`column` = 'label' is not in the data set"):
        rule.assign(DictDataset(kind=LABELS))
    with pytest.raises(ValueError, match="Route 'fruit' has no samples"):
        rule.assign(DictDataset(label=["rose", "rose"]), allow_empty=False)


@pytest.fixture
def by_centres():
    centres = torch.randn(5, 37, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return ByCentres(centres, ["a", "b", "c", "d", "e"])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_nearest_centre_is_the_route(by_centres, dtype):
    features = np.random.default_rng(0).normal(size=(200, 37)).astype(dtype)
    partition = by_centres.assign(features)
    assert partition.route_ids.tolist() == nearest(features, by_centres.centres)
    assert partition.counts.min() > 0
    assert partition.rule is by_centres
    assert by_centres.assign(torch.from_numpy(features)).route_ids.tolist() == partition.route_ids.tolist()


def test_bfloat16_features_and_ties():
    rule = ByCentres(torch.tensor([[0.0], [2.0], [2.0]], dtype=torch.float64), ["a", "b", "c"])
    features = torch.tensor([[1.0], [1.0078125], [5.0]], dtype=torch.bfloat16, requires_grad=True)
    assert rule.assign(features).route_ids.tolist() == [0, 1, 1]


def test_routes_depend_neither_on_the_batch_nor_on_the_order(by_centres, monkeypatch):
    # Points between two centres, where the last bit of a distance decides.
    generator = np.random.default_rng(2)
    centres = by_centres.centres.numpy()
    pairs = np.array([generator.choice(5, size=2, replace=False) for _ in range(400)])
    features = centres[pairs].mean(axis=1)
    whole = by_centres.assign(features).route_ids
    order = generator.permutation(len(features))
    assert by_centres.assign(features[order]).route_ids.tolist() == whole[order].tolist()
    assert by_centres.assign(np.asfortranarray(features)).route_ids.tolist() == whole.tolist()
    assert by_centres.assign(features[::-1]).route_ids.tolist() == whole[::-1].tolist()
    for size in (1, 7, 64):
        parts = [by_centres.assign(features[start : start + size]) for start in range(0, len(features), size)]
        assert np.concatenate([part.route_ids for part in parts]).tolist() == whole.tolist()
    monkeypatch.setattr("hf_rtl.data.rules.BLOCK_SIZE", 37 * 3)
    assert by_centres.assign(features).route_ids.tolist() == whole.tolist()


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        ([[1.0] * 37], TypeError, "`data` is `list`; an array or a tensor of floats"),
        (np.ones((2, 37), dtype=np.int64), TypeError, "`data` is a `int64` array"),
        (np.ones(37), ValueError, r"`data` has shape \[37\]"),
        (np.ones((0, 37)), ValueError, r"`data` has shape \[0, 37\]; \[N, D\] with N, D >= 1"),
        (np.ones((2, 36)), ValueError, r"`data` has shape \[2, 36\]; \[N, 37\] is needed"),
        (np.full((2, 37), np.nan), ValueError, "`data` has NaN or infinite values at sample 0"),
        (np.pad([[np.inf]], ((2, 0), (36, 0))), ValueError, "`data` has NaN or infinite values at sample 2"),
    ],
)
def test_refused_features(by_centres, features, error, message):
    with pytest.raises(error, match=message):
        by_centres.assign(features)


def test_refused_centres():
    with pytest.raises(TypeError, match="`centres` is `ndarray`"):
        ByCentres(np.zeros((2, 3)), ["a", "b"])
    for centres, message in (
        (torch.zeros(2, 3), r"`centres` is `torch.float32` \[2, 3\]; `torch.float64` \[2, D\]"),
        (torch.zeros(3, 3, dtype=torch.float64), r"\[3, 3\]; `torch.float64` \[2, D\] is needed, a row for each"),
        (torch.zeros(2, dtype=torch.float64), r"\[2\]; "),
        (torch.zeros(2, 0, dtype=torch.float64), r"\[2, 0\]; "),
        (torch.tensor([[0.0], [torch.nan]], dtype=torch.float64), "`centres` has NaN or infinite values"),
    ):
        with pytest.raises(ValueError, match=message):
            ByCentres(centres, ["a", "b"])


def test_rules_are_as_they_were_when_loaded(tmp_path, by_centres):
    features = np.random.default_rng(3).normal(size=(50, 37))
    dataset = DictDataset(label=LABELS, scene=["x", "y", "x", "y", "x", "y", "x"])
    by_column, by_groups = ByColumn("scene", ["y", "x"]), ByGroups("label", GROUPS)
    # One after another in the same folder: nothing of an earlier rule may be left.
    for rule, data in ((by_column, dataset), (by_centres, features), (by_groups, dataset), (by_centres, features)):
        save_rule(tmp_path / "model", rule)
        loaded = load_rule(tmp_path / "model")
        assert type(loaded) is type(rule)
        assert loaded.route_names == rule.route_names
        assert loaded.to_dict() == rule.to_dict()
        assert loaded.assign(data).route_ids.tolist() == rule.assign(data).route_ids.tolist()
        expected = {"partition.json"} | ({"partition.safetensors"} if rule is by_centres else set())
        assert {file.name for file in (tmp_path / "model").iterdir()} == expected
    assert torch.equal(loaded.centres, by_centres.centres)


def test_files_say_what_they_are(tmp_path, by_centres):
    save_rule(tmp_path, by_centres)
    assert json.loads((tmp_path / "partition.json").read_text()) == {
        "kind": "centres",
        "route_names": ["a", "b", "c", "d", "e"],
    }
    save_rule(tmp_path, ByGroups("label", GROUPS))
    assert json.loads((tmp_path / "partition.json").read_text()) == {
        "kind": "groups",
        "column": "label",
        "groups": GROUPS,
    }


def test_damaged_files_are_refused(tmp_path, by_centres):
    with pytest.raises(FileNotFoundError, match=r"partition\.json"):
        load_rule(tmp_path)
    save_rule(tmp_path, by_centres)
    (tmp_path / "partition.safetensors").write_bytes(b"torn")
    with pytest.raises(
        ValueError, match=r"partition.json: a rule of `kind` 'centres' has 'centres', 'route_names'; got"
    ):
        load_rule(tmp_path)
    (tmp_path / "partition.json").write_text("{")
    with pytest.raises(ValueError, match=r"partition.json is damaged"):
        load_rule(tmp_path)


def test_a_rule_for_other_routes_than_the_models_is_refused(tmp_path):
    rule = ByGroups("label", GROUPS)
    save_rule(tmp_path, rule)
    assert load_rule(tmp_path, ["fruit", "flower"]) == rule
    for names in (["flower", "fruit"], ["fruit"], ["fruit", "flower", "tree"]):
        routes = ", ".join(map(repr, names))
        message = f"partition.json is a rule for other routes, 'fruit', 'flower', than those of the model, {routes};"
        with pytest.raises(ValueError, match=message):
            load_rule(tmp_path, names)
        (tmp_path / "config.json").write_text(json.dumps({"route_names": names}))
        with pytest.raises(ValueError, match=message):
            load_rule(tmp_path)
        # The given names count, not those in the file beside the rule.
        assert load_rule(tmp_path, rule.route_names) == rule
    for config in ({"route_names": ["fruit", "flower"]}, {"model_type": "bert"}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert load_rule(str(tmp_path)) == rule


def test_a_rule_that_does_not_fit_is_removed(tmp_path, by_centres, caplog):
    remove_unfitting_rule(tmp_path, ["a"])
    save_rule(tmp_path, by_centres)
    remove_unfitting_rule(tmp_path, ["a", "b", "c", "d", "e"])
    assert load_rule(tmp_path).to_dict() == by_centres.to_dict() and caplog.text == ""
    (tmp_path / "config.json").write_text("{}")
    remove_unfitting_rule(tmp_path, ["a", "b", "c", "d"])
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    assert len(caplog.records) == 1 and "'e', than those of the model" in caplog.text
    save_rule(tmp_path, by_centres)
    (tmp_path / "partition.safetensors").write_bytes(b"torn")
    remove_unfitting_rule(tmp_path, by_centres.route_names)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_tensors_of_an_earlier_rule_do_not_count(tmp_path, by_centres):
    """Such tensors are left if the process ended between writing the two files."""
    save_rule(tmp_path, by_centres)
    tensors = (tmp_path / "partition.safetensors").read_bytes()
    save_rule(tmp_path, ByColumn("scene", ["y", "x"]))
    (tmp_path / "partition.safetensors").write_bytes(tensors)
    assert load_rule(tmp_path) == ByColumn("scene", ["y", "x"])


def test_what_rules_say_of_themselves(by_centres):
    assert ByColumn("scene", ["y", "x"]).describe() == "what its column 'scene' says"
    assert ByGroups("kind", GROUPS).describe() == "the group of the label in its column 'kind'"
    assert by_centres.describe() == "the nearest of 5 centres to its 37 features"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "the rule's `kind` is None; known are 'column', 'groups', 'centres'"),
        ({"kind": "hf_rtl.partition.ByColumn"}, "`kind` is 'hf_rtl.partition.ByColumn'; known are"),
        ({"kind": ["column"]}, r"`kind` is \['column'\]; known are"),
        ({"kind": "column", "column": "label"}, "has 'column', 'route_names'; got 'column'"),
        ({"kind": "column", "column": 3, "route_names": ["a"]}, "`column` is 3; a column's name is needed"),
        ({"kind": "column", "column": "label", "route_names": 3}, "`route_names` must be a list"),
        ({"kind": "column", "column": "label", "route_names": ["a", "a"]}, "`route_names` has 'a' more than once"),
        ({"kind": "groups", "column": "label", "groups": {"a": [None]}}, "`groups` has None, a `NoneType`, in 'a'"),
        ({"kind": "groups", "column": "label", "groups": {}, "x": 1}, "has 'column', 'groups'; got"),
        ({"kind": "centres", "centres": [[0.0]], "route_names": ["a"]}, "`centres` is `list`"),
    ],
)
def test_values_that_are_no_rule(values, message):
    with pytest.raises((TypeError, ValueError), match=message):
        rule_from_dict(values)
