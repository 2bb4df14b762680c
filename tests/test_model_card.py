"""Model cards: what they say, in which form, and what they leave alone."""

from __future__ import annotations

import builtins
import getpass
import json
import logging
import math
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image
from transformers import ViTImageProcessor
from transformers.pipelines import PIPELINE_REGISTRY

import hf_rtl.model_card
from hf_rtl import (
    RTLModelForImageClassification,
    RTLTrainer,
    RTLTrainingArguments,
)
from hf_rtl.metrics import label_metrics, membership_metrics, router_metrics
from hf_rtl.model_card import RTLCardData, write_card
from hf_rtl.modeling_rtl import TASK_CLASSES
from hf_rtl.routing import ScoreRouter
from hf_rtl.training_run import describe_run, write_run


SPECIFICATION = yaml.safe_load(Path(__file__).with_name("model_card_specification.yaml").read_text())
HOSTILE = ["a|b", "T-shirt/top", "<b>x</b>", "ünïcødé 漢字", "`*_[x](y)", "- yes: no", '"\\', "x" * 200]
MEMBERSHIP = ["balanced_accuracy", "precision", "recall", "f1", "auroc"]


def make_model(ticket_task="membership", route_names=("cat", "dog", "owl")):
    """Random masks, each denser than the one before."""
    labels = {"num_labels": 4} if ticket_task == "labels" else {}
    model = RTLModelForImageClassification.from_backbone(
        "test_resnet", route_names=list(route_names), ticket_task=ticket_task, seed=0, **labels
    )
    generator = torch.Generator().manual_seed(0)
    for route in range(model.num_routes):
        keep = 0.2 + 0.3 * route / model.num_routes
        model.mask_bank[route] = [torch.rand(shape, generator=generator) < keep for shape in model.mask_bank.shapes]
    return model.eval()


def with_run(model, folder, **arguments):
    """`model` as if a run had made and evaluated it, and its metrics: in `folder`, with thresholds for membership."""
    generator = np.random.default_rng(0)
    names = model.route_names
    homes = np.arange(10 * len(names)) % len(names)
    if model.config.ticket_task == "membership":
        model.config.thresholds = [0.25 * route for route in range(len(names))]
        scores = generator.normal(size=(len(homes), len(names)))
        metrics = membership_metrics(scores, homes, names, thresholds=model.config.thresholds)
        metrics["constant_tickets"] = 1.0
    else:
        metrics = label_metrics(generator.normal(size=(len(homes), 4)), homes % 4, homes, names)
    bank = model.mask_bank
    report = {
        "round": 1,
        "sparsity": 0.5,
        "kept": dict(zip(names, bank.count().tolist(), strict=True)),
        "union": bank.union_count(),
        "core": bank.core_count(),
        "mean_similarity": 1 / 3,
        "steps": 1234,
        "surroundings": {
            **dict.fromkeys(("hf_rtl", "torch", "transformers", "accelerate", "timm", "python"), "1.2.3"),
            "device": "cpu",
            "num_processes": 2,
        },
        "metrics": {f"eval_{name}": value for name, value in {**metrics, "loss": 0.5, "runtime": 3.0}.items()},
    }
    model.save_pretrained(folder)
    arguments = RTLTrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[], **arguments)
    samples = {name: 100 + route for route, name in enumerate(names)}
    run = describe_run(
        model,
        arguments,
        [report],
        num_training_samples=samples,
        num_evaluation_samples={"": dict.fromkeys(names, 10)},
    )
    write_run(Path(folder), run)
    return metrics


def page_of(file):
    return ModelCard.load(file).text


def tables(page):
    """Every table of a page, as a renderer reads it: rows of the texts of cells. All have as many cells."""
    found, inside = [], False
    for token in MarkdownIt().enable("table").parse(page):
        if token.type in ("table_open", "table_close"):
            inside = token.type == "table_open"
            found += [[]] if inside else []
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type == "inline" and inside:
            cell = "".join(child.content for child in token.children)
            found[-1][-1].append(cell.replace("\N{NO-BREAK SPACE}", " "))
    assert found and all(len(set(map(len, table))) == 1 for table in found)
    return found


def table_with(page, *titles):
    """Rows of the one table whose head has these titles, as title -> cell."""
    (table,) = [table for table in tables(page) if set(titles) <= set(table[0])]
    return [dict(zip(table[0], row, strict=True)) for row in table[1:]]


def python_blocks(page):
    return [t.content for t in MarkdownIt().parse(page) if t.type == "fence" and t.info == "python"]


# The form


def faults(metadata):
    """What in the metadata of a card contradicts the specification."""
    kinds = {
        "text": lambda value: isinstance(value, str),
        "texts": lambda value: isinstance(value, list) and all(isinstance(entry, str) for entry in value),
        "index": lambda value: isinstance(value, list),
    }
    found = [f"unknown key {key}" for key in metadata if key not in SPECIFICATION["keys"]]
    for key, allowed in SPECIFICATION["keys"].items():
        if key in metadata and not any(kinds[kind](metadata[key]) for kind in allowed):
            found.append(f"{key} is {metadata[key]!r}")
    if metadata.get("pipeline_tag", "other") not in SPECIFICATION["pipeline_tags"]:
        found.append(f"pipeline_tag is {metadata['pipeline_tag']}")

    def check(kind, entry):
        required, optional = SPECIFICATION[kind]["required"], SPECIFICATION[kind]["optional"]
        found.extend(f"{kind} lacks {name}" for name in required if entry.get(name) in (None, ""))
        found.extend(f"{kind} has {name}" for name in entry if name not in required + optional)

    for model in metadata.get("model-index", []):
        check("model", model)
        for result in model["results"]:
            check("result", result)
            check("task", result["task"])
            check("dataset", result["dataset"])
            if result["task"]["type"] not in SPECIFICATION["pipeline_tags"]:
                found.append(f"task type is {result['task']['type']}")
            for metric in result["metrics"]:
                check("metric", metric)
                if not isinstance(metric["value"], float) or not math.isfinite(metric["value"]):
                    found.append(f"value is {metric['value']!r}")
    return found


@pytest.mark.parametrize("ticket_task", ["membership", "labels"])
@pytest.mark.parametrize("has_run", [True, False])
@pytest.mark.parametrize("given", [{}, {"license": "mit", "language": ["en"], "datasets": "org/data", "tags": "x"}])
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
    # What else a check would find.
    broken = {"model-index": [{"results": [{"task": {"type": "x"}, "dataset": {}, "metrics": [{"value": "1"}]}]}]}
    assert len(faults({**broken, "tags": "x", "pipeline_tag": "membership", "licence": "mit"})) == 9


def test_every_task_has_a_name_that_the_hub_and_transformers_know():
    tags = hf_rtl.model_card._PIPELINE_TAGS
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
    assert len(results) == len(metrics) - (ticket_task == "membership")  # all but the number of constant tickets
    of_whom = {f"route {name}": f"{name}/" for name in model.route_names} | {"all routes": ""}
    for whose, prefix in of_whom.items():
        measured = {name: value for name, value in metrics.items() if name[: name.find("/") + 1] == prefix}
        measured.pop("constant_tickets", None)
        assert [r.metric_value for r in results if r.dataset_config == whose] == list(measured.values())
    of_all = {result.metric_name: result for result in results if result.dataset_config == "all routes"}
    if ticket_task == "membership":
        assert of_all["F1, calibrated threshold, mean over routes"].metric_value == metrics["calibrated_f1"]
        assert of_all["Balanced accuracy, score > 0, worst route"].metric_value == metrics["worst_balanced_accuracy"]
        assert of_all["AUROC, mean over routes"].metric_type == "roc_auc"
        assert card.data.metrics == ["accuracy", "f1", "precision", "recall", "roc_auc"]
    else:
        assert of_all["Accuracy, worst route"].metric_value == metrics["worst_route_accuracy"]
        assert {result.metric_type for result in results} == {"accuracy"}


@pytest.mark.parametrize("names", [HOSTILE, [f"route {index}" for index in range(100)]], ids=["hostile", "many"])
def test_any_names_make_a_page_that_can_be_read(tmp_path, names):
    model = make_model(route_names=names)
    with_run(model, tmp_path)
    file = write_card(tmp_path)
    card = ModelCard.load(file)
    metadata, page = card.data.to_dict(), card.text
    assert faults(metadata) == []
    configs = [result["dataset"]["config"] for result in metadata["model-index"][0]["results"]]
    assert configs == [*(f"route {name}" for name in names), "all routes"]
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


@pytest.mark.parametrize("ticket_task", ["membership", "labels"])
def test_tables_say_what_masks_and_metrics_are(tmp_path, ticket_task):
    model = make_model(ticket_task)
    metrics = with_run(model, tmp_path, learning_rate=0.01, target_sparsity=[0.5], max_steps=1234)
    page = page_of(write_card(tmp_path))
    masks = [torch.cat([layer.flatten() for layer in model.mask_bank[name]]) for name in model.route_names]
    columns = dict(zip(["bal. acc.", "precision", "recall", "F1", "AUROC"], MEMBERSHIP, strict=True))
    if ticket_task == "labels":
        columns = {"accuracy": "accuracy"}

    *routes, of_all = table_with(page, "kept weights")
    for index, (name, row) in enumerate(zip(model.route_names, routes, strict=True)):
        kept = int(masks[index].sum())
        assert row[""] == str(index) and row["route"] == name and row["kept weights"] == f"{kept:,}"
        assert row["density"] == f"{100 * kept / len(masks[index]):.1f} %"
        assert (row["training samples"], row["test samples"]) == (str(100 + index), "10")
        assert {title: row[title] for title in columns} == {
            title: f"{metrics[f'{name}/{metric}']:.3f}" for title, metric in columns.items()
        }
    assert {title: of_all[title] for title in columns} == {t: f"{metrics[m]:.3f}" for t, m in columns.items()}
    assert (of_all["training samples"], of_all["test samples"]) == ("303", "30")
    assert of_all["density"] == f"{100 * int(torch.stack(masks).sum()) / torch.stack(masks).numel():.1f} %"

    for row, mask in zip(table_with(page, *model.route_names), masks, strict=True):
        for name, other in zip(model.route_names, masks, strict=True):
            alike = int((mask & other).sum()) / int((mask | other).sum())
            assert row[name] == ("1" if mask is other else f"{alike:.3f}")
    union, core = torch.stack(masks).any(0).sum(), torch.stack(masks).all(0).sum()
    assert f"{int(union):,} weights" in page and f"{int(core):,} (" in page

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


def test_calibrated_metrics_have_a_table_of_their_own(tmp_path):
    model = make_model()
    metrics = with_run(model, tmp_path)
    *routes, of_all = table_with(page_of(write_card(tmp_path)), "threshold")
    for name, threshold, row in zip(model.route_names, (0, 0.25, 0.5), routes, strict=True):
        assert (row["route"], row["threshold"]) == (name, f"{threshold:.3f}")
        assert row["F1"] == f"{metrics[f'{name}/calibrated_f1']:.3f}"
        assert row["bal. acc."] == f"{metrics[f'{name}/calibrated_balanced_accuracy']:.3f}"
    assert of_all["precision"] == f"{metrics['calibrated_precision']:.3f}" and "AUROC" not in of_all


def test_thresholds_are_those_that_were_measured(tmp_path):
    model = make_model()
    with_run(model, tmp_path)
    model.config.thresholds = None
    model.save_pretrained(tmp_path)
    page = page_of(write_card(tmp_path))
    assert [row["threshold"] for row in table_with(page, "threshold")] == ["0.000", "0.250", "0.500", ""]
    assert "model.config.thresholds" not in page and "No thresholds were calibrated" in page


def test_metrics_of_one_s_own_go_by_their_names(tmp_path):
    model = make_model("labels")
    with_run(model, tmp_path)
    run = json.loads((tmp_path / "training_run.json").read_text())
    run["evaluations"][0]["rounds"] = [{"loss": 0.5, "wer": 0.125, "cat/wer": 0.25}]
    write_run(tmp_path, run)
    card = ModelCard.load(write_card(tmp_path))
    measured = [(r.dataset_config, r.metric_type, r.metric_value) for r in card.data.eval_results]
    assert measured == [("route cat", "wer", 0.25), ("all routes", "wer", 0.125)] and card.data.metrics is None
    assert "\n- wer: 0.125\n" in card.text and "accuracy" not in table_with(card.text, "kept weights")[0]


def test_undefined_figures_are_dashes_and_no_results(tmp_path):
    model = make_model()
    with_run(model, tmp_path)
    run = json.loads((tmp_path / "training_run.json").read_text())
    run["evaluations"][0]["rounds"][-1]["dog/auroc"] = None
    write_run(tmp_path, run)
    card = ModelCard.load(write_card(tmp_path))
    assert [row["AUROC"] == "–" for row in table_with(card.text, "kept weights")] == [False, True, False, False]
    of_dog = [result.metric_type for result in card.data.eval_results if result.dataset_config == "route dog"]
    assert len(of_dog) == 9 and "roc_auc" not in of_dog


def test_limits_are_those_of_the_model(tmp_path):
    model = make_model()
    masks = [mask & (layer not in (3, 4)) for layer, mask in enumerate(model.mask_bank["dog"])]
    masks[4].view(-1)[0] = True  # a single weight, which is enough
    model.mask_bank["dog"] = masks
    with_run(model, tmp_path)
    page = page_of(write_card(tmp_path, limitations=["Not for *cats*."]))
    layer = model.mask_bank.weight_names[3].replace("_", "\\_")
    assert f"Of 1 of 15 prunable weights some tickets keep nothing: {layer} (1 of 3 tickets).\n" in page
    assert "**1 ticket gives every sample the same score**" in page
    assert "- Not for *cats*.\n" in page and "is not described here" not in page
    assert "The calibrated thresholds fit" in page and "Statistics are shared" not in page

    model = RTLModelForImageClassification.from_backbone(
        "test_resnet", route_names=["a", "b"], ticket_task="labels", num_labels=2, norm_statistics="shared"
    )
    page = page_of(write_card(model, tmp_path / "other"))
    assert "**Statistics are shared.**" in page and "Layers are empty" not in page and "same score" not in page
    assert "Precision depends" not in page and "is not described here" in page


@pytest.mark.parametrize("ticket_task", ["membership", "labels"])
def test_a_router_is_told_of_with_what_it_gets_right(tmp_path, ticket_task):
    model = make_model(ticket_task)
    page = page_of(write_card(model, tmp_path / "before"))
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
    page = page_of(write_card(tmp_path))
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
        assert page.count('classifier("image.png")') == 2


def test_of_a_model_without_a_run_nothing_is_made_up(tmp_path):
    card = ModelCard.load(write_card(make_model(), tmp_path))
    assert "How well the tickets do is not known" in card.text and "How the tickets were found" in card.text
    assert card.data.eval_results is None and card.data.metrics is None and card.data.base_model is None
    assert len(table_with(card.text, "kept weights")) == 4 and len(table_with(card.text, "bytes")) > 5
    assert not any(len(table[0]) > 4 and "round" in table[0] for table in tables(card.text))
    assert "None" not in card.text and "Undefined" not in card.text


def test_a_run_with_other_masks_or_weights_is_not_the_model_s(tmp_path, caplog):
    model = make_model()
    with_run(model, tmp_path)
    assert "model-index" in write_card(tmp_path).read_text()
    for change in ("masks", "weights"):
        changed = make_model()
        if change == "masks":  # of the same union
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


# How to use it


@pytest.mark.parametrize("ticket_task", ["membership", "labels"])
def test_the_code_on_the_page_runs(tmp_path, monkeypatch, ticket_task):
    model = make_model(ticket_task, route_names=['the "best" cat', "dog"])
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("org/name")
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained("org/name")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    image.save("image.png")
    inputs = processor(image, return_tensors="pt")
    blocks = python_blocks(page_of(write_card("org/name", model_id="org/name")))
    assert len(blocks) == 3
    names = {"inputs": inputs}
    for block in blocks:
        exec(block, names)
    expected = model(**inputs, route_ids=0).logits
    assert torch.equal(names["outputs"].logits, expected)
    assert type(names["ticket"]).__name__ == "TimmWrapperForImageClassification"
    assert torch.equal(names["ticket"](**inputs).logits, expected)
    answers = names["classifier"]("image.png", top_k=None)
    if ticket_task == "membership":
        scores = {model.route_names[0]: expected.sigmoid().item()}
    else:
        scores = dict(zip(model.config.id2label.values(), expected.softmax(1)[0].tolist(), strict=True))
    assert {answer["label"]: answer["score"] for answer in answers} == pytest.approx(scores, rel=1e-4)


def test_code_that_is_saved_along_is_named(tmp_path):
    model = make_model()
    for with_code in (False, True):
        model.save_pretrained(tmp_path, with_code=with_code)
        blocks = python_blocks(page_of(write_card(model, tmp_path, model_id="org/name")))
        trusting = 'AutoModelForImageClassification.from_pretrained("org/name", trust_remote_code=True).eval()'
        assert [trusting in block for block in blocks] == [False, False, *[True] * with_code, False]
        # Also on a page that goes elsewhere.
        elsewhere = write_card(tmp_path, tmp_path / f"page-{with_code}", model_id="org/name").read_text()
        assert (trusting in elsewhere) == with_code


# What is given


def test_what_is_given_is_said_and_remembered(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    given = {
        "model_id": "org/animals",
        "description": "For *zoos*.",
        "authors": ["Ada <ada@x.org>", "Bo"],
        "citation": "@misc{animals}",
        "base_model": "timm/resnet18.a1_in1k",
        "language": "en",
        "license": "other",
        "license_name": "zoo",
        "license_link": "LICENSE",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["animals"],
        "datasets": ["org/zoo"],
    }
    file = write_card(tmp_path, **given)
    content = file.read_bytes()
    card = ModelCard(content.decode())
    assert "# animals\n" in card.text and "For *zoos*." in card.text and "By Ada \\<ada@x.org\\>, Bo." in card.text
    assert "```bibtex\n@misc{animals}\n```" in card.text and 'from_pretrained("org/animals")' in card.text
    for name in ("base_model", "language", "license", "license_name", "license_link", "pipeline_tag", "datasets"):
        assert card.data.get(name) == given[name], name
    assert "animals" in card.data.tags
    assert write_card(tmp_path).read_bytes() == content
    assert "# Animals of zoos\n" in write_card(tmp_path, model_name="Animals of zoos").read_text()


def test_a_model_is_enough_if_it_is_told_where_to_write(tmp_path):
    model = make_model()
    model.add_model_tags(["mine"])
    file = write_card(model, tmp_path / "new", license="mit")
    assert file == tmp_path / "new" / "README.md" and "mine" in ModelCard.load(file).data.tags
    assert {path.name for path in file.parent.iterdir()} == {"README.md", "similarity.png"}


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"licence": "mit"}, TypeError, "`licence` is nothing that a card says; did you mean `license`"),
        ({"license": 3}, TypeError, "`license` must be a string, got 3"),
        ({"tags": ["a", 3]}, TypeError, r"`tags` must be a string or a list of strings, got \['a', 3\]"),
        ({"tags": ("a", "b")}, TypeError, r"`tags` must be a string or a list of strings, got \('a', 'b'\)"),
        ({"license": ["mit"]}, TypeError, r"`license` must be a string, got \['mit'\]"),
    ],
)
def test_what_no_card_can_say_is_refused(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        write_card(make_model(), tmp_path / "new", **arguments)
    assert not list(tmp_path.iterdir())


def test_a_missing_model_or_folder_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="`source` must be a model, or a folder with one that `save_pretrained` wrote"
    ):
        write_card(tmp_path)
    with pytest.raises(ValueError, match="`folder` is missing"):
        write_card(make_model())
    assert not list(tmp_path.iterdir())


def test_a_card_that_cannot_be_read_is_refused_and_stays(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\nMine\n")
    with pytest.raises(ValueError, match="README.md.* is no YAML"):
        write_card(make_model(), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "---\nlicense: [\n---\nMine\n"


# What a user wrote


def test_what_a_user_wrote_survives(tmp_path, caplog):
    file = tmp_path / "README.md"
    mine = "---\nlicense: apache-2.0  # as agreed\ntags: [zoo]\nextra: 1\n---\n# Mine\n\nText.\n"
    file.write_text(mine)
    model = make_model()
    write_card(model, tmp_path, license="mit", datasets="org/zoo")
    assert "`license` = 'mit' is not written" in caplog.text and "'apache-2.0'" in caplog.text
    card = ModelCard.load(file)
    assert card.data.license == "apache-2.0" and card.data.extra == 1
    assert card.data.tags == ["zoo", "hf_rtl", "pruning", "sparsity", "lottery-ticket"]
    assert "license: apache-2.0  # as agreed\n" in file.read_text()
    assert card.text.startswith("# Mine\n\nText.\n\n<!-- hf_rtl: begin") and card.text.count("\n# ") == 0
    content = file.read_bytes()
    write_card(model, tmp_path)
    assert file.read_bytes() == content
    file.write_bytes(content + b"\nMore.\n")
    model.mask_bank["cat"] = model.mask_bank["dog"]
    write_card(model, tmp_path)
    changed = file.read_bytes()
    assert changed != content + b"\nMore.\n" and changed.endswith(b"\nMore.\n")
    assert changed.startswith(content.partition(b"<!-- hf_rtl")[0])


def test_a_license_given_again_replaces_the_one_given_before(tmp_path, caplog):
    model = make_model()
    for license in ("mit", "bsd-3-clause"):
        assert ModelCard.load(write_card(model, tmp_path, license=license)).data.license == license
    assert not caplog.text


LOCAL, REMOTE = b"Written here.\n", b"---\nlicense: mit\n---\nWritten there.\n"


def test_a_push_keeps_the_text_that_was_written_by_hand(tmp_path):
    model, file = make_model(), tmp_path / "README.md"

    def push(remote):
        return write_card(model, tmp_path, remote=remote).read_bytes()

    # Only there, by somebody who knows nothing of us.
    write_card(model, tmp_path)
    pushed = push(REMOTE)
    assert b"Written there." in pushed and b"license: mit" in pushed
    # There again, upon what was pushed; here nothing since, though the card was written again.
    write_card(model, tmp_path)
    edited = pushed.replace(b"there.", b"there, later.")
    pushed = push(edited)
    assert b"Written there, later." in pushed
    # Only here.
    file.write_bytes(pushed.replace(b"there, later.", b"here.") + LOCAL)
    pushed = push(pushed)
    assert b"Written here.\n" in pushed and b"there" not in pushed
    # On both sides: nothing is lost, and nothing written.
    file.write_bytes(pushed + b"Here.\n")
    with pytest.raises(ValueError, match="were changed by hand"):
        push(pushed + b"There.\n")
    assert file.read_bytes() == pushed + b"Here.\n"
    # On both sides the same.
    assert push(file.read_bytes()).endswith(b"Here.\n")


def test_what_was_written_here_is_not_lost_to_a_card_of_the_hub(tmp_path):
    """Nor if the card was written in between, which is no push."""
    (tmp_path / "README.md").write_bytes(LOCAL)
    model = make_model()
    write_card(model, tmp_path)
    with pytest.raises(ValueError, match="were changed by hand"):
        write_card(model, tmp_path, remote=REMOTE)
    assert (tmp_path / "README.md").read_bytes().startswith(b"---\n")
    fresh = write_card(make_model(), tmp_path / "fresh", remote=b"").read_bytes()
    assert LOCAL in write_card(model, tmp_path, remote=fresh).read_bytes()


# Around it


def test_without_matplotlib_there_is_no_picture(tmp_path, monkeypatch):
    def importing(name, *arguments, **keywords):
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError(name)
        return original(name, *arguments, **keywords)

    original = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", importing)
    monkeypatch.setattr(hf_rtl.model_card, "find_spec", lambda name: None)
    page = page_of(write_card(make_model(), tmp_path))
    assert "similarity.png" not in page and len(table_with(page, "cat", "dog", "owl")) == 3
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]


def test_one_route_has_no_pairs(tmp_path):
    model = make_model("labels", route_names=["only"])
    page = page_of(write_card(model, tmp_path))
    assert "Jaccard" not in page and "nan" not in page


def test_the_template_is_a_part_of_the_package():
    pyproject = Path(__file__).parent.parent / "pyproject.toml"
    assert 'hf_rtl = ["model_card_template.md"]' in pyproject.read_text()
    assert (Path(hf_rtl.__file__).parent / "model_card_template.md").is_file()


# After a training


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """Two rounds, evaluated on two sets."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(30, 3, 32, 32, generator=generator)
    samples = [{"pixel_values": image, "label": index % 3} for index, image in enumerate(pixels)]
    args = RTLTrainingArguments(
        output_dir=str(tmp_path_factory.mktemp("secret-folder") / "run"),
        target_sparsity=[0.2, 0.4],
        prune_amount=0.3,
        extraction_steps=1,
        max_steps=2,
        route_batch_size=8,
        calibration_fraction=0.3,
        save_strategy="no",
        run_name="secret-name",
        hub_token="hf_secret",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    evaluated = {"near": samples[:12], "near_by": samples[12:18]}
    trainer = RTLTrainer(make_model(), args, train_dataset=samples, eval_dataset=evaluated)
    trainer.card_data = RTLCardData(dataset_name="Noise")
    trainer.train()
    return trainer


def test_a_training_ends_with_a_card(trainer):
    folder = Path(trainer.args.output_dir) / "final"
    assert {"README.md", "similarity.png", "training_run.json"} <= {file.name for file in folder.iterdir()}
    card = ModelCard.load(folder / "README.md")
    assert faults(card.data.to_dict()) == []
    assert {result.dataset_name for result in card.data.eval_results} == {"Noise"}
    measured = {(r.dataset_config, r.metric_name): r.metric_value for r in card.data.eval_results}
    assert len(measured) == len(card.data.eval_results) == 2 * (3 * 10 + 14)
    for name in ("near", "near_by"):
        expected = trainer.rounds[-1]["metrics"][f"eval_{name}_cat/calibrated_balanced_accuracy"]
        assert measured[f"{name}, route cat", "Balanced accuracy, calibrated threshold"] == expected
    assert [(row["sparsity"], row["bal. acc. (near_by)"]) for row in table_with(card.text, "round")] == [
        (f"{100 * report['sparsity']:.1f} %", f"{report['metrics']['eval_near_by_balanced_accuracy']:.3f}")
        for report in trainer.rounds
    ]
    assert "### On near\n" in card.text and "### On near\\_by\n" in card.text
    counts = [row["training samples"] for row in table_with(card.text, "kept weights")]
    assert counts == [*map(str, trainer.route_data.partition.counts.tolist()), "21"]
    assert f"torch {torch.__version__}" in card.text and "1 process (cpu)" in card.text
    assert "all of them are in\n[training_args.json](training_args.json):" in card.text


def test_nothing_in_it_is_private(trainer):
    folder = Path(trainer.args.output_dir) / "final"
    secrets = [str(folder.parent), "secret", "hf_secret", socket.gethostname(), f"/{getpass.getuser()}/"]
    for name in ("README.md", "training_run.json"):
        text = (folder / name).read_text()
        assert [secret for secret in secrets if secret in text] == [], name


def test_a_trainer_takes_trainer_s_names_and_ours(trainer):
    folder = Path(trainer.args.output_dir) / "final"
    trainer.create_model_card(
        license="mit",
        finetuned_from="org/base",
        tasks="image-feature-extraction",
        dataset_tags=["org/noise"],
        dataset="Noise of ours",
        authors=["Ada"],
    )
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.base_model, card.data.datasets) == ("mit", "org/base", ["org/noise"])
    assert card.data.pipeline_tag == "image-feature-extraction" and {
        r.dataset_name for r in card.data.eval_results
    } == {"Noise of ours"}
    assert "By Ada." in card.text
    with pytest.raises(TypeError, match="`autors` is nothing that a card says; did you mean `authors`"):
        trainer.create_model_card(autors=["Ada"])


def test_the_model_of_a_trainer_knows_its_run_until_it_changes(trainer, tmp_path):
    page = write_card(trainer.model, tmp_path).read_text()
    assert "model-index" in page and "training_args.json" not in page  # which is not there
    before = trainer.model.mask_bank["cat"]
    trainer.model.mask_bank["cat"] = trainer.model.mask_bank["dog"]
    assert "model-index" not in write_card(trainer.model, tmp_path).read_text()
    # The card of the run does not change with it.
    file = Path(trainer.args.output_dir) / "final" / "README.md"
    content = file.read_bytes()
    trainer.create_model_card()
    assert file.read_bytes() == content
    trainer.model.mask_bank["cat"] = before


def test_a_trainer_that_has_not_trained_has_no_card(tmp_path):
    args = RTLTrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match=r"has no final model yet; run `train\(\)` to its end first"):
        RTLTrainer(make_model(), args).create_model_card(license="mit")
