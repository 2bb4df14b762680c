"""Small runs of `recipes/prune.py` on the files of a user, and `evaluate.py` on what they saved."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluate import evaluate
from safetensors.torch import load_file
from transformers import AutoImageProcessor, TrainingArguments

from hf_rtl import RTLModelForImageClassification, RTLTrainer, RTLTrainingArguments
from shared.data_arguments import DataArguments
from shared.prepare import prepare as prepare_data
from tests.distributed.launchers import TORCH, Launcher
from tests.recipes.commands import RECIPES
from tests.recipes.small_files import save_backbone, save_csv, save_images, save_jsonl, save_sound, tone
from tests.recipes.small_texts import WORDS
from tests.training.small_runs import SMALL_NET


pytestmark = pytest.mark.slow

CELLS = {("cat", "north"): 8, ("cat", "süd"): 6, ("dög", "north"): 7, ("dög", "süd"): 9}
# Two prune events and four steps.
SHORT: dict[str, Any] = {
    "target_sparsity": 0.5,
    "prune_amount": 0.3,
    "extraction_steps": 1,
    "max_steps": 4,
    "route_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "learning_rate": 0.01,
    "save_strategy": "no",
    "dense": False,
}
IMAGES: dict[str, Any] = {"backbone": SMALL_NET, "image_size": 16, "route_column": "hospital"}
# What tells how long a run took, not what came out.
TIMED = ("runtime", "per_second", "preparation_time")


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """`backbone(kind)` is the folder of a tiny one; see `save_backbone`."""
    folder, known = tmp_path_factory.mktemp("backbones"), {}

    def backbone(kind: str) -> str:
        if kind not in known:
            known[kind] = save_backbone(kind, folder / kind)
        return known[kind]

    return backbone


def command(values: dict[str, Any]) -> list[str]:
    words: list[str] = []
    for name, value in values.items():
        words += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return words


def start(script: str, *arguments: object) -> int:
    """The exit status of a recipe in this process."""
    with pytest.MonkeyPatch.context() as patched, pytest.raises(SystemExit) as ended:
        patched.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(RECIPES / script), run_name="__main__")
        raise SystemExit(0)
    return int(ended.value.code or 0)


def prune(dataset: object, output_dir: Path, **values: Any) -> dict[str, Any]:
    """The results of a run."""
    everything = {"dataset": dataset, "output_dir": output_dir, **SHORT, **values}
    assert start("prune.py", *command(everything)) == 0
    return json.loads((output_dir / "results.json").read_text())


def figures(results: dict[str, Any]) -> dict[str, Any]:
    """All that came out of a run."""
    return {
        f"{kind}-{index}/{name}": value
        for kind in ("rounds", "controls")
        for index, report in enumerate(results[kind])
        for name, value in {**report["metrics"], "kept": report.get("kept"), "union": report.get("union")}.items()
        if not name.endswith(TIMED)
    }


def masks(output_dir: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(output_dir / "final" / "model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if "mask" in name}


def assert_evaluates_to_the_same(output_dir: Path) -> None:
    assert start("evaluate.py", output_dir / "final", "--compare", output_dir / "results.json") == 0


def assert_refused(capsys: pytest.CaptureFixture[str], status: int, output_dir: Path, message: str) -> None:
    """One line, exit code 2, and nothing written."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert status == 2 and message in line and not output_dir.exists()


@pytest.fixture(scope="module")
def images_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """The folder of images, that of a run, and its results."""
    folder = tmp_path_factory.mktemp("images")
    results = prune(save_images(folder / "scans", CELLS), folder / "run", **IMAGES)
    return folder / "scans", folder / "run", results


def test_images_are_pruned_and_evaluated_again(
    images_run: tuple[Path, Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    scans, run, results = images_run
    metrics = results["rounds"][0]["metrics"]
    assert {"eval_north/accuracy", "eval_süd/accuracy"} <= set(metrics) and results["num_test"] == 6
    assert_evaluates_to_the_same(run)
    assert start("evaluate.py", run / "final", "--dataset", scans, "--max_test_samples", 4) == 0
    assert "final" in capsys.readouterr().out


@pytest.mark.parametrize("values", [{"in_memory": True}, {"dataloader_num_workers": 1}], ids=["held", "workers"])
def test_how_images_are_served_changes_nothing(
    images_run: tuple[Path, Path, dict[str, Any]], tmp_path: Path, values: dict
) -> None:
    scans, run, results = images_run
    again = prune(scans, tmp_path / "run", **IMAGES, **values)
    assert figures(again) == figures(results)
    assert all(torch.equal(mask, masks(run)[name]) for name, mask in masks(tmp_path / "run").items())


@pytest.mark.long
@pytest.mark.parametrize("augmentation", ["flip", "timm"])
def test_augmented_images_are_the_same_in_workers(
    images_run: tuple[Path, Path, dict[str, Any]], tmp_path: Path, augmentation: str
) -> None:
    scans, _, plain = images_run
    options = {**IMAGES, "augmentation": augmentation, "seed_transforms": True}
    runs = [
        prune(scans, tmp_path / str(workers), **options, dataloader_num_workers=workers, in_memory=bool(workers))
        for workers in (0, 1)
    ]
    assert figures(runs[0]) == figures(runs[1]) != figures(plain)


def test_an_interrupted_run_is_continued(
    images_run: tuple[Path, Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scans, run, results = images_run
    original, steps = RTLTrainer.training_step, []

    def stopping(*arguments: Any, **keywords: Any) -> Any:
        steps.append(None)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return original(*arguments, **keywords)

    values = {"dataset": scans, "output_dir": tmp_path / "run", **SHORT, **IMAGES}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(RTLTrainer, "training_step", stopping)
        assert start("prune.py", *command(values)) == 130
    assert "again" in capsys.readouterr().err and not (tmp_path / "run" / "results.json").exists()
    assert figures(prune(scans, tmp_path / "run", **IMAGES)) == figures(results)
    assert all(torch.equal(mask, masks(run)[name]) for name, mask in masks(tmp_path / "run").items())


def test_two_processes_find_the_same_tickets(images_run: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
    scans, run, results = images_run
    values = {"dataset": scans, "output_dir": tmp_path / "run", **SHORT, **IMAGES}
    started = Launcher(
        [
            *(*TORCH, "--nproc_per_node", "2", "--master_port", "0", "--rdzv_backend", "c10d"),
            *("--rdzv_endpoint", "127.0.0.1:0", str(RECIPES / "prune.py"), *command(values), "--use_cpu"),
        ],
        tmp_path / "log",
    )
    try:
        assert started.wait() == 0, started.printed()
    finally:
        started.stop()
    again = json.loads((tmp_path / "run" / "results.json").read_text())
    assert again["num_processes"] == 2
    assert all(torch.equal(mask, masks(run)[name]) for name, mask in masks(tmp_path / "run").items())
    assert again["rounds"][0]["kept"] == results["rounds"][0]["kept"]


def test_groups_of_classes_and_clusters_are_routes(tmp_path: Path) -> None:
    cells = {(label, "north"): 5 for label in ("ant", "bee", "cat", "dog")}
    root = save_images(tmp_path / "scans", cells)
    groups = tmp_path / "groups.yaml"
    groups.write_text("insects: [ant, bee]\nmammals: [cat, dog]\n")
    results = prune(root, tmp_path / "groups", backbone=SMALL_NET, image_size=16, num_channels=1, route_groups=groups)
    assert {"eval_insects/recall", "eval_mammals/recall"} <= set(results["rounds"][0]["metrics"])
    assert_evaluates_to_the_same(tmp_path / "groups")

    # Dark images and bright ones.
    save_images(tmp_path / "two", {("cat", "a"): 12, ("dog", "b"): 12})
    values = {"backbone": SMALL_NET, "image_size": 16, "num_channels": 1, "cluster_routes": 2}
    options = {"augmentation": "flip", "ticket_task": "membership"}
    results = prune(tmp_path / "two", tmp_path / "clusters", **values, **options)
    assert {"eval_cluster-0/recall", "eval_cluster-1/recall"} <= set(results["rounds"][0]["metrics"])
    del values["backbone"]
    arguments = DataArguments(dataset=str(tmp_path / "two"), **values, **options)
    found = prepare_data(arguments, SMALL_NET, route_column=None, seed=0).rows
    assert {*zip(found.train["label"], found.train["route"], strict=True)} in ({(0, 0), (1, 1)}, {(0, 1), (1, 0)})
    assert_evaluates_to_the_same(tmp_path / "clusters")


def test_a_route_without_test_samples_is_evaluated_to_the_same(tmp_path: Path) -> None:
    root = save_images(tmp_path / "scans", CELLS, folder="train")
    save_images(root, {("cat", "north"): 3}, folder="test")
    results = prune(root, tmp_path / "run", backbone=SMALL_NET, image_size=16)
    assert np.isnan(results["rounds"][0]["metrics"]["eval_dög/recall"])
    assert_evaluates_to_the_same(tmp_path / "run")


TEXTS = [
    {"text": f"{WORDS[index % 6]} {['film', 'phone'][index % 2]}", "label": "bad" if index % 6 < 3 else "good"}
    for index in range(24)
]


def test_texts_and_sounds_may_ask_for_membership(tmp_path: Path, encoder: str, backbone: Callable[[str], str]) -> None:
    file = save_csv(tmp_path / "texts.csv", TEXTS)
    results = prune(file, tmp_path / "texts", backbone=encoder, prune_exclude="*pooler*")
    assert {"eval_bad/recall", "eval_good/recall"} <= set(results["rounds"][0]["metrics"])
    assert_evaluates_to_the_same(tmp_path / "texts")

    for index in range(16):
        save_sound(tmp_path / "tones" / ("low", "high")[index % 2] / f"{index}.wav", tone(0.2, (40, 200)[index % 2]))
    values = {"backbone": backbone("audio"), "max_seconds": 0.2}
    runs = [
        prune(tmp_path / "tones", tmp_path / f"sounds-{held}", **values, ticket_task="membership", in_memory=held)
        for held in (False, True)
    ]
    assert {"eval_high/recall", "eval_low/recall"} <= set(runs[0]["rounds"][0]["metrics"])
    assert figures(runs[0]) == figures(runs[1])
    assert_evaluates_to_the_same(tmp_path / "sounds-False")


@pytest.mark.parametrize("task", ["causal", "masked", "seq2seq", "token"])
def test_language_models_and_words(tmp_path: Path, encoder: str, backbone: Callable[[str], str], task: str) -> None:
    generator = np.random.default_rng(0)
    samples = []
    for index in range(40):
        words = [str(word) for word in generator.choice(WORDS, 5)]
        row: dict[str, Any] = {"text": " ".join(words), "answer": words[0], "site": "ab"[index % 2]}
        if task == "token":
            row = {"tokens": words, "tags": [len(word) // 4 for word in words], "site": "ab"[index % 2]}
        samples.append(row)
    values: dict[str, Any] = {"max_length": 8, "route_column": "site", "task": task}
    if task == "seq2seq":
        values["target_column"] = "answer"
    results = prune(
        save_jsonl(tmp_path / "a.jsonl", samples),
        tmp_path / "run",
        backbone=encoder if task == "token" else backbone(task),
        **values,
    )
    metrics = results["rounds"][0]["metrics"]
    assert 0 <= metrics["eval_worst_route_accuracy"] <= metrics["eval_accuracy"] <= 1
    of_routes = [metrics["eval_a/accuracy"], metrics["eval_b/accuracy"]]
    assert metrics["eval_worst_route_accuracy"] == min(of_routes)
    assert metrics["eval_mean_route_accuracy"] == sum(of_routes) / 2
    assert_evaluates_to_the_same(tmp_path / "run")


@pytest.mark.long
def test_clusters_of_blocks_are_routes(tmp_path: Path, backbone: Callable[[str], str]) -> None:
    generator = np.random.default_rng(0)
    samples = [{"text": " ".join(generator.choice(WORDS[: 5 + 5 * (i % 2)], 8))} for i in range(40)]
    file = save_jsonl(tmp_path / "a.jsonl", samples)
    for task in ("causal", "masked"):
        values = {"backbone": backbone(task), "task": task, "max_length": 8, "cluster_routes": 2}
        prune(file, tmp_path / task, **values)
        assert_evaluates_to_the_same(tmp_path / task)


def test_a_broken_body_ends_a_run_and_the_flag_it_names_mends_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scans = save_images(tmp_path / "scans", CELLS)
    whole = (scans / "cat/002.png").read_bytes()
    (scans / "cat/002.png").write_bytes(whole[: len(whole) // 2])
    values = {"dataset": scans, **SHORT, **IMAGES}
    for workers in (0, 1):
        output_dir = tmp_path / f"run-{workers}"
        assert (
            start("prune.py", *command({**values, "output_dir": output_dir, "dataloader_num_workers": workers})) == 2
        )
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "002.png" in line]
        assert line.startswith("prune.py: error: '002.png' cannot be decoded") and "--skip_unreadable" in line
    status = start("prune.py", *command({**values, "output_dir": tmp_path / "run"}), "--check_files")
    assert_refused(capsys, status, tmp_path / "run", "1 files cannot be read: '002.png'")
    assert start("prune.py", *command({**values, "output_dir": tmp_path / "run"}), "--skip_unreadable") == 0
    assert "1 unreadable files are left out: '002.png'" in capsys.readouterr().out


def test_help_shows_our_arguments_and_help_all_those_of_trainer(capsys: pytest.CaptureFixture[str]) -> None:
    printed = {}
    for flag in ("--help", "--help_all"):
        assert start("prune.py", flag) == 0
        printed[flag] = capsys.readouterr().out
    ours = printed["--help"]
    assert "\n    python recipes/prune.py --dataset scans --route_column hospital" in ours
    groups = re.findall(r"^(\w+):$", ours, re.MULTILINE)
    assert {"ModelArguments", "DataArguments", "RTLTrainingArguments"} <= set(groups)
    shown = {name: set(re.findall(r"^  (?:-\w, )?--(\w+)", text, re.MULTILINE)) for name, text in printed.items()}
    own = {field.name for field in fields(RTLTrainingArguments)} - {field.name for field in fields(TrainingArguments)}
    assert own | {field.name for field in fields(DataArguments)} <= shown["--help"]
    assert not {"learning_rate", "output_dir", "adam_beta1"} & shown["--help"]
    assert {"learning_rate", "output_dir", "adam_beta1"} | shown["--help"] <= shown["--help_all"]


BAD = {
    "a sparsity": ({"target_sparsity": 1.5}, "target_sparsity"),
    "a task": ({"task": "smell"}, "invalid choice: 'smell'"),
    "an argument": ({"target_sparsities": 0.5}, "--target_sparsities"),
    "a data set": ({"dataset": "nothere/at/all.csv"}, "nothere/at/all.csv"),
    "a column": ({"route_column": "town"}, "no column 'town'; it has image, label, hospital"),
    "a backbone": ({"backbone": "no_such_net"}, "no_such_net"),
    "a number": ({"max_train_samples": 1}, "leaves no sample"),
    "a table": ({"dataset": "broken.csv"}, "cannot be read as csv: Error tokenizing"),
    "a file": ({"route_groups": "nothere.yaml"}, "nothere.yaml"),
    "one class": ({"route_column": "hospital", "label_column": "ward"}, "has the single label"),
    "one route": ({"route_column": "ward", "ticket_task": "membership"}, "needs at least two routes"),
    "a small route": ({"route_column": "ward"}, "Route 'b' has a single sample; every route needs at least 2"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(
    images_run: tuple[Path, Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    capsys.readouterr()
    change, message = BAD[kind]
    scans = images_run[0]
    if kind == "a table":
        change = {"dataset": tmp_path / "broken.csv"}
        change["dataset"].write_text("text,label\na,b\nc,d,e\n")
    if "ward" in change.values():
        shutil.copytree(scans, tmp_path / "scans")
        scans = tmp_path / "scans"
        files = [line.split(",")[0] for line in (scans / "metadata.csv").read_text().splitlines()[1:]]
        wards = ["b" if kind == "a small route" and file == files[3] else "a" for file in files]
        rows = [
            {"file_name": file, "hospital": "ns"[index % 2], "ward": ward}
            for index, (file, ward) in enumerate(zip(files, wards, strict=True))
        ]
        save_csv(scans / "metadata.csv", rows)
    values = {"dataset": scans, "output_dir": tmp_path / "run", **SHORT, **IMAGES, **change}
    assert_refused(capsys, start("prune.py", *command(values)), tmp_path / "run", message)


def test_a_model_made_in_python_is_evaluated_by_the_names_of_its_classes(
    images_run: tuple[Path, Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scans, run, _ = images_run
    # The classes and routes have another order than the names that are found in the data.
    model = RTLModelForImageClassification.from_backbone(
        SMALL_NET, seed=1, route_names=["süd", "north"], ticket_task="labels", id2label={0: "dög", 1: "cat"}
    )
    model.mask_bank["süd"] = [torch.rand(mask.shape) < 0.5 for mask in model.mask_bank["süd"]]
    model.save_pretrained(tmp_path / "model")
    AutoImageProcessor.from_pretrained(run / "final").save_pretrained(tmp_path / "model")
    found = evaluate(tmp_path / "model", {"dataset": str(scans)}, "hospital")["metrics"]

    model.eval()
    data = prepare_data(
        DataArguments(dataset=str(scans)), SMALL_NET, route_column="hospital", seed=0, processor=str(run / "final")
    )
    right = []
    for row, value in zip(data.inputs.test, data.rows.test["image"], strict=True):
        site = data.rows.route_names[row["hospital"]]
        logits = model(pixel_values=row["pixel_values"][None], route_ids=site).logits
        right.append((site, model.config.id2label[int(logits.argmax())] == Path(value["path"]).parent.name))
    assert found["eval_accuracy"] == pytest.approx(np.mean([hit for _, hit in right]))
    for site in ("north", "süd"):
        expected = np.mean([hit for of, hit in right if of == site])
        assert found[f"eval_{site}/accuracy"] == pytest.approx(expected)

    assert start("evaluate.py", tmp_path / "model", "--dataset", scans, "--route_column", "hospital") == 0
    assert f"{found['eval_accuracy']:.3f}" in capsys.readouterr().out
    assert start("evaluate.py", tmp_path / "model") == 2
    assert "its test data are not known" in capsys.readouterr().err
