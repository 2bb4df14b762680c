"""Predictions without labels and without routes, of few samples, and metrics of evaluations in parts."""

import math

import numpy as np
import pytest
import torch

from tests.training.small_runs import DOMAINS, Broken, Images, image_model, make_trainer, timeless


PIXELS = ("pixel_values",)
ROUTED = {"route_column": "domain"}


@pytest.fixture(scope="module")
def membership(tmp_path_factory):
    return make_trainer(tmp_path_factory.mktemp("membership"), calibration_fraction=0.25)


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    data = Images(24, columns=DOMAINS)
    model = image_model(ticket_task="labels", num_labels=2)
    given = {"train": data, "evaluate": data, "route_column": "domain", "calibration_fraction": 0.25}
    return make_trainer(tmp_path_factory.mktemp("labels"), model, **given)


def logits(model, data, **routes):
    with torch.no_grad():
        return model.eval()(torch.stack([sample["pixel_values"] for sample in data.samples]), **routes).logits.numpy()


@pytest.mark.parametrize("number", [7, 1])
def test_membership_tickets_score_samples_without_labels(membership, number):
    output = membership.predict(Images(number, columns=PIXELS))
    assert output.label_ids is None and "test_loss" not in output.metrics
    assert np.allclose(output.predictions, logits(membership.model, Images(number)), atol=1e-6)


def test_the_routes_of_other_columns_are_not_labels(tmp_path):
    """The label column is none here, neither for the score nor for the collator."""
    made = make_trainer(tmp_path, train=Images(24, columns=DOMAINS), evaluate=Images(12, columns=DOMAINS), **ROUTED)
    output = made.predict(Images(6, columns=("pixel_values", "labels")))
    assert output.label_ids is None and output.predictions.shape == (6, 3)


def test_a_single_sample_is_evaluated(membership, labels):
    metrics = membership.evaluate(Images(1))
    assert metrics["eval_accuracy"] in (0, 1) and math.isnan(metrics["eval_constant_tickets"])
    assert labels.evaluate(Images(1, columns=DOMAINS))["eval_accuracy"] in (0, 1)


def test_a_router_decides_for_tickets_that_predict_labels(labels):
    unknown, labelled = Images(9, columns=PIXELS), Images(9, columns=("pixel_values", "labels"))
    with pytest.raises(ValueError, match="`route_column` = 'domain' is not in the data set; .*'pixel_values'"):
        labels.predict(unknown)
    labels.fit_router("centroid")
    output = labels.predict(unknown)
    assert np.allclose(output.predictions, logits(labels.model, Images(9)), atol=1e-6)
    assert labels.predict(unknown).label_ids is None
    output = labels.predict(labelled)
    assert output.label_ids.tolist() == [sample["labels"] for sample in labelled.samples]
    assert math.isfinite(output.metrics["test_loss"]) and "test_accuracy" not in output.metrics
    assert "eval_accuracy" in labels.evaluate()


@pytest.mark.parametrize("name", ["membership", "labels"])
def test_metrics_of_an_evaluation_in_parts(request, name):
    made = request.getfixturevalue(name)
    whole = made.evaluate()
    torch.manual_seed(0)  # of the noise in held-out training data
    thresholds = made.calibrated_thresholds()
    made.args.eval_do_concat_batches, made.args.per_device_eval_batch_size = False, 5
    made.args.eval_accumulation_steps = 2
    parts = made.evaluate()
    assert timeless(parts) == pytest.approx(timeless(whole), rel=1e-5)
    torch.manual_seed(0)
    assert made.calibrated_thresholds() == (None if thresholds is None else pytest.approx(thresholds, abs=1e-6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda i, sample: {**sample, "labels": sample["label"]},
            "`route_column` must be given: .*'label' and 'labels'",
        ),
        (lambda i, sample: {"pixel_values": sample["pixel_values"], "class": 0}, "`route_column` must be given"),
    ],
)
def test_the_argument_that_names_the_column_is_said(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path / "run", train=Broken(24, change))
