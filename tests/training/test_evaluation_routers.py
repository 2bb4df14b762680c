"""Runs that fit a router, and evaluation without given routes."""

import numpy as np
import pytest
import torch

from hf_rtl import RTLModel, RTLModelForTokenClassification
from hf_rtl.training.router_fitting import fit_scale_and_offset
from tests.training.small_runs import (
    DOMAINS,
    ROUNDS,
    ROUTES,
    Images,
    contents,
    image_model,
    make_trainer,
    run,
    same,
    timeless,
)


LABELS = {"target_sparsity": [0.3], "route_column": "domain", "calibration_fraction": 0.25}


def labels_data(number, seed=0):
    return Images(number, seed, DOMAINS)


def labels_run(folder, router, **values):
    data = {"train": labels_data(48), "evaluate": labels_data(18, 1), **LABELS, **values}
    return run(folder, image_model(ticket_task="labels", num_labels=2), router=router, **data)


@pytest.fixture(scope="module", params=["score", "centroid", "entropy"])
def routed(request, tmp_path_factory):
    """A run of labels tickets, for every kind of router. Tests must not change it."""
    return labels_run(tmp_path_factory.mktemp(request.param) / "run", request.param)


def test_evaluation_shows_given_and_inferred_routes_and_the_union(routed) -> None:
    (report,) = routed.rounds
    model = RTLModel.from_pretrained(routed.run_directory.final_folder)
    assert model.config.router == model.router.name == routed.args.router
    samples = labels_data(18, 1).samples
    correct = {"given": [], "inferred": [], "union": [], "route": []}
    for sample in samples:
        image = sample["pixel_values"][None]
        route = int(model.infer_routes(pixel_values=image).route_ids)
        correct["route"].append(route == sample["domain"])
        for kind, route_id in (("given", sample["domain"]), ("inferred", route), ("union", -1)):
            logits = model(pixel_values=image, route_ids=route_id).logits
            correct[kind].append(int(logits.argmax()) == sample["labels"])
    metrics = report["metrics"]
    assert metrics["eval_accuracy"] == pytest.approx(np.mean(correct["given"]))
    assert metrics["eval_inferred_accuracy"] == pytest.approx(np.mean(correct["inferred"]))
    assert metrics["eval_union_accuracy"] == pytest.approx(np.mean(correct["union"]))
    assert metrics["eval_route_accuracy"] == pytest.approx(np.mean(correct["route"]))
    assert metrics["eval_fallback_fraction"] == 0
    for kind, prefix in (("given", ""), ("inferred", "inferred_"), ("union", "union_")):
        by_route = [np.mean(correct[kind][route::3]) for route in range(3)]
        assert metrics[f"eval_{prefix}worst_route_accuracy"] == pytest.approx(min(by_route))
        assert metrics[f"eval_bee/{prefix}accuracy"] == pytest.approx(by_route[1])


def test_routers_are_fitted_on_training_data_alone(routed, tmp_path) -> None:
    """Samples held out of training and their routes decide; evaluation data and the task's labels do not."""
    model = RTLModel.from_pretrained(routed.run_directory.final_folder)
    dataset = routed.run_data.calibration_dataset
    held_out = [dataset[index] for index in range(len(dataset))]
    assert len(held_out) == 12
    rows = torch.cat(
        [model.router.evidence(model, {"pixel_values": s["pixel_values"][None]}) for s in held_out]
    ).detach()
    scale, offset = fit_scale_and_offset(rows.numpy(), np.array([sample["domain"] for sample in held_out]))
    assert model.router.scale.tolist() == pytest.approx(scale.tolist(), rel=1e-3)
    assert model.router.offset.tolist() == pytest.approx(offset.tolist(), rel=1e-2, abs=1e-3)

    buffers = {name: buffer.clone() for name, buffer in routed.model.router.named_buffers()}
    shuffled = labels_data(48)
    for sample, other in zip(shuffled.samples, reversed(labels_data(48).samples), strict=True):
        sample["labels"] = other["labels"]
    trainer = make_trainer(
        tmp_path / "other",
        RTLModel.from_pretrained(routed.run_directory.final_folder),
        train=shuffled,
        evaluate=labels_data(6, 7),
        **LABELS,
    )
    trainer.fit_router(routed.args.router)
    for name, buffer in trainer.model.router.named_buffers():
        assert same(buffer, buffers[name]), name


@pytest.mark.slow
def test_a_run_with_a_router_goes_on_as_if_not_interrupted(tmp_path, monkeypatch) -> None:
    values = {"router": "centroid", "router_threshold": 0.4, "router_fallback": "cat", "target_sparsity": [0.3, 0.6]}
    whole = run(tmp_path / "whole", calibration_fraction=0.25, train=Images(48), **values)
    broken = make_trainer(tmp_path / "broken", calibration_fraction=0.25, train=Images(48), **values)
    fit, calls = broken.fit_router, []

    def fail_at_the_second(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        fit(*arguments, **options)

    monkeypatch.setattr(broken, "fit_router", fail_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    continued = run(tmp_path / "broken", calibration_fraction=0.25, train=Images(48), **values)
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")
    assert [timeless(r["metrics"]) for r in continued.rounds] == [timeless(r["metrics"]) for r in whole.rounds]
    assert {"eval_route_accuracy", "eval_routed_precision_at_recall_80"} <= whole.rounds[0]["metrics"].keys()
    first = RTLModel.from_pretrained(tmp_path / "broken" / ROUNDS[0])
    assert first.config.router_threshold == 0.4 and first.config.router_fallback == "cat"
    # Repeated, the run reads its files.
    assert run(tmp_path / "broken", calibration_fraction=0.25, train=Images(48), **values).rounds == continued.rounds


def test_membership_scores_decide_like_the_model_itself(tmp_path) -> None:
    trainer = run(tmp_path / "run", router="score", target_sparsity=[0.3], calibration_fraction=0.25, train=Images(48))
    metrics = trainer.rounds[0]["metrics"]
    model = RTLModel.from_pretrained(tmp_path / "run" / "final")
    samples = Images(12, seed=1).samples
    output = model(pixel_values=torch.stack([sample["pixel_values"] for sample in samples]))
    homes = torch.tensor([sample["label"] for sample in samples])
    assert metrics["eval_route_accuracy"] == pytest.approx((output.route_ids == homes).float().mean().item())
    assert metrics["eval_accuracy"] == pytest.approx((output.logits.argmax(1) == homes).float().mean().item())


def test_numbers_that_are_regressed_have_a_loss_and_a_route(tmp_path) -> None:
    train, evaluate = labels_data(48), labels_data(18, 1)
    for data in (train, evaluate):
        for index, sample in enumerate(data.samples):
            sample["labels"] = index % 5 / 2
    model = image_model(ticket_task="labels", num_labels=1)
    (report,) = run(tmp_path / "run", model, train=train, evaluate=evaluate, router="centroid", **LABELS).rounds
    assert report["metrics"]["eval_loss"] > 0 and 0 <= report["metrics"]["eval_route_accuracy"] <= 1
    assert not any(name.endswith(("eval_accuracy", "inferred_accuracy")) for name in report["metrics"])


def test_routers_that_do_not_suit_a_model_are_refused_at_once(tmp_path, tiny_bert_config) -> None:
    model = RTLModelForTokenClassification.from_backbone(tiny_bert_config, route_names=ROUTES, ticket_task="labels")
    data = [{"input_ids": [1, 2], "labels": [0, 1], "domain": index % 3} for index in range(24)]
    message = "'score' reads one prediction a sample, which RTLModelForTokenClassification does not give"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path / "run", model, train=data, evaluate=data, router="score", **LABELS)
    one_label = image_model(ticket_task="labels", num_labels=1)
    with pytest.raises(ValueError, match="'entropy' compares several labels, and these tickets have one"):
        make_trainer(tmp_path / "run", one_label, train=labels_data(24), router="entropy", **LABELS)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"router": "score"}, "fitted on data that no ticket was trained on: set `calibration_fraction`"),
        ({"router": "entropy", "calibration_fraction": 0.25}, "'entropy' suits tickets for labels"),
        ({"router": "score", "calibration_fraction": 0.25, "router_fallback": "dog"}, "'dog'"),
        ({"router": "scores"}, "`router` must be one of 'given', 'score', 'centroid', 'entropy', got 'scores'"),
        ({"router": "score", "router_threshold": 2.0}, r"`router_threshold` must be in \[0, 1\], got 2.0"),
    ],
)
def test_routers_that_cannot_be_fitted_are_refused_at_once(tmp_path, values, message) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path / "run", **values)
    assert not (tmp_path / "run").exists()
