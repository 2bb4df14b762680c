"""What makes two runs the same is what they were given; and figures are of the data that they are said to be of."""

import json
import shutil

import pytest
import torch

from hf_rtl import RTLModel, RTLTrainer
from tests.training.interruptions import StopAtStep, StopError
from tests.training.small_runs import (
    DOMAINS,
    ROUNDS,
    Broken,
    Images,
    Recorder,
    image_model,
    make_labels_trainer,
    make_trainer,
    run,
    timeless,
)


def called():
    model = image_model(ticket_task="labels", num_labels=2).train()
    model(torch.randn(4, 3, 16, 16), labels=torch.tensor([0, 1, 0, 1]), route_ids=0)
    assert model.backbone.config.problem_type == "single_label_classification"
    return model


def given(problem_type):
    return image_model(ticket_task="labels", num_labels=2, problem_type=problem_type)


@pytest.mark.slow
def test_a_call_with_labels_makes_no_other_run(tmp_path):
    """transformers writes the problem type into the backbone's configuration."""
    shared = {"extraction_dir": str(tmp_path / "masks")}
    stopping = make_labels_trainer(tmp_path / "run", callbacks=[StopAtStep(2)], **shared)
    with pytest.raises(StopError):
        stopping.train()
    stopping.remove_callback(StopAtStep)
    evaluated = make_labels_trainer(tmp_path / "run", **shared)
    evaluated.evaluate()
    found = [stopping.train().metrics, stopping.train().metrics, evaluated.train().metrics]
    for model in (called(), given("single_label_classification")):
        found.append(make_labels_trainer(tmp_path / "run", model, **shared).train().metrics)
        found.append(make_labels_trainer(tmp_path / f"{len(found)}", model_like(model), **shared).train().metrics)
    assert all(timeless(metrics) == timeless(found[0]) for metrics in found)
    with pytest.raises(ValueError) as raised:
        make_labels_trainer(tmp_path / "run", given("multi_label_classification"), **shared).train()
    expected = 'backbone_config.problem_type: "single_label_classification" there, "multi_label_classification" now'
    assert f"another configuration ({expected})" in str(raised.value)


def model_like(model):
    return called() if model.backbone.config.problem_type is None else given("single_label_classification")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda i, s: {**s, "labels": 1 - s["labels"] if i == 7 else s["labels"]}, "data.labels"),
        (lambda i, s: {**s, "pixel_values": s["pixel_values"] * (i != 7)}, "data.features"),
        (lambda i, s: {**s, "domain": (s["domain"] + (i in (7, 8))) % 3}, "route_ids"),
    ],
)
def test_corrected_training_data_make_another_run(tmp_path, change, named):
    made = make_labels_trainer(tmp_path)
    made.train()
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"other {named}|{named}: .* there, .* now") as raised:
            make_labels_trainer(tmp_path, train=Broken(24, change, columns=DOMAINS)).train()
    assert "another `output_dir`" in str(raised.value) and "to keep them" not in str(raised.value)


def noted(number):
    """Training data with columns that no model takes."""
    return Broken(24, lambda i, s: {**s, "path": f"folder-{number}/{i}", "id": number * i}, columns=DOMAINS)


def test_columns_that_nothing_reads_make_no_other_run(tmp_path):
    for data in (Images(24, columns=DOMAINS), noted(1), noted(2)):
        assert make_labels_trainer(tmp_path, max_steps=1, train=data).train().global_step == 1


def test_a_run_of_an_earlier_version_goes_on_with_the_same_columns(tmp_path):
    """Its file has a hash of all columns."""
    make_labels_trainer(tmp_path, max_steps=1, train=noted(1)).train()
    for file in (tmp_path / "run.json", tmp_path / "extraction" / "extraction.json"):
        settings = json.loads(file.read_text())
        data = settings["configuration"]["data"]
        data["features"] = data.pop("stored")
        file.write_text(json.dumps(settings))
    assert make_labels_trainer(tmp_path, max_steps=1, train=noted(1)).train().global_step == 1
    with pytest.raises(ValueError, match="other data.features.*. Choose another `output_dir`"):
        make_labels_trainer(tmp_path, max_steps=1, train=noted(2)).train()


def test_random_transforms_make_no_other_run(tmp_path):
    first = run(tmp_path, train=Images(24, noise=0.5), target_sparsity=[0.3])
    again = run(tmp_path, train=Images(24, noise=0.5), target_sparsity=[0.3])
    assert again.rounds == first.rounds


BEST = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}


@pytest.mark.slow
def test_what_decides_no_weight_may_change(tmp_path):
    first = run(tmp_path, target_sparsity=[0.3], metric_for_best_model="loss", **BEST)
    recorded = Recorder()
    changes = {"metric_for_best_model": "auroc", "greater_is_better": True, "logging_steps": 2, "eval_steps": 3}
    model = image_model()
    model.config.mask_cache_bytes = 1
    again = run(tmp_path, model, callbacks=[recorded], target_sparsity=[0.3], **{**BEST, **changes})
    assert again.rounds == first.rounds and recorded.calls["step_end"] == 0


@pytest.mark.slow
def test_where_the_best_model_is_kept_its_metric_makes_another_run_and_the_masks_stay(tmp_path, monkeypatch):
    options = {**BEST, "load_best_model_at_end": True, "target_sparsity": [0.3]}
    run(tmp_path / "run", metric_for_best_model="loss", **options)
    with pytest.raises(ValueError, match='metric_for_best_model: "loss" there, "auroc" now') as raised:
        run(tmp_path / "run", metric_for_best_model="auroc", **options)
    assert f"extraction_dir='{tmp_path / 'run' / 'extraction'}'" in str(raised.value)
    monkeypatch.setattr("hf_rtl.training.extraction.Extraction.train_and_prune", None)  # all masks exist
    masks = {"extraction_dir": str(tmp_path / "run" / "extraction")}
    assert run(tmp_path / "other", metric_for_best_model="auroc", **masks, **options).rounds


@pytest.mark.slow
def test_other_calibration_data_make_another_run(tmp_path):
    def calibrated(seed):
        options = {"calibration_dataset": Images(12, seed=seed)}
        return run(tmp_path, options=options, target_sparsity=[0.3])

    calibrated(3)
    calibrated(3)
    with pytest.raises(ValueError, match="calibration_data.features"):
        calibrated(4)


# Figures


def figures(folder):
    return json.loads((folder / "final" / "training_run.json").read_text())["evaluations"]


@pytest.mark.slow
def test_figures_are_of_the_current_evaluation_set(tmp_path):
    first = run(tmp_path).train().metrics
    other = Images(15, seed=7)
    recorded = Recorder()
    made = make_trainer(tmp_path, evaluate=other, callbacks=[recorded])
    second = made.train().metrics
    assert recorded.calls["evaluate"] == 2 and recorded.calls["step_end"] == 0
    assert timeless(second) == timeless(made.evaluate()) != timeless(first)
    (evaluation,) = figures(tmp_path)
    assert evaluation["num_samples"] == dict.fromkeys(("ant", "bee", "cat"), 5)
    assert evaluation["data"]["num_samples"] == 15
    assert evaluation["rounds"][-1]["loss"] == second["eval_loss"]
    reports = [json.loads((tmp_path / name / "round.json").read_text()) for name in ROUNDS]
    assert [report["metrics"]["eval_loss"] for report in reports] == [r["loss"] for r in evaluation["rounds"]]
    assert "eval_loss" not in make_trainer(tmp_path, evaluate={"a": other, "b": Images(12, seed=1)}).train().metrics
    assert [(each["name"], each["data"]["num_samples"]) for each in figures(tmp_path)] == [("a", 15), ("b", 12)]


@pytest.mark.parametrize(
    ("options", "num_evaluations"),
    [
        ({}, 0),  # shown to be equal
        ({"options": {"compute_metrics": lambda prediction: {"x": 1.0}}}, 1),
        ({"evaluate": Images(12, seed=1, noise=0.5)}, 1),
        ({"per_device_eval_batch_size": 5}, 1),
    ],
)
def test_an_evaluation_that_is_not_shown_to_be_equal_is_done_again(finished, tmp_path, options, num_evaluations):
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    recorded = Recorder()
    run(folder, callbacks=[recorded], **options)
    assert recorded.calls["evaluate"] == 2 * num_evaluations
    before = (folder / ROUNDS[0] / "round.json").read_bytes()
    run(folder, **{**options, **({"evaluate": Images(12, seed=1)} if "evaluate" in options else {})})
    changed = (folder / ROUNDS[0] / "round.json").read_bytes() != before
    assert changed == ("evaluate" in options)  # equal figures are not written again


def test_without_evaluation_data_the_figures_in_the_reports_stay(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    made = RTLTrainer(image_model(), make_trainer(folder).args, train_dataset=Images(24, noise=0.1))
    made.train()
    assert (folder / ROUNDS[0] / "round.json").read_bytes() == (
        finished.folder / ROUNDS[0] / "round.json"
    ).read_bytes()
    assert figures(folder) == []


@pytest.mark.slow
def test_what_saving_and_loading_write_makes_no_other_run(tmp_path):
    make_labels_trainer(tmp_path / "run", max_steps=1).train()
    saved = image_model(ticket_task="labels", num_labels=2)
    saved.backbone.save_pretrained(tmp_path / "backbone")
    assert saved.backbone.config.architectures is not None
    saved.save_pretrained(tmp_path / "model")
    for model in (saved, RTLModel.from_pretrained(tmp_path / "model")):
        assert make_labels_trainer(tmp_path / "run", model, max_steps=1).train().global_step == 1
