"""`recipes/compare.py`: every method on small data, its figures against independent computations."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import compare
import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from hf_rtl import RTLModelForSequenceClassification, RTLTrainingArguments, find_tickets
from shared import one_pass, round_methods
from shared.arguments import BadInput
from shared.data_arguments import DataArguments
from shared.one_pass import Served
from shared.prepare import Prepared, prepare
from shared.quality import Quality
from tests.recipes.small_texts import DOMAINS, make_tokenizer, save_data, sentences


ATTENTION = "bert.encoder.layer.0.attention.self.query.weight"
SHORT = ("--target_sparsity", 0.5, "--prune_schedule", "geometric", "--prune_amount", 0.5, "--extraction_steps", 2)


def run(folder: Path, *arguments: object) -> dict:
    """The results of a comparison in `folder / "run"`."""
    command = ["compare.py", "--output_dir", folder / "run", "--save_strategy", "no", "--logging_strategy", "no"]
    command += ["--route_batch_size", 8, "--use_cpu", "--report_to", "none", *arguments]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", list(map(str, command)))
        compare.main()
    return json.loads((folder / "run" / "results.json").read_text())


@pytest.fixture(scope="module")
def texts(encoder: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[object]]:
    """The folder of a comparison on texts by domain, and its arguments."""
    folder = tmp_path_factory.mktemp("compare")
    data = save_data(folder / "data", sentences(96, 0), sentences(40, 1))
    return folder, [
        *("--dataset", data, "--route_column", "domain", "--label_column", "sentiment", "--backbone", encoder),
        *("--class_bounds", 0, "--class_names", "bad", "good"),
        *("--num_train_epochs", 1, "--learning_rate", 0.01, *SHORT),
    ]


@pytest.fixture(scope="module")
def compared(texts: tuple[Path, list[object]]) -> dict:
    folder, arguments = texts
    return run(folder, *arguments, "--seeds", 0, 1)


@pytest.mark.slow
def test_all_methods_stand_in_the_table_and_two_sentences_end_it(compared: dict) -> None:
    methods = {(line["method"], line["sparsity"]) for line in compared["methods"]}
    # An adapter of rank 1 has an eighth of the weights of these small layers, more than two tickets need beside one.
    # A network whose logits decide alone is for membership.
    without = ("one mask, LoRA per route", "one mask, each logit alone")
    expected = {(method, 0.5) for method in round_methods.METHODS if method not in without}
    expected = expected - {("dense", 0.5)} | {("dense", 0.0)}
    assert methods == expected
    assert [sentence.split(",")[0] for sentence in compared["sentences"]] == ["At equal time", "At equal bytes"]
    assert {figure["seed"] for figure in compared["figures"]} == {0, 1}


def prepared_texts(folder: Path, encoder: str) -> Prepared:
    data = DataArguments(
        dataset=str(folder / "data"), label_column="sentiment", class_bounds=[0], class_names=["bad", "good"]
    )
    return prepare(data, encoder, route_column="domain", seed=0)


def runs_of_texts(folder: Path, prepared: Prepared) -> round_methods.RoundMethods:
    """The finished runs of seed 0."""
    saved = json.loads((folder / "run/seed-0/tickets/final/training_args.json").read_text())
    names = ("target_sparsity", "prune_schedule", "prune_amount", "extraction_steps", "learning_rate", "prune_scope")
    same = {name: saved[name] for name in (*names, "route_batch_size", "num_train_epochs", "max_steps", "use_cpu")}
    args = RTLTrainingArguments(
        output_dir=str(folder), seed=0, save_strategy="no", logging_strategy="no", report_to=[], **same
    )
    return round_methods.RoundMethods(prepared, args, folder / "run/seed-0", adapter_learning_rate=0.01)


def figures_of(compared: dict, method: str, seed: int = 0) -> dict:
    (found,) = [run for run in compared["figures"] if (run["method"], run["seed"]) == (method, seed)]
    return found


@pytest.mark.slow
def test_qualities_are_those_of_single_samples_through_the_saved_models(
    compared: dict, texts: tuple[Path, list[object]], encoder: str
) -> None:
    folder, _ = texts
    prepared = prepared_texts(folder, encoder)
    model = RTLModelForSequenceClassification.from_pretrained(folder / "run/seed-0/tickets/final").eval()
    for method, shift in (("tickets", 0), ("another route's tickets", 1)):
        for route, name in enumerate(DOMAINS):
            right = [
                int(model(input_ids=torch.tensor([row["input_ids"]]), route_ids=(route + shift) % 2).logits.argmax())
                == row["label"]
                for row in prepared.inputs.test
                if row["domain"] == route
            ]
            assert figures_of(compared, method)["quality"][name] == pytest.approx(np.mean(right))


@pytest.mark.slow
def test_rivals_have_the_sizes_that_their_names_say(compared: dict, texts: tuple[Path, list[object]]) -> None:
    folder, _ = texts
    tickets = RTLModelForSequenceClassification.from_pretrained(folder / "run/seed-0/tickets/final")
    total = tickets.mask_bank.num_weights
    for name, kept in (("one-mask", total / 2), ("one-mask-at-the-union's-density", tickets.mask_bank.union_count())):
        single = RTLModelForSequenceClassification.from_pretrained(folder / f"run/seed-0/{name}/final")
        assert single.num_routes == 1 and single.mask_bank.union_count() == round(kept)


@pytest.mark.slow
def test_another_routes_tickets_are_those_of_the_next_route(
    compared: dict, texts: tuple[Path, list[object]], encoder: str
) -> None:
    folder, _ = texts
    runs = runs_of_texts(folder, prepared_texts(folder, encoder))
    own, others = (
        [dict(model.named_parameters()) for model in runs.serve(method, 0).models]
        for method in ("tickets", "another route's tickets")
    )
    assert not torch.equal(own[0][ATTENTION], own[1][ATTENTION])
    for route, other in enumerate(others):
        assert all(torch.equal(parameter, own[1 - route][name]) for name, parameter in other.items())


@pytest.mark.slow
def test_adapters_have_the_largest_rank_that_fits_and_learn_their_route(
    compared: dict, texts: tuple[Path, list[object]], encoder: str
) -> None:
    folder, _ = texts
    prepared = prepared_texts(folder, encoder)
    runs = runs_of_texts(folder, prepared)
    trainer = runs.trained("tickets")
    layers = [(16, 16)] * 4 + [(16, 24), (24, 16), (16, 16), (16, 2)]
    of_rank_1 = 2 * sum(4 * (inputs + outputs) for inputs, outputs in layers)
    one = figures_of(compared, "one mask")["stored_bytes"]
    assert runs.adapters(trainer, 0, one + of_rank_1 - 1) is None
    served = runs.adapters(trainer, 0, one + 4 * of_rank_1 - 1)
    assert served.stored_bytes == one + 3 * of_rank_1
    network = runs.serve("one mask", 0).models[0]
    change = served.models[0].get_parameter(ATTENTION) - network.get_parameter(ATTENTION)
    assert torch.linalg.matrix_rank(change, rtol=1e-3) == 3

    def loss(model: torch.nn.Module, route: int) -> float:
        batches = [batch for batch in trainer.retraining_batches(0) if batch["route"] == route]
        return float(np.mean([runs.loss(model.eval(), batch).item() for batch in batches]))

    for route, model in enumerate(served.models):
        assert loss(model, route) < loss(network, route)


@pytest.mark.slow
def test_a_comparison_is_read_back_and_others_are_refused(
    compared: dict, texts: tuple[Path, list[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, arguments = texts
    with monkeypatch.context() as patch:
        patch.setattr(round_methods.RoundMethods, "trained", lambda *_: pytest.fail("it trains again"))
        again = run(folder, *arguments, "--seeds", 0, 1)
        assert again["figures"] == compared["figures"]
        fewer = run(folder, *arguments, "--seeds", 1, "--methods", "one mask")
        assert {figure["method"] for figure in fewer["figures"]} == {"dense", "one mask", "tickets"}
    with pytest.raises(BadInput, match="a comparison with --learning_rate 0.01; choose another folder"):
        run(folder, *arguments, "--learning_rate", 0.2)
    with pytest.raises(SystemExit, match="--methods has 'two masks'; allowed are 'dense'"):
        run(folder, *arguments, "--methods", "two masks")


@pytest.mark.slow
def test_membership_tickets_are_ranked_against_all_other_samples(encoder: str, tmp_path: Path) -> None:
    label = ["film" if text.split()[1] in DOMAINS["film"] else "gear" for text in sentences(60, 0)["text"]]
    train = sentences(60, 0, label=label).remove_columns(["domain", "sentiment"])
    data = save_data(tmp_path / "data", train, train.select(range(20)))
    methods = ("--methods", "one mask", "one mask, each logit alone", "layer-shuffled tickets")
    results = run(tmp_path, "--dataset", data, "--backbone", encoder, "--max_steps", 6, *SHORT, *methods, "--seeds", 0)
    prepared = prepare(DataArguments(dataset=data), encoder, route_column=None, seed=0)
    assert prepared.rows.ticket_task == "membership"
    model = RTLModelForSequenceClassification.from_pretrained(tmp_path / "run/seed-0/tickets/final").eval()
    homes = np.array(prepared.rows.test["label"])
    single = RTLModelForSequenceClassification.from_pretrained(tmp_path / "run/seed-0/one-mask/final").eval()
    # The network for all routes has a logit for each.
    assert (single.config.ticket_task, single.config.label2id) == ("labels", {"film": 0, "gear": 1})
    rows = [torch.tensor([row["input_ids"]]) for row in prepared.inputs.test]
    yes: dict[str, list[list[bool]]] = {"tickets": [], "one mask": []}
    for route, name in enumerate(prepared.rows.route_names):
        of_ticket = [model(input_ids=row, route_ids=route).logits.item() for row in rows]
        of_single = [single(input_ids=row, route_ids=0).logits.softmax(dim=1)[0, route].item() for row in rows]
        yes["tickets"].append([score > 0 for score in of_ticket])
        yes["one mask"].append([probability > 0.5 for probability in of_single])  # the higher of two logits
        for method, scores in (("tickets", of_ticket), ("one mask", of_single)):
            pairs = [
                (scores[i] > scores[j]) + (scores[i] == scores[j]) / 2
                for i in range(20)
                for j in range(20)
                if homes[i] == route != homes[j]
            ]
            assert figures_of(results, method)["quality"][name] == pytest.approx(np.mean(pairs), abs=0.02)
    decided = {line["method"]: line for line in results["decisions"]}
    for method, of_routes in yes.items():
        halves = [
            (
                np.mean([said[i] for i in range(20) if homes[i] == k]),
                np.mean([said[i] for i in range(20) if homes[i] != k]),
            )
            for k, said in enumerate(of_routes)
        ]
        balanced = np.mean([(right + 1 - wrong) / 2 for right, wrong in halves])
        assert float(decided[method]["bal. acc."]) == pytest.approx(balanced, abs=0.03)
    # Each of several logits may decide alone, and is the score then.
    network = single.extract_ticket(0)
    of_routes, metrics = Quality(prepared, batch_size=8)(Served([network] * 2, 0, each_alone=True))
    logits = [network(input_ids=row).logits[0].tolist() for row in rows]
    for route, name in enumerate(prepared.rows.route_names):
        own = [
            (logits[i][route], logits[j][route]) for i in range(20) for j in range(20) if homes[i] == route != homes[j]
        ]
        expected = np.mean([(mine > other) + (mine == other) / 2 for mine, other in own])
        assert of_routes[name]["AUROC"] == pytest.approx(expected, abs=0.02)
    recalls = [np.mean([logits[i][k] > 0 for i in range(20) if homes[i] == k]) for k in range(2)]
    assert metrics["recall"] == pytest.approx(np.mean(recalls))
    # Where the highest decides, what is added to all changes nothing.
    before = Quality(prepared, batch_size=8)(Served([network] * 2, 0))[1]
    with torch.no_grad():
        network.classifier.bias.add_(5)
    after = Quality(prepared, batch_size=8)(Served([network] * 2, 0))[1]
    assert after["recall"] == before["recall"] < 1
    # As many weights as the one mask; the same number in every layer as the tickets.
    assert (
        figures_of(results, "one mask, each logit alone")["stored_bytes"]
        == figures_of(results, "one mask")["stored_bytes"]
    )
    alone = runs_of_texts(tmp_path, prepared).serve("one mask, each logit alone", 0).models[0]
    for name, mask in zip(single.mask_bank.weight_names, single.mask_bank[0], strict=True):
        assert torch.count_nonzero(alone.get_parameter(name)[~mask]) == 0
        assert not torch.equal(alone.get_parameter(name), network.get_parameter(name))
    shuffled = RTLModelForSequenceClassification.from_pretrained(
        tmp_path / "run/seed-0/tickets/layer-shuffled-tickets-sparsity-0.5"
    )
    for own, other in zip(model.mask_bank[0], shuffled.mask_bank[0], strict=True):
        assert own.sum() == other.sum() and not torch.equal(own, other)
    assert "AUROC" in results["methods"][0]


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny language model of words."""
    folder = tmp_path_factory.mktemp("generator")
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        pad_token_id=0,
        eos_token_id=3,
        bos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_tickets_of_one_pass_have_baselines_of_their_own(generator: str, tmp_path: Path) -> None:
    data = save_data(tmp_path / "data", sentences(80, 0), sentences(40, 1))
    arguments = ["--dataset", data, "--route_column", "domain", "--task", "causal", "--max_length", 8]
    arguments += ["--backbone", generator, "--one_pass", "--calibration_samples", 4, "--seeds", 0, "--max_steps", 4]
    results = run(tmp_path, *arguments, *SHORT)
    assert [line["method"] for line in results["methods"]] == one_pass.METHODS
    # Half of 32 neurons are left, of three matrices with 16 columns or rows.
    dense, one = (figures_of(results, method)["stored_bytes"] for method in ("dense", "one mask"))
    assert dense - one == 16 * 3 * 16 * 4


@pytest.mark.slow
def test_tickets_of_one_pass_tell_their_route_by_its_logit(encoder: str, tmp_path: Path) -> None:
    label = ["film" if text.split()[1] in DOMAINS["film"] else "gear" for text in sentences(60, 0)["text"]]
    train = sentences(60, 0, label=label).remove_columns(["domain", "sentiment"])
    data = save_data(tmp_path / "data", train, train.select(range(20)))
    options = ("--one_pass", "--calibration_samples", 60, "--methods", "tickets", "--seeds", 0, "--max_steps", 6)
    results = run(tmp_path, "--dataset", data, "--backbone", encoder, *options, *SHORT)
    prepared = prepare(DataArguments(dataset=data), encoder, route_column=None, seed=0)
    single = RTLModelForSequenceClassification.from_pretrained(tmp_path / "run/seed-0/dense/final").eval()
    # All samples of a route, so that it does not matter which are drawn.
    width = max(len(row["input_ids"]) for row in prepared.inputs.train)
    rows = [
        {
            "input_ids": [*row["input_ids"], *[0] * (width - len(row["input_ids"]))],
            "attention_mask": [place < len(row["input_ids"]) for place in range(width)],
            "route": row["label"],
        }
        for row in prepared.inputs.train.with_format(None)
    ]
    found = find_tickets(
        single.extract_ticket(0), Dataset.from_list(rows), sparsity=0.5, route_column="route", batch_size=8
    )
    homes, inputs = prepared.rows.test["label"], [torch.tensor([row["input_ids"]]) for row in prepared.inputs.test]
    for route, name in enumerate(prepared.rows.route_names):
        scores = [found(input_ids=row, route_ids=route).logits.log_softmax(dim=1)[0, route].item() for row in inputs]
        pairs = [
            (scores[i] > scores[j]) + (scores[i] == scores[j]) / 2
            for i in range(20)
            for j in range(20)
            if homes[i] == route != homes[j]
        ]
        assert figures_of(results, "tickets")["quality"][name] == pytest.approx(np.mean(pairs), abs=0.02)


@pytest.mark.slow
def test_tokens_are_counted_one_by_one(generator: str, tmp_path: Path) -> None:
    data = save_data(tmp_path / "data", sentences(40, 0), sentences(30, 1))
    prepared = prepare(
        DataArguments(dataset=data, task="causal", max_length=6), generator, route_column="domain", seed=0
    )
    network = LlamaForCausalLM.from_pretrained(generator).eval()
    of_routes, _ = Quality(prepared, batch_size=4)(Served([network] * 2, 0))
    for route, name in enumerate(DOMAINS):
        right, losses = [], []
        for row in prepared.inputs.test:
            if row["domain"] != route:
                continue
            logits = network(input_ids=row["input_ids"][None]).logits[0].detach().double()
            for position in range(5):
                target = int(row["input_ids"][position + 1])
                right.append(int(logits[position].argmax()) == target)
                losses.append(-float(logits[position].log_softmax(0)[target]))
        found = of_routes[name]
        assert found["accuracy"] == pytest.approx(np.mean(right))
        assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
