"""Model cards: their content and their form."""

from __future__ import annotations

import json
import logging
import re

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from transformers.pipelines import PIPELINE_REGISTRY

from hf_rtl import RTLModelForImageClassification
from hf_rtl.metrics import label_metrics, router_metrics
from hf_rtl.model_card import write_card
from hf_rtl.model_card.card import PIPELINE_TAGS
from hf_rtl.model_card.readme import Readme
from hf_rtl.model_card.run_record import write_run
from hf_rtl.modeling.modeling_rtl import TASK_CLASSES
from hf_rtl.modeling.routers import ScoreRouter
from tests.model_card.cards import (
    HOSTILE,
    MEMBERSHIP,
    SPECIFICATION,
    faults,
    make_model,
    python_blocks,
    read_page,
    table_with,
    tables,
    with_run,
)


# The form


GIVEN = {"license": "mit", "language": ["en"], "datasets": "org/data", "tags": "x"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "ticket_task, has_run, given",
    [
        ("membership", True, {}),
        ("membership", False, GIVEN),
        ("labels", True, GIVEN),
        ("labels", False, {}),
    ],
)
def test_metadata_follow_the_specification(tmp_path, ticket_task, has_run, given):
    model = make_model(ticket_task)
    if has_run:
        with_run(model, tmp_path)
    else:
        model.save_pretrained(tmp_path)
    metadata = ModelCard.load(write_card(tmp_path, **given)).data.to_dict()
    assert faults(metadata) == []
    assert metadata["library_name"] == "transformers" and metadata["pipeline_tag"] == "image-classification"
    assert "hf_rtl" in metadata["tags"] and ("model-index" in metadata) == has_run
    assert ("license" in metadata, "datasets" in metadata) == (bool(given), bool(given))
    # The check itself finds faults.
    broken = {"model-index": [{"results": [{"task": {"type": "x"}, "dataset": {}, "metrics": [{"value": "1"}]}]}]}
    assert len(faults({**broken, "tags": "x", "pipeline_tag": "membership", "licence": "mit"})) == 9


def test_every_task_has_a_name_that_the_hub_and_transformers_know():
    tags = PIPELINE_TAGS
    names = {cls.__name__: tags.get(cls.backbone_class) for cls in TASK_CLASSES}
    assert [name for name, tag in names.items() if tag is None] == ["RTLModel", "RTLModelForSeq2SeqLM"]
    assert set(tags.values()) <= set(SPECIFICATION["pipeline_tags"]) & set(PIPELINE_REGISTRY.get_supported_tasks())
    assert names["RTLModelForAudioClassification"] == "audio-classification"
    assert names["RTLModelForSequenceClassification"] == "text-classification"


@pytest.mark.parametrize("ticket_task", ["membership", "labels"])
def test_a_card_comes_back_with_every_metric_as_it_was_measured(tmp_path, ticket_task):
    model = make_model(ticket_task)
    metrics = with_run(model, tmp_path)
    card = ModelCard.load(write_card(tmp_path, dataset_name="Animals", dataset_split="test"))
    again = ModelCard(str(card))
    assert again.data.to_dict() == card.data.to_dict() and again.data.eval_results == card.data.eval_results
    assert again.text == card.text

    results = card.data.eval_results
    assert all(result.dataset_name == "Animals" and result.dataset_split == "test" for result in results)
    assert {result.task_type for result in results} == {"image-classification"}
    assert {result.dataset_config for result in results} == {"all routes"}
    measured = {result.metric_name: result.metric_value for result in results}
    assert len(measured) == len(results)
    if ticket_task == "membership":
        for words, metric in (
            ("Balanced accuracy, score > 0", "balanced_accuracy"),
            ("Balanced accuracy, calibrated threshold", "calibrated_balanced_accuracy"),
            ("AUROC", "auroc"),
        ):
            assert measured.pop(f"{words}, mean over routes") == metrics[metric]
            worst = min(metrics[f"{name}/{metric}"] for name in model.route_names)
            assert measured.pop(f"{words}, worst route") == worst
        assert measured == {"Accuracy of the ticket with the highest score": metrics["accuracy"]}
        assert card.data.metrics == ["accuracy", "roc_auc"]
    else:
        assert measured == {
            "Accuracy, each sample through the ticket of its route": metrics["accuracy"],
            "Accuracy, mean over routes": metrics["mean_route_accuracy"],
            "Accuracy, worst route": metrics["worst_route_accuracy"],
        }
        assert {result.metric_type for result in results} == {"accuracy"}


@pytest.mark.slow
@pytest.mark.parametrize("ticket_task", ["membership", "labels"])
def test_metadata_are_short_whatever_the_number_of_routes(tmp_path, ticket_task):
    model = make_model(ticket_task, route_names=[f"route {index}" for index in range(40)])
    model.set_router(ScoreRouter(40))
    with_run(model, tmp_path)
    homes = np.arange(400) % 40
    run = json.loads((tmp_path / "training_run.json").read_text())
    routed = router_metrics(np.random.default_rng(1).normal(size=(400, 40)), homes, model.route_names)
    if ticket_task == "labels":
        logits = np.random.default_rng(2).normal(size=(400, 4))
        for prefix in ("inferred_", "union_"):
            routed |= label_metrics(logits, homes % 4, homes, model.route_names, prefix=prefix)
    run["evaluations"][0]["rounds"][-1].update(routed)
    write_run(tmp_path, {**run, "backbone": "org/base"})
    given = {"license": "mit", "language": ["en", "fr"], "datasets": "org/data", "dataset_split": "test"}
    file = write_card(tmp_path, **given)
    card = ModelCard.load(file)
    assert faults(card.data.to_dict()) == [] and len(card.data.eval_results) >= 8
    assert len(Readme.parse(file.read_bytes()).front.split("\n")) <= 60


@pytest.mark.slow
@pytest.mark.parametrize("names", [HOSTILE, [f"route {index}" for index in range(40)]], ids=["hostile", "many"])
def test_any_names_make_a_page_that_can_be_read(tmp_path, names):
    model = make_model(route_names=names)
    with_run(model, tmp_path)
    file = write_card(tmp_path)
    card = ModelCard.load(file)
    metadata, page = card.data.to_dict(), card.text
    assert faults(metadata) == []
    configs = [result["dataset"]["config"] for result in metadata["model-index"][0]["results"]]
    assert configs == ["all routes"]
    shown = [name if len(name) <= 40 else name[:39] + "…" for name in names]
    for titles in (("kept weights",), ("threshold",)):
        assert [row["route"] for row in table_with(page, *titles)] == [*shown, "all routes"]
    assert any(shown[0] in table[0] for table in tables(page)) == (len(names) <= 12)
    for block in python_blocks(page):
        compile(block, "card", "exec")
    assert "<b>x" not in MarkdownIt().enable("table").render(page)
    if names == HOSTILE:
        content = file.read_bytes()
        assert write_card(tmp_path).read_bytes() == content


# The numbers


@pytest.mark.slow
@pytest.mark.parametrize("ticket_task", ["membership", "labels"])
def test_tables_say_what_masks_and_metrics_are(tmp_path, ticket_task):
    model = make_model(ticket_task)
    metrics = with_run(model, tmp_path, learning_rate=0.01, target_sparsity=[0.5], max_steps=1234)
    page = read_page(write_card(tmp_path))
    masks = [torch.cat([layer.flatten() for layer in model.mask_bank[name]]) for name in model.route_names]
    titles = ["bal. acc.", "precision", "recall", "F1", "AUROC", "prec. at recall .8"]
    columns = dict(zip(titles, MEMBERSHIP, strict=True))
    if ticket_task == "labels":
        columns = {"accuracy": "accuracy"}

    *routes, overall = table_with(page, "kept weights")
    for index, (name, row) in enumerate(zip(model.route_names, routes, strict=True)):
        kept = int(masks[index].sum())
        assert row[""] == str(index) and row["route"] == name and row["kept weights"] == f"{kept:,}"
        assert row["density"] == f"{100 * kept / len(masks[index]):.1f} %"
        assert (row["training samples"], row["test samples"]) == (str(100 + index), "10")
        assert {title: row[title] for title in columns} == {
            title: f"{metrics[f'{name}/{metric}']:.3f}" for title, metric in columns.items()
        }
    assert {title: overall[title] for title in columns} == {t: f"{metrics[m]:.3f}" for t, m in columns.items()}
    assert (overall["training samples"], overall["test samples"]) == ("303", "30")
    assert overall["density"] == f"{100 * int(torch.stack(masks).sum()) / torch.stack(masks).numel():.1f} %"

    assert list(overall).index("by chance") == list(overall).index(next(iter(columns))) + 1
    chance = ["0.500"] * 4 if ticket_task == "membership" else ["0.400", "0.300", "0.300", "0.333"]
    assert [row["by chance"] for row in [*routes, overall]] == chance
    assert ("says the same to every sample" if ticket_task == "membership" else "its route's commonest label") in page

    for row, mask in zip(table_with(page, *model.route_names), masks, strict=True):
        for name, other in zip(model.route_names, masks, strict=True):
            alike = int((mask & other).sum()) / int((mask | other).sum())
            assert row[name] == ("1" if mask is other else f"{alike:.3f}")
    union, core = torch.stack(masks).any(0).sum(), torch.stack(masks).all(0).sum()
    assert f"At least one ticket keeps {int(union):,} weights (" in page
    assert f"all tickets keep {int(core):,} (" in page

    footprint = model.footprint()
    sizes = {row["bytes"]: row["of 3 plain networks"] for row in table_with(page, "bytes")}
    for form in ("full_bytes", "compact_bytes", "union_bytes", "independent_full_bytes", "independent_bytes"):
        share = 100 * footprint[form] / footprint["independent_full_bytes"]
        assert sizes[f"{footprint[form]:,}"] == f"{share:.1f} %", form

    (round_,) = table_with(page, "round")
    assert (round_["steps"], round_["evaluation loss"]) == ("1,234", "0.500")
    judged_by = "bal. acc." if ticket_task == "membership" else "worst route"
    judged = metrics["balanced_accuracy" if ticket_task == "membership" else "worst_route_accuracy"]
    assert (round_["union"], round_[judged_by]) == (f"{int(union):,}", f"{judged:.3f}")
    arguments = {row["argument"]: (row["value"], row["default"]) for row in table_with(page, "argument")}
    assert arguments == {
        "learning_rate": ("0.01", "0.0001"),
        "target_sparsity": ("[0.5]", "[0.25, 0.5, 0.75]"),
        "max_steps": ("1234", "-1"),
    }
    assert "torch 1.2.3" in page and "2 processes" in page and "Seed 42" in page


@pytest.mark.parametrize("keep", [0.02, 0.5, 1.0])
def test_lines_of_sizes_do_not_contradict_each_other(tmp_path, keep):
    """A line that names other lines is their sum, and none says that it is the least: coded masks may take less."""
    model = make_model()
    for name in model.route_names:
        model.mask_bank[name] = [torch.rand(shape) < keep for shape in model.mask_bank.shapes]
    (rows,) = [rows for rows in tables(read_page(write_card(model, tmp_path))) if "bytes" in rows[0]]
    lines = {words: int(size.replace(",", "")) for words, size, *_ in rows[1:]}
    (number,) = [number for number, words in enumerate(lines) if "the sum of the three lines below" in words]
    sizes = list(lines.values())
    assert sizes[number] == sum(sizes[number + 1 : number + 4])
    assert not any(re.search("the least|the most|smallest|largest", words) for words in lines)


def test_calibrated_metrics_have_a_table_of_their_own(tmp_path):
    model = make_model()
    metrics = with_run(model, tmp_path)
    *routes, overall = table_with(read_page(write_card(tmp_path)), "threshold")
    for name, threshold, row in zip(model.route_names, (0, 0.25, 0.5), routes, strict=True):
        assert (row["route"], row["threshold"]) == (name, f"{threshold:.3f}")
        assert row["F1"] == f"{metrics[f'{name}/calibrated_f1']:.3f}"
        assert row["bal. acc."] == f"{metrics[f'{name}/calibrated_balanced_accuracy']:.3f}"
    assert overall["precision"] == f"{metrics['calibrated_precision']:.3f}" and "AUROC" not in overall


def test_a_run_of_before_has_no_chance(tmp_path):
    with_run(make_model(), tmp_path)
    run = json.loads((tmp_path / "training_run.json").read_text())
    before = {name: value for name, value in run["evaluations"][0].items() if name != "chance"}
    for evaluation in (before, {**before, "chance": None}):
        write_run(tmp_path, {**run, "evaluations": [evaluation]})
        page = read_page(write_card(tmp_path))
        assert "by chance" not in table_with(page, "kept weights")[0] and "By chance" not in page


def test_thresholds_are_those_that_were_measured(tmp_path):
    model = make_model()
    with_run(model, tmp_path)
    model.config.thresholds = None
    model.save_pretrained(tmp_path)
    page = read_page(write_card(tmp_path))
    assert [row["threshold"] for row in table_with(page, "threshold")] == ["0.000", "0.250", "0.500", ""]
    assert "model.config.thresholds" not in page and "No thresholds were calibrated" in page


def test_custom_metrics_are_shown_by_their_names(tmp_path):
    model = make_model("labels")
    with_run(model, tmp_path)
    run = json.loads((tmp_path / "training_run.json").read_text())
    run["evaluations"][0]["rounds"] = [{"loss": 0.5, "wer": 0.125, "cat/wer": 0.25}]
    write_run(tmp_path, run)
    card = ModelCard.load(write_card(tmp_path))
    measured = [(r.dataset_config, r.metric_type, r.metric_value) for r in card.data.eval_results]
    assert measured == [("all routes", "wer", 0.125)] and card.data.metrics is None
    rows = table_with(card.text, "kept weights")
    assert [row["wer"] for row in rows] == ["0.250", "–", "–", "0.125"] and "accuracy" not in rows[0]


def test_undefined_metrics_are_dashes_and_no_results(tmp_path):
    model = make_model()
    metrics = with_run(model, tmp_path)
    run = json.loads((tmp_path / "training_run.json").read_text())
    run["evaluations"][0]["rounds"][-1]["dog/auroc"] = None
    write_run(tmp_path, run)
    card = ModelCard.load(write_card(tmp_path))
    assert [row["AUROC"] == "–" for row in table_with(card.text, "kept weights")] == [False, True, False, False]
    measured = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert measured["AUROC, worst route"] == min(metrics["cat/auroc"], metrics["owl/auroc"])


@pytest.mark.slow
def test_limits_are_those_of_the_model(tmp_path):
    model = make_model()
    masks = [mask & (layer not in (3, 4)) for layer, mask in enumerate(model.mask_bank["dog"])]
    masks[4].view(-1)[0] = True  # a single weight, which is enough
    model.mask_bank["dog"] = masks
    with_run(model, tmp_path)
    page = read_page(write_card(tmp_path, limitations=["Not for *cats*."]))
    layer = model.mask_bank.weight_names[3].replace("_", "\\_")
    assert f"Some tickets keep nothing of 1 of 15 prunable weights: {layer} (1 of 3 tickets).\n" in page
    assert "**1 ticket gives every sample the same score**" in page
    assert "- Not for *cats*.\n" in page and "is not described here" not in page
    assert "The calibrated thresholds fit" in page and "Statistics are shared" not in page

    model = RTLModelForImageClassification.from_backbone(
        "test_resnet", route_names=["a", "b"], ticket_task="labels", num_labels=2, norm_statistics="shared"
    )
    page = read_page(write_card(model, tmp_path / "other"))
    assert "**Statistics are shared.**" in page and "Layers are empty" not in page and "same score" not in page
    assert "Precision depends" not in page and "is not described here" in page


@pytest.mark.slow
@pytest.mark.parametrize("ticket_task", ["membership", "labels"])
def test_a_router_is_shown_with_its_accuracy(tmp_path, ticket_task):
    model = make_model(ticket_task)
    page = read_page(write_card(model, tmp_path / "before"))
    assert "**Somebody must say the route.**" in page and "router finds" not in page
    model.set_router(ScoreRouter(3), threshold=0.25, fallback="owl")
    metrics = with_run(model, tmp_path)
    names, homes = model.route_names, np.arange(30) % 3
    routed = router_metrics(np.random.default_rng(1).normal(size=(30, 3)), homes, names)
    if ticket_task == "labels":
        logits = np.random.default_rng(2).normal(size=(30, 4))
        routed |= label_metrics(logits, homes, homes, names, prefix="inferred_")
        routed |= label_metrics(-logits, homes, homes, names, prefix="union_")
    run = json.loads((tmp_path / "training_run.json").read_text())
    run["evaluations"][0]["rounds"][-1].update(routed)
    write_run(tmp_path, run)
    page = read_page(write_card(tmp_path))
    assert "the model's router (`score`) finds the likeliest route" in page and "**The router errs.**" in page
    assert "Where the probability is below 0.25, it takes the route owl." in page
    assert "Somebody must say" not in page and "no answer but an error" not in page
    assert f"- Accuracy of the router: samples whose likeliest route is theirs: {routed['route_accuracy']:.3f}" in page
    if ticket_task == "labels":
        rows = table_with(page, "acc., route inferred", "acc. of the union", "routes found")
        for row, name in zip(rows, names, strict=False):
            assert row["acc., route inferred"] == f"{routed[f'{name}/inferred_accuracy']:.3f}"
            assert row["acc. of the union"] == f"{routed[f'{name}/union_accuracy']:.3f}"
            assert row["routes found"] == f"{routed[f'{name}/route_recall']:.3f}"
            assert row["accuracy"] == f"{metrics[f'{name}/accuracy']:.3f}"
        assert page.count('classifier("image.png"') == 2


def test_the_card_of_a_model_without_a_run_invents_nothing(tmp_path):
    card = ModelCard.load(write_card(make_model(), tmp_path))
    assert "How well the tickets do is not known" in card.text and "How the tickets were found" in card.text
    assert card.data.eval_results is None and card.data.metrics is None and card.data.base_model is None
    assert len(table_with(card.text, "kept weights")) == 4 and len(table_with(card.text, "bytes")) > 5
    assert not any(len(table[0]) > 4 and "round" in table[0] for table in tables(card.text))
    assert "None" not in card.text and "Undefined" not in card.text


@pytest.mark.slow
def test_a_run_with_other_masks_or_weights_is_not_the_model_s(tmp_path, caplog):
    model = make_model()
    with_run(model, tmp_path)
    assert "model-index" in write_card(tmp_path).read_text()
    for change in ("masks", "weights"):
        changed = make_model()
        if change == "masks":  # masks with the same union
            cat, dog = changed.mask_bank["cat"], changed.mask_bank["dog"]
            changed.mask_bank["cat"], changed.mask_bank["dog"] = dog, cat
        else:
            changed.masker.weights[0].data.mul_(2)
        changed.config.thresholds = model.config.thresholds
        changed.save_pretrained(tmp_path)
        with caplog.at_level(logging.WARNING, logger="hf_rtl"):
            card = ModelCard.load(write_card(tmp_path))
        assert card.data.eval_results is None and "How well the tickets do is not known" in card.text
        assert "other masks or weights" in caplog.text
        caplog.clear()
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert "model-index" in write_card(tmp_path).read_text()


# Similarity by chance


def test_random_masks_are_as_similar_as_chance_with_their_densities_in_every_layer(tmp_path):
    """Layers of nine tenths and one tenth density in turn make masks similar, but only by chance."""
    model = make_model("labels", route_names=("day", "night"))
    generator = torch.Generator().manual_seed(3)
    for route in range(2):
        model.mask_bank[route] = [
            torch.rand(shape, generator=generator) < (0.9 if layer % 2 else 0.1)
            for layer, shape in enumerate(model.mask_bank.shapes)
        ]
    page = read_page(write_card(model, tmp_path))
    found = float(re.search(r"those that either keeps, is (0\.\d+) on average;", page)[1])
    chance = float(re.search(r"as dense in every layer it would be (0\.\d+)\.", page)[1])
    assert found == pytest.approx(chance, abs=0.01) and found > 0.5
