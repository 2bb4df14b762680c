"""`recipes/prune.py --one_pass` on small files: tickets of a trained dense network, found without training."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_rtl import RTLModel, RTLModelForCausalLM, RTLModelForSequenceClassification, RTLTrainer, find_tickets
from hf_rtl_cli.main import main as hf_rtl
from shared import one_pass_run, run_page
from tests.recipes.small_files import save_backbone, save_images, save_jsonl
from tests.recipes.small_texts import DOMAINS, WORDS, save_data, sentences
from tests.recipes.test_any_data_runs import (
    CELLS,
    IMAGES,
    SHORT,
    assert_evaluates_to_the_same,
    assert_refused,
    command,
    figures,
    start,
)


ROUNDS = ["round-01-sparsity-0.3", "round-02-sparsity-0.6"]
FOUND: dict[str, Any] = {
    "route_column": "domain",
    "label_column": "sentiment",
    "class_bounds": 0,
    "class_names": ["bad", "good"],
    "target_sparsity": [0.3, 0.6],
    "prune_round_to": 4,
    "prune_exclude": "*pooler*",
    # More than there are, so that the choice of samples decides nothing.
    "calibration_samples": 64,
}


@pytest.fixture(scope="module", autouse=True)
def _short_timing() -> Iterator[None]:
    """The page of a run measures times for two seconds."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run_page, "_SECONDS", 0.0)
        yield


def command_of(dataset: object, output_dir: Path, **values: Any) -> list[str]:
    return [*command({"dataset": dataset, "output_dir": output_dir, **SHORT, **values}), "--one_pass"]


def run(dataset: object, output_dir: Path, *flags: str, **values: Any) -> dict[str, Any]:
    """The results of a run with --one_pass."""
    assert start("prune.py", *command_of(dataset, output_dir, **values), *flags) == 0
    return json.loads((output_dir / "results.json").read_text())


@pytest.fixture(scope="module")
def texts(encoder: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, dict[str, Any]]:
    """The folder of texts by domain, that of a run, and its results."""
    folder = tmp_path_factory.mktemp("texts")
    data = save_data(folder / "data", sentences(48, 0), sentences(24, 1))
    return data, folder / "run", run(data, folder / "run", backbone=encoder, **FOUND)


def found_in(run: Path, data: str, sparsity: float, **options: Any) -> RTLModel:
    """The tickets that the dense network of a run has, of all training samples, one by one."""
    dense = RTLModelForSequenceClassification.from_pretrained(run / "dense/final")
    network, tokenizer = dense.extract_ticket(0), AutoTokenizer.from_pretrained(run / "final")
    rows = Dataset.from_parquet(f"{data}/train.parquet")
    samples = Dataset.from_dict({**tokenizer(rows["text"][:]), "domain": rows["domain"][:]})
    given = {"route_names": list(DOMAINS), "ticket_task": "labels", "prune_exclude": ["*pooler*"]}
    return find_tickets(
        network,
        samples,
        sparsity=sparsity,
        route_column="domain",
        batch_size=1,
        num_batches=64,
        round_to=4,
        processing_class=tokenizer,
        **given,
        **options,
    )


def assert_same_masks(model: RTLModel, other: RTLModel) -> None:
    assert model.route_names == other.route_names
    for name in model.route_names:
        assert all(map(torch.equal, model.mask_bank[name], other.mask_bank[name]))


@pytest.mark.slow
def test_a_run_in_one_pass_ends_as_a_run_of_rounds(
    texts: tuple[str, Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, output_dir, results = texts
    written = {file.name for file in output_dir.iterdir()}
    assert {"report.html", "curve.png", "data.json", "dense", "final", *ROUNDS} <= written
    assert [line["method"] for line in results["table"]] == ["RTL", "RTL", "dense"]
    assert [line["units kept"] for line in results["table"]] == [16 / 24, 8 / 24, None]
    assert all({*DOMAINS, "method"} <= line.keys() for line in results["routes"])
    page = (output_dir / "report.html").read_text()
    assert "in one pass over 64 samples of a route and a refit" in page and "not retrained" in page
    assert "found in one pass over at most" in (output_dir / "final/README.md").read_text()
    assert_evaluates_to_the_same(output_dir)
    folders = [output_dir / name for name in ROUNDS]
    assert start("evaluate.py", *folders, "--compare", output_dir / "results.json") == 0
    capsys.readouterr()
    (tmp_path / "text.txt").write_text("good film")
    assert hf_rtl(["predict", str(output_dir / "final"), str(tmp_path / "text.txt"), "--route", "film", "--json"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)
    assert answer["route"] == "film"


@pytest.mark.slow
def test_units_are_those_that_do_most_in_the_dense_network(texts: tuple[str, Path, dict[str, Any]]) -> None:
    data, output_dir, results = texts
    # The layer has 24 neurons; what is asked is rounded to a multiple of 4.
    for report, kept in zip(results["rounds"], (16, 8), strict=True):
        assert report["units"]["kept"] == dict.fromkeys(DOMAINS, kept) and report["steps"] == 0
    expected = found_in(output_dir, data, 0.6, refit=True)
    model = RTLModelForSequenceClassification.from_pretrained(output_dir / "final")
    assert_same_masks(model, expected)
    for rows, own in zip(model.private_parameters.rows, expected.private_parameters.rows, strict=True):
        torch.testing.assert_close(rows, own, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_what_is_there_is_not_made_again(
    texts: tuple[str, Path, dict[str, Any]], encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, _, results = texts
    saved, searched, original = [], [], find_tickets

    def stopping(*arguments: Any, **keywords: Any) -> Any:
        if saved.append(None) or len(saved) == 2:
            raise KeyboardInterrupt
        return saved_round(*arguments, **keywords)

    def counting(*arguments: Any, **keywords: Any) -> Any:
        searched.append(keywords["sparsity"])
        return original(*arguments, **keywords)

    saved_round = one_pass_run.saved_round
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(one_pass_run, "saved_round", stopping)
        assert start("prune.py", *command_of(data, tmp_path / "run", backbone=encoder, **FOUND)) == 130
    assert "again" in capsys.readouterr().err and not (tmp_path / "run/results.json").exists()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(RTLTrainer, "training_step", lambda *_: pytest.fail("it trains again"))
        patched.setattr(one_pass_run, "find_tickets", counting)
        assert figures(run(data, tmp_path / "run", backbone=encoder, **FOUND)) == figures(results)
    assert searched == [0.6]


@pytest.mark.slow
def test_tickets_are_retrained_from_the_trained_weights(
    texts: tuple[str, Path, dict[str, Any]], encoder: str, tmp_path: Path
) -> None:
    data = texts[0]
    values = {**FOUND, "backbone": encoder, "target_sparsity": 0.5, "route_batch_size": 1}
    results = run(data, tmp_path / "run", "--retrain_tickets", **values)
    model = RTLModelForSequenceClassification.from_pretrained(tmp_path / "run/final")
    assert_same_masks(model, found_in(tmp_path / "run", data, 0.5))
    dense = RTLModelForSequenceClassification.from_pretrained(tmp_path / "run/dense/final").backbone.state_dict()
    theta0 = load_file(tmp_path / "run/theta0.safetensors")
    assert all(torch.equal(tensor, theta0[name]) for name, tensor in dense.items())
    weights, unions = dict(model.backbone.named_parameters()), model.mask_bank.union()
    for name, union in zip(model.mask_bank.weight_names, unions, strict=True):
        moved = weights[name] != dense[name]
        assert moved.any() and not (moved & ~union).any()
    assert results["rounds"][0]["steps"] == SHORT["max_steps"]
    assert_evaluates_to_the_same(tmp_path / "run")


@pytest.mark.slow
def test_a_trained_language_model_is_taken_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    samples = [{"text": " ".join(generator.choice(WORDS, 5)), "site": "ab"[index % 2]} for index in range(40)]
    file, backbone = save_jsonl(tmp_path / "a.jsonl", samples), save_backbone("causal", tmp_path / "gpt")
    values = {"route_column": "site", "task": "causal", "max_length": 8, "num_train_epochs": 0, "max_steps": -1}
    results = run(file, tmp_path / "run", "--no_refit", backbone=backbone, **values)
    trained = AutoModelForCausalLM.from_pretrained(backbone).state_dict()
    model = RTLModelForCausalLM.from_pretrained(tmp_path / "run/final")
    assert all(torch.equal(tensor, trained[name]) for name, tensor in model.backbone.state_dict().items())
    (found,) = results["rounds"]
    # The layer has 64 neurons.
    assert found["units"]["kept"] == {"a": 32, "b": 32}
    assert_evaluates_to_the_same(tmp_path / "run")

    values |= {"backbone": save_backbone("masked", tmp_path / "bert")}
    status = start("prune.py", *command_of(file, tmp_path / "other", **values))
    assert_refused(capsys, status, tmp_path / "other", "it is no trained BertLMHeadModel")


@pytest.mark.slow
def test_the_decoder_of_a_seq2seq_model_reads_what_is_written(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    words = [[str(word) for word in generator.choice(WORDS, 5)] for _ in range(20)]
    rows = [{"text": " ".join(of), "answer": of[0], "site": "ab"[index % 2]} for index, of in enumerate(words)]
    values = {"route_column": "site", "task": "seq2seq", "target_column": "answer", "max_length": 8, "max_steps": 1}
    backbone = save_backbone("seq2seq", tmp_path / "t5")
    (found,) = run(save_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "run", backbone=backbone, **values)["rounds"]
    # Encoder and decoder have 24 neurons each, which are kept in multiples of 8.
    assert found["units"]["number"] == 48 and set(found["units"]["kept"].values()) == {32}


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_images(tmp_path_factory.mktemp("images") / "scans", CELLS)


@pytest.mark.slow
def test_channels_of_images_have_the_statistics_of_their_route(scans: Path, tmp_path: Path) -> None:
    values = {**IMAGES, "prune_granularity": "channel", "prune_round_to": 4}
    (found,) = run(scans, tmp_path / "run", **values)["rounds"]
    assert found["units"]["kind"] == "channel"
    model = RTLModel.from_pretrained(tmp_path / "run/final")
    dense = RTLModel.from_pretrained(tmp_path / "run/dense/final")
    for rows, before in zip(model.norm_statistics.rows, dense.norm_statistics.rows, strict=True):
        if rows.is_floating_point():
            assert not torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], before[0])
    assert_evaluates_to_the_same(tmp_path / "run")


def refusals() -> dict[str, tuple[dict[str, Any], list[str], str]]:
    labels = {**IMAGES, "prune_granularity": "channel"}
    membership = {"backbone": IMAGES["backbone"], "image_size": 16}
    return {
        "membership": (membership, [], "--one_pass needs tickets that predict labels"),
        "controls": (labels, ["--sanity"], "--sanity is for tickets in rounds"),
        "no samples": ({**labels, "calibration_samples": 0}, [], "--calibration_samples 0 must be at least 1"),
        "no neurons": (IMAGES, [], "has no neuron that can be pruned"),
        "no trained head": ({**labels, "max_steps": -1, "num_train_epochs": 0}, [], "is no trained TimmWrapper"),
    }


@pytest.mark.parametrize("kind", refusals())
def test_what_one_pass_cannot_do_is_refused(
    scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    values, flags, message = refusals()[kind]
    status = start("prune.py", *command_of(scans, tmp_path / "run", **values), *flags)
    assert_refused(capsys, status, tmp_path / "run", message)


def state_of(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.slow
def test_a_folder_of_another_run_is_refused_and_a_failure_keeps_its_traceback(
    texts: tuple[str, Path, dict[str, Any]], scans: Path, encoder: str, tmp_path: Path, capsys: Any
) -> None:
    data, output_dir, _ = texts
    in_rounds = {"dataset": scans, "output_dir": tmp_path / "rounds", **SHORT, **IMAGES}

    def refused(folder: Path, words: list[str]) -> str:
        before = state_of(folder)
        capsys.readouterr()
        assert start("prune.py", *words) == 2 and state_of(folder) == before
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        return line

    with pytest.MonkeyPatch.context() as patched, pytest.raises(ValueError, match="a failure"):
        patched.setattr(RTLTrainer, "training_step", lambda *_: (_ for _ in ()).throw(ValueError("a failure")))
        start("prune.py", *command(in_rounds))
    changed = command({**in_rounds, "learning_rate": 0.5})
    assert "holds a run of another configuration (learning_rate: 0.01 there, 0.5 now" in refused(
        tmp_path / "rounds", changed
    )
    one_pass = [*command({**in_rounds, "prune_granularity": "channel"}), "--one_pass"]
    assert "has a run without --one_pass" in refused(tmp_path / "rounds", one_pass)
    found = {"dataset": data, "output_dir": output_dir, **SHORT, **FOUND, "backbone": encoder}
    assert "has a run with --one_pass" in refused(output_dir, command(found))
    fewer = [*command({**found, "calibration_samples": 8}), "--one_pass"]
    assert "has a run with --calibration_samples 64;" in refused(output_dir, fewer)
    assert "has a run with --refit True;" in refused(output_dir, [*command(found), "--one_pass", "--no_refit"])


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--one_pass"]], ids=" ".join)
def test_the_tickets_alone_are_pushed(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    pushed: list[str] = []
    monkeypatch.setattr(RTLTrainer, "init_hf_repo", lambda *_, **__: None)
    monkeypatch.setattr(RTLTrainer, "push_to_hub", lambda trainer: pushed.append(trainer.args.output_dir))
    values = {**SHORT, **IMAGES, "prune_granularity": "channel", "prune_round_to": 4, "max_steps": 1, "dense": True}
    values |= {"dataset": scans, "output_dir": tmp_path / "run", "hub_model_id": "org/scans"}
    assert start("prune.py", *command(values), "--push_to_hub", *flags) == 0
    assert pushed == [str(tmp_path / "run")]
