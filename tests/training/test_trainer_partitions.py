"""Trainings whose routes come from a partition, and its rule beside every saved model."""

import logging

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset

from hf_rtl import (
    ByCentres,
    ByColumn,
    ByGroups,
    Partition,
    RTLModel,
    RTLTrainer,
    load_rule,
    partition_by_features,
    partition_by_function,
    partition_by_groups,
    save_rule,
)
from hf_rtl.model_card.run_record import copy_run
from tests.training.interruptions import interrupt
from tests.training.small_runs import (
    DOMAINS,
    ROUNDS,
    ROUTES,
    Broken,
    Images,
    contents,
    image_model,
    make_trainer,
    run,
    timeless,
)


# Two of six classes form a route, so that the routes are those of `Images`.
GROUPS = {"ant": ["0", "3"], "bee": ["1", "4"], "cat": ["2", "5"]}
FILES = ("partition.json", "partition.safetensors")


def with_classes(number, **values):
    return Broken(number, lambda index, sample: {**sample, "label": index % 6}, **values)


def grouped(number=24, **values):
    """Data, their partition and evaluation data, as arguments of `make_trainer`."""
    train = with_classes(number, noise=0.1)
    partition = partition_by_groups(train, GROUPS)
    return {"train": train, "evaluate": with_classes(12, seed=1), "options": {"partition": partition, **values}}


def rule_files(folder):
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).exists()}


def home_routes(trainer, dataset):
    """The route of every sample in evaluation."""
    return torch.cat([batch["labels"] for batch in trainer.get_eval_dataloader(dataset)]).tolist()


@pytest.mark.slow
def test_a_partition_trains_as_a_column_of_its_routes(finished, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3}
    made = run(tmp_path / "run", **grouped(), **saving)
    assert contents(tmp_path / "run") == contents(finished.folder)
    for report, expected in zip(made.rounds, finished.rounds, strict=True):
        assert timeless(report["metrics"]) == timeless(expected["metrics"])
    assert made.plan().route_sizes == dict.fromkeys(ROUTES, 8)

    models = [file.parent for file in (tmp_path / "run").rglob("config.json")]
    assert {folder.name for folder in models} == {*ROUNDS, "checkpoint-6", "final"}
    for folder in models:
        assert load_rule(folder) == ByGroups("label", GROUPS)
        assert load_rule(folder).assign(with_classes(18, seed=5)).route_ids.tolist() == [0, 1, 2] * 6
        assert rule_files(folder).keys() == {"partition.json"}
    # Data with a route column continue the same run.
    make_trainer(tmp_path / "run", **saving).train()


@pytest.mark.slow
def test_a_single_route_has_all_samples_without_a_column(tmp_path):
    def single(folder, **values):
        model = image_model(routes=["all"], ticket_task="labels", num_labels=2)
        train, evaluate = (Broken(number, lambda i, x: {**x, "domain": 0}, columns=DOMAINS) for number in (24, 12))
        return run(tmp_path / folder, model, train=train, evaluate=evaluate, **values)

    plain, by_column = single("plain"), single("column", route_column="domain")
    assert plain.plan().route_sizes == {"all": 24}
    for report, expected in zip(plain.rounds, by_column.rounds, strict=True):
        assert report["mask_fingerprint"] == expected["mask_fingerprint"]
        assert timeless(report["metrics"]) == timeless(expected["metrics"])
    with pytest.raises(FileNotFoundError, match="partition.json"):
        load_rule(tmp_path / "plain/final")


def test_the_rule_of_a_column_is_saved_too(finished):
    for name in (*ROUNDS, "final"):
        assert load_rule(finished.folder / name) == ByColumn("label", ROUTES)


@pytest.mark.slow
def test_tickets_for_labels(tmp_path):
    def trainer(folder, **values):
        model = image_model(ticket_task="labels", num_labels=2)
        train, evaluate = Images(24, columns=DOMAINS, noise=0.1), Images(12, seed=1, columns=DOMAINS)
        return make_trainer(folder, model, train=train, evaluate=evaluate, target_sparsity=[0.3], **values)

    partition = Partition(
        np.arange(24) % 3, ROUTES, rule=ByGroups("domain", {"ant": ["0"], "bee": ["1"], "cat": ["2"]})
    )
    for name, values in (("column", {"route_column": "domain"}), ("partition", {"options": {"partition": partition}})):
        made = trainer(tmp_path / name, **values)
        made.train()
        assert any(name.endswith("accuracy") for name in made.rounds[0]["metrics"])
    assert contents(tmp_path / "partition") == contents(tmp_path / "column")


def test_other_data_get_their_routes_by_the_rule(tmp_path):
    made = make_trainer(tmp_path / "run", **grouped())
    data = with_classes(12, seed=2)
    expected = np.arange(12) % 3
    assert home_routes(made, data) == expected.tolist()
    order = np.random.default_rng(0).permutation(12)
    assert home_routes(made, torch.utils.data.Subset(data, order.tolist())) == expected[order].tolist()
    for size in (1, 5):
        made.args.per_device_eval_batch_size = size
        assert home_routes(made, data) == expected.tolist()
    # Classes go by name, not by number: here class 5 has number 0, and so on.
    columns = {"pixel_values": [sample["pixel_values"].numpy() for sample in data.samples]}
    renumbered = Dataset.from_dict({**columns, "label": [5 - index % 6 for index in range(12)]})
    renumbered = renumbered.cast_column("label", ClassLabel(names=list("543210"))).with_format("torch")
    assert home_routes(made, renumbered) == expected.tolist()

    unseen = Broken(12, lambda index, sample: {**sample, "label": index})
    with pytest.raises(ValueError, match="Column 'label' has '10', '11', '6', '7', '8', '9', which no group has"):
        made.evaluate(unseen)
    with pytest.raises(ValueError, match="Column 'label' has '10'"):
        make_trainer(tmp_path / "run", **{**grouped(), "evaluate": unseen})


def test_a_column_says_the_routes_of_other_data_where_it_is_named(tmp_path):
    made = make_trainer(
        tmp_path / "run",
        **{**grouped(), "evaluate": Images(12, columns=("pixel_values", "label", "domain"))},
        route_column="domain",
    )
    reversed_routes = Broken(6, lambda i, sample: {**sample, "domain": 2 - i % 3}, columns=("pixel_values", "label"))
    assert home_routes(made, reversed_routes) == [2, 1, 0, 2, 1, 0]


@pytest.mark.slow
def test_samples_to_calibrate_on_are_held_out_of_every_route(tmp_path):
    partition = grouped(36)["options"]["partition"]
    made = make_trainer(tmp_path / "run", **grouped(36), calibration_fraction=0.25)
    for data in (made.run_data.training, made):
        held = data.dataset if data is not made else made.run_data.calibration_dataset
        routes = data.partition.route_ids if data is not made else made.eval_partition(held).route_ids
        assert routes.tolist() == partition.route_ids[list(held.indices)].tolist()
    assert made.plan().route_sizes == dict.fromkeys(ROUTES, 9)
    made.train()
    assert len(made.rounds[-1]["thresholds"]) == 3
    assert load_rule(tmp_path / "run" / "final") == ByGroups("label", GROUPS)


@pytest.fixture
def by_features():
    """Data whose routes are clusters of their mean colours."""
    train = Images(24)
    features = torch.stack([sample["pixel_values"].mean((1, 2)) for sample in train.samples])
    rule = ByCentres(torch.eye(3, dtype=torch.float64), ROUTES)
    partition = rule.assign(features)
    assert partition.counts.min() > 5
    return train, features, partition


@pytest.mark.slow
def test_a_rule_of_features_is_saved_with_its_tensors(tmp_path, by_features):
    train, features, partition = by_features
    evaluate = Images(12, seed=1, columns=("pixel_values", "label", "domain"))
    options = {"partition": partition}
    made = run(tmp_path / "run", train=train, evaluate=evaluate, options=options, route_column="domain")
    assert made.plan().route_sizes == dict(zip(ROUTES, partition.counts.tolist(), strict=True))
    for name in (*ROUNDS, "final"):
        folder = tmp_path / "run" / name
        assert rule_files(folder).keys() == set(FILES)
        rule = load_rule(folder)
        assert torch.equal(rule.centres, torch.eye(3, dtype=torch.float64))
        for size in (1, 5, 24):
            parts = [rule.assign(part).route_ids for part in features.split(size)]
            assert np.concatenate(parts).tolist() == partition.route_ids.tolist()
        RTLModel.from_pretrained(folder)


def test_what_has_no_rule_leaves_none(tmp_path):
    train = Images(24, noise=0.1)
    partition = partition_by_function(train, lambda sample: ROUTES[sample["label"]])
    for name in ("round-01-sparsity-0.3", "final"):
        save_rule(tmp_path / "run" / name, ByCentres(torch.eye(3, dtype=torch.float64), ROUTES))
    options = {"options": {"partition": partition}, "route_column": "label", "target_sparsity": [0.3]}
    made = run(tmp_path / "run", train=train, **options)
    for name in ("round-01-sparsity-0.3", "final"):
        assert rule_files(tmp_path / "run" / name) == {}
    assert made.model.partition_rule is None
    copy_run(made.model, tmp_path, token=None)
    assert rule_files(tmp_path) == {}


@pytest.mark.slow
def test_a_run_is_continued_with_its_partition_only(finished, tmp_path, monkeypatch):
    interrupt(monkeypatch, tmp_path / "run", ("step", 4), **grouped())
    before = contents(tmp_path / "run")
    other = grouped()
    other["options"]["partition"] = Partition(np.roll(np.arange(24) % 3, 1), ROUTES)
    with pytest.raises(ValueError, match="another configuration.*route_ids"):
        make_trainer(tmp_path / "run", **{**other, "evaluate": Images(12)}, route_column="label").train()
    assert contents(tmp_path / "run") == before
    run(tmp_path / "run", **grouped())
    assert contents(tmp_path / "run") == contents(finished.folder)
    for name in (*ROUNDS, "final"):
        assert load_rule(tmp_path / "run" / name) == ByGroups("label", GROUPS)


@pytest.mark.slow
def test_a_damaged_rule_of_a_round_is_written_again(finished, tmp_path, caplog):
    run(tmp_path / "run", **grouped())
    file = tmp_path / "run" / ROUNDS[1] / "partition.json"
    file.write_text(file.read_text().replace('"0"', '"7"'))
    run(tmp_path / "run", **grouped())
    assert f"partition.json in {str(file.parent)!r} is damaged" in caplog.text
    assert load_rule(file.parent) == ByGroups("label", GROUPS)
    assert contents(tmp_path / "run") == contents(finished.folder)


PARTITION = Partition(np.arange(24) % 3, ROUTES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (PARTITION.route_ids, "`partition` must be a Partition, got ndarray"),
        (
            Partition(np.arange(24) % 2, ["ant", "bee"]),
            "`partition` has the routes 'ant', 'bee', but the model",
        ),
        (Partition(np.arange(24) % 3, ["bee", "ant", "cat"]), "both need the same in the same order"),
        (Partition(np.arange(21) % 3, ROUTES), "`partition` has 21 samples, but `train_dataset` 24"),
        (Partition(np.arange(24) % 2, ROUTES, allow_empty=True), "'cat' has no samples"),
        (
            PARTITION,
            "`partition` of `train_dataset` has no rule, so it cannot assign.*`route_column='route'`",
        ),
        (
            Partition(np.arange(24) % 3, ROUTES, rule=ByCentres(torch.eye(3, dtype=torch.float64), ROUTES)),
            "has a rule that reads features",
        ),
        (
            Partition(np.arange(24) % 3, ROUTES, rule=ByColumn("label", ["bee", "ant", "cat"])),
            "the rule of `partition` is for other routes, 'bee', 'ant', 'cat', than the model has now, 'ant', 'b",
        ),
        (
            Partition(np.arange(24) % 3, ROUTES, rule=ByColumn("colour", ROUTES)),
            "'colour' is not in the data set; its columns are 'pixel_values', 'label'",
        ),
    ],
)
def test_partitions_that_do_not_fit(tmp_path, change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make_trainer(tmp_path / "run", options={"partition": change})
    assert not (tmp_path / "run").exists()


def test_a_partition_of_no_data(tmp_path):
    args = make_trainer(tmp_path / "run").args
    with pytest.raises(ValueError, match="`partition` belongs to a `train_dataset`, which is missing"):
        RTLTrainer(image_model(), args, partition=PARTITION)


def test_a_model_with_other_routes_goes_without_the_rule(tmp_path, caplog):
    made = make_trainer(tmp_path / "run", **grouped(), target_sparsity=[0.6])
    save_rule(tmp_path / "model", ByGroups("label", GROUPS))
    made.add_route("dog", Images(24, 9, num_routes=1))
    with caplog.at_level(logging.WARNING, logger="hf_rtl"):
        made.save_model(str(tmp_path / "model"))
    (line,) = [record.getMessage() for record in caplog.records if "rule" in record.getMessage()]
    assert "is left out: " in line and "for other routes, 'ant', 'bee', 'cat', than" in line and "'dog'" in line
    assert RTLModel.from_pretrained(tmp_path / "model").num_routes == 4 and rule_files(tmp_path / "model") == {}
    with pytest.raises(ValueError, match="the rule of `partition` is for other routes"):
        made.evaluate(with_classes(12))
    made.model.drop_route("dog")
    made.save_model(str(tmp_path / "model"))
    assert load_rule(tmp_path / "model") == ByGroups("label", GROUPS)


@pytest.mark.slow
def test_a_rule_goes_along_with_a_model_until_its_routes_change(tmp_path, caplog):
    run(tmp_path / "run", **grouped(), target_sparsity=[0.3])
    for source in (RTLModel.from_pretrained(tmp_path / "run" / "final"), None):
        model = source or run(tmp_path / "run", **grouped(), target_sparsity=[0.3]).model
        (tmp_path / "pushed").mkdir(exist_ok=True)
        copy_run(model, tmp_path / "pushed", token=None)
        assert load_rule(tmp_path / "pushed", model.route_names) == ByGroups("label", GROUPS)
        caplog.clear()
        model.drop_route("bee")
        copy_run(model, tmp_path / "pushed", token=None)
        assert rule_files(tmp_path / "pushed") == {}
        assert "for other routes, 'ant', 'bee', 'cat', than those of the model, 'ant', 'cat'" in caplog.text
    # A model with other routes in the same folder does not get the rule of the earlier model.
    model.save_pretrained(tmp_path / "run" / "final")
    with pytest.raises(ValueError, match="for other routes, 'ant', 'bee', 'cat', than those of the model, 'ant', "):
        load_rule(tmp_path / "run" / "final")


def test_a_partition_by_clusters_trains(tmp_path):
    train = Images(24)
    features = torch.stack([sample["pixel_values"].mean((1, 2)) for sample in train.samples])
    partition = partition_by_features(features, num_routes=2, seed=0)
    made = run(
        tmp_path / "run",
        image_model(routes=partition.route_names),
        train=train,
        evaluate=Images(12, num_routes=2),
        options={"partition": partition},
        target_sparsity=[0.3],
        route_column="label",
    )
    assert made.plan().route_sizes == dict(zip(partition.route_names, partition.counts.tolist(), strict=True))
    assert load_rule(tmp_path / "run" / "final").assign(features).route_ids.tolist() == partition.route_ids.tolist()
