"""Input that is refused before anything is written, and trainings that fail."""

import logging
import re

import pytest
import torch
import transformers

from hf_rtl import RTLModel, RTLTrainer, RTLTrainingArguments
from tests.training.small_runs import (
    DOMAINS,
    ROUNDS,
    ROUTES,
    Broken,
    Images,
    arguments,
    image_model,
    make_trainer,
    run,
)


def without(name):
    return lambda index, sample: {key: value for key, value in sample.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"route_column": "colour"}, "'colour'.*'pixel_values', 'label'"),
        ({"train": Broken(24, without("label"))}, "label"),
        ({"train": Broken(24, lambda i, sample: {**sample, "label": -1})}, "-1"),
        ({"train": Broken(24, lambda i, sample: {**sample, "label": 0.5})}, "0.5"),
        ({"train": Broken(24, lambda i, sample: {**sample, "label": 3})}, "3"),
        ({"train": Broken(24, lambda i, sample: {**sample, "label": i % 2})}, "'cat' has no samples"),
        ({"train": Broken(25, lambda i, sample: {**sample, "label": 2 if i == 0 else i % 2})}, "'cat' has a single"),
        ({"train": Broken(24, lambda i, sample: {**sample, "label": "cow"})}, "'cow'"),
        ({"train": Broken(24, lambda i, sample: list(sample))}, "list"),
        ({"train": []}, "empty"),
        ({"train": iter([])}, "map-style|iterator"),
        ({"evaluate": Broken(12, without("label"))}, "label"),
        ({"evaluate": {"a": Images(12), "b": Broken(12, without("label"))}}, "label"),
        ({"evaluate": Broken(12, lambda i, sample: {**sample, "label": 3})}, "3"),
        ({"options": {"calibration_dataset": Broken(12, without("label"))}}, "label"),
        ({"rewind_to": 3}, "`rewind_to` = 3.*'is this mine"),
        (
            {"calibration_fraction": 0.01},
            "`calibration_fraction` = 0.01 leaves 0 of the 8 samples of route 'ant' to cal",
        ),
        ({"calibration_fraction": 0.9}, "`calibration_fraction` = 0.9 leaves 7 of the 8.* and 1 to train on"),
        ({"options": {"model_init": lambda: None}}, "`model_init`"),
        ({"options": {"optimizers": (torch.optim.SGD([torch.ones(1)]), None)}}, "`optimizers`"),
        ({"target_sparsity": [1.0]}, "below 1"),
        ({"target_sparsity": [0.99999]}, "keeps none"),
        (
            {"labels": True, "route_column": "domain", "train": Images(24, columns=("pixel_values", "domain"))},
            "no column 'label'",
        ),
        (
            {
                "labels": True,
                "route_column": "domain",
                "train": Broken(24, lambda i, sample: {**sample, "labels": i % 3}, columns=DOMAINS),
            },
            "single label",
        ),
        ({"model": "test_resnet"}, "RTLModel.*str"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(tmp_path, change, message):
    change = dict(change)
    if change.pop("labels", False):
        change["model"] = image_model(ticket_task="labels", num_labels=2)
        change.setdefault("train", Images(24, columns=DOMAINS))
        change.setdefault("evaluate", Images(12, columns=DOMAINS))
    with pytest.raises((TypeError, ValueError), match=message):
        make_trainer(tmp_path / "run", **change).train()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_route_without_negatives_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least two routes"):
        image_model(routes=["one"])
    with pytest.raises(ValueError, match="'bee' has no samples"):
        make_trainer(tmp_path / "run", image_model(routes=["ant", "bee"]), train=Images(24, num_routes=1))
    assert list(tmp_path.iterdir()) == []


def test_training_needs_data(tmp_path):
    made = RTLTrainer(image_model(), arguments(tmp_path / "run"), eval_dataset=Images(12))
    assert "eval_balanced_accuracy" in made.evaluate()
    with pytest.raises(ValueError, match="`train_dataset`"):
        made.train()


def test_processes_that_are_not_connected_are_refused(tmp_path, monkeypatch):
    """As torch's launcher starts them on CPUs if the arguments do not say `use_cpu`."""
    args = arguments(tmp_path / "run")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="started 2 processes, but they are not connected.*`use_cpu=True`"):
        RTLTrainer(image_model(), args, train_dataset=Images(24))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_what_splits_weights_is_refused(tmp_path, monkeypatch, name):
    args = arguments(tmp_path / "run")
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(ValueError, match=f"{name} is not supported: it splits weights.*data parallelism"):
        RTLTrainer(image_model(), args, train_dataset=Images(24))
    assert not (tmp_path / "run").exists()


def test_several_accelerators_in_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(RTLTrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="2 GPUs.*torchrun --nproc_per_node=2"):
        make_trainer(tmp_path / "run")


BAD_LABELS = [
    (3, None, "None at sample 3; needed is an integer from 0 to 1"),
    (3, float("nan"), "nan at sample 3"),
    (3, "cat", "'cat' at sample 3"),
    (3, 0.5, "0.5 at sample 3"),
    (3, 2, "2 at sample 3.*`num_labels` = 2"),
    (3, -1, "-1 at sample 3"),
    (0, None, "None at sample 0"),
    (3, [1.0, 0.0], r"\[1.0, 0.0\] at sample 3"),
]


@pytest.mark.parametrize("place", ["train", "evaluate"])
@pytest.mark.parametrize(("at", "label", "message"), BAD_LABELS)
def test_a_bad_label_is_named(tmp_path, place, at, label, message):
    def change(index, sample):
        return {**sample, "labels": label} if index == at else sample

    data = {"train": Images(24, columns=DOMAINS), "evaluate": Images(12, columns=DOMAINS)}
    data[place] = Broken(24, change, columns=DOMAINS)
    collator = {"data_collator": transformers.default_data_collator}
    for options in ({}, collator):  # those of transformers take labels as they are
        with pytest.raises(ValueError, match=f"Column 'labels' has the label {message}"):
            model = image_model(ticket_task="labels", num_labels=2)
            make_trainer(tmp_path / "run", model, route_column="domain", options=options, **data)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("num_labels", "good", "bad"),
    [
        (1, 0.5, float("inf")),
        (1, 0.5, 2),
        (1, 2, 0.5),
        (2, [1.0, 0.0], [1.0, float("nan")]),
        (2, [1.0, 0.0], [1.0, None]),
    ],
)
def test_a_bad_number_is_named(tmp_path, num_labels, good, bad):
    def data(label):
        return Broken(24, lambda i, sample: {**sample, "labels": label if i == 7 else good}, columns=DOMAINS)

    model = image_model(ticket_task="labels", num_labels=num_labels)
    make_trainer(
        tmp_path / "run", model, route_column="domain", train=Images(24, columns=DOMAINS), evaluate=data(good)
    )
    with pytest.raises(ValueError, match=re.escape(f"has the label {bad} at sample 7")):
        make_trainer(tmp_path / "run", model, route_column="domain", train=data(bad), evaluate=Images(12, 0, DOMAINS))


def test_frozen_weights_are_named_with_figures(tmp_path, caplog):
    model = image_model()
    model.backbone.timm_model.conv2.requires_grad_(False)
    num_frozen, total = model.backbone.timm_model.conv2.weight.numel(), model.mask_bank.num_weights
    with caplog.at_level(logging.WARNING, logger="hf_rtl.training.run_data"):
        made = make_trainer(tmp_path, model)
    (message,) = [record.message for record in caplog.records if "are frozen" in record.message]
    assert f"{num_frozen:,} of {total:,} prunable weights ({num_frozen / total:.0%})" in message
    assert made.model.mask_bank.num_weights == total
    caplog.clear()
    make_trainer(tmp_path, image_model())
    assert "frozen" not in caplog.text


def test_nothing_to_train_is_refused(tmp_path):
    model = image_model()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model wants a gradient.*requires_grad_\\(True\\)"):
        make_trainer(tmp_path / "run", model)
    assert not (tmp_path / "run").exists()
    RTLTrainer(model, arguments(tmp_path), eval_dataset=Images(12)).evaluate()


def test_labels_that_are_no_classes_are_not_checked(tmp_path):
    """Labels may be numbers to regress, here below 1, or several per sample."""
    for num_labels, label in ((1, lambda i: i / 100), (2, lambda i: torch.tensor([1.0, 0.0]))):
        data = Broken(24, lambda i, sample, label=label: {**sample, "labels": label(i)}, columns=DOMAINS)
        model = image_model(ticket_task="labels", num_labels=num_labels)
        made = RTLTrainer(model, arguments(tmp_path / "run", route_column="domain"), train_dataset=data)
        assert made.plan().route_sizes == dict.fromkeys(ROUTES, 8)


def test_a_loss_that_is_not_a_number_stops_extraction(tmp_path):
    data = Broken(24, lambda i, sample: {**sample, "pixel_values": sample["pixel_values"] / (i != 4)})
    with pytest.raises(
        FloatingPointError,
        match="extraction of route 'ant', prune event 0: the loss became nan",
    ):
        run(tmp_path / "run", train=data, extraction_steps=8)
    assert not list((tmp_path / "run").rglob("route-*.safetensors"))


def test_a_loss_that_is_not_a_number_stops_joint_retraining(tmp_path, monkeypatch):
    compute_loss = RTLTrainer.compute_loss

    def nan_in_retraining(self, model, *positional, **keywords):
        loss = compute_loss(self, model, *positional, **keywords)
        return loss * float("nan") if isinstance(model, RTLModel) and model.training else loss

    monkeypatch.setattr(RTLTrainer, "compute_loss", nan_in_retraining)
    for evaluate in (Images(12), None):
        made = RTLTrainer(
            image_model(), arguments(tmp_path, target_sparsity=[0.3]), train_dataset=Images(24), eval_dataset=evaluate
        )
        with pytest.raises(
            FloatingPointError,
            match=f"joint retraining of {ROUNDS[0]}: the loss or a weight became NaN.*mean loss nan",
        ):
            made.train()
    assert not list(tmp_path.rglob("model.safetensors"))


def test_pruning_that_cuts_a_ticket_apart_raises_unless_allowed(tmp_path, caplog):
    tight = {"target_sparsity": [0.995], "prune_amount": 0.9, "extraction_steps": 1}
    with pytest.raises(
        FloatingPointError, match="has cut the output of ticket 'ant' from its input.*allow_disconnected"
    ):
        run(tmp_path / "refused", **tight)
    with caplog.at_level(logging.WARNING, logger="hf_rtl.training.route_trainer"):
        made = run(tmp_path / "allowed", allow_disconnected=True, **{**tight, "target_sparsity": [0.99, 0.995]})
    assert sum("emptied whole layers" in record.message for record in caplog.records) == 1
    report = made.rounds[-1]
    assert report["emptied_layers"]["ant"]
    assert report["metrics"]["eval_constant_tickets"] == 3
    bank = made.model.mask_bank
    for name, layers in report["emptied_layers"].items():
        counts = dict(zip(bank.weight_names, [int(mask.sum()) for mask in bank[name]], strict=True))
        assert layers == [layer for layer, count in counts.items() if count == 0]


@pytest.mark.parametrize("router", ["score", "centroid"])
def test_a_run_of_tickets_that_are_cut_apart_ends_with_a_router_that_is_no_help(tmp_path, caplog, router):
    made = run(
        tmp_path,
        allow_disconnected=True,
        router=router,
        calibration_fraction=0.2,
        target_sparsity=[0.995],
        prune_amount=0.9,
        extraction_steps=1,
    )
    assert "evidence is the same for all samples" in caplog.text
    assert made.model.config.router == router and (tmp_path / "final" / "model.safetensors").exists()
    made.args.allow_disconnected = False
    with pytest.raises(ValueError, match="the same for all samples"):
        made.fit_router(router)


def test_labels_that_losses_leave_out_or_read_themselves(tmp_path):
    """-100 is left out by torch's losses; a loss of the caller says itself what a label may be."""

    def own_loss(outputs, labels, num_items_in_batch=None):
        return outputs.logits.sum()

    def make(label, loss=None):
        data = Broken(
            24, lambda i, sample: {**sample, "labels": label if i == 5 else sample["labels"]}, columns=DOMAINS
        )
        model = image_model(ticket_task="labels", num_labels=2)
        args = arguments(tmp_path / "run", route_column="domain")
        return RTLTrainer(model, args, train_dataset=data, compute_loss_func=loss)

    for label, loss in ((-100, None), (-1, own_loss), (2, own_loss)):
        assert make(label, loss).plan().route_sizes == dict.fromkeys(ROUTES, 8)
    with pytest.raises(ValueError, match="the label -1 at sample 5; needed is an integer from 0 to 1"):
        make(-1)
