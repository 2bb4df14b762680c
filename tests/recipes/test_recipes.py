"""The recipes as users run them, on small budgets: each in a process of its own, and again in this one."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from huggingface_hub import ModelCard
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, precision_recall_fscore_support, roc_auc_score
from transformers.trainer_utils import EvalPrediction

from hf_rtl import load_rule
from hf_rtl.model_card.markdown import text


RECIPES = Path(__file__).parents[2] / "recipes"


def run(script: str, *arguments: object, check: bool = True, **variables: str) -> subprocess.CompletedProcess:
    return run_python(str(RECIPES / script), *arguments, check=check, **variables)


def run_python(*arguments: object, check: bool = True, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **variables}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert not check or result.returncode == 0, result.stderr[-3000:]
    return result


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`run_here(script, *arguments)` is the exit status; a new process would import everything first."""

    def run_here(script: str, *arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(RECIPES / script), run_name="__main__")
        return int(ended.value.code or 0)

    return run_here


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the printed output of a small run on the digits, with controls."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    result = run(
        "prune.py",
        *("--config", RECIPES / "configs/digits.yaml", "--sanity", "--output_dir", folder),
        *("--target_sparsity", 0.3, 0.6, "--num_train_epochs", 1, "--extraction_steps", 2),
    )
    return folder, result.stdout


def test_prune_prints_plan_and_table_and_writes_results(digits_run: tuple[Path, str]) -> None:
    folder, printed = digits_run
    results = json.loads((folder / "results.json").read_text())
    assert "370,320 weights" in printed and "30% after 1 prune events; 60% after 2 prune events" in printed
    assert [report["sparsity"] for report in results["rounds"]] == [0.3, 0.6]
    assert {control["method"] for control in results["controls"]} == {
        "random masks",
        "layer-shuffled masks",
        "routes shifted by one",
        "dense one-vs-rest",
    }
    for report in results["rounds"]:
        assert f"{report['metrics']['eval_balanced_accuracy']:.3f}" in printed
        assert set(report["kept"].values()) == {370320 - round(report["sparsity"] * 370320)}
    assert (folder / "curve.png").stat().st_size > 10_000


def test_a_fresh_process_recomputes_every_number(
    digits_run: tuple[Path, str], tmp_path: Path, run_here: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = digits_run
    moved = tmp_path / "results.json"
    moved.write_text((folder / "results.json").read_text())
    models = [*sorted(folder.glob("round-*")), folder / "final"]
    result = run("evaluate.py", *models, "--compare", moved)
    assert "0 of the recorded metrics differ" in result.stdout

    altered = json.loads(moved.read_text())
    altered["rounds"][0]["metrics"]["eval_recall"] += 1e-12
    moved.write_text(json.dumps(altered))
    assert run_here("evaluate.py", *models, "--compare", moved) == 1
    assert "eval_recall" in capsys.readouterr().out


def test_verify_accepts_a_run_and_finds_a_lie(digits_run: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = digits_run
    # One epoch is too short for tickets that fail on the wrong route; the other four checks must hold.
    lines = run("verify.py", folder, check=False).stdout.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["ok"] * 4

    results = json.loads((folder / "results.json").read_text())
    results["rounds"][0]["sparsity"] = 0.31
    results["rounds"][1]["started_from"] = "0" * 64
    lie = tmp_path / "results.json"
    lie.write_text(json.dumps(results))
    lines = run("verify.py", folder, "--results", lie, check=False).stdout.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["FAILED", "ok", "ok", "FAILED"]


def test_an_unknown_key_is_refused_with_the_closest_name(
    tmp_path: Path, run_here: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("target_sparsities: [0.5]\n")
    assert run_here("prune.py", "--config", config) == 2
    assert "did you mean 'target_sparsity'" in capsys.readouterr().err


def test_groups_of_classes_can_be_the_routes(tmp_path: Path) -> None:
    from shared.data_arguments import DataArguments
    from shared.image_data import load_images

    file = tmp_path / "groups.yaml"
    file.write_text("odd: [1, 3, 5, 7, 9]\neven: [0, 2, 4, 6, 8]\n")
    classes = load_images(DataArguments(num_channels=1), seed=0)
    groups = load_images(DataArguments(num_channels=1, route_groups=str(file)), seed=0)
    for by_class, by_group in zip(classes, groups, strict=True):
        assert by_group.label_names == ["odd", "even"]
        digits, routes = ([images[index]["label"] for index in range(len(images))] for images in (by_class, by_group))
        assert routes == [0 if digit % 2 else 1 for digit in digits]


def test_a_run_on_groups_saves_which_class_is_in_which(tmp_path: Path) -> None:
    file, folder = tmp_path / "groups.yaml", tmp_path / "run"
    file.write_text("odd: [1, 3, 5, 7, 9]\neven: [0, 2, 4, 6, 8]\n")
    printed = run(
        "prune.py",
        *("--config", RECIPES / "configs/digits.yaml", "--route_groups", file, "--output_dir", folder),
        *("--target_sparsity", 0.3, "--num_train_epochs", 1, "--extraction_steps", 1),
        *("--max_train_samples", 300, "--max_test_samples", 60),
    ).stdout
    # Without being asked to, since no table says much without a dense model.
    assert [control["method"] for control in json.loads((folder / "results.json").read_text())["controls"]] == [
        "dense one-vs-rest"
    ]
    assert "dense one-vs-rest" in printed
    for model in (*folder.glob("round-*"), folder / "final"):
        rule = load_rule(model)
        assert rule.assign_labels([3, 8, 1, 0]).route_ids.tolist() == [0, 1, 0, 1]
        assert (rule.column, rule.route_names) == ("label", ["odd", "even"])
    result = run("evaluate.py", folder / "final", "--compare", folder / "results.json")
    assert "0 of the recorded metrics differ" in result.stdout


def test_help_lists_what_can_be_set(run_here: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("prune.py", "--help") == 0
    printed = capsys.readouterr().out
    for name in ("--target_sparsity", "--norm_statistics", "--dataset", "--sanity"):
        assert name in printed


@pytest.mark.parametrize("config", sorted(path.name for path in (RECIPES / "configs").glob("*.yaml")))
def test_configurations_name_existing_arguments(config: str) -> None:
    import baselines
    import collapse
    import inr
    import prune
    import speech

    from hf_rtl import RTLTrainingArguments

    # Of another recipe than prune.py, the first line says which.
    of_recipes = {
        "prune": (prune.ModelArguments, prune.DataArguments),
        "baselines": (baselines.ComparisonArguments, baselines.DataArguments),
        "collapse": (collapse.CollapseArguments, collapse.DataArguments),
        "inr": (inr.ComparisonArguments, inr.SceneArguments),
        "speech": (speech.ComparisonArguments, speech.SpeechArguments),
    }
    named = re.search(r"for recipes/(\w+)\.py", (RECIPES / "configs" / config).read_text().splitlines()[0])
    classes = (*of_recipes[named[1] if named else "prune"], RTLTrainingArguments)
    known = {name for cls in classes for name in cls.__dataclass_fields__}
    values = yaml.safe_load((RECIPES / "configs" / config).read_text())
    assert set(values) <= known


# Name -> (type, machines, processes).
LAUNCHES = {
    "cpu.yaml": ("NO", 1, 1),
    "one_gpu.yaml": ("NO", 1, 1),
    "multi_gpu.yaml": ("MULTI_GPU", 1, 2),
    "multi_node.yaml": ("MULTI_GPU", 2, 16),
}


@pytest.mark.parametrize("name", sorted(path.name for path in (RECIPES / "accelerate").iterdir()))
def test_accelerate_reads_its_configurations(name: str) -> None:
    config = load_config_from_file(str(RECIPES / "accelerate" / name))
    kind, machines, processes = LAUNCHES[name]
    assert (config.distributed_type, config.num_machines, config.num_processes) == (kind, machines, processes)
    assert config.use_cpu == (name == "cpu.yaml")
    if machines > 1:
        assert config.main_process_ip and config.main_process_port and config.machine_rank == 0


@pytest.mark.parametrize("card", sorted(path.stem for path in (RECIPES.parent / "model_cards/templates").glob("*.md")))
def test_cards_are_what_their_results_say(card: str) -> None:
    from pages.card import MODEL_CARDS, render

    assert (MODEL_CARDS / f"{card}.md").read_text() == render(card)


def runs_of_cards() -> list[tuple[str, str]]:
    """The names of the cards that show runs, each with those of its runs; benchmarks have `figures` instead."""
    files = sorted((RECIPES.parent / "model_cards").glob("*-results.json"))
    results = {file.name.removesuffix("-results.json"): json.loads(file.read_text()) for file in files}
    return [(name, run) for name, runs in results.items() if "figures" not in runs for run in runs]


@pytest.mark.parametrize(("name", "run_name"), runs_of_cards())
def test_the_kept_model_cards_are_of_the_kept_results(name: str, run_name: str) -> None:
    from pages.card import MODEL_CARDS

    kept = "-".join([name, *run_name.split()])
    card = ModelCard.load(MODEL_CARDS / f"{kept}-model-card.md")
    last = json.loads((MODEL_CARDS / f"{name}-results.json").read_text())[run_name]["rounds"][-1]
    measured = {result.metric_name: result for result in card.data.eval_results if "all" in result.dataset_config}
    labels = "eval_worst_route_accuracy" in last["metrics"]
    words, metric = (
        ("Accuracy, mean over routes", "mean_route_accuracy") if labels else ("AUROC, mean over routes", "auroc")
    )
    assert measured[words].metric_value == last["metrics"][f"eval_{metric}"]
    for index, (route, num_kept) in enumerate(last["kept"].items()):
        of_route = [r.metric_value for r in card.data.eval_results if r.dataset_config == f"route {route}"]
        assert of_route == [value for name, value in last["metrics"].items() if name.startswith(f"eval_{route}/")]
        assert f"\n| {index} | {text(route)} | {num_kept:,} |" in card.text
    assert f"| {last['footprint']['full_bytes']:,} |" in card.text
    for link in (f"{kept}-similarity.png", f"{name}-results.json"):
        assert f"]({link})" in card.text and (MODEL_CARDS / link).exists()


def test_a_run_is_made_into_cards(
    digits_run: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pages import card, render_card

    folder, _ = digits_run
    shutil.copytree(card.MODEL_CARDS / "templates", tmp_path / "templates")
    monkeypatch.setattr(card, "MODEL_CARDS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["card.py", "digits", str(folder)])
    card.main()
    names = {"digits.md", "digits-results.json", "digits-curve.png", "digits-model-card.md", "digits-similarity.png"}
    assert {path.name for path in tmp_path.iterdir()} == {*names, "templates"}
    assert "scikit-learn's digits" in (tmp_path / "digits-model-card.md").read_text()

    monkeypatch.setattr(sys, "argv", ["render_card.py", str(tmp_path / "digits-model-card.md"), str(tmp_path / "x")])
    render_card.main()
    html = (tmp_path / "x").read_text()
    assert html.count("<table>") == html.count("</table>") == 6 and 'src="data:image/png;base64,' in html


def test_tickets_are_compared_over_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import baselines

    from pages import card
    from shared.report import table

    arguments = (
        *("--config", RECIPES / "configs/digits.yaml", "--seeds", 0),
        *("--target_sparsity", 0.5, "--extraction_steps", 1, "--num_train_epochs", 1, "--competing_epochs", 1),
        *("--route_batch_size", 120, "--output_dir", tmp_path / "run"),
    )
    monkeypatch.setattr(sys, "argv", ["baselines.py", *map(str, arguments)])
    baselines.main()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    of = {report["method"]: report for report in results["runs"]["0"]}
    assert list(of) == baselines.METHODS

    assert len({report["costs"]["samples in retraining"] for report in of.values()}) == 1
    extraction = {method: report["costs"]["samples in extraction"] for method, report in of.items()}
    assert extraction["dense"] == extraction["random masks"] == extraction["layer-shuffled masks"] == 0
    assert extraction["IMP single"] == extraction["IMP single, union"] == extraction["one-vs-rest"] == 2 * 120
    assert extraction["shared"] == extraction["competing"] == extraction["IMP multiple"] == 10 * 2 * 120
    trainings = {method: report["costs"]["trainings"] for method, report in of.items()}
    assert (trainings["IMP single"], trainings["per route"], trainings["IMP multiple"]) == (3, 21, 30)
    flops = {method: report["costs"]["kFLOPs an image"] for method, report in of.items()}
    assert flops["per route"] == pytest.approx(10 * flops["dense"], rel=0.01)

    half, union = 370320 // 2, of["per route"]["union"]
    assert of["dense"]["union"] == 370320 and of["one-vs-rest"]["union"] == of["IMP single"]["union"] == half
    assert of["IMP multiple"]["union"] == 10 * half and half < union < 370320
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

    # Nothing is trained twice, and the same comes out.
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
    assert (tmp_path / "cifar10_methods-curves.png").read_bytes() == (tmp_path / "run" / "curves.png").read_bytes()
    assert json.loads((tmp_path / "cifar10_methods-results.json").read_text())["runs"] == results["runs"]


def test_a_network_with_a_logit_per_class_is_scored_by_its_highest() -> None:
    from baselines import of_logits

    logits = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    labels = np.random.default_rng(1).integers(4, size=60)
    metrics = of_logits(EvalPrediction(predictions=logits, label_ids=labels), ["a", "b", "c", "d"])
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
    from baselines import split

    line = {"method": "shared", "sparsity": 0.9, "AUROC": 0.5, "bal. acc.": 0.5, "union": 9, "emptied layers": 2}
    tables = split([{**line, "constant tickets": 3}, {**line, "sparsity": 0.5, "constant tickets": 0}])
    assert set(tables) == {"figures", "decisions", "costs"}
    for lines in tables.values():
        assert [(of["sparsity"], of["emptied layers"], of["constant tickets"]) for of in lines] == [
            (0.5, 2, 0),
            (0.9, 2, 3),
        ]
    assert "union" not in tables["decisions"][0] and "bal. acc." not in tables["costs"][0]


def test_a_card_is_of_one_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pages import card

    monkeypatch.setattr(card, "MODEL_CARDS", tmp_path)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text('{"figures": []}')
    command = ["card.py", "some", str(tmp_path / "one"), str(tmp_path / "two"), "--names", "one", "two"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        card.main()
    assert "give one folder" in capsys.readouterr().err and not (tmp_path / "some-results.json").exists()


def test_tables_are_summarised_over_seeds() -> None:
    from shared.report import over_seeds

    tables = [
        [{"method": "shared", "sparsity": 0.5, "K-way acc.": accuracy, "union": union, "cal. b.a.": None}]
        for accuracy, union in ((0.5, 10), (0.7, 21))
    ]
    # (0.7 - 0.5) / √2, with one degree of freedom.
    summary = {"method": "shared", "sparsity": 0.5, "K-way acc.": "0.600 ± 0.141", "union": 16, "cal. b.a.": None}
    assert over_seeds(tables) == [summary]
    assert over_seeds(tables[:1])[0]["K-way acc."] == "0.500"
    # As a correlation over tickets that are all the same.
    tables[1][0]["K-way acc."] = float("nan")
    assert over_seeds(tables) == [{**summary, "K-way acc.": None}]


@pytest.mark.slow
def test_scaling_compares_one_process_with_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pages import card

    file = tmp_path / "scaling-results.json"
    python_path = os.pathsep.join([str(RECIPES), os.environ.get("PYTHONPATH", "")])
    printed = run_python(
        *("-m", "benchmarks.scaling"),
        *("--dataset", "digits", "--num_channels", 1, "--backbone", "test_resnet", "--route_batch_size", 40),
        *("--turns", 1, "--extraction_steps", 1, "--retraining_steps", 12, "--output", file),
        CUDA_VISIBLE_DEVICES="",
        PYTHONPATH=python_path,
    ).stdout
    results = json.loads(file.read_text())
    assert [entry["processes"] for entry in results["measured"]] == [1, 2]
    assert len({entry["masks"] for entry in results["measured"]}) == 1
    assert all(entry[name] > 0 for entry in results["measured"] for name in ("extraction_seconds", "startup_seconds"))
    extraction = results["figures"][1]
    assert extraction["ratio"] == pytest.approx(extraction["1 process"] / extraction["2 processes"])

    shutil.copytree(card.MODEL_CARDS / "templates", tmp_path / "templates")
    monkeypatch.setattr(card, "MODEL_CARDS", tmp_path)
    rendered = card.render("scaling")
    assert results["masks"] in rendered and results["masks"] in printed
    assert f"{extraction['ratio']:.3f}" in rendered
