"""What would fail after extraction fails before it, without a trace. A failed evaluation costs no step."""

import copy
import json

import datasets
import numpy as np
import pytest
import torch
from transformers import EarlyStoppingCallback

from hf_rtl import RTLTrainer
from hf_rtl.training import rounds
from hf_rtl.training.ticket_trainer import TicketTrainer
from tests.training.small_runs import (
    DOMAINS,
    ROUNDS,
    Broken,
    Images,
    Recorder,
    contents,
    files,
    image_model,
    make_labels_trainer,
    make_trainer,
    run,
    same,
    timeless,
)


EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
GREY = lambda sample: {**sample, "pixel_values": sample["pixel_values"][:1]}  # noqa: E731


def broken(prediction):
    raise RuntimeError("a mistake in the metrics")


def metrics(**values):
    return {"options": {"compute_metrics": lambda prediction: dict(values)}}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"options": {"compute_metrics": broken}}, RuntimeError, "a mistake in the metrics"),
        ({"options": {"compute_metrics": lambda prediction: None}}, TypeError, "NoneType"),
        ({"options": {"compute_metrics": lambda prediction: 0.5}}, TypeError, "`compute_metrics` gives 0.5, a float"),
        (metrics(found=np.array(0.5)), TypeError, r"`compute_metrics` gives array\(0.5\), a ndarray, for 'found'"),
        (metrics(found=torch.ones(2)), TypeError, "a Tensor, for 'found'; a metric is a number"),
        (metrics(found=[0.5]), TypeError, "a list, for 'found'"),
        (metrics(found={1, 2}), TypeError, "not JSON serializable"),
        (metrics(found="text"), ValueError, "Unknown format"),  # the card shows a number
        ({"evaluate": Broken(12, lambda i, s: GREY(s), columns=DOMAINS)}, RuntimeError, "channels"),
        ({"evaluate": Images(12, columns=("labels", "domain"))}, TypeError, "pixel_values"),
        (
            {"train": Broken(24, lambda i, s: {"image": s["pixel_values"], "labels": i % 2, "domain": i % 3})},
            TypeError,
            "`train_dataset` have the columns 'image', 'labels', 'domain', but .*'pixel_values'.*rename_column",
        ),
        ({"metric_for_best_model": "acuracy", **EVALUATED}, KeyError, "'eval_acuracy'.*'eval_accuracy'"),
        ({"metric_for_best_model": "f1", **metrics(accuracy=1.0), **EVALUATED}, KeyError, "eval_f1"),
        ({"callbacks": [EarlyStoppingCallback()], **EVALUATED}, AssertionError, "metric_for_best_model"),
        (
            {
                "router": "centroid",
                "options": {"calibration_dataset": Broken(12, lambda i, s: GREY(s), columns=DOMAINS)},
            },
            RuntimeError,
            "channels",
        ),
    ],
)
def test_what_would_fail_after_extraction_fails_before_it(tmp_path, monkeypatch, caplog, change, error, message):
    monkeypatch.setattr(TicketTrainer, "step", None)  # nothing is trained
    made = make_labels_trainer(tmp_path / "run", **change)
    with pytest.raises(error, match=message):
        made.train()
    assert files(tmp_path) == {}
    assert "nothing has been written" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("column", ["label", "labels"])
def test_labels_may_be_truth_values(tmp_path, column):
    found = []
    for number, kind in enumerate((int, bool, np.bool_, lambda label: torch.tensor(bool(label)))):

        def with_labels(index, sample, kind=kind):
            return {**{name: sample[name] for name in ("pixel_values", "domain")}, column: kind(sample["labels"])}

        data = Broken(24, with_labels, columns=DOMAINS)
        found.append(make_labels_trainer(tmp_path / str(number), train=data, evaluate=data, max_steps=1).train())
    assert all(timeless(each.metrics) == timeless(found[0].metrics) for each in found)


def with_made_labels(*, stored="species", names=("label", "labels")):
    """A `datasets.Dataset` whose transform makes labels of names."""
    samples = Images(24, columns=DOMAINS).samples
    data = {
        "image": [sample["pixel_values"].tolist() for sample in samples],
        stored: ["cat" if sample["labels"] else "dog" for sample in samples],
        "domain": [sample["domain"] for sample in samples],
    }

    def transform(batch):
        made = [int(name == "cat") for name in batch[stored]]
        return {"pixel_values": [torch.tensor(image) for image in batch["image"]], **dict.fromkeys(names, made)}

    return datasets.Dataset.from_dict(data).with_transform(transform)


@pytest.mark.slow
@pytest.mark.parametrize(
    "made",
    [
        {"names": ["labels"]},
        {"names": ["label"]},
        {"stored": "label", "names": ["label"]},
        {"stored": "label", "names": ["labels"]},
    ],
)
def test_a_transform_may_make_the_labels(tmp_path, made):
    expected = (
        make_labels_trainer(tmp_path / "plain", evaluate=Images(24, columns=DOMAINS), max_steps=2).train().metrics
    )
    data = with_made_labels(**made)
    found = make_labels_trainer(tmp_path / "made", train=data, evaluate=data, max_steps=2).train().metrics
    assert timeless(found) == timeless(expected)


def test_what_a_transform_makes_is_no_route(tmp_path):
    data = with_made_labels()
    for values in ({}, {"route_column": "labels"}):
        with pytest.raises(
            ValueError, match="'image', 'species', 'domain'. What a transform makes is not read.*`dataset.map`"
        ):
            make_trainer(tmp_path, train=data, **values)
    output = make_trainer(tmp_path, train=data, evaluate=data, route_column="domain", target_sparsity=[0.3]).train()
    assert "eval_auroc" in output.metrics


def test_numbers_of_numpy_and_torch_are_metrics(tmp_path):
    found = metrics(numpy=np.float32(0.5), torch=torch.tensor(0.5), truth=np.bool_(True))
    output = make_labels_trainer(tmp_path, **found).train().metrics
    assert (output["eval_numpy"], output["eval_torch"], output["eval_truth"]) == (0.5, 0.5, True)


def test_a_corrected_argument_starts_the_run(tmp_path):
    with pytest.raises(KeyError, match="acuracy"):
        make_labels_trainer(tmp_path, metric_for_best_model="acuracy", **EVALUATED).train()
    made = make_labels_trainer(tmp_path, metric_for_best_model="accuracy", load_best_model_at_end=True, **EVALUATED)
    assert made.train().global_step == 3


def test_metrics_that_need_all_samples_are_given_all(tmp_path):
    def needs_all(prediction):
        assert len(prediction.predictions) == 60, "too few samples"
        return {"found": 0.25}

    options = {"options": {"compute_metrics": needs_all}}
    data = Images(60, seed=1, columns=DOMAINS)
    output = make_labels_trainer(
        tmp_path, evaluate=data, metric_for_best_model="found", **options, **EVALUATED
    ).train()
    assert output.metrics["eval_found"] == 0.25


@pytest.mark.slow
def test_batches_need_not_be_joined_for_evaluation(tmp_path):
    for task, make, name in (("labels", make_labels_trainer, "accuracy"), ("membership", make_trainer, "auroc")):
        options = {
            "target_sparsity": [0.3],
            "max_steps": 1,
            "eval_do_concat_batches": False,
            "per_device_eval_batch_size": 5,
        }
        if task == "membership":
            options["options"] = {"calibration_dataset": Images(12, seed=2)}
        separate = make(tmp_path / task / "separate", **options).train().metrics
        joined = make(tmp_path / task / "joined", **{**options, "eval_do_concat_batches": True}).train().metrics
        assert timeless(separate) == timeless(joined) and f"eval_{name}" in joined


class Touched(Recorder):
    """Fails on every event."""

    def on_train_begin(self, *args, **kwargs):
        raise AssertionError

    on_evaluate = on_log = on_prediction_step = on_save = on_train_begin


def test_calibration_data_are_tried_in_evaluation_mode(tmp_path):
    """In training mode, batch norm refuses the single value per channel that one small image leaves."""
    model = image_model(ticket_task="labels", num_labels=2, routes=["all"])
    options = {"route_column": None, "calibration_fraction": 0.25, "router": "given"}
    made = make_labels_trainer(tmp_path, model, **options)
    made.eval_dataset = None
    rounds.rehearse(made, made.plan().rounds[0])


def test_a_rehearsal_leaves_nothing_behind(tmp_path):
    model = image_model(ticket_task="labels", num_labels=2, norm_statistics="shared")
    made = make_labels_trainer(
        tmp_path, model=model, callbacks=[Touched()], calibration_fraction=0.25, router="centroid", **EVALUATED
    )
    model.train()
    before, kept, partitions = copy.deepcopy(model.state_dict()), dict(made.__dict__), list(made.run_data._partitions)
    state, control, given = copy.deepcopy(made.state), copy.deepcopy(made.control), model.config.to_dict()
    generators = torch.get_rng_state(), np.random.get_state()[1].copy()
    rounds.rehearse(made, made.plan().rounds[0])
    assert files(tmp_path) == {}
    assert made.__dict__.keys() == kept.keys() and all(made.__dict__[name] is kept[name] for name in kept)
    assert (made.state, made.control, model.config.to_dict()) == (state, control, given)
    assert model.backbone.config.problem_type is None
    assert made.run_data._partitions == partitions
    assert all(same(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules()) and not made.accelerator._models
    assert torch.equal(torch.get_rng_state(), generators[0]) and (np.random.get_state()[1] == generators[1]).all()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.slow
def test_a_run_is_the_same_without_its_rehearsal(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(rounds, "rehearse", lambda *arguments: None)
    run(tmp_path / "run")
    assert contents(tmp_path / "run") == contents(finished.folder)


def fail_at(number):
    """Metrics that fail at one of their calls; the first is in the rehearsal."""
    calls = []

    def compute(prediction):
        calls.append(1)
        if len(calls) == number:
            raise RuntimeError("a mistake")
        return {"mean": float(prediction.predictions.mean())}

    return {"compute_metrics": compute}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saving", "number", "num_left"),
    [
        ({}, 2, 0),  # at the end of the round, which has six steps
        ({"eval_strategy": "steps", "eval_steps": 2}, 3, 2),  # after four steps
        ({"eval_strategy": "epoch", "save_strategy": "best", "metric_for_best_model": "loss"}, 2, 0),
        ({"load_best_model_at_end": True, "metric_for_best_model": "loss", **EVALUATED}, 3, 2),
    ],
)
def test_a_failed_evaluation_costs_no_step(tmp_path, saving, number, num_left):
    saving = {"target_sparsity": [0.3], "extraction_steps": 1, **saving}
    whole = run(tmp_path / "whole", options=fail_at(None), **saving)
    with pytest.raises(RuntimeError, match="a mistake"):
        run(tmp_path / "run", options=fail_at(number), **saving)
    recorded = Recorder()
    made = run(tmp_path / "run", callbacks=[recorded], options=fail_at(None), **saving)
    assert recorded.calls["step_end"] == num_left
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
    for report, expected in zip(made.rounds, whole.rounds, strict=True):
        assert timeless(report["metrics"]) == timeless(expected["metrics"])
        logged, wanted = (
            [(entry["step"], entry["round"], entry["epoch"]) for entry in each["log_history"] if "eval_mean" in entry]
            for each in (report, expected)
        )
        assert logged == wanted


@pytest.mark.slow
def test_an_evaluation_that_failed_is_done_once_and_leaves_no_checkpoint(tmp_path, caplog):
    options = {"target_sparsity": [0.3], "extraction_steps": 1, "eval_strategy": "steps", "eval_steps": 2}
    options |= {"eval_on_start": True, "max_steps": 4}
    with pytest.raises(RuntimeError, match="a mistake"):
        run(tmp_path, options=fail_at(3), **options)  # after the rehearsal and the start
    (kept,) = tmp_path.glob("round-*/checkpoint-*")
    assert kept.name == "checkpoint-2" and f"are kept in {str(kept)!r}" in caplog.text
    recorded = Recorder()
    run(tmp_path, callbacks=[recorded], options=fail_at(None), **options)
    # What had failed; at the last step; at the end of the round.
    assert (recorded.calls["evaluate"], recorded.calls["step_end"]) == (3, 2)
    assert not list(tmp_path.glob("**/checkpoint-*"))


def test_a_failure_at_the_start_leaves_no_checkpoint(tmp_path):
    with pytest.raises(RuntimeError, match="a mistake"):
        run(tmp_path, options=fail_at(2), eval_on_start=True, target_sparsity=[0.3], extraction_steps=1, max_steps=1)
    assert not list(tmp_path.glob("**/checkpoint-*"))


def test_a_model_that_is_not_evaluated_yet_is_marked(tmp_path):
    made = make_trainer(tmp_path, options=fail_at(2), target_sparsity=[0.3])
    with pytest.raises(RuntimeError):
        made.train()
    folder = tmp_path / ROUNDS[0]
    written = (folder / "model.safetensors").stat()
    assert json.loads((folder / "retrained.json").read_text())["metrics"] is None
    assert not (folder / "round.json").exists()
    made.train()  # the same trainer
    assert not (folder / "retrained.json").exists()
    report = json.loads((folder / "round.json").read_text())
    assert report["metrics"]["eval_mean"] == made.rounds[0]["metrics"]["eval_mean"]
    assert (folder / "model.safetensors").stat() == written


class Counted:
    """Metrics that count the samples of all batches, as `batch_eval_metrics` allows."""

    def __init__(self):
        self.number = 0

    def __call__(self, prediction, compute_result=False):
        self.number += len(prediction.label_ids)
        if compute_result:
            number, self.number = self.number, 0
            if number != 60:
                raise ValueError(f"{number} samples")
            return {"number": number}


class Complete(RTLTrainer):
    """An evaluation that needs all samples, and a loss of training in the log."""

    def evaluate(self, *args, **kwargs):
        metrics = super().evaluate(*args, **kwargs)
        metrics["eval_gap"] = (
            metrics["eval_loss"] - [log["loss"] for log in self.state.log_history if "loss" in log][-1]
        )
        return metrics


@pytest.mark.slow
def test_own_evaluation_is_tried_on_all_samples_before_it_is_refused(tmp_path, caplog):
    data = Images(60, seed=1, columns=DOMAINS)
    options = {"batch_eval_metrics": True, "options": {"compute_metrics": Counted()}}
    assert make_labels_trainer(tmp_path / "counted", evaluate=data, **options).train().metrics["eval_number"] == 60
    made = make_labels_trainer(tmp_path / "complete", evaluate=data)
    made.__class__ = Complete
    assert "eval_gap" in made.train().metrics
    assert "the evaluation of Complete could not be tried before training" in caplog.text
