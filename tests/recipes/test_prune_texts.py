"""`recipes/prune.py` on texts, and the modules that read its runs: a tiny encoder and a few dozen sentences."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import prune
import pytest
import torch
import verify
from evaluate import compare, evaluate
from safetensors.torch import load_file

from hf_rtl import RTLModelForSequenceClassification
from pages import card
from shared.data_arguments import DataArguments
from shared.inputs import make_inputs
from shared.rows import load_rows
from tests.recipes.small_texts import DOMAINS, WORDS, make_tokenizer, save_data, sentences


def arguments(folder: str, **values: object) -> DataArguments:
    return DataArguments(
        **{
            "dataset": folder,
            "input_column": "text",
            "label_column": "sentiment",
            "class_bounds": [-1.5, 1.5],
            "class_names": ["negative", "neutral", "positive"],
            **values,
        }
    )


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def load(tokenizer_folder: str) -> Callable[..., tuple[datasets.Dataset, datasets.Dataset]]:
    """`load(arguments, route_column)` gives the training and the test texts as tokens."""

    def load(data: DataArguments, route_column: str | None = "domain") -> tuple[datasets.Dataset, datasets.Dataset]:
        inputs = make_inputs(load_rows(data, route_column=route_column, seed=0), data, tokenizer_folder)
        return inputs.train, inputs.test

    return load


def test_texts_become_tokens_classes_and_routes(load: Callable, tmp_path: Path) -> None:
    given = sentences(30, 0)
    folder = save_data(tmp_path / "data", given, sentences(12, 1))
    train, test = load(arguments(folder, max_length=4))
    assert (len(train), len(test)) == (30, 12)
    assert train.features["domain"].names == test.features["domain"].names == ["film", "gear"]
    for row, text in zip(train, given, strict=True):
        opinion, thing, *_ = text["text"].split()
        assert row["input_ids"] == [2, 4 + WORDS.index(opinion), 4 + WORDS.index(thing), 3]  # the third word is cut
        expected = "negative" if text["sentiment"] < -1.5 else "positive" if text["sentiment"] >= 1.5 else "neutral"
        assert train.features["label"].int2str(row["label"]) == expected
        assert train.features["domain"].int2str(row["domain"]) == text["domain"]


def test_labels_without_bounds_are_classes(load: Callable, tmp_path: Path) -> None:
    train = sentences(6, 0, label=["yes", "no", "no"] * 2)
    # The test data lack a class, but still have the ids of the training data.
    folder = save_data(tmp_path / "data", train, sentences(3, 1, label=["yes"] * 3))
    loaded, test = load(arguments(folder, label_column="label", class_bounds=[], class_names=[]))
    assert loaded.features["label"].names == test.features["label"].names == ["no", "yes"]
    assert loaded["label"][:3] == [1, 0, 0] and test["label"][:] == [1, 1, 1]


def test_a_part_of_the_training_data_has_equally_many_samples_of_each_route(load: Callable, tmp_path: Path) -> None:
    folder = save_data(tmp_path / "data", sentences(60, 0), sentences(60, 1))
    train, test = load(arguments(folder, max_train_samples=20, max_test_samples=30))
    assert np.bincount(train["domain"]).tolist() == [10, 10]
    assert len(test) == 30 and 0 < sum(test["domain"]) < 15


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"text": [*["good film"] * 5, " "]}}, "column 'text' has ' ' at sample 5"),
        ({"test": {"text": [None, *["good film"] * 5]}}, "column 'text' has None at sample 0"),
        ({"test": {"domain": [*["film"] * 5, "food"]}}, "'domain' of the test data has 'food'.*'film', 'gear'"),
        ({"train": {"sentiment": [*[1.0] * 5, float("nan")]}}, "column 'sentiment' must have finite numbers"),
        ({"train": {"sentiment": ["1"] * 6}}, "column 'sentiment' must have finite numbers"),
        ({"arguments": {"input_column": "words"}}, "no column 'words'.*--input_column"),
        ({"arguments": {"label_column": "stars"}}, "no column 'stars'.*--label_column"),
        ({"arguments": {"class_names": ["low", "high"]}}, "need 3 --class_names"),
        ({"arguments": {"class_bounds": [1.5, -1.5]}}, "must ascend"),
        ({"route": "topic"}, "no column 'topic'.*--route_column"),
    ],
)
def test_bad_data_are_refused_by_name(load: Callable, tmp_path: Path, change: dict, message: str) -> None:
    train, test = (
        {**sentences(6, seed).to_dict(), **change.get(name, {})} for seed, name in enumerate(["train", "test"])
    )
    folder = save_data(tmp_path / "data", datasets.Dataset.from_dict(train), datasets.Dataset.from_dict(test))
    with pytest.raises(ValueError, match=message):
        load(arguments(folder, **change.get("arguments", {})), change.get("route", "domain"))


def prune_texts(encoder: str, folder: Path, *arguments: object) -> Path:
    """The folder of a small run with the configuration of the sentiment domains."""
    data = save_data(folder / "data", sentences(120, 0), sentences(30, 1))
    config = Path(prune.__file__).parent / "configs" / "sentiment.yaml"
    command = ["prune.py", "--config", config, "--dataset", data, "--backbone", encoder]
    command += ["--output_dir", folder / "run"]
    command += ["--class_bounds", "-1.5", "1.5", "--max_train_samples", 80, "--max_test_samples", 24]
    command += ["--route_batch_size", 8, "--extraction_steps", 2, "--learning_rate", 0.01]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", list(map(str, [*command, *arguments])))
        prune.main()
    return folder / "run"


@pytest.fixture(scope="module")
def text_run(encoder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run with baselines."""
    return prune_texts(encoder, tmp_path_factory.mktemp("text"))


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "others"), [((), ["dense"]), (("--no_dense",), [])])
def test_a_text_run_has_a_dense_model_unless_refused(
    encoder: str, tmp_path: Path, arguments: tuple[str, ...], others: list[str]
) -> None:
    run = prune_texts(encoder, tmp_path, "--sanity", False, "--target_sparsity", 0.5, *arguments)
    results = json.loads((run / "results.json").read_text())
    assert [line["method"] for line in results["table"]] == ["RTL", *others]
    assert [control["sparsity"] for control in results["controls"]] == [0.0] * len(others)
    assert len({report["steps"] for report in [*results["rounds"], *results["controls"]]}) == 1
    metrics, line = results["rounds"][0]["metrics"], results["table"][0]
    by_route = [metrics[f"eval_{name}/union_accuracy"] for name in DOMAINS]
    assert (line["union acc."], line["union worst"]) == (metrics["eval_union_accuracy"], min(by_route))


@pytest.mark.slow
def test_a_text_run_compares_tickets_with_a_single_mask_and_a_dense_model(text_run: Path) -> None:
    results = json.loads((text_run / "results.json").read_text())
    methods = [(line["method"], line["sparsity"]) for line in results["table"]]
    assert methods == [
        ("RTL", 0.5),
        ("RTL", 0.75),
        ("RTL, router score", 0.75),
        ("dense", 0.0),
        ("single mask", 0.5),
        ("single mask", 0.75),
    ]
    # Training has 72 of 80 samples, 36 of each domain: 5 batches of 8 each.
    assert {report["steps"] for report in [*results["rounds"], *results["controls"]]} == {10}
    total = results["controls"][1]["union"]
    for line, report in zip(results["table"], [*results["rounds"], *results["controls"]], strict=True):
        kept = total - round(report["sparsity"] * total)
        assert set(report["kept"].values()) == {kept}
        assert line["accuracy"] == report["metrics"]["eval_accuracy"]
        assert line["worst route"] == min(report["metrics"][f"eval_{name}/accuracy"] for name in DOMAINS)
    assert results["table"][0]["inferred acc."] == results["rounds"][0]["metrics"]["eval_inferred_accuracy"]
    assert "inferred acc." not in results["table"][-1]
    lines = [(line["method"], line["film"]) for line in results["routes"] if line["sparsity"] == 0.5]
    assert lines == [
        ("RTL", results["rounds"][0]["metrics"]["eval_film/accuracy"]),
        ("RTL, inferred", results["rounds"][0]["metrics"]["eval_film/inferred_accuracy"]),
        ("single mask", results["controls"][2]["metrics"]["eval_film/accuracy"]),
    ]


@pytest.mark.slow
def test_the_single_mask_starts_from_the_same_weights_and_is_measured_by_domain(
    load: Callable, text_run: Path
) -> None:
    first, second = (load_file(folder / "theta0.safetensors") for folder in (text_run, text_run / "single-mask"))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())

    results = json.loads((text_run / "results.json").read_text())
    data, _ = DataArguments.load(text_run)
    _, test = load(data)
    model = RTLModelForSequenceClassification.from_pretrained(text_run / "single-mask" / "final")
    correct: dict[int, list[bool]] = {0: [], 1: []}
    for row in test:
        logits = model(input_ids=torch.tensor([row["input_ids"]]), route_ids=0).logits
        correct[row["domain"]].append(int(logits.argmax()) == row["label"])
    for route, name in enumerate(test.features["domain"].names):
        assert results["controls"][-1]["metrics"][f"eval_{name}/accuracy"] == pytest.approx(np.mean(correct[route]))


@pytest.mark.slow
def test_a_fresh_load_recomputes_every_number(text_run: Path) -> None:
    results = json.loads((text_run / "results.json").read_text())
    evaluated = {folder.name: evaluate(folder) for folder in (*text_run.glob("round-*"), text_run / "final")}
    assert len(evaluated) == 3 and compare(evaluated, results) == []


@pytest.mark.slow
def test_verify_skips_the_check_of_wrong_routes(
    text_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["verify.py", str(text_run)])
    with pytest.raises(SystemExit) as ended:
        verify.main()
    assert ended.value.code == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["ok"] * 4


@pytest.mark.slow
def test_runs_of_several_seeds_become_a_card_of_means(
    text_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    shutil.copytree(text_run, other)
    results = json.loads((other / "results.json").read_text())
    results["training"]["seed"] = 1
    first, route = results["table"][0]["accuracy"], results["routes"][0]["gear"]
    results["table"][0].update(accuracy=first + 0.25, union=results["table"][0]["union"] + 2)
    results["routes"][0]["gear"] = route - 0.125
    (other / "results.json").write_text(json.dumps(results))

    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "text.md").write_text("seeds {seed}\n{table}\n{per_route}\n{masks}\n")
    monkeypatch.setattr(card, "MODEL_CARDS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["card.py", "text", str(text_run), str(other), "--names", "seed 0", "seed 1"])
    card.main()
    lines = (tmp_path / "text.md").read_text().splitlines()
    assert lines[0] == "seeds 0, 1"
    overall, by_route = (line for line in lines if re.match(r"\| RTL +\| 50%", line))
    # The sample standard deviation of two values is their difference over √2.
    assert f"| {first + 0.125:.3f} ± {0.25 / 2**0.5:.3f} " in overall
    assert f"| {results['table'][0]['union'] - 1:,} " in overall
    assert f"| {route - 0.0625:.3f} ± {0.125 / 2**0.5:.3f} " in by_route
    assert sum("| dense " in line for line in lines) == 2
    kept = {path.name for path in tmp_path.glob("text-*")}
    assert {"text-results.json", "text-seed-0-model-card.md", "text-seed-1-curve.png"} <= kept
