"""Small models with runs for tests of model cards, and functions that read cards."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from hf_rtl import Partition, RTLModelForImageClassification, RTLTrainingArguments
from hf_rtl.metrics import label_metrics, membership_metrics
from hf_rtl.model_card.run_record import write_run
from hf_rtl.training.run_report import describe_run


SPECIFICATION = yaml.safe_load(Path(__file__).with_name("specification.yaml").read_text())
HOSTILE = ["a|b", "T-shirt/top", "<b>x</b>", "ünïcødé 漢字", "`*_[x](y)", "- yes: no", '"\\', "x" * 200]
MEMBERSHIP = ["balanced_accuracy", "precision", "recall", "f1", "auroc", "precision_at_recall_80"]


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
    """Saves `model` in `folder` as if a run had made it, with thresholds for membership. Returns its metrics."""
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
    routes = range(len(names))
    chance = {
        name: 0.5 if model.config.ticket_task == "membership" else 0.3 + 0.1 * (name == names[0]) for name in names
    }
    run = describe_run(
        model,
        arguments,
        [report],
        training=Partition(np.repeat(routes, [100 + route for route in routes]), names),
        evaluations={"": Partition(np.repeat(routes, 10), names)},
        chance={"": chance},
    )
    write_run(Path(folder), run)
    return metrics


def read_page(file):
    return ModelCard.load(file).text


def tables(page):
    """Every table of a page, as a renderer reads it: rows of the texts of cells. All rows are equally long."""
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
    """The rows of the only table with these titles in its head, as title -> cell."""
    (table,) = [table for table in tables(page) if set(titles) <= set(table[0])]
    return [dict(zip(table[0], row, strict=True)) for row in table[1:]]


def python_blocks(page):
    return [t.content for t in MarkdownIt().parse(page) if t.type == "fence" and t.info == "python"]


def faults(metadata):
    """The contradictions of a card's metadata to the specification."""
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
