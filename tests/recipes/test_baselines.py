"""`recipes/baselines.py`: all methods on a small run, the scores of a plain network, and the tables."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import baselines
import numpy as np
import pytest
from baselines import logit_metrics, split
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, precision_recall_fscore_support, roc_auc_score
from transformers.trainer_utils import EvalPrediction

from hf_rtl import RTLTrainer
from pages import card
from shared.report import table
from tests.recipes.commands import RECIPES
from tests.training.small_runs import SMALL_NET


NUM_WEIGHTS = 72 + 864 + 1296  # of the small network, for one channel


@pytest.mark.slow
def test_tickets_are_compared_over_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = tmp_path / "groups.yaml"
    groups.write_text("low: [0, 1, 2, 3]\nmiddle: [4, 5, 6]\nhigh: [7, 8, 9]\n")
    arguments = (
        *("--config", RECIPES / "configs/digits.yaml", "--seeds", 0, "--route_groups", groups),
        *("--backbone", SMALL_NET, "--image_size", 32),
        *("--target_sparsity", 0.5, "--extraction_steps", 1, "--num_train_epochs", 1, "--competing_epochs", 1),
        *("--route_batch_size", 24, "--max_train_samples", 120, "--max_test_samples", 60),
        *("--output_dir", tmp_path / "run"),
    )
    monkeypatch.setattr(sys, "argv", ["baselines.py", *map(str, arguments)])
    monkeypatch.setattr(RTLTrainer, "create_model_card", lambda trainer: None)
    baselines.main()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    of = {report["method"]: report for report in results["runs"]["0"]}
    assert list(of) == baselines.METHODS

    assert len({report["costs"]["samples in retraining"] for report in of.values()}) == 1
    extraction = {method: report["costs"]["samples in extraction"] for method, report in of.items()}
    assert extraction["dense"] == extraction["random masks"] == extraction["layer-shuffled masks"] == 0
    assert extraction["IMP single"] == extraction["IMP single, union"] == extraction["one-vs-rest"] == 2 * 24
    assert extraction["shared"] == extraction["competing"] == extraction["IMP multiple"] == 3 * 2 * 24
    trainings = {method: report["costs"]["trainings"] for method, report in of.items()}
    assert (trainings["IMP single"], trainings["per route"], trainings["IMP multiple"]) == (3, 7, 9)
    flops = {method: report["costs"]["kFLOPs an image"] for method, report in of.items()}
    assert flops["per route"] == pytest.approx(3 * flops["dense"], rel=0.01)

    half, union = NUM_WEIGHTS // 2, of["per route"]["union"]
    assert of["dense"]["union"] == NUM_WEIGHTS and of["one-vs-rest"]["union"] == of["IMP single"]["union"] == half
    assert of["IMP multiple"]["union"] == 3 * half and half < union < NUM_WEIGHTS
    assert of["IMP single, union"]["union"] == pytest.approx(union, abs=1)
    assert (
        of["shared"]["mask_fingerprint"] == of["competing"]["mask_fingerprint"] == of["per route"]["mask_fingerprint"]
    )
    assert of["random masks"]["mask_fingerprint"] != of["per route"]["mask_fingerprint"]
    timed = ("runtime", "per_second")
    measured = [
        {name: value for name, value in report["metrics"].items() if not name.endswith(timed)}
        for report in of.values()
    ]
    assert len(set(map(json.dumps, measured))) == len(of)
    runs = {
        method: json.loads((tmp_path / "run/seed-0" / method / "run.json").read_text())["configuration"]
        for method in ("shared", "per-route", "competing")
    }
    assert [run["model"]["norm_statistics"] for run in runs.values()] == ["shared", "per_route", "per_route"]
    assert [run["competing_epochs"] for run in runs.values()] == [0, 0, 1]

    assert Image.open(tmp_path / "run" / "curves.png").size[0] > 500
    printed = capsys.readouterr().out
    lines = {line["method"]: line for line in results["figures"]}
    assert lines["competing"]["router: K-way acc."] == f"{of['competing']['metrics']['eval_route_accuracy']:.3f}"
    assert all(line["K-way acc."] in printed for line in lines.values())
    assert all(line["bal. acc."] in printed for line in results["decisions"])
    assert results["costs"][-1]["bytes"] == of["competing"]["footprint"]["total_bytes"]

    # Repeated, the command trains nothing and gives the same results.
    files = {file: file.stat().st_mtime_ns for file in tmp_path.glob("run/seed-0/*/round-*/model.safetensors")}
    files |= {file: file.stat().st_mtime_ns for file in tmp_path.glob("run/seed-0/*/sparsity-*.json")}
    baselines.main()
    assert files == {file: file.stat().st_mtime_ns for file in files} and len(files) == 8
    assert json.loads((tmp_path / "run" / "results.json").read_text())["runs"] == results["runs"]

    shutil.copytree(card.MODEL_CARDS / "templates", tmp_path / "templates")
    monkeypatch.setattr(card, "MODEL_CARDS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["card.py", "cifar10_methods", str(tmp_path / "run")])
    card.main()
    rendered = (tmp_path / "cifar10_methods.md").read_text()
    for name in ("figures", "decisions", "costs"):
        assert table(results[name], style="github") in rendered
    pictures = [
        Image.open(file) for file in (tmp_path / "cifar10_methods-curves.png", tmp_path / "run" / "curves.png")
    ]
    assert pictures[0].size == pictures[1].size
    kept = json.loads((tmp_path / "cifar10_methods-results.json").read_text())["runs"]
    assert kept == {"0": list(map(card.kept_report, results["runs"]["0"]))}


def test_a_network_with_a_logit_per_class_is_scored_by_its_highest() -> None:
    logits = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    labels = np.random.default_rng(1).integers(4, size=60)
    metrics = logit_metrics(EvalPrediction(predictions=logits, label_ids=labels), ["a", "b", "c", "d"])
    predicted = logits.argmax(axis=1)
    assert metrics["accuracy"] == np.mean(predicted == labels)
    precision, recall, f1, _ = precision_recall_fscore_support(labels, predicted)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for label, name in enumerate("abcd"):
        assert metrics[f"{name}/precision"] == pytest.approx(precision[label])
        assert metrics[f"{name}/recall"] == pytest.approx(recall[label])
        assert metrics[f"{name}/f1"] == pytest.approx(f1[label])
        balanced = balanced_accuracy_score(labels == label, predicted == label)
        assert metrics[f"{name}/balanced_accuracy"] == pytest.approx(balanced)
        assert metrics[f"{name}/auroc"] == pytest.approx(roc_auc_score(labels == label, probabilities[:, label]))
    assert metrics["worst_balanced_accuracy"] == min(metrics[f"{name}/balanced_accuracy"] for name in "abcd")


def test_all_tables_say_what_pruning_has_cut() -> None:
    line = {"method": "shared", "sparsity": 0.9, "AUROC": 0.5, "bal. acc.": 0.5, "union": 9, "emptied layers": 2}
    tables = split([{**line, "constant tickets": 3}, {**line, "sparsity": 0.5, "constant tickets": 0}])
    assert set(tables) == {"figures", "decisions", "costs"}
    for lines in tables.values():
        assert [(of["sparsity"], of["emptied layers"], of["constant tickets"]) for of in lines] == [
            (0.5, 2, 0),
            (0.9, 2, 3),
        ]
    assert "union" not in tables["decisions"][0] and "bal. acc." not in tables["costs"][0]
