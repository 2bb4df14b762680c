"""`recipes/pages/card.py`: the cards of the repository are made of the results beside them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_rtl.model_card.markdown import text
from pages import card
from pages.card import MODEL_CARDS, render


@pytest.mark.parametrize("name", sorted(path.stem for path in (MODEL_CARDS / "templates").glob("*.md")))
def test_cards_follow_from_their_results(name: str) -> None:
    assert (MODEL_CARDS / f"{name}.md").read_text() == render(name)


def runs_of_cards() -> list[tuple[str, str]]:
    """(name of a card, name of its run) for all runs of prune.py; other cards have figures or sentences."""
    files = sorted(MODEL_CARDS.glob("*-results.json"))
    results = {file.name.removesuffix("-results.json"): json.loads(file.read_text()) for file in files}
    return [
        (name, run) for name, runs in results.items() if "figures" not in runs for run in runs if "rounds" in runs[run]
    ]


@pytest.mark.parametrize(("name", "run_name"), runs_of_cards())
def test_the_kept_model_cards_follow_from_the_kept_results(name: str, run_name: str) -> None:
    kept = "-".join([name, *run_name.split()])
    model_card = ModelCard.load(MODEL_CARDS / f"{kept}-model-card.md")
    last = json.loads((MODEL_CARDS / f"{name}-results.json").read_text())[run_name]["rounds"][-1]
    found = model_card.data.eval_results
    measured = {result.metric_name: result for result in found if "all" in result.dataset_config}
    labels = "eval_worst_route_accuracy" in last["metrics"]
    words, metric = (
        ("Accuracy, mean over routes", "mean_route_accuracy") if labels else ("AUROC, mean over routes", "auroc")
    )
    assert measured[words].metric_value == last["metrics"][f"eval_{metric}"]
    for index, (route, num_kept) in enumerate(last["kept"].items()):
        (row,) = re.findall(rf"(?m)^\| {index} \| {re.escape(text(route))} \| {num_kept:,} \| .*$", model_card.text)
        measured_metric = "accuracy" if labels else "auroc"
        assert f"| {last['metrics'][f'eval_{route}/{measured_metric}']:.3f} |" in row
    assert f"| {last['footprint']['full_bytes']:,} |" in model_card.text
    for link in (f"{kept}-similarity.png", f"{name}-results.json"):
        assert f"]({link})" in model_card.text and (MODEL_CARDS / link).exists()


def test_a_card_is_of_one_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(card, "MODEL_CARDS", tmp_path)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text('{"figures": []}')
    command = ["card.py", "some", str(tmp_path / "one"), str(tmp_path / "two"), "--names", "one", "two"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        card.main()
    assert "give one folder" in capsys.readouterr().err and not (tmp_path / "some-results.json").exists()


def test_verdicts_of_several_comparisons_make_one_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "MODEL_CARDS", tmp_path)
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "some.md").write_text("{one[command]}: {one[methods]}\n{two[sentences]}\n")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        results = {"command": f"make {name}", "methods": [{"method": "dense", "accuracy": "0.5"}]}
        results |= {"sentences": [f"{name} is ahead.", "It is behind."], "figures": [{"seed": 0}]}
        (tmp_path / name / "results.json").write_text(json.dumps(results))
    command = ["card.py", "some", str(tmp_path / "one"), str(tmp_path / "two"), "--names", "one", "two"]
    monkeypatch.setattr(sys, "argv", command)
    card.main()
    text = (tmp_path / "some.md").read_text()
    assert text.startswith("make one: | method") and text.endswith("\n- two is ahead.\n- It is behind.\n")
    assert set(json.loads((tmp_path / "some-results.json").read_text())["one"]) == {"command", "methods", "sentences"}


def test_what_is_kept_beside_cards_is_small() -> None:
    large = {file.name: file.stat().st_size for file in MODEL_CARDS.iterdir() if file.is_file()}
    assert {name: size for name, size in large.items() if size > 200_000} == {}


def test_of_a_comparison_the_card_keeps_what_tables_and_pictures_need(tmp_path: Path) -> None:
    metrics = {"eval_auroc": 0.123456, "eval_a {\n [0]/auroc": 0.5}
    report = {"method": "tickets {1}\n  [2]", "at": 0.5, "files": {"config.json": "0" * 64}, "metrics": metrics}
    comparison = {"figures": [{"method": "tickets", "n": 1}], "runs": {"0": [report]}, "none": []}
    card.write_kept(tmp_path / "some-results.json", comparison)
    text = (tmp_path / "some-results.json").read_text()
    kept = {"method": "tickets {1}\n  [2]", "at": 0.5, "metrics": {"eval_auroc": 0.1235}}
    assert json.loads(text) == {**comparison, "runs": {"0": [kept]}}
    assert '{ "method": "tickets", "n": 1 }' in text
    assert report["metrics"] == metrics  # the report itself stays
