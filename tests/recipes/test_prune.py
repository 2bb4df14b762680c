"""`recipes/prune.py` on images, and the modules that read its runs: `evaluate.py`, `verify.py` and the pages."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import evaluate
import pytest

from hf_rtl import load_rule
from pages import card, render_card
from shared import arguments
from shared.data_arguments import DataArguments
from shared.image_data import load_images
from tests.recipes.commands import RECIPES, run
from tests.training.small_runs import SMALL_NET


SMALL = ("--backbone", SMALL_NET, "--image_size", 16)
NUM_WEIGHTS = 72 + 864 + 1296


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`run_here(script, *arguments)` returns the exit status, in this process, which has imported everything."""

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
    groups = folder.with_name("groups.yaml")
    groups.write_text("low: [0, 1, 2, 3]\nmiddle: [4, 5, 6]\nhigh: [7, 8, 9]\n")
    result = run(
        "prune.py",
        *("--config", RECIPES / "configs/digits.yaml", "--sanity", "--output_dir", folder, "--route_groups", groups),
        *("--target_sparsity", 0.3, 0.6, "--num_train_epochs", 1, "--extraction_steps", 2),
        *("--max_train_samples", 120, "--max_test_samples", 60, *SMALL),
    )
    return folder, result.stdout


@pytest.mark.slow
def test_prune_prints_plan_and_table_and_writes_results(digits_run: tuple[Path, str]) -> None:
    folder, printed = digits_run
    results = json.loads((folder / "results.json").read_text())
    assert f"{NUM_WEIGHTS:,} weights" in printed and "30% after 1 prune events; 60% after 2 prune events" in printed
    assert [report["sparsity"] for report in results["rounds"]] == [0.3, 0.6]
    assert {control["method"] for control in results["controls"]} == {
        "random masks",
        "layer-shuffled masks",
        "routes shifted by one",
        "dense one-vs-rest",
    }
    for report in results["rounds"]:
        assert f"{report['metrics']['eval_balanced_accuracy']:.3f}" in printed
        assert set(report["kept"].values()) == {NUM_WEIGHTS - round(report["sparsity"] * NUM_WEIGHTS)}
    assert (folder / "curve.png").stat().st_size > 10_000
    assert "At 60% sparsity the tickets reach a mean balanced accuracy" in (folder / "report.html").read_text()


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_a_configuration_that_cannot_be_read_is_one_line(
    tmp_path: Path, run_here: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1\nb: 2\n")
    for config, reason in ((tmp_path / "nope.yaml", "No such file"), (broken, "expected ',' or ']'")):
        assert run_here("prune.py", "--config", config) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"prune.py: error: --config {config} cannot be read: " in line and reason in line


@pytest.mark.parametrize("said", ["the run in 'd' was stopped: run the same command again", ""])
def test_a_stopped_recipe_is_one_line(said: str, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped() -> None:
        raise KeyboardInterrupt(*[said] if said else [])

    with pytest.raises(SystemExit) as ended:
        arguments.run_main(stopped)
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 130 and line.startswith(said) and "the same command again" in line


def test_recipes_that_train_can_be_stopped() -> None:
    trains = [file for file in RECIPES.glob("*.py") if "set_up(" in file.read_text() and file.stem != "group_classes"]
    assert len(trains) == 8 and all(file.read_text().endswith("    run_main(main)\n") for file in trains)


def test_the_data_of_a_model_without_a_run_must_be_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no model of a run of prune.py.*--dataset FOLDER --route_column NAME"):
        evaluate.evaluate(tmp_path / "model")


@pytest.mark.slow
def test_groups_of_classes_can_be_the_routes(tmp_path: Path) -> None:
    file = tmp_path / "groups.yaml"
    file.write_text("odd: [1, 3, 5, 7, 9]\neven: [0, 2, 4, 6, 8]\n")
    classes = load_images(DataArguments(num_channels=1), seed=0)
    groups = load_images(DataArguments(num_channels=1, route_groups=str(file)), seed=0)
    for by_class, by_group in zip(classes, groups, strict=True):
        assert by_group.label_names == ["odd", "even"]
        digits, routes = ([images[index]["label"] for index in range(len(images))] for images in (by_class, by_group))
        assert routes == [0 if digit % 2 else 1 for digit in digits]


@pytest.mark.slow
def test_a_run_on_groups_saves_which_class_is_in_which(tmp_path: Path) -> None:
    file, folder = tmp_path / "groups.yaml", tmp_path / "run"
    file.write_text("odd: [1, 3, 5, 7, 9]\neven: [0, 2, 4, 6, 8]\n")
    printed = run(
        "prune.py",
        *("--config", RECIPES / "configs/digits.yaml", "--route_groups", file, "--output_dir", folder),
        *("--target_sparsity", 0.3, "--num_train_epochs", 1, "--extraction_steps", 1),
        *("--max_train_samples", 120, "--max_test_samples", 60, *SMALL),
    ).stdout
    # By default a dense model is trained too, since tickets must be compared with one.
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
    assert "\n    python recipes/prune.py --config recipes/configs/digits.yaml" in printed


@pytest.mark.slow
def test_a_run_is_made_into_cards(
    digits_run: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
